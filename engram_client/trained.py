"""Tables in training as a trainer sees them: rows to read, gradients to push, steps to commit.

    training = connect("local:DIR").training()
    table = training.table("engram.layer1")
    rows = table.lookup(row_ids)                        # as of any table: bytes; table.dequantize(rows)
    table.update(row_ids, gradients, step=7, learning_rate=1e-3)
    training.commit(7)                                  # all tables, durable when it returns

A table's generation is the history it belongs to: a new one begins when the service opens it and when it is
rolled back. So whoever holds a table from before is refused with GenerationMismatch, instead of training on
with rows that know less than his model.
"""

from __future__ import annotations

import importlib
import operator
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from engram_client.arrays import numbers_to_host, to_host
from engram_client.errors import BadRequest, Unavailable, UnknownTable
from engram_client.kernels.gradients import sum_by_row
from engram_client.prefetch import Prefetcher
from engram_client.table import DEFAULT_TIMEOUT_S, Table
from engram_client.transport.base import Transport
from engram_client.transport.training import (
    GRADIENT_DTYPES,
    OpenStep,
    TrainedDescription,
    TrainingTransport,
    UpdateRequest,
)

STEPS_MAX = 2**63
COMMIT_TIMEOUT_S = 600.0  # of a commit that is waited for: a full queue has to reach the disk first


_UPDATES: WeakKeyDictionary[TrainingTransport, dict[str, int]] = WeakKeyDictionary()
_COUNTING = threading.Lock()


def _count_update(training: TrainingTransport, name: str) -> None:
    with _COUNTING:
        counts = _UPDATES.setdefault(training, {})
        counts[name] = counts.get(name, 0) + 1


class TrainedTable(Table):
    """A table in training; made by `Training.table`. Reads as any table of row ids does. Thread safe.

    `description.optimizer` says how it learns. A look-up gives each row before or after an update, never in
    between, and no older than updates that had returned.
    """

    collective = False  # nobody else must read with it

    def __init__(
        self,
        description: TrainedDescription,
        transport: Transport,
        training: TrainingTransport,
        prefetcher: Prefetcher,
        client: object,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(description.spec, transport, prefetcher, client)
        self.description = description
        self.rank, self.world = rank, world
        self._training = training
        self._trainer = secrets.randbits(32)
        self._pushed = 0  # updates that were applied: so a repeated one can be told from another

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self.spec.embedding_dim

    def update(
        self,
        row_ids: Any,
        gradients: Any,
        *,
        step: int,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Apply gradients [..., dim] to rows [...] by the table's optimizer; returns once that is done.

        Gradients are float32, bfloat16 or float16, arrays or tensors (bfloat16: tensors, or their bits as
        uint16).
        A row that comes several times is updated once, with the sum; -1 is no row. `learning_rate` and
        `weight_decay` None take the table's own. With several trainers all ranks push each step.

        Raises NotFiniteGradient and nothing is applied; StepConflict for a step that was committed or is
        behind; GenerationMismatch; DeadlineExceeded or StorageError, after which the same call goes on where
        it stopped.
        """
        step = checked_step(step)
        learning_rate = _checked_number("learning_rate", learning_rate)
        weight_decay = _checked_number("weight_decay", weight_decay)
        ids, values = check_gradients(self.spec.name, self.dim, row_ids, gradients)
        distinct, sums = sum_by_row(ids, values)
        request = UpdateRequest(
            self.spec.name, self.spec.generation, step, distinct, sums, learning_rate, weight_decay,
            self.rank, self.world, self._push_number(step, distinct, sums),
        )  # fmt: skip
        try:
            self._training.update(request, timeout)
        finally:  # where it failed some rows may have changed all the same
            _count_update(self._training, self.spec.name)
        self._pushed += 1

    @property
    def updates_made(self) -> int:
        """Updates of this table through this client, by whatever object: what was read before may be old."""
        return _UPDATES.get(self._training, {}).get(self.spec.name, 0)

    def _push_number(self, step: int, ids: np.ndarray, gradients: np.ndarray) -> int:
        """The same for the same update, tried again; another one for any other."""
        words = np.ascontiguousarray(gradients).view(np.uint16)
        content = (step, int(np.bitwise_xor.reduce(ids)), ids.size, int(words.sum(dtype=np.int64)))
        return hash((self._trainer, self._pushed, *content)) & (2**63 - 1)


def check_gradients(name: str, dim: int, row_ids: Any, gradients: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row ids int64 [n] and gradients [n, dim] for table `name`, on the host. Raises BadRequest."""
    ids = np.asarray(to_host(row_ids))
    values = numbers_to_host(gradients)
    if ids.dtype not in (np.int64, np.int32):
        raise BadRequest(f"table {name!r}: row ids must be int64 or int32, got {ids.dtype}")
    if values.shape != (*ids.shape, dim):
        raise BadRequest(
            f"table {name!r}: row ids {list(ids.shape)} need gradients of shape {[*ids.shape, dim]}, got "
            f"{list(values.shape)}"
        )
    if values.dtype not in GRADIENT_DTYPES:
        raise BadRequest(f"table {name!r}: gradients are float32, bfloat16 or float16, got {values.dtype}")
    ids = np.ascontiguousarray(ids.reshape(-1), np.int64)
    return ids, np.ascontiguousarray(values.reshape(ids.size, dim))


def checked_step(step: Any) -> int:
    """The number of a step as services take it. Raises BadRequest."""
    try:
        number = operator.index(step)
    except TypeError:
        raise BadRequest(f"a step is a whole number, got {step!r}") from None
    if not 0 <= number < STEPS_MAX:
        raise BadRequest(f"steps are counted from 0 and stay below 2^63, got {number}")
    return number


def _checked_number(what: str, value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise BadRequest(f"{what} is a number, got {value!r}") from None


class PendingCommit:
    """A commit on its way to the disk; training goes on meanwhile."""

    def __init__(self, step: int, wait: Callable[[float | None], None]) -> None:
        self.step = step
        self._wait = wait

    def wait(self, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """Return once the step is durable. Raises StorageError, DeadlineExceeded (it goes on then)."""
        self._wait(timeout)


class Training:
    """Every table in training of a service, and its steps. Made by `Client.training`. Thread safe."""

    def __init__(
        self, transport: Transport, prefetcher: Prefetcher, client: object, rank: int, world: int
    ) -> None:
        if not 0 <= rank < world:
            raise BadRequest(f"rank must be one of 0 to {world - 1} (world is {world}), got {rank}")
        self.rank, self.world = rank, world
        self._transport, self._prefetcher, self._client = transport, prefetcher, client
        self._training = transport.training()

    def tables(self) -> dict[str, TrainedDescription]:
        """Every table in training, by name, as of now."""
        return {d.spec.name: d for d in self._training.describe()}

    def table(self, name: str) -> TrainedTable:
        """One table, in its present history. Raises UnknownTable, BadRequest for a share of one."""
        table = self.share(name)
        if (part := table.description.partition) is not None:
            raise BadRequest(
                f"table {name!r} is share {part.rank} of {part.world} of a larger one; train it with "
                "engram_client.training.ShardedTraining"
            )
        return table

    def share(self, name: str) -> TrainedTable:
        """As `table`; of a share with its own rows, counted as its store does."""
        tables = self.tables()
        if name not in tables:
            known = ", ".join(sorted(tables))
            raise UnknownTable(f"no table {name!r} is in training there; there are: {known}")
        return TrainedTable(
            tables[name],
            self._transport,
            self._training,
            self._prefetcher,
            self._client,
            self.rank,
            self.world,
        )

    def commit(self, step: int, *, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """Make all tables durable as of `step`, together or not at all; returns when they are.

        Raises StepConflict for a step that is not behind the last commit and all updates, StorageError,
        DeadlineExceeded.
        """
        self.start_commit(step, timeout=timeout).wait(timeout)

    def start_commit(
        self, step: int, *, timeout: float | None = DEFAULT_TIMEOUT_S, training: str = ""
    ) -> PendingCommit:
        """As `commit`, but returns once the step is closed; updates from here on belong to later ones.

        `training` is what `ShardedTraining` calls itself: a share keeps with which others it has learned.
        """
        step = checked_step(step)
        self._training.commit(step, timeout, training)
        return PendingCommit(step, lambda timeout: self._training.wait_durable(step, timeout))

    def wait_durable(self, step: int, *, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """Return once a step that was closed is durable. Raises as `PendingCommit.wait`."""
        self._training.wait_durable(checked_step(step), timeout)

    def rollback(self, step: int, *, timeout: float | None = COMMIT_TIMEOUT_S) -> None:
        """Go back to a step of `steps()`. Fetch tables anew afterwards: they have new generations."""
        self._training.rollback(checked_step(step), timeout)

    def steps(self) -> list[int]:
        """Durable steps that can be gone back to, oldest first."""
        return self._training.steps()

    def step(self) -> int | None:
        """The last committed step; None before the first."""
        return next((d.committed_step for d in self._training.describe()), None)

    # What becomes of a step. The service's own code writes the files, here where the client is.

    def open_step(self, step: int | None = None) -> OpenStep:
        """All rows of a step of `steps()` (None: the last), read while training goes on; close it."""
        return self._training.open_step(None if step is None else checked_step(step))

    def export(
        self,
        out: str | os.PathLike[str],
        *,
        step: int | None = None,
        tables: Sequence[str] = (),
        with_optimizer: bool = False,
    ) -> Any:
        """Write a committed step as a checkpoint, into the new folder `out`; see `tierstore export`."""
        with self._rows(step) as (service, rows):
            return service.export_step(rows, out, tables=tables, with_optimizer=with_optimizer)

    def publish(
        self,
        store: str | os.PathLike[str],
        *,
        step: int | None = None,
        tables: Sequence[str] = (),
        name: str | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Make the weights of a committed step a generation that is served; see `tierstore publish`."""
        with self._rows(step) as (service, rows):
            return service.publish_step(rows, store, tables=tables, name=name, dtype=dtype)

    def snapshot(self, out: str | os.PathLike[str], *, step: int | None = None) -> Any:
        """Copy a committed step into a training store of its own, the new folder `out`."""
        with self._rows(step) as (service, rows):
            return service.copy_step(rows, out)

    @contextmanager
    def _rows(self, step: int | None) -> Iterator[tuple[Any, Any]]:
        try:
            service: Any = importlib.import_module("tierstore.snapshots")
        except ImportError as error:
            raise Unavailable(
                f"writing a step needs tierstore in this process: {error}; install it"
            ) from error
        with closing(self.open_step(step)) as opened:
            yield service, service.described(opened)
