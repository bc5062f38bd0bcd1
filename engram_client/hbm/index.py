"""Which record lies in which slot: a set-associative index in tensors of one device.

A key and its owner (a number for one order of one table) hash to a set of 16 ways. A way holds key
and owner in full, so what is found is what was asked for, and a count: how often it was read, up to 3.

    keys    int64 [sets + 1, 16]   -1 where nothing lies
    owners  int16 [sets + 1, 16]
    counts  int8  [sets + 1, 16]   0..3 reads; 126 came in with this very batch; 127 pinned
    hands   int8  [sets + 1]       where the clock's hand stands

Slot s is way s % 16 of set s // 16. The last set is never searched. Its first slot holds a record of
zeros, which is what a search that finds nothing answers with; its second takes whatever is to be
written nowhere. So every operation has a shape that depends on the batch's alone, none reads a value
back, and all may be captured in a CUDA graph.

Replacement is CLOCK with counts, set by set. From the hand on, the first record with no reads goes, and the
hand stops behind it; where a whole round finds none, each count loses one and the next round begins. So who
was read is safe from newcomers that nobody reads, and ages only as others come to be read. Nobody walks
here: the victim is the record with the least (count, distance from the hand), and its count is taken
off all. Unlike a walk record by record, a batch counts a record once however often it reads it, and a set
takes at most `ADMISSIONS_PER_SET` newcomers a batch, in the order of owner and key; the rest stay out
until they are asked for again.

Not promised: the hit rate of the DRAM tier's policy (docs/decisions/0020-hot-records-on-the-device.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

WAYS = 16
ADMISSIONS_PER_SET = 4
COUNT_MAX = 3
FRESH = 126
PINNED = 127
OWNERS_MAX = 1 << 15
INDEX_BYTES_PER_SET = WAYS * (8 + 2 + 1) + 1

# Odd numbers below 2^31: a product with 32 bits stays inside 63, where signed and unsigned agree.
_OWNER = 0x2545F491
_ROUNDS = ((0x5851F42D, 0x14057B7F), (0x6C078965, 0x3C6EF35F))
_BITS_31, _BITS_32 = (1 << 31) - 1, (1 << 32) - 1
_NEVER = 1 << 20  # costs more than any way


def set_of(keys: Tensor, owners: Tensor, sets: int) -> Tensor:
    """The set of each key, int64 of 0..sets-1; keys int64 and owners of any integer dtype [n]."""
    mixed = keys ^ (owners.long() * _OWNER)
    for low, high in _ROUNDS:
        mixed = ((mixed & _BITS_32) * low) ^ ((mixed >> 32) * high)
        mixed = mixed ^ (mixed >> 29)
    return (((mixed >> 31) & _BITS_31) * sets) >> 31


def rank_in_runs(runs: Tensor, counted: Tensor) -> Tensor:
    """How many counted elements of its run lie before each; runs int64 [n] ascending, counted bool [n]."""
    before = counted.long().cumsum(0) - counted.long()
    begins = torch.ones_like(counted)
    begins[1:] = runs[1:] != runs[:-1]
    return before - torch.where(begins, before, 0).cummax(0).values


@dataclass(frozen=True)
class Index:
    """The tensors drawn above."""

    keys: Tensor
    owners: Tensor
    counts: Tensor
    hands: Tensor

    @classmethod
    def empty(cls, sets: int, device: torch.device) -> Index:
        def full(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((sets + 1, *shape), value, dtype=dtype, device=device)

        return cls(
            keys=full(-1, torch.int64, WAYS),
            owners=full(0, torch.int16, WAYS),
            counts=full(0, torch.int8, WAYS),
            hands=full(0, torch.int8),
        )

    @property
    def sets(self) -> int:
        return len(self.keys) - 1

    @property
    def zero_slot(self) -> int:
        return self.sets * WAYS

    @property
    def nowhere_slot(self) -> int:
        return self.sets * WAYS + 1

    @property
    def bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def clear(self) -> None:
        """Forget everything, the pinned too; takes no memory."""
        self.keys.fill_(-1)
        self.counts.zero_()

    def find(self, keys: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Slots int64 [n], the zero slot where nothing was found, and found bool [n]."""
        line = set_of(keys, owners, self.sets)
        same = self.keys.index_select(0, line) == keys.unsqueeze(1)
        same &= self.owners.index_select(0, line) == owners.unsqueeze(1)
        found = same.any(1) & (keys >= 0)
        slots = line * WAYS + same.to(torch.uint8).argmax(1)
        return torch.where(found, slots, self.zero_slot), found

    def touch(self, slots: Tensor) -> None:
        """Count a read of each slot; equal slots once."""
        counts = self.counts.view(-1)
        seen = counts.index_select(0, slots)
        counts.scatter_(0, slots, torch.where(seen < COUNT_MAX, seen + 1, seen))

    def pin(self, slots: Tensor) -> None:
        """Never replace what lies there."""
        self.counts.view(-1).scatter_(0, slots, PINNED)

    def place(self, keys: Tensor, owners: Tensor, wanted: Tensor, per_set: int) -> Placement:
        """Give slots to wanted keys, none of which has one; [n] each, n > 0.

        Of equal keys the first gets one. No set takes more than `per_set`. The caller writes the records.
        """
        sets = torch.where(wanted, set_of(keys, owners, self.sets), self.sets)
        order = keys.argsort(stable=True)
        by_set = (sets * OWNERS_MAX + owners.long()).index_select(0, order)
        order = order.index_select(0, by_set.argsort(stable=True))
        keys, owners, sets = (each.index_select(0, order) for each in (keys, owners, sets))
        first = sets < self.sets
        first[1:] &= (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])
        rank = rank_in_runs(sets, first)
        slots = torch.full_like(order, self.nowhere_slot)
        evicted = torch.zeros_like(first)
        for turn in range(per_set):
            chosen = first & (rank == turn)
            taken, drove_out = self._take(torch.where(chosen, sets, self.sets), keys, owners, chosen)
            slots = torch.where(chosen, taken, slots)
            evicted |= drove_out
        self.counts.view(-1).scatter_(0, slots, 0)
        placed = slots != self.nowhere_slot
        counts = torch.stack((placed.sum(), evicted.sum(), (first & ~placed).sum()))
        return Placement(torch.empty_like(slots).scatter_(0, order, slots), counts)

    def _take(self, lines: Tensor, keys: Tensor, owners: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A slot in each line for each chosen key, at most one a line; whether a record had to go."""
        counts = self.counts.index_select(0, lines)
        empty = self.keys.index_select(0, lines) == -1
        ways, least, aged = _victims(counts, empty, self.hands.index_select(0, lines))
        taken = chosen & (least < COUNT_MAX + 1)
        drove_out = taken & (least >= 0)
        slots = torch.where(taken, lines * WAYS + ways, self.nowhere_slot)
        lines = torch.where(taken, lines, self.sets)
        self.keys.view(-1).scatter_(0, slots, keys)
        self.owners.view(-1).scatter_(0, slots, owners)
        self.counts.index_copy_(0, lines, aged.scatter(1, ways.unsqueeze(1), FRESH))
        moved = torch.where(least >= 0, (ways + 1) % WAYS, self.hands.index_select(0, lines))
        self.hands.index_copy_(0, lines, moved.to(torch.int8))
        return slots, drove_out


@dataclass(frozen=True)
class Placement:
    """What became of a batch of keys."""

    slots: Tensor  # int64 [n], the nowhere slot for keys that got none
    counts: Tensor  # int64 [3]: admitted, evicted for them, left out


def _victims(counts: Tensor, empty: Tensor, hands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The way to take in each line, and the line's counts once the hand has come there.

    counts int8 and empty bool [n,WAYS], hands int8 [n]. Also its count: -1 where it is empty, more than
    COUNT_MAX where the line has nothing to give.
    """
    held = counts >= FRESH
    ways = torch.arange(WAYS, device=counts.device)
    distance = (ways - hands.long().unsqueeze(1)) % WAYS
    cost = torch.where(empty, distance - WAYS, counts.long() * WAYS + distance)
    cost = torch.where(held, _NEVER, cost)
    lowest, way = cost.min(1)
    least = torch.div(lowest, WAYS, rounding_mode="floor")
    rounds = torch.where(least <= COUNT_MAX, least, 0).clamp(min=0).unsqueeze(1)
    return way, least, torch.where(held, counts, counts - rounds).to(torch.int8)
