"""The shared arena read for a device, by the kernel's twin, from a real daemon: hits, misses, moves, ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_client import Table, connect, errors
from engram_client.gpu.bus import BusReader
from engram_client.gpu.device_table import DeviceTable
from engram_client.gpu.host_memory import NotRegistered
from tests.support.daemon import Daemon, running, serve_command
from tests.support.interpreted_checks import interpret
from tests.support.oracle import Oracle
from tests.support.shared_memory import SMALL, grown, mapped_arenas, rows_of
from tests.support.stores import (
    PLAIN,
    PLE,
    V41,
    V41_ROWS,
    PackedStore,
    eventually,
    random_keys,
    random_rows,
)

CPU = torch.device("cpu")


def read(reader: BusReader, table: Table, ids: np.ndarray, fill: int = 7) -> torch.Tensor:
    out = torch.full((ids.size, reader.entry_bytes), fill, dtype=torch.uint8)
    reader.read(torch.from_numpy(ids), out)
    return out


def parts(oracle: Oracle, keys: np.ndarray, heads: slice | None) -> np.ndarray:
    """What each key's part of a record must be, uint8 [n * orders, bytes]."""
    lines, orders = keys.shape
    whole = oracle.lookup_ngrams(keys).reshape(lines, orders, -1, oracle.rows.shape[1])
    return whole[:, :, heads or slice(None)].reshape(keys.size, -1)


@pytest.mark.parametrize("name", [V41, PLE])
@pytest.mark.parametrize("heads", [None, slice(1, 4)])
def test_what_is_cached_is_read_and_the_rest_is_listed(
    packed: PackedStore, roomy: Daemon, name: str, heads: slice | None
) -> None:
    oracle, seed = packed.oracles[name], 31 + (heads is not None)
    with connect(roomy.unix) as client:
        table = client.table(name)
        reader = BusReader(table, CPU, entries_max=300, heads=heads)
        assert reader.serving
        keys = random_keys(oracle, 40, seed=seed, masked=0.2)
        table.lookup_ngrams(keys[:25])
        out = read(reader, table, keys)
        missed = reader.missed()
        there = np.zeros(keys.size, bool)
        there[: keys[:25].size] = True
        flat = keys.reshape(-1)
        seen = np.isin(flat, flat[there])  # a key of the rest may be one of the first
        wanted = np.flatnonzero((flat >= 0) & ~seen)
        assert set(missed.positions) <= set(np.flatnonzero((flat >= 0) & ~there))
        assert set(missed.positions) >= set(wanted) and len(wanted) > 10
        assert np.array_equal(missed.ids, flat[missed.positions])
        assert np.array_equal(np.flatnonzero(reader.missing[: keys.size].numpy()), missed.positions)
        expected = parts(oracle, keys, heads)
        expected[missed.positions] = 0
        assert np.array_equal(out.numpy(), expected)
        reader.fill(out, missed)
        assert np.array_equal(out.numpy(), parts(oracle, keys, heads))


def test_rows_and_masked_entries_that_are_kept(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41_ROWS]
    with connect(roomy.unix) as client:
        table = client.table(V41_ROWS)
        reader = BusReader(table, "cpu", entries_max=100, keep_masked=True)
        ids = random_rows(oracle, 100, seed=5, masked=0.3)
        out = torch.full((100, table.spec.row_bytes), 9, dtype=torch.uint8)
        for _ in range(2):
            reader.lookup_into(torch.from_numpy(ids), out)
            expected = rows_of(oracle, ids)
            expected[ids < 0] = 9
            assert np.array_equal(out.numpy(), expected)
        assert reader.missed().ids.size == 0
        with pytest.raises(errors.BadRequest, match="no heads to choose"):
            BusReader(table, CPU, entries_max=1, heads=slice(0, 1))
        plain = BusReader(client.table(PLAIN), CPU, entries_max=8)
        row_ids = torch.tensor([0, 5, -1])
        rows = torch.zeros((3, 24), dtype=torch.uint8)
        plain.lookup_into(row_ids, rows)
        assert np.array_equal(rows.numpy(), rows_of(packed.oracles[PLAIN], row_ids.numpy()))


def test_replacement_learns_and_look_ups_are_counted(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 30, seed=77, masked=0.1)
        table.lookup_ngrams(keys)
        reader, present = BusReader(table, CPU, entries_max=keys.size), int((keys >= 0).sum())
        before = client.stats()
        read(reader, table, keys)
        assert reader.missed().ids.size == 0
        told = grown(client, before, "lookups", "keys", "masked", "dram_hits", "dram_misses")
        assert list(told.values()) == [1, keys.size, keys.size - present, present, 0]
        assert eventually(lambda: grown(client, before, "shm_touches")["shm_touches"] > 0)


def test_what_it_does_not_take(packed: PackedStore, roomy: Daemon) -> None:
    with connect(roomy.unix) as client:
        table = client.table(V41)
        reader = BusReader(table, CPU, entries_max=6)
        out = torch.zeros((6, table.spec.record_bytes), dtype=torch.uint8)
        for ids, buffer in (
            (torch.zeros(9, dtype=torch.int64), torch.zeros((9, 2112), dtype=torch.uint8)),  # too many
            (torch.zeros(5, dtype=torch.int64), out[:5]),  # no lines of 3
            (torch.zeros(6, dtype=torch.int32), out),
            (torch.zeros(6, dtype=torch.int64), out[:3]),
            (torch.zeros(6, dtype=torch.int64), out.to(torch.int8)),
        ):
            with pytest.raises(errors.BadRequest):
                reader.read(ids, buffer)
        keys = torch.tensor([1, 2, -7, 4, 5, -1])
        reader.read(keys, out)
        missed = reader.missed()
        assert 2 in missed.positions
        with pytest.raises(errors.IdOutOfRange):
            reader.fill(out, missed)
        for options in ({"entries_max": 0}, {"entries_max": 1, "touches": 3}):
            with pytest.raises(errors.BadRequest):
                BusReader(table, CPU, **options)


def test_rows_are_right_while_records_come_go_and_move(packed: PackedStore, tmp_path: Path) -> None:
    """A small arena under a writer that evicts, resized meanwhile: a record is right, or it is missing."""
    oracle = packed.oracles[V41]
    settings = {**SMALL, "dram_budget_bytes": "2MiB", "serve_unix": tmp_path / "s"}
    with (
        running(serve_command(packed.copy_to(tmp_path), **settings), tmp_path) as daemon,
        connect(daemon.unix) as client,
        connect(daemon.unix) as writer,
    ):
        table, stop = writer.table(V41), threading.Event()
        keys = random_keys(oracle, 400, seed=3)

        def write() -> None:
            random = np.random.default_rng(4)
            while not stop.is_set():
                table.lookup_ngrams(keys[random.integers(0, 400, 60)])

        thread = threading.Thread(target=write)
        thread.start()
        try:
            reader = BusReader(client.table(V41), CPU, entries_max=120)
            random, hits, views = np.random.default_rng(5), 0, set()
            for i in range(60):
                if i in (15, 30, 45):
                    writer.set_dram_budget((1 << 20) * (3 + i // 15 % 3))
                chosen = keys[random.integers(0, 400, 40)]
                out = read(reader, client.table(V41), chosen)
                missed = reader.missed()
                hits += chosen.size - len(missed.positions)
                expected = parts(oracle, chosen, None)
                expected[missed.positions] = 0
                assert np.array_equal(out.numpy(), expected), i
                views.add(id(reader._seen))
            assert hits > 50
            assert len(views) > 1
            reader.fill(out, missed)
            assert np.array_equal(out.numpy(), parts(oracle, chosen, None))
        finally:
            stop.set()
            thread.join()


def test_a_graph_that_nobody_refreshes_misses_and_never_lies(packed: PackedStore, tmp_path: Path) -> None:
    """What `read` does without `refresh`, as a replayed graph: the old layout, after records have left it."""
    oracle = packed.oracles[V41]
    settings = {**SMALL, "serve_unix": tmp_path / "s"}
    with (
        running(serve_command(packed.copy_to(tmp_path), **settings), tmp_path) as daemon,
        connect(daemon.unix) as client,
    ):
        table, keys = client.table(V41), random_keys(oracle, 30, seed=6)
        table.lookup_ngrams(keys)
        reader = BusReader(table, CPU, entries_max=keys.size)
        held, refresh = mapped_arenas(), reader.refresh
        reader.refresh = lambda: True  # type: ignore[method-assign]
        client.set_dram_budget(16 << 20)
        assert eventually(lambda: table.shared_view() is not reader._seen)
        assert mapped_arenas() > held  # the old one is not unmapped under a reader
        out = read(reader, table, keys)
        assert reader.missed().ids.size == keys.size and not out.any()
        refresh()
        read(reader, table, keys)
        assert reader.missed().ids.size < keys.size
        assert eventually(lambda: mapped_arenas() <= held)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_that_ends(packed: PackedStore, tmp_path: Path, end: signal.Signals) -> None:
    """Drained or dead, everything is missing from the next look on; nothing hangs or crashes."""
    oracle, settings = packed.oracles[V41], {**SMALL, "serve_unix": tmp_path / "s"}
    with (
        running(serve_command(packed.copy_to(tmp_path), **settings), tmp_path) as daemon,
        connect(daemon.unix) as client,
    ):
        table, keys = client.table(V41), random_keys(oracle, 10, seed=6)
        table.lookup_ngrams(keys)
        reader = BusReader(table, CPU, entries_max=keys.size)
        out = read(reader, table, keys)
        assert np.array_equal(out.numpy(), parts(oracle, keys, None))
        frozen, refresh = reader._words, reader.refresh
        daemon.signal(end)
        daemon.wait()
        reader.refresh = lambda: True  # type: ignore[method-assign]
        out = read(reader, table, keys)  # as a graph does that was not told: right rows or none
        missing = reader.missed().positions
        expected = parts(oracle, keys, None)
        expected[missing] = 0
        assert np.array_equal(out.numpy(), expected)
        assert len(missing) == (keys.size if end == signal.SIGTERM else 0)
        assert frozen.any()
        assert eventually(lambda: not refresh())
        out = read(reader, table, keys)
        assert reader.missed().ids.size == keys.size and not out.any()
        with pytest.raises(errors.Unavailable):
            reader.fill(out, reader.missed(), timeout=0.5)


def test_where_no_kernel_serves_everything_is_missing(packed: PackedStore, roomy: Daemon) -> None:
    """As a reader on a GPU without Triton: the same lists as the twin's over no arena at all."""
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(packed.oracles[V41], 20, seed=95, masked=0.3)
        for keep_masked in (False, True):
            reader = BusReader(table, CPU, entries_max=keys.size, keep_masked=keep_masked)
            reader.close()
            found = []
            for serves in (True, False):
                reader._kernel_serves = serves
                out = read(reader, table, keys)
                missed = reader.missed()
                found.append([out, torch.from_numpy(missed.positions), torch.from_numpy(missed.ids)])
                assert torch.equal(reader.missing, torch.from_numpy(keys.reshape(-1) != -1))
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
            assert not reader.serving and not reader.refresh()


def test_memory_that_cuda_does_not_take_is_said_once_and_the_cpu_stages(
    packed: PackedStore, roomy: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(reader: BusReader, view: object) -> None:
        raise NotRegistered("CUDA did not register 1048576 bytes (error 2: out of memory)")

    monkeypatch.setattr(BusReader, "_words_of", refuse)
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        near = DeviceTable(client.table(V41), CPU, entries_max=60)
        keys = random_keys(oracle, 20, seed=96)
        for _ in range(3):
            assert not near.goes_over_the_bus(keys.size)
            assert np.array_equal(near.lookup_ngrams(torch.from_numpy(keys)), oracle.lookup_ngrams(keys))
        (said,) = (r.getMessage() for r in caplog.records if r.name == "engram_client.gpu.bus")
        assert "out of memory" in said and "the CPU stages its rows" in said


def test_without_a_daemon_on_this_machine_nothing_is_found(packed: PackedStore, daemon: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(daemon.tcp) as client:
        table, keys = client.table(V41), random_keys(oracle, 10, seed=8)
        reader = BusReader(table, CPU, entries_max=keys.size)
        assert not reader.serving
        out = torch.zeros((keys.size, table.spec.record_bytes), dtype=torch.uint8)
        reader.lookup_into(torch.from_numpy(keys), out)
        assert np.array_equal(out.numpy(), parts(oracle, keys, None))
        reader.close()


def test_the_interpreted_kernel_does_what_its_twin_does(packed: PackedStore, roomy: Daemon) -> None:
    tables = {name: random_keys(packed.oracles[name], 6, seed=91, masked=0.2).tolist() for name in (V41, PLE)}
    tables[PLAIN] = [[1], [2], [3], [-1]]
    interpret("arena", unix=roomy.unix, tables=tables)


@pytest.mark.parametrize("bus_entries_max", [0, 30, None])
def test_a_table_for_a_device_goes_the_way_that_its_size_says(
    packed: PackedStore, roomy: Daemon, bus_entries_max: int | None
) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        near = DeviceTable(client.table(V41), CPU, entries_max=60, bus_entries_max=bus_entries_max)
        over_the_bus = [n for n in (0, 3, 30, 33, 60, 63) if near.goes_over_the_bus(n)]
        assert over_the_bus == {0: [], 30: [3, 30], None: [3, 30, 33, 60]}[bus_entries_max]
        for lines in (0, 1, 10, 20, 30):
            keys = random_keys(oracle, lines, seed=70 + lines, masked=0.1)
            expected = oracle.lookup_ngrams(keys)
            assert np.array_equal(near.lookup_ngrams(torch.from_numpy(keys)).numpy(), expected)
            handle = near.prefetch_ngrams(torch.from_numpy(keys))
            assert np.array_equal(handle.wait(timeout=30).numpy(), expected)
            out = torch.zeros(expected.shape, dtype=torch.uint8)
            near.lookup_ngrams_into(torch.from_numpy(keys), out)
            assert np.array_equal(out.numpy(), expected)
        first, second = (random_keys(oracle, 10, seed=s) for s in (80, 81))
        handles = [near.prefetch_ngrams(torch.from_numpy(keys)) for keys in (first, second)]
        for keys, handle in zip((first, second), handles, strict=True):  # the first is not the last any more
            assert np.array_equal(handle.wait().numpy(), oracle.lookup_ngrams(keys))
        assert near.dequantize(out).shape == (*out.shape[:2], 256)
        with pytest.raises(errors.BadRequest, match="addressed by rows"):
            DeviceTable(client.table(V41_ROWS), CPU, entries_max=3)
        with pytest.raises(errors.BadRequest, match="float32"):
            near.lookup_ngrams(torch.zeros(1, 3))
