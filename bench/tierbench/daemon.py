"""A real `tierstore serve` in a process of its own, for the time of a `with` block."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from engram_client.errors import Unavailable
from tierbench.signals import deaf

STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Daemon:
    """A serving daemon; `unix` and `tcp` are targets for `connect`."""

    process: subprocess.Popen[str]
    unix: str
    tcp: str

    def memory_bytes(self) -> int:
        """Resident memory of the daemon now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def running_daemon(
    store: Path, *, dram_bytes: int, settings: Mapping[str, object] | None = None
) -> Iterator[Daemon]:
    """Serve `store` on a unix socket and a free TCP port. Raises Unavailable where it does not start."""
    with tempfile.TemporaryDirectory(prefix="tierstore-") as folder:
        values = {
            "serve.unix": f"{folder}/socket",
            "serve.tcp": "127.0.0.1:0",
            "dram.budget_bytes": dram_bytes,
            "log.level": "warning",
            "dram.snapshot_period_s": 0,  # a measurement starts cold unless it says otherwise
            **(settings or {}),
        }
        command = [sys.executable, "-m", "tierstore.cli", "serve", str(store), "--json"]
        for key, value in values.items():
            command += ["--set", f"{key}={value}"]
        with deaf():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield Daemon(process, *_addresses(process))
        finally:
            _stop(process)


def _addresses(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Unavailable(f"the daemon did not start: it left with exit code {process.wait()}; see above")
    unix, tcp = json.loads(line)["serving"]
    return unix, tcp


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except BaseException as error:  # too slow, or whoever waits is in a hurry: a second Ctrl-C
        process.kill()
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
