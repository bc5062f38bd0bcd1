"""Rows that were asked for ahead of time: hits that are there, and the rest on its way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engram_client.gpu.streams import Event
from engram_client.hbm.misses import Lines
from engram_client.prefetch import Handle

if TYPE_CHECKING:
    from engram_client.hbm.table import HbmTable


class HbmHandle:
    """Rows of which some are on the device already and others on their way. Not thread-safe."""

    def __init__(
        self, table: HbmTable, out: Tensor, ready: Event, lines: Lines | None, handle: Handle | None
    ) -> None:
        self._table, self._out, self._ready, self._lines, self._handle = table, out, ready, lines, handle

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._handle is None or self._handle.done()

    def wait(self, timeout: float | None = None) -> Tensor:
        """Rows uint8 [..., H, row_bytes] in the order of the current stream; may be called again.

        Raises DeadlineExceeded where they are late, and what the look-up raised.
        """
        self._ready.block_current(self._table.device)
        if self._handle is not None and self._lines is not None:
            rows = np.asarray(self._handle.wait(timeout=timeout))
            self._table.finish(self._lines, rows, self._out, self._ready, timeout)
            self._handle = None
        return self._out

    def cancel(self) -> None:
        """Give up what is on its way, if anything is; `wait` then raises Cancelled."""
        if self._handle is not None:
            self._handle.cancel()
