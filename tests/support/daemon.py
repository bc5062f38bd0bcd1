"""A real `tierstore serve` in a process of its own, and one whose disk obeys the test."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.stores import PackedStore, open_simulated

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}


def serve_command(directory: Path, **settings: Any) -> list[str]:
    """`settings`: serve_unix=..., dram_budget_bytes=...: the key with its first dot as an underscore."""
    command = [sys.executable, "-m", "tierstore.cli", "serve", str(directory), "--json"]
    for name, value in settings.items():
        command += ["--set", f"{name.replace('_', '.', 1)}={value}"]
    return command


def serve_once(directory: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A `tierstore serve` that is expected to leave by itself."""
    return subprocess.run(
        serve_command(directory, **settings), capture_output=True, text=True, env=environment(), timeout=60
    )


class Daemon:
    """A started daemon. `unix` and `tcp` are targets for `connect`, where it serves on them."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log_file = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment()
            )
        self._unread = b""
        addresses = json.loads(self.read_line())["serving"]
        self.unix, self.tcp = (
            next((a for a in addresses if a.startswith(kind)), "") for kind in ("unix:", "tcp:")
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def read_line(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line on stdout; fails where none comes."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            got = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not got:
                self.process.kill()
                raise AssertionError(f"the daemon said nothing; exit code {self.process.wait()}:\n{self.log}")
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def ask(self, command: str) -> None:
        """Have a daemon with a simulated device do something; returns once it has."""
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        assert self.read_line() == f"done {command}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[Daemon]:
    """A daemon for the time of a `with` block; it may end before."""
    daemon = Daemon(command, folder / "daemon.log")
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            try:
                daemon.stop()
            finally:
                daemon.kill()  # one that does not stop fails the test and is not left behind
        for pipe in (daemon.process.stdin, daemon.process.stdout):
            if pipe:
                pipe.close()


def simulated_command(directory: Path, **settings: Any) -> list[str]:
    """A daemon over a simulated device, steered by `Daemon.ask`."""
    flags = {name.replace("_", ".", 1): str(value) for name, value in settings.items()}
    script = "from tests.support.daemon import serve_simulated; serve_simulated()"
    return [sys.executable, "-c", script, str(directory), json.dumps(flags)]


def serve_simulated() -> None:
    """The process behind `simulated_command`.

    Understands "hold" (no read starts), "wait N" (until N reads are held back) and "release".
    """
    import logging
    import threading

    from tierstore.config import load_config
    from tierstore.daemon import run_daemon

    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    directory, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = load_config(file=None, environ={}, flags=flags).config
    device, release = open_simulated(directory, config)

    def obey() -> None:
        for line in sys.stdin:
            verb, _, count = line.strip().partition(" ")
            if verb == "hold":
                device.hold()
            elif verb == "release":
                device.let_go()
            elif verb == "wait":
                device.wait_for_readers(int(count))
            print(f"done {line.strip()}", flush=True)

    def ready(addresses: list[str]) -> None:
        release()  # from here on the daemon alone holds the store
        print(json.dumps({"serving": addresses}), flush=True)

    threading.Thread(target=obey, daemon=True).start()
    run_daemon(directory, config, ready)


@pytest.fixture(scope="session")
def daemon(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for every test that leaves it as it was, with less DRAM than the tests ask for."""
    folder = tmp_path_factory.mktemp("daemon")
    command = serve_command(
        packed.copy_to(folder),
        serve_unix=folder / "socket",
        serve_tcp="127.0.0.1:0",
        dram_budget_bytes="2MiB",
        nvme_staging_bytes="2MiB",
        nvme_read_threads=4,
        limits_request_ids_max=2**17,
        limits_request_reply_bytes_max="2MiB",
    )
    with running(command, folder) as started:
        yield started
