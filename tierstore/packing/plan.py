"""What one `pack` is to do, written down before it starts.

DIR/packing/plan-<16 hex digits of the source's path>/plan.json holds the options, the source files
with sizes and times, and for each table its uuid and where its rows lie. A killed pack is resumed
from it: with `--consume` the checkpoint may no longer be complete enough to be read again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from engram_client.errors import BadRequest, FormatError
from engram_client.spec import Addressing, TableSpec, layout_from_json, scheme_from_json
from tierstore.format.direct import sync_folder, write_error
from tierstore.format.source import Extent, TableRows, TableSource

Consume = Literal["no", "yes", "force"]


@dataclass(frozen=True)
class PackOptions:
    """What a user may ask of `pack`. Paths may be relative."""

    name: str | None = None
    layers: tuple[int, ...] | None = None
    addressing: Literal["auto", "record", "row"] = "auto"
    model: str = "auto"
    layout_file: Path | None = None
    tokenizer: Path | None = None
    consume: Consume = "no"
    replace: bool = False
    prune: bool = False
    restart: bool = False

    def identity(self) -> dict[str, Any]:
        """The options that decide what is written; a resumed pack must have the same."""
        return {"name": self.name, "layers": list(self.layers or ()), "addressing": self.addressing}


@dataclass(frozen=True)
class FileIdentity:
    """Enough of a source file to notice that it was changed between two runs."""

    path: Path
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        try:
            stat = path.stat()
        except OSError as error:
            raise FormatError(
                f"{path}: {error.strerror}: the checkpoint is not complete; fetch it again"
            ) from error
        return cls(path, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class PlannedTable:
    """One table to be packed."""

    source: TableSource
    uuid: str
    addressing: Addressing

    @property
    def spec(self) -> TableSpec:
        """The table's description; its generation is not known yet and reads as zeros."""
        s = self.source
        return TableSpec(
            s.name, "0" * 32, self.uuid, s.rows, s.layout, self.addressing, s.scheme, s.layer, s.model
        )


@dataclass(frozen=True)
class PackPlan:
    """Everything one `pack` of one checkpoint is to do."""

    origin: Path  # the checkpoint, as it was named
    options: dict[str, Any]
    files: tuple[FileIdentity, ...]
    tables: tuple[PlannedTable, ...]

    @classmethod
    def make(cls, origin: Path, options: PackOptions, sources: Iterable[TableSource]) -> PackPlan:
        """A new plan with fresh uuids. Raises FormatError where a file is missing or too short."""
        tables = tuple(
            PlannedTable(source, uuid.uuid4().hex, choose_addressing(source, options.addressing))
            for source in sources
        )
        names = [table.source.name for table in tables]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise FormatError(f"{origin}: two tables are named {twice[0]!r}; give each a name of its own")
        paths = dict.fromkeys(path for table in tables for path in table.source.files)
        files = tuple(FileIdentity.of(path) for path in paths)
        _check_lengths(tables, {file.path: file.size_bytes for file in files})
        return cls(origin, options.identity(), files, tables)

    @property
    def sources(self) -> list[TableSource]:
        return [table.source for table in self.tables]

    def missing_files(self) -> list[Path]:
        return [file.path for file in self.files if not file.path.exists()]

    def changed_files(self) -> list[Path]:
        """Files that still exist and are not what they were when the plan was made."""
        return [f.path for f in self.files if f.path.exists() and FileIdentity.of(f.path) != f]

    def check_unchanged(self, paths: Iterable[Path]) -> None:
        """Raise FormatError where one of these files is there and not what it was."""
        for path in set(paths).intersection(self.changed_files()):
            raise FormatError(
                f"{path} was changed while it was packed, so its rows may be of two files; "
                "use --restart to begin again"
            )

    def save(self, path: Path) -> None:
        """Write the plan so that it is there whole or not at all, even after a crash."""
        text = json.dumps(dataclasses.asdict(self), default=os.fspath)
        fresh = path.with_suffix(".new")
        try:
            with fresh.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        except OSError as error:
            raise write_error(path, error, len(text)) from error
        sync_folder(path.parent)

    @classmethod
    def load(cls, path: Path) -> PackPlan | None:
        """The plan at `path`, or None where there is none."""
        if not path.exists():
            return None
        try:
            obj = json.loads(path.read_text())
            files = tuple(
                FileIdentity(Path(f["path"]), f["size_bytes"], f["modified_ns"]) for f in obj["files"]
            )
            tables = tuple(
                PlannedTable(_source_from_json(t["source"]), t["uuid"], t["addressing"])
                for t in obj["tables"]
            )
            return cls(Path(obj["origin"]), obj["options"], files, tables)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} cannot be read ({error}): it was written by another version, or damaged; "
                f"remove {path.parent} to begin again"
            ) from error


def plan_folder(packing: Path, origin: Path) -> Path:
    """Where the plan for checkpoint `origin` lies inside DIR/packing."""
    return packing / f"plan-{blake2b(os.fsencode(origin), digest_size=8).hexdigest()}"


def choose_addressing(source: TableRows, wanted: str) -> Addressing:
    """Record wherever row ids of an n-gram determine its key, unless the user says otherwise."""
    if wanted == "row":
        return "row"
    if wanted == "record" and source.scheme is None:
        raise BadRequest(
            f"table {source.name!r} has no hash scheme, so nothing says which rows make a record; "
            "use --addressing row"
        )
    if wanted == "record" or (source.scheme and source.scheme.recoverable):
        return "record"
    return "row"


def _check_lengths(tables: Iterable[PlannedTable], size_bytes: dict[Path, int]) -> None:
    for table in tables:
        for field, extents in zip(table.source.layout.fields, table.source.fields, strict=True):
            for extent in extents:
                end = extent.offset + extent.rows * field.bytes
                if end > size_bytes[extent.path]:
                    raise FormatError(
                        f"{extent.path} is truncated: {field.name} of table {table.source.name!r} reaches "
                        f"byte {end}, the file has {size_bytes[extent.path]}; fetch it again"
                    )


def _source_from_json(obj: dict[str, Any]) -> TableSource:
    fields = tuple(
        tuple(Extent(**{**extent, "path": Path(extent["path"])}) for extent in extents)
        for extents in obj["fields"]
    )
    scheme = scheme_from_json(obj["scheme"]) if obj["scheme"] else None
    return TableSource(
        **{**obj, "fields": fields, "scheme": scheme, "layout": layout_from_json(obj["layout"])}
    )
