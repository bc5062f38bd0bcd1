"""Offering the DRAM tier to the machine's other processes.

Clients read the arenas themselves (engram_client/arena/shared_read.py); this is what they need for it: a
door to come in by, a layout that follows every change, workers for what they miss, a ledger of what they
read. The control word is a page of memory that every client reads in each look-up; clearing it ends
one-sided reads at once, also of a client that does not listen.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_client.arena.mailbox import MailboxGeometry
from engram_client.transport.handoff import (
    SUFFIX,
    ArenaNote,
    HbmNote,
    Layout,
    NoSharedMemory,
    RegionNote,
    TableNote,
    close_all,
    send_layout,
)
from tierstore.config import Shm
from tierstore.shm.door import Door, open_door, remove_old_door, user_of
from tierstore.shm.guests import Guest, Guests, warm_kernels
from tierstore.shm.ledger import Ledger
from tierstore.shm.workers import Workers
from tierstore.store import Store
from tierstore.store.table import ServedTable
from tierstore.tiers.region import Region
from tierstore.tiers.sealed import SealedMemory

if TYPE_CHECKING:
    from tierstore.tiers.hbm_memory import DeviceMemory

log = logging.getLogger(__name__)


class SharedMemory:
    """Offers `store` beside the unix socket at `path` until closed."""

    def __init__(self, store: Store, path: str) -> None:
        """Raises OSError where that is not possible here."""
        self._store = store
        self._config: Shm = store.config.shm
        self._geometry = MailboxGeometry.of(self._config.touch_ring_bytes, self._config.response_bytes)
        self._control = SealedMemory("tierstore-control", mmap.PAGESIZE)
        self._serving = secrets.randbits(62) | 1
        self._word = np.asarray(self._control.mapping)[:8].view(np.int64)
        self._word[0] = self._serving
        os.close(self._control.descriptor(writable=False))  # refused where there is no /proc
        warm_kernels()
        self._guests = Guests()
        self._telling = threading.Lock()  # layouts reach every client in order
        door = open_door(path + SUFFIX, path)
        self._workers = Workers(store, self._guests, self._config.workers)
        self._ledger = Ledger(store, self._guests)
        store.counters.collect = self._ledger.collect
        for arena in store.arenas().values():
            arena.on_change = self._tell_everybody
        store.promotion.on_change = self._tell_everybody
        store.on_tables = self._follow_tables
        self._workers.follow_tables()  # should they have changed meanwhile
        self._door = Door(door, self._welcome)

    def _welcome(self, connection: socket.socket) -> Callable[[], None]:
        user = user_of(connection)
        try:
            self._check_places(user)
        except NoSharedMemory:
            self._store.counters.add(shm_clients_refused=1)
            raise
        guest = Guest(connection, user, self._geometry)
        fixed = [self._control.descriptor(writable=False), guest.memory.descriptor(writable=True)]
        try:
            with self._telling:
                self._send(guest, [*fixed, guest.doorbell])
                self._guests.add(guest)
        finally:
            close_all(fixed)
        self._workers.listen_to(guest)
        self._store.counters.add(shm_clients=1)
        return lambda: self._let_go(guest)

    def _check_places(self, user: int) -> None:
        """Raises NoSharedMemory where there is no place left for one more client of this user."""
        attached, places = len(self._guests), self._config.clients_max
        if attached >= places:
            raise NoSharedMemory(f"{attached} clients are attached, the most there may be (shm.clients_max)")
        own, most = self._guests.of_user(user), max(1, places * self._config.user_clients_percent // 100)
        if user != os.geteuid() and own >= most:
            raise NoSharedMemory(
                f"user {user} has {own} of {places} places, the most that one user other than the daemon's "
                "may take (shm.user_clients_percent of shm.clients_max)"
            )

    def _let_go(self, guest: Guest) -> None:
        self._guests.remove(guest)
        self._workers.forget(guest)
        self._ledger.settle(guest)

    def _send(self, guest: Guest, first: list[int]) -> None:
        """Tell a guest the layout of now. Raises OSError, NoSharedMemory."""
        layout, regions, on_devices = self._layout(guest.user)
        descriptors = [region.memory.descriptor(writable=False) for region in regions]
        descriptors += [fd for memory in on_devices if (fd := memory.descriptor()) is not None]
        try:
            send_layout(guest.connection, layout, [*first, *descriptors])
        finally:
            close_all(descriptors)

    def _follow_tables(self) -> None:
        self._workers.follow_tables()
        self._tell_everybody()

    def _tell_everybody(self) -> None:
        with self._telling:
            for guest in self._guests:
                try:
                    self._send(guest, [])
                except (OSError, NoSharedMemory) as error:
                    log.warning("a client of shared memory is hung up on, it does not listen: %s", error)
                    guest.hang_up()

    def _layout(self, user: int) -> tuple[Layout, list[Region], list[DeviceMemory]]:
        regions: list[Region] = []

        def note(region: Region) -> RegionNote:
            regions.append(region)
            geometry = region.geometry
            return RegionNote(region.number, geometry.sets, geometry.record_bytes, len(regions) - 1)

        arenas = []
        for arena in self._store.arenas().values():
            new, *old = arena.regions()
            arenas.append(ArenaNote(note(new), note(old[0]) if old else None))
        tables = tuple(_table_note(table) for table in self._store.all_tables())
        geometry = self._geometry
        ids_max = self._store.config.limits.request_ids_max
        sizes = (geometry.touches, geometry.data_bytes, ids_max)
        hbm, on_devices = self._on_devices(user, len(regions))
        return Layout(tuple(arenas), tables, self._serving, *sizes, hbm), regions, on_devices

    def _on_devices(self, user: int, regions: int) -> tuple[tuple[HbmNote, ...], list[DeviceMemory]]:
        """Arenas in device memory. By CUDA IPC others could write them: only the daemon's user gets those."""
        notes, on_devices = list[HbmNote](), list[Any]()
        for arena in self._store.promotion.arenas().values():
            memory = arena.memory
            if memory.kind == "cuda" and user != os.geteuid():
                continue
            place = None if memory.kind == "cuda" else regions + len(on_devices)
            notes.append(HbmNote(
                memory.kind, memory.device, arena.sets, arena.record_bytes, arena.serving,
                memory.handle, place,
            ))  # fmt: skip
            on_devices.append(memory)
        return tuple(notes), on_devices

    def drain(self, timeout_s: float) -> None:
        """End one-sided reads at once; give requests in work so long."""
        self._word[0] = 0
        self._workers.drain(timeout_s)

    def close(self) -> None:
        """Hang up on everybody."""
        self._word[0] = 0
        for arena in self._store.arenas().values():
            arena.on_change = lambda: None
        self._store.promotion.on_change = lambda: None
        self._store.on_tables = lambda: None
        self._workers.close()
        self._door.close()
        self._ledger.close()


def _table_note(table: ServedTable) -> TableNote:
    spec = table.spec
    orders, heads = (spec.scheme.orders, spec.scheme.heads) if spec.scheme else (1, 1)
    return TableNote(
        spec.name, spec.generation, table.number, spec.addressing, orders, heads,
        spec.row_bytes, spec.record_bytes,
    )  # fmt: skip


def offer_shared_memory(store: Store, path: str) -> SharedMemory | None:
    """None where it is not wanted, or not possible here: then a line in the log says why."""
    try:
        if store.config.shm.enabled:
            return SharedMemory(store, path)
        remove_old_door(path + SUFFIX)
        return None
    except OSError as error:
        log.warning(
            "no shared memory is offered at %s (%s): clients on this machine take gRPC, 0.2 ms a look-up",
            Path(path + SUFFIX), error.strerror or error,
        )  # fmt: skip
        return None
