"""Updates of the same rows by the arena's kernel, by a whole training store and by torch; each `step` is
one."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_client.transport.base import LookupRequest
from engram_client.transport.training import UpdateRequest
from tierstore.config import Training
from tierstore.kernels.optimizers import OPTIMIZERS as KINDS
from tierstore.tiers.trained import TrainedArena
from tierstore.training import TrainingStore
from tierstore.training.creating import NewTable, create_training
from tierstore.training.recipe import layout_of, make_recipe, places_of
from tierstore.training.update import PIECE_ROWS_MAX

OPTIMIZERS = tuple(KINDS)
TORCH: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.SparseAdam,
}
RATE, OWNER, BATCHES = 1e-3, 256, 8


def batches(rows: int, dim: int, batch: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distinct row ids, in no order, and gradients."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.choice(rows, batch, replace=False).astype(np.int64),
            rng.standard_normal((batch, dim), np.float32),
        )
        for _ in range(BATCHES)
    ]


class ArenaUpdates:
    """Rows that are all in an arena, as the store's updates find them."""

    def __init__(self, name: str, rows: int, dim: int, batch: int, seed: int) -> None:
        self._recipe = make_recipe(name, learning_rate=RATE)
        layout = layout_of(dim, self._recipe)
        self._places = places_of(layout)
        self._arena = TrainedArena(int(1.6 * rows * (layout.row_bytes + 32)), layout.row_bytes)
        every = np.arange(rows, dtype=np.int64)
        zeros, waiting = np.zeros((rows, layout.row_bytes), np.uint8), np.ones(rows, np.bool_)
        self._arena.admit_updated(every, OWNER, zeros, waiting)
        self._arena.settle()
        present = np.flatnonzero(~waiting)  # a set may be full: a few rows are not there
        self._batches = [
            (np.ascontiguousarray(ids[kept]), np.ascontiguousarray(gradients[kept]))
            for ids, gradients in batches(rows, dim, batch, seed)
            for kept in [np.isin(ids, present)]
        ]

    def step(self, number: int) -> int:
        ids, gradients = self._batches[number % BATCHES]
        scalars = self._recipe.scalars(None, None, number + 1)
        optimize = self._recipe.kind.kernel

        def apply(values: np.ndarray, rows: np.ndarray, guards: np.ndarray) -> None:
            optimize(rows, guards, values, self._places, scalars)

        for first in range(0, ids.size, PIECE_ROWS_MAX):
            piece = slice(first, first + PIECE_ROWS_MAX)
            present = self._arena.update(ids[piece], OWNER, partial(apply, gradients[piece]))
            assert present.all(), "a row has left the arena"
        return ids.size


class StoreUpdates:
    """A training store whose rows fit into DRAM; nothing is committed."""

    def __init__(self, folder: Path, name: str, rows: int, dim: int, batch: int, seed: int) -> None:
        (spec,) = create_training(folder, [NewTable("rows", rows, dim)], optimizer=name, learning_rate=RATE)
        budget = int(1.6 * rows * (spec.row_bytes + 32))
        self._store = TrainingStore.open(folder, Training(dram_bytes=budget))
        self._generation = self._store.tables()["rows"].generation
        self._batches = batches(rows, dim, batch, seed)
        self._steps = itertools.count()
        for first in range(0, rows, batch):  # all rows come into DRAM, as a table's do that fits
            ids = np.arange(first, min(rows, first + batch))
            request = LookupRequest("rows", self._generation, "row", ids)
            self._store.lookup(request, np.empty((ids.size, 4 * dim), np.uint8))
        for number in range(BATCHES):
            self.step(number)
        self._store.settle()

    def step(self, number: int) -> int:
        ids, gradients = self._batches[number % BATCHES]
        step = next(self._steps)
        self._store.update(UpdateRequest("rows", self._generation, step, ids, gradients, push=step + 1))
        return ids.size

    def close(self) -> None:
        self._store.close()


class TorchUpdates:
    """A resident table and one of torch's optimizers."""

    def __init__(self, name: str, rows: int, dim: int, batch: int, seed: int) -> None:
        torch.set_num_threads(1)
        self._weights = torch.nn.Parameter(torch.zeros(rows, dim))
        self._optimizer = TORCH[name]([self._weights], lr=RATE)
        self._gradients = []
        for ids, gradients in batches(rows, dim, batch, seed):
            order = np.argsort(ids)  # as coalescing would leave them
            self._gradients.append(
                torch.sparse_coo_tensor(
                    torch.from_numpy(ids[order])[None], torch.from_numpy(gradients[order]), (rows, dim),
                    is_coalesced=True, check_invariants=False,
                )
            )  # fmt: skip
        self._batch = batch

    def step(self, number: int) -> int:
        self._weights.grad = self._gradients[number % BATCHES]
        self._optimizer.step()
        return self._batch
