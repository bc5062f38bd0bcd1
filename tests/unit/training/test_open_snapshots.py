"""Steps that clients read: a bounded number, closed when nobody asks for them, never under a reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from engram_client.errors import BadRequest, Overloaded
from engram_client.wire import memory_pb2 as pb
from tierstore.config import Training
from tierstore.rpc.steps import StepReading
from tierstore.training.open_snapshots import OpenSnapshots


class Opened:
    """Stands for a snapshot, and counts how often it is closed."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def steps(clock: Clock) -> OpenSnapshots:
    return OpenSnapshots(2, 10.0, clock)


def opened(steps: OpenSnapshots) -> tuple[int, Any]:
    make: Any = Opened
    return steps.open(make)


def test_no_more_than_allowed(steps: OpenSnapshots) -> None:
    (first, snapshot), _ = opened(steps), opened(steps)
    with pytest.raises(Overloaded, match="2 steps are being read already"):
        opened(steps)
    steps.close(first)
    steps.close(first)
    assert snapshot.closed == 1
    opened(steps)
    with pytest.raises(BadRequest, match="not open any more"), steps.reading(first):
        pass


def test_one_that_could_not_be_opened_takes_no_place(steps: OpenSnapshots) -> None:
    def fail() -> Any:
        raise BadRequest("step 9 is not kept")

    for _ in range(5):
        with pytest.raises(BadRequest, match="step 9"):
            steps.open(fail)
    opened(steps)
    opened(steps)


def test_what_nobody_asks_for_is_closed(steps: OpenSnapshots, clock: Clock) -> None:
    (kept, one), (_, other) = opened(steps), opened(steps)
    clock.now_s = 9.0
    with steps.reading(kept):
        pass
    clock.now_s = 10.5
    assert steps.expire() == 1
    assert (one.closed, other.closed) == (0, 1)
    clock.now_s = 19.5
    opened(steps)
    assert one.closed == 1, "room is made by who opens, too"


def test_never_while_somebody_reads(steps: OpenSnapshots, clock: Clock) -> None:
    number, snapshot = opened(steps)
    with steps.reading(number) as found:
        assert found is snapshot
        clock.now_s = 100.0
        assert steps.expire() == 1
        steps.close(number)
        assert snapshot.closed == 0
        with pytest.raises(BadRequest, match="not open any more"), steps.reading(number):
            pass
    assert snapshot.closed == 1 and steps.expire() == 0
    _, last = opened(steps)
    steps.close_all()
    assert last.closed == 1


def test_a_dead_clients_step_is_closed_though_nobody_else_comes() -> None:
    """Also of one that was gone before its step was open."""
    snapshots: list[Any] = []

    class Store:
        def snapshot(self, _step: int | None) -> Any:
            made: Any = Opened()
            made.step, made.state, made.tables = 1, b"", []
            snapshots.append(made)
            return made

    class Context:
        def peer(self) -> str:
            return "unix:"

    async def gone(work: Callable[[], Any]) -> Any:
        work()
        raise asyncio.CancelledError

    async def scenario() -> None:
        store: Any = Store()
        reading = StepReading(store, Training(snapshots_max=1, snapshot_idle_s=0.01), gone)
        with pytest.raises(asyncio.CancelledError):
            await reading.open(pb.OpenStepRequest(), Context())
        async with asyncio.timeout(30):
            while not snapshots[0].closed:
                await asyncio.sleep(0)
        reading.close()

    asyncio.run(scenario())
    assert snapshots[0].closed == 1
