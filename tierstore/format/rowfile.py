"""A packed table, opened: header and description are read, rows are not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import FormatError, StorageError
from engram_client.spec import TableSpec
from tierstore.format.geometry import PAGE_BYTES, Geometry
from tierstore.format.header import (
    Header,
    decode_description,
    decode_header,
    description_pages,
    read_description,
)

MAX_DESCRIPTION_BYTES = 64 * 2**20  # far above any hash scheme; bounds what a damaged header can ask for


@dataclass(frozen=True)
class RowFile:
    """One generation of one table on disk."""

    path: Path
    spec: TableSpec
    header: Header
    description: bytes  # the spec as it is written in the file

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_size: bool = True) -> RowFile:
        """Read the header and the description of the row file at `path`; no row is read.

        Raises FormatError where the file is foreign, truncated, damaged in its header or of a
        newer version, StorageError where it cannot be read. With check_size=False a file whose
        length is not what its header says is opened all the same.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                header = decode_header(path, file.read(PAGE_BYTES))
                pages = file.read(_description_file_bytes(path, header))
                size_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise StorageError(f"row file {path} cannot be read: {error.strerror or error}") from error
        if len(pages) < description_pages(header.description_bytes) * PAGE_BYTES:
            raise FormatError(f"{path} is truncated: {size_bytes} bytes, it ends inside its description")
        if check_size:
            _check_size(path, header.geometry, size_bytes)
        description = read_description(path, header, pages)
        return cls(path, decode_description(path, header, description), header, description)

    @property
    def geometry(self) -> Geometry:
        return self.header.geometry

    @property
    def uuid_words(self) -> tuple[np.uint64, np.uint64]:
        """The file's uuid as the checksum kernels take it: two little-endian words."""
        return self.header.uuid_words


def _description_file_bytes(path: Path, header: Header) -> int:
    if header.description_bytes > MAX_DESCRIPTION_BYTES:
        raise FormatError(
            f"{path}: header states a description of {header.description_bytes} bytes; "
            f"the limit is {MAX_DESCRIPTION_BYTES}"
        )
    return description_pages(header.description_bytes) * PAGE_BYTES


def _check_size(path: Path, geometry: Geometry, size_bytes: int) -> None:
    if size_bytes == geometry.file_bytes:
        return
    wrong = "is truncated" if size_bytes < geometry.file_bytes else "has bytes after its last page"
    raise FormatError(
        f"{path} {wrong}: expected {geometry.file_bytes} bytes, got {size_bytes}; "
        "`tierstore verify` names the rows that are missing; restore the file or pack the table again"
    )
