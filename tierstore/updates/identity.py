"""DIR/training/tables.json: which store this is and which tables it trains. Written last at creation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import BadRequest, DataCorrupt, FormatError
from tierstore.format.header import uuid_words
from tierstore.updates.base_rows import FOLDER as BASES
from tierstore.updates.base_rows import bring_bases, located
from tierstore.updates.blocks import checksum_of
from tierstore.updates.disk import Disk
from tierstore.updates.epochs import EpochsFile
from tierstore.updates.journal import Journal
from tierstore.updates.pages import TablePages
from tierstore.updates.spec import TrainedSpec
from tierstore.updates.superblock import Superblock

NAME, VERSION = "tables.json", 1
FIRST_FOLD = 1  # whose pages those of a store that begins with rows are

Fill = Callable[[list[TablePages]], None]  # writes pages of a store that is being made, as FIRST_FOLD


@dataclass(frozen=True)
class Identity:
    """The store's uuid and its tables, in the order that numbers them."""

    uuid: bytes
    tables: tuple[TrainedSpec, ...]

    @property
    def words(self) -> list[tuple[np.uint64, np.uint64]]:
        """The uuid of each table as the kernels take it."""
        return [uuid_words(bytes.fromhex(t.uuid)) for t in self.tables]


def check_tables(tables: Sequence[TrainedSpec]) -> None:
    """Raise BadRequest where a store cannot hold these together."""
    if not tables:
        raise BadRequest("a training store needs at least one table")
    for attribute in ("name", "uuid"):
        seen = [getattr(t, attribute) for t in tables]
        if len(set(seen)) < len(seen):
            raise BadRequest(f"two tables of a training store have the same {attribute}; got {seen}")


def is_created(disk: Disk, folder: Path) -> bool:
    return disk.exists(folder / NAME)


def write_identity(disk: Disk, folder: Path, identity: Identity) -> None:
    """Write it whole, under a name of its own, then rename: there is a store once this name is there."""
    tables = [{**t.to_json(), "initial": t.initial.described()} for t in identity.tables]
    described = {"version": VERSION, "uuid": identity.uuid.hex(), "tables": tables}
    text = json.dumps(described, sort_keys=True)
    data = json.dumps({"store": described, "checksum": f"{checksum_of(text.encode()):016x}"}, sort_keys=True)
    fd = disk.open(folder / f"{NAME}.new", create=True)
    try:
        disk.truncate(fd, 0)
        disk.write(fd, np.frombuffer(data.encode(), np.uint8), 0)
        disk.sync(fd)
    finally:
        disk.close(fd)
    disk.rename(folder / f"{NAME}.new", folder / NAME)
    disk.sync_folder(folder)


def load_identity(disk: Disk, folder: Path) -> Identity:
    """Raises FormatError where there is none, or one of a newer version, DataCorrupt where it is damaged."""
    path = folder / NAME
    if not disk.exists(path):
        raise FormatError(f"{folder} holds no training store: it has no {NAME}; create one first")
    fd = disk.open(path)
    try:
        raw = np.zeros(disk.size(fd), np.uint8)
        disk.read(fd, raw, 0)
    finally:
        disk.close(fd)
    try:
        parsed = json.loads(raw.tobytes())
        described, checksum = parsed["store"], parsed["checksum"]
        text = json.dumps(described, sort_keys=True)
    except (ValueError, KeyError, TypeError) as error:
        raise DataCorrupt(f"{path} cannot be read: {error}; restore it from a copy") from error
    if f"{checksum_of(text.encode()):016x}" != checksum:
        raise DataCorrupt(f"{path} fails its checksum; restore it from a copy")
    if described["version"] != VERSION:
        raise FormatError(
            f"{path} has version {described['version']}, this release reads version {VERSION}; install a "
            "newer one"
        )
    tables = [located(folder, TrainedSpec.from_json(table)) for table in described["tables"]]
    return Identity(bytes.fromhex(described["uuid"]), tuple(tables))


def create_store(disk: Disk, folder: Path, tables: Sequence[TrainedSpec], fill: Fill | None = None) -> None:
    """Make a training store in `folder`: empty, or with the pages that `fill` writes.

    What one that was killed meanwhile has left is removed. Raises BadRequest where there is a store,
    StoreLocked where another process is making one, OSError, and what `fill` raises.
    """
    check_tables(tables)
    disk.make_folder(folder)
    owned = disk.lock(folder)
    try:
        _create(disk, folder, tables, fill)
    finally:
        owned.close()


def _create(disk: Disk, folder: Path, tables: Sequence[TrainedSpec], fill: Fill | None) -> None:
    if is_created(disk, folder):
        raise BadRequest(f"{folder} holds a training store already; open it, or choose another folder")
    for name in ("log", "pages", BASES):
        disk.make_folder(folder / name)
        for left in disk.names(folder / name):
            disk.unlink(folder / name / left)
    tables = bring_bases(disk, folder, tables)
    identity = Identity(os.urandom(16), tuple(tables))
    superblock = Superblock(disk, folder, identity.uuid)
    superblock.create()
    pages = [TablePages(disk, folder, table) for table in tables]
    for table in pages:
        table.create()
    Journal(disk, folder, identity.uuid, pages).create()
    if fill:
        _fill(disk, folder, superblock, pages, fill)
    disk.sync_folder(folder)  # the identity says that all of this is here
    write_identity(disk, folder, identity)


def _fill(disk: Disk, folder: Path, superblock: Superblock, pages: list[TablePages], fill: Fill) -> None:
    """As if these pages had come of a fold, before there was any step."""
    try:
        for table in pages:
            table.open()
        fill(pages)
    finally:
        for table in pages:
            table.close()
    size, checksum = EpochsFile(disk, folder).write(FIRST_FOLD, [table.epochs for table in pages])
    superblock.change(folds=FIRST_FOLD, epochs_bytes=size, epochs_sum=checksum)
