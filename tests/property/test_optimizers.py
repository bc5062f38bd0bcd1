"""Optimizer kernels against torch's own optimizers, over a thousand random sparse steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engram_client.kernels.gradients import distinct_ids, mark_not_finite, sum_by_row
from engram_client.spec import RowLayout
from tierstore.kernels.optimizers import OPTIMIZERS
from tierstore.training.recipe import Recipe, layout_of, make_recipe, places_of

ROWS, DIM, BATCH, STEPS = 40, 18, 12, 1000
SEED = 20261129


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows:
    """A table of rows in plain memory, updated by the kernel."""

    def __init__(self, recipe: Recipe, layout: RowLayout, weights: np.ndarray) -> None:
        self.recipe, self.layout = recipe, layout
        self.data = np.zeros((ROWS, layout.row_bytes), np.uint8)
        if layout.fields[0].dtype == "float32":
            self.field("weight")[:] = weights
        elif any(f.name == "master" for f in layout.fields):
            self.field("master")[:] = weights
        else:
            self.halves()[:] = torch.from_numpy(weights).bfloat16().view(torch.int16).numpy()

    def field(self, name: str) -> np.ndarray:
        at, field = self.layout.offset_bytes(name), self.layout.field(name)
        return self.data[:, at : at + field.bytes].view(np.float32)

    def halves(self) -> np.ndarray:
        """The bits of bfloat16 weights, int16."""
        return self.data[:, : 2 * DIM].view(np.int16)

    def update(self, ids: np.ndarray, gradients: np.ndarray, rate: float, decay: float, steps: int) -> None:
        distinct, sums = sum_by_row(ids, gradients)
        addresses = self.data.ctypes.data + distinct * self.layout.row_bytes
        scalars = self.recipe.scalars(rate, decay, steps)
        none = np.zeros(distinct.size, np.int64)
        self.recipe.kind.kernel(addresses, none, sums, places_of(self.layout), scalars)


def batches(seed: int):
    """(ids with duplicates, gradients, learning rate) of each step; some rows are seen rarely."""
    rng = np.random.default_rng(seed)
    odds = rng.random(ROWS) ** 4
    odds /= odds.sum()
    for step in range(STEPS):
        ids = rng.choice(ROWS, BATCH, p=odds)
        yield ids, rng.standard_normal((BATCH, DIM)).astype(np.float32), 0.01 * (1 + step % 7)


def sparse(ids: np.ndarray, gradients: np.ndarray) -> torch.Tensor:
    place = torch.from_numpy(ids)[None]
    return torch.sparse_coo_tensor(place, torch.from_numpy(gradients), (ROWS, DIM), check_invariants=False)


def first_weights() -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal((ROWS, DIM)).astype(np.float32)


TORCH = {
    "sgd": lambda weights: torch.optim.SGD([weights], lr=1.0),
    "adagrad": lambda weights: torch.optim.Adagrad([weights], lr=1.0),
    "adam": lambda weights: torch.optim.SparseAdam([weights], lr=1.0),
}


@pytest.mark.parametrize(("name", "decay"), [("sgd", 0.01), ("adagrad", 0.0), ("adam", 0.0), ("adam", 0.01)])
def test_equals_torch(name: str, decay: float) -> None:
    recipe = make_recipe(name)
    ours = Rows(recipe, layout_of(DIM, recipe), first_weights())
    weights = torch.nn.Parameter(torch.from_numpy(first_weights()))
    theirs = TORCH[name](weights)
    for step, (ids, gradients, rate) in enumerate(batches(SEED), 1):
        ours.update(ids, gradients, rate, decay, step)
        theirs.param_groups[0]["lr"] = rate
        with torch.no_grad():
            weights[torch.from_numpy(np.unique(ids))] *= 1 - rate * decay
        weights.grad = sparse(ids, gradients)
        theirs.step()
    np.testing.assert_allclose(ours.field("weight"), weights.detach().numpy(), rtol=2e-4, atol=2e-5)


def test_rowwise_adagrad_equals_its_definition() -> None:
    recipe = make_recipe("rowwise_adagrad")
    ours = Rows(recipe, layout_of(DIM, recipe), first_weights())
    weights, sums = first_weights().astype(np.float64), np.zeros(ROWS)
    for step, (ids, gradients, rate) in enumerate(batches(SEED), 1):
        ours.update(ids, gradients, rate, 0.0, step)
        total = np.zeros((ROWS, DIM))
        np.add.at(total, ids, gradients.astype(np.float64))
        for row in np.unique(ids):
            sums[row] += np.mean(total[row] ** 2)
            weights[row] -= rate * total[row] / (np.sqrt(sums[row]) + 1e-10)
    np.testing.assert_allclose(ours.field("weight"), weights, rtol=2e-4, atol=2e-5)


def test_adam_that_counts_by_row_is_an_adam_for_each_row() -> None:
    recipe = make_recipe("adam", settings={"per_row_steps": 1})
    ours = Rows(recipe, layout_of(DIM, recipe), first_weights())
    weights = [torch.nn.Parameter(torch.from_numpy(row[None])) for row in first_weights()]
    theirs = [torch.optim.SparseAdam([row], lr=1.0) for row in weights]
    for step, (ids, gradients, rate) in enumerate(batches(SEED), 1):
        ours.update(ids, gradients, rate, 0.0, step)
        for row, gradient in zip(*sum_by_row(ids, gradients), strict=True):
            zero = torch.zeros((1, 1), dtype=torch.int64)
            weights[row].grad = torch.sparse_coo_tensor(
                zero, torch.from_numpy(gradient[None]), (1, DIM), check_invariants=False
            )
            theirs[row].param_groups[0]["lr"] = rate
            theirs[row].step()
        if step == 200:
            break
    expected = np.concatenate([row.detach().numpy() for row in weights])
    np.testing.assert_allclose(ours.field("weight"), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_rounded_weights_follow_their_master(name: str) -> None:
    recipe = make_recipe(name)
    exact = Rows(recipe, layout_of(DIM, recipe), first_weights())
    rounded = Rows(recipe, layout_of(DIM, recipe, dtype="bfloat16"), first_weights())
    touched = set()
    for step, (ids, gradients, rate) in enumerate(batches(SEED), 1):
        exact.update(ids, gradients, rate, 0.01, step)
        rounded.update(ids, gradients, rate, 0.01, step)
        touched.update(ids.tolist())
        if step == 100:
            break
    np.testing.assert_array_equal(rounded.field("master"), exact.field("weight"))
    expected = torch.from_numpy(exact.field("weight").copy()).bfloat16().view(torch.int16).numpy()
    rows = sorted(touched)
    np.testing.assert_array_equal(rounded.halves()[rows], expected[rows])


def test_weights_without_a_master_are_rounded_at_each_update() -> None:
    recipe = make_recipe("sgd")
    ours = Rows(recipe, layout_of(DIM, recipe, dtype="bfloat16", master=False), first_weights())
    weights = torch.from_numpy(first_weights()).bfloat16()
    for step, (ids, gradients, rate) in enumerate(batches(SEED), 1):
        ours.update(ids, gradients, rate, 0.0, step)
        distinct, sums = sum_by_row(ids, gradients)
        rows = torch.from_numpy(distinct)
        weights[rows] = (weights[rows].float() - np.float32(rate) * torch.from_numpy(sums)).bfloat16()
        if step == 200:
            break
    np.testing.assert_array_equal(ours.halves(), weights.view(torch.int16).numpy())


def test_an_overflow_stays_visible_when_it_is_rounded() -> None:
    recipe = make_recipe("sgd")
    ours = Rows(recipe, layout_of(DIM, recipe, dtype="bfloat16"), np.full((ROWS, DIM), 3e38, np.float32))
    ours.field("master")[1] = np.frombuffer(np.uint32(0x7FFFFFFF).tobytes(), np.float32)
    ours.update(np.array([0, 1]), np.full((2, DIM), -3e38, np.float32), 1.0, 0.0, 1)
    weights = torch.from_numpy(ours.halves().copy()).view(torch.bfloat16)
    assert torch.isinf(weights[0]).all()
    assert torch.isnan(weights[1]).all()


def test_duplicates_are_summed_in_the_order_they_come() -> None:
    rng = np.random.default_rng(SEED)
    ids = rng.integers(-1, 30, 500)
    gradients = rng.standard_normal((500, DIM)).astype(np.float32)
    distinct, sums = sum_by_row(ids, gradients)
    assert -1 not in distinct
    assert distinct.tolist() == list(dict.fromkeys(i for i in ids.tolist() if i >= 0))
    for row, total in zip(distinct, sums, strict=True):
        expected = np.zeros(DIM, np.float32)
        for gradient in gradients[ids == row]:
            expected = expected + gradient
        np.testing.assert_array_equal(total, expected)
    alone, inverse = distinct_ids(np.array([5, 3, 9]))
    assert alone.tolist() == [5, 3, 9]
    assert inverse.tolist() == [0, 1, 2]
    assert distinct_ids(np.array([-1, -1]))[0].size == 0


def test_every_row_that_is_not_finite_is_found() -> None:
    gradients = np.random.default_rng(SEED).standard_normal((50, DIM)).astype(np.float32)
    gradients[3, 0], gradients[17, DIM - 1], gradients[40, 5] = np.nan, np.inf, -np.inf
    gradients[9, 2] = np.finfo(np.float32).max
    marks = np.zeros(50, np.bool_)
    assert mark_not_finite(gradients, marks) == 3
    assert np.flatnonzero(marks).tolist() == [3, 17, 40]
