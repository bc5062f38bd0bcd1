"""Look-ups of a serving daemon while a newly trained generation is published, taken up and rolled back."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Client, Table, connect
from engram_client.spec import Field, RowLayout
from tierbench.daemon import Daemon, running_daemon
from tierbench.pauses import Call, Phases, looking
from tierstore.config import Training
from tierstore.snapshots.rows import FOLDER
from tierstore.updates import Initial, RowStorage, TrainedSpec

TABLE, COMMIT_ROWS, HOT_IDS = "trained", 100_000, 4096
KEEP_S = 3600  # earlier generations stay
TIMEOUT_S = 120.0


class Publishing:
    """A training store of two steps under `folder`, and a store that serves what is published of it."""

    def __init__(self, folder: Path, rows: int, dim: int, seed: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._trained, self._served = folder / "trained", folder / "served"
        self._random = np.random.default_rng(seed)
        fields = (
            Field("weight", "float32", dim),
            Field("adam_m", "float32", dim),
            Field("adam_v", "float32", dim),
        )
        spec = TrainedSpec(TABLE, rows, RowLayout(fields), Initial("normal", 0.1, seed))
        RowStorage.create(self._trained / FOLDER, [spec])
        with RowStorage.open(self._trained / FOLDER, Training()) as storage:
            for step in range(2):
                ids = self._random.choice(rows, min(rows, COMMIT_ROWS), replace=False).astype(np.int64)
                changed = self._random.integers(0, 256, (ids.size, spec.row_bytes), np.uint8)
                storage.commit(step, [(0, ids, changed)]).wait(TIMEOUT_S)
        self._hot = self._random.integers(0, rows, HOT_IDS)
        self._commands = _Commands()
        self.publish(0)

    def publish(self, step: int) -> None:
        """By the command, in a process of its own."""
        self._tierstore("publish", str(self._trained), str(self._served), "--step", str(step), "--quiet")

    def roll_back(self) -> None:
        self._tierstore("rollback", str(self._served), TABLE)

    def _tierstore(self, *arguments: str) -> None:
        self._commands.run([sys.executable, "-m", "tierstore.cli", *arguments])

    def close(self) -> None:
        self._commands.close()

    def measure(self, rounds: int, phase_s: float, ids: int, dram_bytes: int) -> dict[str, Any]:
        """What calls of `ids` hot row ids took, by phase."""
        phases = Phases()
        settings = {"serve.earlier_generation_s": KEEP_S}
        with (
            running_daemon(self._served, dram_bytes=dram_bytes, settings=settings) as daemon,
            _clients(daemon) as clients,
            looking([_call(client, self._hot, ids) for client in clients]) as lookers,
        ):
            time.sleep(phase_s)  # what is hot comes to DRAM
            for number in range(rounds):
                with phases.phase("quiet"):
                    time.sleep(phase_s)
                with phases.phase("publish"):
                    self.publish((number + 1) % 2)
                with phases.phase("switch"):
                    _switch(daemon, clients[0], phase_s)
                with phases.phase("roll back"):
                    self.roll_back()
                    _switch(daemon, clients[0], phase_s)
        return phases.told(lookers)


class _Commands:
    """Runs commands by a shell that was started before anything is timed.

    Starting a process holds the starter's interpreter lock until the other program is loaded: a pause of the
    clients in here, and none of the daemon that they call.
    """

    def __init__(self) -> None:
        self._shell = subprocess.Popen(["/bin/sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command: list[str]) -> None:
        """Raises CalledProcessError."""
        assert self._shell.stdin and self._shell.stdout
        line = shlex.join(["timeout", f"{TIMEOUT_S:.0f}", *command])
        self._shell.stdin.write(f"{line} </dev/null >/dev/null; echo $?\n")
        self._shell.stdin.flush()
        code = int(self._shell.stdout.readline())
        if code:
            raise subprocess.CalledProcessError(code, command)

    def close(self) -> None:
        self._shell.communicate()


@contextmanager
def _clients(daemon: Daemon) -> Iterator[list[Client]]:
    """One that reads in shared memory, and one of another machine."""
    with connect(daemon.unix) as near, connect(daemon.tcp) as far:
        yield [near, far]


def _call(client: Client, hot: np.ndarray, ids: int) -> Call:
    """Looks some of `hot` up, and moves over to a new generation every now and then."""
    tables: list[Table] = [client.table(TABLE)]

    def call(number: int) -> bool:
        if number % 64 == 0:
            tables[0] = client.table(TABLE)
        start = number * ids % (hot.size - ids)
        tables[0].lookup(hot[start : start + ids])
        return False

    return call


def _switch(daemon: Daemon, client: Client, phase_s: float) -> None:
    """Have the daemon take the current generation up; returns a while after it has."""
    before = client.table(TABLE).spec.generation
    daemon.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + TIMEOUT_S
    while client.table(TABLE).spec.generation == before:
        if time.monotonic() > until:
            raise TimeoutError("the daemon did not take up what was published")
        time.sleep(0.001)
    time.sleep(phase_s)
