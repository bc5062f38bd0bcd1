"""Sharded and data-parallel training over gloo, against one process with the same global batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_client import connect
from tests.support.daemon import environment, running, serve_command
from tests.support.sharded_rank import DIM, TABLES, Trainer, everything
from tierstore.cli import main
from tierstore.training.creating import NewTable, create_training

SMALL = {"TIERSTORE_TRAINING_DRAM_BYTES": "64KiB", "TIERSTORE_TRAINING_STAGING_BYTES": "64KiB"}


class Process:
    """One that plays a rank."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.sharded_rank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment(), **SMALL},
        )  # fmt: skip

    def tell(self, told: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(told), file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    made = [Process() for _ in range(3)]
    yield made
    for process in made:
        process.end()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def create(folder: Path, share: tuple[int, int] | None = None, seed: int = 0) -> Path:
    new = [NewTable(name, rows, DIM) for name, rows in TABLES.items()]
    options = {"initial_std": 0.3, "learning_rate": 0.01, "seed": seed, "share": share}
    create_training(folder, new, optimizer="adam", **options)
    return folder


def shares(folder: Path, world: int) -> list[Path]:
    return [create(folder / f"share{rank}", (rank, world)) for rank in range(world)]


def start(scenario: str, players: list[Process], meet: Path, **told: Any) -> None:
    """`told` values that are lists have one entry a rank."""
    for rank, process in enumerate(players):
        mine = {name: value[rank] if isinstance(value, list) else value for name, value in told.items()}
        common = {"scenario": scenario, "rank": rank, "world": len(players), "meet": str(meet)}
        process.tell({**common, **mine})


def play(scenario: str, players: list[Process], meet: Path, **told: Any) -> list[dict[str, Any]]:
    start(scenario, players, meet, **told)
    return [json.loads(process.answer()) for process in players]


def alone(
    folder: Path, world: int, last: int, first: int = 1, micro: int = 1
) -> tuple[list[list[float]], dict[str, Any]]:
    """One process that takes the ranks' batches in turn: losses of each step, and all rows."""
    with connect(f"local:{create(folder)}") as client:
        training = client.training()
        trainer = Trainer(training, list(range(world)), world, 1 / world, micro)
        losses = [trainer.step(number) for number in range(first, last + 1)]
        return losses, {name: everything(training, name) for name in TABLES}


def joined(results: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of each step, rank 0's first."""
    return [list(chain(*parts)) for parts in zip(*(r["losses"] for r in results), strict=True)]


def test_three_ranks_one_without_rows_of_a_table(processes: list[Process], tmp_path: Path) -> None:
    """To a tolerance: a third is rounded, and each rank adds its micro-batches up before it sends them."""
    expected, rows = alone(tmp_path / "alone", 3, last=4, micro=2)
    stores = [str(folder) for folder in shares(tmp_path, 3)]
    results = play("train", processes, tmp_path / "meet", store=stores, micro=2, last=4)
    np.testing.assert_allclose(joined(results), expected, rtol=1e-5, atol=1e-6)
    for name in TABLES:
        assert results[0]["rows"][name] == results[2]["rows"][name]
        np.testing.assert_allclose(results[1]["rows"][name], rows[name], rtol=1e-4, atol=1e-5)


def test_what_fails_on_one_rank_fails_on_all(processes: list[Process], tmp_path: Path) -> None:
    stores = [str(folder) for folder in shares(tmp_path, 2)]
    results = play("refusals", processes[:2], tmp_path / "meet", store=stores)
    wanted = (
        "IdOutOfRange: rank 1: ",
        "BadRequest: rank 1: table 'words': row ids must be int64 or int32, got <U1",
        "NotFiniteGradient: rank 0: table 'words': the gradient of row 0",
        "BadRequest: rank 1: table 'words': row ids [4] need gradients",
        "BadRequest: rank 0: step 5 is not kept",
        "StorageError: rank 1: the disk is full", "StepConflict: rank 0: table",
        "StepConflict: rank 0: an update",
        "GenerationMismatch: rank 0",
    )  # fmt: skip
    with connect(f"local:{create(tmp_path / 'alone')}") as client:
        training = client.training()
        training.table("words").update(np.arange(4), np.ones((4, DIM), np.float32), step=1)
        rows = everything(training, "words")
    for result in results:
        for told, beginning in zip(result["told"], wanted, strict=True):
            assert told.startswith(beginning)
        assert result["same"]
        assert result["back"]
        assert result["rows"] == rows
        assert "rank 0 is at PUSH" in result["elsewhere"] or "rank 0 at PUSH" in result["elsewhere"]


def test_ranks_begin_with_one_seed_and_one_way_with_gradients_that_are_not_finite(
    processes: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the shares of one training."""
    stores, others = [[str(folder) for folder in shares(tmp_path / name, 2)] for name in ("a", "b")]
    seeded = str(create(tmp_path / "seeded", (1, 2), seed=1))
    players = processes[:2]

    def agree(number: int, store: list[str], *not_finite: str) -> list[dict[str, Any]]:
        return play("agree", players, tmp_path / f"meet{number}", store=store, not_finite=list(not_finite))

    for result in agree(0, [stores[0], seeded], "skip", "skip"):
        assert result["error"].startswith(
            "BadRequest: shares of table 'words' are not of one table: rank 0 has "
        )
        assert "'seed': 0}}, rank 1 has {'initial rows': " in result["error"]
    for result in agree(1, stores, "skip", "refuse"):
        assert (
            "rank 0 has {'training.not_finite': 'skip'}, rank 1 has {'training.not_finite': 'refuse'}"
            in (result["error"])
        )
    first, second = agree(2, stores, "skip", "skip")
    monkeypatch.setenv("TIERSTORE_TRAINING_NOT_FINITE", "skip")
    with connect(f"local:{create(tmp_path / 'alone')}") as client:
        training = client.training()
        gradients = np.ones((4, DIM), np.float32)
        gradients[1] = np.nan
        training.table("words").update(np.arange(4), gradients, step=1)
        assert first["rows"] == second["rows"] == everything(training, "words")
    assert (first["skipped"], second["skipped"]) == (0, 1)
    agree(3, others, "skip", "skip")
    for result in agree(4, [stores[0], others[1]], "skip", "skip"):
        assert "not of one training: rank 0, rank 1 learned with other shares" in result["error"]


def test_the_benchmark_trains_the_same_rows_with_ranks_and_alone(
    processes: list[Process], tmp_path: Path
) -> None:
    folders = [tmp_path / "ranks", tmp_path / "alone"]
    told = play("bench", processes[:2], tmp_path / "meet0", folder=str(folders[0]))
    told += play("bench", processes[:1], tmp_path / "meet1", folder=str(folders[1]))
    for rank in told[:2]:
        assert rank["sharded_exchanges"] == 5  # two of a look-up, three of an update
        assert rank["sharded_bytes_sent"] > 10 * DIM * 4
    assert all(0 < one["sharded_update_us"] + one["sharded_lookup_us"] < one["step_us"] for one in told)
    for rank in range(2):
        np.testing.assert_allclose(told[rank]["rows"], told[2]["rows"][rank::2], rtol=1e-5)


def test_a_rank_that_does_not_come_is_named(processes: list[Process], tmp_path: Path) -> None:
    stores = [str(folder) for folder in shares(tmp_path, 2)]
    start("absent", processes[:2], tmp_path / "meet", store=stores, timeout=1)
    told = json.loads(processes[0].answer())["told"]
    processes[1].tell({})
    assert json.loads(processes[1].answer()) == {}
    assert told[0].startswith("DeadlineExceeded: rank 0 of 2: no answer from rank 1 after ")
    assert told[1] == told[0]


def test_data_parallel_ranks_of_one_daemon_are_one_process(processes: list[Process], tmp_path: Path) -> None:
    expected, rows = alone(tmp_path / "alone", 2, last=4, first=0)
    store = create(tmp_path / "whole")
    settings = {"serve_unix": store / "socket", "training_enabled": "true", "training_world": 2}
    memory = {"dram_budget_bytes": "1MiB", "training_dram_bytes": "64KiB", "nvme_staging_bytes": "2MiB"}
    with running(serve_command(store, **settings, **memory), store) as daemon:
        results = play("parallel", processes[:2], tmp_path / "meet", target=daemon.unix, last=4)
    assert joined(results) == expected
    for result in results:
        assert result["rows"] == rows


def test_two_ranks_are_one_process_bit_for_bit_also_after_a_crash_between_their_commits(
    processes: list[Process], tmp_path: Path
) -> None:
    """And once their rows were put together and dealt out anew. The last test: it kills a process."""
    expected, rows = alone(tmp_path / "alone", 2, last=8)
    stores = [str(folder) for folder in shares(tmp_path, 2)]
    first, second, third = processes
    start("train", [first, second], tmp_path / "meet1", store=stores, micro=1, last=4, commits=(2,), dies=4)
    survivor = json.loads(first.answer())
    assert second.answer() == ""  # killed, with step 4 open
    assert "no answer from rank 1" in survivor["error"]
    assert survivor["error"].startswith("Unavailable")
    assert survivor["steps"] == [2, 4]  # of its own share

    models = [f"{store}-2.pt" for store in stores]
    results = play(
        "train",
        [first, third],
        tmp_path / "meet2",
        store=stores,
        micro=1,
        last=6,
        commits=(4, 6),
        copies=str(tmp_path / "copies"),
        model=models,
    )
    for result in results:
        assert result["begins"] == 2
        assert result["steps"] == [4, 6]
    assert joined(results) == expected[2:6]

    whole, anew = tmp_path / "whole", tmp_path / "anew"
    copies = [str(tmp_path / "copies" / str(rank)) for rank in range(2)]  # made while they trained
    assert main(["snapshot", *copies, str(whole), "--quiet"]) == 0
    assert main(["reshard", str(whole), "--world", "2", "--out", str(anew), "--quiet"]) == 0
    models, stores = [f"{store}-6.pt" for store in stores], [str(anew / str(rank)) for rank in range(2)]
    meet = tmp_path / "meet3"
    results = play("train", [first, third], meet, store=stores, micro=1, last=8, model=models)
    for result in results:
        assert result["begins"] == 6
        assert result["rows"] == rows
    assert joined(results) == expected[6:]
