"""For a machine with CUDA: the arena over the bus, device tensors, captured graphs and fused kernels.

Skipped where there is no GPU; nothing here has been run on one yet.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_client import StagingRing, connect, errors
from engram_client.dequantize import by_arithmetic
from engram_client.gpu import fused
from engram_client.gpu.bus import BusReader
from engram_client.gpu.device_table import DeviceTable
from engram_client.gpu.graph_reader import GraphReader
from engram_client.modules import DeepseekV41Engram
from tests.support.daemon import Daemon, running, serve_command
from tests.support.shared_memory import SMALL
from tests.support.stores import PLE, V41, PackedStore, eventually, random_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)


def there(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(CUDA)


@pytest.mark.parametrize("name", [V41, PLE])
@pytest.mark.parametrize("heads", [None, slice(1, 4)])
def test_over_the_bus(packed: PackedStore, roomy: Daemon, name: str, heads: slice | None) -> None:
    oracle = packed.oracles[name]
    with connect(roomy.unix) as client:
        table, keys = client.table(name), random_keys(oracle, 60, seed=31, masked=0.2)
        table.lookup_ngrams(keys[:40])
        reader = BusReader(table, CUDA, entries_max=keys.size, heads=heads)
        assert reader.serving, "CUDA did not register the arena; the log says why"
        out = torch.full((keys.size, reader.entry_bytes), 7, dtype=torch.uint8, device=CUDA)
        ids = there(keys.reshape(-1))  # a copy from pageable memory makes the host wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            reader.read(ids, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        missed = reader.missed()
        assert len(missed.ids) < keys.size
        reader.fill(out, missed)
        lines, orders = keys.shape
        whole = oracle.lookup_ngrams(keys).reshape(lines, orders, -1, table.spec.row_bytes)
        expected = whole[:, :, heads or slice(None)].reshape(keys.size, -1)
        assert np.array_equal(out.cpu().numpy(), expected)
        reader.close()


def test_a_graph_outlives_moves_under_a_writer_that_evicts(packed: PackedStore, tmp_path: Path) -> None:
    oracle = packed.oracles[V41]
    settings = {**SMALL, "dram_budget_bytes": "2MiB", "serve_unix": tmp_path / "s"}
    with (
        running(serve_command(packed.copy_to(tmp_path), **settings), tmp_path) as daemon,
        connect(daemon.unix) as client,
        connect(daemon.unix) as writer,
    ):
        table, stop, pool = writer.table(V41), threading.Event(), random_keys(oracle, 400, seed=3)

        def write() -> None:
            random = np.random.default_rng(4)
            while not stop.is_set():
                table.lookup_ngrams(pool[random.integers(0, 400, 60)])

        thread = threading.Thread(target=write)
        reader = BusReader(client.table(V41), CUDA, entries_max=120)
        keys = torch.full((120,), -1, dtype=torch.int64, device=CUDA)
        out = torch.zeros((120, reader.entry_bytes), dtype=torch.uint8, device=CUDA)
        reader.read(keys, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            reader.read(keys, out)
        thread.start()
        try:
            random, hits = np.random.default_rng(5), 0
            for i in range(2000):
                if i % 500 == 250:
                    writer.set_dram_budget((1 << 20) * (3 + i // 500 % 3))
                    reader.refresh()
                chosen = pool[random.integers(0, 400, 40)]
                keys.copy_(there(chosen.reshape(-1)))
                graph.replay()
                missed = reader.missed()
                hits += chosen.size - len(missed.ids)
                expected = oracle.lookup_ngrams(chosen).reshape(120, -1)
                expected[missed.positions] = 0
                assert np.array_equal(out.cpu().numpy(), expected), i
            assert hits > 1000
        finally:
            stop.set()
            thread.join()
        daemon.kill()
        assert eventually(lambda: not reader.refresh())
        graph.replay()
        assert len(reader.missed().ids) == 120


def test_device_tensors_in_stream_order(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 700, seed=21, masked=0.1)
        expected, stream = oracle.lookup_ngrams(keys), torch.cuda.Stream(CUDA)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # the ids are not there yet when they are asked about
            ids = there(keys).clone()
            handle = table.prefetch_ngrams(ids)
            out = torch.empty(expected.shape, dtype=torch.uint8, device=CUDA)
            table.lookup_ngrams_into(ids, out)
            out_copy, rows = out.clone(), handle.wait(timeout=30).clone()
        stream.synchronize()
        assert rows.device == CUDA
        for found in (out_copy, rows, table.lookup_ngrams(there(keys))):
            assert np.array_equal(found.cpu().numpy(), expected)
        near = DeviceTable(table, CUDA, entries_max=keys.size)
        assert np.array_equal(near.lookup_ngrams(there(keys)).cpu().numpy(), expected)


def test_a_captured_graph_pulls_its_step_and_notices_late_rows(packed: PackedStore, obedient: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        ring = StagingRing(client.table(V41), entries=12, slots=1)
        assert ring.pinned
        reader = GraphReader(ring, CUDA)
        reader.pull(None, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            reader.pull(None, 0)
        first, second = random_keys(oracle, 12, seed=50), random_keys(oracle, 12, seed=51)
        for step, keys in ((1, first), (2, first)):
            with ring.start(step, keys) as staged:
                staged.wait(timeout=30)
                reader.expect(staged)
                graph.replay()
                reader.check(staged)
                assert np.array_equal(reader.rows()[0].cpu().numpy(), oracle.lookup_ngrams(keys))
        obedient.ask("hold")
        staged = ring.start(3, second)
        reader.expect(staged)
        graph.replay()
        with pytest.raises(errors.DeadlineExceeded):
            reader.check(staged)
        assert reader.dead()[0].all()
        obedient.ask("release")
        reader.deliver(staged, timeout=30)
        reader.check(staged)
        assert np.array_equal(reader.rows()[0].cpu().numpy(), oracle.lookup_ngrams(second))


def test_fused_kernels_do_what_plain_operations_do() -> None:
    layout_rows = torch.randint(0, 255, (50, 24, 264), dtype=torch.uint8, device=CUDA)
    layout_rows[..., :256] &= 0xF7
    from tierbench.gpu.sections.fused import LAYOUT

    assert fused.decodes(LAYOUT, torch.bfloat16, CUDA)
    picks = torch.randint(0, 50, (333,), device=CUDA)
    found = fused.decode(LAYOUT, layout_rows, torch.bfloat16, picks)
    wanted = by_arithmetic(LAYOUT, layout_rows[picks], torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    module = DeepseekV41Engram(hidden_size=5120, hc_mult=4, embedding_dim=6144).to(CUDA, torch.float32)
    torch.nn.init.normal_(module.wkv.weight, std=0.01)
    hidden, rows = torch.randn(9, 4, 5120, device=CUDA), torch.randn(9, 6144, device=CUDA)
    dead = torch.arange(9, device=CUDA) == 4
    plain = module(hidden, rows, dead=dead)
    with torch.inference_mode():
        torch.testing.assert_close(module(hidden, rows, dead=dead), plain.detach(), rtol=1e-5, atol=1e-5)
