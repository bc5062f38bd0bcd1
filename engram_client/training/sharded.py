"""Sharded training: each rank keeps a share of every table's rows in a store of its own.

    dist.init_process_group("gloo")
    client = connect(f"local:shares/{dist.get_rank()}")      # tierstore create --share RANK/WORLD
    training = ShardedTraining(client.training())            # all ranks; at the last step that all have
    words = EngramEmbedding(training.table("words"))         # from here on as with a table of one's own
    rows = EngramOptimizer(training, [words])

A look-up sends each distinct row id to the rank that keeps the row, which reads it and sends it back; an
update sends each distinct row's summed gradient there, where the ranks' sums are added in the order of
ranks, divided by their number (as DDP does with the model's; `average=False` leaves that out) and applied.
So the result is, bit for bit where the world is a power of two, that of one process that takes the ranks'
batches one after another as micro-batches; dividing by another number rounds.

Every call is collective: all ranks make the same calls in the same order, also with nothing to ask or to
say. What fails on one rank raises on all of them. A call's `timeout` in seconds is for its own store; ranks
wait for each other as long as the training's `timeout`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from engram_client.agreement import (
    AS_CREATED,
    check_equal,
    check_shares,
    check_training,
    common_step,
    summary,
    training_of,
)
from engram_client.deadline import TIMEOUT_S_MAX
from engram_client.errors import BadRequest, StepConflict
from engram_client.table import DEFAULT_TIMEOUT_S
from engram_client.trained import COMMIT_TIMEOUT_S, PendingCommit, Training
from engram_client.training.exchange import Exchange, Kind, attempt
from engram_client.training.sharded_table import ShardedTable
from engram_client.transport.training import TrainedDescription

T = TypeVar("T")
PEERS_TIMEOUT_S = 600.0


class ShardedTraining:
    """Every table of which each rank of `group` keeps a share; `Training` to `EngramOptimizer`.

    Made by all ranks at once. Tables are then at the last step that all ranks have committed; `step` names an
    earlier one that all keep. Where nothing was committed, the tables as created are, as step 0. Raises
    BadRequest where shares do not belong together, StepConflict where there is no such step.
    """

    def __init__(
        self,
        training: Training,
        group: Any = None,
        *,
        average: bool = True,
        timeout: float = PEERS_TIMEOUT_S,
        step: int | None = None,
    ) -> None:
        if not 0 < timeout <= TIMEOUT_S_MAX:
            raise BadRequest(f"ranks wait for each other for more than 0 seconds, got timeout={timeout}")
        self._training, self._average = training, average
        self._exchange = Exchange(group, timeout)
        self.rank, self.world = self._exchange.rank, self._exchange.world
        self._last: PendingCommit | None = None
        try:
            self._together(lambda: self._open(step))
        except BaseException:
            self._exchange.close()
            raise

    def _together(self, do: Callable[[], T]) -> T:
        return self._exchange.submit(do).result()

    def _open(self, wanted: int | None) -> None:
        own, error = attempt(self._introduction)
        text = np.frombuffer(json.dumps(own).encode(), np.uint8)
        told, _ = self._exchange.swap(
            Kind.OPEN, [text] * self.world, step=-1 if wanted is None else wanted, error=error
        )
        all_ranks = [json.loads(part.tobytes()) for part in told]
        check_equal([one["tables"] for one in all_ranks])
        self._name = training_of([one["uuids"] for one in all_ranks])
        ranks = [f"rank {rank}" for rank in range(self.world)]
        check_training([one["training"] for one in all_ranks], self._name, ranks)
        step = common_step([one["steps"] or [AS_CREATED] for one in all_ranks], wanted)
        _, error = attempt(lambda: self._go_to(step))
        self._exchange.swap(Kind.OPENED, step=step, error=error)

    def _introduction(self) -> dict[str, Any]:
        tables = self._training.tables()
        check_shares(tables, self.rank, self.world)
        return {
            "tables": summary(tables),
            "uuids": [d.spec.uuid for d in tables.values()],
            "training": next((d.training for d in tables.values()), ""),
            "steps": self._training.steps(),
        }

    def _go_to(self, step: int) -> None:
        """Unless all is as of then already."""
        if not self._training.steps():
            self._training.start_commit(AS_CREATED, training=self._name).wait()
        described = self._training.tables().values()
        if any(d.committed_step != step or (d.updated_step or 0) > step for d in described):
            self._training.rollback(step)

    def tables(self) -> dict[str, TrainedDescription]:
        """Every table, whole: row ids and hash schemes are those of all ranks together."""
        return {name: _whole(description) for name, description in self._training.tables().items()}

    def table(self, name: str) -> ShardedTable:
        """One table, in its present history. Raises UnknownTable. Not collective."""
        share = self._training.share(name)
        number = list(self._training.tables()).index(name)
        return ShardedTable(share, _whole(share.description), number, self._exchange, average=self._average)

    def commit(self, step: int, *, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """Make all tables durable as of `step` on all ranks; returns when they are.

        Where it raises, the step counts once a repetition has succeeded; after a crash it counts if all ranks
        have it.
        """
        self.start_commit(step, timeout=timeout).wait(timeout)

    def start_commit(self, step: int, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> PendingCommit:
        """As `commit`, but returns once all ranks have closed the step. `wait` of the result is collective.

        Waits until all ranks have the commit before on disk: so none is ever two ahead of another.
        """

        def close_step() -> PendingCommit:
            last = self._last
            _, error = attempt(lambda: self._check_commit(last, timeout))
            self._exchange.swap(Kind.CLOSE, step=step, error=error)
            pending, error = attempt(
                lambda: self._training.start_commit(step, timeout=timeout, training=self._name)
            )
            self._last = pending or last
            self._exchange.swap(Kind.CLOSED, step=step, error=error)
            assert pending is not None
            return pending

        pending = self._together(close_step)

        def wait(timeout: float | None) -> None:
            _, error = attempt(lambda: pending.wait(timeout))
            self._together(lambda: self._exchange.swap(Kind.DURABLE, step=step, error=error))

        return PendingCommit(step, wait)

    def _check_commit(self, last: PendingCommit | None, timeout: float | None) -> None:
        if self._exchange.half_done:
            raise StepConflict(
                "an update was applied on some ranks and failed on others; repeat it on all, or roll back to "
                "a committed step"
            )
        if last is not None:
            last.wait(timeout)

    def rollback(self, step: int, *, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """All ranks go back to a step that all keep. Fetch tables anew afterwards."""

        def go_back() -> None:
            kept, error = attempt(self._training.steps)
            if kept is not None and step not in kept:
                error = BadRequest(f"step {step} is not kept; there are: {kept}")
            self._exchange.swap(Kind.ROLLBACK, step=step, error=error)
            _, error = attempt(lambda: self._training.rollback(step, timeout=timeout))
            self._last = None
            self._exchange.half_done.clear()
            self._exchange.swap(Kind.ROLLED_BACK, step=step, error=error)

        self._together(go_back)

    def steps(self) -> list[int]:
        """Durable steps that this rank can go back to, oldest first; another may be one ahead."""
        return self._training.steps()

    def step(self) -> int | None:
        """The last step this rank has committed."""
        return self._training.step()

    def snapshot(self, out: str | os.PathLike[str], *, step: int | None = None) -> Any:
        """Copy this rank's share, as of a committed step (None: the last), into the new folder `out`/RANK.

        When all ranks have, `tierstore export OUT/* ...` and its kin put the tables together, while training
        goes on. Not collective; raises as `Training.snapshot`.
        """
        wanted = self.step() if step is None else step
        if step is None and wanted is not None:
            self._training.wait_durable(wanted)  # its commit may be on its way
        return self._training.snapshot(os.path.join(out, str(self.rank)), step=wanted)

    def stats(self) -> dict[str, int]:
        """What this rank's exchange has done: times that all ranks met, bytes sent to others, microseconds in
        exchanges (with waiting for others), look-ups and updates of this share. Not collective."""
        names = ("exchanges", "bytes_sent", "exchange_us", "lookup_us", "update_us")
        return {name: self._exchange.counters[name] for name in (f"sharded_{n}" for n in names)}

    def close(self) -> None:
        """End the exchange, on all ranks. The client stays."""
        self._exchange.close()


def _whole(description: TrainedDescription) -> TrainedDescription:
    part = description.partition
    assert part is not None
    spec = replace(description.spec, rows=part.rows, scheme=part.scheme)
    return replace(description, spec=spec)
