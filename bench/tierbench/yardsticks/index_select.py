"""`torch.index_select` on a table wholly in memory, with `out=`, in every dtype the rows divide into."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tierbench.alternate import Step

VIEWS = (np.uint8, np.float32, np.int64)


def index_select_steps(table: np.ndarray, batches: np.ndarray, first: int = 0) -> dict[str, Step]:
    """By view, a step that gathers the row ids of one batch from `table` uint8 [N, row_bytes].

    `batches` int64 [n, rows]; the step's call number chooses one, counted from `first`, so that
    several callers need not gather the same one.
    """
    indices = [torch.from_numpy(batch) for batch in batches]
    views = [view for view in VIEWS if table.shape[1] % np.dtype(view).itemsize == 0]
    return {
        f"torch.index_select {view.__name__}": _step(torch.from_numpy(table.view(view)), indices, first)
        for view in views
    }


def _step(table: torch.Tensor, indices: list[torch.Tensor], first: int) -> Step:
    rows = indices[0].numel()
    out = torch.empty((rows, table.shape[1]), dtype=table.dtype)

    def step(call: int) -> int:
        torch.index_select(table, 0, indices[(first + call) % len(indices)], out=out)
        return rows

    return step


def with_threads(threads: int, run: Callable[[], float]) -> float:
    """`run` while torch may use so many threads inside one operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)
