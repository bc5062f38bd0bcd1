"""A committed step taken out of a daemon that trains: as out of a store that nobody has open."""

from __future__ import annotations

import filecmp
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import connect, errors
from tests.support.daemon import Daemon, running, serve_command
from tests.support.trained_steps import DIM, PLAIN, all_rows, made_store
from tierstore.cli import main
from tierstore.snapshots import open_step


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that trains steps 3 onwards of tmp_path / "store"."""
    store = made_store(tmp_path / "store")
    command = serve_command(
        store, serve_unix=tmp_path / "s", serve_tcp="127.0.0.1:0", training_enabled="true",
        training_dram_bytes="512KiB", training_staging_bytes="64KiB", training_keep_steps=100,
        training_snapshots_max=1, dram_budget_bytes="1MiB", nvme_staging_bytes="2MiB",
    )  # fmt: skip
    with running(command, tmp_path) as daemon:
        yield daemon


def everything(store: Path, step: int) -> list[bytes]:
    with open_step(store, step) as rows:
        return [all_rows(rows, number).tobytes() for number in range(len(rows.tables))] + [rows.state]


def test_a_step_is_taken_out_while_the_daemon_trains(training: Daemon, tmp_path: Path) -> None:
    store, stop = tmp_path / "store", threading.Event()

    def train(client: Any) -> int:
        trainer, step = client.training(), 3
        table, rng = trainer.table(PLAIN), np.random.default_rng(1)
        while not stop.is_set() or step < 6:
            table.update(rng.integers(0, 3001, 50), np.ones((50, DIM), np.float32), step=step)
            trainer.commit(step)
            step += 1
        return step

    with connect(training.unix) as client:
        thread = threading.Thread(target=train, args=(client,))
        thread.start()
        try:
            taken = ["--step", "2", "--quiet"]
            assert main(["export", training.unix, str(tmp_path / "out"), "--with-optimizer", *taken]) == 0
            assert main(["snapshot", training.unix, str(tmp_path / "copy"), *taken]) == 0
            served = str(tmp_path / "served")
            assert main(["publish", training.unix, served, "--table", PLAIN, *taken]) == 0
        finally:
            stop.set()
            thread.join()
        last = client.training().step()
        assert last is not None and last >= 5
        client.training().snapshot(tmp_path / "newest")
    assert training.stop() == 0
    assert main(["export", str(store), str(tmp_path / "expected"), "--with-optimizer", *taken]) == 0
    for name in ("model.safetensors", "config.json", "layout.json"):
        assert filecmp.cmp(tmp_path / "out" / name, tmp_path / "expected" / name, shallow=False), name
    assert everything(tmp_path / "copy", 2) == everything(store, 2)
    assert everything(tmp_path / "newest", last) == everything(store, last)
    with connect(f"local:{served}") as client, open_step(store, 2) as rows:
        found = client.table(PLAIN).lookup(np.arange(3001))
        np.testing.assert_array_equal(found, all_rows(rows, 2)[:, : 4 * DIM])


def test_who_may_read_and_how_much(training: Daemon, tmp_path: Path) -> None:
    with connect(training.tcp) as far, pytest.raises(errors.BadRequest, match="unix socket only"):
        far.training().open_step()
    with connect(training.unix) as client:
        trainer = client.training()
        with pytest.raises(errors.BadRequest, match=r"step 7 is not kept; .* 0, 1, 2"):
            trainer.open_step(7)
        with pytest.raises(errors.UnknownTable, match="no table 'none'"):
            trainer.export(tmp_path / "out", tables=["none"])
        opened = trainer.open_step(1)
        with pytest.raises(errors.Overloaded, match="1 steps are being read already"):
            trainer.open_step(2)
        out = np.empty((3, 12 * DIM), np.uint8)
        with pytest.raises(errors.IdOutOfRange, match=r"words: row ids must lie in \[0, 3001\)"):
            opened.read(2, np.array([0, 1, 3001]), out)
        with pytest.raises(errors.BadRequest, match="table 9: the store has 4 tables"):
            opened.touched(9, 0, 10)
        with pytest.raises(errors.BadRequest, match="a smaller one"):
            opened.touched(2, 0, 2**40)
        opened.close()
        with pytest.raises(errors.BadRequest, match="not open any more"):
            opened.read(2, np.arange(3), out)
        trainer.open_step(2).close()
