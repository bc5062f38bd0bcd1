"""A copy of a step: training goes on from it bit for bit, and only what was trained takes room."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import BadRequest, StorageError
from tests.support.trained import TableModel, random_rows, read_all, tables
from tests.support.trained_steps import CONFIG, all_rows, made_store, train
from tierstore.cli import main
from tierstore.config import Training
from tierstore.snapshots import copy_step, open_step
from tierstore.training.store import TrainingStore
from tierstore.updates import Initial, RowStorage, Snapshot, TrainedSpec, filled
from tierstore.updates.pages import TablePages


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(filled, "LOOK_ROWS", 500)


def everything(store: TrainingStore) -> list[bytes]:
    with store.snapshot() as rows:
        return [all_rows(rows, number).tobytes() for number in range(len(rows.tables))] + [rows.state]


def test_training_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """From an earlier step, taken while its store is in use."""
    store = TrainingStore.open(made_store(tmp_path / "store"), CONFIG)
    with store.snapshot(1) as rows:
        copy_step(rows, tmp_path / "copy")
    store.rollback(1, 30)
    other = TrainingStore.open(tmp_path / "copy", CONFIG)
    try:
        assert other.steps() == [1] and other.step() == 1
        assert everything(other) == everything(store)
        for each in (store, other):
            train(each, range(2, 6))
        assert everything(other) == everything(store)
        other.rollback(1, 30)
        store.rollback(1, 30)
        assert everything(other) == everything(store)
    finally:
        store.close()
        other.close()


@pytest.mark.parametrize("folded", [False, True])
def test_rows_of_any_size_from_log_and_pages(tmp_path: Path, folded: bool) -> None:
    config = Training(keep_steps=1, segment_bytes=256 << 10)
    RowStorage.create(tmp_path / "store" / "training", tables())
    random = np.random.default_rng(5)
    with RowStorage.open(tmp_path / "store" / "training", config, background=False) as storage:
        model = TableModel(storage)
        for step in range(3):
            for table, spec in enumerate(storage.tables):
                ids, rows = random_rows(random, spec, 30)
                storage.spill(table, ids, rows)
                model.write(table, ids, rows)
            storage.commit(step, [], b"state")
            while storage.write_block():
                pass
            if folded and step == 1:
                assert storage.fold()
    assert main(["snapshot", str(tmp_path / "store"), str(tmp_path / "copy"), "--quiet"]) == 0
    with RowStorage.open(tmp_path / "copy" / "training", config) as copy:
        assert (copy.step(), copy.state()) == (2, b"state")
        model.check(copy)
        for step in range(3, 6):  # and it folds, over the pages it began with
            for table, spec in enumerate(copy.tables):
                ids, rows = random_rows(random, spec, 30)
                copy.spill(table, ids, rows)
                model.write(table, ids, rows)
            copy.commit(step, [], b"").wait(30)
        assert copy.fold()
        model.check(copy)
    with RowStorage.open(tmp_path / "copy" / "training", config) as copy:
        model.check(copy)
    assert sorted(os.listdir(tmp_path)) == ["copy", "store"]


def test_rows_that_are_as_they_were_take_no_room(tmp_path: Path) -> None:
    """Of a giant table; a row that was written with what it was initially does not either."""
    spec = TrainedSpec("giant", 3_000_000, tables()[1].layout, Initial("normal", 1.0, 3))
    RowStorage.create(tmp_path / "store" / "training", [spec])
    with RowStorage.open(tmp_path / "store" / "training", Training()) as storage:
        same = np.arange(5000, 9000)
        rows = np.empty((same.size, spec.row_bytes), np.uint8)
        storage.read(0, same, rows)
        storage.spill(0, same, rows)
        ids = np.array([7, spec.rows - 1])
        storage.spill(0, ids, rows[:2])
        storage.commit(4, []).wait(30)
    with open_step(tmp_path / "store") as opened:
        assert isinstance(opened, Snapshot)
        assert opened.touched(0, 0, 9001).tolist() == [7, *same]
        copy_step(opened, tmp_path / "copy")
        with pytest.raises(BadRequest, match="exists already"):
            copy_step(opened, tmp_path / "copy")
    with RowStorage.open(tmp_path / "copy" / "training", Training()) as copy:
        assert np.count_nonzero(copy._opened.pages[0].epochs) == 2
        found = np.empty((2, spec.row_bytes), np.uint8)
        copy.read(0, ids, found)
        assert np.array_equal(found, rows[:2])


def test_a_copy_of_nothing_but_a_step(tmp_path: Path) -> None:
    RowStorage.create(tmp_path / "store" / "training", tables())
    with RowStorage.open(tmp_path / "store" / "training", Training()) as storage:
        before = read_all(storage, 0)
        storage.commit(0, []).wait(30)
    with open_step(tmp_path / "store") as opened:
        copy_step(opened, tmp_path / "copy")
    with RowStorage.open(tmp_path / "copy" / "training", Training()) as copy:
        assert copy.steps() == [0]
        assert np.array_equal(read_all(copy, 0), before)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TablePages, "rewrite", no_space)
    refused = pytest.raises(StorageError, match=r"too little room .*: \d{5,} bytes are wanted, \d+ are free")
    with open_step(made_store(tmp_path / "store")) as opened, refused:
        copy_step(opened, tmp_path / "copy")
    assert os.listdir(tmp_path) == ["store"]
