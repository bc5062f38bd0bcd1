"""What a table was before it was trained here: DIR/training/base/NAME.rows, a generation as it was packed.

A row that no update has touched is read from there and decoded, so a table of any size can be trained on at
once and takes room for what training changes alone. The file is a link to the row file of a store that
serves it, or a copy where there can be no link: it stays whatever becomes of that store. Its generation is
checked when the training store opens, its pages as they are read. Nothing ever writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, FormatError
from engram_client.spec import TableSpec
from tierstore.format.decode import bfloat16_of, check_decodable, weights_of
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.header import (
    Header,
    decode_description,
    decode_header,
    description_pages,
    read_description,
)
from tierstore.kernels.trained_pages import first_wrong_page
from tierstore.tiers.plan import Pieces, Window, row_pieces
from tierstore.updates.disk import Disk
from tierstore.updates.reading import PieceReader
from tierstore.updates.spec import TrainedSpec

FOLDER = "base"
BATCH_BYTES = 1 << 20  # of weights that are decoded at once


def base_path(folder: Path, name: str) -> Path:
    return folder.absolute() / FOLDER / f"{name}.rows"


def located(folder: Path, spec: TrainedSpec) -> TrainedSpec:
    """`spec` of the store in `folder`, knowing where its base lies."""
    if spec.initial.kind != "packed":
        return spec
    initial = dataclasses.replace(spec.initial, path=str(base_path(folder, spec.name)))
    return dataclasses.replace(spec, initial=initial)


def bring_bases(disk: Disk, folder: Path, tables: Sequence[TrainedSpec]) -> list[TrainedSpec]:
    """Have what `tables` begin with in the store that is being made in `folder`. Raises OSError."""
    found = [spec for spec in tables if spec.initial.path is not None]
    if found:
        for spec in found:
            disk.bring(Path(spec.initial.path or ""), base_path(folder, spec.name))
        disk.sync_folder(folder / FOLDER)
    return [located(folder, spec) for spec in tables]


class BaseRows:
    """Of one table; closed with its pages."""

    def __init__(self, disk: Disk, spec: TrainedSpec) -> None:
        """Raises FormatError where the file is missing, or not the generation that was begun with."""
        assert spec.initial.path is not None
        self.path, self._spec, self._disk = Path(spec.initial.path), spec, disk
        try:
            self._fd = disk.open_direct(self.path)
        except FileNotFoundError as error:
            raise FormatError(
                f"{self.path} is missing: rows of table {spec.name!r} that were not trained are in it; link "
                f"or copy generation {spec.initial.generation} there"
            ) from error
        try:
            self._header, self._packed = self._read_header()
            self._check()
        except BaseException:
            disk.close(self._fd)
            raise
        fields = [f for f in spec.layout.fields if f.name in ("weight", "master")]
        self._places = [(spec.layout.offset_bytes(f.name), f.dtype == "bfloat16") for f in fields]
        self._batch_rows = max(1, BATCH_BYTES // (4 * spec.layout.embedding_dim))

    def _read_header(self) -> tuple[Header, TableSpec]:
        page = aligned_bytes(PAGE_BYTES)
        page = page[: self._disk.read(self._fd, page, 0)]
        header = decode_header(self.path, page.tobytes())
        pages = aligned_bytes(description_pages(header.description_bytes) * PAGE_BYTES)
        if self._disk.read(self._fd, pages, PAGE_BYTES) < pages.size:
            raise FormatError(f"{self.path} is truncated: it ends inside its description")
        description = read_description(self.path, header, pages.tobytes())
        return header, decode_description(self.path, header, description)

    def _check(self) -> None:
        spec, packed, g = self._spec, self._packed, self._header.geometry
        found = (packed.generation, packed.rows, packed.embedding_dim, self._disk.size(self._fd))
        expected = (spec.initial.generation, spec.whole_rows, spec.layout.embedding_dim, g.file_bytes)
        if found != expected:
            raise FormatError(
                f"{self.path} is not what table {spec.name!r} began with (generation, rows, dim, bytes): "
                f"expected {expected}, got {found}; link or copy that generation there"
            )
        check_decodable(spec.name, packed.layout)

    def close(self) -> None:
        self._disk.close(self._fd)

    def fill(
        self, ids: np.ndarray, targets: np.ndarray, out: np.ndarray, reader: PieceReader, deadline: Deadline
    ) -> None:
        """Weights of rows `ids` of the whole table into rows `targets` of `out`; nothing else of these.

        Raises DataCorrupt naming page and rows, StorageError, DeadlineExceeded.
        """
        inside = ids < self._packed.rows  # a share of a tiny table has a row that nobody names
        if not inside.all():
            ids, targets = ids[inside], targets[inside]
        for start in range(0, ids.size, self._batch_rows):
            batch = slice(start, start + self._batch_rows)
            values = weights_of(self._packed.layout, self._read(ids[batch], reader, deadline))
            for at, rounded in self._places:
                data = bfloat16_of(values) if rounded else values
                raw = data.view(np.uint8).reshape(len(values), -1)
                out[targets[batch], at : at + raw.shape[1]] = raw

    def _read(self, ids: np.ndarray, reader: PieceReader, deadline: Deadline) -> np.ndarray:
        row_bytes = self._packed.row_bytes
        pieces = row_pieces(self._header.geometry, ids, np.arange(ids.size) * row_bytes)
        if pieces.lengths is None:
            pieces = Pieces(pieces.pages, pieces.page_offsets, np.full(ids.size, row_bytes), pieces.targets)
        rows = np.empty((ids.size, row_bytes), np.uint8)
        reader.read(self._fd, self.path, pieces, rows, deadline, self._check_pages)
        return rows

    def _check_pages(self, window: Window, slots: np.ndarray) -> None:
        epochs = np.zeros(window.pages.size, np.uint32)  # packed pages have none, so any will do
        words = self._header.uuid_words
        wrong = first_wrong_page(slots, window.page_slots, window.pages, epochs, *words)
        if wrong >= 0:
            page = int(window.pages[wrong])
            rows = self._header.geometry.rows_of_page(page)
            raise DataCorrupt(
                f"page {page} of {self.path}, which table {self._spec.name!r} began with, is damaged (rows "
                f"{rows.start} to {rows.stop - 1} there); rows that were trained lie elsewhere: put a whole "
                f"copy of generation {self._packed.generation} in its place"
            )
