"""The HBM tier beside the store: off without a budget, else filled from DRAM in the background.

Torch comes with it, 180 MB of memory, so it is imported only once there is a budget.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import structs

from engram_client.errors import ConfigError
from tierstore.config import Config, check_config, memory_limit
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import DramTier

if TYPE_CHECKING:
    from tierstore.tiers.hbm import HbmArena, HbmTier

log = logging.getLogger(__name__)
NOTHING = {"hbm_budget_bytes": 0, "hbm_bytes": 0, "hbm_records": 0}


class Promotion:
    """The tier, where there is one, and the thread that fills it. Thread safe."""

    def __init__(self, dram: DramTier, sizes: frozenset[int], config: Config, counters: Counters) -> None:
        """`sizes`: bytes of the records that clients look up whole. Says where the tier cannot be."""
        self._sizes = sizes
        self._dram, self._whole, self._counters = dram, config, counters
        self._config = config.hbm
        self._tier: HbmTier | None = None
        self._thread: threading.Thread | None = None
        self._changing, self._closing = threading.Lock(), threading.Event()
        self.on_change: Callable[[], None] = lambda: None  # called when `arenas` has changed
        if self._config.budget_bytes:
            self._start(self._config.budget_bytes)

    def _start(self, budget_bytes: int) -> None:
        try:
            from tierstore.tiers.hbm import HbmTier
        except ImportError as error:
            log.error("there is no HBM tier, DRAM serves alone: %s; pip install 'tierstore[gpu]'", error)
            return
        config = self._config
        self._tier = HbmTier(
            self._dram, self._sizes, config.device, budget_bytes, config.staging_bytes, config.promote_reads,
            self._counters,
        )  # fmt: skip
        self._tier.on_change = lambda: self.on_change()
        self._thread = threading.Thread(target=self._work, name="tierstore-promotion", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closing.wait(self._config.promote_period_s):
            self.step()

    def step(self) -> int:
        """Bring what is worth it now; how many records. What goes wrong stays here."""
        try:
            return self._tier.promote(self._config.promote_bytes) if self._tier else 0
        except Exception:
            log.exception("promotion to HBM failed unexpectedly; the next round tries again")
            return 0

    def arenas(self) -> dict[int, HbmArena]:
        """What other processes may read, by the bytes of its records."""
        return self._tier.arenas() if self._tier else {}

    def resize(self, budget_bytes: int) -> None:
        """Begin anew with another budget, 0 for none. Raises ConfigError and changes nothing."""
        hbm = structs.replace(self._config, budget_bytes=budget_bytes)
        check_config(structs.replace(self._whole, hbm=hbm), memory_limit())
        with self._changing:
            if self._tier is None and budget_bytes:
                self._start(0)
            if self._tier is not None:
                self._tier.resize(budget_bytes)
            elif budget_bytes:
                raise ConfigError("$.hbm.budget_bytes: HBM needs torch; pip install 'tierstore[gpu]'")

    def stats(self) -> dict[str, int]:
        return self._tier.stats() if self._tier else NOTHING

    def close(self) -> None:
        """Stop; what others have mapped says that it is gone."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._tier is not None:
            self._tier.close()
