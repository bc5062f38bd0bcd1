"""Keeping attached to a daemon: a thread that connects, waits for layouts, and connects again.

The thread sleeps in recv without the GIL and wakes when the daemon changes its arenas or goes away. It
swaps the attachment as a whole; look-ups take whichever is there. A daemon that is gone, or has no
shared memory to offer, is asked again with growing pauses.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from contextlib import suppress

from engram_client.transport.attachment import Attachment, Fixed, warm_kernels
from engram_client.transport.handoff import (
    FIXED_DESCRIPTORS,
    SUFFIX,
    Layout,
    NoSharedMemory,
    close_all,
    hello,
    receive_layout,
)

log = logging.getLogger(__name__)
FIRST_ATTEMPT_S = 30.0  # that a client waits for the first attachment; kernels may have to be compiled
ANSWER_TIMEOUT_S = 5.0
BACKOFF_S = (0.02, 2.0)  # first and longest pause before looking for a daemon again


class Link:
    """Look at `attachment` for what there is now; None where rows go by gRPC. Thread safe."""

    def __init__(self, path: str) -> None:
        self._socket, self._path = path, path + SUFFIX
        self.attachment: Attachment | None = None
        self._said = False
        self._begin_anew()
        _links.add(self)

    def _begin_anew(self) -> None:
        self._changing = threading.Lock()
        self._tried, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._connection: socket.socket | None = None

    def start(self, wait_s: float = 0.0) -> None:
        """Begin to look for the daemon, once; wait so long for the first attempt."""
        with self._changing:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._work, name="engram-attachment", daemon=True)
                self._thread.start()
        self._tried.wait(wait_s)

    @property
    def started(self) -> bool:
        return self._thread is not None

    def _work(self) -> None:
        try:
            warm_kernels()
            self._attach_again_and_again()
        finally:
            self._tried.set()

    def _attach_again_and_again(self) -> None:
        pause_s = BACKOFF_S[0]
        while not self._closing.is_set():
            try:
                self._stay_attached()
                pause_s = BACKOFF_S[0]
            except (OSError, NoSharedMemory) as error:
                self._say(error)
            self._tried.set()
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_S[1])

    def _stay_attached(self) -> None:
        """Attach and follow the daemon's layouts to the end. Raises what kept it from attaching."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            with self._changing:
                if self._closing.is_set():
                    return
                self._connection = connection
            try:
                connection.settimeout(ANSWER_TIMEOUT_S)
                connection.connect(self._path)
                connection.send(hello())
                first = receive_layout(connection)
                connection.settimeout(None)
                if first is None:
                    raise NoSharedMemory("the daemon hung up")
                self._follow(connection, first)
            finally:
                with self._changing:
                    self._connection = None

    def _follow(self, connection: socket.socket, first: tuple[Layout, list[int]]) -> None:
        fixed, attachment = None, None
        received: tuple[Layout, list[int]] | None = first
        try:
            while received is not None:
                layout, descriptors = received
                try:
                    if fixed is None:
                        fixed = Fixed(layout, descriptors)
                        regions = descriptors[FIXED_DESCRIPTORS:]
                    else:
                        regions = descriptors
                    attachment = Attachment(layout, fixed, regions, attachment)
                finally:
                    close_all(descriptors)
                self.attachment = attachment
                self._said = False
                self._tried.set()
                received = receive_layout(connection)
        finally:
            self.attachment = None
            if fixed is not None:
                fixed.mailbox.end()

    def _say(self, error: Exception) -> None:
        """Why there is no shared memory, once until there is again; not of a daemon that is not there."""
        nobody = isinstance(error, ConnectionError) or not os.path.exists(self._socket)
        if self._said or self._closing.is_set() or nobody:
            return
        self._said = True
        log.warning(
            "no shared memory at %s (%s): each look-up is a gRPC call, 0.2 ms instead of some microseconds",
            self._path, _reason(error),
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the daemon; idempotent."""
        with self._changing:
            self._closing.set()
            thread, connection = self._thread, self._connection
            if connection is not None:
                with suppress(OSError):  # it may not be connected yet
                    connection.shutdown(socket.SHUT_RDWR)
        self.attachment = None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def forget_after_fork(self) -> None:
        """In a forked child: the parent's connection is the parent's; the child makes its own."""
        self.attachment = None
        if self._connection is not None:
            os.close(self._connection.detach())
        if not self._closing.is_set():
            self._begin_anew()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the daemon does not offer any"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for link in list(_links):
        link.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
