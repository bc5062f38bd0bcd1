"""The training store: rows that learn, in DRAM over the update log.

Look-ups take no turn and no lock but the arena's. Updates, commits and rollbacks take turns. A commit writes
back what is dirty, which makes it readable in the log, and closes the step there; training goes on while the
disk gets it. An update that failed in the middle is gone on with when it comes again, and keeps the store
from committing half of it; what nobody can tell the state of (an exception from outside, as Ctrl-C) keeps it
from anything but a rollback.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from engram_client.agreement import check_training
from engram_client.deadline import Deadline
from engram_client.errors import (
    BadRequest,
    GenerationMismatch,
    StepConflict,
    TierstoreError,
    UnknownTable,
)
from engram_client.spec import TableSpec
from engram_client.transport.base import LookupRequest
from engram_client.transport.training import TrainedDescription, UpdateRequest
from tierstore.config import Training
from tierstore.snapshots.state import TrainingState
from tierstore.store.gate import Gate
from tierstore.tiers.trained import TrainedArena
from tierstore.training.arenas import Arenas
from tierstore.training.behind import Behind
from tierstore.training.compiling import compiled_beside
from tierstore.training.counters import TrainingCounters
from tierstore.training.gradients import not_finite, refusal, summed
from tierstore.training.reading import Reading
from tierstore.training.stats import stats_of
from tierstore.training.steps import Steps
from tierstore.training.table import TrainedTable
from tierstore.training.trainers import Contribution, Trainers, merged_rates, total_entries
from tierstore.training.turn import Turn
from tierstore.training.update import Update, Updater
from tierstore.updates import Commit, RowStorage, Snapshot, TrainedSpec

log = logging.getLogger(__name__)
FOLDER = "training"  # of a store directory


class TrainingStore:
    """Every table in training of one directory. Thread safe; `open_training` shares one in a process."""

    def __init__(self, directory: Path, config: Training, storage: RowStorage) -> None:
        """Use `open`. The storage is closed with the store."""
        self.directory, self.config = directory, config
        self._storage = storage
        self.counters = TrainingCounters()
        self._turn = Turn(self.counters)
        self._gate = Gate(f"training store {directory}")
        self._trainers = Trainers(config.world, config.ahead_steps_max, config.pending_bytes_max)
        self._updater = Updater(storage, config.staging_bytes, self.counters)
        self._reading = Reading(storage, config.staging_bytes, self.counters)
        self._unfinished: Update | None = None
        self._uncertain = self._going_back = False
        self._arenas = Arenas(config.dram_bytes, storage.tables)
        self._resizing = Turn(self.counters, "another change of the budget")
        self._tables = {
            spec.name: TrainedTable(spec, number, self._arenas.of(spec.row_bytes))
            for number, spec in enumerate(storage.tables)
        }
        strict = self._trainers.world == 1 or self._trainers.together
        self._steps = Steps(f"training store {directory}", storage.step(), strict=strict)
        self._begin_history(storage.state())
        self._warm_up()
        write_behind = partial(
            self._updater.write_behind, self._turn, self._arenas, lambda: not self._uncertain
        )
        self._behind = Behind(f"writing rows of {directory} back", write_behind)

    @classmethod
    def create(cls, directory: Path | str, tables: Sequence[TrainedSpec]) -> None:
        """Make an empty store of these tables in `directory`/training. Raises BadRequest, StorageError."""
        RowStorage.create(Path(directory) / FOLDER, tables)

    @classmethod
    def open(cls, directory: Path | str, config: Training) -> TrainingStore:
        """At the last committed step. Raises FormatError, StoreLocked, StorageError, DataCorrupt,
        ConfigError."""
        with compiled_beside():
            storage = RowStorage.open(Path(directory) / FOLDER, config)
        try:
            return cls(Path(directory), config, storage)
        except BaseException:
            storage.close()
            raise

    def _begin_history(self, state: bytes) -> None:
        """All tables as a commit had left them, under new generations."""
        found = TrainingState.decode(state)
        self._training = found.training
        history = os.urandom(16)
        for table in self._tables.values():
            table.restore(found.tables.get(table.trained.uuid))
            table.begin_history(history)

    def _warm_up(self) -> None:
        """Load or compile what updates and look-ups call, so that none does so while its caller waits."""
        for table in self._tables.values():
            none = np.zeros(0, np.int64)
            _, gradients = summed([(none, np.zeros((0, table.dim), np.float32))])
            not_finite(gradients)
            scalars = table.recipe.scalars(0.0, 0.0, 1)
            table.recipe.kind.kernel(none, none, gradients, table.places, scalars)
            self._updater.warm_up(table)
            self._reading.fill(table, none, np.zeros((0, table.part[1]), np.uint8), Deadline.after(None))

    def _state(self) -> bytes:
        kept = {t.trained.uuid: t.progress() for t in self._tables.values()}
        return TrainingState(kept, self._training).encode()

    def tables(self) -> dict[str, TableSpec]:
        """What readers see: every table, its layout the weight alone."""
        return {name: table.spec for name, table in self._tables.items()}

    def knows(self, name: str) -> bool:
        """Whether a table of this name is in training here."""
        return name in self._tables

    def describe(self) -> list[TrainedDescription]:
        also = self.config.not_finite, self._training
        return [table.describe(self._steps.committed, *also) for table in self._tables.values()]

    def table(self, name: str) -> TrainedTable:
        """Raises UnknownTable."""
        try:
            return self._tables[name]
        except KeyError:
            known = ", ".join(sorted(self._tables))
            raise UnknownTable(f"no table {name!r} is in training here; there are: {known}") from None

    def arenas(self) -> list[TrainedArena]:
        """Where rows are in DRAM."""
        return list(self._arenas)

    # Reading.

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None = None) -> None:
        """Fill `out`, uint8 C-contiguous, with the weights of row ids, zeros for -1.

        Every row is as some update left it, no older than the last that had returned before. Raises
        BadRequest and its kinds, GenerationMismatch also where tables went back meanwhile, StorageError,
        DataCorrupt, DeadlineExceeded; `out` is undefined then.
        """
        deadline = Deadline.after(timeout_s)
        with self._gate:
            table = self.table(request.table)
            self._check_history(table, request.generation)
            table.check_lookup(request, out)
            if request.ids.size:
                self._reading.fill(table, request.ids, out.reshape(request.ids.size, -1), deadline)
            self._check_history(table, request.generation)

    def _check_history(self, table: TrainedTable, generation: str) -> None:
        """Before and after reading: what was read while tables went back may be of both histories."""
        if self._going_back:
            raise GenerationMismatch(
                f"table {table.name!r} is being rolled back; fetch it anew, and read again"
            )
        table.check_generation(generation)

    # Writing.

    def update(self, request: UpdateRequest, timeout_s: float | None = None) -> None:
        """Apply gradients, or contribute them to what several ranks do together; returns once they are
        applied.

        Raises BadRequest and its kinds (NotFiniteGradient, StepConflict), GenerationMismatch, Overloaded,
        StorageError, DeadlineExceeded. Who repeats a push after an error does not apply it twice.
        """
        deadline = Deadline.after(timeout_s)
        contribution = self.offer(request)
        if contribution is not None:
            try:
                contributions = self._trainers.wait(contribution, deadline)
            except BaseException:  # Ctrl-C, while others are waited for
                self._trainers.withdraw(contribution)
                raise
            if contributions is not None:
                self.apply(contributions, deadline)

    def offer(self, request: UpdateRequest) -> Contribution | None:
        """The part of `update` that never waits. None: there is nothing more to do for this push."""
        self._gate.check()
        table = self.table(request.table)
        table.check_update(request)
        if self._trainers.has_applied(request):
            self.counters.add(pushes_repeated=1)
            return None
        self._steps.check_update(table, request.step)
        if not request.ids.size:  # from afar its rows have no width
            request = replace(request, gradients=np.zeros((0, table.dim), np.float32))
        return self._trainers.offer(request)

    def withdraw(self, contribution: Contribution) -> None:
        """Give up waiting for other ranks; its `ready` raises DeadlineExceeded."""
        self._trainers.withdraw(contribution)

    def apply(self, contributions: Sequence[Contribution], deadline: Deadline) -> None:
        """Apply what `ready` of a contribution gave. Raises as `update`, and tells whoever waits as well."""
        try:
            with self._gate:
                self._apply(contributions, deadline)
        except BaseException as error:
            self._trainers.finished(contributions, error)
            raise
        self._trainers.finished(contributions, None)

    def _apply(self, contributions: Sequence[Contribution], deadline: Deadline) -> None:
        table = self.table(contributions[0].table)
        rate, decay = merged_rates(contributions)
        pushes = [pushed for c in contributions for pushed in c.pushed()]
        ids, gradients = self._finite(table, *summed(pushes))
        step = max(c.step for c in contributions)
        with self._turn.taken(deadline, f"updating table {table.name!r}"):
            for contribution in contributions:
                table.check_generation(contribution.generation)  # tables may have gone back meanwhile
            self._steps.check_update(table, step)
            scalars = table.recipe.scalars(rate, decay, table.steps_with(step))
            numbers = tuple(c.push for c in contributions)
            update = Update(table, step, numbers, ids, gradients, scalars)
            self._resume_or_begin(update, deadline)
            self.counters.add(updates=1, rows_updated=ids.size, gradients=total_entries(contributions))
        if table.arena.crowded_sets:
            self._behind.wake()

    def _finite(
        self, table: TrainedTable, ids: np.ndarray, gradients: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Refuse, or leave out, rows whose gradient is not finite."""
        marks = not_finite(gradients)
        if marks is None:
            return ids, gradients
        self.counters.add(rows_not_finite=marks.sum())
        if self.config.not_finite == "refuse":
            raise refusal(table.name, ids, marks)
        return np.ascontiguousarray(ids[~marks]), np.ascontiguousarray(gradients[~marks])

    def _resume_or_begin(self, update: Update, deadline: Deadline) -> None:
        if self._uncertain or self._unfinished is None or not self._unfinished.is_repeated_by(update):
            self._check_certain()
        else:
            update = self._unfinished
        self._unfinished = update
        try:
            self._updater.apply(update, deadline)
        except TierstoreError:
            if not update.begun:
                self._unfinished = None
            raise
        except BaseException:
            self._uncertain = True
            raise
        self._unfinished = None
        update.table.note_update(update.step)
        self._steps.note_update()

    def _check_certain(self) -> None:
        if self._uncertain:
            raise StepConflict(
                f"training store {self.directory}: an update or rollback was broken off in the middle, and "
                f"nobody knows "
                f"what it "
                "did; roll back to a committed step, or open the store again"
            )
        if self._unfinished is not None:
            raise StepConflict(
                f"training store {self.directory}: the update of table {self._unfinished.table.name!r} at "
                f"step "
                f"{self._unfinished.step} failed half way; repeat it to go on, or roll back to a committed "
                f"step"
            )

    def commit(self, step: int, timeout_s: float | None = None, training: str = "") -> Commit:
        """Close a step over all tables; returns once it is on its way, `wait` of the result once it is
        durable.

        Committing the last committed step again, with no update since, is the same commit. `training`, where
        it is told, must be what earlier commits were told. Raises BadRequest, StepConflict, StorageError,
        DeadlineExceeded.
        """
        deadline = Deadline.after(timeout_s)
        with self._gate, self._turn.taken(deadline, f"committing step {step}"):
            self._check_certain()
            if (repeated := self._steps.repeated(step)) is not None:
                return repeated
            self._steps.check_commit(step, self._tables.values())
            check_training([self._training], training or self._training, [str(self.directory)])
            self._training = training or self._training
            for arena in self._arenas:
                self._updater.write_all_back(arena, deadline)
            commit = self._storage.commit(step, (), self._state(), deadline)
            self._steps.note_commit(commit, step)
            self.counters.add(commits=1)
            return commit

    def rollback(self, step: int, timeout_s: float | None = None) -> None:
        """Go back to a committed step that is kept: durable when it returns. Tables get new generations.

        Raises BadRequest for a step that is not kept, StorageError, DeadlineExceeded.
        """
        deadline = Deadline.after(timeout_s)
        with self._gate, self._turn.taken(deadline, f"rolling back to step {step}"):
            if step not in self._storage.steps():
                raise BadRequest(
                    f"training store {self.directory}: step {step} is not kept; there are: "
                    f"{self._storage.steps()}"
                )
            self._uncertain = self._going_back = True  # until all of it is done
            try:
                state = self._storage.rollback(step, deadline)
                for arena in self._arenas:
                    arena.forget_all()
                self._begin_history(state)
            finally:
                self._going_back = False
            self._steps.go_back(step)
            self._unfinished = None
            self._trainers.reset(GenerationMismatch(f"the tables were rolled back to step {step} meanwhile"))
            self._uncertain = False
            self.counters.add(rollbacks=1)

    def set_dram_budget(self, budget_bytes: int, timeout_s: float | None = None) -> None:
        """Grow or shrink the DRAM of rows in training; returns when memory has followed.

        Dirty rows are written back first, as a commit does, which updates wait for; rows then move while
        training goes on, as far as they fit. Raises ConfigError for a budget below what every row size needs,
        StorageError, Overloaded, DeadlineExceeded: the budget is what it was then, and no row is lost.
        """
        deadline = Deadline.after(timeout_s)
        doing = f"changing the DRAM budget of training store {self.directory}"
        with self._gate, self._resizing.taken(deadline, doing):
            self._arenas.shares(budget_bytes)
            with self._turn.taken(deadline, doing):
                if self._uncertain:
                    self._check_certain()
                for arena in self._arenas:
                    self._updater.write_all_back(arena, deadline)
                replaced = self._arenas.replace(budget_bytes)
            for arena, old in replaced:
                self.counters.add(rows_moved=arena.move_from(old))

    def wait_durable(self, step: int, timeout_s: float | None = None) -> None:
        """Return once `commit(step)` is on the disk. Raises StepConflict where there was none, and as
        `Commit.wait`."""
        commit = self._steps.commit
        if commit is not None and commit.step == step:
            commit.wait(timeout_s)
        elif step not in self._storage.steps():
            raise StepConflict(
                f"training store {self.directory}: step {step} was not committed, or not lately; there are: "
                f"{self._storage.steps()}"
            )

    def step(self) -> int | None:
        """The last committed step."""
        return self._steps.committed

    def steps(self) -> list[int]:
        """Committed steps that are kept, oldest first: durable ones."""
        return self._storage.steps()

    def stats(self) -> dict[str, int]:
        """Counters, and what is there now; README, "Reading the numbers"."""
        now = stats_of(self._storage, self._steps, self._arenas, self.config)
        return {**now, **self.counters.snapshot()}

    def settle(self) -> None:
        """Wait until work in the background is done; for tests and benchmarks."""
        self._behind.settle()
        for arena in self._arenas:
            arena.settle()

    def snapshot(self, step: int | None = None) -> Snapshot:
        """See `RowStorage.snapshot`."""
        with self._gate:
            return self._storage.snapshot(step)

    def close(self) -> None:
        """Wait for whoever is inside and for commits on their way; what was not committed is gone."""
        if self._gate.close():
            self._behind.stop()
            self._trainers.reset(GenerationMismatch(f"training store {self.directory} was closed meanwhile"))
            self._arenas.close()
            self._storage.close()
