"""Which steps there were, and which may come: steps of updates and commits only rise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from engram_client.errors import StepConflict
from tierstore.training.table import TrainedTable
from tierstore.updates import Commit

COMMITS_TIMED = 64  # more are never on their way to the disk


class Steps:
    """Of one store; for whose turn it is, but for `check_update`, which may be asked ahead."""

    def __init__(self, where: str, committed: int | None, *, strict: bool) -> None:
        """`strict`: a step is over once a later one was updated; not so where ranks may be behind others."""
        self._where, self._strict = where, strict
        self.committed = committed
        self.commit: Commit | None = None  # the last one of this opening
        self._updates = self._updates_committed = 0
        self._closed: deque[tuple[int, float]] = deque(maxlen=COMMITS_TIMED)  # the last steps, and when

    def check_update(self, table: TrainedTable, step: int) -> None:
        """Raises StepConflict."""
        if not self._strict:
            return  # a slow rank may be behind a commit
        if self.committed is not None and step <= self.committed:
            raise StepConflict(
                f"table {table.name!r}: an update of step {step}, but step {self.committed} is committed; "
                "roll back first to train it again"
            )
        if table.updated_step is not None and step < table.updated_step:
            raise StepConflict(
                f"table {table.name!r}: an update of step {step} after one of step {table.updated_step}; "
                "steps only rise"
            )

    def check_commit(self, step: int, tables: Iterable[TrainedTable]) -> None:
        """Raises StepConflict."""
        newest = max((t.updated_step for t in tables if t.updated_step is not None), default=-1)
        if self.committed is not None and step <= self.committed:
            raise StepConflict(
                f"{self._where}: commit of step {step}, but step {self.committed} is committed; steps only "
                f"rise, "
                "roll back to go back"
            )
        if self._strict and step < newest:
            raise StepConflict(
                f"{self._where}: commit of step {step}, but rows hold updates of step {newest}; commit step "
                f"{newest} or a later one"
            )

    def repeated(self, step: int) -> Commit | None:
        """The last commit, where it was of this step and nothing was updated since."""
        same = self.commit is not None and self.commit.step == step == self.committed
        return self.commit if same and self._updates == self._updates_committed else None

    def note_update(self) -> None:
        self._updates += 1

    def note_commit(self, commit: Commit, step: int) -> None:
        self.commit, self.committed, self._updates_committed = commit, step, self._updates
        self._closed.append((step, time.monotonic()))

    def age_s(self, step: int) -> float | None:
        """How long ago this step was closed; None where that was before the store was opened."""
        return next((time.monotonic() - closed for s, closed in reversed(self._closed) if s == step), None)

    def go_back(self, step: int) -> None:
        self.committed, self.commit = step, None
