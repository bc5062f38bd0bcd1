"""Launching the bus reader's kernel, its trial, and where no kernel is to be had its twin on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_client.arena import layout, listed_read
from engram_client.arena import shared_read as shared
from engram_client.errors import BadRequest
from engram_client.gpu.pinned import pinned_bytes
from engram_client.gpu.probe import KernelGroup, interpreted, made_current

SCRATCH_WORDS = 4  # of an entry, through which the threads of a program agree
CHUNKS_OF_A_THREAD = 8  # that a record takes in registers
PART_BYTES_MAX = 1 << 16
UNIT_DTYPES = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True)
class Lists:
    """Where a read leaves what it found out.

    listed   int64 [entries_max, 2], pinned: position and id of what is missing
    touches  int64 [a power of two], pinned: a ring
    counters int64 [COUNTERS], on the device; told: the same, pinned, as of the last read
    scratch  int64 [entries_max, SCRATCH_WORDS], on the device
    """

    listed: Tensor
    touches: Tensor
    counters: Tensor
    told: Tensor
    scratch: Tensor

    @property
    def pinned(self) -> bool:
        """Whether a device can write to all of it."""
        return all(each.is_pinned() for each in (self.listed, self.touches, self.told))

    @classmethod
    def made(cls, entries_max: int, touches: int, device: torch.device) -> Lists:
        def pinned(*shape: int) -> Tensor:
            return pinned_bytes(8 * int(np.prod(shape)), device).view(torch.int64).view(shape).zero_()

        def there(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            listed=pinned(entries_max, listed_read.LISTED_WORDS),
            touches=pinned(touches),
            counters=there(listed_read.COUNTERS),
            told=pinned(listed_read.COUNTERS),
            scratch=there(entries_max, SCRATCH_WORDS),
        )


def launch(
    view: Tensor, ids: Tensor, out: Tensor, missing: Tensor, lists: Lists, orders: int, keep_masked: bool,
    unit: int,
) -> None:  # fmt: skip
    """Read `ids` int64 [n] into `out` uint8 [n, part_bytes], a multiple of `unit` bytes each and aligned so.

    As `bus_kernels.read_records` says it; on CPU tensors by the twin, unless Triton interprets.
    """
    if ids.device.type == "cpu" and not interpreted():
        listed_read.read_listed(
            view.numpy(), ids.numpy(), orders, keep_masked, out.numpy(), missing.numpy(),
            lists.listed.numpy(), lists.touches.numpy(), lists.counters.numpy(),
        )  # fmt: skip
        return
    from engram_client.gpu.bus_kernels import read_records

    units = out.shape[1] // unit
    tile = 1 << max(4, (units - 1).bit_length())
    with made_current(ids.device):
        read_records[(len(ids),)](
            view, ids, out.view(UNIT_DTYPES[unit]), missing, lists.listed, lists.touches, lists.counters,
            lists.scratch, units, len(lists.touches) - 1,
            ORDERS=orders, UNIT=unit, TILE=tile, KEEP_MASKED=keep_masked,
            INTERPRETED=interpreted(), num_warps=warps_for(tile),
        )  # fmt: skip


def find_nothing(ids: Tensor, out: Tensor, missing: Tensor, lists: Lists, keep_masked: bool) -> None:
    """What `launch` leaves where there is no arena, by torch's operations; does not wait for the device."""
    masked = ids == -1
    missing[: len(ids)] = ~masked
    if keep_masked:
        out.masked_fill_(~masked.unsqueeze(1), 0)
    else:
        out.zero_()
    order = masked.to(torch.uint8).argsort(stable=True)  # those that are missing first
    lists.listed[: len(ids)].copy_(torch.stack((order, ids[order]), dim=1), non_blocking=True)
    lists.counters[listed_read.MASKED] += masked.sum()
    lists.counters[listed_read.MISSED] += (~masked).sum()


def warps_for(tile: int) -> int:
    """How many warps hold so many units in their registers; one does for a record of V4.1."""
    return min(32, max(1, tile // (32 * CHUNKS_OF_A_THREAD)))


def check_part_bytes(part_bytes: int) -> None:
    """Raises BadRequest for records too large for registers."""
    if part_bytes > PART_BYTES_MAX:
        raise BadRequest(
            f"a device reads records of at most {PART_BYTES_MAX} bytes from the shared arena, these have "
            f"{part_bytes}; look them up with the table itself"
        )


RECORD_BYTES, SETS, OWNER, SERVING = 48, 4, 5 << layout.ORDER_BITS, 7  # of the trial's arena


def _trial(device: torch.device) -> None:
    """An arena of one record in pinned memory: found, not found, and hidden by a writer that never ends."""
    geometry = layout.ArenaGeometry(SETS, RECORD_BYTES)
    memory = pinned_bytes(64 + geometry.total_bytes, device).zero_()
    if device.type == "cuda" and not memory.is_pinned():
        raise RuntimeError("memory of this process cannot be pinned")
    words = memory[:64].view(torch.int64)
    words[0] = SERVING
    key, absent = 0x1234_5678_9ABC, 0x4321
    record = torch.arange(RECORD_BYTES, dtype=torch.uint8)
    line = _write(memory[64:], geometry, key, record.numpy())
    there = torch.from_numpy(_trial_view(memory.data_ptr(), geometry)).to(device)
    ids = torch.tensor([key, absent, -1], device=device)
    wanted = torch.stack((record, torch.zeros_like(record), torch.zeros_like(record)))
    for whole in (True, False):
        lists, missing = Lists.made(3, 4, device), torch.zeros(3, dtype=torch.bool, device=device)
        out = torch.ones((3, RECORD_BYTES), dtype=torch.uint8, device=device)
        launch(there, ids, out, missing, lists, 1, False, 16)
        found = (out.cpu(), missing.tolist(), lists.counters.tolist()[:3])
        expected = ([False, True, False], [1, 1, 1]) if whole else ([True, True, False], [2, 1, 0])
        if not torch.equal(found[0], wanted if whole else torch.zeros_like(wanted)) or found[1:] != expected:
            raise RuntimeError("records in pinned memory were not read as they are")
        line[layout.SEQUENCE_AT] |= 1  # a writer


def _write(memory: Tensor, geometry: layout.ArenaGeometry, key: int, record: np.ndarray) -> np.ndarray:
    """Put one record into an empty arena; its index line."""
    data = memory.numpy()
    mixed = int(_mixed(key, OWNER))
    which, tag = (mixed >> 32) * geometry.sets >> 32, mixed & 0xFFFF or 1
    line = data[which * layout.LINE_BYTES :][: layout.LINE_BYTES]
    line[:2].view(np.uint16)[0] = tag
    slot = data[geometry.index_bytes + which * layout.WAYS * geometry.slot_bytes :]
    slot[: layout.RECORD_AT].view(np.int64)[:] = key, OWNER
    slot[layout.RECORD_AT :][: len(record)] = record
    return line


def _mixed(key: int, owner: int) -> int:
    """`engram_client.arena.read.mix`, in Python's numbers."""
    mask = (1 << 64) - 1
    h = key ^ (owner * 0x9E3779B97F4A7C15 & mask)
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
    h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
    return h ^ h >> 31


def _trial_view(address: int, geometry: layout.ArenaGeometry) -> np.ndarray:
    view = np.zeros(shared.VIEW_WORDS, np.int64)
    view[shared.CONTROL], view[shared.SERVING], view[shared.TABLE_OWNER] = address, SERVING, OWNER
    view[shared.PART_BYTES] = RECORD_BYTES
    index = address + 64
    view[shared.NEW_REGION : shared.NEW_REGION + shared.REGION_WORDS] = (
        index, index + geometry.index_bytes, geometry.sets, geometry.slot_bytes, 0,
    )  # fmt: skip
    return view


BUS = KernelGroup("reading the shared arena over the bus", "the CPU stages rows", _trial)
