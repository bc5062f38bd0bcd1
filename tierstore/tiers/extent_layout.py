"""Where a record lies in an extent file. Pure.

    page 0     magic "TIEREXTN", uint32 version, uint32 bytes of a page, uint64 record bytes, uint64 pages,
               uint32 pages and uint32 records of a group, uuid; zeros; checksum
    page 1...  groups (extent_group.py): entries, one after another; zeros; each page's checksum (as of every
               page of ours: docs/FORMAT.md)

    entry      0..7    int64   key
               8..23   bytes   generation of its table
              24       uint8   order
              25..27   uint24  where in the record the piece begins, in units of 8 bytes
              28..31   uint32  record bytes
              32..             the piece's bytes, to a multiple of 8

Every piece carries the whole identity, and a generation never changes, so any piece with the right
identity holds the right bytes: a record can be overwritten, torn or half written without anybody
being able to take it for good.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from engram_client.arena.layout import ORDER_BITS
from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES
from tierstore.format.header import sealed_pages
from tierstore.kernels.extent import WAYS
from tierstore.tiers.extent_group import Group, group_for
from tierstore.tiers.plan import Pieces

MAGIC = b"TIEREXTN"
VERSION = 2  # 1: one record a page
HEADER = struct.Struct("<8sIIQQII16s")
FIRST_PAGE = 1
RECORDS_PER_SET = WAYS // 2  # on average, so that hardly a set runs over
INDEX_SHARE = 100  # the index takes at most this part of the file's bytes
assert ORDER_BITS == 8


@dataclass(frozen=True)
class ExtentGeometry:
    """Records of one size over `pages` pages of data."""

    record_bytes: int
    pages: int

    @classmethod
    def within(cls, budget_bytes: int, record_bytes: int) -> ExtentGeometry | None:
        """The largest extent whose file takes at most so many bytes; None where it holds no group."""
        group_pages = group_for(record_bytes).pages
        pages = (budget_bytes // PAGE_BYTES - FIRST_PAGE) // group_pages * group_pages
        return cls(record_bytes, pages) if pages > 0 else None

    @property
    def group(self) -> Group:
        return group_for(self.record_bytes)

    @property
    def group_bytes(self) -> int:
        return self.group.pages * PAGE_BYTES

    @property
    def groups(self) -> int:
        return self.pages // self.group.pages

    @property
    def slots(self) -> int:
        """Records that the file holds."""
        return self.groups * self.group.records

    @property
    def bytes_per_record(self) -> float:
        """Of the file, on average."""
        return self.group_bytes / self.group.records

    @property
    def file_bytes(self) -> int:
        return (FIRST_PAGE + self.pages) * PAGE_BYTES

    @property
    def index_sets(self) -> int:
        most = self.file_bytes // INDEX_SHARE // (8 * WAYS)
        return max(1, min(-(-self.slots // RECORDS_PER_SET), most))

    @property
    def shape(self) -> tuple[int, int, int, np.ndarray, np.ndarray]:
        """As `pack_entries` takes it: record bytes, pages and records of a group, its starts and pieces."""
        group = self.group
        return self.record_bytes, group.pages, group.records, group.starts, group.pieces

    def group_page(self, sequence: int) -> int:
        """Number of the first page of the group that the record with this sequence is in."""
        return FIRST_PAGE + sequence % self.slots // self.group.records * self.group.pages

    def pieces(self, sequences: np.ndarray, targets: np.ndarray) -> Pieces:
        """Where records lie; record i goes to byte targets[i] of the output, int64 [n]."""
        group = self.group
        number, inside = np.divmod(sequences % self.slots, group.records)
        counts = group.starts[inside + 1] - group.starts[inside]
        before = np.cumsum(counts) - counts
        chosen = group.pieces[np.repeat(group.starts[inside] - before, counts) + np.arange(counts.sum())]
        pages = np.repeat(FIRST_PAGE + number * group.pages, counts) + chosen[:, 0]
        spread = np.repeat(targets, counts) + chosen[:, 2]
        return Pieces(pages, chosen[:, 1].copy(), chosen[:, 3].copy(), spread)

    def header_page(self, uuid: bytes) -> bytes:
        group = self.group
        packed = HEADER.pack(
            MAGIC, VERSION, PAGE_BYTES, self.record_bytes, self.pages, group.pages, group.records, uuid
        )
        return sealed_pages(packed.ljust(PAYLOAD_BYTES, b"\0"), 0, uuid)


def found_version(page: bytes) -> int | None:
    """The layout version that a first page states; None where it is no extent's."""
    if len(page) < HEADER.size or not page.startswith(MAGIC):
        return None
    return int.from_bytes(page[len(MAGIC) : len(MAGIC) + 4], "little")
