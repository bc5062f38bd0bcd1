"""Power lost at random moments, on a simulated disk: recovery finds exactly a committed step.

`make crash` runs a thousand of these and sixty kills; here are fewer, and disks that do not do what was
asked, which the same run must notice, or it would prove nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import TierstoreError
from tierstore.testing.crashes.simulated import SimulatedRun, WrongAfterCrash
from tierstore.testing.crashing_disk import CrashingDisk
from tierstore.updates.scan import Committed
from tierstore.updates.steps import Steps

SEEDS = (*range(14), 2078)  # the last lost the journal's name, not the identity's, in making a store
MUTANT_SEEDS = range(40)


def test_every_recovery_is_a_committed_step_whole() -> None:
    crashes = in_flight = copies = 0
    for seed in SEEDS:
        print(f"seed {seed}")
        run = SimulatedRun(seed)
        run.run()
        crashes, in_flight = crashes + run.crashes, in_flight + run.recovered_in_flight
        copies += run.copies
    assert crashes >= 4 * len(SEEDS) and in_flight > 0 and copies > 0


class SyncsNoLog(CrashingDisk):
    def sync(self, fd: int) -> None:
        if self.path_of(fd).suffix != ".seg":
            super().sync(fd)


class WritesNoJournal(CrashingDisk):
    def write(self, fd: int, data: np.ndarray, offset: int) -> None:
        if self.path_of(fd).name != "journal":
            super().write(fd, data, offset)


class SyncsPagesAfterTheSuperblock(CrashingDisk):
    """Pages that were folded are synced when the next fold begins: the superblock goes first."""

    def sync(self, fd: int) -> None:
        if self.path_of(fd).suffix != ".rows" or not self._open[fd][0].synced:
            super().sync(fd)


class SyncsNoNamesOfSegments(CrashingDisk):
    def sync_folder(self, path: Path) -> None:
        if path.name != "log":
            super().sync_folder(path)


@pytest.mark.parametrize(
    "mutant", [SyncsNoLog, WritesNoJournal, SyncsPagesAfterTheSuperblock, SyncsNoNamesOfSegments]
)
def test_a_disk_that_skips_something_is_noticed(mutant: type[CrashingDisk]) -> None:
    for seed in MUTANT_SEEDS:
        try:
            SimulatedRun(seed, mutant).run()
        except (WrongAfterCrash, TierstoreError):
            return
    pytest.fail(f"{mutant.__name__} survived {len(MUTANT_SEEDS)} runs")


def test_folding_past_a_snapshot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Steps.fold_target

    def past_pins(self: Steps) -> Committed | None:
        pins, self.pins = self.pins, []
        try:
            return real(self)
        finally:
            self.pins = pins

    monkeypatch.setattr(Steps, "fold_target", past_pins)
    for seed in MUTANT_SEEDS:
        try:
            SimulatedRun(seed).run()
        except (WrongAfterCrash, TierstoreError):
            return
    pytest.fail(f"a snapshot that keeps nothing survived {len(MUTANT_SEEDS)} runs")
