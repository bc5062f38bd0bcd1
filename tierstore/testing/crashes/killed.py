"""Training in real processes that are killed (kill -9) at random moments.

What is trained is a function of the step alone: which rows change, and what every byte of a row then is. So
the parent knows what each step must have left without a line of the store's code, and a child that trains a
step again after it went back writes the same. A child tells through a pipe what it began and what it was
told is done; the parent kills it when it likes, has another child open the store and hand all rows over,
and compares. Then a third child publishes or copies what was found, and is killed too (outputs.py).

Children are forked by a parent that never opens a store itself.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engram_client.spec import Field, RowLayout
from tierstore.config import Training
from tierstore.testing.crashes.outputs import Served, copy, publish, remove_copy
from tierstore.testing.crashes.simulated import WrongAfterCrash
from tierstore.updates import RowStorage, TrainedSpec
from tierstore.updates.warm import warm_up

ROWS = (20_000, 3_000)
ROW_BYTES = (264, 1032)
CHANGED = 400  # rows of a table in a step
CONFIG = Training(
    keep_steps=3,
    queue_bytes=1 << 20,
    segment_bytes=1 << 20,
    log_bytes_max=16 << 20,
    fold_bytes=3 << 20,
    fold_batch_bytes=256 << 10,
)
LIFE_S = 0.6  # at most, from the first step on
OUTPUT_S = 0.25  # about as long as it takes to publish or copy


def changed_ids(step: int, table: int) -> np.ndarray:
    """Which rows a step changes: int64 [CHANGED], distinct."""
    stride = (7919, 1009)[table]  # no divisor of the number of rows
    return (np.arange(CHANGED) * stride + step * 104_729) % ROWS[table]


def content(step: int, table: int, ids: np.ndarray) -> np.ndarray:
    """What they become: uint8 [n, row_bytes]."""
    words = np.arange(ROW_BYTES[table] // 8, dtype=np.uint64)
    keys = (ids.astype(np.uint64) * np.uint64(2) + np.uint64(table)) * np.uint64(0x9E3779B97F4A7C15)
    salt = np.uint64(step * 0xBF58476D1CE4E5B9 % 2**64)
    mixed = (keys[:, None] + words * np.uint64(0xD1B54A32D192ED03)) ^ salt
    mixed *= np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(29))).view(np.uint8)


class Expected:
    """All rows as of any step, from the two functions above."""

    def __init__(self) -> None:
        self._step = -1
        self._rows = [np.zeros(shape, np.uint8) for shape in zip(ROWS, ROW_BYTES, strict=True)]
        self._first = [rows.copy() for rows in self._rows]

    def at(self, step: int) -> list[np.ndarray]:
        """uint8 [rows, row_bytes] of each table; -1: before the first step."""
        if step < self._step:
            self._step, self._rows = -1, [rows.copy() for rows in self._first]
        for done in range(self._step + 1, step + 1):
            for table, rows in enumerate(self._rows):
                ids = changed_ids(done, table)
                rows[ids] = content(done, table, ids)
        self._step = step
        return self._rows


def create(folder: Path) -> None:
    layouts = [RowLayout((Field("weight", "float32", size // 4),)) for size in ROW_BYTES]
    RowStorage.create(folder, [TrainedSpec(f"t{i}", ROWS[i], layouts[i]) for i in range(2)])


def train(folder: Path, seed: int, tell: Callable[[str], None]) -> None:
    """A child's life: until it is killed."""
    random = np.random.default_rng(seed)
    storage = RowStorage.open(folder, CONFIG)
    last = storage.step()
    step = 0 if last is None else last + 1
    tell("ready")
    pending = []
    while True:
        for table in range(2):
            ids = changed_ids(step, table)
            half = CHANGED // 2
            storage.spill(table, ids[:half], content(step, table, ids[:half]))
        dirty = [
            (t, ids[half:], content(step, t, ids[half:])) for t in range(2) for ids in [changed_ids(step, t)]
        ]
        tell(f"begun {step}")
        pending.append(storage.commit(step, dirty, b"%d" % step))
        if random.integers(3):
            pending[-1].wait(60)
        for commit in [c for c in pending if c.durable]:
            tell(f"done {commit.step}")
            pending.remove(commit)
        step += 1
        if random.integers(12) == 0:
            with storage.snapshot() as snapshot:
                rows = np.zeros((ROWS[0], ROW_BYTES[0]), np.uint8)
                snapshot.read(0, np.arange(ROWS[0]), rows)
        if random.integers(15) == 0:
            for commit in pending:
                commit.wait(60)
                tell(f"done {commit.step}")
            pending = []
            target = int(random.choice(storage.steps()))
            tell(f"back {target}")
            storage.rollback(target)
            tell(f"done {target}")
            step = target + 1


def show(folder: Path, out: Path, tell: Callable[[str], None]) -> None:
    """Another child: open what the first has left, and hand it over."""
    with RowStorage.open(folder, CONFIG) as storage:
        step = storage.step()
        for table in range(2):
            rows = np.zeros((ROWS[table], ROW_BYTES[table]), np.uint8)
            storage.read(table, np.arange(ROWS[table]), rows)
            rows.tofile(out / f"rows{table}")
        tell(f"step {-1 if step is None else step} {storage.state().decode() or -1}")


def fork(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Run `work` in a child; its pid, and the descriptor that its lines come from."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.close(read)
        work(lambda line: _write_all(write, f"{line}\n".encode()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _write_all(fd: int, line: bytes) -> None:
    os.write(fd, line)  # so short a line is written whole


def lines_until(fd: int, stop_at_s: float, line: str = "") -> list[str]:
    """What a child says until then, or until it ends, or until this line is among it."""
    raw = b""
    while (left_s := stop_at_s - time.monotonic()) > 0:
        if not select.select([fd], [], [], left_s)[0]:
            break
        chunk = os.read(fd, 65536)
        raw += chunk
        if not chunk or (line and f"{line}\n".encode() in raw):
            break
    return raw.decode().splitlines()


class KilledRun:
    """Lives in one store, one after another. Raises WrongAfterCrash."""

    def __init__(self, seed: int, folder: Path | None = None) -> None:
        self._random = np.random.default_rng(seed)
        self._base = Path(tempfile.mkdtemp(prefix="tierstore-kills-", dir=folder))
        self._store = self._base / "training"
        self._expected = Expected()
        self._seed, self._step = seed, -1
        self._served = Served(self._base)
        self.kills = self.steps = self.recovered_in_flight = 0
        self.outputs_killed = 0  # of those, while they published or copied

    def run(self, kills: int) -> None:
        try:
            warm_up()  # what is loaded before a fork need not be loaded after each
            self._ends(fork(lambda tell: create(self._store)))
            for _ in range(kills):
                self._live()
        finally:
            shutil.rmtree(self._base, ignore_errors=True)

    def _live(self) -> None:
        seed = self._seed * 10_000 + self.kills
        pid, fd = fork(lambda tell: train(self._store, seed, tell))
        said = lines_until(fd, time.monotonic() + 120, "ready")
        if said[:1] != ["ready"]:
            raise WrongAfterCrash(f"a child could not open the store after {self.kills} kills")
        said = said[1:] + lines_until(fd, time.monotonic() + float(self._random.uniform(0, LIFE_S)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said += lines_until(fd, time.monotonic() + 60)
        os.close(fd)
        self.kills += 1
        self._check(said)
        if self._step >= 0:
            self._kill_output()

    def _kill_output(self) -> None:
        """Publish or copy, killed at a random moment; then to the end, and everything is looked at."""
        publishes = self._random.integers(2) == 0
        work = publish if publishes else copy
        if not publishes:
            remove_copy(self._base)
        for is_killed in (True, False):
            pid, fd = fork(lambda tell: work(self._base, tell))
            said = lines_until(fd, time.monotonic() + 120, "opened")
            if is_killed:
                said += lines_until(fd, time.monotonic() + float(self._random.uniform(0, OUTPUT_S)))
                os.kill(pid, signal.SIGKILL)
            said += lines_until(fd, time.monotonic() + 120)
            os.close(fd)
            status = os.waitpid(pid, 0)[1]
            self.outputs_killed += is_killed and "done" not in said
            there = (self._base / "copy").exists()
            if not is_killed and (status or "done" not in said):
                raise WrongAfterCrash(f"after one was killed nobody can {work.__name__} any more; see above")
            if publishes:
                self._served.check(self._step, "done" in said, self._expected.at)
            elif there or "done" in said:
                self._look(self._base / "copy" / "training", [self._step])
            if not publishes and there:
                break  # a second one would be refused
        if publishes:
            self._served.check_clean()
            self._served.forget_retired()
        elif left := list(self._base.glob(".copy*")):
            raise WrongAfterCrash(f"left by a copy that was killed: {left}")
        self._look(self._store, [self._step])

    def _check(self, said: list[str]) -> None:
        """What was acknowledged last, or anything that was begun after that."""
        allowed = [self._step]
        for what, step in (line.split() for line in said):
            if what == "done":
                allowed = allowed[allowed.index(int(step)) :]
                self.steps += 1
            else:
                allowed.append(int(step))
        self._step = self._look(self._store, allowed)
        self.recovered_in_flight += self._step != allowed[0]

    def _look(self, store: Path, allowed: list[int]) -> int:
        """The step that a store is at, one of these, whole."""
        pid, fd = fork(lambda tell: show(store, self._base, tell))
        told = lines_until(fd, time.monotonic() + 120)
        os.close(fd)
        self._reap(pid)
        _, found, state = told[-1].split()
        if int(found) not in allowed or state != found:
            raise WrongAfterCrash(f"{store}: step {found}, state {state}; expected one of {allowed}")
        for table, expected in enumerate(self._expected.at(int(found))):
            rows = np.fromfile(self._base / f"rows{table}", np.uint8).reshape(expected.shape)
            wrong = np.flatnonzero((rows != expected).any(axis=1))
            if wrong.size:
                raise WrongAfterCrash(
                    f"{store}: step {found}, table {table}: {wrong.size} rows are wrong, the first is "
                    f"{wrong[0]}"
                )
        return int(found)

    def _ends(self, child: tuple[int, int]) -> None:
        lines_until(child[1], time.monotonic() + 120)
        os.close(child[1])
        self._reap(child[0])

    def _reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        if status:
            raise WrongAfterCrash(f"a child that was to open the store failed (status {status}); see above")
