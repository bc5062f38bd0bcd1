"""Readers beside a trainer, the log's writer and folding: every row is of one step, and never goes back."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from engram_client.spec import Field, RowLayout
from tierstore.config import Training
from tierstore.updates import RowStorage, TrainedSpec
from tierstore.updates.folding import Folding

ROWS, STEPS = 2000, 40
CONFIG = Training(
    keep_steps=1, segment_bytes=256 << 10, queue_bytes=256 << 10, log_bytes_max=2 << 20, fold_bytes=512 << 10,
    fold_batch_bytes=64 << 10,
)  # fmt: skip


def test_a_row_is_read_whole_and_never_older_than_before(tmp_path: Path) -> None:
    layout = RowLayout((Field("weight", "float32", 60),))
    RowStorage.create(tmp_path / "training", [TrainedSpec("t", ROWS, layout)])
    problems: list[str] = []
    done = threading.Event()

    def read(storage: RowStorage, seed: int) -> None:
        random, seen = np.random.default_rng(seed), np.zeros(ROWS, np.int64)
        out = np.zeros((300, 240), np.uint8)
        while not done.is_set():
            ids = random.choice(ROWS, 300, replace=False).astype(np.int64)
            storage.read(0, ids, out)
            if (out != out[:, :1]).any():
                problems.append("a row of two steps")
            if (out[:, 0] < seen[ids]).any():
                problems.append("a row older than before")
            seen[ids] = out[:, 0]

    with RowStorage.open(tmp_path / "training", CONFIG) as storage:
        readers = [threading.Thread(target=read, args=(storage, seed)) for seed in range(2)]
        for reader in readers:
            reader.start()
        random, model = np.random.default_rng(9), np.zeros(ROWS, np.uint8)
        try:
            for step in range(1, STEPS + 1):
                ids = random.choice(ROWS, 600, replace=False).astype(np.int64)
                model[ids] = step
                rows = np.full((600, 240), step, np.uint8)
                storage.spill(0, ids[:200], rows[:200])
                commit = storage.commit(step, [(0, ids[200:], rows[200:])])
            commit.wait(60)
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert not problems, problems[:3]
        assert storage.counters()["folds"] > 0
    with RowStorage.open(tmp_path / "training", CONFIG) as storage:
        out = np.zeros((ROWS, 240), np.uint8)
        storage.read(0, np.arange(ROWS), out)
        assert (out == model[:, None]).all()


def test_the_thread_that_folds_sleeps_while_somebody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the interpreter from whoever folded once: a fold by hand was five times as slow."""
    in_vain: list[str] = []
    step = Folding.step

    def counting(self: Folding) -> bool:
        done = step(self)
        if not done and threading.current_thread() is not threading.main_thread():
            in_vain.append("a turn without a batch")
        return done

    monkeypatch.setattr(Folding, "step", counting)
    layout = RowLayout((Field("weight", "float32", 60),))
    RowStorage.create(tmp_path / "training", [TrainedSpec("t", ROWS, layout)])
    config = Training(keep_steps=1, segment_bytes=256 << 10, fold_batch_bytes=4 << 10)
    with RowStorage.open(tmp_path / "training", config) as storage:
        rows = np.zeros((ROWS, 240), np.uint8)
        for number in range(2):
            storage.commit(number, [(0, np.arange(ROWS), rows)]).wait(60)
        assert storage.fold()
        batches = storage.counters()["folded_pages"]
    assert batches > 100
    assert len(in_vain) <= batches + 2  # once a batch it may come too late for the next one
