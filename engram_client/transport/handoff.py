"""How shared memory is handed over: a second unix socket beside gRPC's, of packets with file descriptors.

    client -> daemon   hello: 8 bytes of magic, uint32 version, uint32 0
    daemon -> client   welcome: JSON, with the descriptors of control word, mailbox, doorbell and regions
    daemon -> client   layout: the same without the first three, each time regions or tables have changed

The connection stays open: its end tells each side that the other is gone. Tables are named with their
generations and the numbers that the arena knows them by, which mean something within this
connection alone. A daemon that refuses says why and hangs up.
"""

from __future__ import annotations

import array
import dataclasses
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from engram_client.errors import TierstoreError

SUFFIX = ".shm"  # of the socket's path, behind that of gRPC's
VERSION = 3
HELLO = struct.Struct("<8sII")
MAGIC = b"tierstor"
MESSAGE_BYTES_MAX = 160 << 10  # what a socket takes at once without being told to
FIXED_DESCRIPTORS = 3  # of a welcome: control word, mailbox, doorbell
DESCRIPTORS_MAX = 64
CONTROL_BYTES = 4096


class NoSharedMemory(TierstoreError):
    """Shared memory cannot be had, and why; internal: the client goes on without."""


@dataclass(frozen=True)
class RegionNote:
    """One region of an arena; `descriptor` is its place among those that came along."""

    number: int
    sets: int
    record_bytes: int
    descriptor: int


@dataclass(frozen=True)
class ArenaNote:
    """Where records of one size are; while they move, `old` holds those that have not yet."""

    region: RegionNote
    old: RegionNote | None


@dataclass(frozen=True)
class TableNote:
    """One table by what a client knows of it, and what the arena and the mailbox call it."""

    name: str
    generation: str
    number: int
    addressing: str
    orders: int
    heads: int
    row_bytes: int
    entry_bytes: int  # of what is cached: a record, or a row


@dataclass(frozen=True)
class HbmNote:
    """An arena in a device's memory (engram_client/hbm/mirror.py), and how to open it.

    kind "cuda" by the CUDA IPC handle, 64 bytes in hexadecimal; "host" by the descriptor at that place of
    those that came along.
    """

    kind: str
    device: str
    sets: int
    record_bytes: int
    serving: int  # its control word while it may be read
    handle: str
    descriptor: int | None


@dataclass(frozen=True)
class Layout:
    """Everything a client must know to read and to ask."""

    arenas: tuple[ArenaNote, ...]
    tables: tuple[TableNote, ...]
    serving: int  # the control word holds this as long as look-ups are served
    touches: int
    data_bytes: int
    request_ids_max: int
    hbm: tuple[HbmNote, ...] = ()


def hello() -> bytes:
    return HELLO.pack(MAGIC, VERSION, 0)


def check_hello(packet: bytes) -> None:
    """Raises NoSharedMemory for what is no hello, or one of another version."""
    if len(packet) != HELLO.size or not packet.startswith(MAGIC):
        raise NoSharedMemory("this socket hands over shared memory; it was not asked for that")
    version = HELLO.unpack(packet)[1]
    if version != VERSION:
        raise NoSharedMemory(
            f"the client speaks version {version} of the shared memory's layout, the daemon {VERSION}; "
            "use one release for both"
        )


def send_layout(connection: socket.socket, layout: Layout, descriptors: list[int]) -> None:
    """Send without waiting. Raises OSError, NoSharedMemory where it is too much for one packet."""
    told = {"version": VERSION, **dataclasses.asdict(layout)}
    if not layout.hbm:
        del told["hbm"]  # clients of before it do not know it
    packet = json.dumps(told).encode()
    if len(packet) > MESSAGE_BYTES_MAX or len(descriptors) > DESCRIPTORS_MAX:
        raise NoSharedMemory(f"{len(layout.tables)} tables are too many to be told in one packet")
    fds = array.array("i", descriptors)
    connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_DONTWAIT)


def send_refusal(connection: socket.socket, reason: str) -> None:
    connection.send(json.dumps({"version": VERSION, "refused": reason}).encode(), socket.MSG_DONTWAIT)


def receive_layout(connection: socket.socket) -> tuple[Layout, list[int]] | None:
    """The next layout and its descriptors, which are the caller's to close; None at the end.

    Raises NoSharedMemory with the daemon's reason, OSError.
    """
    packet, descriptors, _, _ = socket.recv_fds(
        connection, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not packet:
            return None
        layout = _parsed(packet)
    except BaseException:
        close_all(descriptors)
        raise
    return layout, descriptors


def _parsed(packet: bytes) -> Layout:
    try:
        message: dict[str, Any] = json.loads(packet)
        if reason := message.get("refused"):
            raise NoSharedMemory(reason)
        if message.pop("version") != VERSION:
            raise NoSharedMemory("the daemon speaks another version of the shared memory's layout")
        arenas = tuple(_arena(note) for note in message.pop("arenas"))
        tables = tuple(TableNote(**note) for note in message.pop("tables"))
        hbm = tuple(HbmNote(**note) for note in message.pop("hbm", ()))
        return Layout(arenas, tables, hbm=hbm, **message)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoSharedMemory(f"the daemon's layout message cannot be understood: {error!r}") from error


def _arena(note: dict[str, Any]) -> ArenaNote:
    old = note["old"]
    return ArenaNote(RegionNote(**note["region"]), RegionNote(**old) if old else None)


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
