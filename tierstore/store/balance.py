"""Moving DRAM between record sizes while serving, and remembering over restarts where it went.

One step each period in a thread of its own. What the tiers measured decides; `tiers.shares` says
how. Shares are kept beside the snapshots of the cache, as a snapshot fits the share it was taken with.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from tierstore.tiers.dram import DramTier

log = logging.getLogger(__name__)


def known_weights(path: Path, table_bytes: dict[int, int]) -> dict[int, int]:
    """The weights an earlier run came to; `table_bytes` where there are none for these record sizes."""
    try:
        weights = {int(size): int(weight) for size, weight in json.loads(path.read_bytes()).items()}
    except FileNotFoundError:
        return table_bytes
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("the DRAM budget is shared by the size of tables: %s cannot be used: %s", path, error)
        return table_bytes
    usable = weights.keys() == table_bytes.keys() and min(weights.values(), default=-1) >= 0
    return weights if usable and any(weights.values()) else table_bytes


class Balance:
    """Balances a DRAM tier every `period_s`; 0 leaves the shares as they are."""

    def __init__(self, dram: DramTier, path: Path, period_s: float) -> None:
        self._dram = dram
        self._path = path
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if period_s and len(dram.arenas()) > 1:
            self._thread = threading.Thread(
                target=self._work, args=(period_s,), name="tierstore-balance", daemon=True
            )
            self._thread.start()

    def _work(self, period_s: float) -> None:
        while not self._closing.wait(period_s):
            self.step()

    def step(self) -> None:
        """Move what is worth moving, and write down where the budget lies now."""
        if not self._dram.balance():
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._dram.weights))
            partial.rename(self._path)
        except OSError as error:
            log.warning("a restart will share the DRAM budget as before: %s", error)

    def close(self) -> None:
        """Stop; a step that has begun is finished."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
