"""A restart finds the cache warm: from the last snapshot, and only what is still true."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect
from tests.support.daemon import running, serve_command
from tests.support.stores import PLAIN, V41, Device, PackedStore, opened, random_keys, small_config
from tierstore.config import Config, Dram
from tierstore.packing import PackOptions, pack
from tierstore.store import Store

BUDGET = 256 << 20  # for all tables together


def warm_config(budget_bytes: int, period_s: float = 600) -> Config:
    return Config(dram=Dram(budget_bytes=budget_bytes, snapshot_period_s=period_s), nvme=small_config(0).nvme)


def ask(store: Store, packed: PackedStore, folder: Path) -> None:
    oracle = packed.oracles[V41]
    keys = random_keys(oracle, 1500)
    with connect(f"local:{folder}") as client:
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), oracle.lookup_ngrams(keys))


def pages_of_asking(made: Device, packed: PackedStore, folder: Path) -> int:
    before = made.device.pages
    ask(made.store, packed, folder)
    return made.device.pages - before


def test_what_was_cached_is_cached_after_a_restart(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET)) as made:
        assert pages_of_asking(made, packed, folder) > 0
        hits = made.store.stats()["dram_capacity_records"]
        assert hits > 4500
    with opened(folder, warm_config(BUDGET)) as made:
        assert made.store.wait_warm(60)
        assert pages_of_asking(made, packed, folder) == 0
        stats = made.store.stats()
        assert stats["records_restored"] >= 4500
        assert stats["snapshot_bytes_read"] <= 1.1 * BUDGET


def test_warming_up_keeps_what_the_refill_has_counted(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET)) as made:
        ask(made.store, packed, folder)
    with opened(folder, warm_config(BUDGET)) as made:
        assert made.store.wait_warm(60)
        before = made.store.stats()
        made.store.warm_up()
        assert made.store.stats() == before
        assert before["records_restored"] > 0 < before["snapshot_bytes_read"]


def test_another_budget_takes_what_fits(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET)) as made:
        cold = pages_of_asking(made, packed, folder)
    with opened(folder, warm_config(BUDGET // 16)) as made:
        assert made.store.wait_warm(60)
        assert 0 < pages_of_asking(made, packed, folder) < cold


def test_a_new_generation_starts_cold_and_right(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET)) as made:
        ask(made.store, packed, folder)
    source = packed.directory.parent / "deepseek-v4.1"
    options = PackOptions(name=V41, layers=(1,), replace=True)
    pack(source, folder, options, notify=lambda text: None, on_progress=lambda progress: None)
    with opened(folder, warm_config(BUDGET)) as made:
        assert made.store.wait_warm(60)
        assert pages_of_asking(made, packed, folder) > 0
        assert made.store.stats()["records_restored"] == 0


def test_period_zero_writes_nothing(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET, period_s=0)) as made:
        ask(made.store, packed, folder)
    assert not (folder / "warm").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "folder"])
def test_a_damaged_snapshot_is_a_cold_start(
    packed: PackedStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, warm_config(BUDGET)) as made:
        ask(made.store, packed, folder)
    path = folder / "warm" / f"{packed.oracles[V41].row_bytes * 8}.warm"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(whole[:1000] if damage == "truncated" else b"x" * len(whole))
    with opened(folder, warm_config(BUDGET)) as made:
        assert made.store.wait_warm(60)
        assert pages_of_asking(made, packed, folder) > 0
    assert str(path) in caplog.text


def test_a_killed_daemon_starts_from_its_last_snapshot(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    command = serve_command(
        folder,
        serve_unix=tmp_path / "socket",
        serve_tcp="127.0.0.1:0",
        dram_budget_bytes="64MiB",
        dram_snapshot_period_s="0.2",
    )
    keys, snapshot = random_keys(oracle, 300), folder / "warm" / f"{oracle.row_bytes * 8}.warm"
    with running(command, tmp_path) as daemon, connect(daemon.unix) as client:
        table = client.table(V41)
        table.lookup_ngrams(keys)
        written = snapshot.stat().st_ino if snapshot.exists() else 0
        while not snapshot.exists() or snapshot.stat().st_ino == written or not client.stats():
            table.lookup_ngrams(keys[:1])
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait(30)
    with opened(folder, warm_config(64 << 20)) as made:
        assert made.store.wait_warm(60)
        before = made.device.pages
        with connect(f"local:{folder}") as client:
            assert np.array_equal(client.table(V41).lookup_ngrams(keys), oracle.lookup_ngrams(keys))
            assert client.table(PLAIN) is not None
        assert made.device.pages == before
