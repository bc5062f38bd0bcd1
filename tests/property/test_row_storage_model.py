"""A row storage in step with a dict: whatever is done in whatever order, also closing and power cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.trained import TableModel, random_rows, tables
from tierstore.config import Training
from tierstore.testing.crashing_disk import CrashingDisk
from tierstore.updates import RowStorage

FOLDER = Path("store/training")
SEEDS = st.integers(0, 2**16)
CONFIG = Training(keep_steps=2, segment_bytes=256 << 10, fold_batch_bytes=16 << 10)


class StorageMachine(RuleBasedStateMachine):
    """Every commit is waited for, so what must be there is never in doubt."""

    @initialize()
    def make(self) -> None:
        self.disk = CrashingDisk()
        self.disk.make_folder(FOLDER)
        RowStorage.create(FOLDER, tables(), disk=self.disk)
        self._open()
        self.model = TableModel(self.storage)
        self.step = -1

    def _open(self) -> None:
        self.storage = RowStorage.open(FOLDER, CONFIG, disk=self.disk, background=False)

    @rule(table=st.integers(0, 2), seed=SEEDS, count=st.integers(1, 300))
    def spill(self, table: int, seed: int, count: int) -> None:
        ids, rows = random_rows(np.random.default_rng(seed), self.storage.tables[table], count)
        self.storage.spill(table, ids, rows)
        self.model.write(table, ids, rows)

    @rule(table=st.integers(0, 2), seed=SEEDS, count=st.integers(0, 300))
    def commit(self, table: int, seed: int, count: int) -> None:
        ids, rows = random_rows(np.random.default_rng(seed), self.storage.tables[table], count)
        self.step += 1
        self.model.write(table, ids, rows)
        self.model.commit(self.step)
        self.storage.commit(self.step, [(table, ids, rows)], b"%d" % self.step).wait()

    @rule()
    def write(self) -> None:
        self.storage.write_block()

    @rule(batches=st.integers(1, 6))
    def fold(self, batches: int) -> None:
        for _ in range(batches):
            self.storage.fold_batch()

    @rule(oldest=st.booleans())
    def go_back(self, oldest: bool) -> None:
        kept = self.storage.steps()
        if kept:
            self.step = kept[0] if oldest else kept[-1]
            assert self.storage.rollback(self.step) == b"%d" % self.step
            self.model.go_back(self.step)

    @precondition(lambda self: self.step >= 0)
    @rule()
    def close(self) -> None:
        self.storage.close()
        self._open()
        self._recovered()

    @rule(seed=SEEDS)
    def lose_power(self, seed: int) -> None:
        self.disk.crash(np.random.default_rng(seed))
        self._open()
        self._recovered()

    def _recovered(self) -> None:
        self.model.go_back(self.step if self.step >= 0 else None)
        assert self.storage.step() == (self.step if self.step >= 0 else None)

    @invariant()
    def rows_are_the_model(self) -> None:
        if hasattr(self, "model"):
            self.model.check(self.storage)


TestStorage = StorageMachine.TestCase
TestStorage.settings = settings(max_examples=12, stateful_step_count=25)
