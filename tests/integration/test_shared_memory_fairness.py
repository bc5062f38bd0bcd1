"""What one client, or one user, can take from the others or from itself: places, the door, turns, memory."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from engram_client import connect
from engram_client.arena.mailbox import PENDING_AT, MailboxGeometry
from engram_client.transport import handoff
from engram_client.transport import mailbox as mailboxes
from engram_client.transport.mailbox import KeptRows
from tests.support.daemon import Daemon, running, serve_command
from tests.support.shared_memory import SMALL, attached, grown, mailbox_of
from tests.support.stores import V41, PackedStore, eventually, random_keys
from tierstore.shm.door import UNKNOWN_OF_ONE_USER_MAX
from tierstore.shm.guests import Guest, Guests

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """Connections made meanwhile are those of another user."""
    before = os.geteuid()
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def public(packed: PackedStore, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with four places that every user of the machine may connect to.

    Its sockets lie outside of pytest's folder, which every other run of pytest closes to others again.
    """
    with TemporaryDirectory(prefix="tierstore-") as folder:
        path = Path(folder) / "s"
        with running(
            serve_command(packed.copy_to(tmp_path), serve_unix=path, shm_clients_max=4, **SMALL), tmp_path
        ) as daemon:
            for opened in (path.parent, path, Path(f"{path}.shm")):
                opened.chmod(0o777)
            yield daemon


def at_the_door(daemon: Daemon) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.settimeout(20)
    stranger.connect(daemon.unix.removeprefix("unix:") + handoff.SUFFIX)
    return stranger


@needs_root
def test_another_user_gets_his_share_of_places_and_no_more(
    packed: PackedStore, public: Daemon, reattaching_at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is refused goes by gRPC, says so once however often it asks; the daemon as well."""
    keys = random_keys(packed.oracles[V41], 5)
    with ExitStack() as stack:
        own = [stack.enter_context(connect(public.unix))]
        with as_user(NOBODY), caplog.at_level(logging.WARNING, "engram_client"):
            clients = [stack.enter_context(connect(public.unix)) for _ in range(3)]
            assert [attached(client) for client in clients] == [True, True, False]
            late = clients[-1]
            assert eventually(lambda: late.stats()["shm_clients_refused"] > 2)
            rows = late.table(V41).lookup_ngrams(keys)
            assert np.array_equal(rows, packed.oracles[V41].lookup_ngrams(keys))
            assert not attached(late)
            assert "user 65534 has 2 of 4 places" in caplog.text
            assert caplog.text.count("no shared memory") == 1
        assert public.log.count("gets no shared memory") == 1
        own.append(stack.enter_context(connect(public.unix)))
        assert all(map(attached, own))


@needs_root
def test_silence_at_the_door_keeps_nobody_out(public: Daemon) -> None:
    """One user's silent connections push out one another; others come in meanwhile."""
    with ExitStack() as stack, as_user(NOBODY):
        silent = [stack.enter_context(at_the_door(public)) for _ in range(UNKNOWN_OF_ONE_USER_MAX + 3)]
        assert [connection.recv(1) for connection in silent[:3]] == [b""] * 3
        for connection in silent[3:]:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        with as_user(0), connect(public.unix) as client:
            assert attached(client)


def test_who_says_nothing_is_hung_up_on(public: Daemon) -> None:
    with at_the_door(public) as silent:
        assert silent.recv(1) == b""


def guest(user: int, *slots: int) -> Guest:
    """A client with requests in these slots, which nobody has taken up."""
    made = Guest(socket.socket(), user, MailboxGeometry.of(1 << 12, 1 << 16))
    made._bytes[PENDING_AT : PENDING_AT + 8].view(np.int64)[0] = sum(1 << slot for slot in slots)
    return made


def taken(guests: Guests) -> Guest | None:
    found = guests.take_up(each_max=64)
    return found[0] if found else None


def test_turns_go_on_while_others_come_and_go() -> None:
    """Whoever attaches and leaves again and again does not bring the turn back to the first in the list."""
    greedy, modest, passing = guest(0, *range(8)), guest(0, 3), guest(0)
    guests = Guests()
    for each in (passing, greedy, modest):
        guests.add(each)
    turns = []
    for _ in range(3):
        turns.append(taken(guests))
        guests.remove(passing)
        guests.add(passing)
    assert turns == [greedy, modest, greedy]
    guests.remove(greedy)
    assert taken(guests) is None


def test_many_clients_of_one_user_have_as_many_turns_as_one_of_another() -> None:
    many, single = [guest(1, *range(8)) for _ in range(5)], guest(2, 0, 1, 2)
    guests = Guests()
    for each in (*many, single):
        guests.add(each)
    turns = [taken(guests) for _ in range(8)]
    assert [turn is single for turn in turns[:6]] == [False, True] * 3
    assert len({id(turn) for turn in turns if turn is not single}) == 5, "and these take turns"


def test_kept_rows_leave_room_for_later_requests(packed: PackedStore, roomy: Daemon) -> None:
    """Arrays that live long are copied out once memory is short, never change, and nothing goes by gRPC."""
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys, heads = client.table(V41), random_keys(oracle, 90, seed=300), slice(0, 2)
        expected, before = oracle.lookup_ngrams(keys, heads), client.stats()
        kept = [table.prefetch_ngrams(keys, heads=heads).wait(30) for _ in range(20)]
        inside = [not rows.flags.owndata and isinstance(_memory_of(rows), KeptRows) for rows in kept]
        assert inside[0]
        assert not inside[-1]
        fresh = random_keys(oracle, 300, seed=301)
        assert np.array_equal(table.lookup_ngrams(fresh), oracle.lookup_ngrams(fresh))
        for _ in range(3):
            table.prefetch_ngrams(random_keys(oracle, 100, seed=302), heads=heads).wait(30)
        counted = grown(client, before, "client_results_copied", "client_mailbox_busy")
        assert counted == {"client_results_copied": inside.count(False) + 3, "client_mailbox_busy": 0}
        assert all(np.array_equal(rows, expected) for rows in kept)
        kept.clear()
        assert isinstance(_memory_of(table.prefetch_ngrams(keys, heads=heads).wait(30)), KeptRows), (
            "room again"
        )


def _memory_of(rows: np.ndarray) -> object:
    """What owns the bytes of an array."""
    owner: object = rows
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner


def test_no_room_is_said_once_and_counted(
    packed: PackedStore, roomy: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, mailbox, before = client.table(V41), mailbox_of(client), client.stats()
        mailbox._taken[:] = b"\1" * len(mailbox._taken)
        for seed in (310, 311):
            keys = random_keys(oracle, 5, seed=seed)
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert grown(client, before, "client_mailbox_busy") == {"client_mailbox_busy": 2}
        assert caplog.text.count("no room in the mailbox") == 1


def test_a_look_up_makes_do_with_room_for_one_request(packed: PackedStore, roomy: Daemon) -> None:
    """Its own first part gives the room for the next."""
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, mailbox, before = client.table(V41), mailbox_of(client), client.stats()
        room = len(mailbox._taken) // mailboxes.SHARE
        mailbox._taken[room:] = b"\1" * (len(mailbox._taken) - room)
        keys = random_keys(oracle, 300, seed=320)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert grown(client, before, "client_mailbox_busy") == {"client_mailbox_busy": 0}
