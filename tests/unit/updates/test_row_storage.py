"""A training store's rows: read back as written, committed, recovered, rolled back; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import BadRequest, FormatError, IdOutOfRange, StoreLocked
from tests.support.trained import TableModel, random_rows, tables
from tierstore.config import Training
from tierstore.updates import RowStorage

CONFIG = Training(keep_steps=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RowStorage.create(tmp_path / "training", tables())
    return tmp_path / "training"


def train(storage: RowStorage, model: TableModel, steps: range, seed: int) -> None:
    """Every step spills to each table and commits more rows."""
    random = np.random.default_rng(seed)
    for step in steps:
        for table, spec in enumerate(storage.tables):
            ids, rows = random_rows(random, spec, 60)
            storage.spill(table, ids, rows)
            model.write(table, ids, rows)
        dirty = [(t, *random_rows(random, spec, 60)) for t, spec in enumerate(storage.tables)]
        for table, ids, rows in dirty:
            model.write(table, ids, rows)
        storage.commit(step, dirty, b"state %d" % step).wait(10)
        model.commit(step)


def test_the_last_committed_step_is_there_after_a_restart(folder: Path) -> None:
    with RowStorage.open(folder, CONFIG) as storage:
        assert storage.step() is None and storage.steps() == [] and storage.state() == b""
        model = TableModel(storage)
        train(storage, model, range(5), seed=1)
        model.check(storage)
        ids, rows = random_rows(np.random.default_rng(2), storage.tables[1], 50)
        storage.spill(1, ids, rows)
        model.write(1, ids, rows)
        model.check(storage)
    model.go_back(4)
    with RowStorage.open(folder, CONFIG) as storage:
        assert storage.step() == 4 and storage.steps() == [2, 3, 4] and storage.state() == b"state 4"
        model.check(storage)


def test_rolling_back_drops_what_came_after(folder: Path) -> None:
    with RowStorage.open(folder, CONFIG) as storage:
        model = TableModel(storage)
        train(storage, model, range(5), seed=3)
        assert storage.rollback(3) == b"state 3"
        model.go_back(3)
        model.check(storage)
        assert storage.steps() == [1, 2, 3]
        train(storage, model, range(4, 6), seed=4)
        model.check(storage)
        with pytest.raises(BadRequest, match=r"step 2 is not kept; .* 3, 4, 5 \(training.keep_steps = 3\)"):
            storage.rollback(2)
    with RowStorage.open(folder, CONFIG) as storage:
        assert storage.steps() == [3, 4, 5]
        model.check(storage)


def test_what_was_spilled_after_the_last_commit_can_be_dropped(folder: Path) -> None:
    with RowStorage.open(folder, CONFIG) as storage:
        model = TableModel(storage)
        train(storage, model, range(2), seed=5)
        storage.spill(0, *random_rows(np.random.default_rng(6), storage.tables[0], 70))
        storage.rollback(1)
        model.check(storage)


def test_what_a_caller_gets_wrong_is_refused(folder: Path) -> None:
    with RowStorage.open(folder, CONFIG) as storage:
        ids, rows = random_rows(np.random.default_rng(7), storage.tables[1], 5)
        storage.commit(7, []).wait(10)
        with pytest.raises(BadRequest, match="commit of step 7: step 7 has been committed already"):
            storage.commit(7, [])
        with pytest.raises(BadRequest, match="a step is a whole number"):
            storage.commit(-1, [])
        with pytest.raises(IdOutOfRange, match=r"narrow: row ids must lie in \[0, 5000\)"):
            storage.spill(1, ids + 5000, rows)
        with pytest.raises(BadRequest, match=r"narrow: rows must be contiguous uint8 \(5, 22\)"):
            storage.spill(1, ids, rows[:, :-1])
        with pytest.raises(BadRequest, match="row ids must be contiguous int64"):
            storage.spill(1, ids.astype(np.int32), rows)
        with pytest.raises(BadRequest, match="the store has 3 tables"):
            storage.spill(3, ids, rows)


def test_a_store_has_one_owner(folder: Path) -> None:
    with (
        RowStorage.open(folder, CONFIG),
        pytest.raises(StoreLocked, match=r"open in another process \(pid \d+: .*\); one process trains"),
    ):
        RowStorage.open(folder, CONFIG)


def test_a_store_is_made_once_and_found_where_it_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="holds a training store already"):
        RowStorage.create(folder, tables())
    with pytest.raises(FormatError, match="holds no training store"):
        RowStorage.open(tmp_path, CONFIG)
    with pytest.raises(BadRequest, match="two tables of a training store have the same name"):
        RowStorage.create(tmp_path / "other", [tables()[0], tables()[0]])
