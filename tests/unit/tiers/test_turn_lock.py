"""A lock that nobody can take twice while another one waits."""

from __future__ import annotations

import os
import threading

import pytest

from tierstore.tiers.turn_lock import TurnLock


def test_who_waits_comes_before_who_had_it() -> None:
    lock, order = TurnLock(), []

    def wait_for_it() -> None:
        with lock:
            order.append("waited")

    for _ in range(50):
        order.clear()
        thread = threading.Thread(target=wait_for_it)
        with lock:
            thread.start()
            while not lock.somebody_waits:
                os.sched_yield()
        with lock:
            order.append("again")
        thread.join(20)
        assert order == ["waited", "again"]


def test_an_error_inside_lets_go() -> None:
    lock = TurnLock()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    with lock:
        assert not lock.somebody_waits
