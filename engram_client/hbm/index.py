"""Which record lies in which slot: a set-associative index in tensors of one device.

A key and its owner (a number for one order of one table) hash to a set of 16 ways. A way holds both in full,
so what is found is what was asked for. Slot s is way s % 16 of set s // 16.

    keys       int64 [sets + 1, 16]   -1 where nothing lies
    owners     int16 [sets + 1, 16]
    states     uint8 [sets + 1, 16]   bits 0..2 queue and reads, bits 4..7 place in the order of arrival
    touched    uint8 [sets + 1, 16]   1 where a look-up has read the record since the set last took one in
    ghosts     int16 [sets + 1, 16]   fingerprints of records that went, 0 for none
    hands      int8  [sets + 1]       which ghost is the newest
    sequences  int32 [sets + 1]       odd while records of the set are being replaced

States and ghosts are for replacement alone (`replacement.py`). The last set holds nothing and never will:
it is what a look-up reads that has no key, or whose set is being written.

Readers write one byte, and always the same: a record is touched or it is not, however often and by however
many it was read. So it does not matter who reads at the same time, a look-up has one result whether its
programs run one after another or all at once, and a hot record costs no write at all.

All shapes depend on the batch alone and no value is read back, so a look-up may be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

WAYS = 16
OWNERS_MAX = 1 << 15
INDEX_BYTES_PER_SET = WAYS * (8 + 2 + 1 + 1 + 2) + 1 + 4

# Odd numbers below 2^31: a product with 32 bits stays inside 63, where signed and unsigned agree.
OWNER_FACTOR = 0x2545F491
ROUNDS = ((0x5851F42D, 0x14057B7F), (0x6C078965, 0x3C6EF35F))
BITS_31, BITS_32 = (1 << 31) - 1, (1 << 32) - 1
PRINT_MASK = 0x7FFF


def mix(keys: Tensor, owners: Tensor) -> Tensor:
    """Some 62 well-mixed bits, int64; keys int64 >= 0 and owners of any integer dtype."""
    mixed = keys ^ (owners.long() * OWNER_FACTOR)
    for low, high in ROUNDS:
        mixed = ((mixed & BITS_32) * low) ^ ((mixed >> 32) * high)
        mixed = mixed ^ (mixed >> 29)
    return mixed


def set_of(mixed: Tensor, sets: int) -> Tensor:
    """The set of each key, int64 of 0..sets-1."""
    return (((mixed >> 31) & BITS_31) * sets) >> 31


def fingerprint_of(mixed: Tensor) -> Tensor:
    """15 bits that have no part in the set, never 0, as int16."""
    return (mixed & PRINT_MASK).clamp(min=1).short()


@dataclass(frozen=True)
class Index:
    """The tensors drawn above."""

    keys: Tensor
    owners: Tensor
    states: Tensor
    touched: Tensor
    ghosts: Tensor
    hands: Tensor
    sequences: Tensor

    @classmethod
    def empty(cls, sets: int, device: torch.device) -> Index:
        def full(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((sets + 1, *shape), value, dtype=dtype, device=device)

        states = full(0, torch.uint8, WAYS)
        states += fresh_states(device)
        return cls(
            keys=full(-1, torch.int64, WAYS),
            owners=full(0, torch.int16, WAYS),
            states=states,
            touched=full(0, torch.uint8, WAYS),
            ghosts=full(0, torch.int16, WAYS),
            hands=full(0, torch.int8),
            sequences=full(0, torch.int32),
        )

    @property
    def sets(self) -> int:
        return len(self.keys) - 1

    @property
    def bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def clear(self) -> None:
        """Forget everything, the pinned too; takes no memory but for a few bytes."""
        self.keys.fill_(-1)
        self.touched.zero_()
        self.ghosts.zero_()
        self.states.copy_(fresh_states(self.states.device).expand_as(self.states))

    def find(self, keys: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Slots int64 [n], of the last set where nothing was found, and found bool [n]."""
        known = keys >= 0
        line = torch.where(known, set_of(mix(keys.clamp(min=0), owners), self.sets), self.sets)
        same = self.keys.index_select(0, line) == keys.unsqueeze(1)
        same &= self.owners.index_select(0, line) == owners.unsqueeze(1)
        found = same.any(1) & known
        slots = line * WAYS + same.to(torch.uint8).argmax(1)
        return torch.where(found, slots, self.sets * WAYS), found


def fresh_states(device: torch.device) -> Tensor:
    """uint8 [WAYS] of a set that holds nothing: every way has a place of its own."""
    return torch.arange(0, 16 * WAYS, 16, dtype=torch.uint8, device=device)
