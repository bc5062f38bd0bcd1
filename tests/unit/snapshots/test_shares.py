"""Shares of a sharded training put together, and dealt out anew: what one process has, byte for byte."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect
from engram_client.agreement import training_of
from tests.support.shares import (
    PLAIN,
    ROWS,
    create_shares,
    everything,
    joined,
    new_tables,
    train_part,
    train_shares,
    whole_store,
)
from tests.support.trained_steps import CONFIG
from tierstore.cli import main
from tierstore.snapshots import open_step, rows
from tierstore.training.creating import create_training
from tierstore.training.store import TrainingStore
from tierstore.updates import filled


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(filled, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(filled, "LOOK_ROWS", 500)


def name_of(folders: list[Path]) -> str:
    """As ranks work it out when they open these shares."""
    uuids = []
    for folder in folders:
        with closing(TrainingStore.open(folder, CONFIG)) as store:
            uuids.append([d.spec.uuid for d in store.describe()])
    return training_of(uuids)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of them, steps 0 to 2, the last not on rank 1; tests leave them as they are."""
    folders = create_shares(tmp_path_factory.mktemp("shares"), 3)
    name = name_of(folders)
    train_shares(folders, range(2), name)
    for rank in (0, 2):
        with closing(TrainingStore.open(folders[rank], CONFIG)) as store:
            train_part(store, range(2, 3), rank, 3, name)
    return folders


def run(command: str, sources: list[Path], *arguments: str) -> int:
    return main([command, *map(str, sources), *arguments, "--quiet"])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_export_is_that_of_one_process(tmp_path: Path, world: int) -> None:
    folders = create_shares(tmp_path, world)
    train_shares(folders, range(3), name_of(folders))
    with closing(whole_store(folders, tmp_path / "alone")) as store:
        train_part(store, range(3))
    names = ["config.json", "layout.json", "model.safetensors"]
    for options in ((), ("--with-optimizer",)):
        ours, theirs = tmp_path / f"ours{len(options)}", tmp_path / f"theirs{len(options)}"
        assert run("export", [*reversed(folders), ours], *options) == 0
        assert run("export", [tmp_path / "alone", theirs], *options) == 0
        assert filecmp.cmpfiles(ours, theirs, names, shallow=False) == (names, [], [])
        assert (ours / names[2]).stat().st_size > ROWS * 16


def test_what_is_published_is_served(shares: list[Path], tmp_path: Path) -> None:
    with joined(shares) as together:
        row_bytes = 2 * 8
        expected = np.empty((ROWS, together.tables[1].row_bytes), np.uint8)
        together.read(1, np.arange(ROWS), expected)
    assert run("publish", shares, str(tmp_path / "served"), "--table", PLAIN) == 0
    with connect(f"local:{tmp_path / 'served'}") as client:
        found = client.table(PLAIN).lookup(np.arange(ROWS))
    assert np.array_equal(found, expected[:, :row_bytes])


def test_shares_that_begin_with_a_packed_table(shares: list[Path], tmp_path: Path) -> None:
    """Each share has the whole generation; whole tables and other shares begin with it again."""
    served = tmp_path / "served"
    assert run("publish", shares, str(served), "--dtype", "float32") == 0
    recipe = ("--from", str(served), "--optimizer", "adam", "--learning-rate", "0.05", "--dtype", "bfloat16")
    folders = [tmp_path / f"share{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        assert run("create", [folder], *recipe, "--share", f"{rank}/2") == 0
    assert run("create", [tmp_path / "alone"], *recipe) == 0
    with closing(TrainingStore.open(tmp_path / "alone", CONFIG)) as store:
        train_part(store, range(2))
    train_shares(folders, range(1), name_of(folders))
    assert run("reshard", folders, "--world", "3", "--out", str(tmp_path / "anew")) == 0
    anew = [tmp_path / "anew" / str(rank) for rank in range(3)]
    train_shares(anew, range(1, 2), name_of(anew))
    assert run("snapshot", anew, str(tmp_path / "whole")) == 0
    with (
        open_step(tmp_path / "alone") as kept,
        joined(anew) as together,
        open_step(tmp_path / "whole") as one,
    ):
        assert together.tables[0].initial.kind == one.tables[0].initial.kind == "packed"
        assert everything(kept) == everything(together) == everything(one)


def test_training_goes_on_from_one_store_and_from_any_number_of_shares(
    shares: list[Path], tmp_path: Path
) -> None:
    """Step 1 is the last that all three have; it is trained on by one, by four, and by five after four."""
    with closing(whole_store(shares, tmp_path / "alone")) as store:
        train_part(store, range(4))
    with open_step(tmp_path / "alone", 1) as kept, joined(shares) as together:
        assert together.step == 1
        assert everything(together) == everything(kept)
    with open_step(tmp_path / "alone") as kept:
        expected = everything(kept)

    assert run("snapshot", shares, str(tmp_path / "one")) == 0
    with closing(TrainingStore.open(tmp_path / "one", CONFIG)) as store:
        assert store.steps() == [1]
        train_part(store, range(2, 4))
    with open_step(tmp_path / "one") as found:
        assert everything(found) == expected

    assert run("reshard", shares, "--world", "4", "--out", str(tmp_path / "four")) == 0
    four = [tmp_path / "four" / str(rank) for rank in range(4)]
    train_shares(four, range(2, 3), name_of(four))
    assert run("reshard", four, "--world", "5", "--out", str(tmp_path / "five")) == 0
    five = [tmp_path / "five" / str(rank) for rank in range(5)]
    train_shares(five, range(3, 4), name_of(five))
    with joined(five) as found:
        assert everything(found) == expected
        assert [spec.rows for spec in found.tables] == [table.rows for table in new_tables()]
        assert found.tables[0].scheme == new_tables()[0].scheme
    assert sorted(os.listdir(tmp_path)) == ["alone", "five", "four", "one"]


def test_shares_that_do_not_belong_together(
    shares: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(sources: list[Path], *arguments: str) -> str:
        assert run("export", sources, str(tmp_path / "out"), *arguments) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    first, second, third = shares
    others = create_shares(tmp_path / "others", 3)
    train_shares(others, range(2), name_of(others))
    create_training(tmp_path / "whole", new_tables(), optimizer="adam")
    (other_world,) = create_shares(tmp_path / "worlds", 2)[1:]
    shutil.copytree(second, tmp_path / "copy")

    assert "shares are missing: 1 of 3; given are" in refused([first, third])
    assert "shares are missing: 1, 2 of 3" in refused([first])
    again = second / ".." / second.name
    assert f"{second} and {again} are one place; give each share once" in refused([first, second, again])
    assert f"share 1 of 3 is there twice: {second} and {tmp_path / 'copy'}" in refused(
        [first, second, third, tmp_path / "copy"]
    )
    assert f"{tmp_path / 'whole'} holds whole tables" in refused([first, tmp_path / "whole"])
    told = refused([first, other_world, third])
    assert f"{first} is share 0 of 3; {other_world} is share 1 of 2" in told
    told = refused([first, others[1], third])
    assert f"not of one training: {first}, {others[1]}, {third} learned with other shares than these" in told
    assert f"step 2 is not kept by all ranks: {first} keeps [0, 1, 2]; {second} keeps [0, 1];" in refused(
        shares, "--step", "2"
    )


def test_shares_without_a_name_are_compared_by_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those trained by an earlier release do not say with whom."""
    shares, others = create_shares(tmp_path / "a", 2), create_shares(tmp_path / "b", 2, seed=8)
    train_shares(shares, range(4))
    train_shares(others, range(2))
    ahead = [shares[0], others[1]]
    assert run("export", ahead, str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "the last step that all ranks keep is 1" in told
    assert f"{shares[0]} is more than one commit ahead" in told
    assert "--step 1 goes back to it all the same" in told
    assert run("export", ahead, str(tmp_path / "out"), "--step", "1") == 2
    told = capsys.readouterr().err
    assert "shares are not of one table: " in told
    assert "another initial: kind normal, std 0.5, seed 7 and kind normal, std 0.5, seed 8" in told
    fresh = create_shares(tmp_path / "c", 2)
    assert run("export", [shares[0], fresh[1]], str(tmp_path / "out")) == 2
    assert f"no step is kept by all ranks: {shares[0]} keeps [0, 1, 2, 3]; {fresh[1]} keeps []" in (
        capsys.readouterr().err
    )


def test_a_share_in_use_and_a_damaged_one(
    shares: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(TrainingStore.open(shares[1], CONFIG)):
        assert run("export", shares, str(tmp_path / "out")) == 4
        told = capsys.readouterr().err
        assert f"pid {os.getpid()}" in told
        assert "To read a step meanwhile: unix:PATH instead of the directory" in told
        assert main(["inspect", str(shares[1])]) == 0  # which opens nothing
        assert f"1/3 of {ROWS} rows" in capsys.readouterr().out
        assert main(["inspect", str(shares[1]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["training"][1]
        assert (found["name"], found["partition"]["rank"], found["rows"]) == (PLAIN, 1, ROWS // 3)
    copies = [Path(shutil.copytree(share, tmp_path / share.name)) for share in shares]
    (log,) = sorted((copies[2] / "training" / "log").glob("*"))[:1]
    raw = bytearray(log.read_bytes())
    raw[2 * 4096 :: 4096] = bytes(b ^ 1 for b in raw[2 * 4096 :: 4096])
    log.write_bytes(raw)
    assert run("export", copies, str(tmp_path / "out")) == 3
    assert f"{log}: a block at byte 8192" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_world_is_some_ranks(
    shares: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reshard", shares, "--world", "0", "--out", str(tmp_path / "out")) == 2
    assert "a world is 1 to 4096 ranks, got 0" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
