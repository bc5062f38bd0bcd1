"""One served table, and the ways to address it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engram_client.arena.layout import ORDER_BITS
from engram_client.errors import BadRequest, GenerationMismatch
from engram_client.ids import check_keys, check_row_ids
from engram_client.spec import TableSpec
from engram_client.transport.base import LookupRequest
from tierstore.devices.files import OpenFile
from tierstore.format.rowfile import RowFile
from tierstore.kernels.rows import derive_row_ids
from tierstore.tiers.extent_group import group_for


@dataclass(frozen=True)
class Access:
    """How the entries of one request are found.

    Entry i of a request has order i % orders, or what `entry_orders` says. `cached` is False for single
    rows of a record-addressed table: they are read from NVMe, because a copy beside the records would
    have to share their budget.
    """

    table: ServedTable
    by_key: bool  # entries are n-gram keys; else row ids
    orders: int
    rows_per_entry: int
    cached: bool
    part: tuple[int, int]  # first byte and length of what is copied out of an entry
    entry_orders: np.ndarray | None = None  # int64 [n]

    @property
    def entry_bytes(self) -> int:
        """Bytes of a whole entry: the record, or the row."""
        return self.rows_per_entry * self.table.spec.row_bytes

    @property
    def in_extent(self) -> bool:
        """Whether the entries are records that cost fewer reads when they are kept whole."""
        return self.cached and self.table.extent_pays

    def owners(self, positions: np.ndarray) -> np.ndarray:
        """Owner of each entry, int64: which table and order its record belongs to."""
        return self.table.owner + self.orders_of(positions)

    def orders_of(self, positions: np.ndarray) -> np.ndarray:
        """Order of each entry, int64."""
        return positions % self.orders if self.entry_orders is None else self.entry_orders[positions]

    def row_ids(self, entries: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """Row ids behind entries, int64 [n, rows_per_entry]."""
        if not self.by_key:
            return entries.reshape(-1, 1)
        ids = np.empty((entries.size, self.rows_per_entry), np.int64)
        orders = owners - self.table.owner
        derive_row_ids(entries, orders, self.table.head_sizes, self.table.head_offsets, ids)
        return ids


class ServedTable:
    """A table that is open for look-ups. `number` is unique in this process, also over generations.

    Its file is closed with it, at the latest: while a request holds the table, its reads find their file.
    """

    def __init__(self, row_file: RowFile, file: OpenFile, number: int) -> None:
        self.row_file = row_file
        self.file = file
        weakref.finalize(self, file.close).atexit = False
        self.owner = number << ORDER_BITS
        self.retired = False
        scheme = row_file.spec.scheme
        self.head_sizes = np.array(scheme.head_sizes if scheme else [[0]], np.int64)
        self.head_offsets = np.array(scheme.head_offsets if scheme else [[0]], np.int64)
        self._accesses: dict[tuple[str, tuple[int, int] | None], Access] = {}  # one for each range of heads

    @property
    def spec(self) -> TableSpec:
        return self.row_file.spec

    @property
    def number(self) -> int:
        return self.owner >> ORDER_BITS

    @property
    def extent_pays(self) -> bool:
        """Whether a record's rows lie on more pages than the record would, kept whole."""
        spec = self.spec
        row_pages = spec.record_rows * self.row_file.geometry.pages_per_row
        return row_pages > group_for(spec.record_bytes).pages_per_record

    def access(self, request: LookupRequest) -> Access:
        """Check all of the request but its ids. Raises BadRequest, GenerationMismatch."""
        self.check_generation(request.generation)
        if request.ids.dtype != np.int64 or not request.ids.flags.c_contiguous:
            raise BadRequest(f"ids must be C-contiguous int64, got {request.ids.dtype}")
        access = self._accesses.get((request.address, request.heads))
        if access is None:
            access = self._by_key(request) if request.address == "ngram" else self._by_row(request)
            self._accesses[request.address, request.heads] = access
        self._check_shape(request, access)
        return access

    def access_entries(
        self, address: Literal["ngram", "row"], orders: np.ndarray, heads: tuple[int, int] | None
    ) -> Access:
        """How single entries are found, of which each says its order, int64 [n]. Raises BadRequest."""
        none = np.empty((0, len(self.head_sizes)) if address == "ngram" else 0, np.int64)
        access = self.access(LookupRequest(self.spec.name, self.spec.generation, address, none, heads))
        if orders.size and not 0 <= orders.min() <= orders.max() < access.orders:
            raise BadRequest(f"table {self.spec.name!r} has orders 0 to {access.orders - 1}; got others")
        return replace(access, entry_orders=orders)

    def check_ids(self, request: LookupRequest) -> None:
        """Raises IdOutOfRange. No such id is ever cached, so hits need no check: they are not it."""
        self.check_entries(request.ids, by_key=request.address == "ngram")

    def check_entries(self, ids: np.ndarray, *, by_key: bool) -> None:
        """Raises IdOutOfRange."""
        if by_key:
            check_keys(ids, self.spec.name)
        else:
            check_row_ids(ids, self.spec.rows, self.spec.name)

    def check_generation(self, generation: str) -> None:
        """Raises GenerationMismatch."""
        if generation != self.spec.generation:
            raise GenerationMismatch(
                f"table {self.spec.name!r}: the request is for generation {generation}, served is "
                f"{self.spec.generation}; the table was packed again, fetch it anew with client.table(name)"
            )

    def _by_key(self, request: LookupRequest) -> Access:
        spec = self.spec
        if spec.addressing != "record" or spec.scheme is None:
            raise BadRequest(f"table {spec.name!r} is addressed by row ids, not by n-gram keys; use lookup")
        orders, heads = spec.scheme.orders, spec.scheme.heads
        start, stop = request.heads or (0, heads)
        if not 0 <= start < stop <= heads:
            raise BadRequest(
                f"table {spec.name!r}: heads {start}:{stop} are not within its {heads} heads an order"
            )
        part = (start * spec.row_bytes, (stop - start) * spec.row_bytes)
        return Access(self, True, orders, heads, True, part)

    def _by_row(self, request: LookupRequest) -> Access:
        spec = self.spec
        if request.heads is not None:
            raise BadRequest("heads= goes with n-gram keys, not with row ids")
        return Access(self, False, 1, 1, spec.addressing == "row", (0, spec.row_bytes))

    def _check_shape(self, request: LookupRequest, access: Access) -> None:
        shape = request.ids.shape
        if access.by_key and (len(shape) != 2 or shape[1] != access.orders):
            raise BadRequest(
                f"table {self.spec.name!r}: n-gram keys must have shape [n, {access.orders}], "
                f"got {list(shape)}"
            )
        if not access.by_key and len(shape) != 1:
            raise BadRequest(f"row ids must have shape [n], got {list(shape)}")

    def retire(self) -> None:
        """Served no more: let go of it when the last request is over."""
        self.retired = True
        self._accesses.clear()  # they hold the table

    def close(self) -> None:
        self.file.close()
