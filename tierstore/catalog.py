"""Which tables a store directory holds, and which generation of each is current.

DIR/catalog is an LMDB environment with two databases:

    tables   NAME                -> the current generation
    retired  NAME "/" GENERATION -> generations that were replaced and whose files still exist

A value is JSON: {"spec": the TableSpec with its hash scheme and every parameter, "file": path of
the row file below DIR, "retired_unix_s": null or when it was replaced}. Publishing is one LMDB
transaction: a reader sees the old generation or the new one. Rows are never looked at.

LMDB refuses a second open of one environment in a process, and an environment must not be used
after a fork. So this module keeps one open environment for each path, counts its users, and opens
anew in a forked child. Other processes may read and write the same catalog at any time.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import lmdb

from engram_client.errors import BadRequest, FormatError, StorageError, UnknownTable
from engram_client.spec import TableSpec

FIRST_MAP_BYTES = 4 * 2**20  # grows by itself; a table takes a few KiB
DATABASES = ("tables", "retired")

T = TypeVar("T")


@dataclass(frozen=True)
class CatalogEntry:
    """One generation of one table."""

    spec: TableSpec
    path: Path  # its row file
    state: Literal["current", "retired"]
    retired_unix_s: float | None = None


class Catalog:
    """The catalog of one store directory. Thread safe; close it when done."""

    def __init__(self, folder: Path, shared: _Shared) -> None:
        self.folder = folder
        self._shared = shared
        self._closed = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, create: bool = False) -> Catalog:
        """Open the catalog in store directory `folder`; `create` makes both where there is none.

        Raises FormatError where `folder` is not a store, StorageError where it cannot be opened.
        """
        folder = Path(folder).resolve()
        path = folder / "catalog"
        if not create and not (path / "data.mdb").exists():
            raise FormatError(
                f"{folder} is not a store directory: it has no catalog; pack a table into it first "
                "(tierstore pack SOURCE DIR)"
            )
        try:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            return cls(folder, _acquire(path))
        except (OSError, lmdb.Error) as error:
            raise StorageError(
                f"catalog {path} cannot be opened: {error}; the row files beside it are not touched: move "
                f"the catalog away and make it again with `tierstore adopt {folder}`"
            ) from error

    def tables(self) -> dict[str, CatalogEntry]:
        """The current generation of every table, by name."""
        return {entry.spec.name: entry for entry in self._entries("tables")}

    def entry(self, name: str) -> CatalogEntry:
        """The current generation of one table. Raises UnknownTable."""
        tables = self.tables()
        if name not in tables:
            known = ", ".join(sorted(tables)) or "none"
            raise UnknownTable(f"no table {name!r} in {self.folder}; it holds: {known}")
        return tables[name]

    @property
    def retired(self) -> list[CatalogEntry]:
        """Generations that were replaced and not forgotten yet, by name and generation."""
        return self._entries("retired")

    def earlier(self, name: str, generation: str = "") -> CatalogEntry:
        """The generation of a table that was replaced last, or the one that begins with `generation`.

        Raises UnknownTable, BadRequest where there is none, or more than one begins so.
        """
        current = self.entry(name)
        kept = [e for e in self.retired if e.spec.name == name]
        found = [e for e in kept if e.spec.generation.startswith(generation)]
        if not found or (generation and len(found) > 1):
            have = ", ".join(e.spec.generation for e in kept) or "none"
            count, which = "more than one" if found else "no", f"begins with {generation!r}"
            raise BadRequest(
                f"table {name!r} in {self.folder}: {count} earlier generation "
                f"{which if generation else 'is kept'}; kept: {have}; current: {current.spec.generation}"
            )
        return max(found, key=lambda entry: entry.retired_unix_s or 0.0)

    def publish(self, spec: TableSpec, file_name: str) -> CatalogEntry | None:
        """Make `spec`, in `file_name` below the store directory, the current generation.

        Returns the entry it replaces, which is retired in the same transaction, or None.
        """
        return self.publish_together([(spec, file_name)])[0]

    def publish_together(self, tables: Sequence[tuple[TableSpec, str]]) -> list[CatalogEntry | None]:
        """`publish` of several tables: all of them, or none."""

        def write(txn: Any, databases: dict[str, Any]) -> list[CatalogEntry | None]:
            return [self._publish(txn, databases, spec, file_name) for spec, file_name in tables]

        return self._run(write, write=True)

    def _publish(
        self, txn: Any, databases: dict[str, Any], spec: TableSpec, file_name: str
    ) -> CatalogEntry | None:
        key = spec.name.encode()
        replaced = txn.get(key, db=databases["tables"])
        old = self._decode(replaced, "retired") if replaced else None
        if old and old.spec.generation != spec.generation:
            value = json.loads(replaced) | {"retired_unix_s": time.time()}
            txn.put(_retired_key(old.spec), json.dumps(value).encode(), db=databases["retired"])
        txn.delete(_retired_key(spec), db=databases["retired"])
        value = {"spec": spec.to_json(), "file": file_name, "retired_unix_s": None}
        txn.put(key, json.dumps(value).encode(), db=databases["tables"])
        return old if old and old.spec.generation != spec.generation else None

    def forget(self, entry: CatalogEntry) -> None:
        """Remove a retired generation from the catalog; its file is the caller's to remove first."""
        key = _retired_key(entry.spec)
        self._run(lambda txn, databases: txn.delete(key, db=databases["retired"]), write=True)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _release(self._shared)

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _entries(self, database: str) -> list[CatalogEntry]:
        state: Literal["current", "retired"] = "current" if database == "tables" else "retired"

        def read(txn: Any, databases: dict[str, Any]) -> list[bytes]:
            return [value for _, value in txn.cursor(db=databases[database])]

        return [self._decode(value, state) for value in self._run(read)]

    def _decode(self, value: bytes, state: Literal["current", "retired"]) -> CatalogEntry:
        try:
            obj = json.loads(value)
            spec = TableSpec.from_json(obj["spec"])
            return CatalogEntry(spec, self.folder / obj["file"], state, obj["retired_unix_s"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"catalog of {self.folder}: an entry cannot be read: {error}") from error

    def _run(self, body: Callable[[Any, dict[str, Any]], T], write: bool = False) -> T:
        if self._closed:
            raise StorageError(f"catalog of {self.folder} is closed")
        if self._shared.pid != os.getpid():
            self._shared = _acquire(self._shared.path)
        return self._shared.run(body, write)


def _retired_key(spec: TableSpec) -> bytes:
    return f"{spec.name}/{spec.generation}".encode()


class _Shared:
    """One LMDB environment of this process, with the number of catalogs that use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 0
        self._idle = threading.Condition()
        self._running = 0
        writable = os.access(path, os.W_OK)
        size_bytes = FIRST_MAP_BYTES if writable else 0
        self.env = lmdb.open(
            os.fsencode(path), map_size=size_bytes, max_dbs=len(DATABASES), readonly=not writable,
            lock=writable, max_readers=512,
        )  # fmt: skip
        self.databases = {name: self.env.open_db(name.encode(), create=writable) for name in DATABASES}

    def run(self, body: Callable[[Any, dict[str, Any]], T], write: bool) -> T:
        """`body` in a transaction; the map grows where it is too small, here or in another process."""
        while True:
            try:
                with self._transaction(), self.env.begin(write=write) as txn:
                    return body(txn, self.databases)
            except lmdb.MapFullError:
                self._resize(2 * int(self.env.info()["map_size"]))
            except lmdb.MapResizedError:
                self._resize(0)
            except lmdb.Error as error:
                raise StorageError(f"catalog {self.path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._idle:
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _resize(self, map_bytes: int) -> None:
        """Set the map's size (0: what the file has), once no transaction of this process runs."""
        with self._idle:
            self._idle.wait_for(lambda: self._running == 0)
            self.env.set_mapsize(map_bytes)


_lock = threading.Lock()
_open: dict[Path, _Shared] = {}


def _acquire(path: Path) -> _Shared:
    with _lock:
        shared = _open.get(path)
        if shared and shared.pid != os.getpid():
            shared.env.close()  # a forked child's copy; the parent's environment is not touched
            shared = None
        if not shared:
            shared = _open[path] = _Shared(path)
        shared.users += 1
        return shared


def _release(shared: _Shared) -> None:
    with _lock:
        shared.users -= 1
        if shared.users == 0 and shared.pid == os.getpid():
            _open.pop(shared.path, None)
            shared.env.close()


def _new_lock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock_after_fork)
