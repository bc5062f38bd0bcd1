"""How several data-parallel trainers update one table: together, step by step, or each on its own, within
bounds.

*Synchronous* (`ahead_steps_max` 0): the contributions of all `world` ranks to a step of a table are
collected, summed in the order of ranks and applied once. So the result is that of one trainer with the ranks'
batches put together, bit for bit the same whichever rank came first. A rank that does not come is an error
for those that wait, at their deadline: they are told who is missing, their contributions are withdrawn, and
nothing is applied.

*Bounded staleness* (k > 0): each contribution is applied when it comes, in whatever order; a rank that would
be more than k steps ahead of the slowest waits until that one has caught up, or for its deadline.

A push has a number, and a push that comes again, because its answer was lost, is not applied again: it waits
with the first, or is answered as that was. Another push of the same rank for the same step is refused where
ranks act together. One rank alone may push to a step as often as it likes.

Everything here is done under one short lock. What is to be applied is handed to one of those who wait.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, DeadlineExceeded, Overloaded, StepConflict
from engram_client.transport.training import UpdateRequest
from tierstore.training.gradients import Pushed

PUSHES_REMEMBERED = 8  # of each rank and table


@dataclass
class Contribution:
    """What one rank brings to one step of one table."""

    table: str
    generation: str
    step: int
    rank: int
    push: int
    learning_rate: float | None
    weight_decay: float | None
    parts: dict[int, Pushed] = field(default_factory=dict)
    # What to apply, for the one who shall; None for those whose contribution was applied by another.
    ready: Future[Sequence[Contribution] | None] = field(default_factory=Future)
    followers: list[Contribution] = field(default_factory=list)  # the same push, come again meanwhile

    @property
    def bytes(self) -> int:
        return sum(ids.nbytes + gradients.nbytes for ids, gradients in self.parts.values())

    def pushed(self) -> list[Pushed]:
        return [self.parts[number] for number in sorted(self.parts)]


@dataclass
class Progress:
    """Of one table."""

    waiting: dict[int, Contribution] = field(default_factory=dict)  # by rank: complete, not applied
    applying: dict[int, Contribution] = field(default_factory=dict)
    arriving: dict[int, Contribution] = field(default_factory=dict)  # parts are missing
    steps: dict[int, int] = field(default_factory=dict)  # of each rank, the last applied
    before: int | None = None  # the step before the first there was
    recent: dict[int, deque[int]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=PUSHES_REMEMBERED))
    )  # pushes applied, by rank

    def all(self) -> list[Contribution]:
        return [*self.waiting.values(), *self.applying.values(), *self.arriving.values()]


class Trainers:
    """The contributions of `world` ranks; thread safe."""

    def __init__(self, world: int, ahead_steps_max: int, pending_bytes_max: int) -> None:
        self.world, self.ahead_steps_max = world, ahead_steps_max
        self._pending_bytes_max = pending_bytes_max
        self._lock = threading.Lock()
        self._tables: dict[str, Progress] = {}

    @property
    def together(self) -> bool:
        """Whether a step is applied once, for all ranks."""
        return self.ahead_steps_max == 0

    def offer(self, request: UpdateRequest) -> Contribution | None:
        """Take a push, or a part of one; None where it was applied before, or parts of it are still missing.

        The caller waits for `ready`, with `wait` or otherwise; applies what it gives and calls `finished`; or
        calls `withdraw`. Raises BadRequest, StepConflict, Overloaded.
        """
        if request.world != self.world or not 0 <= request.rank < self.world:
            raise BadRequest(
                f"this is rank {request.rank} of {request.world}, and the service trains with {self.world} "
                "(training.world); use the same number for both"
            )
        with self._lock:
            progress = self._tables.setdefault(request.table, Progress())
            if request.push in progress.recent[request.rank]:
                return None
            joined = self._same_push(progress, request)
            if joined is not None:
                return joined
            self._check_step(progress, request)
            contribution = self._assembled(progress, request)
            if contribution is None:
                return None
            if progress.before is None:
                progress.before = request.step - 1
            progress.waiting[request.rank] = contribution
            if self.together:
                self._release_together(progress, contribution)
            else:
                self._release_near(progress)
            return contribution

    def has_applied(self, request: UpdateRequest) -> bool:
        """Whether this very push was applied, not long ago."""
        with self._lock:
            progress = self._tables.get(request.table)
            return progress is not None and request.push in progress.recent.get(request.rank, ())

    def _same_push(self, progress: Progress, request: UpdateRequest) -> Contribution | None:
        """Of a push that waits or is being applied already: what follows it."""
        for there in (progress.waiting, progress.applying):
            found = there.get(request.rank)
            if found is not None and found.push == request.push:
                found.followers.append(
                    Contribution(
                        request.table,
                        request.generation,
                        request.step,
                        request.rank,
                        request.push,
                        None,
                        None,
                    )
                )
                return found.followers[-1]
            if found is not None:
                raise StepConflict(
                    f"table {request.table!r}: rank {request.rank} pushes step {request.step} while its push "
                    f"of step {found.step} is not applied yet; wait for that one first"
                )
        return None

    def _check_step(self, progress: Progress, request: UpdateRequest) -> None:
        if self.world == 1:
            return
        rank, step = request.rank, request.step
        last = progress.steps.get(rank)
        if last is not None and step <= last:
            raise StepConflict(
                f"table {request.table!r}: rank {rank} pushes step {step} after its step {last} was "
                f"applied; a "
                "rank contributes once to a step"
            )
        for other in progress.waiting.values() if self.together else ():
            if other.step != step:
                raise StepConflict(
                    f"table {request.table!r}: rank {rank} pushes step {step} while rank {other.rank} waits "
                    f"at "
                    f"step {other.step}; all ranks contribute to one step at a time"
                )

    def _assembled(self, progress: Progress, request: UpdateRequest) -> Contribution | None:
        """The contribution that this part completes."""
        arriving = progress.arriving.get(request.rank)
        if arriving is None or arriving.push != request.push:
            progress.arriving.pop(request.rank, None)  # the rest of it will never come
            arriving = Contribution(
                request.table,
                request.generation,
                request.step, request.rank, request.push, request.learning_rate,
                request.weight_decay,
            )  # fmt: skip
        size = request.ids.nbytes + request.gradients.nbytes
        pending = sum(c.bytes for p in self._tables.values() for c in p.all())
        if pending and pending + size > self._pending_bytes_max:
            raise Overloaded(
                f"table {request.table!r}: {pending} bytes of gradients wait for other parts or ranks; the "
                f"limit "
                f"is {self._pending_bytes_max} (training.pending_bytes_max); push again later"
            )
        arriving.parts[request.part] = (request.ids, request.gradients)
        if len(arriving.parts) < request.parts:
            progress.arriving[request.rank] = arriving
            return None
        progress.arriving.pop(request.rank, None)
        return arriving

    def _release_together(self, progress: Progress, last: Contribution) -> None:
        """Where this contribution was the last one missing, whoever brought it applies all. Under the
        lock."""
        if len(progress.waiting) == self.world:
            progress.applying = dict(sorted(progress.waiting.items()))
            progress.waiting = {}
            last.ready.set_result(tuple(progress.applying.values()))

    def _release_near(self, progress: Progress) -> None:
        """Let go ahead whoever is not too far ahead of the slowest. Under the lock."""
        for rank, contribution in sorted(progress.waiting.items()):
            if contribution.step - self._slowest(progress)[1] <= self.ahead_steps_max:
                progress.applying[rank] = progress.waiting.pop(rank)
                contribution.ready.set_result((contribution,))

    def _slowest(self, progress: Progress) -> tuple[list[int], int]:
        """The ranks that are furthest behind, and their last step."""
        assert progress.before is not None
        steps = {rank: progress.steps.get(rank, progress.before) for rank in range(self.world)}
        least = min(steps.values())
        return [rank for rank, step in steps.items() if step == least], least

    def wait(self, contribution: Contribution, deadline: Deadline) -> Sequence[Contribution] | None:
        """What the caller shall apply, in this order; None where another has applied it.

        Raises what applying raised, or DeadlineExceeded once it is withdrawn.
        """
        try:
            return contribution.ready.result(deadline.remaining_s())
        except FutureTimeout as late:  # or what applying raised, which is raised again
            self.withdraw(contribution, late)
            return contribution.ready.result()

    def withdraw(self, contribution: Contribution, cause: BaseException | None = None) -> None:
        """Give up a contribution that waits for other ranks; one that is being applied is waited for.

        Its `ready` then raises DeadlineExceeded, which names those ranks.
        """
        with self._lock:
            progress = self._tables.get(contribution.table, Progress())
            if progress.waiting.get(contribution.rank) is not contribution:
                return
            del progress.waiting[contribution.rank]
            error = DeadlineExceeded(self._missing(progress, contribution))
            error.__cause__ = cause
            _tell([contribution], error)

    def _missing(self, progress: Progress, contribution: Contribution) -> str:
        where = f"table {contribution.table!r}, step {contribution.step}"
        if self.together:
            here = {contribution.rank, *progress.waiting}
            missing = [rank for rank in range(self.world) if rank not in here]
            return (
                f"{where}: no contribution from rank{'s'[: len(missing) != 1]} {_listed(missing)} in time; "
                "nothing was applied, and this rank's contribution was withdrawn"
            )
        slow, step = self._slowest(progress)
        return (
            f"{where}: rank {contribution.rank} would be more than {self.ahead_steps_max} steps ahead of "
            f"rank{'s'[: len(slow) != 1]} {_listed(slow)} at step {step}; nothing was applied"
        )

    def finished(self, applied: Sequence[Contribution], error: BaseException | None) -> None:
        """What was handed out is applied, or failed: tell the others who waited for it."""
        with self._lock:
            progress = self._tables.get(applied[0].table, Progress())
            for contribution in applied:
                progress.applying.pop(contribution.rank, None)
                if error is None:
                    progress.recent[contribution.rank].append(contribution.push)
                    progress.steps[contribution.rank] = contribution.step
            _tell(applied, error)
            if not self.together and progress.before is not None:
                self._release_near(progress)

    def reset(self, error: BaseException) -> None:
        """Forget all steps: the tables went back. Whoever waits for other ranks gets `error`."""
        with self._lock:
            for progress in self._tables.values():
                _tell(list(progress.waiting.values()), error)
            self._tables = {}


def _tell(contributions: Sequence[Contribution], error: BaseException | None) -> None:
    followers = [follower for contribution in contributions for follower in contribution.followers]
    for contribution in (*contributions, *followers):
        try:
            if error is None:
                contribution.ready.set_result(None)
            else:
                contribution.ready.set_exception(error)
        except InvalidStateError:
            pass  # the one who applied it knows


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def merged_rates(contributions: Sequence[Contribution]) -> tuple[float | None, float | None]:
    """The learning rate and weight decay that all contributions give. Raises StepConflict."""
    first = contributions[0]
    for other in contributions:
        if (other.learning_rate, other.weight_decay) != (first.learning_rate, first.weight_decay):
            raise StepConflict(
                f"table {first.table!r}, step {first.step}: rank {first.rank} gives learning rate "
                f"{first.learning_rate} and weight decay {first.weight_decay}, rank {other.rank} gives "
                f"{other.learning_rate} and {other.weight_decay}; all ranks must give the same"
            )
    return first.learning_rate, first.weight_decay


def total_entries(contributions: Sequence[Contribution]) -> int:
    """Gradients in all of them, duplicates and padding included."""
    return int(np.sum([ids.size for c in contributions for ids, _ in c.parts.values()], dtype=np.int64))
