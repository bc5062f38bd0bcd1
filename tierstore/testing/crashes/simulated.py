"""Training on a disk that loses power, from one seed: everything in one thread, so a seed repeats itself.

A run makes a store and lives several lives in it: it spills, commits, writes, folds, reads, takes snapshots,
copies them into stores of their own while all that goes on, and goes back, each at random, until power fails
at a random operation of the disk, in recovery too. What must be there afterwards is what the last
acknowledged commit or rollback left, or one of those that were on their way, whole; and in every copy that
was made the step that it is of.

The model is arrays of rows. It shares no code with the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import BadRequest, FormatError, Overloaded
from engram_client.spec import Field, RowLayout
from tierstore.config import Training
from tierstore.testing.crashing_disk import CrashingDisk, PowerLost
from tierstore.updates import Commit, Initial, RowStorage, Snapshot, TrainedSpec
from tierstore.updates.filled import create_filled

FOLDER = Path("store/training")
KIB = 1024
TABLES = (
    TrainedSpec("wide", 800, RowLayout((Field("weight", "bfloat16", 24), Field("master", "float32", 24),
                                        Field("adam_m", "float32", 9))), Initial("normal", 0.02, 3),
                uuid="11" * 16),
    TrainedSpec("narrow", 1500, RowLayout((Field("weight", "float32", 5), Field("sum", "bfloat16", 1))),
                uuid="22" * 16),
    TrainedSpec("large", 12, RowLayout((Field("weight", "float32", 1500),)), Initial("normal", 1.0, 4),
                uuid="33" * 16),
)  # fmt: skip
DELICATE = (  # how an operation and its file's name begin, how that ends
    ("sync ", ".rows"),
    ("sync ", ".rows"),
    ("write ", ".rows"),
    ("sync journal", ""),
    ("sync superblock", ""),
    ("sync epochs-", ""),
    ("sync_folder", ""),
    ("sync ", ".seg"),
    ("unlink ", ""),
    ("steps", ""),
)
Rows = list[np.ndarray]  # uint8 [rows, row_bytes] for each table


class WrongAfterCrash(AssertionError):
    """What a store said or held is not what it must be."""


@dataclass
class Point:
    """What a commit or a rollback leaves: the step, all rows, its state, and the steps up to it."""

    step: int | None
    rows: Rows
    state: bytes
    history: list[Point]  # commits up to this one, itself included
    commit: Commit | None = None  # on its way until it is durable


class Interrupted:
    """A snapshot with something else before every read of it. See `create_filled`."""

    def __init__(self, snapshot: Snapshot, between: Callable[[], None]) -> None:
        self._snapshot, self._between = snapshot, between

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        return self._snapshot.touched(table, first, last)

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        self._between()
        self._snapshot.read(table, ids, out)


class SimulatedRun:
    """One seed."""

    def __init__(self, seed: int, make_disk: Callable[[], CrashingDisk] = CrashingDisk) -> None:
        self.seed = seed
        self.crashes = self.recovered_in_flight = 0
        self._random = np.random.default_rng(seed)
        self._disk = make_disk()
        self._config = Training(
            queue_bytes=64 * KIB,
            segment_bytes=256 * KIB,
            log_bytes_max=1024 * KIB,
            fold_bytes=64 * KIB,
            fold_batch_bytes=4 * KIB * self._number(1, 9),
            fold_rows_bytes=64 * KIB,
            read_buffer_bytes=256 * KIB,
            keep_steps=int(self._random.integers(1, 4)),
        )
        self._points: list[Point] = []  # the last acknowledged one, then those on their way
        self._now: Rows = []
        self._snapshots: list[tuple[Snapshot, Point]] = []
        self._copies: list[tuple[Path, Point]] = []  # which nothing has been asked of since a crash
        self.copies = 0

    def run(self, lives: int = 4) -> None:
        """Raises WrongAfterCrash, or whatever the store raises that it must not."""
        self._create()
        for _ in range(lives):
            storage = self._recover()
            try:
                self._lose_power_within(250)
                while True:
                    self._act(storage)
            except PowerLost:
                self._crash()
        self._disk.keep_power()
        storage = self._recover()
        while storage.fold():
            pass
        self._check_all(storage, self._points[0])
        storage.close()
        self._check_copies()

    def _number(self, low: int, high: int) -> int:
        return int(self._random.integers(low, high))

    def _lose_power_within(self, operations: int) -> None:
        """At any operation, or every other time at one of a few kinds where much is at stake."""
        self._disk.lose_power_at = self._disk.operations + self._number(1, operations)
        if self._number(0, 2):
            kind, left = DELICATE[self._number(0, len(DELICATE))], self._number(1, 8)

            def is_reached(operation: str, path: Path) -> bool:
                nonlocal left
                left -= f"{operation} {path.name}".startswith(kind[0]) and path.name.endswith(kind[1])
                return left <= 0

            self._disk.lose_power_at = self._disk.operations + 4 * operations
            self._disk.lose_power_when = is_reached

    def _crash(self) -> None:
        self.crashes += 1
        self._snapshots = []
        self._disk.crash(self._random)

    def _create(self) -> None:
        self._disk.make_folder(FOLDER)
        self._disk.sync_folder(FOLDER.parent)
        if self._number(0, 4) == 0:
            self._lose_power_within(60)
        while True:
            try:
                RowStorage.create(FOLDER, TABLES, disk=self._disk)
                break
            except PowerLost:
                self._crash()
            if self._is_there():
                break
        self._disk.keep_power()

    def _is_there(self) -> bool:
        try:
            self._open().close()
            return True
        except FormatError:
            return False

    def _open(self) -> RowStorage:
        return RowStorage.open(FOLDER, self._config, disk=self._disk, background=False)

    def _recover(self) -> RowStorage:
        """Open, through crashes of opening itself, and hold the store against what it may be."""
        while True:
            try:
                if self._number(0, 3) == 0:
                    self._lose_power_within(60)
                storage = self._open()
                self._disk.keep_power()
                break
            except PowerLost:
                self._crash()
        if not self._points:
            rows = [self._read_all(storage, table) for table in range(len(TABLES))]
            self._points = [Point(None, rows, b"", [])]
        self._settle(storage)
        self._check_copies()
        return storage

    def _settle(self, storage: RowStorage) -> None:
        """Find which point this is, and go on from it."""
        step = storage.step()
        found = [self._read_all(storage, table) for table in range(len(TABLES))]
        for number, point in enumerate(self._points):
            same = point.step == step and all(map(np.array_equal, point.rows, found))
            if same and storage.state() == point.state:
                self.recovered_in_flight += number > 0
                self._points = [point]
                point.commit = None
                self._now = [rows.copy() for rows in point.rows]
                self._check_steps(storage, point)
                return
        allowed = [p.step for p in self._points]
        expected = self._points[0].rows
        differing = [int((a != b).any(axis=1).sum()) for a, b in zip(expected, found, strict=True)]
        raise WrongAfterCrash(
            f"recovered step {step}; expected one of {allowed} (the first acknowledged) with its rows and "
            f"state; rows that differ from the first, by table: {differing}"
        )

    def _check_steps(self, storage: RowStorage, point: Point) -> None:
        kept, history = storage.steps(), [p.step for p in point.history][-self._config.keep_steps :]
        suffix = history[len(history) - len(kept) :]
        if kept != suffix or (history and not kept):
            raise WrongAfterCrash(f"kept steps: expected the end of {history}, got {kept}")

    def _check_copies(self) -> None:
        for folder, point in self._copies:
            with RowStorage.open(folder, self._config, disk=self._disk, background=False) as copy:
                if (copy.step(), copy.state()) != (point.step, point.state):
                    raise WrongAfterCrash(f"{folder}: expected step {point.step}, got {copy.step()}")
                self._check_all(copy, point)
        self._copies = []

    def _check_all(self, storage: RowStorage, point: Point) -> None:
        for table in range(len(TABLES)):
            self._same(self._read_all(storage, table), point.rows[table], f"table {table}")

    def _same(self, found: np.ndarray, expected: np.ndarray, what: str) -> None:
        wrong = np.flatnonzero((found != expected).any(axis=1))
        if wrong.size:
            raise WrongAfterCrash(f"{what}: {wrong.size} rows are wrong, the first is {wrong[0]}")

    def _read_all(self, storage: RowStorage | Snapshot, table: int) -> np.ndarray:
        out = np.zeros((TABLES[table].rows, TABLES[table].row_bytes), np.uint8)
        storage.read(table, np.arange(TABLES[table].rows), out)
        return out

    # What a life is made of.

    def _act(self, storage: RowStorage) -> None:
        actions = [self._spill] * 4 + [self._commit] * 3 + [self._write] * 5 + [self._fold] * 5
        actions += [self._read] * 2 + [self._wait] * 2 + [self._go_back, self._take_snapshot]
        actions += [self._read_snapshot, self._drop_snapshot, self._copy_snapshot]
        actions[self._number(0, len(actions))](storage)
        self._note_durable()

    def _note_durable(self) -> None:
        for number in reversed(range(len(self._points))):
            commit = self._points[number].commit
            if number and commit and commit.durable:
                self._points = self._points[number:]
                break

    def _new_rows(self, table: int) -> tuple[np.ndarray, np.ndarray]:
        spec = TABLES[table]
        count = self._number(1, min(50, spec.rows // 2))
        ids = self._random.choice(spec.rows, count, replace=False).astype(np.int64)
        return ids, self._random.integers(0, 256, (count, spec.row_bytes), dtype=np.uint8)

    def _spill(self, storage: RowStorage) -> None:
        table = self._number(0, len(TABLES))
        ids, rows = self._new_rows(table)
        try:
            storage.spill(table, ids, rows)
        except Overloaded:
            return  # kept steps and snapshots fill the log
        self._now[table][ids] = rows

    def _commit(self, storage: RowStorage) -> None:
        last = self._points[-1]
        step = self._number(1, 3) + (-1 if last.step is None else last.step)
        dirty = [(t, *self._new_rows(t)) for t in range(len(TABLES)) if self._number(0, 2)]
        rows = [r.copy() for r in self._now]
        for table, ids, new in dirty:
            rows[table][ids] = new
        point = Point(step, rows, self._random.bytes(self._number(0, 9)), last.history)
        point.history = [*last.history, point]
        self._points.append(point)
        try:
            point.commit = storage.commit(step, dirty, point.state)
        except Overloaded:  # by snapshots alone; what had been queued of it is queued once more
            for snapshot, _ in self._snapshots:
                snapshot.close()
            self._snapshots = []
            point.commit = storage.commit(step, dirty, point.state)
        self._now = [r.copy() for r in rows]

    def _write(self, storage: RowStorage) -> None:
        storage.write_block()

    def _wait(self, storage: RowStorage) -> None:
        commit = self._points[-1].commit
        if commit:
            commit.wait()

    def _fold(self, storage: RowStorage) -> None:
        for _ in range(self._number(1, 4)):
            storage.fold_batch()

    def _read(self, storage: RowStorage) -> None:
        table = self._number(0, len(TABLES))
        ids = self._random.permutation(TABLES[table].rows)[: self._number(1, 200)]
        out = np.zeros((ids.size, TABLES[table].row_bytes), np.uint8)
        storage.read(table, ids, out)
        self._same(out, self._now[table][ids], f"rows of table {table} while training")

    def _go_back(self, storage: RowStorage) -> None:
        kept = storage.steps()
        if not kept or self._number(0, 2):
            return
        step = kept[self._number(0, len(kept))]
        old = next(p for p in self._points[-1].history if p.step == step)
        point = Point(step, old.rows, old.state, old.history)
        self._points.append(point)
        try:
            state = storage.rollback(step)
        except BadRequest:  # what was on its way came first, and this step is too old now
            self._points.pop()
            return
        self._points = [point]
        self._now = [r.copy() for r in old.rows]
        if state != old.state:
            raise WrongAfterCrash(f"rollback to step {step}: expected state {old.state!r}, got {state!r}")
        self._check_steps(storage, point)

    def _take_snapshot(self, storage: RowStorage) -> None:
        kept = storage.steps()
        if kept and len(self._snapshots) < 2:
            step = kept[self._number(0, len(kept))]
            point = next(p for p in self._points[-1].history if p.step == step)
            self._snapshots.append((storage.snapshot(step), point))

    def _read_snapshot(self, storage: RowStorage) -> None:
        if self._snapshots:
            snapshot, point = self._snapshots[self._number(0, len(self._snapshots))]
            table = self._number(0, len(TABLES))
            self._same(self._read_all(snapshot, table), point.rows[table], f"snapshot of step {point.step}")

    def _copy_snapshot(self, storage: RowStorage) -> None:
        """As `tierstore snapshot` makes it, while training goes on."""
        if not self._snapshots or self._number(0, 2):
            return
        snapshot, point = self._snapshots[self._number(0, len(self._snapshots))]
        folder = FOLDER.with_name(f"copy{self.copies}")
        self.copies += 1
        create_filled(
            folder, TABLES, Interrupted(snapshot, lambda: self._go_on(storage)), lambda table, row: None,
            disk=self._disk,
        )  # fmt: skip
        with RowStorage.open(folder, self._config, disk=self._disk, background=False) as copy:
            copy.commit(point.step or 0, (), point.state).wait()
        self._copies.append((folder, point))

    def _go_on(self, storage: RowStorage) -> None:
        actions = [self._spill, self._spill, self._write, self._write, self._fold, self._fold, self._read]
        actions[self._number(0, len(actions))](storage)

    def _drop_snapshot(self, storage: RowStorage) -> None:
        if self._snapshots:
            self._snapshots.pop(self._number(0, len(self._snapshots)))[0].close()
