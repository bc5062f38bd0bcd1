"""A reader of row files written from docs/FORMAT.md alone: the oracle, sharing no code with the product."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import xxhash

PAGE = 4096
PAYLOAD = 4088


class RowFileOracle:
    """All of a row file in memory, every checksum and the generation checked when it is opened."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        (magic, version, page, self.rows, self.row_bytes, self.rows_per_page, self.uuid, self.first_page,
         self.data_pages, description_bytes, self.generation, flags, self.pages_per_row, self.leaf_pages
         ) = struct.unpack_from("<8sIIQII16sQQQ16sIII", self.data)  # fmt: skip
        assert (magic, version, page, flags) == (b"TIERROWS", 1, PAGE, 0)
        assert len(self.data) == PAGE * (self.first_page + self.data_pages)
        assert self.data[100:PAYLOAD] == bytes(PAYLOAD - 100)
        described = b"".join(self.payload(p) for p in range(1, self.first_page))
        self.description = described[:description_bytes]
        assert not any(described[description_bytes:])
        self.spec: dict[str, Any] = json.loads(self.description)
        assert [p for p in range(len(self.data) // PAGE) if not self.page_is_whole(p)] == []
        assert self.computed_generation() == self.generation

    def payload(self, page: int) -> bytes:
        return self.data[page * PAGE : page * PAGE + PAYLOAD]

    def trailer(self, page: int) -> bytes:
        return self.data[page * PAGE + PAYLOAD : (page + 1) * PAGE]

    def page_is_whole(self, page: int) -> bool:
        seed = xxhash.xxh64_intdigest(self.uuid + struct.pack("<Q", page))
        return struct.pack("<Q", xxhash.xxh64_intdigest(self.payload(page), seed)) == self.trailer(page)

    def computed_generation(self) -> bytes:
        header = bytearray(self.payload(0))
        header[72:88] = bytes(16)
        root = blake2b(bytes(header) + self.description, digest_size=16)
        for first in range(0, self.data_pages, self.leaf_pages):
            last = min(first + self.leaf_pages, self.data_pages)
            trailers = b"".join(self.trailer(self.first_page + p) for p in range(first, last))
            root.update(blake2b(trailers, digest_size=16).digest())
        return root.digest()

    def row(self, row: int) -> bytes:
        if self.rows_per_page:
            page, place = divmod(row, self.rows_per_page)
            start = place * self.row_bytes
            return self.payload(self.first_page + page)[start : start + self.row_bytes]
        first = self.first_page + row * self.pages_per_row
        joined = b"".join(self.payload(first + i) for i in range(self.pages_per_row))
        assert not any(joined[self.row_bytes :])
        return joined[: self.row_bytes]

    def all_rows(self) -> bytes:
        return b"".join(self.row(r) for r in range(self.rows))
