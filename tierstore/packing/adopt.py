"""Taking row files into a store's catalog that are not in it.

A row file says all there is to know of its table, so a catalog that was lost can be made again, and a
table can be moved to another machine by copying one file. Headers are checked, rows are not:
`tierstore verify` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import BadRequest, FormatError
from engram_client.spec import TableSpec
from tierstore.catalog import Catalog
from tierstore.format.direct import sync_folder
from tierstore.format.rowfile import RowFile
from tierstore.packing.names import check_name


@dataclass(frozen=True)
class AdoptReport:
    """Row files that the catalog names now, and those it was not changed for, each with the reason."""

    adopted: tuple[RowFile, ...]
    left: tuple[tuple[Path, str], ...]


def adopt(folder: Path, files: Sequence[Path] = ()) -> AdoptReport:
    """Publish `files`, or without any all row files below DIR/tables that the catalog does not name.

    A file that is asked for by name replaces the generation that is current; one that was only found
    does not. Raises BadRequest, FormatError or StorageError, and has then changed nothing.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a directory; give the store directory that the row files lie in")
    asked = [RowFile.open(_inside(folder, path)) for path in files]
    found = [] if asked else sorted((folder / "tables").glob("*/*.rows"))
    if not asked and not found:
        raise FormatError(f"there are no row files below {folder / 'tables'}; give the store directory")
    with Catalog.open(folder, create=True) as catalog:
        current = catalog.tables()
        known = {entry.path for entry in (*current.values(), *catalog.retired)}
        new = asked or [RowFile.open(path) for path in found if path not in known]
        served = {} if asked else {name: entry.spec for name, entry in current.items()}
        left = tuple((file.path, _reason(served[file.spec.name])) for file in new if file.spec.name in served)
        adopted = tuple(file for file in new if file.spec.name not in served)
        _check(adopted)
        for file in adopted:
            catalog.publish(file.spec, str(file.path.relative_to(folder)))
    sync_folder(folder)
    return AdoptReport(adopted, left)


def _inside(folder: Path, path: Path) -> Path:
    path = path.resolve()
    if not path.is_relative_to(folder):
        raise BadRequest(
            f"{path} does not lie in the store directory {folder}; move or copy it to "
            f"{folder / 'tables'}/NAME first"
        )
    return path


def _reason(current: TableSpec) -> str:
    return f"the catalog has generation {current.generation} of {current.name!r}; name the file to replace it"


def _check(files: Sequence[RowFile]) -> None:
    """One file for each name, and names that a table may have."""
    paths: dict[str, Path] = {}
    for file in files:
        check_name(file.spec.name)
        other = paths.setdefault(file.spec.name, file.path)
        if other != file.path:
            raise BadRequest(
                f"{other} and {file.path} are generations of one table, {file.spec.name!r}; "
                "name the one that is to be served"
            )
