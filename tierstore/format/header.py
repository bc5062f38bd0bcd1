"""The first page of a row file, and the description of the table in the pages after it.

    offset size  page 0
         0    8  magic "TIERROWS"
         8    4  format version: 1
        12    4  bytes of a page: 4096
        16    8  rows
        24    4  row_bytes
        28    4  rows in a full page; 0 where a row owns pages
        32   16  uuid of the file, random
        48    8  page number of the first data page
        56    8  data pages
        64    8  bytes of the description
        72   16  generation (see tree.py)
        88    4  flags: bit 0 where data pages hold an epoch, in the file of a table that is trained
        92    4  pages of a row: 1, or more where a row owns pages
        96    4  pages under one leaf of the tree digest
       100 3988  zeros
      4088    8  page checksum

Integers are little-endian and unsigned. The description is canonical JSON (keys sorted, no
spaces, ASCII), 4088 bytes in each of pages 1, 2, ..., each sealed like any other page. It is a
`TableSpec` without its generation, uuid and rows, which the header states.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import FormatError
from engram_client.spec import TableSpec
from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES, Geometry
from tierstore.kernels.checksum import page_checksum, seal_pages

MAGIC = b"TIERROWS"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQII16sQQQ16sIII")
GENERATION_SLICE = slice(72, 88)
FLAG_PAGE_EPOCHS = 1
LEAF_PAGES = 2048  # 8 MiB of data pages
MAX_LEAF_PAGES = 2**14  # bounds the memory that a header can make its reader take

_STATED_BY_HEADER = ("generation", "uuid", "rows")


@dataclass(frozen=True)
class Header:
    """What page 0 states."""

    geometry: Geometry
    uuid: bytes
    generation: bytes
    description_bytes: int
    leaf_pages: int = LEAF_PAGES

    @property
    def uuid_words(self) -> tuple[np.uint64, np.uint64]:
        return uuid_words(self.uuid)

    def payload(self) -> bytes:
        """The 4088 bytes of page 0 before its checksum."""
        g = self.geometry
        packed = HEADER.pack(
            MAGIC, FORMAT_VERSION, PAGE_BYTES, g.rows, g.row_bytes, g.rows_per_page, self.uuid,
            g.first_page, g.data_pages, self.description_bytes, self.generation, FLAG_PAGE_EPOCHS * g.epochs,
            g.pages_per_row, self.leaf_pages,
        )  # fmt: skip
        return packed.ljust(PAYLOAD_BYTES, b"\0")

    def page(self) -> bytes:
        return sealed_pages(self.payload(), 0, self.uuid)


def uuid_words(uuid: bytes) -> tuple[np.uint64, np.uint64]:
    """The uuid as the two little-endian words the checksum kernels take."""
    low, high = np.frombuffer(uuid, dtype="<u8")
    return low, high


def description_of(spec: TableSpec) -> bytes:
    """Canonical JSON of everything in `spec` that the header does not state."""
    described = {k: v for k, v in spec.to_json().items() if k not in _STATED_BY_HEADER}
    return json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def description_pages(description_bytes: int) -> int:
    return -(-description_bytes // PAYLOAD_BYTES)


def sealed_pages(payload: bytes, first_page_number: int, uuid: bytes) -> bytes:
    """`payload` spread over as many sealed pages as it needs."""
    count = description_pages(len(payload))
    pages = np.zeros((count, PAGE_BYTES), dtype=np.uint8)
    padded = payload.ljust(count * PAYLOAD_BYTES, b"\0")
    pages[:, :PAYLOAD_BYTES] = np.frombuffer(padded, np.uint8).reshape(count, PAYLOAD_BYTES)
    seal_pages(pages.view(np.uint64), first_page_number, *uuid_words(uuid), 0, count)
    return pages.tobytes()


def decode_header(path: Path, page: bytes, *, trained: bool = False) -> Header:
    """Page 0 of `path`, which is that of a table that is `trained` or not.

    Raises FormatError: foreign, truncated, newer, or damaged.
    """
    if page[: len(MAGIC)] != MAGIC:
        raise FormatError(
            f"{path} is not a row file: it starts with {page[:8]!r}, expected {MAGIC!r}; "
            "row files are written by `tierstore pack`"
        )
    if len(page) < PAGE_BYTES:
        raise FormatError(f"{path} is truncated: {len(page)} bytes, its header alone takes {PAGE_BYTES}")
    (_, version, page_bytes, rows, row_bytes, rows_per_page, uuid, first_page, data_pages,
     description_bytes, generation, flags, pages_per_row, leaf_pages) = HEADER.unpack_from(page)  # fmt: skip
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, this release reads version {FORMAT_VERSION}; "
            "install a newer release or pack the table again"
        )
    check_sealed(path, page, 0, uuid)
    if flags == FLAG_PAGE_EPOCHS and not trained:
        raise FormatError(
            f"{path} belongs to a table that is being trained: its pages hold epochs, and only the training "
            "store it lies in can tell which are current; export a snapshot to read or serve it"
        )
    geometry = Geometry(max(1, row_bytes), rows, first_page, epochs=trained)
    stated = (page_bytes, row_bytes, rows_per_page, data_pages, pages_per_row, flags)
    expected = (PAGE_BYTES, geometry.row_bytes, geometry.rows_per_page, geometry.data_pages,
                geometry.pages_per_row, FLAG_PAGE_EPOCHS * trained)  # fmt: skip
    if stated != expected or leaf_pages < 1 or first_page != 1 + description_pages(description_bytes):
        raise FormatError(
            f"{path}: header disagrees with itself (page bytes, row bytes, rows per page, data pages, "
            f"pages per row, flags): expected {expected}, got {stated}; pack the table again"
        )
    if leaf_pages > MAX_LEAF_PAGES:
        raise FormatError(
            f"{path}: header states {leaf_pages} pages under one leaf, the limit is {MAX_LEAF_PAGES}; "
            "pack the table again"
        )
    return Header(geometry, uuid, generation, description_bytes, leaf_pages)


def check_sealed(path: Path, pages: bytes, first_page_number: int, uuid: bytes) -> None:
    """Raise FormatError where a header or description page fails its checksum."""
    words = np.frombuffer(pages, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
    for i, page in enumerate(words):
        computed = page_checksum(page.copy(), first_page_number + i, *uuid_words(uuid))
        if computed != page[-1]:
            raise FormatError(
                f"{path}: page {first_page_number + i} of the header is damaged: checksum "
                f"{int(page[-1]):016x} in the page, {int(computed):016x} computed; pack the table again "
                "or restore the file"
            )


def read_description(path: Path, header: Header, pages: bytes) -> bytes:
    """The description's bytes out of its pages. Raises FormatError where a page is damaged."""
    check_sealed(path, pages, 1, header.uuid)
    payload = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)[:, :PAYLOAD_BYTES].tobytes()
    return payload[: header.description_bytes]


def decode_description(path: Path, header: Header, description: bytes) -> TableSpec:
    """The description of `path` as a TableSpec. Raises FormatError."""
    stated: dict[str, Any] = {
        "generation": header.generation.hex(),
        "uuid": header.uuid.hex(),
        "rows": header.geometry.rows,
    }
    try:
        described = json.loads(description)
        spec = TableSpec.from_json({**described, **stated})
    except (ValueError, TypeError, RecursionError, FormatError) as error:
        raise FormatError(f"{path}: the table's description cannot be read: {error}") from error
    if spec.row_bytes != header.geometry.row_bytes:
        raise FormatError(
            f"{path}: header says rows of {header.geometry.row_bytes} bytes, layout says {spec.row_bytes}"
        )
    return spec
