"""The thread that copies rows into staging memory, against a mailbox whose daemon is the test."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from tierbench.mapped_arena import MappedArena, admit, content, make_arena

from engram_client.arena import copying, requests
from engram_client.arena.mailbox import DONE_AT, PENDING_AT, SLOT_BYTES, SLOTS_AT, RequestMemory
from engram_client.arena.mailbox import ENTRIES as ENTRIES_WORD
from engram_client.arena.mailbox import WITHDRAWN as WITHDRAWN_WORD
from tests.support.stores import eventually
from tierstore.tiers.dram import Arena

RECORD_BYTES = 264
KNOWN = np.arange(1, 60)
STEP, SLOT = 41, 3
UNTOUCHED = 0xEE


@pytest.fixture(scope="module")
def arena() -> Arena:
    arena = make_arena(4096, RECORD_BYTES)
    admit(arena, KNOWN)
    return arena


class Read:
    """One read of keys, int64 [n], in mailbox slot SLOT; the test answers."""

    def __init__(self, client: MappedArena, keys: np.ndarray, room: int = 1 << 20) -> None:
        self.guest, self.keys, self.room = client.guest, keys, room
        self._client = client  # what it has mapped
        self.rows = np.full((keys.size, RECORD_BYTES), UNTOUCHED, np.uint8)
        self.word, self.gone = np.full(1, copying.NOT_THERE, np.int64), np.zeros(1, np.int64)
        self.positions, self._view = np.zeros(keys.size, np.int64), client._words
        self.number = int(self._slot_words[DONE_AT // 8]) + 1

    @property
    def _slot_words(self) -> np.ndarray:
        start = SLOTS_AT + SLOT * SLOT_BYTES
        return self.guest._bytes[start : start + SLOT_BYTES].view(np.int64)

    def words(self, *, asked: bool) -> np.ndarray:
        """Of a job; `asked` where the daemon has its keys already."""
        own = (self.rows, self.word, self.gone, self.positions, self._view, self.keys)
        rows, word, gone, positions, view, keys = (int(a.ctypes.data) for a in own)
        mailbox = self.guest.mailbox
        slot, data = mailbox + SLOTS_AT + SLOT * SLOT_BYTES, mailbox + self.guest.geometry.data_at
        return np.array([
            rows, word, STEP, RECORD_BYTES,
            slot, self.number, gone, data, positions, self.keys.size, int(asked),
            0, self.keys.size if asked else 0, view, keys, 1, self.room,
            mailbox + PENDING_AT, SLOT, self.guest.doorbell,
        ])  # fmt: skip

    @property
    def pending(self) -> int:
        return int(self.guest._bytes[PENDING_AT : PENDING_AT + 8].view(np.int64)[0])

    @property
    def wanted(self) -> np.ndarray:
        """Keys that the daemon was asked for."""
        count = int(self._slot_words[ENTRIES_WORD])
        return self.guest.data(0, 8 * count).view(np.int64).copy()

    @property
    def withdrawn(self) -> bool:
        return bool(self._slot_words[WITHDRAWN_WORD])

    @property
    def done(self) -> int:
        return int(self._slot_words[DONE_AT // 8])

    def take_up(self) -> None:
        """As the daemon does before it answers."""
        self.guest._bytes[PENDING_AT : PENDING_AT + 8].view(np.int64)[0] = 0

    def answer(self, keys: np.ndarray, text: bytes = b"") -> None:
        memory = RequestMemory(keys.size, RECORD_BYTES)
        target = self.guest.data(memory.rows_at, keys.size * RECORD_BYTES)
        target[:] = content(keys, RECORD_BYTES).reshape(-1)
        self.guest.answer(SLOT, self.number, text)


class JobRing:
    """A job ring and the thread that serves it, from `start` on."""

    def __init__(self, many: bool) -> None:
        self.table = np.zeros(copying.HEADER_WORDS + copying.PLACES * copying.JOB_WORDS, np.int64)
        self.address = int(self.table.ctypes.data)
        self.thread = threading.Thread(
            target=copying.copy_until_stopped, args=(self.address, copying.PLACES, many)
        )

    def open(self, place: int, generation: int, state: int, words: np.ndarray) -> None:
        copying.open_job(self.address, place, generation, state, words)

    def state(self, place: int, generation: int = 1) -> int:
        return int(copying.wait_ended(self.address, place, generation, 0, 0))

    def ended(self, place: int, generation: int = 1) -> int:
        """The state once the thread is done with the job."""
        assert eventually(lambda: self.state(place, generation) > copying.WITHDRAWN)
        return self.state(place, generation)

    def stop(self) -> None:
        copying.stop(self.address)
        if self.thread.ident is not None:
            self.thread.join()


@pytest.fixture(params=[True, False], ids=["futex_waitv", "polling"])
def ring(request: pytest.FixtureRequest) -> Iterator[JobRing]:
    made = JobRing(request.param)
    made.thread.start()
    yield made
    made.stop()


def test_hits_are_stamped_and_nobody_is_asked(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([5, -1, 7, 5]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert ring.ended(0) == copying.LANDED
    assert read.word[0] == STEP
    assert np.array_equal(read.rows[[0, 2, 3]], content(read.keys[[0, 2, 3]], RECORD_BYTES))
    assert not read.rows[1].any()
    assert read.pending == 0
    assert read.done == read.number, "its memory is free again"


def test_what_is_missing_is_asked_for_and_put_in_its_place(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([1000, 5, -1, 2000, 7]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert eventually(lambda: read.pending == 1 << SLOT and ring.state(0) == copying.WAITING)
    assert os.eventfd_read(read.guest.doorbell) == 1
    assert read.wanted.tolist() == [1000, 2000]
    assert read.word[0] == copying.NOT_THERE
    assert read.guest.said_counters().tolist() == [1, 5, 1, 2]
    read.answer(read.wanted)
    assert ring.ended(0) == copying.LANDED
    present = [0, 1, 3, 4]
    assert np.array_equal(read.rows[present], content(read.keys[present], RECORD_BYTES))
    assert not read.rows[2].any()
    assert read.word[0] == STEP


def test_what_one_request_has_no_room_for_is_asked_for_by_the_next(arena: Arena, ring: JobRing) -> None:
    keys = np.array([1000, 5, 2000, -1, 3000, 7, 4000, 5000])
    read = Read(MappedArena(arena), keys, room=2)
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    for wanted in ([1000, 2000], [3000, 4000], [5000]):
        assert eventually(lambda: read.pending == 1 << SLOT and ring.state(0) == copying.WAITING)
        assert read.wanted.tolist() == wanted
        assert read.word[0] == copying.NOT_THERE
        read.take_up()
        read.answer(read.wanted)
        read.number += 1
    assert ring.ended(0) == copying.LANDED
    present = keys >= 0
    assert np.array_equal(read.rows[present], content(keys[present], RECORD_BYTES))
    assert not read.rows[~present].any()
    assert read.done == read.number - 1


def test_rows_already_asked_for(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([1000, 2000, 3000]))
    read.positions[:] = 2, 0, 1
    ring.open(0, 1, copying.WAITING, read.words(asked=True))
    read.answer(read.keys)
    assert ring.ended(0) == copying.LANDED
    assert np.array_equal(read.rows[read.positions], content(read.keys, RECORD_BYTES))


@pytest.mark.parametrize("text", [True, False])
def test_failures_and_a_daemon_that_goes_away_leave_no_stamp(arena: Arena, ring: JobRing, text: bool) -> None:
    read = Read(MappedArena(arena), np.array([1000, 5]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert eventually(lambda: ring.state(0) == copying.WAITING)
    if text:
        read.answer(read.wanted, b"unavailable\nno")
    else:
        requests.end_all_waits(read.guest.mailbox, int(read.gone.ctypes.data))
    assert ring.ended(0) == (copying.FAILED if text else copying.GONE)
    assert read.word[0] == copying.NOT_THERE
    assert (read.rows[0] == UNTOUCHED).all()


def test_a_daemon_that_takes_no_more_requests(arena: Arena, ring: JobRing) -> None:
    client = MappedArena(arena)
    client.control[0] = 0
    read = Read(client, KNOWN)
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert ring.ended(0) == copying.GONE
    assert (read.word[0], read.pending) == (copying.NOT_THERE, 0)


def test_one_that_waits_holds_nobody_up(arena: Arena, ring: JobRing) -> None:
    waiting, hits = Read(MappedArena(arena), np.array([1000])), Read(MappedArena(arena), KNOWN)
    ring.open(0, 1, copying.OPEN, waiting.words(asked=False))
    assert eventually(lambda: ring.state(0) == copying.WAITING)
    ring.open(1, 1, copying.OPEN, hits.words(asked=False))
    assert ring.ended(1) == copying.LANDED
    assert ring.state(0) == copying.WAITING
    waiting.answer(waiting.keys)
    assert ring.ended(0) == copying.LANDED


def test_as_many_jobs_as_there_are_places(arena: Arena, ring: JobRing) -> None:
    reads = [Read(MappedArena(arena), np.array([1000 + i, 5])) for i in range(copying.PLACES)]
    for place, read in enumerate(reads):
        ring.open(place, 1, copying.OPEN, read.words(asked=False))
    assert eventually(lambda: all(ring.state(i) == copying.WAITING for i in range(copying.PLACES)))
    for place in reversed(range(copying.PLACES)):
        reads[place].answer(reads[place].wanted)
        assert ring.ended(place) == copying.LANDED
        assert np.array_equal(reads[place].rows, content(reads[place].keys, RECORD_BYTES))


def test_withdrawn_while_the_daemon_reads(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([1000]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert eventually(lambda: ring.state(0) == copying.WAITING)
    assert copying.withdraw(ring.address, 0, 1) == copying.WITHDRAWN
    assert ring.ended(0) == copying.ENDED
    assert read.withdrawn
    read.answer(read.wanted)
    later = Read(MappedArena(arena), KNOWN)
    ring.open(0, 2, copying.OPEN, later.words(asked=False))
    assert ring.ended(0, 2) == copying.LANDED
    assert (read.rows == UNTOUCHED).all()
    assert read.word[0] == copying.NOT_THERE
    assert ring.state(0, 1) == copying.REUSED
    assert copying.withdraw(ring.address, 0, 1) == copying.REUSED


def test_withdrawn_before_the_thread_saw_it(arena: Arena) -> None:
    ring, read = JobRing(True), Read(MappedArena(arena), np.array([1000]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert copying.withdraw(ring.address, 0, 1) == copying.WITHDRAWN
    ring.thread.start()
    assert ring.ended(0) == copying.ENDED
    assert (read.pending, read.done) == (0, read.number)
    assert (read.rows == UNTOUCHED).all()
    ring.stop()


def test_stopping_abandons_what_is_under_way(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([1000]))
    ring.open(0, 1, copying.OPEN, read.words(asked=False))
    assert eventually(lambda: ring.state(0) == copying.WAITING)
    ring.stop()
    assert ring.state(0) == copying.GONE
    assert read.word[0] == copying.NOT_THERE


def test_withdrawing_against_answering(arena: Arena, ring: JobRing) -> None:
    """Whoever comes first: rows and stamp whole, or neither."""
    client, outcomes = MappedArena(arena), set()
    for generation in range(1, 400):
        read = Read(client, np.array([1000 + generation]))
        ring.open(0, generation, copying.WAITING, read.words(asked=True))
        withdrawing = threading.Thread(target=copying.withdraw, args=(ring.address, 0, generation))
        withdrawing.start()
        read.answer(read.keys)
        withdrawing.join()
        outcome = ring.ended(0, generation)
        outcomes.add(outcome)
        if outcome == copying.LANDED:
            assert read.word[0] == STEP
            assert np.array_equal(read.rows, content(read.keys, RECORD_BYTES))
        else:
            assert outcome == copying.ENDED
            assert read.word[0] == copying.NOT_THERE
            assert (read.rows == UNTOUCHED).all()
    assert copying.ENDED in outcomes


def test_who_waits_is_woken(arena: Arena, ring: JobRing) -> None:
    read = Read(MappedArena(arena), np.array([1000]))
    ring.open(0, 1, copying.WAITING, read.words(asked=True))
    scratch, states = np.zeros(2, np.int64), []
    never_ns = 60_000_000_000

    def wait() -> None:
        states.append(copying.wait_ended(ring.address, 0, 1, never_ns, scratch.ctypes.data))

    waiting = threading.Thread(target=wait)
    waiting.start()
    read.answer(read.keys)
    waiting.join(30)
    assert not waiting.is_alive()
    assert ring.ended(0) == copying.LANDED
