"""A table's cached records, read out of the daemon's memory by the device that wants them.

    reader = BusReader(client.table("deepseek-v4.1.layer1"), "cuda", entries_max=4096) reader.read(keys, out)
    # device tensors; hits need no CPU, also within a captured graph missed = reader.missed()              #
    waits for the current stream: positions and keys of what was not there reader.fill(out, missed)
    # the service reads those; pinned memory, a copy, in stream order

The daemon's arenas are mapped in this process read-only. CUDA is told of these mappings (host_memory.py),
and a kernel (bus_kernels.py) probes index and slots over the bus as `engram_client.arena.shared_read` does
on the CPU, which is also its twin for tensors on a CPU. It leaves, in pinned memory, the list of what is
missing and a ring of touches that `missed` forwards to the service, so that replacement learns.

**Rows that are missing are zeros in `out`** and True in `reader.missing`, on the device. Nobody may use them
before `fill`; a graph that goes on by itself has to look at `reader.missing`.

**When arenas move.** All that the kernel knows of them is a *view*, words in a small tensor of the device
that never moves, so a captured graph outlives any layout. `refresh` brings it up to date: it waits for the
device, registers what is new, writes the words in place and lets go of what is old. `read` does that by
itself, but not while it is captured: who replays graphs calls `refresh` between replays. Until then the
graph reads what this reader still holds; records that have left it are misses, and what it finds is right,
since a record of one generation never changes. The same holds for a daemon that is gone; one that drains
says so in its control word, and everything is missing at once.

**What it costs.** The arena's whole budget is pinned while it is registered, and memory that a shrinking
daemon gives back is free only after `refresh`.

Where CUDA will not register the memory (no driver, no such ability, no room), there is no daemon on this
machine, or Triton cannot be used, `serving` is False, the log says why, once, and everything is missing.

Checked under Triton's interpreter and with its twin against a daemon; never run on a GPU.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_client.arena import listed_read
from engram_client.arena.layout import slot_bytes_for
from engram_client.arena.shared_read import (
    CONTROL,
    INDEX,
    NEW_REGION,
    OLD_REGION,
    SLOTS,
    VIEW_WORDS,
)
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest
from engram_client.gpu.bus_launch import BUS, Lists, check_part_bytes, find_nothing, launch
from engram_client.gpu.carrier import carrier_of
from engram_client.gpu.host_memory import NotRegistered, Registered
from engram_client.gpu.probe import as_device, capturing
from engram_client.gpu.streams import record_current
from engram_client.hbm.misses import distinct_lines
from engram_client.ids import check_keys, check_row_ids
from engram_client.table import DEFAULT_TIMEOUT_S, Table
from engram_client.transport.attachment import View

log = logging.getLogger(__name__)
TOUCHES = 1 << 14  # of a ring
ADDRESSES = (CONTROL, *(r + at for r in (NEW_REGION, OLD_REGION) for at in (INDEX, SLOTS)))  # in a view


@dataclass(frozen=True)
class Missed:
    """What a read did not find: places in the flat ids, ascending, and the ids themselves; int64 [m]."""

    positions: np.ndarray
    ids: np.ndarray


class BusReader:
    """One table's cached records for one device. Belongs to one thread and one stream at a time.

    reads:   how many there were; `missed` tells of the last one
    entry_bytes: of the rows of one id
    missing: bool [entries_max] on the device, of the last read: no record was found, nor was it -1
    """

    def __init__(
        self,
        table: Table,
        device: torch.device | str,
        *,
        entries_max: int,
        heads: slice | None = None,
        keep_masked: bool = False,
        touches: int = TOUCHES,
    ) -> None:
        """For reads of at most `entries_max` n-gram keys (row ids where the table is addressed by rows).

        `heads` as in `Table.lookup_ngrams`. With `keep_masked` ids of -1 leave their rows in `out` as they
        are, for what was found elsewhere. `touches`, a power of two, bounds what is remembered between
        two calls of `missed`. Raises BadRequest.
        """
        if entries_max < 1 or touches < 1 or touches & (touches - 1):
            raise BadRequest(
                f"a bus reader needs entries_max >= 1 and touches a power of two; got {entries_max} and "
                f"{touches}"
            )
        if heads is not None and table.spec.addressing != "record":
            raise BadRequest(f"table {table.spec.name!r} is addressed by rows, which have no heads to choose")
        self.device = as_device(device)
        self.entries_max = entries_max
        self._table, self._heads, self._keep_masked = table, heads, keep_masked
        self._orders, first, heads_copied = _part_of(table, heads)
        self.entry_bytes = heads_copied * table.spec.row_bytes
        # What the addresses of rows are multiples of, in bytes: known also while there is no view.
        sizes = (self.entry_bytes, first * table.spec.row_bytes, slot_bytes_for(table.spec.record_bytes))
        self._unit_max = math.gcd(16, *sizes)
        check_part_bytes(self.entry_bytes)
        with torch.inference_mode(False):
            self._view = torch.zeros(VIEW_WORDS, dtype=torch.int64, device=self.device)
            self.missing = torch.zeros(entries_max, dtype=torch.bool, device=self.device)
            self._lists = Lists.made(entries_max, touches, self.device)
        pinned = self.device.type != "cuda" or self._lists.pinned
        self._kernel_serves = self.device.type != "cuda" or (pinned and BUS.serves(self.device))
        self._seen: View | None = None
        self._closed = False
        self._words = np.zeros(VIEW_WORDS, np.int64)  # of the view, with addresses of this process
        self._held: list[Registered] = []
        self._said = False
        self._entries = self._touches_told = self.reads = 0
        self.refresh()
        self._warm()

    def _warm(self) -> None:
        """Have the kernel for these shapes compiled before somebody waits for rows; nothing is read."""
        masked = torch.full((self._orders,), -1, dtype=torch.int64, device=self.device)
        if self.entries_max >= self._orders:
            out = torch.zeros(self._orders * self.entry_bytes, dtype=torch.uint8, device=self.device)
            self.read(masked, out)
            self.missed()

    @property
    def serving(self) -> bool:
        """Whether there is anything to be found, as of the last `refresh`."""
        return bool(self._words[NEW_REGION + INDEX])

    def refresh(self) -> bool:
        """Follow the daemon's layout; returns `serving`. Waits for the device where something has changed.

        Does nothing while the current stream is captured. No other stream may read with this reader, and no
        other thread capture, meanwhile.
        """
        view = self._table.shared_view(self._heads)
        if view is self._seen or self._closed or capturing(self.device):
            return self.serving
        held: list[Registered] = []
        words = np.zeros(VIEW_WORDS, np.int64)
        if view is not None:
            try:
                words, held = self._words_of(view)
                self._said = False
            except NotRegistered as error:
                self._say(error)
        self._forward_touches()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # nobody reads what is let go of below
        self._view.copy_(torch.from_numpy(words))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seen, self._held = view, held
        self._words = view.words if view is not None and words.any() else np.zeros(VIEW_WORDS, np.int64)
        return self.serving

    def _words_of(self, view: View) -> tuple[np.ndarray, list[Registered]]:
        """The view's words as the device is to have them, and what keeps them true. Raises NotRegistered."""
        if self.device.type != "cuda":
            return view.words, []
        if not self._kernel_serves:
            raise NotRegistered("its kernel does not serve there, or host memory cannot be pinned")
        held = [Registered(mapping, self.device) for mapping in view.mappings]
        words = view.words.copy()
        for at in ADDRESSES:
            if words[at]:
                words[at] = _seen_by_device(int(words[at]), held)
        return words, held

    def _say(self, error: NotRegistered) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "%s does not read the shared arena itself (%s): the CPU stages its rows, which takes a copy "
                "more and the host's time",
                self.device, error,
            )  # fmt: skip

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy what is cached into `out`, zeros for the rest, in the order of the current stream.

        ids int64 [n] or [..., orders], contiguous, on the device; `out` contiguous uint8 on the device,
        as large as their rows. Never waits for the device, unless the daemon's layout has changed. An id
        below -1 is missing. Raises BadRequest.
        """
        self._check(ids, out)
        self.refresh()
        self._entries, self.reads = ids.numel(), self.reads + 1
        if self._entries:
            flat, rows = ids.reshape(-1), out.view(self._entries, self.entry_bytes)
            self._lists.counters[:2].zero_()
            if self._kernel_serves:
                view = self._view if self.device.type == "cuda" else torch.from_numpy(self._words)
                unit = math.gcd(self._unit_max, out.data_ptr())
                launch(view, flat, rows, self.missing, self._lists, self._orders, self._keep_masked, unit)
            else:
                find_nothing(flat, rows, self.missing, self._lists, self._keep_masked)
            self._lists.told.copy_(self._lists.counters, non_blocking=True)

    def missed(self) -> Missed:
        """What the last read, or the last replay of a graph with one, did not find.

        Waits for all that the current stream has been given. Tells the service what was read.
        """
        record_current(self.device).synchronize()
        told = self._lists.told.numpy()
        count = int(told[listed_read.MISSED]) if self._entries else 0
        positions, ids = self._lists.listed.numpy()[:count].T.copy()
        order = positions.argsort()
        self._forward_touches()
        if self._seen is not None and self.serving and self._entries > int(told[listed_read.MASKED]):
            masked = int(told[listed_read.MASKED])
            self._seen.count(self._entries - count, masked, self._entries - masked - count)
        return Missed(positions[order], ids[order])

    def _forward_touches(self) -> None:
        last = int(self._lists.told[listed_read.TOUCHED])
        if self._seen is not None and last > self._touches_told and self.serving:
            listed_read.forward_touches(self._words, self._lists.touches.numpy(), self._touches_told, last)
        self._touches_told = last

    def fill(self, out: Tensor, missed: Missed, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Have the service read what was missed, and put it where it belongs in `out`, in stream order.

        Raises what look-ups raise; rows that are not there yet are zeros then.
        """
        if not missed.ids.size:
            return
        deadline = Deadline.after(timeout)
        self._check_ids(missed.ids)
        lines, source = distinct_lines(missed.ids, missed.positions % self._orders, self._orders)
        if self._table.spec.addressing == "record":
            rows = self._table.lookup_ngrams(lines, heads=self._heads, timeout=deadline.remaining_s())
        else:
            rows = self._table.lookup(lines[:, 0], timeout=deadline.remaining_s())
        found = np.asarray(rows).reshape(-1, self.entry_bytes)
        carrier = carrier_of(self.device)
        there = carrier.empty((len(source), self.entry_bytes))
        carrier.send_into(found, there, source)
        places = torch.from_numpy(missed.positions).to(self.device)
        out.view(-1, self.entry_bytes).index_copy_(0, places, there)

    def lookup_into(self, ids: Tensor, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """`read`, and `fill` where something is missing: waits for the device once."""
        self.read(ids, out)
        self.fill(out, self.missed(), timeout=timeout)

    def close(self) -> None:
        """Let go of the daemon's memory once the device is done; everything is missing from then on."""
        self._closed = True
        self._seen, self._words = None, np.zeros(VIEW_WORDS, np.int64)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._view.zero_()
        self._held = []

    def _check(self, ids: Tensor, out: Tensor) -> None:
        if ids.device != self.device or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise BadRequest(
                f"ids must be contiguous int64 on {self.device}; got {ids.dtype} on {ids.device}"
            )
        n = ids.numel()
        if n > self.entries_max or n % self._orders:
            raise BadRequest(
                f"{n} ids: this reader was made for at most {self.entries_max}, in lines of {self._orders}"
            )
        wanted = n * self.entry_bytes
        right = out.device == self.device and out.dtype == torch.uint8 and out.is_contiguous()
        if not right or out.numel() != wanted:
            raise BadRequest(
                f"out must be contiguous uint8 of {wanted} bytes on {self.device}; got {out.dtype} of "
                f"{list(out.shape)} on {out.device}"
            )

    def _check_ids(self, ids: np.ndarray) -> None:
        if self._table.spec.addressing == "record":
            check_keys(ids, self._table.spec.name)
        else:
            check_row_ids(ids, self._table.spec.rows, self._table.spec.name)


def _part_of(table: Table, heads: slice | None) -> tuple[int, int, int]:
    """Ids of a line, and of each record the first head that is copied, and how many are."""
    scheme = table.spec.scheme
    if table.spec.addressing != "record" or scheme is None:
        return 1, 0, 1
    count = table.staged_shape(heads)[0] // scheme.orders
    return scheme.orders, 0 if heads is None else heads.indices(scheme.heads)[0], count


def _seen_by_device(address: int, held: list[Registered]) -> int:
    """An address within memory that is held, as the device has it."""
    for each in held:
        if each.host_address <= address < each.host_address + each.size_bytes:
            return each.device_address + address - each.host_address
    raise AssertionError("a view points outside of its mappings")
