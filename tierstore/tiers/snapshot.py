"""The records of an arena on disk, so that a restart finds its cache warm.

    header   64 KiB: magic, length of the JSON, JSON, zeros; the last 8 bytes are its XXH64
    chunk    XXH64 of the rest of the chunk (seed: its number), count, entries, zeros; all the same length

The JSON says what the entries are (record bytes, length of an entry, entries and bytes of a chunk) and
which generation of which table each owner is. A snapshot is written beside the old one and renamed over
it, so there is always a whole one or none. It is read from front to back in large reads while the
daemon serves already. A chunk that is damaged, and records of a table that has another generation
now, are left out: the snapshot can make a start warm, never wrong.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.arena.layout import WAYS, slot_bytes_for
from engram_client.errors import FormatError
from tierstore.format.direct import aligned_bytes, open_direct, read_up_to, sync_folder, write_all
from tierstore.kernels.checksum import words_checksum
from tierstore.tiers.dram import Arena

MAGIC = b"TIERWARM"
VERSION = 1
HEADER_BYTES = 64 << 10
CHUNK_BYTES_MIN = 1 << 20
CHUNK_HEADER_BYTES = 16
PAGE_BYTES = 4096

Owners = Mapping[str, int]  # "GENERATION/ORDER" -> owner, in this process


@dataclass(frozen=True)
class ChunkShape:
    """How many entries of which length make a chunk."""

    record_bytes: int

    @property
    def entry_bytes(self) -> int:
        return slot_bytes_for(self.record_bytes)

    @property
    def entries(self) -> int:
        return max(WAYS, (CHUNK_BYTES_MIN - CHUNK_HEADER_BYTES) // self.entry_bytes)

    @property
    def bytes(self) -> int:
        needed = CHUNK_HEADER_BYTES + self.entries * self.entry_bytes
        return -(-needed // PAGE_BYTES) * PAGE_BYTES


def write_snapshot(path: Path, arena: Arena, owners: Owners, stop: threading.Event) -> int | None:
    """Write the arena's records to `path`; how many, or None where `stop` was set before the end.

    Raises StorageError where the disk refuses; an earlier snapshot at `path` stays then.
    """
    shape = ChunkShape(arena.geometry.record_bytes)
    partial = path.with_suffix(".partial")
    fd = open_direct(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        entries, number = 0, 0
        for number, (chunk, count) in enumerate(_chunks_of(arena, shape)):
            if stop.is_set():
                partial.unlink()
                return None
            _seal(chunk, number)
            write_all(fd, partial, chunk, HEADER_BYTES + number * shape.bytes)
            entries += count
        write_all(fd, partial, _header(shape, owners, entries), 0)
        os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(fd)
    partial.rename(path)
    sync_folder(path.parent)
    return entries


def _chunks_of(arena: Arena, shape: ChunkShape) -> Iterator[tuple[np.ndarray, int]]:
    chunk = aligned_bytes(shape.bytes)
    entries = chunk[CHUNK_HEADER_BYTES:].ctypes.data
    for count in arena.copy_out(entries, shape.entries):
        chunk[CHUNK_HEADER_BYTES + count * shape.entry_bytes :] = 0
        chunk[8:16].view(np.uint64)[0] = count
        yield chunk, count


def _seal(chunk: np.ndarray, number: int) -> None:
    words = chunk.view(np.uint64)
    words[0] = words_checksum(words[1:], number)


def _header(shape: ChunkShape, owners: Owners, entries: int) -> np.ndarray:
    header = aligned_bytes(HEADER_BYTES)
    text = json.dumps(
        {
            "version": VERSION,
            "record_bytes": shape.record_bytes,
            "entry_bytes": shape.entry_bytes,
            "chunk_entries": shape.entries,
            "chunk_bytes": shape.bytes,
            "entries": entries,
            "owners": dict(owners),
        }
    ).encode()
    if 16 + len(text) > HEADER_BYTES - 8:
        raise FormatError(
            f"a snapshot's header holds {HEADER_BYTES - 24} bytes, {len(owners)} owners need more"
        )
    header[:8] = np.frombuffer(MAGIC, np.uint8)
    header[8:16].view(np.uint64)[0] = len(text)
    header[16 : 16 + len(text)] = np.frombuffer(text, np.uint8)
    words = header.view(np.uint64)
    words[-1] = words_checksum(words[:-1], 0)
    return header


def load_snapshot(path: Path, arena: Arena, owners: Owners, stop: threading.Event) -> int:
    """Admit the records of the snapshot at `path`; how many bytes were read, chunk by chunk.

    Raises FormatError where the file is no snapshot of such records, StorageError where it
    cannot be read. Damaged chunks are left out.
    """
    fd = open_direct(path, os.O_RDONLY)
    try:
        shape = ChunkShape(arena.geometry.record_bytes)
        written = _read_header(fd, path, shape)
        renamed = [(old, owners[name]) for name, old in written["owners"].items() if name in owners]
        mapping = np.array(sorted(renamed), np.int64).reshape(-1, 2)
        chunk, at = aligned_bytes(shape.bytes), HEADER_BYTES
        while not stop.is_set() and read_up_to(fd, path, chunk, at) == shape.bytes:
            words = chunk.view(np.uint64)
            number = (at - HEADER_BYTES) // shape.bytes
            if words[0] == words_checksum(words[1:], number) and words[1] <= shape.entries:
                arena.copy_in(chunk[CHUNK_HEADER_BYTES:].ctypes.data, int(words[1]), mapping)
            at += shape.bytes
        return at
    finally:
        os.close(fd)


def _read_header(fd: int, path: Path, shape: ChunkShape) -> dict[str, Any]:
    header = aligned_bytes(HEADER_BYTES)
    whole = read_up_to(fd, path, header, 0) == HEADER_BYTES
    words = header.view(np.uint64)
    if not whole or header[:8].tobytes() != MAGIC or words[-1] != words_checksum(words[:-1], 0):
        raise FormatError(f"{path} is not a snapshot of a cache, or its header is damaged")
    written: dict[str, Any] = json.loads(header[16 : 16 + int(words[1])].tobytes())
    for key, expected in (
        ("version", VERSION),
        ("entry_bytes", shape.entry_bytes),
        ("chunk_bytes", shape.bytes),
    ):
        if written[key] != expected:
            raise FormatError(f"{path}: expected {key} {expected}, got {written[key]}")
    return written
