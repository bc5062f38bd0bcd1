"""A daemon's arena in device memory, read by other processes without a lock and without the daemon.

The memory is that of the DRAM arena (engram_client/arena/layout.py draws lines and slots) behind a header:

    0..7    int64  control   the daemon's nonce while it serves; else nobody may use what is read
    64..    lines            sets x 64 bytes: tags, states, sequence
            slots            sets x 16 x slot_bytes: key, owner, record

Here it is read by torch operations on the current stream, each of which is a kernel that has ended before the
next one begins, also for what another process's kernels have written to the same device. So the order
of a sequence lock is the order of the operations: sequence, tags, keys, record, sequence again. What changed
meanwhile is missing, as is everything once the control word is another. Nothing is waited for, all
shapes depend on the batch's alone, and nothing is written: CUDA IPC cannot map memory read-only, so this
is a promise.

Checked on CPU tensors over memory that another process writes; not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_client.arena.layout import LINE_BYTES, RECORD_AT, SEQUENCE_AT, WAYS, slot_bytes_for

HEADER_BYTES = 64
LINE_WORDS, SEQUENCE_WORD = LINE_BYTES // 8, SEQUENCE_AT // 8
UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_GOLDEN, _FIRST, _SECOND = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def mirror_bytes(sets: int, record_bytes: int) -> int:
    """How much memory that is."""
    return HEADER_BYTES + sets * (LINE_BYTES + WAYS * slot_bytes_for(record_bytes))


class Mirror:
    """Views of such a memory, uint8 [mirror_bytes].

    control int64 [1]; lines int64 [sets, 8]; sequences int64 [sets]; tags int16 [sets, 16];
    slots int64 [sets * 16, words]
    """

    def __init__(self, memory: Tensor, sets: int, record_bytes: int) -> None:
        slot_bytes, lines_end = slot_bytes_for(record_bytes), HEADER_BYTES + sets * LINE_BYTES
        assert len(memory) >= mirror_bytes(sets, record_bytes)
        self.sets, self.record_bytes, self.device = sets, record_bytes, memory.device
        self.control = memory[:8].view(torch.int64)
        lines = memory[HEADER_BYTES:lines_end]
        self.lines = lines.view(torch.int64).view(sets, LINE_WORDS)
        self.sequences = self.lines[:, SEQUENCE_WORD]
        self.tags = lines.view(torch.int16).view(sets, LINE_BYTES // 2)[:, :WAYS]
        slots = memory[lines_end : lines_end + sets * WAYS * slot_bytes]
        self.slots = slots.view(torch.int64).view(sets * WAYS, slot_bytes // 8)
        unit = next(unit for unit in UNITS if record_bytes % unit.itemsize == 0)
        records = slots.view(unit).view(sets * WAYS, slot_bytes // unit.itemsize)
        first = RECORD_AT // unit.itemsize
        self._records = records[:, first : first + record_bytes // unit.itemsize]
        self._ways = torch.arange(WAYS, device=memory.device)

    def read_into(self, keys: Tensor, owners: Tensor, serving: int, out: Tensor) -> Tensor:
        """Copy what is here into `out`; what is missing, bool [n].

        keys and owners int64 [n]; out uint8 [n, record_bytes], contiguous. Missing records, and those of
        negative keys, become zeros; of these -1 is not missing.
        """
        if not len(keys):
            return torch.zeros(0, dtype=torch.bool, device=self.device)
        hashed = mix(keys, owners)
        line, tag = set_of(hashed, self.sets), tag_of(hashed)
        before = self.sequences.index_select(0, line)
        same = self.tags.index_select(0, line) == tag.unsqueeze(1)
        places = line.unsqueeze(1) * WAYS + self._ways
        heads = self.slots[:, :2].index_select(0, places.view(-1)).view(len(keys), WAYS, 2)
        same &= (heads[:, :, 0] == keys.unsqueeze(1)) & (heads[:, :, 1] == owners.unsqueeze(1))
        slots = line * WAYS + same.to(torch.uint8).argmax(1)
        found = same.any(1) & (keys >= 0) & (before & 1 == 0)
        out.copy_(self._records.index_select(0, slots).view(torch.uint8))
        found &= (self.sequences.index_select(0, line) == before) & (self.control == serving)
        out.masked_fill_(~found.unsqueeze(1), 0)
        return ~found & (keys != -1)


def mix(keys: Tensor, owners: Tensor) -> Tensor:
    """As `engram_client.arena.read.mix`: unsigned arithmetic in signed words, whose bits are the same."""
    hashed = keys ^ (owners * _GOLDEN)
    hashed = (hashed ^ _shifted(hashed, 30)) * _FIRST
    hashed = (hashed ^ _shifted(hashed, 27)) * _SECOND
    return hashed ^ _shifted(hashed, 31)


def set_of(hashed: Tensor, sets: int) -> Tensor:
    """As `engram_client.arena.read.set_of`, for fewer than 2^31 sets."""
    return (_shifted(hashed, 32) * sets) >> 32


def tag_of(hashed: Tensor) -> Tensor:
    """As `engram_client.arena.read.tag_of`, as int16."""
    tag = hashed & 0xFFFF
    return torch.where(tag == 0, 1, tag).to(torch.int16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right, without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
