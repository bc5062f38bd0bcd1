"""Power lost at random moments, on a simulated disk: recovery finds exactly a committed step."""

from __future__ import annotations

import pytest

from tierstore.testing.crashes.simulated import SimulatedRun

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_recovery_is_a_committed_step_whole(seed: int) -> None:
    run = SimulatedRun(seed)
    run.run()
    assert run.crashes >= 4
