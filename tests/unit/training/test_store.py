"""A training store and what can go wrong with it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    FormatError,
    GenerationMismatch,
    IdOutOfRange,
    NotFiniteGradient,
    StepConflict,
    StorageError,
    StoreLocked,
    UnknownTable,
)
from engram_client.transport.training import UpdateRequest
from tests.support.training import (
    DIM,
    TINY,
    failing,
    make_store,
    open_store,
    push_of,
    trained_spec,
    weights,
)
from tierstore.config import Training
from tierstore.tiers.trained import Replaced, TrainedArena
from tierstore.training.store import TrainingStore

ROWS = 3000  # more than two pieces of an update
EVERYTHING = np.arange(ROWS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrainingStore]:
    made = make_store(tmp_path, [trained_spec(rows=ROWS)], TINY)
    yield made
    made.close()


def ones(count: int) -> np.ndarray:
    return np.ones((count, DIM), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"gradients": np.ones((2, DIM + 1), np.float32)}, BadRequest, r"shape \[2, 6\], got \[2, 7\]"),
        ({"gradients": np.ones((3, DIM), np.float32)}, BadRequest, r"2 row ids need"),
        ({"gradients": np.ones((2, DIM))}, BadRequest, "float32, bfloat16 or float16, got float64"),
        ({"ids": np.array([0, ROWS])}, IdOutOfRange, "row id 3000"),
        ({"ids": np.array([[0, 1]])}, BadRequest, "int64"),
        ({"generation": "00" * 16}, GenerationMismatch, "00000"),
        ({"step": -1}, BadRequest, "steps are counted from 0"),
        ({"learning_rate": float("nan")}, BadRequest, "learning rate"),
        ({"learning_rate": None}, BadRequest, "no learning rate"),
        ({"weight_decay": -1.0}, BadRequest, "weight decay"),
        ({"world": 2}, BadRequest, "training.world"),
        ({"rank": 1}, BadRequest, "rank 1 of 1"),
        ({"part": 2, "parts": 2}, BadRequest, "part 2"),
        ({"table": "other"}, UnknownTable, "table"),
    ],
)
def test_a_wrong_update_is_refused_and_changes_nothing(store, change, error, told) -> None:
    before = weights(store, EVERYTHING)
    request = push_of(store, 0, [0, 1], ones(2))
    with pytest.raises(error, match=told):
        store.update(UpdateRequest(**{**request.__dict__, **change}))
    np.testing.assert_array_equal(weights(store, EVERYTHING), before)
    store.update(request)  # nothing of it stays


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_are_refused_whole(store, value: float) -> None:
    before = weights(store, EVERYTHING)
    gradients = ones(300)
    gradients[250, 3] = value
    with pytest.raises(NotFiniteGradient, match="row 250"):
        store.update(push_of(store, 0, np.arange(300), gradients))
    np.testing.assert_array_equal(weights(store, EVERYTHING), before)
    assert store.stats()["training_rows_not_finite"] == 1


def test_gradients_that_are_not_finite_are_skipped_where_that_is_wanted(tmp_path: Path) -> None:
    store = make_store(tmp_path, [trained_spec(rows=ROWS)], not_finite="skip")
    before = weights(store, EVERYTHING)
    gradients = ones(4)
    gradients[1, 0], gradients[3, 0] = np.inf, -np.inf
    store.update(push_of(store, 0, [5, 6, 7, 6], gradients))  # inf - inf
    after = weights(store, EVERYTHING)
    assert np.flatnonzero((after != before).any(1)).tolist() == [5, 7]
    assert store.stats()["training_rows_not_finite"] == 1
    store.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_gradients_are_taken_as_they_are(store, dtype: str) -> None:
    values = np.array([[1.5, -0.25, 3.0, 0.0, -2.0, 0.125]], np.float32)  # exact in both
    short = (
        (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(np.float16)
    )
    before = weights(store, [9])
    store.update(push_of(store, 0, [9], short))
    np.testing.assert_array_equal(weights(store, [9]), before - values)


def test_steps_only_rise(store) -> None:
    store.update(push_of(store, 5, [1], ones(1)))
    with pytest.raises(StepConflict, match="step 4 after one of step 5"):
        store.update(push_of(store, 4, [1], ones(1)))
    with pytest.raises(StepConflict, match="hold updates of step 5"):
        store.commit(4)
    store.commit(5).wait(30)
    with pytest.raises(StepConflict, match="step 5 is committed"):
        store.update(push_of(store, 5, [1], ones(1)))
    store.commit(5).wait(30)  # the same commit
    store.update(push_of(store, 6, [1], ones(1)))
    with pytest.raises(StepConflict, match="step 5 is committed"):
        store.commit(5)
    with pytest.raises(BadRequest, match="step 3 is not kept"):
        store.rollback(3)
    assert store.steps() == [5]
    store.wait_durable(5)
    with pytest.raises(StepConflict, match="step 6 was not committed"):
        store.wait_durable(6)


def test_a_push_is_applied_once(store) -> None:
    before = weights(store, [3])
    request = push_of(store, 0, [3], ones(1))
    store.update(request)
    store.update(request)
    np.testing.assert_array_equal(weights(store, [3]), before - 1)
    store.update(push_of(store, 0, [3], ones(1)))  # another one of the same step
    np.testing.assert_array_equal(weights(store, [3]), before - 1 - 1)
    assert store.stats()["training_pushes_repeated"] == 1


def test_a_push_in_parts_is_applied_once_all_are_there(store) -> None:
    before = weights(store, [3, 4])
    first = push_of(store, 0, [3], ones(1), push=77, part=0, parts=2)
    second = push_of(store, 0, [3, 4], ones(2), push=77, part=1, parts=2)
    store.update(second)
    store.update(second)
    np.testing.assert_array_equal(weights(store, [3, 4]), before)
    store.update(first)
    np.testing.assert_array_equal(weights(store, [3, 4]), before - np.array([[2], [1]], np.float32))
    assert store.stats()["training_updates"] == 1


@pytest.mark.parametrize("method", ["read", "spill"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_update_that_failed_goes_on_where_it_stopped(store, method: str, after: int) -> None:
    before = weights(store, EVERYTHING)
    request = push_of(store, 0, EVERYTHING, ones(ROWS))
    failing(store).fail(method, StorageError("the disk is full"), after=after)
    with pytest.raises(StorageError, match="disk is full"):
        store.update(request)
    for broken in (lambda: store.update(push_of(store, 0, [1], ones(1))), lambda: store.commit(0)):
        if (weights(store, EVERYTHING) != before).any():
            with pytest.raises(StepConflict, match="failed half way; repeat it"):
                broken()
    store.update(request)
    np.testing.assert_array_equal(weights(store, EVERYTHING), before - 1)
    store.update(request)
    store.commit(0).wait(30)
    np.testing.assert_array_equal(weights(store, EVERYTHING), before - 1)


def test_a_rollback_gives_a_failed_update_up(store) -> None:
    store.commit(0).wait(30)
    before = weights(store, EVERYTHING)
    failing(store).fail("spill", DeadlineExceeded("the queue is full"), after=2)
    with pytest.raises(DeadlineExceeded, match="queue is full"):
        store.update(push_of(store, 1, EVERYTHING, ones(ROWS)))
    store.rollback(0)
    np.testing.assert_array_equal(weights(store, EVERYTHING), before)
    store.update(push_of(store, 1, EVERYTHING, ones(ROWS)))
    np.testing.assert_array_equal(weights(store, EVERYTHING), before - 1)


def test_after_an_exception_from_outside_only_a_rollback_helps(store) -> None:
    store.commit(0).wait(30)
    failing(store).fail("spill", KeyboardInterrupt())
    request = push_of(store, 1, EVERYTHING, ones(ROWS))
    with pytest.raises(KeyboardInterrupt):
        store.update(request)
    for refused in (lambda: store.update(request), lambda: store.commit(1)):
        with pytest.raises(StepConflict, match="broken off in the middle"):
            refused()
    store.rollback(0)
    store.update(push_of(store, 1, EVERYTHING, ones(ROWS)))


def test_a_commit_that_failed_is_tried_again(store) -> None:
    before = weights(store, EVERYTHING)
    store.update(push_of(store, 0, np.arange(50), ones(50)))
    storage = failing(store)
    for method in ("spill", "commit"):
        storage.fail(method, StorageError("the disk is full"))
        with pytest.raises(StorageError, match="disk is full"):
            store.commit(0)
    store.commit(0).wait(30)
    store.close()
    again = open_store(store.directory)
    np.testing.assert_array_equal(weights(again, np.arange(50)), before[:50] - 1)
    assert again.step() == 0
    again.close()


def test_who_waits_for_his_turn_has_a_deadline(store) -> None:
    with store._turn.taken(store_deadline(), "a test"):
        with pytest.raises(DeadlineExceeded, match="before it is not done"):
            store.update(push_of(store, 0, [1], ones(1)), 0.01)
        weights(store, EVERYTHING)  # a look-up waits for nobody
    assert store.stats()["training_waits_us"] > 0


def store_deadline():
    from engram_client.deadline import Deadline

    return Deadline.after(5)


def test_an_update_that_a_rollback_overtakes_is_refused(store) -> None:
    store.commit(0).wait(30)
    before = weights(store, EVERYTHING)
    request = push_of(store, 1, [1], ones(1))
    contribution = store.offer(request)  # it passed every check, and waits for its turn
    store.rollback(0)
    with pytest.raises(GenerationMismatch, match="rolled back"):
        store.apply(contribution.ready.result(0), store_deadline())
    np.testing.assert_array_equal(weights(store, EVERYTHING), before)


def test_a_directory_has_one_owner(store) -> None:
    with pytest.raises(StoreLocked, match="pid"):
        open_store(store.directory)


def test_there_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        open_store(tmp_path)


def test_a_budget_without_room_for_one_set_is_refused(tmp_path: Path) -> None:
    TrainingStore.create(tmp_path, [trained_spec()])
    with pytest.raises(ConfigError, match=r"training\.dram_bytes"):
        TrainingStore.open(tmp_path, Training(dram_bytes=4096))


def test_masked_rows_are_zeros(store) -> None:
    rows = weights(store, [-1, 2, -1])
    assert not rows[[0, 2]].any()
    assert rows[1].any()


def test_a_budget_that_changes_loses_no_row(store) -> None:
    """Grown it holds what it held, shrunk what fits; all of it right, at every size and when opened again."""
    expected, capacity = weights(store, EVERYTHING), store.stats()["training_capacity_rows"]
    for step, budget in enumerate([1 << 20, 64 << 10, TINY, 1 << 20]):
        store.update(push_of(store, step, EVERYTHING, ones(ROWS)))
        expected -= 1
        misses = store.stats()["training_read_misses"]
        store.set_dram_budget(budget, 30)
        stats = store.stats()
        assert stats["training_dirty_rows"] == 0 and stats["training_dram_bytes"] == budget
        assert sum(arena.region.geometry.total_bytes for arena in store.arenas()) <= budget
        np.testing.assert_array_equal(weights(store, EVERYTHING), expected)
        found = ROWS - (store.stats()["training_read_misses"] - misses)
        assert found >= min(capacity, stats["training_capacity_rows"], ROWS) // 2  # sets fill unevenly
        capacity = stats["training_capacity_rows"]
    store.commit(3).wait(30)
    store.close()
    again = open_store(store.directory)
    np.testing.assert_array_equal(weights(again, EVERYTHING), expected)
    again.close()


def test_rows_that_are_trained_before_they_move_stay_as_they_are(
    store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updated, written back and dropped again while what they were still lies in the old memory."""
    store.set_dram_budget(1 << 20)
    expected = weights(store, EVERYTHING) - 1
    move_from = TrainedArena.move_from

    def late(arena: TrainedArena, replaced: Replaced) -> int:
        store.update(push_of(store, 0, EVERYTHING, ones(ROWS)))
        store.commit(0).wait(30)
        np.testing.assert_array_equal(weights(store, EVERYTHING), expected)
        return move_from(arena, replaced)

    monkeypatch.setattr(TrainedArena, "move_from", late)
    store.set_dram_budget(TINY)
    assert store.stats()["training_rows_evicted"] > 0
    np.testing.assert_array_equal(weights(store, EVERYTHING), expected)


def test_a_budget_that_cannot_change_stays(store) -> None:
    before = weights(store, EVERYTHING)
    with pytest.raises(ConfigError, match=r"training\.dram_bytes: expected at least \d+ bytes .* got 100"):
        store.set_dram_budget(100)
    request = push_of(store, 0, EVERYTHING, ones(ROWS))
    storage = failing(store)
    storage.fail("spill", StorageError("the disk is full"), after=2)
    with pytest.raises(StorageError, match="disk is full"):
        store.update(request)
    storage.fail("spill", DeadlineExceeded("the queue is full"))
    with pytest.raises(DeadlineExceeded, match="queue is full"):
        store.set_dram_budget(1 << 20, 30)
    assert store.stats()["training_dram_bytes"] == TINY
    refused = pytest.raises(DeadlineExceeded, match="changing the DRAM budget")
    with store._turn.taken(store_deadline(), "a test"), refused:
        store.set_dram_budget(1 << 20, 0.01)
    store.set_dram_budget(48 << 10, 30)  # half an update waits for its rest, which does not mind
    store.update(request)
    np.testing.assert_array_equal(weights(store, EVERYTHING), before - 1)
    store.commit(0).wait(30)


def test_readers_see_rows_whole_and_never_go_back(tmp_path: Path) -> None:
    """All elements of a row rise together; while some rows are in DRAM, others in the log, others on the
    way, and all of them move from one arena to the next."""
    rows, everything = 400, np.arange(400)
    spec = trained_spec(rows=rows)
    store = make_store(tmp_path, [spec], TINY)
    first = weights(store, everything)
    done = threading.Event()
    finished = np.zeros(rows, np.int64)  # updates of each row that have returned
    problems: list[str] = []

    def look(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set() and not problems:
            ids = rng.integers(0, rows, 80)
            least = finished[ids].copy()
            read = np.rint((first[ids] - weights(store, ids)) * 1024)
            if (read != read[:, :1]).any():
                problems.append(f"seed {seed}: a torn row: {read[(read != read[:, :1]).any(1)][0]}")
            if (read[:, 0] < least).any():
                problems.append(f"seed {seed}: a row older than an update that had returned")

    def resize() -> None:
        budgets = itertools.cycle([3 * TINY, TINY, 64 << 10, 2 * TINY])
        while not done.is_set():
            store.set_dram_budget(next(budgets), 30)

    readers = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    readers.append(threading.Thread(target=resize))
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(99)
    try:
        for step in range(300):
            ids = rng.permutation(rows)[:60]
            store.update(push_of(store, step, ids, ones(60), learning_rate=1 / 1024), 30)
            finished[ids] += 1
            if step % 50 == 49:
                store.commit(step).wait(30)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not problems, problems[0]
    stats = store.stats()
    assert stats["training_rows_evicted"] > 0 and stats["training_rows_moved"] > 0
    store.close()
