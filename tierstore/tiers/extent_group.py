"""How records share pages of an extent: a pattern over a few pages that repeats through the file. Pure.

Alone in its page, a record of 2112 bytes leaves half of it empty. So records follow one another without
gaps, and one that meets the end of its page goes on in the next: its *pieces* lie on adjacent pages,
which one read brings. Each piece has an identity of its own, so the next record's piece, or one from
another round of the ring, cannot be taken for it.

Nine pages hold 17 records of 2112 bytes, 8 of them on two pages. What is gained is reach, 1.89 times as
many records; what is paid is pages, 1.47 for a record. Of all patterns the one with the most records a
page for each page that a record takes is chosen, so where little is gained nothing is cut: records of
1280 bytes lie three in a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tierstore.format.geometry import PAYLOAD_BYTES
from tierstore.kernels.extent import IDENTITY_BYTES

GROUP_PAGES_MAX = 16  # beyond a record's own; more gains less than 1 %
PIECE_BYTES_MIN = 64  # what is left of a page is not worth an identity below this
Piece = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Group:
    """`records` over `pages`; record i has the pieces `starts[i]` to `starts[i + 1]`.

    `pieces` int64 [n, 4]: page of the group, byte of that page, byte of the record, bytes.
    """

    pages: int
    records: int
    starts: np.ndarray
    pieces: np.ndarray

    @property
    def pages_per_record(self) -> float:
        """Pages that a record lies on, on average."""
        return len(self.pieces) / self.records


@cache
def group_for(record_bytes: int) -> Group:
    """The pattern for records of this size."""
    least = _pieces_from(record_bytes, 0, 0)[-1][0] + 1
    groups = [_fill(record_bytes, pages) for pages in range(least, least + GROUP_PAGES_MAX)]
    return max(groups, key=lambda g: g.records / g.pages / g.pages_per_record)  # the first of equals


def _fill(record_bytes: int, pages: int) -> Group:
    """As many records as so many pages hold."""
    pieces: list[Piece] = []
    starts, page, at = [0], 0, 0
    while True:
        record = _pieces_from(record_bytes, page, at)
        page, at, _, count = record[-1]
        if page >= pages:
            break
        pieces += record
        starts.append(len(pieces))
        at += IDENTITY_BYTES + -(-count // 8) * 8
    return Group(pages, len(starts) - 1, np.array(starts), np.array(pieces, np.int64))


def _pieces_from(record_bytes: int, page: int, at: int) -> list[Piece]:
    """The pieces of a record that begins at byte `at` of a page, or on the next one."""
    pieces: list[Piece] = []
    done = 0
    while done < record_bytes:
        room = (PAYLOAD_BYTES - at - IDENTITY_BYTES) // 8 * 8
        count = min(room, record_bytes - done)
        if count >= min(PIECE_BYTES_MIN, record_bytes - done):
            pieces.append((page, at, done, count))
            done += count
        page, at = page + 1, 0
    return pieces
