"""What the HBM tier does not hold: asked for once, brought through pinned memory, put in place, then let in.

    look-up            caller's stream   hits to `out`; places and keys of what is missing to `found`
    1. the list        host              waits for the device once, for the count and the first few thousand
    pairs
    2. distinct lines  host              each record once, in the column of its order
    3. rows            host              from the table, into a buffer of a bounded ring of pinned memory
    4. copy, scatter   side stream       to the device, and to every place that wants them
                       caller's stream   waits for that, by an event; the host goes on
    5. admission       side stream       behind it all: the caller has its rows before the arena has them

Steps 3 and 4 go piece by piece, as large as a buffer; while the device copies one piece the host reads the
next. Pieces stay on the device until they are let in, at most `PIECES_KEPT` of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engram_client.deadline import Deadline
from engram_client.gpu.pinned import PinnedRing
from engram_client.gpu.probe import out_of_memory
from engram_client.gpu.streams import Event, HostSideStream, SideStream, record_current, side_stream
from engram_client.hbm.arena import HbmArena
from engram_client.hbm.operations import Decoding

BUFFERS = 4  # of a ring
BUFFER_BYTES_MIN = 64 << 10
FIRST_PAIRS = (BUFFER_BYTES_MIN - 8) // 16  # come along with the count
ROWS_ALIGNMENT_BYTES = 64
ITEM_BYTES = 16  # a line and a place
PIECES_KEPT = 4
Fill = Callable[[slice, np.ndarray], None]  # rows of some lines into uint8 [lines, columns, record_bytes]


@dataclass(frozen=True)
class Misses:
    """What a look-up did not find, on the device.

    found: int64 [3 + 2 n]; found[0] is how many are missing, and found[1:].view(-1, 2) holds for each its
    place
           in the flat batch and its key, in any order
    keys:  int64 [n] of the whole batch
    """

    found: Tensor
    keys: Tensor

    @property
    def count(self) -> Tensor:
        """int64 [1], on the device: a graph can act on it without the host."""
        return self.found[:1]


@dataclass(frozen=True)
class Lines:
    """Each missing id once.

    ids:    int64 [l, columns], -1 where a column has fewer
    source: int64 [m], which id of the flat lines each place wants
    places: int64 [m], records of the flat output
    """

    ids: np.ndarray
    source: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, pairs: np.ndarray, columns: int) -> Lines:
        """Of pairs int64 [m, 2] of places and ids; place p belongs to column p % columns."""
        places, ids = pairs[:, 0], pairs[:, 1]
        lines, source = distinct_lines(ids, places % columns, columns)
        order = np.argsort(source, kind="stable")
        return cls(lines, source[order], places[order])


def distinct_lines(ids: np.ndarray, columns: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines int64 [l, width] that hold each id once, in its column, and each id's place in them.

    ids and columns int64 [m]; columns are 0..width-1. Unfilled places are -1.
    """
    source = np.empty(len(ids), np.int64)
    found = []
    for column in range(width):
        here = np.flatnonzero(columns == column)
        distinct, inverse = np.unique(ids[here], return_inverse=True)
        source[here] = inverse.reshape(-1) * width + column
        found.append(distinct)
    lines = np.full((max(map(len, found)), width), -1, np.int64)
    for column, distinct in enumerate(found):
        lines[: len(distinct), column] = distinct
    return lines, source


@dataclass
class _Piece:
    """Some lines on the device, once the side stream has come to them."""

    ids: np.ndarray
    parts: list[Tensor] = field(default_factory=list)  # records uint8 [n, record_bytes], keys int64 [n]


class MissServer:
    """Brings what an arena does not hold. Thread safe.

    staging_bytes: pinned host memory; a line of records has to fit into a quarter of it, else it is more
    """

    def __init__(self, arena: HbmArena, columns_max: int, staging_bytes: int) -> None:
        self._arena, self.device = arena, arena.device
        line_bytes = columns_max * (arena.record_bytes + 8) + ROWS_ALIGNMENT_BYTES
        size = max(BUFFER_BYTES_MIN, line_bytes, staging_bytes // BUFFERS)
        self._ring = PinnedRing(self.device, buffers=BUFFERS, buffer_bytes=size)
        self._side: SideStream = HostSideStream(self.device) if arena.in_order else side_stream(self.device)
        self._giving = threading.Lock()
        self.not_admitted = 0  # records, for want of device memory

    def listed(self, misses: Misses, timeout_s: float | None) -> np.ndarray:
        """Places and keys of what is missing, int64 [m, 2]; waits for the device."""
        first = min(len(misses.keys), FIRST_PAIRS)
        with self._ring.take(timeout_s) as buffer:
            host = buffer.memory[: 8 * (1 + 2 * first)].view(torch.int64)
            host.copy_(misses.found[: 1 + 2 * first], non_blocking=True)
            record_current(self.device).synchronize()
            count = int(host[0])
            pairs = host[1 : 1 + 2 * min(count, first)].numpy().copy()
        if count > first:
            rest = misses.found[1 + 2 * first : 1 + 2 * count].cpu().numpy()
            pairs = np.concatenate((pairs, rest))
        return pairs.reshape(-1, 2)

    def serve(
        self,
        lines: Lines,
        fill: Fill,
        out: Tensor,
        first_owner: int,
        decoding: Decoding | None,
        ready: Event,
        deadline: Deadline,
    ) -> None:
        """Bring the records of `lines` to their places in `out`, and offer them to the arena.

        `out` as look-ups take it, written on a stream that passes `ready`. The current stream goes on
        behind it.
        """
        kept: deque[_Piece] = deque()
        columns = lines.ids.shape[1]
        try:
            for part in self._parts(len(lines.ids), columns):
                piece = self._bring(lines.ids[part], part, fill, ready, deadline)
                start, stop = np.searchsorted(lines.source, (part.start * columns, part.stop * columns))
                for some in self._items(int(start), int(stop)):
                    items = (lines.source[some] - part.start * columns, lines.places[some])
                    self._put(piece, items, out, decoding, deadline)
                kept.append(piece)
                if len(kept) > PIECES_KEPT:
                    self._admit(kept.popleft(), first_owner, pinned=False)
        finally:  # also where a later piece failed: what was given writes to `out`
            with self._giving:
                landed = self._side.record()
            landed.block_current(self.device)
        for piece in kept:
            self._admit(piece, first_owner, pinned=False)

    def pin(self, ids: np.ndarray, fill: Fill, first_owner: int, deadline: Deadline) -> None:
        """Let the records of lines of ids [l, columns] in and never replace them."""
        for part in self._parts(len(ids), ids.shape[1]):
            piece = self._bring(ids[part], part, fill, record_current(self.device), deadline)
            self._admit(piece, first_owner, pinned=True)

    def pin_records(self, ids: np.ndarray, records: Tensor, first_owner: int) -> None:
        """As `pin`, of records uint8 [l * columns, record_bytes] that the current stream has there."""
        piece, ready = _Piece(ids), record_current(self.device)

        def take() -> None:
            piece.parts += [records, torch.from_numpy(ids.reshape(-1)).to(self.device)]

        with self._giving:
            self._side.wait_for(ready)
            self._side.run(take, uses=(records,))
        self._admit(piece, first_owner, pinned=True)

    def settle(self) -> None:
        """Have the host wait until everything that was offered has been let in or left out."""
        with self._giving:
            given = self._side.record()
        given.synchronize()

    def _parts(self, lines: int, columns: int) -> Iterator[slice]:
        room = self._ring.buffer_bytes - ROWS_ALIGNMENT_BYTES
        step = room // (columns * (self._arena.record_bytes + 8))
        for start in range(0, lines, step):
            yield slice(start, min(lines, start + step))

    def _items(self, start: int, stop: int) -> Iterator[slice]:
        step = self._ring.buffer_bytes // ITEM_BYTES
        for begin in range(start, stop, step):
            yield slice(begin, min(stop, begin + step))

    def _bring(self, ids: np.ndarray, part: slice, fill: Fill, ready: Event, deadline: Deadline) -> _Piece:
        """Have rows of some lines, and their ids, copied to the device."""
        piece, record_bytes = _Piece(ids), self._arena.record_bytes
        with self._ring.take(deadline.remaining_s()) as buffer:
            first = -(-8 * ids.size // ROWS_ALIGNMENT_BYTES) * ROWS_ALIGNMENT_BYTES  # byte of the rows
            host = buffer.memory[: first + ids.size * record_bytes]
            fill(part, host[first:].numpy().reshape(*ids.shape, record_bytes))
            host[: 8 * ids.size].view(torch.int64).copy_(torch.from_numpy(ids.reshape(-1)))

            def copy() -> None:
                there = torch.empty(len(host), dtype=torch.uint8, device=self.device)
                there.copy_(host, non_blocking=True)
                keys = there[: 8 * ids.size].view(torch.int64)
                piece.parts += [there[first:].view(ids.size, record_bytes), keys]

            with self._giving:
                self._side.wait_for(ready)
                self._side.run(copy)
                buffer.busy_until(self._side.record())
        return piece

    def _put(
        self,
        piece: _Piece,
        items: tuple[np.ndarray, np.ndarray],
        out: Tensor,
        decoding: Decoding | None,
        deadline: Deadline,
    ) -> None:
        """Have records of a piece written to places of `out`."""
        with self._ring.take(deadline.remaining_s()) as buffer:
            count = len(items[0])
            host = buffer.memory[: ITEM_BYTES * count].view(torch.int64).view(2, count)
            host.copy_(torch.from_numpy(np.stack(items)))

            def write() -> None:
                source, places = host.to(self.device, non_blocking=True)
                self._arena.scatter(piece.parts[0], source, out, places, decoding)

            with self._giving:
                self._side.run(write, uses=(out,))
                buffer.busy_until(self._side.record())

    def _admit(self, piece: _Piece, first_owner: int, *, pinned: bool) -> None:
        """Offer a piece to the arena; where there is no memory for that, it stays out."""

        def admit() -> None:
            records, keys = piece.parts
            columns = torch.arange(len(keys), device=self.device) % piece.ids.shape[1]
            try:
                self._arena.admit(keys, (columns + first_owner).short(), records, pinned=pinned)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.not_admitted += len(keys)

        with self._giving:
            self._side.run(admit)
