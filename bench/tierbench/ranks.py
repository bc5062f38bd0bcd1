"""Processes that train one table on the same global batches: one with all rows, or ranks with a share each.

Each is a process of its own with one thread for torch, told over a pipe how many steps to go on. There is no
model: a step reads the rows of a batch, and their gradients come back, so that nothing hides what the
exchange costs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engram_client import connect
from engram_client.errors import Unavailable
from engram_client.training import EngramEmbedding, EngramOptimizer, ShardedTraining
from tierstore.config import Config, Training
from tierstore.training import open_training
from tierstore.training.creating import NewTable, create_training

TABLE, INITIAL_STD, LEARNING_RATE = "rows", 0.02, 1e-3
ZIPF_EXPONENT = 1.2
WARM_STEPS = 5
ANSWER_S = 120.0  # for starting, and for the steps of a window


@dataclass(frozen=True)
class Workload:
    """`batch` row ids a step, of all ranks together, by a Zipf law over the rows."""

    rows: int
    dim: int
    batch: int
    dram_bytes: int  # of all ranks together
    seed: int

    def ids(self, step: int, rank: int, world: int) -> torch.Tensor:
        """The part of a step's batch that falls to a rank: int64 [batch / world]."""
        rng = np.random.default_rng([self.seed, step])
        ranks = rng.zipf(ZIPF_EXPONENT, self.batch)
        return torch.from_numpy(ranks * 2654435761 % self.rows)[rank::world]


class Trainers:
    """`world` processes that train together; a context manager."""

    def __init__(self, folder: Path, work: Workload, world: int) -> None:
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        self.world = world
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=play, args=(theirs, folder, work, rank, world), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._work = work
        self.steps(WARM_STEPS)

    def steps(self, count: int) -> dict[str, float]:
        """Go on for so many steps: rows a second, and what one step took of each rank, on average."""
        for pipe in self._pipes:
            pipe.send(count)
        told = [self._answer(rank) for rank in range(self.world)]
        seconds = max(one["step_us"] for one in told) * count / 1e6
        means = {name: float(np.mean([one[name] for one in told])) for name in told[0]}
        return {"rows_per_s": count * self._work.batch / seconds, **means}

    def _answer(self, rank: int) -> dict[str, float]:
        try:
            if not self._pipes[rank].poll(ANSWER_S):
                raise Unavailable(f"rank {rank} of {self.world} has not answered for {ANSWER_S:.0f} s")
            found: dict[str, float] = self._pipes[rank].recv()
        except EOFError:
            raise Unavailable(f"rank {rank} of {self.world} has ended; what it printed says why") from None
        return found

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


def play(pipe: Connection, folder: Path, work: Workload, rank: int, world: int) -> None:
    """One of the processes: trains on until the pipe is closed."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
        train = trainer(folder, work, rank, world, stack)
        done = 0
        while True:
            try:
                count = pipe.recv()
            except EOFError:
                return
            pipe.send(train(done, count))
            done += count


def trainer(
    folder: Path, work: Workload, rank: int, world: int, stack: ExitStack
) -> Callable[[int, int], dict[str, float]]:
    """Runs `count` steps from a step on, and tells what one took, in microseconds, and sent, in bytes."""
    own, table = folder / str(rank), NewTable(TABLE, work.rows, work.dim)
    share = (rank, world) if world > 1 else None
    create_training(
        own, [table], optimizer="adam", learning_rate=LEARNING_RATE, initial_std=INITIAL_STD, share=share
    )
    _, release = open_training(own, Config(training=Training(dram_bytes=work.dram_bytes // world)))
    stack.callback(release)
    training: Any = stack.enter_context(connect(f"local:{own}")).training()
    if world > 1:
        training = ShardedTraining(training, average=False)  # gradients of the whole batch, as alone
        stack.callback(training.close)
    rows = training.table(TABLE)
    stats = training.stats if world > 1 else _timed(rows)
    embedding = EngramEmbedding(rows)
    optimizer = EngramOptimizer(training, [embedding])

    def train(first: int, count: int) -> dict[str, float]:
        batches = [work.ids(step, rank, world) for step in range(first, first + count)]
        before, started = Counter(stats()), time.perf_counter()
        for ids in batches:
            embedding(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        taken_us = (time.perf_counter() - started) * 1e6
        found = {name: (stats()[name] - before[name]) / count for name in stats()}
        known_us = sum(value for name, value in found.items() if name.endswith("_us"))
        return {"step_us": taken_us / count, "rest_us": taken_us / count - known_us, **found}

    return train


def _timed(table: Any) -> Callable[[], dict[str, int]]:
    """Have look-ups and updates of a whole table counted, as a sharded one counts those of its share."""
    counters: Counter[str] = Counter()

    def counting(do: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = time.perf_counter_ns()
            try:
                return do(*args, **options)
            finally:
                counters[name] += (time.perf_counter_ns() - before) // 1000

        return call

    for method in ("lookup", "update"):
        setattr(table, method, counting(getattr(table, method), f"sharded_{method}_us"))
    return lambda: {name: counters[name] for name in ("sharded_lookup_us", "sharded_update_us")}
