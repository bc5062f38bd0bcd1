"""The open loop on a clock of the test's own: what is due, what is late by whom, which rates are kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tierbench.histogram import merged
from tierbench.open_loop.sweep import KEPT, NOT_GENERATED, SATURATED, Sweep, verdict
from tierbench.open_loop.window import ARRIVALS, CONSTANT, POISSON, Window, due_times, run_window

from engram_client.errors import BadRequest

MS = 1_000_000


class Machine:
    """Time passes only in calls and while waiting; a waiter wakes `lag_ns` late."""

    def __init__(self, call_ns: dict[int, int], usual_ns: int, lag_ns: int = 0) -> None:
        self.now, self._call_ns, self._usual_ns, self._lag_ns = 0, call_ns, usual_ns, lag_ns

    def call(self, number: int) -> None:
        self.now += self._call_ns.get(number, self._usual_ns)

    def wait(self, until_ns: int) -> int:
        assert until_ns > self.now
        self.now = until_ns + self._lag_ns
        return self.now

    def window(self, due_ns: np.ndarray, end_ns: int) -> Window:
        return run_window(self.call, due_ns, end_ns, clock=lambda: self.now, wait=self.wait)


def test_a_stall_is_counted_by_everything_it_holds_up() -> None:
    """One call takes 10 ms at a call a millisecond: a closed loop would see one slow call, here it is ten."""
    due = np.arange(100) * MS
    found = Machine({20: 10 * MS}, usual_ns=MS // 100).window(due, 100 * MS)
    latency_ms = found.latency_ns() / MS
    assert latency_ms[20] == 10
    assert np.allclose(latency_ms[21:30], [9 - 0.99 * i + 0.01 for i in range(9)], atol=0.02)
    assert (latency_ms > 0.5).sum() == 10
    assert np.allclose(np.delete(latency_ms, range(20, 31)), 0.01)
    assert (found.service_ns() > MS).sum() == 1
    assert (found.lag_ns() == 0).all()


def test_lag_is_of_callers_who_had_nothing_to_do() -> None:
    due = np.arange(50) * MS
    found = Machine({10: 5 * MS}, usual_ns=MS // 10, lag_ns=MS // 4).window(due, 50 * MS)
    # calls 11 to 15 waited for call 10, and the first began when it was due: nobody slept
    assert found.lag_ns().size == 50 - 5
    assert set(found.lag_ns()[1:]) == {MS // 4}


def test_calls_that_never_began_have_waited_until_the_end() -> None:
    due = np.arange(10) * MS
    found = Machine({}, usual_ns=4 * MS).window(due, 10 * MS)
    assert found.ended.size == 3
    assert found.latency_ns().tolist() == [4 * MS, 7 * MS, 10 * MS, *((10 - i) * MS for i in range(3, 10))]
    told = found.told(first_ns=2 * MS)
    assert (told["due"], told["done"], told["ended"]) == (8, 0, 2)
    assert told["in_call_ns"] == 12 * MS
    assert merged([told["latency"]]).count == 8


def test_callers_together_make_the_rate() -> None:
    both = np.sort(np.concatenate([due_times(CONSTANT, 1000, 0.5, c, 3, 0) for c in range(3)]))
    assert both.size == 500
    assert set(np.diff(both)) <= {MS - 1, MS, MS + 1}
    drawn = np.sort(np.concatenate([due_times(POISSON, 2000, 5.0, c, 4, seed=3) for c in range(4)]))
    assert drawn.size == pytest.approx(10_000, abs=400)  # four standard deviations
    gaps = np.diff(drawn)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as an exponential's are
    assert (due_times(POISSON, 500, 1.0, 1, 2, 7) == due_times(POISSON, 500, 1.0, 1, 2, 7)).all()
    assert not np.array_equal(due_times(POISSON, 500, 1.0, 0, 2, 7), due_times(POISSON, 500, 1.0, 1, 2, 7))


@pytest.mark.parametrize("kind", ARRIVALS)
def test_more_calls_than_memory_is_set_aside_for_are_refused(kind: str) -> None:
    with pytest.raises(BadRequest, match="shorter window or more clients"):
        due_times(kind, 1e9, 10, 0, 1, 0)


def test_verdicts() -> None:
    assert verdict(1000, 990, 2, 0.1) == KEPT
    assert verdict(100, 96, 4, 0.1) == KEPT  # each of four may have a call on its way
    assert verdict(1000, 900, 2, 0.95) == SATURATED
    assert verdict(1000, 900, 2, 0.3) == NOT_GENERATED  # the callers were busy with something else


def swept(capacity_per_s: float, sweep: Sweep, lost: str = SATURATED) -> dict[str, Any]:
    while rate := sweep.rate:
        said = KEPT if rate <= capacity_per_s else lost
        sweep.note({"offered_per_s": rate, "verdict": said, "processors_busy_share": 0.99})
    return sweep.told()


def test_a_sweep_finds_where_a_service_saturates() -> None:
    told = swept(1000, Sweep(70, 2**0.5, halvings=3, points_max=30))
    rates = [point["offered_per_s"] for point in told["points"]]
    assert rates == sorted(rates)
    assert 1000 / 2 ** (0.5 / 8) <= told["saturation_per_s"] <= 1000
    assert told["saturation_found"]
    assert told["limit"] == "all processors were busy"


def test_a_sweep_that_begins_too_high_comes_down() -> None:
    told = swept(100, Sweep(350, 2, halvings=4, points_max=30))
    assert 50 < told["saturation_per_s"] <= 100


def test_what_was_not_generated_or_not_reached_is_no_saturation() -> None:
    told = swept(1000, Sweep(500, 2, 1, 9), lost=NOT_GENERATED)
    assert not told["saturation_found"]
    assert "could not generate" in told["limit"]
    told = swept(math.inf, Sweep(500, 2, 1, 4))
    assert len(told["points"]) == 4
    assert not told["saturation_found"]
    assert told["saturation_per_s"] == 4000
    assert told["limit"] == "every rate that was tried was kept"
