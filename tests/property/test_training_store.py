"""A training store against a plain array, through updates, commits, rollbacks, openings and changes of its
budget, with little DRAM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import GenerationMismatch
from tests.support.training import DIM, SMALLEST, make_store, open_store, push_of, trained_spec, weights
from tierstore.training.store import TrainingStore

ROWS = {"a": 500, "b": 300, "wide": 200}


class Model:
    """The weights there must be, now and at each committed step."""

    def __init__(self, store: TrainingStore) -> None:
        self.now = {name: weights(store, np.arange(rows), name) for name, rows in ROWS.items()}
        self.committed: dict[int, dict[str, np.ndarray]] = {}

    def commit(self, step: int) -> None:
        self.committed[step] = {name: table.copy() for name, table in self.now.items()}

    def go_back(self, step: int) -> None:
        self.now = {name: table.copy() for name, table in self.committed[step].items()}
        self.committed = {s: t for s, t in self.committed.items() if s <= step}


def specs():
    """Two tables share an arena, as their rows have one size; the third has one of its own."""
    made = [trained_spec("a", ROWS["a"]), trained_spec("b", ROWS["b"])]
    return [*made, trained_spec("wide", ROWS["wide"], optimizer="adagrad")]


def update(store: TrainingStore, model: Model, rng: np.random.Generator, name: str, step: int) -> None:
    ids = rng.integers(-1, ROWS[name], rng.integers(1, 200))
    gradients = rng.standard_normal((ids.size, DIM)).astype(np.float32)
    before = {row: model.now[name][row].copy() for row in ids.tolist()}
    store.update(push_of(store, step, ids, gradients, name), 30)
    if (
        name == "wide"
    ):  # Adagrad's numbers are another test's: whatever it makes of touched rows is taken down
        touched = np.unique(ids[ids >= 0])
        model.now[name][touched] = weights(store, touched, name)
        return
    sums: dict[int, np.ndarray] = {}
    for row, gradient in zip(ids.tolist(), gradients, strict=True):
        sums[row] = sums.get(row, np.zeros(DIM, np.float32)) + gradient
    for row, total in sums.items():
        if row >= 0:
            model.now[name][row] = before[row] - total


@pytest.mark.parametrize("seed", range(4))
def test_a_store_is_its_model(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store = make_store(tmp_path, specs())
    model = Model(store)
    step = 0
    for _ in range(60):
        actions = {
            "update": 0.46,
            "read": 0.3,
            "commit": 0.12,
            "resize": 0.04,
            "rollback": 0.04,
            "open": 0.04,
        }
        action = rng.choice([*actions], p=[*actions.values()])
        name = rng.choice([*ROWS])
        if action == "update":
            update(store, model, rng, name, step)
        elif action == "read":
            ids = rng.integers(0, ROWS[name], 150)
            np.testing.assert_array_equal(weights(store, ids, name), model.now[name][ids])
        elif action == "commit":
            store.commit(step, 30).wait(30)
            model.commit(step)
            step += 1
        elif action == "resize":
            store.set_dram_budget(int(rng.integers(SMALLEST // 2, 3 * SMALLEST)), 30)
        elif model.committed:
            last = max(model.committed)
            if action == "rollback":
                last = int(rng.choice([*model.committed]))
                store.rollback(last, 30)
            else:
                store.close()
                store = open_store(tmp_path)
            model.go_back(last)
            step = last + 1
    for name, rows in ROWS.items():
        np.testing.assert_array_equal(weights(store, np.arange(rows), name), model.now[name], f"seed {seed}")
    stats = store.stats()
    assert stats["training_rows_evicted"] > 0, "the tables are larger than DRAM"
    assert stats["training_dirty_rows"] <= stats["training_capacity_rows"]
    store.close()


def train(store: TrainingStore, steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        ids = rng.integers(0, 400, 120)
        gradients = rng.standard_normal((120, DIM)).astype(np.float32)
        store.update(push_of(store, step, ids, gradients, learning_rate=0.01), 30)


@pytest.mark.parametrize("settings", [{}, {"per_row_steps": 1}])
def test_adam_resumes_bit_for_bit_and_does_not_see_the_budget(tmp_path: Path, settings: dict) -> None:
    spec = trained_spec(optimizer="adam", settings=settings)
    everything = np.arange(400)
    resident = make_store(tmp_path / "resident", [spec], 8 << 20)
    train(resident, range(30))
    expected = weights(resident, everything)
    assert resident.stats()["training_rows_evicted"] == 0
    resident.close()

    store = make_store(tmp_path / "resumed", [spec], SMALLEST // 2)
    train(store, range(12))
    store.commit(11).wait(30)
    train(store, range(12, 17))  # lost
    store.close()
    store = open_store(tmp_path / "resumed", SMALLEST // 2)
    assert store.step() == 11
    train(store, range(12, 20))
    store.commit(19).wait(30)
    train(store, range(20, 25))
    old = store.tables()["table"].generation
    store.rollback(19)
    with pytest.raises(GenerationMismatch, match="rolled back"):
        weights(store, everything, generation=old)
    train(store, range(20, 30))
    np.testing.assert_array_equal(weights(store, everything), expected)
    assert store.stats()["training_rows_evicted"] > 0
    store.close()
