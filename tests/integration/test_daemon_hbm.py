"""The daemon's arena in device memory, read by another process: on CPU tensors, with real processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tierbench.gpu.sections.daemon_arena import missing_of

from engram_client import Client, connect, errors
from engram_client.gpu.ipc import NotShared
from engram_client.hbm import HbmTable
from engram_client.hbm.daemon import DaemonTable, hot_table
from tests.support.daemon import Daemon, running, serve_command
from tests.support.stores import PLE, V41, V41_14, V41_ROWS, PackedStore, eventually, random_keys
from tierstore import cli

HOT = {"hbm_device": "cpu", "hbm_promote_period_s": 0.03, "hbm_promote_reads": 1}
BUDGET = 8 << 20


def command(directory: Path, folder: Path, **settings: Any) -> list[str]:
    return serve_command(
        directory, serve_unix=folder / "s", dram_budget_bytes="8MiB", nvme_staging_bytes="2MiB",
        **{**HOT, "hbm_budget_bytes": BUDGET, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def hot_daemon(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("hot")
    with running(command(packed.copy_to(folder), folder), folder) as daemon:
        yield daemon


@pytest.fixture
def client(hot_daemon: Daemon) -> Iterator[Client]:
    with connect(hot_daemon.unix) as client:
        yield client


def heat(client: Client, name: str, keys: np.ndarray) -> None:
    """Read so often that DRAM keeps it in its main queue and has counted a read there."""
    for _ in range(6):
        client.table(name).lookup_ngrams(keys)


def hits(hot: DaemonTable, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and which keys were missing."""
    there = torch.from_numpy(keys)
    heads = hot.spec.record_rows * keys.shape[1]
    rows = torch.full((len(keys), heads, hot.spec.row_bytes), 9, dtype=torch.uint8)
    return rows.numpy(), missing_of(hot.hits_into(there, rows)).view(keys.shape).numpy()


def is_hot(client: Client, hot: DaemonTable, keys: np.ndarray) -> bool:
    """Whether most are there; those that are not are read again, as a caller would."""
    missing = hits(hot, keys)[1]
    if missing.any():
        heat(client, hot.spec.name, keys)
    return bool(missing.mean() < 0.05)


@pytest.mark.parametrize("name", [V41, V41_14, PLE])
def test_hot_records_are_read_without_the_daemon(client: Client, packed: PackedStore, name: str) -> None:
    oracle = packed.oracles[name]
    keys = random_keys(oracle, 40, seed=1)
    hot = DaemonTable(client.table(name), "cpu")
    assert eventually(lambda: is_hot(client, hot, keys))
    before = client.stats()
    keys[3, 0] = keys[5, 1] = -1
    rows, missing = hits(hot, keys)
    assert not missing[keys == -1].any() and missing.mean() < 0.1
    expected = oracle.lookup_ngrams(keys).reshape(*keys.shape, -1)
    found = rows.reshape(*keys.shape, -1)
    assert np.array_equal(found[~missing], expected[~missing]) and not found[missing].any()
    assert client.stats()["lookups"] == before["lookups"], "the daemon was asked"
    assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
    stats = client.stats()
    assert stats["hbm_promoted"] > 0 and stats["hbm_records"] > 0 and stats["hbm_bytes"] <= BUDGET
    assert stats["hbm_budget_bytes"] == BUDGET
    assert hot.stats()["hbm_hits"] > 0


def test_what_was_never_hot_is_missing_and_comes_from_the_table(client: Client, packed: PackedStore) -> None:
    hot = DaemonTable(client.table(V41), "cpu")
    keys = random_keys(packed.oracles[V41], 30, seed=77, masked=0.2)
    rows, missing = hits(hot, keys)
    assert np.array_equal(missing, keys != -1) and not rows.any()
    assert np.array_equal(hot.lookup_ngrams(keys).numpy(), packed.oracles[V41].lookup_ngrams(keys))
    with pytest.raises(errors.IdOutOfRange):
        hot.lookup_ngrams(np.array([[1, -7, 2]]))


def test_what_is_refused(client: Client) -> None:
    hot = DaemonTable(client.table(V41), "cpu")
    keys, out = torch.zeros((2, 3), dtype=torch.int64), torch.empty((2, 24, 264), dtype=torch.uint8)
    for wrong in (keys.int(), keys[:, :2], keys.numpy()):
        with pytest.raises(errors.BadRequest):
            hot.hits_into(wrong, out)
    for wrong_out in (out[:1], out.int(), out.mT):
        with pytest.raises(errors.BadRequest):
            hot.hits_into(keys, wrong_out)
    with pytest.raises(NotShared, match="addressed singly"):
        DaemonTable(client.table(V41_ROWS), "cpu")
    with pytest.raises(errors.BadRequest, match="no-such"):
        DaemonTable(client.table(V41), "no-such")


def test_the_budget_changes_while_it_serves(
    client: Client, packed: PackedStore, hot_daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = random_keys(packed.oracles[V41], 40, seed=1)
    hot = DaemonTable(client.table(V41), "cpu")
    assert eventually(lambda: is_hot(client, hot, keys))
    assert client.set_hbm_budget(0) == 0
    assert eventually(lambda: not hot.attached)
    assert hits(hot, keys)[1].all()
    assert client.stats()["hbm_bytes"] == 0
    assert client.set_hbm_budget(BUDGET // 2) == BUDGET // 2
    assert eventually(lambda: is_hot(client, hot, keys))
    rows, missing = hits(hot, keys)
    expected = packed.oracles[V41].lookup_ngrams(keys).reshape(*keys.shape, -1)
    assert np.array_equal(rows.reshape(*keys.shape, -1)[~missing], expected[~missing])
    with pytest.raises(errors.ConfigError, match=r"hbm\.budget_bytes"):
        client.set_hbm_budget(100)
    assert client.stats()["hbm_budget_bytes"] == BUDGET // 2
    options = [
        "--connect",
        hot_daemon.unix,
        "--set",
        "hbm.budget_bytes=8MiB",
        "--set",
        "dram.budget_bytes=9MiB",
    ]
    assert cli.main(["config", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"dram.budget_bytes": 9 << 20, "hbm.budget_bytes": BUDGET}
    client.set_dram_budget(8 << 20)


def test_rows_are_right_while_others_drive_them_out(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small arena, promotion without a pause, readers in this process: each hit is the right row, or none.

    Then the daemon is killed: its arena is gone at once, is not read any more, and one that
    starts at the same place is taken up.
    """
    directory, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    small = command(directory, tmp_path, hbm_budget_bytes=400_000)
    with running(small, tmp_path) as daemon, connect(daemon.unix) as client:
        hot, found = DaemonTable(client.table(V41), "cpu"), 0
        for seed in range(2000):  # until promotion has driven some out, in the background
            keys = random_keys(oracle, 60, seed % 4)
            client.table(V41).lookup_ngrams(keys)
            rows, missing = hits(hot, keys)
            expected = oracle.lookup_ngrams(keys).reshape(*keys.shape, -1)
            assert np.array_equal(rows.reshape(*keys.shape, -1)[~missing], expected[~missing]), seed
            found += int((~missing).sum())
            if seed >= 16 and found and client.stats()["hbm_evicted"]:
                break
        assert found > 0 and client.stats()["hbm_evicted"] > 0
        daemon.kill()
        assert eventually(lambda: not hot.attached)
        assert hits(hot, keys)[1].all()
        with pytest.raises(errors.Unavailable):
            hot.lookup_ngrams(keys, timeout=5)
        with running(small, tmp_path):
            assert eventually(lambda: hot.attached)
            assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))


def own_cache(target: str, packed: PackedStore, caplog: pytest.LogCaptureFixture) -> None:
    """What a client gets where the daemon has no arena, said once."""
    keys, oracle = random_keys(packed.oracles[V41], 20, seed=1), packed.oracles[V41]
    with connect(target) as client, caplog.at_level(logging.WARNING):
        hot = hot_table(client.table(V41), "cpu", budget_bytes=1 << 20)
        assert isinstance(hot, HbmTable)
        for _ in range(2):
            assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        assert client.stats()["hbm_budget_bytes"] == 0
    assert sum("in a cache of this process" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_without_an_arena_each_process_has_a_cache_of_its_own(
    daemon: Daemon, packed: PackedStore, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    own_cache(getattr(daemon, way), packed, caplog)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_daemon_whose_device_is_not_there_serves_and_says_so_once(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(command(packed.copy_to(tmp_path), tmp_path, hbm_device="cuda"), tmp_path) as daemon:
        own_cache(daemon.unix, packed, caplog)
    assert daemon.log.count("there is no HBM tier, DRAM serves alone") == 1
