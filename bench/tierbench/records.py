"""Reading records: whatever lies in a file, the answer is a whole `Record` or an error that says what is
wrong.

Records come from other machines, other versions and other people, so nothing in them is taken on trust: a
file is regular and small, JSON without NaN, of a schema that is known here, with the members that the
schema names (docs/RECORDS.md). What `results` hold differs by benchmark; `Node` walks them and names the
place that it found wanting.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from engram_client.errors import FormatError, StorageError, TierstoreError
from tierbench.record import SCHEMA_NAME, SCHEMA_VERSION

RECORD_BYTES_MAX = 8 << 20
RECORDS_MAX, ALL_BYTES_MAX = 2000, 256 << 20  # in one folder, and of all that are read at once
TEXT_MAX, NAME_MAX = 10_000, 200  # characters of one string, of a member's name
DATE = "%Y-%m-%dT%H:%M:%SZ"
Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{0,79}\Z")]
Commit = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{7,64}\Z")]


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Literal["tierbench.record"]
    version: Annotated[int, msgspec.Meta(ge=2)]


class Machine(msgspec.Struct, frozen=True):
    """What `machine.describe_machine` tells; only what every version of it has told is asked for."""

    cpu: str
    cores_usable: Annotated[int, msgspec.Meta(ge=1)]
    memory_bytes: Annotated[int, msgspec.Meta(ge=1)]
    cores_quota: float | None = None
    memory_limit_bytes: int | None = None
    kernel: str = "?"
    python: str = "?"
    disk: dict[str, Any] = {}
    gpus: list[str] = []

    def told(self) -> str:
        """One line for people."""
        limit = self.memory_limit_bytes or self.memory_bytes
        cores = self.cores_quota or self.cores_usable
        gpus = f", {', '.join(self.gpus)}" if self.gpus else ""
        return f"{self.cpu}, {cores:g} cores, {limit / (1 << 30):.0f} GiB{gpus}"


class _Head(msgspec.Struct, frozen=True):
    """What is read before all else, so that a record too new is called that and not damaged."""

    schema: dict[str, Any] | int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one benchmark. `path` is where it was read from."""

    schema: Schema | Literal[1]
    name: Name
    date_utc: str
    commit: Commit | None
    dirty: bool | None
    machine: Machine
    packages: dict[str, str]
    seed: int | None
    parameters: dict[str, Any]
    results: dict[str, Any]
    path: str = ""

    @property
    def version(self) -> int:
        return 1 if isinstance(self.schema, int) else self.schema.version

    @property
    def file(self) -> str:
        return Path(self.path).name

    @property
    def node(self) -> Node:
        return Node(self.results, self.path, "$.results")


def load_record(path: Path) -> Record:
    """The record in `path`. StorageError: it cannot be read; FormatError: it is no record."""
    try:
        return _load(path)
    except FormatError as error:
        raise FormatError(printable(str(error))) from error


def _load(path: Path) -> Record:
    raw = _read(path)
    try:
        head = msgspec.json.decode(raw, type=_Head)
        _known(path, head.schema)
        record = msgspec.json.decode(raw, type=Record)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: not a record of tierbench: {_told(error)}; see docs/RECORDS.md"
        ) from error
    try:
        datetime.strptime(record.date_utc, DATE)
    except ValueError:
        raise FormatError(
            f"{path}: $.date_utc: expected a time as 2026-01-31T12:00:00Z, got {record.date_utc[:40]!r}"
        ) from None
    for place, members in (("$.parameters", record.parameters), ("$.results", record.results)):
        _plain(path, place, members)
    return msgspec.structs.replace(record, path=str(path))


def _known(path: Path, schema: dict[str, Any] | int) -> None:
    name, version = (
        (SCHEMA_NAME, schema) if isinstance(schema, int) else (schema.get("name"), schema.get("version"))
    )
    if name != SCHEMA_NAME:
        raise FormatError(f"{path}: $.schema.name: expected {SCHEMA_NAME!r}, got {str(name)[:60]!r}")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise FormatError(
            f"{path}: $.schema.version: this tierbench reads 1 to {SCHEMA_VERSION}, got {str(version)[:20]}; "
            "read it with the version that wrote it, or update"
        )


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: not a regular file; a record is one JSON file")
        if status.st_size > RECORD_BYTES_MAX:
            raise FormatError(
                f"{path}: {status.st_size:,} bytes, a record has at most {RECORD_BYTES_MAX:,}; "
                "records hold percentiles, not samples"
            )
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: record cannot be read: {error.strerror or error}") from error


def _told(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _plain(path: Path, place: str, value: Any, depth: int = 0) -> None:
    """Numbers are finite and fit a double, texts are short, nothing is nested without end."""
    if depth > 32:
        raise FormatError(f"{path}: {place[:120]}: nested deeper than 32")
    if isinstance(value, dict):
        for name, member in value.items():
            if len(name) > NAME_MAX:
                raise FormatError(f"{path}: {place}: a name of {len(name):,} characters, at most {NAME_MAX}")
            _plain(path, f"{place}.{name[:80]}", member, depth + 1)
    elif isinstance(value, list):
        for number, member in enumerate(value):
            _plain(path, f"{place}[{number}]", member, depth + 1)
    elif isinstance(value, str) and len(value) > TEXT_MAX:
        raise FormatError(f"{path}: {place}: a text of {len(value):,} characters, at most {TEXT_MAX:,}")
    elif isinstance(value, int | float) and not abs(value) < 1e300:
        raise FormatError(f"{path}: {place}: expected a number that a double holds, got {str(value)[:30]}")


def find_records(places: Iterable[Path]) -> list[Path]:
    """The JSON files of folders, and files as they are named. Raises StorageError for what is not there."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise StorageError(
                f"{place}: no such record or folder; `tierbench record --out DIR` makes records"
            )
        inside = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if len(inside) > RECORDS_MAX:
            raise FormatError(
                f"{place}: {len(inside):,} records, at most {RECORDS_MAX:,}; move old ones away"
            )
        found += inside
    return list(dict.fromkeys(found))


def load_all(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Records by date, the latest last, and why the others could not be read."""
    records, refused = [], []
    total_bytes = 0
    for path in paths:
        try:
            record = load_record(path)
            total_bytes += path.stat().st_size
            if total_bytes > ALL_BYTES_MAX:
                raise FormatError(
                    f"{path}: with it the records have over {ALL_BYTES_MAX:,} bytes; name fewer"
                )
            records.append(record)
        except (TierstoreError, OSError) as error:
            refused.append(printable(str(error)))
    return sorted(records, key=lambda record: (record.date_utc, record.path)), refused


class Node:
    """A place in a record's results. What is absent is None; what is of another kind is a FormatError."""

    def __init__(self, value: Any, path: str, place: str) -> None:
        self.value, self.path, self.place = value, path, place

    def at(self, *names: str) -> Node | None:
        """The member reached by `names`, or None where one of them is not there."""
        value, place = self.value, self.place
        for name in names:
            if not isinstance(value, dict):
                raise self._wrong(place, "an object", value)
            if value.get(name) is None:
                return None
            value, place = value[name], f"{place}.{name}"
        return Node(value, self.path, place)

    def number(self, *names: str) -> float | None:
        found = self.at(*names)
        if found is None:
            return None
        if isinstance(found.value, bool) or not isinstance(found.value, int | float):
            raise self._wrong(found.place, "a number", found.value)
        return float(found.value)

    def text(self, *names: str) -> str | None:
        found = self.at(*names)
        if found is not None and not isinstance(found.value, str):
            raise self._wrong(found.place, "a text", found.value)
        return None if found is None else found.value

    def numbers(self, *names: str) -> list[float]:
        """The numbers of a list, or [] where it is not there."""
        return [n for item in self.items(*names) if (n := item.number()) is not None]

    def items(self, *names: str) -> list[Node]:
        found = self.at(*names)
        if found is None:
            return []
        if not isinstance(found.value, list):
            raise self._wrong(found.place, "a list", found.value)
        return [Node(v, self.path, f"{found.place}[{i}]") for i, v in enumerate(found.value)]

    def members(self, *names: str) -> Iterator[tuple[str, Node]]:
        found = self.at(*names)
        if found is None:
            return
        if not isinstance(found.value, dict):
            raise self._wrong(found.place, "an object", found.value)
        for name, value in found.value.items():
            yield name, Node(value, self.path, f"{found.place}.{name}")

    def _wrong(self, place: str, expected: str, got: Any) -> FormatError:
        kind = "nothing" if got is None else f"{type(got).__name__} {json.dumps(got)[:40]}"
        return FormatError(printable(f"{self.path}: {place}: expected {expected}, got {kind}"))


def printable(text: str) -> str:
    """Without what would steer a terminal: a label may come from a file of somebody else's."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
