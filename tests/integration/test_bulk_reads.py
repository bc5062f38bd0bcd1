"""Records in bulk from the disk into a device's memory, on CPU tensors: every byte against the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_client import connect, errors
from engram_client.deadline import Deadline
from engram_client.hbm import HbmTier
from tests.support.kvikio_stand_in import FailingCuFile, HangingCuFile, HostCuFile
from tests.support.stores import (
    LARGE,
    PLAIN,
    PLE,
    V41,
    V41_ROWS,
    Device,
    PackedStore,
    opened,
    random_keys,
    random_rows,
    small_config,
)
from tierstore.config import Hbm
from tierstore.devices.gds import GdsReader, OpenCuFile
from tierstore.store.table import ServedTable
from tierstore.tiers import hbm_fill
from tierstore.tiers.hbm_fill import DeviceFill, DirectWay

CPU = torch.device("cpu")
TINY = Hbm(staging_bytes=64 << 10, fill_run_pages_max=4, fill_gap_pages=1)  # 8 pages a half: many windows


@pytest.fixture
def device(packed: PackedStore, tmp_path: Path) -> Iterator[Device]:
    with opened(packed.copy_to(tmp_path), small_config(hbm=TINY)) as device:
        yield device


def wanted(
    packed: PackedStore, name: str, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of which some repeat, their orders, and their records."""
    oracle, random = packed.oracles[name], np.random.default_rng(seed)
    if name in (V41, PLE):
        keys = random_keys(oracle, count, seed)
        entries, orders = keys.ravel(), np.tile(np.arange(keys.shape[1]), count)
        records = oracle.lookup_ngrams(keys).reshape(entries.size, -1)
    else:
        entries = random_rows(oracle, count, seed)
        orders, records = np.zeros_like(entries), oracle.lookup(entries)
    some = random.integers(0, entries.size, entries.size + 5)
    return entries[some], orders[some], records[some]


def read(
    device: Device, name: str, entries: np.ndarray, orders: np.ndarray, timeout_s: float = 60
) -> np.ndarray:
    spec = device.store.table(name).spec
    out = torch.full((entries.size, spec.record_bytes), 7, dtype=torch.uint8)
    assert device.store.bulk.read(name, spec.generation, entries, orders, out, timeout_s) == "pinned"
    return out.numpy()


@pytest.mark.parametrize("name", [V41, PLE, V41_ROWS, PLAIN])
def test_records_are_the_checkpoints(device: Device, packed: PackedStore, name: str) -> None:
    for seed in range(2):
        entries, orders, records = wanted(packed, name, 60, seed)
        assert np.array_equal(read(device, name, entries, orders), records)
    stats = device.store.stats()
    assert stats["dram_hits"] == stats["dram_misses"] == stats["records_admitted"] == 0
    assert stats["nvme_reads"] < stats["nvme_pages"], "near pages were not joined"


def test_nothing_is_nothing(device: Device) -> None:
    none, table = np.empty(0, np.int64), device.store.table(V41).spec
    out = torch.empty((0, table.record_bytes), dtype=torch.uint8)
    assert device.store.bulk.read(V41, table.generation, none, none, out) == "none"


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"entries": np.array([-1])}, errors.IdOutOfRange, "cannot be -1"),
        ({"entries": np.array([-5])}, errors.IdOutOfRange, "-5"),
        ({"orders": np.array([3])}, errors.BadRequest, "orders 0 to 2"),
        ({"generation": "00" * 16}, errors.GenerationMismatch, "fetch it anew"),
        ({"name": "none"}, errors.UnknownTable, "none"),
        ({"out": torch.empty((1, 8), dtype=torch.uint8)}, errors.BadRequest, "contiguous uint8 tensor"),
        ({"out": torch.empty((1, 2112), dtype=torch.int8)}, errors.BadRequest, "torch.int8"),
    ],
)
def test_what_is_refused(device: Device, change: dict[str, object], kind: type[Exception], told: str) -> None:
    call = {
        "name": V41,
        "generation": device.store.table(V41).spec.generation,
        "entries": np.array([5]),
        "orders": np.array([0]),
        "out": torch.empty((1, 2112), dtype=torch.uint8),
    }
    with pytest.raises(kind, match=told):
        device.store.bulk.read(**{**call, **change})


def test_rows_larger_than_a_page_are_not_read_in_bulk(device: Device) -> None:
    with pytest.raises(errors.BadRequest, match="larger than a page"):
        read(device, LARGE, np.array([1]), np.array([0]))
    with connect(f"local:{device.directory}") as client:
        assert not client.table(LARGE).fills_devices and client.table(V41).fills_devices


def test_pinning_a_profile_reads_it_in_bulk(device: Device, packed: PackedStore) -> None:
    keys = random_keys(packed.oracles[V41], 200, seed=3, masked=0.2)
    with connect(f"local:{device.directory}") as client:
        tier = HbmTier([client.table(V41)], budget_bytes=4 << 20, device="cpu")
        tier.table(V41).pin(keys)
        stats = client.stats()
        assert stats["dram_misses"] == stats["dram_hits"] == 0 < stats["nvme_rows"]
        before = stats["nvme_rows"]
        assert tier.stats()["hbm_pinned"] == (keys >= 0).sum()
        rows = tier.table(V41).lookup_ngrams(keys)
        assert np.array_equal(rows.numpy(), packed.oracles[V41].lookup_ngrams(keys))
        assert client.stats()["nvme_rows"] == before, "what was pinned was read again"


class TestDamage:
    @pytest.fixture
    def page(self, device: Device) -> int:
        return device.store.table(PLAIN).row_file.geometry.first_page + 3

    @pytest.mark.parametrize("order", ["fail", "cut_short", "flip"])
    def test_what_goes_wrong_once_is_read_again(
        self, device: Device, packed: PackedStore, page: int, order: str
    ) -> None:
        getattr(device.device, order)([page], times=1)
        entries, orders, records = wanted(packed, PLAIN, 400, seed=1)
        assert np.array_equal(read(device, PLAIN, entries, orders), records)
        stats = device.store.stats()
        assert stats["nvme_checksum_failures"] + stats["nvme_read_errors"] >= 1

    @pytest.mark.parametrize(
        ("order", "kind", "told"),
        [
            ("fail", errors.StorageError, "could not be read: EIO"),
            ("cut_short", errors.StorageError, "could not be read: EIO"),
            ("flip", errors.DataCorrupt, "failed its checksum twice"),
        ],
    )
    def test_what_stays_wrong_is_an_error_that_names_the_page(
        self, device: Device, packed: PackedStore, page: int, order: str, kind: type[Exception], told: str
    ) -> None:
        getattr(device.device, order)([page])
        entries, orders, _ = wanted(packed, PLAIN, 400, seed=1)
        with pytest.raises(kind, match=f"page {page} of .*{told}"):
            read(device, PLAIN, entries, orders)

    def test_a_bad_page_that_nobody_wants_hurts_nobody(
        self, device: Device, packed: PackedStore, page: int
    ) -> None:
        """It lies in the gap between two that are wanted."""
        device.device.fail([page])
        rows = device.store.table(PLAIN).row_file.geometry.rows_of_page
        entries = np.array([rows(page - 1).start, rows(page + 1).start])
        found = read(device, PLAIN, entries, np.zeros_like(entries))
        assert np.array_equal(found, packed.oracles[PLAIN].lookup(entries))

    def test_a_disk_that_hangs_costs_only_the_time_given(self, device: Device, packed: PackedStore) -> None:
        """And what it writes late is in nobody's rows."""
        entries, orders, records = wanted(packed, V41, 40, seed=1)
        with device.device.held(), pytest.raises(errors.DeadlineExceeded):
            read(device, V41, entries, orders, timeout_s=0.1)
        assert np.array_equal(read(device, V41, entries, orders), records)


class TestDirectWay:
    """GPUDirect Storage by a stand-in, whose device memory is the host's."""

    def fill(
        self, device: Device, open_file: OpenCuFile, timeout_s: float = 60
    ) -> tuple[DeviceFill, GdsReader]:
        reader = GdsReader(open_file, threads=2)
        store = device.store
        fill = DeviceFill(
            store._reader, store.counters, CPU, staging_bytes=64 << 10, gap_pages_max=1, run_pages_max=4,
            direct_run_bytes=4096, direct_timeout_s=timeout_s,
            make_direct=lambda capacity: DirectWay(reader, CPU, capacity),
        )  # fmt: skip
        return fill, reader

    def read(self, fill: DeviceFill, table: ServedTable, rows: np.ndarray) -> tuple[str, np.ndarray]:
        out = torch.zeros((rows.size, table.spec.row_bytes), dtype=torch.uint8)
        targets = np.arange(rows.size)[::-1].copy()
        way = fill.read_rows(table.row_file, table.file, rows, targets, out, Deadline.after(60))
        return way, out.numpy()[::-1]

    def test_pages_by_cufile(self, device: Device, packed: PackedStore) -> None:
        fill, reader = self.fill(device, HostCuFile)
        rows = random_rows(packed.oracles[V41_ROWS], 300, seed=2)
        way, found = self.read(fill, device.store.table(V41_ROWS), rows)
        assert way == "direct" and np.array_equal(found, packed.oracles[V41_ROWS].lookup(rows))
        assert device.device.reads == 0, "our own reader was asked as well"
        reader.close()

    @pytest.mark.parametrize("open_file", [FailingCuFile, HangingCuFile])
    def test_where_it_fails_or_hangs_it_is_left_for_good(
        self,
        device: Device,
        packed: PackedStore,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        open_file: OpenCuFile,
    ) -> None:
        monkeypatch.setattr("tierstore.devices.gds.CLOSE_TIMEOUT_S", 0.01)
        monkeypatch.setattr(hbm_fill, "_hanging", hanging := [])
        HostCuFile.opened.clear()
        fill, reader = self.fill(device, open_file, timeout_s=0.2)
        oracle, table = packed.oracles[V41_ROWS], device.store.table(V41_ROWS)
        with caplog.at_level(logging.WARNING):
            for seed in range(2):
                rows = random_rows(oracle, 300, seed)
                _, found = self.read(fill, table, rows)
                assert np.array_equal(found, oracle.lookup(rows))
        assert self.read(fill, table, rows)[0] == "pinned"
        assert sum("is not used any more" in line for line in caplog.messages) == 1
        assert len(hanging) == (open_file is HangingCuFile), "memory that a read still writes to is kept"
        for file in HostCuFile.opened:
            if isinstance(file, HangingCuFile):
                file.let_go.set()
        reader.close()

    def test_it_is_not_asked_for_short_runs(self, device: Device, packed: PackedStore) -> None:
        asked: list[int] = []
        store = device.store

        def make(capacity: int) -> None:
            asked.append(capacity)

        fill = DeviceFill(
            store._reader, store.counters, CPU, staging_bytes=64 << 10, gap_pages_max=1, run_pages_max=4,
            direct_run_bytes=1 << 20, direct_timeout_s=60, make_direct=make,
        )  # fmt: skip
        rows = random_rows(packed.oracles[V41_ROWS], 20, seed=2)
        assert self.read(fill, store.table(V41_ROWS), rows)[0] == "pinned" and not asked


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def begin() -> None:
        def refuse(*args: object, **named: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")

        monkeypatch.setattr(hbm_fill, "bad_pages", refuse)

    return begin


def test_a_device_that_runs_out_of_memory_is_a_clear_error(
    device: Device, packed: PackedStore, out_of_memory: Callable[[], None]
) -> None:
    entries, orders, _ = wanted(packed, V41, 10, seed=1)
    out_of_memory()
    with pytest.raises(errors.BadRequest, match=r"cpu ran out of memory .* Tried to allocate 2.00 GiB; ask"):
        read(device, V41, entries, orders)
