"""`--consume`: which source files may go, and when.

A file may be removed once every row it holds, of every table of the plan, is forced to disk and
named in a journal. It may be removed at all only where it holds nothing else: other tensors of a
shard would be lost with it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

from engram_client.errors import BadRequest, StorageError
from tierstore.format.sources import uncovered_tensors
from tierstore.packing.plan import PackPlan


class Consumer:
    """Removes source files as their rows become safe; told so from any thread."""

    def __init__(self, plan: PackPlan, safe_rows: dict[str, int], enabled: bool) -> None:
        self._plan = plan
        self._safe_rows = dict(safe_rows)
        self._enabled = enabled
        self._lock = threading.Lock()
        self.removed: list[Path] = []

    def on_safe(self, table: str, rows: int) -> None:
        """The first `rows` rows of `table` are safe: remove what nobody needs any more."""
        if not self._enabled:
            return
        with self._lock:
            self._safe_rows[table] = rows
            for path in finished_files(self._plan, self._safe_rows):
                if path.exists():
                    self._plan.check_unchanged([path])
                    _remove(path)
                    self.removed.append(path)


def last_rows(plan: PackPlan) -> dict[Path, dict[str, int]]:
    """For each source file, how many rows of each table must be safe before it may go."""
    needed: dict[Path, dict[str, int]] = defaultdict(dict)
    for table in plan.tables:
        for extents in table.source.fields:
            for extent in extents:
                end = extent.first_row + extent.rows
                of_file = needed[extent.path]
                of_file[table.source.name] = max(end, of_file.get(table.source.name, 0))
    return dict(needed)


def finished_files(plan: PackPlan, safe_rows: dict[str, int]) -> list[Path]:
    """Source files of which every row is safe."""
    return [
        path
        for path, needed in last_rows(plan).items()
        if all(safe_rows.get(name, 0) >= rows for name, rows in needed.items())
    ]


def check_consumable(plan: PackPlan) -> None:
    """Raise BadRequest where a file holds more than rows of the plan's tables."""
    for file in plan.files:
        if not file.path.exists():
            continue  # an earlier run removed it
        if others := uncovered_tensors(file.path, plan.sources):
            shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
            raise BadRequest(
                f"--consume would remove {file.path}, which also holds {shown}; keep a copy of what "
                "you need of it, then use --consume=force to remove it all the same"
            )


def _remove(path: Path) -> None:
    """Remove a file, and where it is a link, as in model caches, what it points to."""
    target = path.resolve()
    try:
        path.unlink()
        if target != path:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} is packed but cannot be removed: {error.strerror}; let its folder be written, or "
            "run this command again without --consume"
        ) from error
