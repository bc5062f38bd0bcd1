"""Processes that publish a step, or copy it, and are killed half-way.

The training store must be as it was. What is served must be, whole and of one step for all tables, what was
served before or the step that was being published; a copy is there whole or not at all; and who publishes or
copies next must be able to, and clear away what was left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tierstore.catalog import Catalog, CatalogEntry
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.verify import verify
from tierstore.snapshots import copy_step, open_step, publish_step
from tierstore.testing.crashes.simulated import WrongAfterCrash

Tell = Callable[[str], None]
ExpectedAt = Callable[[int], list[np.ndarray]]


def publish(base: Path, tell: Tell) -> None:
    """A child's life: publish the last step of base/training in base/served."""
    with open_step(base) as rows:
        tell("opened")
        publish_step(rows, base / "served")
    tell("done")


def copy(base: Path, tell: Tell) -> None:
    """Another one's: copy it to base/copy."""
    with open_step(base) as rows:
        tell("opened")
        copy_step(rows, base / "copy")
    tell("done")


class Served:
    """What base/served holds, known without the store's code but for headers and checksums."""

    def __init__(self, base: Path) -> None:
        self._folder = base / "served"
        self.step: int | None = None  # None: nothing is served

    def check(self, published: int, done: bool, expected_at: ExpectedAt) -> None:
        """After somebody began to publish step `published`; `done`: was told that it is there."""
        entries = self._current()
        allowed = [published] if done else [self.step, published]
        for step in allowed:
            if self._is(entries, step, expected_at):
                self.step = step
                return
        raise WrongAfterCrash(f"what is served is no step of {allowed}, whole and the same for all tables")

    def check_clean(self) -> None:
        """Nothing but generations lies there once a publication has ended."""
        with Catalog.open(self._folder) as catalog:
            known = {e.path for e in (*catalog.tables().values(), *catalog.retired)}
        found = {path for part in ("tables", "packing") for path in (self._folder / part).rglob("*")}
        if strangers := sorted(str(path) for path in found - known if path.is_file()):
            raise WrongAfterCrash(f"left by a publication that was killed: {', '.join(strangers)}")

    def forget_retired(self) -> None:
        """So that a long run does not fill the disk."""
        with Catalog.open(self._folder) as catalog:
            for entry in catalog.retired:
                entry.path.unlink()
                catalog.forget(entry)

    def _current(self) -> list[CatalogEntry]:
        if not (self._folder / "catalog" / "data.mdb").exists():
            return []
        with Catalog.open(self._folder) as catalog:
            return [entry for _, entry in sorted(catalog.tables().items())]

    def _is(self, entries: list[CatalogEntry], step: int | None, expected_at: ExpectedAt) -> bool:
        if step is None or not entries:
            return step is None and not entries
        tables = expected_at(step)
        return len(entries) == len(tables) and all(
            np.array_equal(_rows_of(entry.path), rows) for entry, rows in zip(entries, tables, strict=True)
        )


def _rows_of(path: Path) -> np.ndarray:
    """uint8 [rows, row_bytes] of a whole row file."""
    report = verify(path, lambda done, total: None)
    if not report.whole:
        raise WrongAfterCrash(f"{path} is damaged, and served")
    g = report.row_file.geometry
    pages = np.fromfile(path, np.uint8).reshape(-1, PAGE_BYTES)[g.first_page :]
    rows = pages[:, : g.rows_per_page * g.row_bytes].reshape(-1, g.row_bytes)
    return rows[: g.rows]


def remove_copy(base: Path) -> None:
    shutil.rmtree(base / "copy", ignore_errors=True)
