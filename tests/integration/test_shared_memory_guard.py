"""What a process with the descriptors can do to the arena, as another user and as the same one.

docs/decisions/0016-shared-memory.md says what is within the threat model.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import connect
from engram_client.transport import handoff
from tests.support.daemon import Daemon, environment, running, serve_command
from tests.support.stores import V41, PackedStore, random_keys

NOBODY = 65534
SMALL: dict[str, Any] = {"dram_budget_bytes": "4MiB", "nvme_staging_bytes": "2MiB", "nvme_read_threads": 4}


@pytest.fixture
def guarded(packed: PackedStore, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own: what an attack changes, the next one would find."""
    command = serve_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL)
    with running(command, tmp_path) as daemon:
        yield daemon


ATTACK = """
import ctypes, fcntl, mmap, os, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SHARED, READ, WRITE = mmap.MAP_SHARED, mmap.PROT_READ, mmap.PROT_WRITE
PUNCH, COLLAPSE_RANGE, KEEP_SIZE = 2, 8, 1


def done(what, act):
    try:
        act()
        print(what)
    except OSError:
        pass


def refuse(result):
    if result:
        raise OSError(ctypes.get_errno(), "refused")


def map_it(fd, protection):
    found = libc.mmap(None, 4096, protection, SHARED, fd, 0)
    if found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "refused")
    return found


def allocate(fd, mode):
    refuse(libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)))


def try_all(name, fd):
    size = os.fstat(fd).st_size
    done(f"{name} write", lambda: os.pwrite(fd, b"x", 0))
    done(f"{name} shrink", lambda: os.ftruncate(fd, 0))
    done(f"{name} grow", lambda: os.ftruncate(fd, 2 * size))
    done(f"{name} map", lambda: map_it(fd, READ | WRITE))
    done(f"{name} protect", lambda: refuse(libc.mprotect(map_it(fd, READ), 4096, READ | WRITE)))
    done(f"{name} punch", lambda: allocate(fd, PUNCH | KEEP_SIZE))
    done(f"{name} collapse", lambda: allocate(fd, COLLAPSE_RANGE))
    done(f"{name} seal", lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))


fds = [int(fd) for fd in sys.argv[2:]]
if sys.argv[1] != "same":
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
for place, fd in enumerate(fds):
    name = ("control", "mailbox", "doorbell", "arena")[min(place, 3)]
    if name == "doorbell":
        continue
    try_all(name, fd)
    if name != "mailbox":
        done(f"{name} chmod", lambda: os.fchmod(fd, 0o666))
        for how in (os.O_RDWR, os.O_WRONLY):
            done(f"{name} reopen", lambda: try_all(f"{name} reopened", os.open(f"/proc/self/fd/{fd}", how)))
"""


def attack(daemon: Daemon, user: str) -> set[str]:
    """What succeeded of all that a process of this user tried with the descriptors it was handed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(20)
        client.connect(daemon.unix.removeprefix("unix:") + handoff.SUFFIX)
        client.send(handoff.hello())
        received = handoff.receive_layout(client)
        assert received is not None
        descriptors = received[1]
        assert len(descriptors) > handoff.FIXED_DESCRIPTORS
        done = subprocess.run(
            [sys.executable, "-c", ATTACK, user, *map(str, descriptors)],
            pass_fds=descriptors, capture_output=True, text=True, env=environment(), timeout=60,
        )  # fmt: skip
        handoff.close_all(descriptors)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def assert_well(packed: PackedStore, daemon: Daemon) -> None:
    """Other clients get their rows."""
    keys = random_keys(packed.oracles[V41], 20)
    with connect(daemon.unix) as client:
        table = client.table(V41)
        for _ in range(2):
            assert np.array_equal(table.lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
    assert daemon.process.poll() is None


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
def test_another_user_can_only_read(packed: PackedStore, guarded: Daemon) -> None:
    """The mailbox is the client's own, and of a fixed size for ever."""
    own = {f"mailbox {what}" for what in ("write", "map", "protect", "punch")}
    assert attack(guarded, str(NOBODY)) == own
    assert_well(packed, guarded)


def test_the_same_user_cannot_truncate_and_writes_only_through_proc(
    packed: PackedStore, guarded: Daemon
) -> None:
    """Who may signal and trace the daemon may also write its memory; that is outside the model."""
    succeeded = attack(guarded, "same")
    assert not [what for what in succeeded if what.split()[-1] in ("shrink", "grow", "seal", "collapse")]
    direct = {what for what in succeeded if "reopen" not in what and not what.startswith("mailbox")}
    assert direct <= {"control chmod", "arena chmod"}
    assert guarded.process.poll() is None


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
def test_who_may_not_use_the_first_socket_may_not_use_the_second(guarded: Daemon) -> None:
    path = guarded.unix.removeprefix("unix:") + handoff.SUFFIX
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "try:\n    s.connect(sys.argv[1])\nexcept PermissionError:\n    print('refused')\n"
    )
    for parent in Path(path).parents:  # only the socket itself is to stand in the way
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    before = os.stat(path).st_mode
    assert before == os.stat(path.removesuffix(handoff.SUFFIX)).st_mode
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert done.stdout == ("" if before & 0o002 else "refused\n"), done.stderr
