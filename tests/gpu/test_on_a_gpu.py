"""What only a GPU can tell: every device path against the checkpoint, on the device, with real processes.

    make test PYTEST_ARGS="tests/gpu -rs"

Skipped where there is no CUDA. What these paths do on CPU tensors is tested elsewhere, always.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tierbench.gpu.sections.daemon_arena import missing_of

from engram_client import Client, connect
from engram_client.gpu.ipc import NotShared
from engram_client.hbm import HbmTier
from engram_client.hbm.daemon import DaemonTable, hot_table
from tests.support.daemon import Daemon, running, serve_command
from tests.support.stores import PLE, V41, PackedStore, eventually, opened, random_keys, small_config
from tierstore.devices.gds_probe import probe_gds
from tierstore.format.header import uuid_words
from tierstore.kernels.checksum import seal_pages
from tierstore.tiers import hbm_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here"),
]
UUID = bytes(range(200, 216))


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", 0)


def test_the_kernels_for_pages_pass_their_trial(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert hbm_pages.PAGES.serves(cuda), caplog.text


def test_pages_are_checked_as_the_host_checks_them(cuda: torch.device) -> None:
    random = np.random.default_rng(4)
    pages = random.integers(0, 2**64, (5000, 512), np.uint64)
    seal_pages(pages, 10, *uuid_words(UUID), 0, len(pages))
    hurt = np.sort(random.choice(5000, 37, replace=False))
    pages[hurt, random.integers(0, 512, 37)] ^= np.uint64(1)
    there = torch.from_numpy(pages.view(np.int64)).to(cuda)
    uuid = torch.from_numpy(np.array(uuid_words(UUID), np.uint64).view(np.int64)).to(cuda)
    slots = torch.arange(5000, device=cuda)
    found = hbm_pages.bad_pages(there, slots, slots + 10, uuid)
    assert found.nonzero().ravel().tolist() == hurt.tolist()
    assert torch.equal(found, hbm_pages.twin_bad_pages(there, slots, slots + 10, uuid))


@pytest.mark.parametrize("name", [V41, PLE])
def test_records_in_bulk(cuda: torch.device, packed: PackedStore, tmp_path: Path, name: str) -> None:
    with opened(packed.copy_to(tmp_path), small_config()) as device:
        spec, keys = device.store.table(name).spec, random_keys(packed.oracles[name], 500, seed=1)
        orders = np.tile(np.arange(keys.shape[1]), len(keys))
        out = torch.zeros((keys.size, spec.record_bytes), dtype=torch.uint8, device=cuda)
        device.store.bulk.read(name, spec.generation, keys.ravel(), orders, out)
        expected = packed.oracles[name].lookup_ngrams(keys).reshape(keys.size, -1)
        assert np.array_equal(out.cpu().numpy(), expected)


def test_pinning_a_profile(cuda: torch.device, packed: PackedStore, tmp_path: Path) -> None:
    directory = packed.copy_to(tmp_path)
    keys = random_keys(packed.oracles[V41], 400, seed=2)
    with opened(directory, small_config()), connect(f"local:{directory}") as client:
        tier = HbmTier([client.table(V41)], budget_bytes=16 << 20, device=cuda)
        tier.table(V41).pin(keys)
        rows = tier.table(V41).lookup_ngrams(keys)
        assert rows.device.type == "cuda"
        assert np.array_equal(rows.cpu().numpy(), packed.oracles[V41].lookup_ngrams(keys))


def test_the_probe_answers_in_time(packed: PackedStore, cuda: torch.device) -> None:
    """Whatever there is: kvikio or none, GPUDirect Storage or its compatibility mode."""
    sample = next((packed.directory / "tables").rglob("*.rows"))
    found = probe_gds(sample, 0, timeout_s=60)
    print(found)
    assert found.state in ("gds", "compat", "none") and found.reason


class TestDaemonArena:
    @pytest.fixture(scope="class")
    def daemon(self, packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
        folder = tmp_path_factory.mktemp("gpu-daemon")
        settings = {
            "serve_unix": folder / "s", "dram_budget_bytes": "8MiB", "nvme_staging_bytes": "2MiB",
            "hbm_budget_bytes": "64MiB", "hbm_device": "cuda", "hbm_promote_period_s": 0.01,
            "hbm_promote_reads": 1,
        }  # fmt: skip
        with running(serve_command(packed.copy_to(folder), **settings), folder) as daemon:
            yield daemon

    @pytest.fixture
    def client(self, daemon: Daemon) -> Iterator[Client]:
        with connect(daemon.unix) as client:
            yield client

    def test_another_process_reads_it_by_ipc(
        self, client: Client, daemon: Daemon, packed: PackedStore, cuda: torch.device
    ) -> None:
        table, keys = client.table(V41), random_keys(packed.oracles[V41], 60, seed=1)
        try:
            hot = DaemonTable(table, cuda)
        except NotShared as reason:
            pytest.skip(f"this system has no CUDA IPC: {reason}; {daemon.log[-500:]}")
        there = torch.from_numpy(keys).to(cuda)
        rows = torch.empty((60, 24, 264), dtype=torch.uint8, device=cuda)

        def is_hot() -> bool:
            for _ in range(4):
                table.lookup_ngrams(keys)
            return float(missing_of(hot.hits_into(there, rows)).float().mean()) < 0.05

        assert eventually(is_hot)
        missing = missing_of(hot.hits_into(there, rows)).view(60, 3).cpu().numpy()
        expected = packed.oracles[V41].lookup_ngrams(keys).reshape(60, 3, -1)
        assert np.array_equal(rows.cpu().numpy().reshape(60, 3, -1)[~missing], expected[~missing])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = hot.hits_into(there, rows)
        rows.zero_()
        graph.replay()
        torch.cuda.synchronize()
        missing = missing_of(captured).view(60, 3).cpu().numpy()
        assert np.array_equal(rows.cpu().numpy().reshape(60, 3, -1)[~missing], expected[~missing])

    def test_hits_do_not_make_the_host_wait(self, client: Client, cuda: torch.device) -> None:
        hot = hot_table(client.table(V41), cuda, budget_bytes=16 << 20)
        keys = torch.zeros((10, 3), dtype=torch.int64, device=cuda)
        rows = torch.empty((10, 24, 264), dtype=torch.uint8, device=cuda)
        hot.hits_into(keys, rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            hot.hits_into(keys, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_dead_daemon_is_noticed(self, packed: PackedStore, tmp_path: Path, cuda: torch.device) -> None:
        settings = {
            "serve_unix": tmp_path / "s", "dram_budget_bytes": "8MiB", "hbm_budget_bytes": "64MiB",
            "hbm_device": "cuda",
        }  # fmt: skip
        command = serve_command(packed.copy_to(tmp_path), **settings)
        with running(command, tmp_path) as daemon, connect(daemon.unix) as client:
            try:
                hot = DaemonTable(client.table(V41), cuda)
            except NotShared as reason:
                pytest.skip(f"this system has no CUDA IPC: {reason}")
            daemon.kill()
            assert eventually(lambda: not hot.attached)
            keys = torch.zeros((10, 3), dtype=torch.int64, device=cuda)
            rows = torch.empty((10, 24, 264), dtype=torch.uint8, device=cuda)
            assert int(hot.hits_into(keys, rows).count) == 30

    def test_a_budget_that_the_device_has_not_is_refused_and_it_serves_on(
        self, client: Client, packed: PackedStore
    ) -> None:
        from engram_client.errors import ConfigError

        before = client.stats()["hbm_budget_bytes"]
        with pytest.raises(ConfigError):
            client.set_hbm_budget(1 << 45)
        assert client.stats()["hbm_budget_bytes"] == before
        keys = random_keys(packed.oracles[V41], 5, seed=3)
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
