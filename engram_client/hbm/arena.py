"""Whole records and their index in one device's memory, inside a budget of bytes.

Records lie one after another without gaps, `record_bytes` each, and are copied as numbers of the widest
integer that divides them: eight bytes at a time for records of 8 rows of 264 bytes.

Look-ups and admissions are torch operations of fixed shapes on the current stream: what was called first
comes first, and no call but `stats` waits for the device. An arena belongs to one stream and one thread
at a time. `resize` moves what it holds into new tensors, so a graph captured before has to be captured anew.

Checked on CPU tensors against a model in plain Python, and on meta tensors, which hold no values to read;
not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_client.errors import BadRequest
from engram_client.hbm.index import (
    ADMISSIONS_PER_SET,
    INDEX_BYTES_PER_SET,
    PINNED,
    WAYS,
    Index,
    rank_in_runs,
    set_of,
)

COUNTERS = ("hits", "misses", "masked", "admitted", "evicted", "left_out")
_UNITS = (torch.int64, torch.int32, torch.int16)
_MOVED_BYTES = 1 << 26  # of records, while resizing


class HbmArena:
    """Records of `record_bytes` bytes under (key, owner); owners are numbers of 0..32767.

    Raises BadRequest for a budget too small for a set, or that the device does not have.
    """

    def __init__(self, record_bytes: int, budget_bytes: int, device: torch.device) -> None:
        self.record_bytes = record_bytes
        self.device = device
        self._unit = next((unit for unit in _UNITS if record_bytes % unit.itemsize == 0), torch.uint8)
        with torch.inference_mode(False):  # tensors of inference mode cannot be written outside of it
            self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self._index, self._records = self._made(budget_bytes)
        self.budget_bytes = budget_bytes

    @property
    def slots(self) -> int:
        """How many records it can hold."""
        return self._index.sets * WAYS

    @property
    def bytes(self) -> int:
        """Device memory that it takes."""
        return self._index.bytes + self._records.nbytes

    def lookup_into(self, keys: Tensor, owners: Tensor, out: Tensor) -> Tensor:
        """Copy what is here into `out` uint8 [n, record_bytes]; what is missing, bool [n].

        keys int64 and owners int16 [n]. Records that are missing, and those of keys of -1, become zeros.
        A negative key other than -1 is missing.
        """
        slots, found = self._index.find(keys, owners)
        if len(keys):
            self._gather(slots, out)
        self._index.touch(slots)
        missing = ~found & (keys != -1)
        hits, misses = found.sum(), missing.sum()
        self._counters[:3] += torch.stack((hits, misses, len(keys) - hits - misses))
        return missing

    def admit(self, keys: Tensor, owners: Tensor, records: Tensor, *, pinned: bool = False) -> None:
        """Take in records uint8 [n, record_bytes] under keys int64 and owners int16 [n].

        Negative keys, keys that are here and repeated keys bring nothing in; the records of equal keys must
        be equal. With `pinned` they are never replaced, those that were here before included.

        Where it fails, as for want of memory for its temporaries, the arena is empty afterwards: keys may
        have been written whose records were not.
        """
        if not len(keys):
            return
        try:
            self._admit(keys, owners, records, pinned)
        except BaseException:
            self._index.clear()
            raise

    def _admit(self, keys: Tensor, owners: Tensor, records: Tensor, pinned: bool) -> None:
        slots, found = self._index.find(keys, owners)
        if pinned:  # before newcomers may take their slots
            self._index.pin(slots)
        per_set = WAYS if pinned else ADMISSIONS_PER_SET
        placed = self._index.place(keys, owners, (keys >= 0) & ~found, per_set)
        self._records.index_copy_(0, placed.slots, records.contiguous().view(self._unit))
        if pinned:
            self._index.pin(placed.slots)
        self._counters[3:] += placed.counts

    def resize(self, budget_bytes: int) -> None:
        """Hold as many records as `budget_bytes` have room for; of what is here, what fits.

        Pinned records are kept first, then those that were read most. Until it is done the old arena's
        memory is taken, too. Raises BadRequest and changes nothing.
        """
        index, records = self._made(budget_bytes)
        try:
            self._move(index, records)
        except RuntimeError as error:
            raise BadRequest(
                f"{self.device} has no memory to move records to a budget of {budget_bytes} bytes: {error}"
            ) from error
        self._index, self._records, self.budget_bytes = index, records, budget_bytes

    def _move(self, index: Index, records: Tensor) -> None:
        """Copy what fits into an empty index and its records."""
        old, count = self._index, self.slots
        keys, owners, counts = (each[:-1].reshape(-1) for each in (old.keys, old.owners, old.counts))
        sets = torch.where(keys >= 0, set_of(keys, owners, index.sets), index.sets)
        order = (sets * (PINNED + 1) + PINNED - counts.long()).argsort(stable=True)
        sets = sets.index_select(0, order)
        rank = rank_in_runs(sets, torch.ones_like(sets, dtype=torch.bool))
        kept = (sets < index.sets) & (rank < WAYS)
        slots = torch.where(kept, sets * WAYS + rank, index.nowhere_slot)
        for new, values in ((index.keys, keys), (index.owners, owners), (index.counts, counts)):
            new.view(-1).scatter_(0, slots, values.index_select(0, order))
        step = max(1, _MOVED_BYTES // self.record_bytes)
        for start in range(0, count, step):
            part = slice(start, start + step)
            records.index_copy_(0, slots[part], self._records.index_select(0, order[part]))

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now; waits for the device."""
        index = self._index
        counts = dict(zip(COUNTERS, self._counters.tolist(), strict=True))
        held = {
            "records": int((index.keys[:-1] >= 0).sum()),
            "pinned": int((index.counts[:-1] == PINNED).sum()),
        }
        sizes = {"slots": self.slots, "bytes": self.bytes, "budget_bytes": self.budget_bytes}
        return {f"hbm_{name}": number for name, number in {**counts, **held, **sizes}.items()}

    def _gather(self, slots: Tensor, out: Tensor) -> None:
        if out.data_ptr() % self._unit.itemsize == 0 and out.storage_offset() % self._unit.itemsize == 0:
            torch.index_select(self._records, 0, slots, out=out.view(self._unit))
        else:
            out.copy_(self._records.index_select(0, slots).view(torch.uint8))

    def _made(self, budget_bytes: int) -> tuple[Index, Tensor]:
        """An empty index and room for its records."""
        set_bytes = WAYS * self.record_bytes + INDEX_BYTES_PER_SET
        sets = budget_bytes // set_bytes - 1  # the last one holds no records
        if sets < 1:
            raise BadRequest(
                f"an HBM budget of {budget_bytes} bytes is too small: records of {self.record_bytes} bytes "
                f"come in sets of {WAYS}, and the smallest arena takes {2 * set_bytes} bytes"
            )
        try:
            with torch.inference_mode(False):
                index = Index.empty(sets, self.device)
                shape = ((sets + 1) * WAYS, self.record_bytes // self._unit.itemsize)
                records = torch.empty(shape, dtype=self._unit, device=self.device)
                records[index.zero_slot].zero_()
        except RuntimeError as error:
            raise BadRequest(
                f"{self.device} has no {budget_bytes} bytes for an HBM budget; ask for less: {error}"
            ) from error
        return index, records
