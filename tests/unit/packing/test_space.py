"""How much room a pack needs at its worst moment, with and without consumption."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engram_client.errors import StorageError
from tests.table_sources import plain_checkpoint
from tierstore.format.sources import open_checkpoint
from tierstore.format.writer import RowFileJob
from tierstore.packing.consume import finished_files, last_rows
from tierstore.packing.plan import PackOptions, PackPlan
from tierstore.packing.space import check_space, peak_bytes

ROWS = (4000, 4000, 4000)


@pytest.fixture
def plan(tmp_path: Path) -> PackPlan:
    layout, _ = plain_checkpoint(tmp_path, ROWS, names=("a", "b"))
    sources = open_checkpoint(tmp_path, layout_file=layout)
    return PackPlan.make(tmp_path, PackOptions(), sources)


@pytest.fixture
def jobs(plan: PackPlan, tmp_path: Path) -> dict[str, RowFileJob]:
    return {t.source.name: RowFileJob.plan(t.source, t.spec, tmp_path, leaf_pages=1) for t in plan.tables}


def test_without_consumption_every_row_file_is_needed(plan: PackPlan, jobs: dict[str, RowFileJob]) -> None:
    assert peak_bytes(plan, jobs, {}, {}) == sum(j.header.geometry.file_bytes for j in jobs.values())


def test_what_is_safe_already_needs_no_room(plan: PackPlan, jobs: dict[str, RowFileJob]) -> None:
    assert peak_bytes(plan, jobs, {"a": 12_000, "b": 12_000}, {}) == 0
    half = peak_bytes(plan, jobs, {"a": 12_000, "b": 6000}, {})
    assert half == pytest.approx(jobs["b"].header.geometry.file_bytes / 2, rel=0.01)


def test_consumption_needs_room_for_about_one_shard(plan: PackPlan, jobs: dict[str, RowFileJob]) -> None:
    freed = {file.path: file.size_bytes for file in plan.files}
    lag = jobs["a"].sync_bytes + 4096
    shard = jobs["a"].header.geometry.file_bytes / 3
    needed = peak_bytes(plan, jobs, {}, freed) - lag
    assert shard <= needed < 1.4 * shard  # a row file's pages take a little more than the rows


def test_a_file_is_finished_when_every_table_in_it_is_safe(plan: PackPlan) -> None:
    files = [file.path for file in plan.files]
    assert [last_rows(plan)[f] for f in files[:3]] == [{"a": 4000}, {"a": 8000}, {"a": 12_000}]
    assert finished_files(plan, {"a": 7999}) == files[:1]
    assert finished_files(plan, {"a": 8000, "b": 4000}) == [files[0], files[1], files[3]]
    assert finished_files(plan, {"a": 12_000, "b": 12_000}) == files


def test_a_plan_is_read_back_as_it_was_saved(plan: PackPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert PackPlan.load(tmp_path / "plan.json") == plan
    assert PackPlan.load(tmp_path / "none.json") is None


def test_consumption_is_advised_only_where_it_would_free_room(
    plan: PackPlan, jobs: dict[str, RowFileJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="12345 are free; make room, or use --consume"):
        check_space(tmp_path, plan, jobs, {}, consume=False)
    for file in plan.files:  # another name keeps the bytes, as another disk would
        file.path.with_suffix(".link").hardlink_to(file.path)
    with pytest.raises(StorageError, match=r"12345 are free; make room$"):
        check_space(tmp_path, plan, jobs, {}, consume=False)
