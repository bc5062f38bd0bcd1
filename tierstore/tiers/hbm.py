"""The HBM tier of a daemon: hot records of DRAM once more, in device memory, for other processes to read.

One arena for each record size, laid out as DRAM's are (engram_client/hbm/mirror.py). The daemon writes,
clients read; neither asks the other. What lies in device memory is known here by a *shadow* in host
memory: an arena of the same sets whose records have no bytes. Admitting is done there, by the kernels
and the policy of DRAM, and what has changed is then copied: the sequences of the sets concerned are made
odd, slots are written, and the sets' lines with even sequences come last. Each is an operation on one
stream, so it has ended before the next begins.

Nobody counts what clients read here, so what is in stays until others come that were read more often in DRAM,
first in first out, but for records that return.

Where the device has no memory, cannot share it, or runs out of it later, the tier is off, that is said
once, and DRAM serves: nothing here may take the daemon down. Checked on CPU tensors; not yet run on a GPU.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable

import numpy as np
import torch

from engram_client.arena.layout import KEY_AT, OWNER_AT, SEQUENCE_AT, WAYS, ArenaGeometry
from engram_client.errors import BadRequest, ConfigError
from engram_client.gpu import as_device
from engram_client.gpu.ipc import NotShared
from engram_client.hbm.mirror import HEADER_BYTES, Mirror, mirror_bytes
from tierstore.kernels.admit import ADMITTED, COUNTS, EVICTED, admit_records
from tierstore.kernels.dueling import new_duel
from tierstore.kernels.promote import places_of, take_hot
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import DramTier
from tierstore.tiers.hbm_memory import free_later, make_memory
from tierstore.tiers.region import Region

log = logging.getLogger(__name__)


class HbmArena:
    """Records of one size in device memory. One thread at a time. Raises NotShared where it cannot be."""

    def __init__(self, budget_bytes: int, record_bytes: int, device: torch.device) -> None:
        set_bytes = mirror_bytes(1, record_bytes) - HEADER_BYTES
        sets = (budget_bytes - HEADER_BYTES) // set_bytes
        if sets < 1:
            raise NotShared(f"{budget_bytes} bytes hold no set of records of {record_bytes} bytes")
        self.serving = secrets.randbits(62) | 1
        self.record_bytes, self.sets, self.records = record_bytes, sets, 0
        self._shadow = Region(ArenaGeometry(sets, 0))
        self._duel = new_duel(sets)
        none = np.zeros(0, np.int64)
        places_of(self.shadow, none, none, none)  # compile or load now, not under a lock of DRAM's
        take_hot(self.shadow, self.shadow, 0, 0, 1, 0, 0)
        self.memory = make_memory(device, mirror_bytes(sets, record_bytes))
        self._mirror = Mirror(self.memory.tensor, sets, record_bytes)
        self._mirror.control.fill_(self.serving)

    @property
    def shadow(self) -> tuple[int, int, int, int]:
        """What `tierstore.kernels.promote` takes for a tier above."""
        return self._shadow.places

    @property
    def bytes(self) -> int:
        """Device memory that it takes."""
        return mirror_bytes(self.sets, self.record_bytes)

    def admit(self, slots: np.ndarray) -> tuple[int, int]:
        """Take in slots of the DRAM arena, uint8 [n, slot_bytes]; how many came in, and left for them.

        Raises RuntimeError where the device has no memory for what is on its way.
        """
        keys = np.ascontiguousarray(slots[:, KEY_AT : KEY_AT + 8]).view(np.int64).ravel()
        owners = np.ascontiguousarray(slots[:, OWNER_AT : OWNER_AT + 8]).view(np.int64).ravel()
        counts, places = np.zeros(COUNTS, np.int64), np.zeros_like(keys)
        where = (*self._shadow.writer_places, self._duel, 0)
        admit_records(*where, keys, owners, slots.ctypes.data, places, 0, counts)
        places_of(self.shadow, keys, owners, places)  # a later one may have driven out an earlier one
        there = np.flatnonzero(places >= 0)
        _, last = np.unique(places[there][::-1], return_index=True)
        kept = there[::-1][last]
        self._write(slots[kept], places[kept])
        self.records += int(counts[ADMITTED] - counts[EVICTED])
        return int(counts[ADMITTED]), int(counts[EVICTED])

    def _write(self, slots: np.ndarray, places: np.ndarray) -> None:
        """Bring the device's sets to what the shadow says."""
        if not places.size:
            return
        sets = np.unique(places // WAYS)
        words, mirror = self._shadow.index_lines(sets).view(np.int64), self._mirror

        def there(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(mirror.device)

        which = there(sets)
        mirror.sequences.index_copy_(0, which, there(words[:, SEQUENCE_AT // 8] - 1))  # odd
        mirror.slots.index_copy_(0, there(places), there(slots).view(torch.int64))
        mirror.lines.index_copy_(0, which, there(words))

    def retire(self) -> None:
        """Nobody may use it any more; its memory is freed a while later."""
        try:
            self._mirror.control.zero_()
        except RuntimeError as error:
            log.warning("the HBM arena could not be marked as gone: %s", error)
        del self._mirror
        free_later(self.memory)


class HbmTier:
    """The arenas of one device, filled by `promote`. All methods but `arenas` take its lock."""

    def __init__(
        self, dram: DramTier, sizes: frozenset[int], device: str, budget_bytes: int, staging_bytes: int,
        reads_min: int, counters: Counters,
    ) -> None:  # fmt: skip
        """`sizes`: bytes of the records that are worth it. `budget_bytes` 0 is off; a tier that cannot be is
        off as well, and says so.
        """
        self._dram, self._sizes, self._device_name, self._counters = dram, sizes, device, counters
        self._staging_bytes, self._reads_min = staging_bytes, reads_min
        self._changing = threading.RLock()
        self._arenas: dict[int, HbmArena] = {}
        self._next_sets: dict[int, int] = {}
        self.budget_bytes = 0
        self.on_change: Callable[[], None] = lambda: None  # called when `arenas` has changed
        try:
            self.resize(budget_bytes)
        except ConfigError as error:
            log.error("there is no HBM tier, DRAM serves alone: %s", error)

    def arenas(self) -> dict[int, HbmArena]:
        """By the bytes of their records."""
        return dict(self._arenas)

    def resize(self, budget_bytes: int) -> None:
        """Begin anew with a budget, empty; the old arenas go. Promotion fills it again.

        Raises ConfigError where there is not so much or the device cannot be used, and changes nothing.
        While old memory waits to be freed (`hbm_memory.RETIRE_S`) it is taken as well.
        """
        with self._changing:
            if budget_bytes == self.budget_bytes:
                return
            made = self._made(budget_bytes) if budget_bytes else {}
            old, self._arenas, self._next_sets = self._arenas, made, {}
            self.budget_bytes = budget_bytes
        self.on_change()
        for arena in old.values():
            arena.retire()

    def _made(self, budget_bytes: int) -> dict[int, HbmArena]:
        made = dict[int, HbmArena]()
        weights = {size: weight for size, weight in self._dram.weights.items() if size in self._sizes}
        if not weights or not self._dram.arenas():
            raise ConfigError("$.hbm.budget_bytes: HBM takes records from DRAM; there are none of them")
        try:
            device = as_device(self._device_name, "hbm.device")
            total = sum(weights.values())
            for record_bytes, weight in weights.items():
                share = budget_bytes * weight // total if total else budget_bytes // len(weights)
                made[record_bytes] = HbmArena(share, record_bytes, device)
        except (NotShared, BadRequest, RuntimeError, OSError) as error:
            for arena in made.values():
                arena.retire()
            raise ConfigError(
                f"$.hbm.budget_bytes: {budget_bytes} bytes of {self._device_name} cannot be had: "
                f"{str(error).partition(chr(10))[0]}; lower it, or free memory of the device"
            ) from error
        return made

    def promote(self, bytes_max: int) -> int:
        """Bring records that DRAM was read for again and again, so many bytes at most; how many records."""
        with self._changing:
            try:
                return sum(self._promote(arena, bytes_max) for arena in self._arenas.values())
            except (RuntimeError, MemoryError) as error:
                log.error(
                    "the HBM tier is off until hbm.budget_bytes is set anew, DRAM serves alone: %s",
                    str(error).partition("\n")[0],
                )
                old, self._arenas, self.budget_bytes = self._arenas, {}, 0
        self.on_change()
        for arena in old.values():
            arena.retire()
        return 0

    def _promote(self, arena: HbmArena, bytes_max: int) -> int:
        """A part of DRAM's sets, going round."""
        dram = self._dram.arena(arena.record_bytes)
        assert dram is not None
        slot_bytes, brought = dram.geometry.slot_bytes, 0
        staging = np.empty((max(1, min(self._staging_bytes, bytes_max) // slot_bytes), slot_bytes), np.uint8)
        first, sets = self._next_sets.get(arena.record_bytes, 0), dram.geometry.sets
        looked = 0
        while looked < sets and brought * slot_bytes < bytes_max:
            first = first if first < sets else 0
            after, count = dram.take_hot(arena.shadow, first, self._reads_min, staging)
            if count:
                admitted, evicted = arena.admit(staging[:count])
                self._counters.add(hbm_promoted=admitted, hbm_evicted=evicted)
                brought += count
            looked, first = looked + max(1, after - first), after
        self._next_sets[arena.record_bytes] = first
        return brought

    def stats(self) -> dict[str, int]:
        """What is held now."""
        arenas = self.arenas().values()
        return {
            "hbm_budget_bytes": self.budget_bytes,
            "hbm_bytes": sum(arena.bytes for arena in arenas),
            "hbm_records": sum(arena.records for arena in arenas),
        }

    def close(self) -> None:
        """Let everybody know that nothing here may be used."""
        self.on_change = lambda: None
        self.resize(0)
