"""Training through a daemon: one trainer, and two in processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import connect, errors
from engram_client.kernels.gradients import sum_by_row
from tests.support.daemon import Daemon, environment, running, serve_command
from tierstore.cli import main

ROWS, DIM, STEPS = 3000, 8, 6
SMALL = {"training_dram_bytes": "256KiB", "training_staging_bytes": "64KiB", "nvme_staging_bytes": "2MiB"}
RANK = f"""
import json, sys
import numpy as np
from engram_client import connect
target, rank, world, first, steps = sys.argv[1], *map(int, sys.argv[2:])
with connect(target, wait_s=60) as client:
    training = client.training(rank=rank, world=world)
    table = training.table("words")
    for step in range(first, first + steps):
        rng = np.random.default_rng([rank, step])
        ids = rng.integers(0, {ROWS}, 500)
        table.lookup(ids)
        table.update(ids, rng.standard_normal((500, {DIM})).astype(np.float32), step=step, timeout=60)
    print(json.dumps(client.stats()["training_updates"]))
"""


def create(folder: Path) -> Path:
    store = folder / "store"
    arguments = ["create", str(store), "--table", f"words:{ROWS}:{DIM}", "--table", f"more:{ROWS}:{DIM}"]
    assert main([*arguments, "--learning-rate", "0.01", "--initial-std", "0.1", "--json"]) == 0
    with connect(f"local:{store}") as client:
        client.training()  # compiles kernels where they are not yet, which may take a daemon too long
    return store


def daemon_of(store: Path, **settings: Any) -> Any:
    options = {"serve_unix": store / "socket", "training_enabled": "true", "dram_budget_bytes": "1MiB"}
    return running(serve_command(store, **options, **SMALL, **settings), store)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    store = create(tmp_path_factory.mktemp("alone"))
    with daemon_of(store, serve_tcp="127.0.0.1:0") as daemon:
        yield daemon


def everything(client: Any, name: str = "words") -> np.ndarray:
    return client.table(name).lookup(np.arange(ROWS)).view(np.float32)


def gradients(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, step])
    return rng.integers(0, ROWS, 500), rng.standard_normal((500, DIM)).astype(np.float32)


def run_rank(target: str, rank: int, world: int, first: int, steps: int) -> subprocess.Popen[str]:
    numbers = map(str, (rank, world, first, steps))
    return subprocess.Popen(
        [sys.executable, "-c", RANK, target, *numbers], stdout=subprocess.PIPE, text=True, env=environment()
    )


def test_a_table_is_trained_from_afar_as_it_is_here(alone: Daemon, tmp_path: Path) -> None:
    with connect(alone.unix) as client, connect(f"local:{create(tmp_path)}") as here:
        remote, local = client.training(), here.training()
        assert list(remote.tables()) == ["words", "more"]
        tables = remote.table("words"), local.table("words")
        for name in ("generation", "uuid"):
            assert getattr(tables[0].spec, name) != getattr(tables[1].spec, name)
        tables[0]._training._part_bytes = 1 << 12  # so that pushes come in parts
        np.testing.assert_array_equal(everything(client), everything(here))
        for step in range(STEPS):
            for table in tables:
                table.update(*gradients(0, step), step=step, learning_rate=0.02)
        np.testing.assert_array_equal(everything(client), everything(here))
        remote.commit(STEPS - 1)
        assert remote.steps() == [STEPS - 1]
        with connect(alone.tcp) as other:
            np.testing.assert_array_equal(everything(other), everything(client))
            assert other.stats()["training_commits"] == 1


def test_errors_arrive_as_they_are(alone: Daemon) -> None:
    with connect(alone.unix) as client:
        training = client.training()
        table = training.table("more")
        ids, values = gradients(0, 0)
        values[3, 0] = np.inf
        with pytest.raises(errors.NotFiniteGradient, match=f"row {ids[3]} is not finite"):
            table.update(ids, values, step=100)
        with pytest.raises(errors.BadRequest, match=r"shape \[500, 8\], got \[500, 7\]"):
            table.update(ids, values[:, :7], step=100)
        with pytest.raises(errors.UnknownTable, match="no table 'none' is in training"):
            training.table("none")
        with pytest.raises(errors.BadRequest, match=r"training\.world"):
            client.training(rank=1, world=2).table("more").update(*gradients(0, 0), step=100)
        with pytest.raises(errors.BadRequest, match="step 77 is not kept"):
            training.rollback(77)
        values = np.ones_like(values)
        for wrong in ({"step": "7"}, {"step": 2**63}, {"step": -1}, {"learning_rate": "x"}):
            with pytest.raises(errors.BadRequest, match=r"whole number|counted from 0|is a number"):
                table.update(ids, values, **{"step": 100, **wrong})
        for call in (training.commit, training.rollback, training.open_step):
            with pytest.raises(errors.BadRequest, match=r"stay below 2\^63, got 9223372036854775808"):
                call(2**63)
        training.commit(200)
        training.rollback(200)
        with pytest.raises(errors.GenerationMismatch, match="rolled back"):
            table.update(*gradients(0, 0), step=201)
        with pytest.raises(errors.StepConflict, match="step 200 is committed"):
            training.table("more").update(*gradients(0, 0), step=200)


def test_the_operator_sees_how_it_does(alone: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    with connect(alone.unix) as client, closing(client.training().open_step()):
        step = client.training().step()
        capsys.readouterr()
        assert main(["stats", alone.unix]) == 0
        told = capsys.readouterr().out
        for line in (
            rf"training, step {step} committed \d+\.\d s ago; \d+ updates, \d+ commits",
            r"  \d+\.\d % of rows read and \d+\.\d % of rows updated found there; \d+ written back",
            r"  log: [\d.]+ .iB of at most 8\.00 GiB, 0 B of at most 256 MiB queued; 0 folds of 0 pages",
            r"  steps open to be read, which holds up folding: 1",
        ):
            assert re.search(rf"^{line}$", told, re.M), told
        assert main(["stats", alone.unix, "--json"]) == 0
        stats = json.loads(capsys.readouterr().out)
    assert stats["training_committed_step"] == step
    assert 0 <= stats["training_commit_age_ms"] < 600_000
    assert 0 < stats["training_log_bytes"] < stats["training_log_bytes_max"]
    assert stats["training_folding"] == stats["training_fold_failing"] == 0


def test_its_budget_changes_while_it_trains(alone: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["config", "--connect", alone.unix, "--json", "--set"]
    capsys.readouterr()
    assert main([*arguments, "training.dram_bytes=512KiB"]) == 0
    assert json.loads(capsys.readouterr().out) == {"training.dram_bytes": 512 << 10}
    with connect(alone.unix) as client:
        table = client.training().table("more")
        step = (client.training().step() or 0) + 1
        before = everything(client, "more")
        table.update(np.arange(ROWS), np.ones((ROWS, DIM), np.float32), step=step, learning_rate=0.0)
        assert client.set_training_budget(192 << 10, timeout=30) == 192 << 10
        assert client.stats()["training_dram_bytes"] == 192 << 10
        np.testing.assert_array_equal(everything(client, "more"), before)
        refusals = [(8192, errors.ConfigError, "expected at least"), (1 << 50, errors.ConfigError, "memory"),
                    (-1, errors.ConfigError, "whole number of bytes")]  # fmt: skip
        for budget, error, told in refusals:
            with pytest.raises(error, match=told):
                client.set_training_budget(budget)
        with connect(alone.tcp) as other, pytest.raises(errors.BadRequest, match="unix socket only"):
            other.set_training_budget(1 << 20)


def test_two_processes_train_together_as_one_does(tmp_path: Path) -> None:
    store = create(tmp_path)
    with daemon_of(store, training_world=2) as daemon, connect(daemon.unix, wait_s=60) as client:
        before = everything(client)
        with pytest.raises(errors.DeadlineExceeded, match="no contribution from rank 1 in time"):
            client.training(rank=0, world=2).table("words").update(*gradients(0, 0), step=0, timeout=0.2)
        np.testing.assert_array_equal(everything(client), before)
        ranks = [run_rank(daemon.unix, rank, 2, 0, STEPS) for rank in (1, 0)]
        for rank in ranks:
            out, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0
            assert json.loads(out) >= STEPS - 1
        client.training(rank=0, world=2).commit(STEPS - 1)
        trained = everything(client)
        assert daemon.stop() == 0
    with daemon_of(store, training_world=1) as daemon, connect(daemon.unix, wait_s=60) as client:
        np.testing.assert_array_equal(everything(client), trained)
    alone = create(tmp_path / "alone")
    with connect(f"local:{alone}") as here:
        table = here.training().table("words")
        for step in range(STEPS):
            parts = [sum_by_row(*gradients(rank, step)) for rank in range(2)]  # as each rank does
            ids, values = (np.concatenate([p[i] for p in parts]) for i in range(2))
            table.update(ids, values, step=step)
        np.testing.assert_array_equal(everything(here), trained)


def test_two_processes_train_within_bounds(tmp_path: Path) -> None:
    store = create(tmp_path)
    settings = {"training_world": 2, "training_ahead_steps_max": 3}
    with daemon_of(store, **settings) as daemon, connect(daemon.unix, wait_s=60) as client:
        table = client.training(rank=0, world=2).table("words")
        for step in range(3):
            table.update(*gradients(0, step), step=step)
        with pytest.raises(errors.DeadlineExceeded, match="ahead of rank 1 at step -1"):
            table.update(*gradients(0, 3), step=3, timeout=0.2)
        other = run_rank(daemon.unix, 1, 2, 0, STEPS)
        for step in range(3, STEPS):
            table.update(*gradients(0, step), step=step, timeout=60)
        other.communicate(timeout=120)
        assert other.returncode == 0
        assert client.stats()["training_updates"] == 2 * STEPS
