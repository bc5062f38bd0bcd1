"""`numpy.take` on a table wholly in memory, with `out=`."""

from __future__ import annotations

import numpy as np

from tierbench.alternate import Step


def take_step(table: np.ndarray, batches: np.ndarray, rows_per_record: int, first: int = 0) -> Step:
    """A step that gathers the records of one batch, `batches` int64 [n, records], from `table`.

    The step's call number chooses the batch, counted from `first`. The mode is "clip", because numpy buffers
    `out` under the default one; ids are in range.
    """
    out = np.empty((batches.shape[1], table.shape[1]), np.uint8)

    def step(call: int) -> int:
        np.take(table, batches[(first + call) % len(batches)], axis=0, out=out, mode="clip")
        return batches.shape[1] * rows_per_record

    return step
