"""Handles and the bound on them: what counts, what is given back, and what nobody waits for."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from engram_client.errors import BadRequest, Cancelled, DataCorrupt, DeadlineExceeded, Overloaded
from engram_client.prefetch import Handle, Prefetcher

THREADS, OPEN_MAX = 2, 5
ROWS = np.arange(6, dtype=np.uint8)


class Reads:
    """Look-ups that end when the test says so."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.count = 0

    def read(self) -> np.ndarray:
        self.count += 1
        self.begun.release()
        assert self.go.wait(30)
        return ROWS

    def wait_until_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=30)


@pytest.fixture
def reads() -> Reads:
    return Reads()


@pytest.fixture
def prefetcher(reads: Reads) -> Iterator[Prefetcher]:
    made = Prefetcher(THREADS, OPEN_MAX)
    yield made
    reads.go.set()
    made.close()


def start(prefetcher: Prefetcher, reads: Reads) -> Handle:
    return prefetcher.start(reads.read, lambda rows: rows + 1)


def fill(prefetcher: Prefetcher, reads: Reads) -> list[Handle]:
    """Handles up to the bound, all of them with a read that is running or waits for a thread."""
    handles = [start(prefetcher, reads) for _ in range(OPEN_MAX)]
    reads.wait_until_begun(THREADS)
    with pytest.raises(Overloaded, match=f"{OPEN_MAX} prefetch handles are open.*prefetch_handles_max"):
        start(prefetcher, reads)
    return handles


def test_wait_finishes_the_rows_and_may_be_called_again(prefetcher: Prefetcher, reads: Reads) -> None:
    handle = start(prefetcher, reads)
    assert not handle.done()
    reads.go.set()
    for _ in range(2):
        assert handle.wait(30).tolist() == (ROWS + 1).tolist()
    assert handle.done()


def test_a_wait_that_is_too_short_leaves_the_handle_valid(prefetcher: Prefetcher, reads: Reads) -> None:
    handles = fill(prefetcher, reads)
    for timeout in (0, 0.01):
        with pytest.raises(DeadlineExceeded, match=f"after {timeout:g} s; wait again"):
            handles[0].wait(timeout)
    with pytest.raises(Overloaded):  # it still counts
        start(prefetcher, reads)
    with pytest.raises(BadRequest):
        handles[0].wait(-1)
    reads.go.set()
    assert handles[0].wait(30).tolist() == (ROWS + 1).tolist()


def test_waiting_gives_the_place_back_once(prefetcher: Prefetcher, reads: Reads) -> None:
    handles = fill(prefetcher, reads)
    reads.go.set()
    for _ in range(3):
        handles[0].wait(30)
    handles[0].cancel()
    del handles[0]
    another = start(prefetcher, reads)
    with pytest.raises(Overloaded):
        start(prefetcher, reads)
    assert another.wait(30) is not None


@pytest.mark.parametrize("place", [0, OPEN_MAX - 1])
def test_a_cancelled_handle_gives_its_place_back(prefetcher: Prefetcher, reads: Reads, place: int) -> None:
    """Place 0 has begun, the last one waits for a thread."""
    handles = fill(prefetcher, reads)
    handles[place].cancel()
    handles[place].cancel()
    assert handles[place].done()
    for _ in range(2):
        with pytest.raises(Cancelled):
            handles[place].wait(30)
    handles.append(start(prefetcher, reads))
    with pytest.raises(Overloaded):
        start(prefetcher, reads)
    reads.go.set()
    del handles[place]
    for handle in handles:
        assert handle.wait(30) is not None


@pytest.mark.parametrize("place", [0, OPEN_MAX - 1])
def test_a_dropped_handle_gives_its_place_back(prefetcher: Prefetcher, reads: Reads, place: int) -> None:
    handles = fill(prefetcher, reads)
    del handles[place]
    gc.collect()
    handles.append(start(prefetcher, reads))
    with pytest.raises(Overloaded):
        start(prefetcher, reads)


def test_what_was_given_up_before_it_began_is_never_read_and_keeps_nothing(
    prefetcher: Prefetcher, reads: Reads
) -> None:
    busy = [start(prefetcher, reads) for _ in range(THREADS)]
    reads.wait_until_begun(THREADS)

    class Batch:
        def read(self) -> np.ndarray:
            raise AssertionError("nobody wants this any more")

    kept = []
    for _ in range(1000):
        batch = Batch()
        kept.append(weakref.ref(batch))
        prefetcher.start(batch.read, lambda rows: rows)
        del batch
    gc.collect()
    assert not any(ref() for ref in kept)
    assert not prefetcher._waiting
    reads.go.set()
    for handle in busy:
        handle.wait(30)
    assert reads.count == THREADS


def test_a_failed_read_is_raised_to_who_waits_and_gives_its_place_back(
    prefetcher: Prefetcher, reads: Reads
) -> None:
    def damaged() -> np.ndarray:
        raise DataCorrupt("page 5")

    def too_late() -> np.ndarray:
        raise DeadlineExceeded("the look-up's own")

    def broken() -> np.ndarray:
        raise ZeroDivisionError

    for read, kind, what in (
        (damaged, DataCorrupt, "page 5"),
        (too_late, DeadlineExceeded, "the look-up's own"),
        (broken, ZeroDivisionError, None),
    ):
        handles = [prefetcher.start(read, lambda rows: rows) for _ in range(OPEN_MAX)]
        for handle in handles:
            for _ in range(2):
                with pytest.raises(kind, match=what):
                    handle.wait(30)
    reads.go.set()
    assert start(prefetcher, reads).wait(30) is not None  # the threads live


def test_rows_that_are_there_already_count_as_a_handle_does(prefetcher: Prefetcher) -> None:
    handles = [prefetcher.ready(ROWS) for _ in range(OPEN_MAX)]
    with pytest.raises(Overloaded):
        prefetcher.ready(ROWS)
    assert handles[0].done()
    for _ in range(2):
        assert handles[0].wait(0) is ROWS
    handles[1].cancel()
    with pytest.raises(Cancelled):
        handles[1].wait()
    del handles[2]
    gc.collect()
    handles += [prefetcher.ready(ROWS) for _ in range(3)]
    with pytest.raises(Overloaded):
        prefetcher.ready(ROWS)
    prefetcher.close()
    assert handles[0].wait(0) is ROWS
    with pytest.raises(Cancelled, match="closed"):
        prefetcher.ready(ROWS)


def test_several_reads_run_at_once(prefetcher: Prefetcher) -> None:
    together = threading.Barrier(THREADS)

    def read() -> np.ndarray:
        together.wait(30)
        return ROWS

    for handle in [prefetcher.start(read, lambda rows: rows) for _ in range(2 * THREADS)]:
        assert handle.wait(30).tolist() == ROWS.tolist()


def test_closing_cancels_what_waits_and_finishes_what_runs(reads: Reads) -> None:
    prefetcher = Prefetcher(THREADS, OPEN_MAX)
    handles = fill(prefetcher, reads)
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    for handle in handles[THREADS:]:
        with pytest.raises(Cancelled):
            handle.wait(30)
    assert closing.is_alive()
    reads.go.set()
    closing.join(30)
    for handle in handles[:THREADS]:
        assert handle.wait(0).tolist() == (ROWS + 1).tolist()
    with pytest.raises(Cancelled, match="closed"):
        start(prefetcher, reads)
    prefetcher.close()
    assert reads.count == THREADS


def test_dropping_a_handle_inside_the_lock_does_not_hang(reads: Reads) -> None:
    """The collector may finalize a handle at any allocation, in any thread, also in here."""
    prefetcher = Prefetcher(THREADS, OPEN_MAX)
    reads.go.set()
    held = [start(prefetcher, reads)]

    def drop() -> None:
        with prefetcher._changed:
            held.clear()

    dropping = threading.Thread(target=drop, daemon=True)
    dropping.start()
    dropping.join(20)
    assert not dropping.is_alive()
    assert start(prefetcher, reads).wait(30) is not None
    prefetcher.close()


def test_a_forked_child_prefetches_with_threads_of_its_own(prefetcher: Prefetcher, reads: Reads) -> None:
    handles = fill(prefetcher, reads)
    child = os.fork()
    if child == 0:
        ok = False
        try:
            reads.go.set()
            handles.clear()  # inherited ones count for nothing here
            made = [prefetcher.start(lambda: ROWS, lambda rows: rows) for _ in range(OPEN_MAX)]
            ok = all(handle.wait(10).tolist() == ROWS.tolist() for handle in made)
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    reads.go.set()
    for handle in handles:
        handle.wait(30)
