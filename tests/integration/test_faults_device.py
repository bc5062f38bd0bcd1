"""A disk that errs, lies, dawdles or hangs: who is hurt, what is said, and what is left behind."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import connect, errors
from tests.support.stores import (
    LARGE,
    PLAIN,
    PLE,
    V41,
    V41_ROWS,
    Device,
    PackedStore,
    eventually,
    opened,
    random_keys,
    random_rows,
    row_file,
    small_config,
)
from tierstore.config import Nvme
from tierstore.store.store import Store
from tierstore.testing.device import Faults, SimulatedDevice
from tierstore.tiers.staging import BUFFERS_MAX


def geometry(store: Store, name: str) -> Any:
    return store.table(name).row_file.geometry


def nothing_is_left_behind(store: Store) -> bool:
    """Every staging buffer is free and no record counts as being read."""
    staging, in_flight = store._filler._staging, store._filler._in_flight
    return staging.drain(20) and len(staging._free) == BUFFERS_MAX and not in_flight._readers


def hurt_rows(opened_store: Device, name: str, page_index: int) -> tuple[int, range]:
    """A page in the middle of a table and the rows on it."""
    g = geometry(opened_store.store, name)
    page = g.first_page + page_index
    return page, g.rows_of_page(page)


@pytest.mark.parametrize("name", [PLAIN, V41_ROWS, LARGE])
@pytest.mark.parametrize(("order", "kind", "what"), [
    ("fail", errors.StorageError, "could not be read: EIO"),
    ("cut_short", errors.StorageError, "could not be read: EIO"),
    ("flip", errors.DataCorrupt, "failed its checksum twice"),
])  # fmt: skip
def test_only_requests_for_a_bad_page_fail(
    packed: PackedStore, opened_store: Device, name: str, order: str, kind: type[Exception], what: str
) -> None:
    oracle, device = packed.oracles[name], opened_store.device
    page, rows = hurt_rows(opened_store, name, 5)
    getattr(device, order)([page])
    others = np.setdiff1d(np.arange(oracle.rows.shape[0]), rows)[::3]
    with connect(f"local:{opened_store.directory}") as client:
        table = client.table(name)
        assert np.array_equal(table.lookup(others), oracle.rows[others])
        path = re.escape(str(row_file(opened_store.directory, name)))
        where = rf"page {page} of {path} \(table '{name}', rows {rows.start} to {rows.stop - 1}\) {what}"
        for batch in ([rows.start], np.append(others, rows.stop - 1)):
            with pytest.raises(kind, match=where) as caught:
                table.lookup(batch)
            assert type(caught.value) is kind
            with pytest.raises(kind, match=where):
                table.prefetch(batch).wait(30)
        assert np.array_equal(table.lookup(others), oracle.rows[others])
        counted = "nvme_checksum_failures" if order == "flip" else "nvme_read_errors"
        assert client.stats()[counted] > 0
        assert client.stats()["failed_lookups"] == 4
        device.heal()
        assert np.array_equal(table.lookup(rows), oracle.rows[rows])
    assert nothing_is_left_behind(opened_store.store)


@pytest.mark.parametrize(
    ("order", "counted"), [("fail", "nvme_read_errors"), ("flip", "nvme_checksum_failures")]
)
def test_a_page_that_is_bad_once_is_read_again(
    packed: PackedStore, opened_store: Device, order: str, counted: str
) -> None:
    page, rows = hurt_rows(opened_store, PLAIN, 3)
    getattr(opened_store.device, order)([page], times=1)
    with connect(f"local:{opened_store.directory}") as client:
        assert np.array_equal(client.table(PLAIN).lookup(rows), packed.oracles[PLAIN].rows[rows])
        assert (client.stats()[counted], client.stats()["failed_lookups"]) == (1, 0)


def test_a_bad_record_fails_the_ngrams_that_need_it(packed: PackedStore, opened_store: Device) -> None:
    """One bad page under one head: every n-gram with a row on it fails, every other is served."""
    oracle = packed.oracles[V41]
    page, rows = hurt_rows(opened_store, V41, 7)
    opened_store.device.fail([page])
    keys = random_keys(oracle, 400, seed=3)
    hurt = np.isin(oracle.row_ids(keys), rows).any(axis=1)
    assert hurt.any()
    with connect(f"local:{opened_store.directory}") as client:
        table = client.table(V41)
        assert np.array_equal(table.lookup_ngrams(keys[~hurt]), oracle.lookup_ngrams(keys[~hurt]))
        for key in keys[hurt]:
            with pytest.raises(errors.StorageError, match=f"page {page} of"):
                table.lookup_ngrams(key)
        with pytest.raises(errors.StorageError, match=f"page {page} of"):
            table.lookup_ngrams(keys)


def test_damage_on_the_real_disk(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=(PLE,))
    oracle, path = packed.oracles[PLE], row_file(folder, PLE)
    with opened(folder) as made:
        g = geometry(made.store, PLE)
    page = g.page_of_row(1000)
    with path.open("r+b") as file:
        file.seek(g.offset_of_row(1000) + 11)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x20]))
    rows = g.rows_of_page(page)
    others = np.setdiff1d(np.arange(oracle.rows.shape[0]), rows)
    with connect(f"local:{folder}") as client:
        table = client.table(PLE)
        assert np.array_equal(table.lookup(others[:3000]), oracle.rows[others[:3000]])
        for row in (rows.start, 1000, rows.stop - 1):
            with pytest.raises(errors.DataCorrupt, match=rf"page {page} of .*rows {rows.start} to"):
                table.lookup([row])
        assert client.stats()["nvme_checksum_failures"] == 3


def test_pages_that_changed_places_are_noticed(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=(V41,))
    path = row_file(folder, V41)
    raw = bytearray(path.read_bytes())
    pages = [slice(p * 4096, (p + 1) * 4096) for p in (20, 21)]
    raw[pages[0]], raw[pages[1]] = raw[pages[1]], raw[pages[0]]
    path.write_bytes(raw)
    with opened(folder) as made, connect(f"local:{folder}") as client:
        g = geometry(made.store, V41)
        for page in (20, 21):
            with pytest.raises(errors.DataCorrupt, match=f"page {page} of"):
                client.table(V41).lookup([g.rows_of_page(page).start])
        untouched = np.array([g.rows_of_page(p).start for p in (19, 22)])
        assert np.array_equal(client.table(V41).lookup(untouched), packed.oracles[V41].rows[untouched])


def test_a_row_file_cut_while_it_is_served(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=(PLAIN,))
    oracle = packed.oracles[PLAIN]
    with connect(f"local:{folder}") as client:
        path = row_file(folder, PLAIN)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4096)
        table = client.table(PLAIN)
        assert np.array_equal(table.lookup(np.arange(100)), oracle.rows[:100])
        with pytest.raises(errors.StorageError, match="could not be read: EIO"):
            table.lookup([3000])


def start_all(threads: ThreadPoolExecutor, calls: list[Callable[[], Any]]) -> list[Future[Any]]:
    return [threads.submit(call) for call in calls]


@pytest.mark.parametrize("name", [V41, V41_ROWS])
def test_one_read_serves_everybody_who_waits_for_it(
    packed: PackedStore, opened_store: Device, name: str
) -> None:
    oracle = packed.oracles[name]
    keys = random_keys(oracle, 8, seed=1)
    entries = keys.size if name == V41 else np.unique(oracle.row_ids(keys)).size
    expected = oracle.lookup_ngrams(keys)
    with connect(f"local:{opened_store.directory}") as client, ThreadPoolExecutor(6) as threads:
        table = client.table(name)
        with opened_store.device.held():
            first = threads.submit(table.lookup_ngrams, keys)
            opened_store.device.wait_for_readers(1)
            rest = start_all(threads, [lambda: table.lookup_ngrams(keys[::-1])] * 5)
            waits = 5 * (keys.size if name == V41 else oracle.row_ids(keys).size)
            assert eventually(lambda: client.stats()["in_flight_waits"] == waits)
            assert opened_store.device.reads == 1
        assert np.array_equal(first.result(30), expected)
        for found in rest:
            assert np.array_equal(found.result(30), expected[::-1])
        assert client.stats()["records_read"] == entries
    assert nothing_is_left_behind(opened_store.store)


def test_who_waited_for_a_failed_read_reads_for_himself(packed: PackedStore, opened_store: Device) -> None:
    oracle, keys = packed.oracles[V41], random_keys(packed.oracles[V41], 4, seed=2)
    page = geometry(opened_store.store, V41).page_of_row(int(oracle.row_ids(keys)[0, 0]))
    opened_store.device.fail([page], times=2)  # the run, then the page by itself
    with connect(f"local:{opened_store.directory}") as client, ThreadPoolExecutor(2) as threads:
        table = client.table(V41)
        with opened_store.device.held():
            unlucky = threads.submit(table.lookup_ngrams, keys)
            opened_store.device.wait_for_readers(1)
            patient = threads.submit(table.lookup_ngrams, keys)
            assert eventually(lambda: client.stats()["in_flight_waits"] == keys.size)
        with pytest.raises(errors.StorageError, match=f"page {page} of"):
            unlucky.result(30)
        assert np.array_equal(patient.result(30), oracle.lookup_ngrams(keys))
    assert nothing_is_left_behind(opened_store.store)


def test_deadlines_pass_while_the_disk_hangs(packed: PackedStore, opened_store: Device) -> None:
    """The reader, those who wait for his records, and those who wait for a staging buffer."""
    oracle = packed.oracles[V41]
    many = [random_keys(oracle, 6, seed=seed) for seed in range(BUFFERS_MAX + 1)]
    device = opened_store.device
    with connect(f"local:{opened_store.directory}") as client, ThreadPoolExecutor(12) as threads:
        table = client.table(V41)

        def too_late(keys: np.ndarray, why: str) -> None:
            with pytest.raises(errors.DeadlineExceeded, match=rf"after 0\.1 s, while waiting for {why}"):
                table.lookup_ngrams(keys, timeout=0.1)

        with device.held():  # until all of them are back
            readers = [threads.submit(table.lookup_ngrams, many[0], timeout=1)]
            device.wait_for_readers(1)
            too_late(many[0], "another request to read the same rows")
            too_late(many[1], "the simulated device")
            readers += [threads.submit(table.lookup_ngrams, k, timeout=1) for k in many[1:BUFFERS_MAX]]
            device.wait_for_readers(BUFFERS_MAX)
            too_late(many[-1], "a free staging buffer")
            for reader in readers:
                with pytest.raises(errors.DeadlineExceeded, match="after 1 s"):
                    reader.result(20)
            assert client.stats()["failed_lookups"] == BUFFERS_MAX + 3
        assert nothing_is_left_behind(opened_store.store)
        for keys in many:
            assert np.array_equal(table.lookup_ngrams(keys, timeout=30), oracle.lookup_ngrams(keys))


def test_a_slow_disk_is_only_slow(packed: PackedStore, tmp_path: Path) -> None:
    oracle = packed.oracles[PLE]
    config = small_config(nvme=Nvme(read_threads=2, staging_bytes=128 << 10))
    faults = Faults(latency_s=(0.0, 0.002), error_rate=0.02, flip_rate=0.02, short_rate=0.01)
    with opened(packed.copy_to(tmp_path), config, faults) as made:
        good, bad = 0, 0
        with connect(f"local:{made.directory}") as client:
            table = client.table(PLE)
            for seed in range(60):
                keys = random_keys(oracle, 3, seed=seed)
                try:
                    assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
                    good += 1
                except errors.StorageError:
                    bad += 1
            stats = client.stats()
        assert good > bad
        assert stats["nvme_read_errors"] > 0
        assert stats["nvme_checksum_failures"] > 0
        assert nothing_is_left_behind(made.store)


def test_the_same_seed_gives_the_same_faults() -> None:
    class Quiet:
        def start(self, *run: Any, hint: bool) -> Any:
            pass

        def close(self) -> None:
            pass

    def fates(seed: int) -> list[list[str]]:
        device = SimulatedDevice(Quiet(), Faults(error_rate=0.3, flip_rate=0.3, short_rate=0.3), seed)
        order = np.random.default_rng(threading.get_ident()).permutation(50)  # threads come in any order
        found = {int(page): [device.fate_of(int(page)) for _ in range(3)] for page in order}
        return [found[page] for page in range(50)]

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)


def test_closing_waits_for_reads_and_drops_hints(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder) as made, ThreadPoolExecutor(2) as threads:
        client = connect(f"local:{folder}")
        table, store = client.table(V41), made.store
        with made.device.held():
            reading = threads.submit(table.lookup_ngrams, random_keys(oracle, 1))
            made.device.wait_for_readers(1)
            for seed in range(5):
                assert table.warm_ngrams(random_keys(oracle, 1, seed=50 + seed))
            made.device.wait_for_readers(2)
            closing = threads.submit(store.close)
            assert eventually(lambda: not store._hints._waiting)
            assert not closing.done()
        assert np.array_equal(reading.result(30), oracle.lookup_ngrams(random_keys(oracle, 1)))
        closing.result(30)
        assert made.device.reads == 2
        with suppress(errors.Unavailable):
            client.close()


def test_handles_are_bounded_and_closing_a_client_ends_them(
    packed: PackedStore, opened_store: Device
) -> None:
    oracle, device = packed.oracles[V41], opened_store.device
    batches = [random_keys(oracle, 1, seed=seed) for seed in range(7)]
    client = connect(f"local:{opened_store.directory}", prefetch_handles_max=6)
    table = client.table(V41)
    with ThreadPoolExecutor(1) as threads, device.held():
        handles = [table.prefetch_ngrams(keys) for keys in batches[:6]]
        device.wait_for_readers(4)  # as many as there are threads; two wait for one
        with pytest.raises(errors.Overloaded, match="6 prefetch handles are open"):
            table.prefetch_ngrams(batches[6])
        with pytest.raises(errors.DeadlineExceeded, match=r"after 0\.01 s; wait again"):
            handles[0].wait(0.01)
        handles[5].cancel()
        handles[5] = table.prefetch_ngrams(batches[6])
        closing = threads.submit(client.close)
        for handle in handles[4:]:
            with pytest.raises(errors.Cancelled):
                handle.wait(20)
        assert not closing.done()
        device.let_go()
        closing.result(30)
    for keys, handle in zip(batches[:4], handles[:4], strict=True):
        assert np.array_equal(handle.wait(0), oracle.lookup_ngrams(keys))
    with pytest.raises(errors.Cancelled, match="closed"):
        table.prefetch_ngrams(batches[0])


def test_hints_beyond_the_queue_are_dropped_and_counted(packed: PackedStore, opened_store: Device) -> None:
    oracle, asked = packed.oracles[V41], 200
    with connect(f"local:{opened_store.directory}") as client:
        table, most = client.table(V41), opened_store.store.config.limits.prefetch_queue_max
        with opened_store.device.held():
            assert table.warm_ngrams(random_keys(oracle, 2, seed=0))
            opened_store.device.wait_for_readers(1)
            taken = sum(table.warm_ngrams(random_keys(oracle, 2, seed=1 + i)) for i in range(asked))
            assert taken == most
            stats = client.stats()
            assert (stats["hints_accepted"], stats["hints_dropped"]) == (1 + most, asked - most)
        assert eventually(lambda: client.stats()["hints_done"] == 1 + most)
        assert table.warm_ngrams(random_keys(oracle, 2, seed=0))


def test_a_hint_that_fails_is_counted_and_hurts_nobody(
    packed: PackedStore, opened_store: Device, caplog: pytest.LogCaptureFixture
) -> None:
    oracle, keys = packed.oracles[V41], random_keys(packed.oracles[V41], 4)
    page = geometry(opened_store.store, V41).page_of_row(int(oracle.row_ids(keys)[2, 9]))
    opened_store.device.flip([page])
    with connect(f"local:{opened_store.directory}") as client:
        table = client.table(V41)
        assert table.warm_ngrams(keys)
        assert eventually(lambda: client.stats()["hints_done"] == 1)
        assert client.stats()["hints_failed"] == 1
        assert f"page {page} of" in caplog.text
        opened_store.device.heal()
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert table.warm_ngrams(random_rows(oracle, 3).reshape(1, 3))


def test_a_look_up_overtakes_a_hint_that_takes_long(packed: PackedStore, tmp_path: Path) -> None:
    """The hint hangs in the device with the records claimed; the look-up reads them itself."""
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(64 << 20)) as made, connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 20)
        with made.device.held():
            assert table.warm_ngrams(keys)
            made.device.wait_for_readers(1)
            handle = table.prefetch_ngrams(keys, timeout=60)
            made.device.wait_for_readers(2)  # the look-up did not wait for the hint to end
        assert np.array_equal(handle.wait(60), oracle.lookup_ngrams(keys))
        assert client.stats()["hints_overtaken"] == np.unique(keys).size
