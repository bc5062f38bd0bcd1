"""`EngramEmbedding` and `EngramOptimizer` against torch's own, and through what training loops do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_client import Client, NgramHashMapping, connect
from engram_client.errors import BadRequest, NotFiniteGradient, StepConflict
from engram_client.modules import EngramLayer
from engram_client.training import EngramEmbedding, EngramOptimizer, TrainedLookup
from tierstore.training.creating import NewTable, create_training

ROWS, DIM, HEADS, BATCH = 300, 8, 3, 16
RATE = 0.01


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TIERSTORE_TRAINING_DRAM_BYTES", "32KiB")  # a third of the rows
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_store(folder: Path, dtype: str = "float32", tables: tuple[str, ...] = ("words",)) -> Path:
    new = [NewTable(name, ROWS, DIM) for name in tables]
    create_training(folder, new, optimizer="adam", dtype=dtype, initial_std=0.3, learning_rate=RATE)
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with connect(f"local:{new_store(tmp_path)}") as connected:
        yield connected


class Model(nn.Module):
    """Embeddings from anywhere, joined and projected."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = embedding
        self.project = nn.Sequential(nn.Linear(HEADS * DIM, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, ids: Any) -> Tensor:
        return self.project(self.embedding(ids).flatten(1)).squeeze(-1)


def batch(step: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(step)
    ids = rng.integers(-1, 40, (BATCH, HEADS))  # the same rows again and again, some none
    return torch.from_numpy(ids), torch.from_numpy(rng.standard_normal(BATCH).astype(np.float32))


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids, wanted = batch(step)
    return ((model(ids) - wanted) ** 2).mean()


def parts(client: Client) -> tuple[Model, EngramOptimizer, torch.optim.Optimizer]:
    training = client.training()
    embedding = EngramEmbedding(training.table("words"))
    model = Model(embedding)
    return model, EngramOptimizer(training, [embedding]), torch.optim.SGD(model.parameters(), lr=0.1)


def train(client: Client, steps: range) -> list[float]:
    model, rows, dense = parts(client)
    return [one_step(model, rows, dense, step) for step in steps]


def one_step(model: nn.Module, rows: EngramOptimizer, dense: torch.optim.Optimizer, step: int) -> float:
    loss = loss_of(model, step)
    for optimizer in (rows, dense):
        optimizer.zero_grad()
    loss.backward()
    for optimizer in (rows, dense):
        optimizer.step()
    return loss.item()


def all_rows(client: Client) -> Tensor:
    table = client.training().table("words")
    return table.dequantize(torch.from_numpy(np.asarray(table.lookup(np.arange(ROWS)))))


class Resident(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        weights = torch.cat([weights, torch.zeros(1, DIM)])  # for padding
        self.inner = nn.Embedding(ROWS + 1, DIM, sparse=True, _weight=weights)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids.where(ids >= 0, ROWS)) * (ids >= 0).unsqueeze(-1)


def test_learns_as_a_resident_table_does(client: Client) -> None:
    resident = Model(Resident(all_rows(client)))
    sparse = torch.optim.SparseAdam(resident.embedding.parameters(), lr=RATE)
    dense = torch.optim.SGD(resident.project.parameters(), lr=0.1)
    expected = []
    for step in range(12):
        loss = loss_of(resident, step)
        for optimizer in (sparse, dense):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (sparse, dense):
            optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(train(client, range(12)), expected, rtol=1e-4)
    torch.testing.assert_close(
        all_rows(client)[:40], resident.embedding.inner.weight.detach()[:40], rtol=1e-3, atol=1e-4
    )


def test_resumes_to_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    with connect(f"local:{new_store(tmp_path / 'whole')}") as client:
        expected = train(client, range(10))
        rows = all_rows(client)
    store, saved = new_store(tmp_path / "parts"), tmp_path / "checkpoint.pt"
    with connect(f"local:{store}") as client:
        model, optimizer, dense = parts(client)
        losses = [one_step(model, optimizer, dense, step) for step in range(6)]
        pending = optimizer.commit(wait=False)
        torch.save([model.state_dict(), dense.state_dict(), optimizer.state_dict()], saved)
        one_step(model, optimizer, dense, 6)  # lost
        pending.wait()
    with connect(f"local:{store}") as client:
        model, optimizer, dense = parts(client)
        for part, state in zip((model, dense, optimizer), torch.load(saved), strict=True):
            part.load_state_dict(state)
        assert optimizer.steps_done == 5
        losses += [one_step(model, optimizer, dense, step) for step in range(6, 10)]
        assert losses == expected
        assert torch.equal(all_rows(client), rows)
        with pytest.raises(StepConflict, match="checkpoint is of step 5, the tables are at step 9"):
            optimizer.load_state_dict(torch.load(saved)[2])


def gradients_of(model: Model) -> tuple[np.ndarray, Tensor]:
    """Rows with a gradient, sorted, and the sum for each."""
    ids, values = model.embedding.gradients.take(DIM)
    distinct = np.unique(ids)
    sums = torch.stack([values[torch.from_numpy(ids == row)].sum(0) for row in distinct])
    return distinct, sums


def test_gradients_accumulate(client: Client) -> None:
    model, _, _ = parts(client)
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    ids, expected = gradients_of(model)
    model.embedding.gradients.clear()
    for step in (1, 2):
        loss_of(model, step).backward()
    again, sums = gradients_of(model)
    assert ids.tolist() == again.tolist()
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once_and_reads_no_newer_rows(client: Client, use_reentrant: bool) -> None:
    model, _, _ = parts(client)
    ids, wanted = batch(0)
    plain = ((model(ids) - wanted) ** 2).mean()
    plain.backward()
    rows, expected = gradients_of(model)
    model.embedding.gradients.clear()

    anchor = torch.zeros(1, requires_grad=True)  # a reentrant checkpoint wants an input with a gradient
    del plain
    gc.collect()
    out = checkpoint(lambda x, ids: model(ids) + x, anchor, ids, use_reentrant=use_reentrant)
    other = client.training().table("words")  # another trainer, before this one's backward
    other.update(np.arange(40), np.ones((40, DIM), np.float32), step=0, learning_rate=1.0)
    ((out - wanted) ** 2).mean().backward()
    again, sums = gradients_of(model)
    assert rows.tolist() == again.tolist()
    torch.testing.assert_close(sums, expected, rtol=0, atol=0)


def test_gradient_scaling_and_a_step_that_is_skipped(client: Client) -> None:
    model, optimizer, dense = parts(client)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = all_rows(client)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, 0)
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.step(dense)
    scaler.update()
    assert torch.equal(all_rows(client), before)
    assert optimizer.steps_done == -1
    for one in (optimizer, dense):
        one.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    _, scaled = gradients_of(model)
    scaler.step(optimizer)
    scaler.step(dense)
    scaler.update()
    assert optimizer.steps_done == 0
    assert (all_rows(client) != before).any()
    assert scaled.abs().max() < 10


def test_gradients_that_are_not_finite_are_refused_and_dropped(client: Client) -> None:
    model, optimizer, dense = parts(client)
    (loss_of(model, 0) * float("nan")).backward()
    with pytest.raises(NotFiniteGradient, match="row"):
        optimizer.step()
    one_step(model, optimizer, dense, 0)
    assert optimizer.steps_done == 0


def test_compiled_models_break_cleanly_at_the_rows(client: Client) -> None:
    model, optimizer, _ = parts(client)
    loss_of(model, 0).backward()
    rows, expected = gradients_of(model)
    optimizer.zero_grad()
    compiled = torch.compile(model, backend="eager")
    loss = loss_of(compiled, 0)
    torch.testing.assert_close(loss, loss_of(model, 0))
    optimizer.zero_grad()
    loss.backward()
    again, sums = gradients_of(model)
    assert rows.tolist() == again.tolist()
    torch.testing.assert_close(sums, expected)


def test_evaluation_leaves_nothing_behind(client: Client) -> None:
    model, optimizer, dense = parts(client)
    one_step(model, optimizer, dense, 0)
    before = all_rows(client)
    model.eval()
    assert not model.embedding(batch(1)[0]).requires_grad
    model.train()
    with torch.no_grad():
        loss_of(model, 1)
    forgotten = loss_of(model, 1)  # no backward
    del forgotten
    gc.collect()
    assert not model.embedding.gradients.leaves
    optimizer.step()
    assert torch.equal(all_rows(client), before)


def test_rows_asked_for_ahead_are_no_older_than_the_last_step(client: Client) -> None:
    model, optimizer, dense = parts(client)
    ids, _ = batch(0)
    ahead = model.embedding.start(ids)
    one_step(model, optimizer, dense, 0)
    fresh = model.embedding(ids)
    assert torch.equal(model.embedding(ahead), fresh)
    assert torch.equal(model.embedding(model.embedding.start(ids)), fresh)
    np.testing.assert_array_equal(fresh[ids >= 0].detach().numpy(), all_rows(client)[ids[ids >= 0]].numpy())


@pytest.mark.parametrize("ahead_steps", [1, 3, 6])
def test_rows_asked_for_several_steps_ahead_are_those_of_now(client: Client, ahead_steps: int) -> None:
    model, optimizer, dense = parts(client)
    rng = np.random.default_rng(ahead_steps)
    wanted = [torch.from_numpy(rng.integers(-1, ROWS, (BATCH, HEADS))) for _ in range(12)]
    ahead = [model.embedding.start(ids) for ids in wanted[:ahead_steps]]
    for step, ids in enumerate(wanted):
        rows = model.embedding(ahead.pop(0))
        present = ids >= 0
        np.testing.assert_array_equal(rows[present].detach().numpy(), all_rows(client)[ids[present]].numpy())
        if step + ahead_steps < len(wanted):
            ahead.append(model.embedding.start(wanted[step + ahead_steps]))
        one_step(model, optimizer, dense, step)


@pytest.mark.parametrize("own_steps", [0, 1])
def test_rows_asked_for_ahead_are_no_older_than_updates_through_another_object(
    client: Client, own_steps: int
) -> None:
    training, ids = client.training(), np.array([1, 2, 3])
    one, other = (EngramEmbedding(training.table("words")) for _ in range(2))
    pending = other.start(ids)
    pending.handle.wait()  # they are here: what follows makes them old
    for embedding, rows in ((one, ids), (other, np.array([200])))[: 1 + own_steps]:
        optimizer = EngramOptimizer(training, [embedding])
        embedding(rows).sum().backward()
        optimizer.step()
    assert torch.equal(other(pending), EngramEmbedding(training.table("words"))(ids))


def test_schedulers_change_the_rate(client: Client) -> None:
    training = client.training()
    embedding = EngramEmbedding(training.table("words"), concatenated=True, dtype=torch.bfloat16)
    optimizer = EngramOptimizer(training, [embedding], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    ids = torch.arange(6).reshape(2, 3)
    before = all_rows(client)
    for moved in (True, False):
        out = embedding(ids)
        assert out.shape == (2, 3 * DIM)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        optimizer.step()
        schedule.step()
        after = all_rows(client)
        assert torch.equal(after[6:], before[6:])
        assert bool((after[:6] != before[:6]).all()) is moved
        before = after
    with pytest.raises(BadRequest, match="share the module"):
        EngramOptimizer(training, [embedding, embedding])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engram_layer_trains_on_hashed_rows(tmp_path: Path, dtype: str) -> None:
    from tierstore.training.creating import NewTable

    mapping = NgramHashMapping.engram(
        np.arange(50), layer_ids=[3], vocab_size_per_ngram=[60, 60], n_head_per_ngram=2, max_ngram_size=3,
        pad_id=2, seed=5,
    )  # fmt: skip
    scheme = mapping.scheme(3)
    create_training(
        tmp_path, [NewTable("engram", scheme.rows, DIM, scheme)], optimizer="engram", dtype=dtype,
        initial_std=0.1, learning_rate=1e-2,
    )  # fmt: skip
    with connect(f"local:{tmp_path}") as client:
        training = client.training()
        table = training.table("engram")
        assert table.mapping(np.arange(50)).head_sizes[3].tolist() == mapping.head_sizes[3].tolist()
        embedding = EngramEmbedding(table, dtype=torch.float32)

        class Sum(nn.Module):
            def forward(self, hidden: Tensor, embeddings: Tensor, **options: Any) -> Tensor:
                return hidden + embeddings.flatten(2).sum(-1, keepdim=True)

        layer = EngramLayer(Sum(), TrainedLookup(mapping, embedding, 3))
        optimizer = EngramOptimizer(training, [embedding])
        tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
        losses = []
        for _ in range(5):
            pending = layer.start(tokens)
            loss = (layer(torch.zeros(2, 9, 4), pending) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        optimizer.commit()
        assert training.steps() == [4]
