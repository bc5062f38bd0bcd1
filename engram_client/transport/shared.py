"""Rows out of a daemon's memory on the same machine: hits without asking, misses through a mailbox.

Whatever that way cannot do goes over gRPC: tables and control, hints, and every look-up while there is
no attachment, no free place in the mailbox, or a daemon that is shutting down.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from engram_client.arena.shared_read import read_shared
from engram_client.arrays import address_of
from engram_client.deadline import Deadline
from engram_client.errors import Cancelled
from engram_client.spec import TableSpec
from engram_client.transport.attachment import (
    NO_COUNT,
    NO_MISSES,
    Attachment,
    OfferedHbm,
    View,
    ViewKey,
    one_kind_of,
)
from engram_client.transport.base import Filling, HitPath, LookupRequest, PendingRows
from engram_client.transport.copier import Copier
from engram_client.transport.grpc import GrpcTransport
from engram_client.transport.handoff import NoSharedMemory
from engram_client.transport.landing import Landing
from engram_client.transport.link import FIRST_ATTEMPT_S, Link
from engram_client.transport.mailbox import MailboxBusy, Request
from engram_client.transport.short_way import ShortWay
from engram_client.transport.staged import start_reading
from engram_client.transport.staging import start_filling
from engram_client.transport.training import TrainingTransport

REQUESTS_AHEAD = 2  # of one look-up on the way at once


class SharedHitPath(ShortWay):
    """The arena of a daemon on this machine; no short way while there is no attachment."""

    def __init__(self, link: Link, spec: TableSpec, heads: tuple[int, int] | None) -> None:
        assert spec.scheme is not None
        start, stop = heads or (0, spec.scheme.heads)
        super().__init__(spec.scheme.orders, spec.scheme.orders * (stop - start), spec.row_bytes)
        self._link = link
        self._key: ViewKey = (spec.name, spec.generation, "ngram", heads)

    def _fill(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        attachment = self._link.attachment
        view = attachment.view(self._key) if attachment is not None else None
        if view is None:
            return False
        return bool(read_shared(view.words, one_kind_of(keys), rows, NO_MISSES, NO_COUNT) == 0)


class SharedTransport:
    """See `Transport`. `path` is that of the daemon's unix socket, `remote` reaches the same daemon."""

    def __init__(self, path: str, remote: GrpcTransport) -> None:
        self._remote = remote
        self._link = Link(path)
        self._copier = Copier()
        self._closed = False

    @property
    def attached(self) -> bool:
        """Whether look-ups read shared memory now."""
        return self._link.attachment is not None

    def _attachment(self) -> Attachment | None:
        """What there is now; a forked child begins to look for one of its own."""
        if not self._link.started:
            self._link.start()
        return self._link.attachment

    def list_tables(self) -> dict[str, TableSpec]:
        tables = self._remote.list_tables()
        self._link.start(FIRST_ATTEMPT_S)  # only now: there is a daemon
        return tables

    def describe_table(self, name: str) -> TableSpec:
        return self._remote.describe_table(name)

    def start_lookup(
        self, request: LookupRequest, entry_bytes: int, timeout_s: float | None
    ) -> PendingRows | None:
        """Hits of a small batch are copied here and now; the daemon does the rest meanwhile."""
        attachment = self._attachment()
        if attachment is None:
            return self._remote.start_lookup(request, entry_bytes, timeout_s)
        view = attachment.view((request.table, request.generation, request.address, request.heads))
        if view is None:
            return self._remote.start_lookup(request, entry_bytes, timeout_s)
        return start_reading(view, request, timeout_s, self._remote.lookup)

    def prepare_filling(self) -> None:
        self._copier.start()

    def start_filling(
        self, request: LookupRequest, landing: Landing, timeout_s: float | None
    ) -> Filling | None:
        """The copier sees to what is not copied here and now."""
        attachment = self._attachment()
        if attachment is None:
            return None
        view = attachment.view((request.table, request.generation, request.address, request.heads))
        if view is None:
            return None
        self._copier.start()
        return start_filling(view, self._copier, request, landing, timeout_s, self.lookup)

    def prefetch(self, request: LookupRequest) -> bool:
        return self._remote.prefetch(request)

    def hbm_offer(self, spec: TableSpec) -> tuple[OfferedHbm, int] | None:
        """See `engram_client.hbm.daemon.OffersHbm`: None where the daemon has none, or is gone."""
        attachment = self._attachment()
        return attachment.hbm_offer(spec.name, spec.generation) if attachment is not None else None

    def stats(self) -> dict[str, int]:
        """With what this client counts itself, since it attached."""
        attachment = self._link.attachment
        mailbox = attachment.mailbox if attachment is not None else None
        return {
            **self._remote.stats(),
            "client_results_copied": mailbox.copied_out if mailbox is not None else 0,
            "client_mailbox_busy": mailbox.busy if mailbox is not None else 0,
        }

    def set_dram_budget(self, budget_bytes: int) -> int:
        return self._remote.set_dram_budget(budget_bytes)

    def set_hbm_budget(self, budget_bytes: int) -> int:
        return self._remote.set_hbm_budget(budget_bytes)

    def set_training_budget(self, budget_bytes: int, timeout_s: float | None) -> int:
        return self._remote.set_training_budget(budget_bytes, timeout_s)

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None) -> None:
        attachment = self._attachment()
        if attachment is None:
            self._remote.lookup(request, out, timeout_s)
            return
        view = attachment.view((request.table, request.generation, request.address, request.heads))
        deadline = Deadline.after(timeout_s)
        if view is None or not self._look_up(view, request, out, deadline):
            self._remote.lookup(request, out, deadline.remaining_s())

    def fetch(self, request: LookupRequest, entry_bytes: int, timeout_s: float | None) -> np.ndarray:
        if self._attachment() is None:
            return self._remote.fetch(request, entry_bytes, timeout_s)
        out = np.empty((request.ids.shape[0], entry_bytes), np.uint8)
        self.lookup(request, out, timeout_s)
        return out

    def _look_up(self, view: View, request: LookupRequest, out: np.ndarray, deadline: Deadline) -> bool:
        """False where the whole look-up has to go another way."""
        found = view.read(request.ids.reshape(-1, view.orders), out)
        if found is None:
            return False
        misses, masked = found
        if not misses.size:
            return True
        if not view.entries_max:
            return False
        try:
            ids = request.ids.reshape(-1)
            self._ask(view, ids, misses, address_of(out), deadline)
        except NoSharedMemory as error:
            if self._closed:
                raise Cancelled("the client was closed while rows were read") from None
            if isinstance(error, MailboxBusy):
                view.mailbox.note_busy()
            return False
        view.count(ids.size, masked, ids.size - masked - misses.size)
        return True

    def _ask(self, view: View, ids: np.ndarray, misses: np.ndarray, out: int, deadline: Deadline) -> None:
        """Have the daemon read what is missing, so many entries a request, a few requests at once."""
        waiting: deque[tuple[np.ndarray, Request]] = deque()
        try:
            for start in range(0, misses.size, view.entries_max):
                if len(waiting) == REQUESTS_AHEAD:
                    _finish(waiting, out, deadline)
                part = misses[start : start + view.entries_max]
                try:
                    request = _post(view, ids, part, deadline)
                except MailboxBusy:
                    if not waiting:
                        raise
                    _finish(waiting, out, deadline)  # one of our own gives room
                    request = _post(view, ids, part, deadline)
                waiting.append((part, request))
            while waiting:
                _finish(waiting, out, deadline)
        finally:
            for _, request in waiting:
                request.give_back()

    def hit_path(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> HitPath | None:
        """Records of a record-addressed table, or these heads of them, in one kernel call."""
        if spec.scheme is None or spec.addressing != "record":
            return None
        return SharedHitPath(self._link, spec, heads)

    def shared_view(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> View | None:
        attachment = self._attachment()
        address = "ngram" if spec.addressing == "record" else "row"
        if attachment is None:
            return None
        return attachment.view((spec.name, spec.generation, address, heads))

    def training(self) -> TrainingTransport:
        return self._remote.training()

    def close(self) -> None:
        self._closed = True
        self._link.close()
        self._copier.close()
        self._remote.close()


def _post(view: View, ids: np.ndarray, part: np.ndarray, deadline: Deadline) -> Request:
    """Ask for the entries `part` of `ids`. Raises MailboxBusy."""
    orders = (part % view.orders).astype(np.uint8)
    return view.mailbox.post(view.request, ids[part], orders, view.part_bytes, deadline)


def _finish(waiting: deque[tuple[np.ndarray, Request]], out: int, deadline: Deadline) -> None:
    """Wait for the oldest request and copy its rows."""
    positions, request = waiting[0]
    request.wait(deadline)
    request.spread(positions, out)
    waiting.popleft()
    request.give_back()
