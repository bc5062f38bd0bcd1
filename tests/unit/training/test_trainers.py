"""Several trainers of one table: in step, or within bounds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client.errors import (
    BadRequest,
    DeadlineExceeded,
    GenerationMismatch,
    NotFiniteGradient,
    Overloaded,
    StepConflict,
    StorageError,
)
from engram_client.transport.training import UpdateRequest
from tests.support.training import DIM, failing, make_store, push_of, trained_spec, weights
from tierstore.training.store import TrainingStore

WORLD, ROWS = 3, 400
EVERYTHING = np.arange(ROWS)
SOON = 0.01  # a deadline that is meant to pass
LONG = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrainingStore]:
    made = make_store(tmp_path, [trained_spec(rows=ROWS)], world=WORLD)
    yield made
    made.close()


@pytest.fixture
def loose(tmp_path: Path) -> Iterator[TrainingStore]:
    """Ranks may be two steps ahead."""
    made = make_store(tmp_path, [trained_spec(rows=ROWS)], world=WORLD, ahead_steps_max=2)
    yield made
    made.close()


def contribution(store: TrainingStore, rank: int, step: int, **rest: Any) -> UpdateRequest:
    rng = np.random.default_rng([rank, step])
    ids = rng.integers(0, ROWS, 70)
    gradients = rng.standard_normal((70, DIM)).astype(np.float32)
    return push_of(
        store, step, ids, gradients, **{"rank": rank, "world": WORLD, "learning_rate": 0.1, **rest}
    )


def start(store: TrainingStore, request: UpdateRequest, timeout_s: float = LONG) -> Future[None]:
    """An update in a thread of its own, which has been offered when this returns."""
    future: Future[None] = Future()
    offered = threading.Event()
    deadline_of = store.offer

    def offer(request: UpdateRequest) -> Any:
        try:
            return deadline_of(request)
        finally:
            offered.set()

    def run() -> None:
        try:
            store.offer = offer  # type: ignore[method-assign]
            store.update(request, timeout_s)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    assert offered.wait(LONG)
    store.offer = deadline_of  # type: ignore[method-assign]
    return future


def expected_of_one_trainer(tmp_path: Path, steps: range) -> np.ndarray:
    alone = make_store(tmp_path / "alone", [trained_spec(rows=ROWS)])
    for step in steps:
        parts = [contribution(alone, rank, step) for rank in range(WORLD)]
        ids = np.concatenate([p.ids for p in parts])
        gradients = np.concatenate([p.gradients for p in parts])
        alone.update(push_of(alone, step, ids, gradients, learning_rate=0.1))
    rows = weights(alone, EVERYTHING)
    alone.close()
    return rows


def test_ranks_together_are_one_trainer_whoever_comes_first(store, tmp_path: Path) -> None:
    for step, order in enumerate(itertools.permutations(range(WORLD))):
        pending = [start(store, contribution(store, rank, step)) for rank in order]
        for future in pending:
            future.result(LONG)
    np.testing.assert_array_equal(weights(store, EVERYTHING), expected_of_one_trainer(tmp_path, range(6)))
    assert store.stats()["training_updates"] == 6


def test_a_missing_rank_is_named_and_nothing_is_applied(store) -> None:
    before = weights(store, EVERYTHING)
    request = contribution(store, 0, 0)
    with pytest.raises(DeadlineExceeded, match=r"step 0: no contribution from ranks 1, 2 in time"):
        store.update(request, SOON)
    other = start(store, contribution(store, 2, 0))
    with pytest.raises(DeadlineExceeded, match=r"from rank 1 in time"):
        store.update(request, SOON)
    np.testing.assert_array_equal(weights(store, EVERYTHING), before)
    again = start(store, request)
    store.update(contribution(store, 1, 0), LONG)
    again.result(LONG)
    other.result(LONG)
    assert (weights(store, EVERYTHING) != before).any()


def test_a_repeated_push_counts_once(store, tmp_path: Path) -> None:
    requests = [contribution(store, rank, 0) for rank in range(WORLD)]
    first = start(store, requests[0])
    same = start(store, requests[0])  # its answer was thought lost
    with pytest.raises(StepConflict, match="while its push of step 0 is not applied yet"):
        store.update(contribution(store, 0, 0))
    second = start(store, requests[1])
    store.update(requests[2], LONG)
    for future in (first, same, second):
        future.result(LONG)
    store.update(requests[0])  # it was applied
    with pytest.raises(StepConflict, match="contributes once to a step"):
        store.update(contribution(store, 0, 0))
    np.testing.assert_array_equal(weights(store, EVERYTHING), expected_of_one_trainer(tmp_path, range(1)))


def test_ranks_that_disagree_are_told(store) -> None:
    waiting = start(store, contribution(store, 0, 0))
    with pytest.raises(StepConflict, match="rank 1 pushes step 1 while rank 0 waits at step 0"):
        store.update(contribution(store, 1, 1))
    other = start(store, contribution(store, 1, 0, learning_rate=0.2))
    with pytest.raises(StepConflict, match=r"rank 0 gives learning rate 0\.1.* rank 1 gives 0\.2"):
        store.update(contribution(store, 2, 0), LONG)
    for future in (waiting, other):
        with pytest.raises(StepConflict, match="all ranks must give the same"):
            future.result(LONG)
    with pytest.raises(BadRequest, match="rank 0 of 2"):
        store.update(contribution(store, 0, 0, world=2))


@pytest.mark.parametrize("error", [NotFiniteGradient, StorageError])
def test_what_fails_fails_for_all_and_can_be_repeated(store, tmp_path: Path, error: type) -> None:
    requests = [contribution(store, rank, 0) for rank in range(WORLD)]
    if error is StorageError:
        failing(store).fail("read", StorageError("the disk is gone"))
    else:
        requests[1].gradients[5, 0] = np.nan
    pending = [start(store, requests[rank]) for rank in (0, 1)]
    with pytest.raises(error):
        store.update(requests[2], LONG)
    for future in pending:
        with pytest.raises(error):
            future.result(LONG)
    requests[1] = contribution(store, 1, 0)
    pending = [start(store, requests[rank]) for rank in (1, 0)]
    store.update(requests[2], LONG)
    for future in pending:
        future.result(LONG)
    np.testing.assert_array_equal(weights(store, EVERYTHING), expected_of_one_trainer(tmp_path, range(1)))


def test_a_rank_may_have_nothing_to_say(store) -> None:
    before = weights(store, [1])
    nothing = np.zeros((0, 0), np.uint16)  # as it comes over the wire
    waiting = [start(store, push_of(store, 0, [], nothing, rank=rank, world=WORLD)) for rank in (0, 2)]
    store.update(push_of(store, 0, [1], np.ones((1, DIM), np.float32), rank=1, world=WORLD), LONG)
    for future in waiting:
        future.result(LONG)
    np.testing.assert_array_equal(weights(store, [1]), before - 1)


def test_the_rest_of_a_push_that_never_came_is_forgotten(store) -> None:
    for push in (1001, 1002):
        store.update(
            push_of(store, 0, [1], np.ones((1, DIM), np.float32), rank=0, world=WORLD, push=push, parts=3)
        )
    (progress,) = store._trainers._tables.values()
    assert [c.push for c in progress.all()] == [1002]


def test_a_rollback_ends_waiting(store) -> None:
    store.commit(0).wait(LONG)
    waiting = start(store, contribution(store, 0, 1))
    store.rollback(0)
    with pytest.raises(GenerationMismatch, match="rolled back to step 0 meanwhile"):
        waiting.result(LONG)


def test_memory_for_contributions_is_bounded(tmp_path: Path) -> None:
    spec = trained_spec(rows=200_000)
    store = make_store(tmp_path, [spec], 8 << 20, world=2, pending_bytes_max=1 << 20)
    ids, gradients = np.arange(30_000), np.zeros((30_000, DIM), np.float32)
    waiting = start(store, push_of(store, 0, ids, gradients, rank=0, world=2))
    with pytest.raises(Overloaded, match=r"training\.pending_bytes_max"):
        store.update(push_of(store, 0, ids, gradients, rank=1, world=2))
    store.update(push_of(store, 0, ids[:10], gradients[:10], rank=1, world=2), LONG)
    waiting.result(LONG)
    store.close()


def test_a_rank_may_run_ahead_but_not_far(loose) -> None:
    before = weights(loose, EVERYTHING)
    for step in (0, 1):
        loose.update(contribution(loose, 0, step), LONG)
    with pytest.raises(DeadlineExceeded, match=r"more than 2 steps ahead of ranks 1, 2 at step -1"):
        loose.update(contribution(loose, 0, 2), SOON)
    ahead = start(loose, contribution(loose, 0, 2))
    loose.update(contribution(loose, 1, 0), LONG)
    assert not ahead.done()
    loose.update(contribution(loose, 2, 0), LONG)
    ahead.result(LONG)
    with pytest.raises(StepConflict, match="step 0 after its step 0"):
        loose.update(contribution(loose, 2, 0))
    loose.commit(2).wait(LONG)
    loose.update(contribution(loose, 2, 1), LONG)  # a slow rank's step belongs to the next commit
    assert loose.stats()["training_updates"] == 6
    sums = np.zeros((ROWS, DIM))
    for rank, step in [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (2, 1)]:
        request = contribution(loose, rank, step)
        np.add.at(sums, request.ids, request.gradients.astype(np.float64))
    np.testing.assert_allclose(weights(loose, EVERYTHING), before - 0.1 * sums, rtol=1e-4, atol=1e-5)
