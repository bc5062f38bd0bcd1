"""An extent's two files, opened or made anew: `DIR/extent/RECORDBYTES.extent` and `.index`.

An extent is a cache. One that is not what is expected (foreign, truncated, of another size) is said once and
made anew; its uuid is new too, so no page that is left over from before can pass its checksum.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import FormatError, StorageError
from tierstore.devices.files import Direct, OpenFile, open_for_reads
from tierstore.format.direct import make_folder, open_direct, reserve
from tierstore.format.geometry import PAGE_BYTES
from tierstore.tiers.extent_index import ExtentIndex
from tierstore.tiers.extent_layout import HEADER, VERSION, ExtentGeometry, found_version

log = logging.getLogger(__name__)
TABLES_MAX = 1024  # numbers that one process gives out, each generation of a table a new one
OURS = re.compile(r"\d+\.(?:extent|index)(?:\.partial)?")
UUID_SLICE = slice(HEADER.size - 16, HEADER.size)


@dataclass
class ExtentFile:
    """An open extent: to read, to write, and where it goes on."""

    path: Path
    geometry: ExtentGeometry
    uuid: bytes
    reading: OpenFile
    write_fd: int
    next_sequence: int

    @property
    def index_path(self) -> Path:
        return self.path.with_suffix(".index")

    def close(self) -> None:
        self.reading.close()
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1


def open_extent(folder: Path, geometry: ExtentGeometry, index: ExtentIndex, direct: Direct) -> ExtentFile:
    """Open the extent in `folder` and load its index, or begin an empty one.

    Raises StorageError or OSError where it cannot be made, above all on a full disk.
    """
    make_folder(folder)
    path = folder / f"{geometry.record_bytes}.extent"
    found = None
    if os.path.lexists(path):
        try:
            found = _read_uuid(path, geometry)
        except (FormatError, OSError) as error:
            log.warning("the record extent %s starts empty, and is made anew: %s", path, error)
    name = found or _make(path, geometry)
    reading = open_for_reads(path, direct)
    try:
        flags = os.O_WRONLY | os.O_CLOEXEC
        write_fd = os.open(path, flags) if direct == "off" else open_direct(path, flags)
    except BaseException:
        reading.close()
        raise
    file = ExtentFile(path, geometry, name, reading, write_fd, geometry.slots)
    if found:
        try:
            file.next_sequence = index.load(file.index_path, name)
        except FileNotFoundError:
            log.info("the record extent %s starts empty: no index of it was ever written", path)
        except (FormatError, StorageError, OSError) as error:
            log.warning("the record extent %s starts empty: %s", path, error)
    return file


def _read_uuid(path: Path, geometry: ExtentGeometry) -> bytes:
    """The uuid of an extent that is what it should be. Raises FormatError, OSError."""
    with path.open("rb") as file:
        page = file.read(PAGE_BYTES)
        size_bytes = os.fstat(file.fileno()).st_size
    found = page[UUID_SLICE]
    if (version := found_version(page)) not in (None, VERSION):
        raise FormatError(f"its layout is version {version}, this release writes {VERSION}")
    if len(page) < PAGE_BYTES or page != geometry.header_page(found):
        raise FormatError("it is not a record extent of this size, or its header is damaged")
    if size_bytes != geometry.file_bytes:
        raise FormatError(f"expected {geometry.file_bytes} bytes, got {size_bytes}")
    return found


def _make(path: Path, geometry: ExtentGeometry) -> bytes:
    """A new extent at `path`, in place of whatever was there; its uuid."""
    for old in (path, path.with_suffix(".index")):
        with suppress(FileNotFoundError):
            old.unlink()
    name = uuid.uuid4().bytes
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        reserve(fd, path, 0, geometry.file_bytes)
        os.ftruncate(fd, geometry.file_bytes)  # where the file system could not set bytes aside
        os.pwrite(fd, geometry.header_page(name), 0)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)
    return name


def remove_other_extents(folder: Path, record_bytes: Collection[int]) -> None:
    """Remove extents of records that no table has any more: they count against the budget."""
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name) and int(path.name.partition(".")[0]) not in record_bytes:
                log.info("removing %s: no table has records of that size", path)
                path.unlink()


def table_identities(generations: Mapping[int, str | None]) -> np.ndarray:
    """int64 [at least TABLES_MAX, 2] of generations, 32 hexadecimal digits, by table number; zeros for None.

    There is room for tables that come later, so kernels may go on with it when one does.
    """
    identities = np.zeros((max(TABLES_MAX, *generations, 0) + 1, 2), np.int64)
    for number, generation in generations.items():
        set_identity(identities, number, generation)
    return identities


def set_identity(identities: np.ndarray, number: int, generation: str | None) -> None:
    """Tell of one table; records of None are not kept."""
    if generation is not None:
        identities[number] = np.frombuffer(bytes.fromhex(generation), "<i8")
