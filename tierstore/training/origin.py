"""Tables that training begins with: those of a store that serves them, or of a model's checkpoint.

A packed generation is linked into the training store as it is (tierstore/updates/base_rows.py), which takes
no time and no room. A checkpoint is packed first, inside the folder that is to become the training store, by
the packer and with all it promises: bounded memory, room checked first, and a create that was killed goes on
where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import BadRequest, FormatError, UnknownTable
from engram_client.spec import HashScheme, TableSpec
from tierstore.catalog import Catalog
from tierstore.format.decode import check_decodable
from tierstore.format.rowfile import RowFile
from tierstore.packing import PackOptions, Progress, pack
from tierstore.packing.claim import claim
from tierstore.packing.plan import plan_folder
from tierstore.training.store import FOLDER
from tierstore.updates import Initial
from tierstore.updates.disk import REAL_DISK
from tierstore.updates.identity import is_created

PACKED_HERE = "from"  # in the training folder, until there is a store: what a checkpoint was packed into


@dataclass(frozen=True)
class NewTable:
    """A table that is to be made; `initial` where it begins with rows that are there already."""

    name: str
    rows: int
    dim: int
    scheme: HashScheme | None = None
    model: str | None = None
    layer: int | None = None
    initial: Initial | None = None


@dataclass(frozen=True)
class Origin:
    """Where tables come from: a store directory, or a checkpoint, which is read as `pack` reads it.

    `tables` chooses some by name (none: all), `name` is what a single one is called here.
    """

    path: Path
    tables: tuple[str, ...] = ()
    name: str | None = None
    layers: tuple[int, ...] | None = None
    model: str = "auto"
    layout_file: Path | None = None
    tokenizer: Path | None = None


@contextmanager
def begun_tables(
    origin: Origin,
    directory: Path,
    notify: Callable[[str], None],
    on_progress: Callable[[Progress], None],
) -> Iterator[list[NewTable]]:
    """The tables of `origin` for a training store in `directory`, which is to be made within.

    Raises BadRequest, UnknownTable, FormatError, StorageError.
    """
    if (origin.path / "catalog").is_dir():
        yield _tables_of(origin, origin.path)
        return
    if not origin.path.exists():
        raise FormatError(
            f"{origin.path} does not exist; give a store directory, a checkpoint's folder or a "
            ".safetensors file"
        )
    scratch = directory / FOLDER / PACKED_HERE
    try:
        with claim(scratch, f"training store {directory}"):
            _pack(origin, scratch, notify, on_progress)
            yield _tables_of(origin, scratch)
            shutil.rmtree(scratch)  # what training begins with is linked by now
    except BaseException:
        with suppress(OSError):  # what can be gone on with stays
            (directory / FOLDER).rmdir()
            directory.rmdir()
        raise


def _pack(
    origin: Origin, scratch: Path, notify: Callable[[str], None], on_progress: Callable[[Progress], None]
) -> None:
    options = PackOptions(
        layers=origin.layers, addressing="row", model=origin.model, layout_file=origin.layout_file,
        tokenizer=origin.tokenizer,
    )  # fmt: skip
    plan = plan_folder(scratch / "packing", origin.path.absolute()) / "plan.json"
    if plan.exists():
        try:
            pack(origin.path, scratch, options, notify=notify, on_progress=on_progress)
            return
        except (BadRequest, FormatError) as error:
            notify(f"what an earlier create had packed is dropped: {error}")
    for left in scratch.iterdir():  # of another checkpoint, or another state of this one
        shutil.rmtree(left)
    pack(origin.path, scratch, options, notify=notify, on_progress=on_progress)


def _tables_of(origin: Origin, store: Path) -> list[NewTable]:
    with Catalog.open(store) as catalog:
        entries = catalog.tables()
    if not entries and is_created(REAL_DISK, store / FOLDER):
        raise BadRequest(
            f"{store} has no packed table, but tables in training; `tierstore snapshot` copies these, "
            "`tierstore export` makes a checkpoint to begin with"
        )
    for name in origin.tables:
        if name not in entries:
            known = ", ".join(sorted(entries)) or "none"
            raise UnknownTable(f"no table {name!r} in {origin.path}; there are: {known}")
    chosen = [entries[name] for name in dict.fromkeys(origin.tables)] or list(entries.values())
    if origin.layers is not None:
        chosen = [entry for entry in chosen if entry.spec.layer in origin.layers]
    if not chosen:
        known = ", ".join(sorted(entries)) or "none"
        raise BadRequest(f"{origin.path} has no such table to begin with; there are: {known}")
    if origin.name is not None and len(chosen) != 1:
        have = ", ".join(entry.spec.name for entry in chosen)
        raise BadRequest(
            f"the name {origin.name!r} is for one table, {origin.path} gives {len(chosen)} ({have}); "
            "choose one with --table NAME"
        )
    return [_begun(entry.spec, entry.path, origin.name) for entry in chosen]


def _begun(spec: TableSpec, path: Path, name: str | None) -> NewTable:
    found = RowFile.open(path).spec
    if found.generation != spec.generation:
        raise FormatError(
            f"{path} holds generation {found.generation}, the catalog expects {spec.generation}; "
            "restore the file"
        )
    check_decodable(spec.name, spec.layout)
    initial = Initial("packed", generation=spec.generation, path=str(path))
    return NewTable(
        name or spec.name, spec.rows, spec.embedding_dim, spec.scheme, spec.model, spec.layer, initial
    )


def check_names(tables: Sequence[NewTable], directory: Path) -> None:
    """A name means one table to those who connect to a directory. Raises BadRequest."""
    if not (directory / "catalog").is_dir():
        return
    with Catalog.open(directory) as catalog:
        packed = catalog.tables()
    for table in tables:
        if table.name in packed:
            raise BadRequest(
                f"{directory} has a packed table {table.name!r}; a name means one table: choose another "
                "name, or another directory"
            )
