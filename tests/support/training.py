"""Training stores for tests, and a proxy of their storage that fails on order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import TierstoreError
from engram_client.transport.base import LookupRequest
from engram_client.transport.training import UpdateRequest
from tierstore.config import Training
from tierstore.training.recipe import layout_of, make_recipe
from tierstore.training.store import TrainingStore
from tierstore.updates import Initial, RowStorage, TrainedSpec

DIM = 6
SMALLEST = 96 << 10  # of a budget: some hundred rows of a table without state
TINY = 16 << 10  # a hundred
pushes = itertools.count(1)


def trained_spec(
    name: str = "table", rows: int = 400, *, optimizer: str = "sgd", **recipe: Any
) -> TrainedSpec:
    made = make_recipe(optimizer, **recipe)
    layout = layout_of(DIM, made)
    initial = Initial("normal", 0.5, 7)
    return TrainedSpec(name, rows, layout, initial, optimizer=made.to_json())


def make_store(
    folder: Path, specs: Sequence[TrainedSpec], budget_bytes: int = SMALLEST, **config: Any
) -> TrainingStore:
    TrainingStore.create(folder, specs)
    return open_store(folder, budget_bytes, **config)


def open_store(folder: Path, budget_bytes: int = SMALLEST, **config: Any) -> TrainingStore:
    config = {"staging_bytes": 64 << 10, "keep_steps": 100, **config}
    return TrainingStore.open(folder, Training(dram_bytes=budget_bytes, **config))


def weights(store: TrainingStore, ids: np.ndarray, name: str = "table", generation: str = "") -> np.ndarray:
    """float32 [n, DIM]."""
    ids = np.ascontiguousarray(ids, np.int64)
    out = np.empty((ids.size, 4 * DIM), np.uint8)
    store.lookup(LookupRequest(name, generation or store.tables()[name].generation, "row", ids), out, 30)
    return out.view(np.float32)


def push_of(
    store: TrainingStore, step: int, ids: Any, gradients: np.ndarray, name: str = "table", **rest: Any
) -> UpdateRequest:
    fields = {
        "learning_rate": 1.0,
        "push": next(pushes),
        "generation": store.tables()[name].generation,
        **rest,
    }
    return UpdateRequest(name, step=step, ids=np.asarray(ids, np.int64), gradients=gradients, **fields)


class FailingStorage:
    """A `RowStorage` that raises what it is told to, instead of working, after so many calls."""

    def __init__(self, storage: RowStorage) -> None:
        self._storage = storage
        self._plans: dict[str, tuple[int, BaseException]] = {}

    def fail(self, method: str, error: TierstoreError | BaseException, *, after: int = 0) -> None:
        """From the call behind `after` others on, once."""
        self._plans[method] = (after, error)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if name not in self._plans:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            left, error = self._plans.pop(name, (0, None))
            if error is not None and left == 0:
                raise error
            if error is not None:
                self._plans[name] = (left - 1, error)
            return found(*args, **kwargs)

        return call


def failing(store: TrainingStore) -> FailingStorage:
    """Put a proxy between a store and its storage."""
    proxy: Any = FailingStorage(store._storage)
    store._storage = store._updater._storage = store._reading._storage = proxy
    return proxy
