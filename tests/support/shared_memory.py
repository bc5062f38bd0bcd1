"""Daemons whose memory tests read, and a look at what both sides hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import Client
from engram_client.transport import link
from tests.support.daemon import Daemon, running, serve_command, simulated_command
from tests.support.oracle import Oracle
from tests.support.stores import (
    PackedStore,
)

SMALL: dict[str, Any] = {"dram_budget_bytes": "32MiB", "nvme_staging_bytes": "2MiB", "nvme_read_threads": 4}


@pytest.fixture(scope="module")
def roomy(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that tests leave as it was, with a mailbox of 1 MiB for each client."""
    folder = tmp_path_factory.mktemp("roomy")
    settings = {**SMALL, "serve_unix": folder / "s", "shm_response_bytes": "1MiB", "shm_clients_max": 6}
    with running(serve_command(packed.copy_to(folder), **settings), folder) as daemon:
        yield daemon


@pytest.fixture
def obedient(packed: PackedStore, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own over a device that obeys it."""
    command = simulated_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL)
    with running(command, tmp_path) as daemon:
        yield daemon


@pytest.fixture
def reattaching_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a daemon that was gone without pauses."""
    monkeypatch.setattr(link, "BACKOFF_S", (0.01, 0.05))


def attached(client: Client) -> bool:
    return bool(client._transport.attached)  # type: ignore[attr-defined]


def mailbox_of(client: Client) -> Any:
    return client._transport._link.attachment.mailbox  # type: ignore[attr-defined]


def grown(client: Client, before: dict[str, int], *names: str) -> dict[str, int]:
    now = client.stats()
    return {name: now[name] - before[name] for name in names}


def rows_of(oracle: Oracle, ids: np.ndarray) -> np.ndarray:
    return np.where((ids >= 0)[:, None], oracle.rows[ids], 0)


def mapped_arenas() -> int:
    """Read-only mappings of arenas in this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:tierstore-arena" in line and " r--s " in line for line in maps)


def open_files(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def mailboxes_of(daemon: Daemon) -> int:
    """Mailboxes the daemon has mapped."""
    return Path(f"/proc/{daemon.process.pid}/maps").read_text().count("memfd:tierstore-mailbox")
