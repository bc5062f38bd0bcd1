"""The second socket: who comes in, who is told of a new layout, who has left.

One thread does all of it and waits for nobody: who does not say hello in time or does not take what he is
sent is hung up on. Of those who have not said hello a few are kept, and a user who has more of them than
his share loses his own eldest, so silence at the door keeps nobody else out.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engram_client.transport.handoff import HELLO, NoSharedMemory, check_hello, send_refusal

log = logging.getLogger(__name__)
HELLO_TIMEOUT_S = 5.0
BACKLOG = 64
REFUSED_PAUSE_S = 0.5
UNKNOWN_MAX = 64  # connections that have not said hello
UNKNOWN_OF_ONE_USER_MAX = 16  # of these, if not the daemon's
CREDENTIALS = struct.Struct("iII")  # pid, uid, gid of SO_PEERCRED


@dataclass(frozen=True)
class Unknown:
    """Who is connected and silent: of which user, and until when that is borne."""

    user: int
    until_s: float


def user_of(connection: socket.socket) -> int:
    """Who opened the other end, as the kernel noted it then; users of foreign namespaces are one."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(packed)[1])


def remove_old_door(path: str) -> None:
    """Of a daemon that was killed. Raises FileExistsError for what is no socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is not a socket", path)
        os.unlink(path)


def open_door(path: str, like: str) -> socket.socket:
    """A socket listening at `path`, open to whom the socket at `like` is open to. Raises OSError."""
    remove_old_door(path)  # whoever owns `like` owns this
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(door.fileno(), 0o600)  # which the file is born with
        door.bind(path)
        model = os.stat(like)
        with suppress(PermissionError):
            os.chown(path, model.st_uid, model.st_gid)
        os.chmod(path, stat.S_IMODE(model.st_mode))
        door.listen(BACKLOG)
        door.setblocking(False)
    except BaseException:
        door.close()
        raise
    return door


class Door:
    """Lets clients in at a listening socket until closed.

    `welcome(connection)` makes a guest of who said hello, or raises NoSharedMemory or OSError with the
    reason why not; what it returns is called once the connection has ended.
    """

    def __init__(self, door: socket.socket, welcome: Callable[[socket.socket], Callable[[], None]]) -> None:
        self._door = door
        self._welcome = welcome
        self._unknown: dict[socket.socket, Unknown] = {}  # eldest first
        self._refused: set[int] = set()  # users of whom it was said
        self._guests: dict[socket.socket, Callable[[], None]] = {}
        self._selector = selectors.DefaultSelector()
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._door, selectors.EVENT_READ)
        self._selector.register(self._call, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tierstore-door", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(HELLO_TIMEOUT_S if self._unknown else None):
                if key.fileobj is self._door:
                    self._let_in()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() >= 0:
                    self._listen(key.fileobj)  # who was not shown out meanwhile
            now = time.monotonic()
            for connection in [c for c, who in self._unknown.items() if who.until_s < now]:
                self._show_out(connection)
        for connection in [*self._unknown, *self._guests]:
            self._show_out(connection)

    def _let_in(self) -> None:
        try:
            connection, _ = self._door.accept()
        except OSError as error:
            log.warning("a client could not be let in: %s", error.strerror)
            time.sleep(REFUSED_PAUSE_S)  # it is still there, and so is what is lacking
            return
        connection.setblocking(False)
        user = user_of(connection)
        self._make_room(user)
        self._unknown[connection] = Unknown(user, time.monotonic() + HELLO_TIMEOUT_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _make_room(self, user: int) -> None:
        """For one more of this user who has not said hello: his eldest leaves, or the eldest of all."""
        of_user = [c for c, who in self._unknown.items() if who.user == user]
        if len(of_user) >= UNKNOWN_OF_ONE_USER_MAX and user != os.geteuid():
            self._show_out(of_user[0])
        elif len(self._unknown) >= UNKNOWN_MAX:
            self._show_out(next(iter(self._unknown)))

    def _listen(self, connection: socket.socket) -> None:
        """Somebody said hello, or has gone; whatever a guest says later is not listened to."""
        try:
            packet = connection.recv(HELLO.size + 1)
        except OSError:
            packet = b""
        if connection in self._guests and packet:
            return
        if connection in self._guests or not packet:
            self._show_out(connection)
            return
        try:
            check_hello(packet)
            self._guests[connection] = self._welcome(connection)
            del self._unknown[connection]
        except (NoSharedMemory, OSError) as error:
            self._say(self._unknown[connection].user, error)
            with suppress(OSError):
                send_refusal(connection, str(error))
            self._show_out(connection)

    def _say(self, user: int, error: Exception) -> None:
        """Why a client is refused, once a user: it asks again and again, and says so itself."""
        if user not in self._refused:
            self._refused.add(user)
            log.warning("a client of user %d gets no shared memory (said once a user): %s", user, error)

    def _show_out(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._unknown.pop(connection, None)
        leave = self._guests.pop(connection, None)
        connection.close()
        if leave is not None:
            leave()

    def close(self) -> None:
        """Hang up on everybody."""
        self._closing = True
        os.eventfd_write(self._call, 1)
        self._thread.join()
        path = self._door.getsockname()
        self._door.close()
        Path(path).unlink(missing_ok=True)
        self._selector.close()
        os.close(self._call)
