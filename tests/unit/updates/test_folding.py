"""Folding the log into pages: rows stay, the log shrinks, snapshots keep their step, damage is told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import BadRequest, DataCorrupt, FormatError, Overloaded
from tests.support.trained import TableModel, random_rows, tables
from tierstore.config import Training
from tierstore.format.rowfile import RowFile
from tierstore.testing.crashing_disk import CrashingDisk
from tierstore.updates import RowStorage

CONFIG = Training(keep_steps=2, segment_bytes=256 << 10, fold_batch_bytes=64 << 10, log_bytes_max=1 << 30)

IN_MEMORY = Path("store/training")


@pytest.fixture
def disk() -> CrashingDisk:
    """In memory: what these tests ask about is not the real disk, whose syncs take their time."""
    disk = CrashingDisk()
    disk.make_folder(IN_MEMORY)
    RowStorage.create(IN_MEMORY, tables(), disk=disk)
    return disk


def opened(disk: CrashingDisk) -> RowStorage:
    return RowStorage.open(IN_MEMORY, CONFIG, disk=disk, background=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RowStorage.create(tmp_path / "training", tables())
    return tmp_path / "training"


def train(storage: RowStorage, model: TableModel, steps: range) -> None:
    random = np.random.default_rng(steps.start)
    for step in steps:
        for table, spec in enumerate(storage.tables):
            ids, rows = random_rows(random, spec, 200)
            storage.spill(table, ids, rows)
            model.write(table, ids, rows)
        storage.commit(step, [], b"state %d" % step).wait(10)
        model.commit(step)


def test_folded_rows_are_read_from_pages_and_the_log_shrinks(disk: CrashingDisk) -> None:
    with opened(disk) as storage:
        model = TableModel(storage)
        for start in (0, 8, 16):
            train(storage, model, range(start, start + 8))
            before = storage.counters()["log_bytes"]
            assert storage.fold() and not storage.fold()
            assert storage.counters()["log_bytes"] < before / 3
            assert storage.steps() == [start + 6, start + 7]
            model.check(storage)
        assert len(disk.names(IN_MEMORY / "log")) <= 4  # one was made ahead
        assert storage.counters()["folds"] == 3
    with opened(disk) as storage:
        model.check(storage)
        storage.rollback(22)
        model.go_back(22)
        model.check(storage)
        assert storage.state() == b"state 22"


def test_a_snapshot_keeps_its_step_while_training_and_folding_go_on(disk: CrashingDisk) -> None:
    with opened(disk) as storage:
        model, then = TableModel(storage), TableModel(storage)
        train(storage, model, range(6))
        storage.fold()
        then.now, snapshot = [dict(t) for t in model.committed[4]], storage.snapshot(4)
        train(storage, model, range(6, 12))
        storage.fold()
        for table, spec in enumerate(storage.tables):
            out = np.zeros((spec.rows, spec.row_bytes), np.uint8)
            snapshot.read(table, np.arange(spec.rows), out)
            assert (out == then.rows(table)).all()
        assert snapshot.step == 4 and snapshot.state == b"state 4"
        snapshot.close()
        assert storage.fold()  # which the snapshot had kept from going further
        model.check(storage)
        with pytest.raises(BadRequest, match="step 4 is not kept"):
            storage.snapshot(4)


def test_folding_makes_room_by_itself_and_updates_wait_for_it(folder: Path) -> None:
    config = Training(keep_steps=1, segment_bytes=256 << 10, log_bytes_max=1 << 20, fold_bytes=1 << 20)
    with RowStorage.open(folder, config) as storage:
        model = TableModel(storage)
        train(storage, model, range(8))
        assert storage.counters()["log_bytes"] <= 1 << 20
        assert storage.counters()["folds"] > 0
        model.check(storage)


def test_a_log_that_cannot_be_folded_is_told(folder: Path) -> None:
    config = Training(keep_steps=1, segment_bytes=256 << 10, log_bytes_max=1 << 20)
    with RowStorage.open(folder, config) as storage:
        random = np.random.default_rng(0)

        def fill() -> None:
            for _ in range(20):
                storage.spill(0, *random_rows(random, storage.tables[0], 900))

        with pytest.raises(
            Overloaded, match=r"cannot be folded, nothing is kept: expected at most training\.log"
        ):
            fill()
        storage.commit(1, []).wait(10)  # a commit may pass
        storage.commit(2, []).wait(10)
        storage.spill(0, *random_rows(random, storage.tables[0], 900))


def test_a_damaged_or_stale_page_is_an_error_that_names_its_rows(folder: Path) -> None:
    spec = tables()[1]
    with RowStorage.open(folder, CONFIG) as storage:
        for step in range(3):
            storage.spill(1, *random_rows(np.random.default_rng(step), spec, spec.rows))
            storage.commit(step, []).wait(10)
            if step == 1:
                storage.fold()
                old = (folder / "pages" / "narrow.rows").read_bytes()
        storage.commit(3, []).wait(10)
        storage.fold()
    path, first_page = folder / "pages" / "narrow.rows", os.path.getsize(folder / "pages" / "narrow.rows")
    page = first_page // 4096 - 2
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(old[page * 4096 :][:4096])  # whole, but of the fold before
        file.seek((page + 1) * 4096 + 7)
        file.write(b"\xff\xff")
    with RowStorage.open(folder, CONFIG) as storage:
        out = np.zeros((1, spec.row_bytes), np.uint8)
        storage.read(1, np.array([0]), out)
        for row in (spec.rows - 1, spec.rows - 100):
            with pytest.raises(DataCorrupt, match=r"page \d+ of .*narrow.rows .table 'narrow', rows \d+ to"):
                storage.read(1, np.array([row]), out)


def test_the_page_file_is_no_row_file_that_one_can_serve(folder: Path) -> None:
    with pytest.raises(FormatError, match="belongs to a table that is being trained"):
        RowFile.open(folder / "pages" / "wide.rows")
