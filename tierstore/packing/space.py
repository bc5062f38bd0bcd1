"""Whether a pack can end: the bytes it needs against the bytes that are free or will be."""

from __future__ import annotations

import shutil
from pathlib import Path

from engram_client.errors import StorageError
from tierstore.format.writer import RowFileJob
from tierstore.packing.consume import last_rows
from tierstore.packing.plan import PackPlan

MARGIN_BYTES = 16 * 2**20  # catalog, journals, the file system's own


def check_space(
    folder: Path, plan: PackPlan, jobs: dict[str, RowFileJob], safe_rows: dict[str, int], consume: bool
) -> None:
    """Raise StorageError where `folder` has too little room for what is left of the plan.

    With `consume`, source files on the same file system count from the moment they can go.
    """
    free_bytes = shutil.disk_usage(folder).free
    freed = _freed_here(folder, plan)
    needed_bytes = peak_bytes(plan, jobs, safe_rows, freed if consume else {})
    if needed_bytes + MARGIN_BYTES > free_bytes:
        hint = (
            ""
            if consume or not freed
            else ", or use --consume to remove source files as their rows become safe"
        )
        raise StorageError(
            f"{folder}: the disk has too little room: {needed_bytes + MARGIN_BYTES} bytes are needed, "
            f"{free_bytes} are free; make room{hint}"
        )


def peak_bytes(
    plan: PackPlan, jobs: dict[str, RowFileJob], safe_rows: dict[str, int], freed: dict[Path, int]
) -> int:
    """The most bytes that are ever taken beyond those taken now, over the rest of the plan.

    `freed` says how many bytes each file gives back once its rows are safe; files that are not
    in it give nothing.
    """
    order = {table.source.name: i for i, table in enumerate(plan.tables)}
    goes_after = sorted(
        (max((order[name], rows) for name, rows in needed.items()), freed[path])
        for path, needed in last_rows(plan).items()
        if path in freed
    )
    lag_bytes = max((job.sync_bytes + job.header.leaf_pages * 4096 for job in jobs.values()), default=0)
    taken = peak = 0
    for (table, rows), file_bytes in goes_after:
        peak = max(peak, _written(plan, jobs, safe_rows, table, rows) + lag_bytes + taken)
        taken -= file_bytes
    last = plan.tables[-1].source
    return max(peak, _written(plan, jobs, safe_rows, len(plan.tables) - 1, last.rows) + taken)


def _written(
    plan: PackPlan, jobs: dict[str, RowFileJob], safe_rows: dict[str, int], upto: int, rows: int
) -> int:
    """Bytes written from now until `rows` rows of table number `upto` are packed."""
    total = 0
    for i, table in enumerate(plan.tables[: upto + 1]):
        source = table.source
        share = (rows if i == upto else source.rows) - safe_rows.get(source.name, 0)
        if source.name in jobs and share > 0:
            total += share * jobs[source.name].header.geometry.file_bytes // source.rows
    return total


def _freed_here(folder: Path, plan: PackPlan) -> dict[Path, int]:
    device = folder.stat().st_dev
    return {
        file.path: file.size_bytes
        for file in plan.files
        if file.path.exists() and file.path.stat().st_dev == device and file.path.stat().st_nlink == 1
    }
