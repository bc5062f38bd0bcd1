"""A training store whose disk is full, fails, or holds something else than what was committed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import DataCorrupt, StorageError, Unavailable
from tests.support.trained import TableModel, random_rows, tables
from tierstore.config import Training
from tierstore.testing.crashing_disk import CrashingDisk
from tierstore.updates import RowStorage

FOLDER = Path("store/training")
CONFIG = Training(keep_steps=2, segment_bytes=256 << 10, fold_batch_bytes=64 << 10)


@pytest.fixture
def disk() -> CrashingDisk:
    disk = CrashingDisk()
    disk.make_folder(FOLDER)
    RowStorage.create(FOLDER, tables(), disk=disk)
    return disk


def opened(disk: CrashingDisk) -> RowStorage:
    return RowStorage.open(FOLDER, CONFIG, disk=disk, background=False)


def step(storage: RowStorage, model: TableModel, number: int, rows: int = 100) -> None:
    random = np.random.default_rng(number)
    for table, spec in enumerate(storage.tables):
        ids, new = random_rows(random, spec, rows)
        storage.spill(table, ids, new)
        model.write(table, ids, new)
    storage.commit(number, []).wait()
    model.commit(number)


def test_a_full_disk_is_told_and_the_commit_goes_on_once_there_is_room(disk: CrashingDisk) -> None:
    storage = opened(disk)
    model = TableModel(storage)
    step(storage, model, 0)
    disk.capacity_bytes = disk.used_bytes()
    commit = storage.commit(1, [(1, *random_rows(np.random.default_rng(1), storage.tables[1], 4000))] * 4)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"the disk is full .* bytes wait to be written, 0 are free"):
            commit.wait()
    assert storage.step() == 0
    disk.capacity_bytes = None
    commit.wait()
    assert storage.step() == 1


def test_what_was_committed_survives_a_full_disk_and_a_power_cut(disk: CrashingDisk) -> None:
    storage = opened(disk)
    model = TableModel(storage)
    step(storage, model, 0)
    disk.capacity_bytes = disk.used_bytes()
    commit = storage.commit(1, [(1, *random_rows(np.random.default_rng(1), storage.tables[1], 5000))] * 4)
    with pytest.raises(StorageError, match="the disk is full"):
        commit.wait()
    disk.crash(np.random.default_rng(0))
    storage = opened(disk)
    assert storage.step() == 0
    model.check(storage)


@pytest.mark.parametrize("file", ["journal", "narrow.rows", "epochs-1"])
def test_a_disk_that_is_full_while_folding_loses_nothing(disk: CrashingDisk, file: str) -> None:
    storage = opened(disk)
    model = TableModel(storage)
    for number in range(4):
        step(storage, model, number)
    disk.refuse = lambda op, path: errno.ENOSPC if (op, path.name) == ("write", file) else None
    with pytest.raises(StorageError, match="folding the update log into pages failed: No space left"):
        storage.fold()
    model.check(storage)
    disk.refuse = lambda op, path: None
    step(storage, model, 4)
    assert storage.fold()
    model.check(storage)
    disk.crash(np.random.default_rng(0))
    model.check(opened(disk))


def test_a_failed_sync_is_final_until_the_store_is_opened_again(disk: CrashingDisk) -> None:
    storage = opened(disk)
    model = TableModel(storage)
    step(storage, model, 0)
    commit = storage.commit(1, [])
    disk.refuse = lambda op, path: errno.EIO if op == "sync" else None
    with pytest.raises(StorageError, match=r"Input/output error; what the disk holds is not known any more"):
        commit.wait()
    disk.refuse = lambda op, path: None
    with pytest.raises(StorageError, match="open the store again"):
        storage.spill(1, *random_rows(np.random.default_rng(1), storage.tables[1], 3))
    model.check(storage)  # reading goes on
    storage.close()
    storage = opened(disk)
    assert storage.step() in (0, 1)
    model.check(storage)
    step(storage, model, 2)


def test_a_damaged_block_before_a_commit_is_an_error_and_never_an_older_step(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    RowStorage.create(folder, tables())
    with RowStorage.open(folder, Training()) as storage:
        for number in range(3):
            step(storage, TableModel(storage), number)
    (segment,) = (folder / "log").iterdir()
    whole = segment.read_bytes()
    header = whole.index(b"TSUPDATE", 3 * 4096)
    segment.write_bytes(whole[: header + 41] + b"\xff" + whole[header + 42 :])
    with pytest.raises(
        DataCorrupt, match=rf"00000000.seg: a block at byte {header} \(position \d+ of the log\)"
    ):
        RowStorage.open(folder, Training())
    shutil.rmtree(folder / "index")  # the log itself says that more had been committed
    with pytest.raises(DataCorrupt, match=f"00000000.seg: a block at byte {header}"):
        RowStorage.open(folder, Training())
    assert segment.stat().st_size == len(whole)  # nothing was cut
    segment.write_bytes(whole)
    with RowStorage.open(folder, Training()) as storage:  # and the index is made again
        assert storage.steps() == [1, 2]


def test_a_damaged_row_of_the_log_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    RowStorage.create(folder, tables())
    rows = np.full((3, tables()[1].row_bytes), 0xA5, np.uint8)
    with RowStorage.open(folder, Training()) as storage:
        storage.commit(0, [(1, np.array([7, 8, 9]), rows)]).wait(10)
    (segment,) = (folder / "log").iterdir()
    raw = bytearray(segment.read_bytes())
    raw[raw.index(b"\xa5" * 22, raw.index(b"\xa5" * 22) + 22)] ^= 1  # of the second row
    segment.write_bytes(raw)
    with RowStorage.open(folder, CONFIG) as storage:
        storage.read(1, np.array([7, 9]), rows[:2].copy())
        with pytest.raises(DataCorrupt, match=r"00000000\.seg: row 8 at byte"):
            storage.read(1, np.array([7, 8, 9]), rows)


def test_a_child_that_closes_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    folder, config = tmp_path / "training", Training(segment_bytes=256 << 10)
    RowStorage.create(folder, tables())
    with RowStorage.open(folder, config) as storage:
        model = TableModel(storage)
        step(storage, model, 0, rows=2000)
        storage.commit(1, []).wait()  # by now what is made ahead is made
        pid = os.fork()
        if pid == 0:
            try:
                storage.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        for number in range(2, 5):
            step(storage, model, number, rows=2000)
    with RowStorage.open(folder, config) as storage:
        assert storage.step() == 4
        model.check(storage)


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_before_the_first_commit_leaves_an_empty_store(disk: CrashingDisk, seed: int) -> None:
    storage, random = opened(disk), np.random.default_rng(seed)
    for _ in range(8):  # more than a segment
        storage.spill(1, *random_rows(random, storage.tables[1], 4000))
        while storage.write_block():
            pass
    disk.crash(random)
    storage = opened(disk)
    assert storage.step() is None
    model = TableModel(storage)
    model.check(storage)
    step(storage, model, 0)
    disk.crash(random)
    model.check(opened(disk))


def test_a_fold_whose_last_sync_failed_is_not_in_the_way_of_the_next(disk: CrashingDisk) -> None:
    storage = opened(disk)
    model = TableModel(storage)
    for number in range(4):
        step(storage, model, number, rows=2000)
    disk.refuse = lambda op, path: errno.EIO if (op, path.name) == ("sync_folder", "log") else None
    with pytest.raises(StorageError, match="folding"):
        storage.fold()
    disk.refuse = lambda op, path: None
    step(storage, model, 4)
    assert storage.fold()
    model.check(storage)
    storage.close()
    with pytest.raises(Unavailable, match="is closed"):
        storage.fold()


def test_a_forked_child_is_refused_and_does_not_keep_the_store(disk: CrashingDisk, tmp_path: Path) -> None:
    storage = opened(disk)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            storage.commit(0, [])
        except Unavailable as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"belongs to the process that opened it" in os.read(read, 500)
    os.close(read)
    os.close(write)
