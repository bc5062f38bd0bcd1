"""What ranks tell each other, one thing after another, each step agreed on by all.

Everything goes through one thread a rank, in the order in which the trainer asked for it: a collective that
runs ahead in the background can so never overtake another, and a prefetch may run while the model computes.
Groups of their own keep it apart from the model's collectives.

A *swap* gives each rank a part of bytes and takes one from each: an all-to-all of headers, then one of the
parts. A header says what the sender is about (its count of swaps, the kind, the table, the step, a check
sum of what must be equal); ranks that are not at the same thing are told so, instead of taking one's rows
for another's gradients. Whoever could not do his part says so in the same swap: then all ranks raise his
error, and none goes on alone.

A rank that is gone or late breaks the exchange for good, as gloo and NCCL do: their groups cannot be used
after a failed collective. Who it was is found by asking everybody for a token over a second group.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engram_client.errors import BY_CODE, DeadlineExceeded, StepConflict, TierstoreError, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_S = 5.0  # for a token, once something has failed: others notice at about the same time
SAME, FAILED, BYTES, TOTAL, WORDS = 5, 5, 6, 7, 8  # of a header; the first SAME words must agree


class Kind(IntEnum):
    """What a swap is about."""

    OPEN = 1
    OPENED = 2
    ASK = 3
    ROWS = 4
    PUSH = 5
    CHECKED = 6
    APPLIED = 7
    CLOSE = 8
    CLOSED = 9
    DURABLE = 10
    ROLLBACK = 11
    ROLLED_BACK = 12


class Exchange:
    """Of the ranks of `group`, which must all make it. `timeout_s` is how long they wait for each other."""

    def __init__(self, group: Any, timeout_s: float) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        options: Any = {"timeout": timedelta(seconds=timeout_s), "use_local_synchronization": bool(group)}
        self._group = dist.new_group(ranks, backend=dist.get_backend(group), **options)
        self._witness = dist.new_group(ranks, backend="gloo", **options)
        self._ranks, self._timeout_s = ranks, timeout_s
        self.world, self.rank = len(ranks), dist.get_rank(self._group)
        nccl = dist.get_backend(self._group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._swaps = 0
        self._broken: TierstoreError | None = None
        self.counters: Counter[str] = Counter()  # see `ShardedTraining.stats`
        self.half_done: dict[int, bytes] = {}  # updates of tables applied here, and not yet on all ranks
        self._closed = False
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engram-exchange", daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], T]) -> Future[T]:
        """Run `do`, which swaps, behind all that was submitted before."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(do())
            except BaseException as error:  # it is the caller's
                result.set_exception(error)

        if self._closed:
            raise Unavailable("this sharded training is closed")
        self._queue.put(run)
        return result

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (run := self._queue.get()) is not None:
            run()

    def close(self) -> None:
        """End what was submitted, then the groups. Every rank must."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        if self._broken is None:
            for group in (self._group, self._witness):
                dist.destroy_process_group(group)

    def swap(
        self,
        kind: Kind,
        parts: Sequence[np.ndarray] | None = None,
        *,
        table: int = 0,
        step: int = 0,
        check: int = 0,
        error: TierstoreError | None = None,
    ) -> tuple[list[np.ndarray], int]:
        """Give part r, uint8 [n], to rank r; what each rank gave to this one, and the bytes of all together.

        Raises the error of the first rank that has one, on every rank; StepConflict where ranks are at
        different things; Unavailable or DeadlineExceeded naming ranks that do not answer, and from then on
        always.
        """
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        parts = parts or [np.zeros(0, np.uint8)] * self.world
        if error is not None:
            parts = [np.frombuffer(f"{error.code}\n{error}".encode(), np.uint8)] * self.world
        self._swaps += 1
        self.counters["sharded_exchanges"] += 1
        total = sum(part.size for part in parts)
        heads = np.empty((self.world, WORDS), np.int64)
        heads[:, : FAILED + 1] = self._swaps, kind, table, step, check, error is not None
        heads[:, BYTES], heads[:, TOTAL] = [part.size for part in parts], total
        even = [WORDS] * self.world
        told = self._all_to_all(heads.reshape(-1), even, even).reshape(self.world, WORDS)
        self._check_same(heads[0], told)
        everything = int(told[:, TOTAL].sum())
        if not everything:
            return list(parts), 0
        sizes = told[:, BYTES].tolist()
        got = self._all_to_all(np.concatenate(parts), [part.size for part in parts], sizes)
        received = np.split(got, np.cumsum(sizes)[:-1])
        for rank in np.flatnonzero(told[:, FAILED]):
            code, _, message = received[rank].tobytes().decode().partition("\n")
            raise BY_CODE.get(code, TierstoreError)(f"rank {rank}: {message}")
        return received, everything

    @contextmanager
    def timed(self, counter: str) -> Iterator[None]:
        """Add what is done meanwhile to a counter of microseconds. In the exchange's thread."""
        before = time.perf_counter_ns()
        try:
            yield
        finally:
            self.counters[counter] += (time.perf_counter_ns() - before) // 1000

    def _check_same(self, mine: np.ndarray, told: np.ndarray) -> None:
        """A rank that is elsewhere is no rank to go on with."""
        for rank, head in enumerate(told):
            if (head[:SAME] != mine[:SAME]).any():
                self._broken = StepConflict(
                    "ranks must read, update and commit in the same order with the same rates: rank "
                    f"{self.rank} is at {_sentence(mine)}, rank {rank} at {_sentence(head)}"
                )
                raise self._broken

    def _all_to_all(self, sent: np.ndarray, sizes: list[int], wanted: list[int]) -> np.ndarray:
        """Stretches of an array [n] to the ranks in order, theirs back."""
        given = torch.from_numpy(sent).to(self._device)
        taken = torch.empty(sum(wanted), dtype=given.dtype, device=self._device)
        started = time.monotonic()
        self.counters["sharded_bytes_sent"] += given.element_size() * (given.numel() - sizes[self.rank])
        try:
            with self.timed("sharded_exchange_us"):
                dist.all_to_all_single(taken, given, wanted, sizes, group=self._group)
                host: np.ndarray = taken.cpu().numpy()
        except RuntimeError as error:
            late = time.monotonic() - started >= 0.9 * self._timeout_s
            missing = self._missing()
            who = (
                f"no answer from rank {', '.join(map(str, missing))}" if missing else "all ranks still answer"
            )
            self._broken = (DeadlineExceeded if late else Unavailable)(
                f"rank {self.rank} of {self.world}: {who} after {time.monotonic() - started:.1f} s; end all "
                f"ranks and start them again: the tables are then at the last step that all have ({error})"
            )
            raise self._broken from error
        return host

    def _missing(self) -> list[int]:
        """Ranks that give no token."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        ends, missing, waited = time.monotonic() + min(GRACE_S, self._timeout_s), [], {}
        tokens: list[Tensor] = []  # kept until all is over
        sends = []
        for rank in others:
            tokens += [torch.zeros(1), torch.zeros(1)]
            try:
                sends.append(dist.isend(tokens[-2], self._ranks[rank], group=self._witness))
                waited[rank] = dist.irecv(tokens[-1], self._ranks[rank], group=self._witness)
            except RuntimeError:
                missing.append(rank)
        for rank, work in waited.items():
            try:
                assert work is not None
                work.wait(timedelta(seconds=max(0.1, ends - time.monotonic())))
            except RuntimeError:
                missing.append(rank)
        return sorted(missing)


def attempt(do: Callable[[], T]) -> tuple[T | None, TierstoreError | None]:
    """Its result, or its error, to be told to the others."""
    try:
        return do(), None
    except TierstoreError as error:
        return None, error
    except Exception as error:  # the others must not wait for it
        log.exception("a rank's part of an exchange failed")
        return None, TierstoreError(f"{type(error).__name__}: {error}")


def _sentence(head: np.ndarray) -> str:
    swaps, kind, table, step, check = head[:SAME].tolist()
    name = Kind(kind).name if kind in set(Kind) else str(kind)
    return f"{name} (exchange {swaps}, table {table}, step {step}, check sum {check:#x})"
