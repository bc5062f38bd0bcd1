"""What an extent holds and where: fingerprints and sequences in DRAM, and their snapshot on disk.

    snapshot   page 0     magic "TIERXIDX", uint32 version, uint32 bytes of a page, uint64 record bytes,
                          uint64 pages and uuid of the extent, uint64 sets, int64 next sequence; checksum
               page 1...  the index's words, 511 a page; checksum, as of pages of the extent

A snapshot may be older than the extent. What it knows and is no longer there is found out by its identity
when it is read, so a snapshot can be stale and never wrong.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from engram_client.errors import FormatError
from tierstore.format.direct import aligned_bytes, open_direct, read_up_to, sync_folder, write_all
from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES
from tierstore.format.header import sealed_pages, uuid_words
from tierstore.kernels.checksum import PAYLOAD_WORDS, first_bad_page, seal_pages
from tierstore.kernels.extent import (
    SEQUENCE_MASK,
    WAYS,
    insert_into_index,
    probe_index,
    remove_from_index,
    withdraw_from_index,
)
from tierstore.tiers.extent_layout import ExtentGeometry

MAGIC = b"TIERXIDX"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ16sQq")
PIECE_PAGES = 256


class ExtentIndex:
    """Thread safe. Looking takes no lock, changing holds one for one kernel call."""

    def __init__(self, geometry: ExtentGeometry, identities: np.ndarray) -> None:
        """`identities` int64 [tables, 2]: see tierstore/kernels/extent.py."""
        self._geometry = geometry
        self._identities = identities
        self._words = np.zeros((geometry.index_sets, WAYS), np.int64)
        self._changing = threading.Lock()

    @property
    def total_bytes(self) -> int:
        return int(self._words.nbytes)

    def probe(self, keys: np.ndarray, owners: np.ndarray, oldest: int) -> np.ndarray:
        """Sequences int64 [n] of what may be there, -1 of what is not or is older than `oldest`."""
        sequences = np.empty(keys.size, np.int64)
        probe_index(self._words, keys, owners, self._identities, oldest, sequences)
        return sequences

    def insert(self, hashes: np.ndarray, first: int, count: int) -> None:
        """Records `first` and on are there now; `hashes` int64, those of `pack_entries`."""
        with self._changing:
            insert_into_index(self._words, hashes, first, count)

    def withdraw(self, hashes: np.ndarray, first: int, count: int) -> None:
        """Undo `insert`."""
        with self._changing:
            withdraw_from_index(self._words, hashes, first, count)

    def remove(self, keys: np.ndarray, owners: np.ndarray, sequences: np.ndarray) -> None:
        """These records do not lie there."""
        with self._changing:
            remove_from_index(self._words, keys, owners, self._identities, sequences)

    def save(self, path: Path, uuid: bytes, next_sequence: int) -> int:
        """Write a snapshot beside `path` and rename it; bytes written. Raises StorageError, OSError."""
        partial = path.with_name(path.name + ".partial")
        g = self._geometry
        header = HEADER.pack(
            MAGIC, VERSION, PAGE_BYTES, g.record_bytes, g.pages, uuid, len(self._words), next_sequence
        )
        fd = open_direct(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            first = aligned_bytes(PAGE_BYTES)
            first[:] = np.frombuffer(sealed_pages(header.ljust(PAYLOAD_BYTES, b"\0"), 0, uuid), np.uint8)
            write_all(fd, partial, first, 0)
            written = PAGE_BYTES
            for number, words, pages in self._pieces():
                pages[:, :PAYLOAD_WORDS].flat[: words.size] = words  # a copy: the index goes on changing
                seal_pages(pages, 1 + number, *uuid_words(uuid), 0, len(pages))
                write_all(fd, partial, pages.reshape(-1).view(np.uint8), (1 + number) * PAGE_BYTES)
                written += pages.nbytes
            os.fdatasync(fd)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        finally:
            os.close(fd)
        partial.rename(path)
        sync_folder(path.parent)
        return written

    def load(self, path: Path, uuid: bytes) -> int:
        """Take in a snapshot; the next sequence. Raises FormatError, StorageError, OSError."""
        fd = open_direct(path, os.O_RDONLY)
        try:
            next_sequence = self._check_header(fd, path, uuid)
            for number, words, pages in self._pieces():
                flat = pages.reshape(-1).view(np.uint8)
                whole = read_up_to(fd, path, flat, (1 + number) * PAGE_BYTES) == flat.size
                numbers = np.arange(1 + number, 1 + number + len(pages))
                if not whole or first_bad_page(pages, numbers, *uuid_words(uuid), 0, len(pages)) >= 0:
                    self._words[:] = 0
                    raise FormatError(f"{path} is damaged or truncated")
                words[:] = pages[:, :PAYLOAD_WORDS].flat[: words.size]
        finally:
            os.close(fd)
        return next_sequence

    def _check_header(self, fd: int, path: Path, uuid: bytes) -> int:
        page, g = aligned_bytes(PAGE_BYTES), self._geometry
        whole = read_up_to(fd, path, page, 0) == PAGE_BYTES
        magic, *stated, next_sequence = HEADER.unpack_from(page.tobytes())
        expected = [VERSION, PAGE_BYTES, g.record_bytes, g.pages, uuid, len(self._words)]
        words = page.view(np.uint64).reshape(1, -1)
        if (
            not whole
            or magic != MAGIC
            or first_bad_page(words, np.zeros(1, np.int64), *uuid_words(uuid), 0, 1) >= 0
        ):
            raise FormatError(f"{path} is not the index of this extent")
        if stated != expected or not g.slots <= next_sequence <= SEQUENCE_MASK // 2:
            raise FormatError(f"{path} is the index of another extent")
        return int(next_sequence)

    def _pieces(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number of the first page, the words, and a zeroed buffer of pages for them, piece by piece."""
        flat = self._words.reshape(-1)
        step = PIECE_PAGES * PAYLOAD_WORDS
        for start in range(0, flat.size, step):
            words = flat[start : start + step]
            count = -(-words.size // PAYLOAD_WORDS)
            pages = aligned_bytes(count * PAGE_BYTES).view(np.uint64).reshape(count, -1)
            yield start // PAYLOAD_WORDS, words, pages
