"""Where a table's bytes lie in a checkpoint: the contract between readers of checkpoints and pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import FormatError
from engram_client.spec import HashScheme, RowLayout


@dataclass(frozen=True)
class Extent:
    """A dense run of one field's rows in one file: row `first_row + i` starts at
    `offset + i * field.bytes`."""

    path: Path
    offset: int  # bytes from the start of the file
    first_row: int
    rows: int


@dataclass(frozen=True)
class TableRows:
    """What a table's rows are, wherever they come from. Raises FormatError where that makes no sense."""

    name: str
    model: str | None
    layer: int | None
    rows: int
    layout: RowLayout
    scheme: HashScheme | None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise FormatError(f"table {self.name!r}: it has {self.rows} rows; a table needs at least one")
        if self.scheme and self.scheme.rows > self.rows:
            raise FormatError(
                f"table {self.name!r}: its hash scheme names rows up to {self.scheme.rows - 1}, "
                f"but there are {self.rows} rows"
            )


@dataclass(frozen=True)
class TableSource(TableRows):
    """One table of a checkpoint, before it is packed.

    `fields` holds, for each field of `layout` in its order, the extents that cover rows
    [0, rows) in ascending order, without a gap or an overlap. Raises FormatError otherwise.
    """

    fields: tuple[tuple[Extent, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.fields) != len(self.layout.fields):
            raise FormatError(
                f"table {self.name!r}: its layout has {len(self.layout.fields)} fields, "
                f"but tensors were found for {len(self.fields)}"
            )
        for field, extents in zip(self.layout.fields, self.fields, strict=True):
            _check_cover(f"table {self.name!r}, field {field.name!r}", extents, self.rows)

    @property
    def files(self) -> tuple[Path, ...]:
        """The distinct files the rows lie in, in order of first use."""
        return tuple(dict.fromkeys(e.path for extents in self.fields for e in extents))


def _check_cover(where: str, extents: tuple[Extent, ...], rows: int) -> None:
    expected = 0
    for extent in extents:
        if extent.first_row != expected or extent.rows < 1 or extent.offset < 0:
            raise FormatError(
                f"{where}: {extent.path} holds rows {extent.first_row} to "
                f"{extent.first_row + extent.rows - 1}, expected them to start at row {expected}"
            )
        expected += extent.rows
    if expected != rows:
        raise FormatError(f"{where}: its tensors hold {expected} rows, the table has {rows}")
