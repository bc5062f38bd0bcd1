"""A rank of a distributed training in a process of its own: told on stdin what to do, a JSON line each.

One process plays many scenarios, because importing torch takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tierbench.ranks import TABLE, Workload, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_client import connect
from engram_client.errors import StorageError, TierstoreError
from engram_client.training import EngramEmbedding, EngramOptimizer, ShardedTraining

ROWS, DIM, HEADS = 200, 8, 3
TABLES = {"words": ROWS, "tiny": 2}


class Model(nn.Module):
    """Two tables, one of them checkpointed, joined and projected."""

    def __init__(self, embeddings: list[EngramEmbedding]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embeddings = nn.ModuleList(embeddings)
        self.project = nn.Linear(2 * HEADS * DIM, 1)

    def forward(self, words: Any, tiny: Tensor) -> Tensor:
        rows = self.embeddings[0](words).flatten(1)
        more: Tensor = checkpoint(self.embeddings[1], tiny, use_reentrant=False)
        return torch.tanh(self.project(torch.cat([rows, more.flatten(1)], 1))).squeeze(-1)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank 1 has nothing in some steps; sizes differ."""
    rng = np.random.default_rng([rank, step])
    size = 0 if rank == 1 and step % 3 == 0 else 5 + rank
    words, tiny = rng.integers(-1, 40, (size, HEADS)), rng.integers(0, 2, (size, HEADS))
    wanted = rng.standard_normal(size).astype(np.float32)
    return torch.from_numpy(words), torch.from_numpy(tiny), torch.from_numpy(wanted)


def loss_of(model: nn.Module, rank: int, step: int, words: Any = None) -> Tensor:
    asked, tiny, wanted = batch(rank, step)
    return (model(asked if words is None else words, tiny) - wanted).square().sum() / 5


class Trainer:
    """The same loop for one process that plays all ranks, and for one rank of many."""

    def __init__(self, training: Any, ranks: list[int], world: int, scale: float, micro: int = 1) -> None:
        self.embeddings = [EngramEmbedding(training.table(name)) for name in TABLES]
        self.model = Model(self.embeddings)
        self.rows = EngramOptimizer(training, self.embeddings)
        self.dense = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.ranks, self.world, self.scale, self.micro = ranks, world, scale, micro
        self.ahead: dict[int, Any] = {}

    def step(self, number: int) -> list[float]:
        """Micro-batches for each rank; the next step's rows are asked for ahead."""
        self.rows.zero_grad()
        self.dense.zero_grad()
        told = []
        for rank in self.ranks:
            words = self.ahead.pop(rank, None)
            self.ahead[rank] = self.embeddings[0].start(batch(rank, number + 1)[0])
            for later in range(self.micro):
                loss = loss_of(self.model, rank, number + later, None if later else words)
                (loss * self.scale).backward()
                told.append(loss.item())
        if len(self.ranks) < self.world:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world * self.scale
        self.rows.step()
        self.dense.step()
        return told


def everything(training: Any, name: str) -> list[list[float]]:
    rows = training.table(name).lookup(np.arange(TABLES[name]))
    return rows.view(np.float32).tolist()


@contextmanager
def sharded(told: dict[str, Any], **options: Any) -> Iterator[tuple[ShardedTraining, Any]]:
    with connect(f"local:{told['store']}") as client:
        training = ShardedTraining(client.training(), timeout=told.get("timeout", 60), **options)
        yield training, client.training()
        training.close()


def run_train(told: dict[str, Any]) -> dict[str, Any]:
    """Steps `first` to `last`; commits behind those of `commits`, and dies before it closes step `dies`."""
    with sharded(told) as (training, own):
        trainer = Trainer(training, [told["rank"]], told["world"], 1.0, told["micro"])
        begins = trainer.rows.steps_done
        if saved := told.get("model"):
            trainer.model.load_state_dict(torch.load(saved))
        losses, pending, error = [], None, ""
        for number in range(begins + 1, told["last"] + 1):
            losses.append(trainer.step(number))
            if number in told.get("commits", ()):
                torch.save(trainer.model.state_dict(), f"{told['store']}-{number}.pt")
                pending = trainer.rows.commit(wait=False)
            if number == told.get("dies"):
                if told["rank"] == 1:
                    own._training.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                try:
                    trainer.rows.commit()
                except TierstoreError as told_us:
                    error = f"{type(told_us).__name__}: {told_us}"
                    own._transport.training().wait_durable(number, 60)
                return {"error": error, "steps": training.steps()}
        if pending:
            pending.wait()
        if copies := told.get("copies"):
            training.snapshot(copies)
        rows = {name: everything(training, name) for name in TABLES}
        return {"begins": begins, "losses": losses, "rows": rows, "steps": training.steps()}


def run_parallel(told: dict[str, Any]) -> dict[str, Any]:
    """One of several trainers of whole tables in a daemon."""
    with connect(told["target"], wait_s=60) as client:
        training = client.training(rank=told["rank"], world=told["world"])
        trainer = Trainer(training, [told["rank"]], told["world"], 1 / told["world"])
        losses = [trainer.step(number) for number in range(told["last"] + 1)]
        dist.barrier()
        return {"losses": losses, "rows": {name: everything(training, name) for name in TABLES}}


def refused(do: Any) -> str:
    try:
        do()
    except TierstoreError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def run_refusals(told: dict[str, Any]) -> dict[str, Any]:
    """What fails on one rank is known to all; then an update that failed on rank 1 alone is repeated."""
    rank = told["rank"]
    with sharded(told) as (training, own):
        table = training.table("words")
        ids, ones = np.arange(4), np.ones((4, DIM), np.float32)
        before = everything(training, "words")
        told_us = [
            refused(lambda: table.lookup(np.array([ROWS if rank == 1 else 0]))),
            refused(lambda: table.lookup(np.array(["a"]) if rank == 1 else ids)),
            refused(lambda: table.update(ids, ones * (np.nan if rank == 0 else 1), step=1)),
            refused(lambda: table.update(ids, ones[:, : DIM - rank], step=1)),
            refused(lambda: training.rollback(5)),
        ]
        same = everything(training, "words") == before
        inner, share_update = own._training, own._training.update
        if rank == 1:
            inner.update = _raise
        told_us.append(refused(lambda: table.update(ids, ones, step=1)))
        told_us.append(refused(lambda: table.update(ids, 2 * ones, step=1)))
        told_us.append(refused(lambda: training.commit(1)))  # of half of it
        inner.update = share_update
        table.update(ids, ones, step=1)
        rows = everything(training, "words")
        training.commit(1)
        table.update(ids, ones, step=2)
        training.rollback(1)
        told_us.append(refused(lambda: table.lookup(ids)))
        back = everything(training, "words") == rows
        last = (lambda: table.lookup(ids)) if rank else (lambda: table.update(ids, ones, step=2))
        return {"told": told_us, "same": same, "rows": rows, "back": back, "elsewhere": refused(last)}


def _raise(*_: Any) -> None:
    raise StorageError("the disk is full")


def run_agree(told: dict[str, Any]) -> dict[str, Any]:
    """Open shares, under a configuration each rank has of its own, and push a NaN from rank 0."""
    os.environ["TIERSTORE_TRAINING_NOT_FINITE"] = told["not_finite"]
    try:
        with sharded(told) as (training, own):
            gradients = np.ones((4, DIM), np.float32)
            if told["rank"] == 0:
                gradients[1, 3] = np.nan
            training.table("words").update(np.arange(4), gradients, step=1)
            skipped = own._client.stats()["training_rows_not_finite"]
            return {"rows": everything(training, "words"), "skipped": skipped}
    except TierstoreError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del os.environ["TIERSTORE_TRAINING_NOT_FINITE"]


def run_bench(told: dict[str, Any]) -> dict[str, Any]:
    """What `tierbench train-sharded` has a rank do; then the rows that came of it."""
    work = Workload(ROWS, DIM, 60, 1 << 20, 0)
    with ExitStack() as stack:
        folder = Path(told["folder"])
        train = trainer(folder, work, told["rank"], told["world"], stack)
        found: dict[str, Any] = train(0, 2) | train(2, 2)
        own = stack.enter_context(connect(f"local:{folder / str(told['rank'])}")).training().share(TABLE)
        return {**found, "rows": own.lookup(np.arange(own.spec.rows)).view(np.float32).tolist()}


def run_absent(told: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 does not come."""
    with sharded(told) as (training, _):
        if told["rank"] == 1:
            sys.stdin.readline()
            return {}
        table = training.table("words")
        return {"told": [refused(lambda: table.lookup(np.arange(3))) for _ in range(2)]}


RUNS = (run_train, run_parallel, run_refusals, run_agree, run_bench, run_absent)
SCENARIOS = {f.__name__.removeprefix("run_"): f for f in RUNS}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        told = json.loads(line)
        options = {"rank": told["rank"], "world_size": told["world"]}
        dist.init_process_group("gloo", init_method=f"file://{told['meet']}", **options)
        result = SCENARIOS[told["scenario"]](told)
        print(json.dumps(result), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
