"""Whole records and their index in one device's memory, inside a budget of bytes.

Records lie one after another without gaps, `record_bytes` each, and are copied as numbers of the widest
integer that divides them: eight bytes at a time, or sixteen, for records of 8 rows of 264 bytes.

Where kernels serve, look-ups may run on any stream and in any thread, beside each other and beside the one
admission that is under way: each looks whether what it copied has been replaced meanwhile. Torch operations
cannot, so where they stand in for kernels on a GPU, everything here waits for what came before it, on the
device, and a graph cannot be captured. On a CPU a lock does it.

`resize` moves what is held into new tensors. It waits for the device and holds everybody up meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engram_client.errors import BadRequest
from engram_client.gpu.probe import capturing, made_current
from engram_client.gpu.streams import HOST_EVENT, Event, record_current
from engram_client.hbm import operations
from engram_client.hbm.index import INDEX_BYTES_PER_SET, WAYS, Index, mix, set_of
from engram_client.hbm.operations import ASKED, COUNTERS, KERNELS, MASKED, MISSES, Decoding, Keys
from engram_client.hbm.replacement import NEWEST, PINNED, Newcomers

log = logging.getLogger(__name__)
_MOVED_BYTES = 1 << 26  # of records, while resizing


def arena_bytes(record_bytes: int, sets: int) -> int:
    """Device memory of so many sets: one set of the index, and one record, are nobody's."""
    return (sets + 1) * INDEX_BYTES_PER_SET + (sets * WAYS + 1) * record_bytes


def sets_within(record_bytes: int, budget_bytes: int) -> int:
    """How many sets a budget has room for. Raises BadRequest where it is none."""
    least = arena_bytes(record_bytes, 1)
    if budget_bytes < least:
        raise BadRequest(
            f"an HBM budget of {budget_bytes} bytes is too small: records of {record_bytes} bytes come in "
            f"sets of {WAYS}, and the smallest arena takes {least} bytes"
        )
    return 1 + (budget_bytes - least) // (WAYS * record_bytes + INDEX_BYTES_PER_SET)


class HbmArena:
    """Records of `record_bytes` bytes under (key, owner); owners are numbers of 0..32767. Thread safe.

    device:       where it lies
    record_bytes: of each record
    budget_bytes: what it was told it may take; `bytes` is what it takes

    Raises BadRequest for a budget too small for a set, torch.OutOfMemoryError where the device has no room.
    """

    def __init__(self, record_bytes: int, budget_bytes: int, device: torch.device) -> None:
        self.record_bytes, self.device = record_bytes, device
        self._unit = operations.unit_of(record_bytes)
        self._kernels = KERNELS.serves(device)
        with torch.inference_mode(False):  # tensors of inference mode cannot be written outside of it
            self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self._smallest = self._made(1)  # so that giving all of it up never asks for memory
        self._index, self._records = self._made(sets_within(record_bytes, budget_bytes))
        self.budget_bytes = budget_bytes
        self._changing = threading.RLock()  # held while work is given to the device
        self._last: Event = HOST_EVENT
        self.captured = False

    @property
    def slots(self) -> int:
        """How many records it can hold."""
        return self._index.sets * WAYS

    @property
    def bytes(self) -> int:
        """Device memory that it takes."""
        return self._index.bytes + self._records.nbytes

    @property
    def in_order(self) -> bool:
        """Whether admissions have to be given to the stream of the look-ups, for want of kernels."""
        return not self._kernels

    def lookup_into(self, asked: Keys, out: Tensor, found: Tensor, decoding: Decoding | None = None) -> None:
        """Copy what is here into `out`: uint8 [n, record_bytes], or decoded, bfloat16 [n, rows, dim].

        Records that are missing, and those of keys of -1, become zeros. found int64 [3 + 2 n] tells how
        many are missing, and for each, in any order, its place and its key; the last pair is nobody's.
        Negative keys other than -1 are missing. Never waits for the device.
        """
        found[0].zero_()
        if not len(asked.keys):
            return
        with self._given(capturing(self.device)):
            words = out if decoding is not None else self._as_words(out)
            if self._kernels:
                operations.look_up(self._index, self._records, asked, words, found, self._counters, decoding)
            else:
                operations.look_up_plainly(
                    self._index, self._records, asked, words, found, self._counters, decoding
                )
            if words.data_ptr() != out.data_ptr():
                out.copy_(words.view(torch.uint8).view(out.shape))

    def scatter(
        self, source: Tensor, lines: Tensor, out: Tensor, places: Tensor, decoding: Decoding | None = None
    ) -> None:
        """Records lines[i] of source uint8 [l, record_bytes] to record places[i] of `out`, as look-ups do."""
        words = out if decoding is not None else self._as_words(out)
        operations.scatter(source.view(self._unit), lines, words, places, decoding, self._kernels)
        if words.data_ptr() != out.data_ptr():
            taken = words.view(torch.uint8).view(out.shape).index_select(0, places)
            out.index_copy_(0, places, taken)

    def admit(self, keys: Tensor, owners: Tensor, records: Tensor, *, pinned: bool = False) -> None:
        """Take in records uint8 [n, record_bytes] under keys int64 and owners int16 [n].

        Negative keys, keys that are here and repeated keys bring nothing in; the records of equal keys must
        be equal. With `pinned` they are never replaced, those that were here before included. Calls belong
        to one stream, that of look-ups where `in_order`.

        Where torch operations fail, as for want of memory, the arena is empty afterwards: keys may have been
        written whose records were not. A kernel is launched whole or not at all.
        """
        if not len(keys):
            return
        with self._given(False):
            new = Newcomers.of(keys, owners, records.contiguous().view(self._unit), self._index.sets)
            try:
                operations.admit(
                    self._index, self._records, new, self._counters, pinned=pinned, kernels=self._kernels
                )
            except BaseException:
                self._index.clear()
                raise

    def resize(self, budget_bytes: int) -> None:
        """Hold as many records as `budget_bytes` have room for; of what is here, what fits.

        Pinned records are kept first, then those that were read most. Until it is done the old arena's
        memory is taken, too. Raises BadRequest for a budget too small, torch.OutOfMemoryError, and changes
        nothing.
        """
        sets = sets_within(self.record_bytes, budget_bytes)
        with self._changing:
            self._finish()
            index, records = self._made(sets)
            with torch.inference_mode(False), torch.no_grad():
                self._move(index, records)
            self._finish()
            self._index, self._records, self.budget_bytes = index, records, budget_bytes

    def drop_all(self) -> None:
        """Give the memory back but for the smallest arena, which is empty."""
        with self._changing:
            self._finish()
            self._index, self._records = self._smallest
            self._index.clear()
            self.budget_bytes = arena_bytes(self.record_bytes, 1)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now; waits for the device."""
        with self._changing:
            index, numbers = self._index, self._counters.tolist()
            held = {
                "records": int((index.keys[:-1] >= 0).sum()),
                "pinned": int(((index.states[:-1] & 7) == PINNED).sum()),
            }
        hits = {"hits": numbers[ASKED] - numbers[MISSES] - numbers[MASKED]}
        counts = dict(zip(COUNTERS[1:], numbers[1:], strict=True))
        sizes = {"slots": self.slots, "bytes": self.bytes, "budget_bytes": self.budget_bytes}
        return {f"hbm_{name}": number for name, number in {**hits, **counts, **held, **sizes}.items()}

    @contextmanager
    def _given(self, capture: bool) -> Iterator[None]:
        """While this holds, the calling thread alone gives work, in order where the forms need that."""
        ordered = not self._kernels and self.device.type == "cuda"
        if capture and ordered:
            raise BadRequest(
                "without Triton's kernels the HBM tier cannot be part of a captured graph: nothing would "
                "keep its look-ups apart from admissions; install a C compiler and triton, or look up outside"
            )
        self.captured |= capture
        with self._changing, made_current(self.device):
            if ordered:
                self._last.block_current(self.device)
            yield
            if ordered:
                self._last = record_current(self.device)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _move(self, index: Index, records: Tensor) -> None:
        """Copy what fits into an empty index and its records."""
        old, count = self._index, self.slots
        keys, owners, states = (each[:-1].reshape(-1) for each in (old.keys, old.owners, old.states))
        held = keys >= 0
        sets = torch.where(held, set_of(mix(keys.clamp(min=0), owners), index.sets), index.sets)
        touched = old.touched[:-1].reshape(-1)
        worth = ((states & 7).long() * 2 + touched) * WAYS + (states >> 4).long()
        order = ((sets + 1) * (WAYS * WAYS) - 1 - worth).argsort(stable=True)
        sets = sets.index_select(0, order)
        starts = torch.searchsorted(sets, torch.arange(index.sets + 1, device=sets.device))
        rank = torch.arange(len(sets), device=sets.device) - starts.index_select(0, sets)
        kept = (sets < index.sets) & (rank < WAYS)
        slots = torch.where(kept, sets * WAYS + rank, index.sets * WAYS)
        queues = states.index_select(0, order) & 7
        kept_states = queues | ((NEWEST - rank).clamp(min=0) << 4).to(torch.uint8)
        values = (*(each.index_select(0, order) for each in (keys, owners, touched)), kept_states)
        for new, value in zip((index.keys, index.owners, index.touched, index.states), values, strict=True):
            new.view(-1).scatter_(0, slots, value)
        index.keys[-1].fill_(-1)
        step = max(1, _MOVED_BYTES // self.record_bytes)
        for start in range(0, count, step):
            part = slice(start, start + step)
            records.index_copy_(0, slots[part], self._records.index_select(0, order[part]))

    def _as_words(self, out: Tensor) -> Tensor:
        """`out` as the records' integers; memory of its own where it does not lie on their boundaries."""
        size = self._unit.itemsize
        if out.data_ptr() % size or out.storage_offset() % size:
            shape = (len(out), self.record_bytes // size)
            return torch.empty(shape, dtype=self._unit, device=self.device)
        return out.view(self._unit)

    def _made(self, sets: int) -> tuple[Index, Tensor]:
        """An empty index and room for its records."""
        with torch.inference_mode(False):
            index = Index.empty(sets, self.device)
            shape = (sets * WAYS + 1, self.record_bytes // self._unit.itemsize)
            records = torch.empty(shape, dtype=self._unit, device=self.device)
            records[-1].zero_()
        return index, records
