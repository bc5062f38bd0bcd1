"""Staging rings where things go wrong: late reads, steps given up, daemons that go away, forks, leaks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import Client, StagingRing, connect, errors
from engram_client.arena import copying
from engram_client.arena.mailbox import SLOTS
from tests.support.daemon import Daemon, environment, running, serve_command, simulated_command
from tests.support.shared_memory import SMALL, attached, mailbox_of
from tests.support.stores import V41, PackedStore, eventually, random_keys

SIZES = [5, 200]  # V4.1 keys are copied inline to 85 lines, by the copying thread above


@pytest.fixture
def impatient_gil() -> Iterator[None]:
    """No thread but the caller's gets the interpreter, unless he waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def copier_of(client: Client) -> Any:
    return client._transport._copier  # type: ignore[attr-defined]


def stamped(ring: StagingRing, slot: int, step: int, timeout_s: float = 30.0) -> bool:
    """Whether a word comes to be a step's; looks at it alone, as a captured graph does."""
    words, end = ring.words(), time.monotonic() + timeout_s
    while words[slot] != step:
        if time.monotonic() > end:
            return False
    return True


@pytest.mark.parametrize("entries", [*SIZES, 1500])  # more than a mailbox of 8 MiB holds
def test_rows_land_while_the_caller_is_busy(
    packed: PackedStore, obedient: Daemon, entries: int, impatient_gil: None
) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        ring = StagingRing(client.table(V41), entries=entries)
        keys = random_keys(oracle, entries, seed=10, masked=0.1)
        for step, part in enumerate((keys[: entries // 2], keys, keys)):  # missing, mixed, cached
            with ring.start(step, part) as staged:
                assert stamped(ring, staged.slot, step)
                assert np.array_equal(staged.rows(), oracle.lookup_ngrams(part))
        assert not client._prefetcher._threads


@pytest.mark.parametrize("entries", SIZES)
def test_late_rows_are_not_there_and_land_later(packed: PackedStore, obedient: Daemon, entries: int) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        ring = StagingRing(client.table(V41), entries=entries)
        known, keys = (random_keys(oracle, entries, seed=seed) for seed in (20, 21))
        with ring.start(1, known) as staged:
            staged.wait(30)
        obedient.ask("hold")
        mixed = np.concatenate([known[: entries // 2], keys])[:entries]
        late = ring.start(2, mixed)
        obedient.ask("wait 1")
        for timeout in (0, 0.01):
            with pytest.raises(errors.DeadlineExceeded, match=r"step 2 \(slot 1\) were not there"):
                late.wait(timeout)
        assert not late.done()
        assert ring.words()[1] == copying.NOT_THERE
        with ring.start(3, known) as staged:
            staged.wait(30)
            assert np.array_equal(staged.rows(), oracle.lookup_ngrams(known)), "nobody is held up"
        obedient.ask("release")
        assert stamped(ring, 1, 2)
        assert np.array_equal(late.rows(), oracle.lookup_ngrams(mixed))
        late.wait(0)
        assert late.done()


@pytest.mark.parametrize("entries", SIZES)
def test_a_slot_used_again_never_gets_the_old_rows(
    packed: PackedStore, obedient: Daemon, entries: int
) -> None:
    """The daemon still reads for a step that was given up, when its slot is given to the next ones."""
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        table, mailbox = client.table(V41), mailbox_of(client)
        ring = StagingRing(table, entries=entries, slots=1)
        old, new, last = (random_keys(oracle, entries, seed=seed) for seed in (30, 31, 32))
        table.lookup_ngrams(new)
        obedient.ask("hold")
        given_up = ring.start(1, old)
        obedient.ask("wait 1")
        given_up.release()
        with pytest.raises(errors.Cancelled, match="step 1"):
            given_up.wait(0)
        with ring.start(2, new) as staged:  # all hits
            staged.wait(30)
        late = ring.start(3, last)
        del given_up
        assert not late.done()
        obedient.ask("release")
        seen = set()

        def landed() -> bool:
            seen.add(int(ring.words()[0]))
            return late.done()

        assert eventually(landed)
        assert seen <= {copying.NOT_THERE, 3}
        assert np.array_equal(late.rows(), oracle.lookup_ngrams(last))
        rows = late.rows().copy()
        table.lookup_ngrams(old)  # so the old read has ended too
        assert np.array_equal(ring.rows()[0], rows)
        assert ring.words()[0] == 3
        late.release()
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        copier_of(client).take_back(wait=True)
        mailbox._reap()
        assert not any(mailbox._taken)
        assert len(mailbox._free_slots) == SLOTS
        assert not copier_of(client)._jobs


@pytest.mark.parametrize("entries", SIZES)
def test_a_read_that_takes_too_long_is_never_stamped(
    packed: PackedStore, obedient: Daemon, entries: int
) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, entries, seed=40)
        ring = StagingRing(table, entries=entries, timeout_s=0.05)
        obedient.ask("hold")
        with ring.start(1, keys) as staged:
            for _ in range(2):
                with pytest.raises(errors.DeadlineExceeded):
                    staged.wait(30)
            obedient.ask("release")
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
            assert ring.words()[0] == copying.NOT_THERE


@pytest.mark.parametrize("entries", SIZES)
def test_a_daemon_that_is_killed_and_comes_back(
    packed: PackedStore, tmp_path: Path, reattaching_at_once: None, entries: int
) -> None:
    """Words stay unstamped; who waits has the rows looked up by the new daemon; addresses stay."""
    folder, oracle, path = packed.copy_to(tmp_path), packed.oracles[V41], tmp_path / "s"
    keys = [random_keys(oracle, entries, seed=50 + i) for i in range(5)]
    with running(simulated_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        ring = StagingRing(client.table(V41), entries=entries, slots=3)
        addresses = ring.rows().ctypes.data, ring.words().ctypes.data
        daemon.ask("hold")
        waiting, impatient, given_up = (ring.start(step, keys[step]) for step in range(3))
        daemon.ask("wait 1")
        daemon.kill()
    assert eventually(lambda: not attached(client))
    assert eventually(waiting.done)
    assert (ring.words() == copying.NOT_THERE).all()
    given_up.release()
    with pytest.raises(errors.Unavailable):
        impatient.wait(30)
    with running(serve_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        assert eventually(lambda: attached(client))
        waiting.wait(30)
        assert ring.words().tolist() == [0, copying.NOT_THERE, copying.NOT_THERE]
        assert np.array_equal(waiting.rows(), oracle.lookup_ngrams(keys[0]))
        with pytest.raises(errors.Unavailable):
            impatient.wait(0)
        for staged in (waiting, impatient):
            staged.release()
        for step in (3, 4, 5):
            with ring.start(step, keys[4]) as staged:
                staged.wait(30)
                assert np.array_equal(staged.rows(), oracle.lookup_ngrams(keys[4]))
        assert addresses == (ring.rows().ctypes.data, ring.words().ctypes.data)
        client.close()


def test_no_room_in_the_mailbox_or_the_job_ring(
    packed: PackedStore, obedient: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of Python reads then."""
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        ring = StagingRing(client.table(V41), entries=200)
        mailbox, copier = mailbox_of(client), copier_of(client)

        def read(step: int, count: int) -> None:
            keys = random_keys(oracle, count, seed=60 + step)
            with ring.start(step, keys) as staged:
                staged.wait(30)
                assert np.array_equal(staged.rows(), oracle.lookup_ngrams(keys))

        with monkeypatch.context() as patched:
            patched.setattr(copier, "_jobs", dict.fromkeys(range(copying.PLACES)))
            patched.setattr(copier, "_take_back", lambda: None)
            read(1, 5)
            read(2, 200)
        assert len(client._prefetcher._threads) > 0
        with monkeypatch.context() as patched:
            patched.setattr(mailbox, "_free_slots", [])
            read(3, 5)
            read(4, 200)
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        mailbox._reap()
        assert not any(mailbox._taken)


def test_a_thousand_rings_leave_nothing_behind(roomy: Daemon) -> None:
    """In a process of its own, where nothing else comes and goes."""
    script = (
        "import sys; from tests.integration.test_staging_faults import make_rings; make_rings(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, roomy.unix]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def make_rings(address: str) -> None:
    """A thousand and twenty rings; asserts that the last thousand leave nothing."""

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    keys = np.arange(270).reshape(90, 3)
    with connect(address) as client:
        table, copier = client.table(V41), copier_of(client)

        def make_and_drop(step: int) -> None:
            ring = StagingRing(table, entries=90)
            staged = [ring.start(step + i, keys[: (3, 90)[i]]) for i in range(2)]
            if step % 3:
                staged[1].wait(30)
            if step % 2:
                staged[0].release()

        for step in range(20):
            make_and_drop(step)
        copier.take_back(wait=True)
        before = maps(), len(os.listdir("/proc/self/fd")), threading.active_count()
        for step in range(1000):
            make_and_drop(step)

        def as_before() -> bool:
            copier.take_back(wait=True)
            return not copier._jobs

        assert eventually(as_before)
        assert maps() <= before[0] + 8
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before[1:]
    assert not copier._thread.is_alive()


FORK = """
import os, signal, sys
import numpy as np
from engram_client import StagingRing, connect, errors

with connect(sys.argv[1]) as client:
    table = client.table("v41")
    ring = StagingRing(table, entries=200)
    keys = np.arange(600).reshape(200, 3)
    with ring.start(0, keys) as staged:
        staged.wait(30)
        rows = staged.rows().copy()
    held = ring.start(1, keys + 1)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            ring.start(2, keys)
            os._exit(2)
        except errors.BadRequest as error:
            assert "fork" in str(error)
        try:
            held.wait()
            os._exit(4)
        except errors.Cancelled:
            held.release()
        del held
        own = StagingRing(table, entries=200)
        for step in range(4):
            with own.start(step, keys) as staged:
                staged.wait(30)
                if not np.array_equal(staged.rows(), rows):
                    os._exit(3)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child"
    held.wait(30)
    assert ring.words()[1] == 1
    assert np.array_equal(held.rows(), table.lookup_ngrams(keys + 1))
    held.release()
    with ring.start(2, keys) as staged:
        staged.wait(30)
        assert np.array_equal(staged.rows(), rows)
"""


def test_a_forked_child_makes_a_ring_of_its_own(roomy: Daemon) -> None:
    command = [sys.executable, "-c", FORK, roomy.unix]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=90)
    assert done.returncode == 0, done.stderr
