"""A budget of device memory that gives way: to what is free now, and to whoever runs out of it later.

HBM belongs to the model first. So the arena is made as large as its budget and what is free allow, and if a
look-up finds no memory for its own result, all of the arena is given back and the look-up is done again,
through the table. Each is said once, with what it costs. Only `resize` raises for want of memory: somebody
asked for that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from engram_client.errors import BadRequest
from engram_client.gpu.probe import capturing, out_of_memory
from engram_client.hbm.arena import HbmArena, arena_bytes, sets_within
from engram_client.hbm.misses import MissServer

log = logging.getLogger(__name__)
LEFT_FREE = 16  # one part in so many of what is free is left to others
Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int | None:
    """Device memory that this process could take now; None where that is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + pooled)


class HbmMemory:
    """An arena, and the way to what it does not hold, on one device. Thread safe.

    Raises BadRequest for a budget too small for a set of records; takes less than the budget where less is
    free.
    """

    def __init__(
        self, record_bytes: int, columns_max: int, budget_bytes: int, staging_bytes: int, device: torch.device
    ) -> None:
        self.device = device
        self.arena = _arena(record_bytes, budget_bytes, device)
        self.misses = MissServer(self.arena, columns_max, staging_bytes)
        self._giving_way = threading.Lock()
        self._said_captured = False
        self.given_up = 0  # times that all of the arena was given back

    def attempt(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; where it finds no device memory, once more without the arena."""
        try:
            return work()
        except RuntimeError as error:
            if not out_of_memory(error) or capturing(self.device):
                raise
            self._give_way(error)
        return work()

    def _give_way(self, error: Exception) -> None:
        with self._giving_way:
            if self.arena.captured:
                if not self._said_captured:
                    self._said_captured = True
                    log.warning(
                        "no memory left on %s, and the HBM tier cannot give its own back: graphs "
                        "hold it; resize it "
                        "once they are gone",
                        self.device,
                    )  # fmt: skip
            elif self.arena.bytes > 2 * arena_bytes(self.arena.record_bytes, 1):
                taken = self.arena.bytes
                self.misses.settle()
                self.arena.drop_all()
                self.given_up += 1
                log.warning(
                    "no memory left on %s (%s): the HBM tier gave its %d bytes back and serves through the "
                    "table; resize it once there is room",
                    self.device, str(error).partition("\n")[0], taken,
                )  # fmt: skip
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def resize(self, budget_bytes: int) -> None:
        """See `HbmArena.resize`. Raises BadRequest where there is no memory for it."""
        self.misses.settle()
        try:
            self.arena.resize(budget_bytes)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
            raise BadRequest(
                f"{self.device} has no memory for an HBM budget of {budget_bytes} bytes beside the one it "
                f"replaces; nothing was changed: {said}"
            ) from error

    def stats(self) -> dict[str, int]:
        """See `HbmArena.stats`."""
        self.misses.settle()
        return {
            **self.arena.stats(),
            "hbm_not_admitted": self.misses.not_admitted,
            "hbm_given_up": self.given_up,
        }


def _arena(record_bytes: int, budget_bytes: int, device: torch.device) -> HbmArena:
    """As large as the budget, or as what is free; halved until the device agrees."""
    sets_within(record_bytes, budget_bytes)
    least, free = arena_bytes(record_bytes, 1), free_bytes(device)
    size_bytes = budget_bytes if free is None else min(budget_bytes, free - free // LEFT_FREE)
    while True:
        try:
            arena = HbmArena(record_bytes, max(least, size_bytes), device)
            break
        except RuntimeError as error:
            if not out_of_memory(error) or size_bytes <= least:
                raise
            size_bytes //= 2
    if arena.budget_bytes < budget_bytes:
        log.warning(
            "%s has no room for an HBM budget of %d bytes: the tier takes %d, and finds so much less "
            "of what is "
            "asked for; resize it once there is room",
            device, budget_bytes, arena.budget_bytes,
        )  # fmt: skip
    return arena
