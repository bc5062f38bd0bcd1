"""What `connect` takes for a target, and what it says to everything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engram_client import client as connecting
from engram_client import connect
from engram_client.errors import BadRequest, StorageError, Unavailable
from engram_client.transport import grpc as transport


@pytest.fixture(autouse=True)
def _do_not_wait_for_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_S", 0.05)


def address(target: str) -> str:
    made: Any = connecting._transport(target)
    made.close()
    return str(getattr(made, "_remote", made)._target)


@pytest.mark.parametrize(("target", "expected"), [
    ("unix:/run/x.sock", "unix:/run/x.sock"),
    ("unix:///run/x.sock", "unix:/run/x.sock"),
    ("unix:/a/../b c%41?d#e", "unix:/b%20c%2541%3Fd%23e"),
    ("tcp://127.0.0.1:7070", "127.0.0.1:7070"),
    ("tcp://localhost:1/", "localhost:1"),
    ("tcp://[::1]:65535", "[::1]:65535"),
])  # fmt: skip
def test_targets_become_grpc_addresses(target: str, expected: str) -> None:
    assert address(target) == expected


def test_a_relative_socket_path_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert address("unix:x.sock") == f"unix:{tmp_path}/x.sock"


@pytest.mark.parametrize("target", [
    "", ":", "local", "local:", "unix", "unix:", "tcp", "tcp:", "http://x:1", "/run/x.sock", "Unix:/x",
    "tcp://", "tcp://host", "tcp://host:", "tcp://:7070", "tcp://host:0", "tcp://host:65536", "tcp://host:-1",
    "tcp://host:port", "tcp:host:7070", "tcp:/host:7070", "tcp://host:7070/path", "tcp://host:7070?x=1",
    "tcp://host:7070#x", "tcp://me@host:7070", "tcp://me:secret@host:7070", "tcp://[::1:7070",
    "127.0.0.1:7070",
])  # fmt: skip
def test_everything_else_is_refused_with_the_forms_there_are(target: str) -> None:
    with pytest.raises(BadRequest, match="expected ") as caught:
        connect(target)
    assert "tcp://HOST:PORT" in str(caught.value)


def test_a_socket_path_the_system_cannot_have(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 107)
    with pytest.raises(BadRequest, match=rf"has {len(os.fsencode(long))} bytes; the system allows 107"):
        connect(f"unix:{long}")
    fits = f"/tmp/{'ü' * 51}"  # 107 bytes
    assert len(os.fsencode(fits)) == 107
    with pytest.raises(Unavailable):
        connect(f"unix:{fits}")


@pytest.mark.parametrize("target", ["unix:{}/nosuch.sock", "unix:{}", "tcp://127.0.0.1:1", "tcp://[::1]:1"])
def test_nobody_there(tmp_path: Path, target: str) -> None:
    with pytest.raises(Unavailable, match=r"no daemon answers at .*tierstore serve"):
        connect(target.format(tmp_path))


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no store directory"):
        connect(f"local:{tmp_path}/nosuch")
