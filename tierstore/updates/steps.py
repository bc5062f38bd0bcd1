"""Which steps can be gone back to, how far folding may go, and the index that lists them."""

from __future__ import annotations

import logging

from engram_client.errors import BadRequest, StorageError
from tierstore.updates.log import UpdateLog
from tierstore.updates.scan import Committed
from tierstore.updates.step_index import StepIndex, StepPlace
from tierstore.updates.superblock import Superblock

log = logging.getLogger(__name__)


class Steps:
    """The log's `changed` is held by whoever calls, where nothing else is said."""

    def __init__(
        self, update_log: UpdateLog, superblock: Superblock, index: StepIndex, indexed: list[int], keep: int
    ) -> None:
        self._log, self._superblock, self._index, self._keep = update_log, superblock, index, keep
        self._indexed = set(indexed)
        self.pins: list[int] = []  # positions that no fold may pass, for snapshots
        self.floor = 0  # what a fold that has begun leaves to go back to
        self.going_back = False  # a rollback is queued and not durable yet: what is kept is not known

    @property
    def last(self) -> Committed | None:
        return self._log.commits[-1] if self._log.commits else None

    def kept(self) -> list[Committed]:
        """What can be gone back to, oldest first."""
        floor = max(self.floor, self._superblock.folded.floor)
        return [c for c in self._log.commits[-self._keep :] if c.start >= floor]

    def find(self, step: int) -> Committed:
        """Raises BadRequest where the step is not kept."""
        kept = self.kept()
        for committed in kept:
            if committed.step == step:
                return committed
        if not kept:
            raise BadRequest(
                "nothing was committed yet, so there is no step to read or to go back to; commit one"
            )
        have = ", ".join(str(c.step) for c in kept)
        raise BadRequest(
            f"step {step} is not kept; steps that can be gone back to: {have} (training.keep_steps = "
            f"{self._keep})"
        )

    def fold_target(self) -> Committed | None:
        """The step that pages can go up to now; None where they are there."""
        kept = self.kept()
        if not kept or self.going_back:
            return None
        most = min([kept[0].start, *self.pins])
        free = [c for c in self._log.commits if self._log.start < c.start <= most]
        return free[-1] if free else None

    def cut(self, first: int, last: int) -> list[int]:
        """Forget commits that start outside of [first, last]; their steps."""
        dropped = [c.step for c in self._log.commits if not first <= c.start <= last]
        self._log.commits = [c for c in self._log.commits if first <= c.start <= last]
        return dropped

    def note(self, committed: Committed) -> None:
        """A commit is durable (`changed` is not held): tell the index."""
        with self._log.changed:
            kept = {c.step for c in self.kept()}
        place = StepPlace(committed.start, committed.end, committed.segment, committed.digest)
        self.change_index({committed.step: place}, sorted(self._indexed - kept))

    def change_index(self, put: dict[int, StepPlace], drop: list[int]) -> None:
        """`changed` is not held. The index may lag: what it does not take is said, and that is all."""
        try:
            self._index.change(put, drop)
            self._indexed = (self._indexed | put.keys()) - set(drop)
        except StorageError as error:
            log.warning("%s; the log holds every commit, opening makes the index again", error)
