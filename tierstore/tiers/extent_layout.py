"""Where a record lies in an extent file. Pure.

    page 0     magic "TIEREXTN", uint32 version, uint32 bytes of a page, uint64 record bytes, uint64 pages,
               uuid; zeros; checksum
    page 1...  entries, one after another; zeros; checksum (as of every page of ours: docs/FORMAT.md)

    entry      0..7    int64   key
               8..23   bytes   generation of its table
              24       uint8   order
              25..27   uint24  part
              28..31   uint32  record bytes
              32..             the part's bytes, to a multiple of 8

A record that fits a page is one part; several share a page where they fit. A larger one takes whole pages,
a part in each. Every part carries the whole identity, and a generation never changes, so any part with
the right identity holds the right bytes: a record can be overwritten, torn or half written without
anybody being able to take it for good.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from engram_client.arena.layout import ORDER_BITS
from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES
from tierstore.format.header import sealed_pages
from tierstore.kernels.extent import IDENTITY_BYTES, WAYS
from tierstore.tiers.plan import Pieces

MAGIC = b"TIEREXTN"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ16s")
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
        """The largest extent whose file takes at most so many bytes; None where it holds no record."""
        parts = cls(record_bytes, 0).parts
        pages = (budget_bytes // PAGE_BYTES - FIRST_PAGE) // parts * parts
        return cls(record_bytes, pages) if pages > 0 else None

    @property
    def parts(self) -> int:
        """Pages of a record: 1, or more where it is larger than a page."""
        return -(-self.record_bytes // (PAYLOAD_BYTES - IDENTITY_BYTES))

    @property
    def entry_bytes(self) -> int:
        if self.parts > 1:
            return PAYLOAD_BYTES
        return IDENTITY_BYTES + -(-self.record_bytes // 8) * 8

    @property
    def per_page(self) -> int:
        """Records that share a page."""
        return PAYLOAD_BYTES // self.entry_bytes

    @property
    def slots(self) -> int:
        """Records that the file holds."""
        return self.pages // self.parts * self.per_page

    @property
    def file_bytes(self) -> int:
        return (FIRST_PAGE + self.pages) * PAGE_BYTES

    @property
    def index_sets(self) -> int:
        most = self.file_bytes // INDEX_SHARE // (8 * WAYS)
        return max(1, min(-(-self.slots // RECORDS_PER_SET), most))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As the kernels take it: record bytes, entry bytes, entries in a page, pages of a record."""
        return self.record_bytes, self.entry_bytes, self.per_page, self.parts

    def page_of(self, sequence: int) -> int:
        """Number of the first page of the record with this sequence."""
        return FIRST_PAGE + sequence % self.slots // self.per_page * self.parts

    def pieces(self, sequences: np.ndarray, targets: np.ndarray) -> Pieces:
        """Where the parts of records lie; record i goes to byte targets[i] of the output, int64 [n]."""
        slots = sequences % self.slots
        part = np.arange(self.parts)
        pages = (FIRST_PAGE + slots // self.per_page * self.parts)[:, None] + part
        offsets = np.repeat(slots % self.per_page * self.entry_bytes, self.parts)
        spread = targets[:, None] + part * (self.entry_bytes - IDENTITY_BYTES)
        return Pieces(pages.ravel(), offsets, None, spread.ravel())

    def header_page(self, uuid: bytes) -> bytes:
        packed = HEADER.pack(MAGIC, VERSION, PAGE_BYTES, self.record_bytes, self.pages, uuid)
        return sealed_pages(packed.ljust(PAYLOAD_BYTES, b"\0"), 0, uuid)
