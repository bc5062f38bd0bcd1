"""Who reads what: claims, waiters, and a table that never fills with leftovers."""

import threading

import numpy as np
import pytest

from engram_client.deadline import Deadline
from engram_client.errors import DeadlineExceeded
from tierstore.kernels import in_flight as table
from tierstore.store.in_flight import HINT_PATIENCE_S, InFlight, Reader, wait_for


def as_records(keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(keys, np.int64), np.full(len(keys), 256, np.int64)


def test_the_first_claimant_reads_and_the_second_waits():
    flight = InFlight(64)
    with flight.claim(*as_records([1, 2, 3])) as first, flight.claim(*as_records([3, 4])) as second:
        assert first.mine.tolist() == [True, True, True]
        assert second.mine.tolist() == [False, True]
        assert [r.done.is_set() for r in second.others] == [False]
    assert second.others[0].done.is_set()


def test_released_records_can_be_claimed_again():
    flight = InFlight(64)
    for _ in range(3):
        with flight.claim(*as_records([1, 2])) as claim:
            assert claim.mine.all()
            assert not claim.others


def test_same_key_of_another_owner_is_another_record():
    flight = InFlight(64)
    keys, owners = as_records([1])
    with flight.claim(keys, owners), flight.claim(keys, owners + 1) as other:
        assert other.mine.all()


def test_failed_reader_releases_and_wakes():
    flight = InFlight(64)
    waiters = []

    def fail_while_another_waits() -> None:
        with flight.claim(*as_records([1])):
            with flight.claim(*as_records([1])) as waiter:
                waiters.extend(waiter.others)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_another_waits()
    assert [r.done.is_set() for r in waiters] == [True]
    with flight.claim(*as_records([1])) as again:
        assert again.mine.all()


def test_a_signal_while_claiming_leaves_no_entry(monkeypatch):
    flight, real = InFlight(64), table.claim

    def interrupted_claim(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(table, "claim", interrupted_claim)
        with pytest.raises(KeyboardInterrupt):
            flight.claim(*as_records([1, 2])).__enter__()
    with flight.claim(*as_records([1, 2])) as again:
        assert again.mine.all()
        assert not again.others


def test_full_table_lets_records_be_read_without_an_entry():
    flight = InFlight(4)
    with flight.claim(*as_records(list(range(10)))) as first:
        assert first.mine.all()
        with flight.claim(*as_records(list(range(10)))) as second:
            assert second.mine.sum() == 6
    with flight.claim(*as_records(list(range(4)))) as third:
        assert third.mine.all()


def test_waiting_ends_at_the_deadline():
    with pytest.raises(DeadlineExceeded, match="same rows"):
        wait_for((Reader(threading.Event(), hint=False),), Deadline.after(0.01), hint=False)
    with pytest.raises(DeadlineExceeded, match="same rows"):
        wait_for((Reader(threading.Event(), hint=True),), Deadline.after(0.001), hint=False)


def test_a_demand_does_not_wait_long_for_a_hint_but_a_hint_does():
    slow = Reader(threading.Event(), hint=True)
    assert not wait_for((slow,), Deadline.after(None), hint=False)
    with pytest.raises(DeadlineExceeded):
        wait_for((slow,), Deadline.after(2 * HINT_PATIENCE_S), hint=True)
    slow.done.set()
    assert wait_for((slow,), Deadline.after(None), hint=False)


def test_random_claims_against_a_dictionary():
    """The table with its shifting deletion must agree with a plain dictionary at every step."""
    rng = np.random.default_rng(7)
    flight, model, open_claims = InFlight(64), {}, []
    for step in range(2000):
        if open_claims and rng.random() < 0.5:
            context, keys = open_claims.pop(rng.integers(len(open_claims)))
            context.__exit__(None, None, None)
            for key in keys:
                del model[key]
            continue
        if len(model) > 40:
            continue
        keys = np.unique(rng.integers(0, 60, rng.integers(1, 8)))
        context = flight.claim(keys, np.full(keys.size, 512))
        claim = context.__enter__()
        assert claim.mine.tolist() == [int(k) not in model for k in keys], f"step {step}"
        mine = [int(k) for k, m in zip(keys, claim.mine, strict=True) if m]
        model.update(dict.fromkeys(mine, step))
        open_claims.append((context, mine))
