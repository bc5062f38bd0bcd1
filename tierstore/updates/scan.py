"""Reading the log from its first live block on: what was committed, and where that ends.

The chain of headers is followed as long as it holds. What ends at a commit or a rollback counts; rows
behind the last of those were spilled by a step that never was. In front of what is known to be durable (by
the step index, or by what later blocks say) a header that does not fit is damage, never an earlier end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engram_client.errors import DataCorrupt
from tierstore.kernels.update_log import first_bad_entry
from tierstore.updates.blocks import (
    ALIGN,
    BLOCK_BYTES_MAX,
    COMMIT,
    HEADER_BYTES,
    MAGIC,
    ROLLBACK,
    ROWS,
    STATE_BYTES_MAX,
    Header,
    checksum_of,
    decode,
    padded,
    stride_of,
)
from tierstore.updates.disk import Disk
from tierstore.updates.segments import Segment, Segments

SEARCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Committed:
    """One step in the log."""

    step: int
    start: int  # position of its commit block
    end: int
    segment: int
    digest: int  # the block's checksum
    state_bytes: int


@dataclass
class Scanned:
    """What a scan has found."""

    rows: list[Header] = field(default_factory=list)  # live blocks of rows up to the last commit
    commits: list[Committed] = field(default_factory=list)
    end: int = 0  # position behind the last commit or rollback
    number: int = 0  # of the next block
    previous: int = 0  # checksum of the last block


class Scan:
    """One pass over the segments of a log."""

    def __init__(
        self, disk: Disk, segments: Segments, uuid: bytes, table_words: list[tuple[np.uint64, np.uint64]]
    ):
        self._disk, self._segments, self._uuid, self._words = disk, segments, uuid, table_words
        self._buffer = np.zeros(max(BLOCK_BYTES_MAX, padded(HEADER_BYTES + STATE_BYTES_MAX)), np.uint8)

    def run(self, start: int, durable: int) -> Scanned:
        """Scan from the block at `start`; the log is known to be durable up to `durable`.

        Raises DataCorrupt where it ends before that.
        """
        found, waiting = Scanned(end=start), []
        position, number, previous, at = start, None, None, self._segment_at(start)
        while at is not None:
            if at + 1 < len(self._segments.all) and self._segments.all[at + 1].base == position:
                at += 1  # whatever lies in the old one there was cut off before the new one was made
            header, own = self._header(self._segments.all[at], position, number, previous)
            whole = header is not None and (header.end <= durable or self._is_whole(at, header))
            if header is None or not whole:
                break
            position, number, previous = header.end, header.number + 1, own
            durable = max(durable, header.durable)
            self._segments.all[at].end = position
            if header.kind == ROWS:
                waiting.append(header)
                continue
            self._close_step(found, header, own, waiting, self._segments.all[at].number)
            found.end, found.number, found.previous = position, number, previous
            waiting = []
        self._check_end(position, durable)
        return found

    def state(self, committed: Committed, segments: list[Segment] | None = None) -> bytes:
        """What the step's commit kept for its caller, from `segments` (all there are). Raises DataCorrupt."""
        among = self._segments.all if segments is None else segments
        segment = next(s for s in among if s.base <= committed.start < s.end)
        raw = np.zeros(padded(HEADER_BYTES + committed.state_bytes), np.uint8)
        self._disk.read(segment.fd, raw, segment.offset(committed.start))
        state = raw[HEADER_BYTES : HEADER_BYTES + committed.state_bytes].tobytes()
        found = decode(raw[:HEADER_BYTES].tobytes(), self._uuid)
        if found is None or found[0].body_sum != checksum_of(state):
            raise self._segments.damaged(segment, committed.start, f"the commit of step {committed.step}")
        return state

    def ids(self, segment: Segment, position: int, ids: np.ndarray, body_sum: int) -> None:
        """The row ids of the block at `position` into `ids`, int64 [count]. Raises DataCorrupt."""
        self._disk.read(segment.fd, ids.view(np.uint8), segment.offset(position + HEADER_BYTES))
        if checksum_of(ids) != body_sum:
            raise self._segments.damaged(segment, position, f"a block of {ids.size} rows")

    def all_ids(self, segments: list[Segment], blocks: np.ndarray, ids: np.ndarray) -> None:
        """The row ids of all of `blocks` (BLOCK [n], ascending), one after the other, into `ids`."""
        bases, start = np.array([s.base for s in segments]), 0
        numbers = np.searchsorted(bases, blocks["position"], side="right") - 1
        for block, number in zip(blocks, numbers.tolist(), strict=True):
            stop = start + int(block["count"])
            self.ids(segments[number], int(block["position"]), ids[start:stop], int(block["ids_sum"]))
            start = stop

    def _segment_at(self, position: int) -> int | None:
        """The last segment that starts at or before `position`."""
        before = [i for i, s in enumerate(self._segments.all) if s.base <= position]
        return before[-1] if before else None

    def _header(
        self, segment: Segment, position: int, number: int | None, previous: int | None
    ) -> tuple[Header | None, int]:
        raw = np.zeros(HEADER_BYTES, np.uint8)
        self._disk.read(segment.fd, raw, segment.offset(position))
        found = decode(raw.tobytes(), self._uuid)
        if found is None:
            return None, 0
        header, own = found
        fits = header.position == position and header.size % ALIGN == 0 and header.size > 0
        follows = number is None or (header.number, header.previous) == (number, previous)
        known = header.kind in (COMMIT, ROLLBACK) or (
            header.kind == ROWS and header.table < len(self._words) and header.size <= BLOCK_BYTES_MAX
        )
        return (header, own) if fits and follows and known else (None, 0)

    def _is_whole(self, at: int, header: Header) -> bool:
        """Whether all of a block that may have been under way is there."""
        segment = self._segments.all[at]
        block = self._buffer[: min(header.size, self._buffer.size)]
        if self._disk.read(segment.fd, block, segment.offset(header.position)) < header.size:
            return False
        if header.kind != ROWS:
            state = block[HEADER_BYTES : HEADER_BYTES + (header.count if header.kind == COMMIT else 0)]
            return checksum_of(state) == header.body_sum
        stride, first = stride_of(header.row_bytes), HEADER_BYTES + 8 * header.count
        ids = block[HEADER_BYTES:first].view(np.int64)
        if checksum_of(ids) != header.body_sum:
            return False
        entries = block[first : first + header.count * stride]
        salt = np.uint64(header.salt)
        return first_bad_entry(entries, header.row_bytes, stride, ids, *self._words[header.table], salt) < 0

    @staticmethod
    def _close_step(found: Scanned, header: Header, own: int, waiting: list[Header], segment: int) -> None:
        if header.kind == COMMIT:
            found.rows += waiting
            found.commits.append(
                Committed(header.step, header.position, header.end, segment, own, header.count)
            )
            return
        found.rows = [h for h in found.rows if h.position < header.target]
        found.commits = [c for c in found.commits if c.start <= header.target]

    def _check_end(self, position: int, durable: int) -> None:
        """Raise DataCorrupt where something behind the end says that more had been committed."""
        at = self._segment_at(position)
        for segment in self._segments.all[at or 0 :]:
            durable = max(durable, self._durable_said_in(segment, position))
        if durable <= position:
            return  # also where the first segment of all is lost, and the power before the first commit
        if at is None:
            raise DataCorrupt(
                f"{self._segments.folder}: the log's first segment is missing: expected one that holds "
                f"position {position}; restore the training folder from a copy"
            )
        raise self._segments.damaged(self._segments.all[at], position, "a block")

    def _durable_said_in(self, segment: Segment, position: int) -> int:
        said, size = 0, self._disk.size(segment.fd)
        first = max(ALIGN, segment.offset(position)) // ALIGN * ALIGN
        chunk = np.zeros(SEARCH_BYTES, np.uint8)
        magic = np.frombuffer(MAGIC, np.uint64)[0]
        for offset in range(first, size, SEARCH_BYTES):
            count = self._disk.read(segment.fd, chunk, offset) // ALIGN * ALIGN
            pages = chunk[:count].reshape(-1, ALIGN)
            for page in pages[pages[:, :8].copy().view(np.uint64)[:, 0] == magic]:
                found = decode(page[:HEADER_BYTES].tobytes(), self._uuid)
                if found and found[0].position > position:
                    said = max(said, found[0].durable)
        return said
