"""One table as its users see it: look-ups, prefetches, dequantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engram_client import device_rows
from engram_client.arrays import is_tensor, like, on_device, to_host, writable_host_view
from engram_client.errors import BadRequest
from engram_client.hashing import NgramHashMapping, inputs, recover_keys, row_ids_from_keys
from engram_client.ids import check_keys, check_row_ids
from engram_client.prefetch import Handle, Prefetcher
from engram_client.spec import HashScheme, TableSpec
from engram_client.staging_memory import LandingInThread, Place
from engram_client.transport.base import (
    Filling,
    FillsDevices,
    HitPath,
    LookupRequest,
    PendingRows,
    Transport,
)
from engram_client.transport.staging import LANDED

if TYPE_CHECKING:
    import torch

    from engram_client.arrays import Array
    from engram_client.transport.attachment import View

DEFAULT_TIMEOUT_S = 30.0
PAGE_PAYLOAD_BYTES = 4088  # of a row file: larger rows are not read in bulk
INLINE_KEYS_MAX = 1 << 8  # a prefetch of so many copies hits in less time than a thread takes to wake up


@dataclass(frozen=True)
class _Query:
    """A checked request, and the shape its rows are given back in."""

    request: LookupRequest
    shape: tuple[int, ...]  # of the rows, uint8


def _kept(query: _Query) -> _Query:
    """With ids of its own: the caller may fill his array with the next step's before they are read."""
    asked = query.request
    ids = asked.ids.copy()  # `dataclasses.replace` would take longer than a small one's copy
    return _Query(LookupRequest(asked.table, asked.generation, asked.address, ids, asked.heads), query.shape)


class Table:
    """A table of a connected service; made by `Client.table`. Thread safe.

    Ids and keys are int64 or int32, numpy arrays or torch tensors; rows come back as the same kind. Of ids
    on a device the host waits for their copy alone, of prefetched ones nobody does: what is wrong with those
    is raised by `wait`. -1 means "no row here" and is answered with zeros; any other negative number is an
    error. `heads=slice(a, b)` copies only those heads of each order. `timeout` is in seconds, None for no
    limit. Every call may raise BadRequest or one of its kinds, GenerationMismatch once the table has been
    packed anew, DeadlineExceeded, Unavailable, StorageError or DataCorrupt.
    """

    def __init__(
        self, spec: TableSpec, transport: Transport, prefetcher: Prefetcher, client: object = None
    ) -> None:
        """`client` is kept, because a client that nobody keeps disconnects."""
        self.spec = spec
        self._transport = transport
        self._prefetcher = prefetcher
        self._client = client
        self._hit_path = transport.hit_path(spec)
        self._hit_paths: dict[tuple[int, int] | None, HitPath | None] = {}  # to some of the heads

    def __repr__(self) -> str:
        return f"Table({self.spec.name!r}, generation={self.spec.generation!r})"

    @property
    def reads_hits_itself(self) -> bool:
        """Whether this process copies what DRAM holds without asking a service."""
        return self._hit_path is not None

    def shared_view(self, heads: slice | None = None) -> View | None:
        """The service's memory with the cached records of this table, where it is here, for other readers."""
        return self._transport.shared_view(self.spec, self._heads(heads))

    def mapping(self, compressed_map: Any = None) -> NgramHashMapping:
        """The hashing this table was made with. "engram" tables need the compressed vocabulary.

        Raises VocabularyMismatch where `compressed_map` is not the table's.
        """
        return NgramHashMapping.from_scheme(self._scheme(), compressed_map)

    def lookup_ngrams(
        self, ngram_keys: Any, *, heads: slice | None = None, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Array:
        """Rows of n-gram keys [..., orders]: uint8 [..., H, row_bytes], H = orders * heads."""
        path = self._hit_path if heads is None else self._hit_path_to(heads)
        if path is not None and type(ngram_keys) is np.ndarray:
            rows = path(ngram_keys, None)
            if rows is not None:
                return rows
        return self._answer(self._by_ngrams(ngram_keys, heads), ngram_keys, timeout)

    def lookup_heads(
        self, row_ids: Any, *, heads: slice | None = None, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Array:
        """Rows of whole n-grams' row ids [..., H]: uint8 [..., H, row_bytes].

        The key is recovered from the ids, so a record-addressed table serves whole records.
        Raises ForeignIds where the ids of an order are not one n-gram's.
        """
        return self._answer(self._by_heads(row_ids, heads), row_ids, timeout)

    def lookup(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Array:
        """Rows of any row ids [...]: uint8 [..., row_bytes].

        On a record-addressed table these are read from NVMe each time: single rows are not cached
        beside the records.
        """
        return self._answer(self._by_rows(row_ids), row_ids, timeout)

    def lookup_ngrams_into(
        self,
        ngram_keys: Any,
        out: Any,
        *,
        heads: slice | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """As `lookup_ngrams`, into the caller's uint8 buffer; undefined content if it raises."""
        path = self._hit_path if heads is None else self._hit_path_to(heads)
        if (
            path is not None
            and type(ngram_keys) is np.ndarray
            and type(out) is np.ndarray
            and path(ngram_keys, out) is not None
        ):
            return
        self._read_into(self._by_ngrams(ngram_keys, heads), out, timeout)

    def lookup_into(self, row_ids: Any, out: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """As `lookup`, into the caller's uint8 buffer; undefined content if it raises."""
        self._read_into(self._by_rows(row_ids), out, timeout)

    def prefetch_ngrams(
        self, ngram_keys: Any, *, heads: slice | None = None, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Handle:
        """Start `lookup_ngrams`; the handle's `wait` returns its rows. Raises Overloaded.

        A small batch of hits is copied before this returns: handing it to a thread, while the caller
        runs Python, would take longer by far.
        """
        if (
            self._hit_path is not None
            and heads is None
            and type(ngram_keys) is np.ndarray
            and ngram_keys.size <= INLINE_KEYS_MAX
            and (rows := self._hit_path(ngram_keys, None)) is not None
        ):
            return self._prefetcher.ready(rows)
        if on_device(ngram_keys):
            self._heads(heads)
            return self._start_on_device(lambda keys: self._by_ngrams(keys, heads), ngram_keys, timeout)
        return self._start(self._by_ngrams(ngram_keys, heads), ngram_keys, timeout)

    def prefetch(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Handle:
        """Start `lookup`; the handle's `wait` returns its rows. Raises Overloaded."""
        if on_device(row_ids):
            return self._start_on_device(self._by_rows, row_ids, timeout)
        return self._start(self._by_rows(row_ids), row_ids, timeout)

    def staged_shape(self, heads: slice | None = None) -> tuple[int, int]:
        """What one entry of a staging ring holds: rows, and bytes of each.

        An entry is a line of n-gram keys, or a row id where the table has no hash scheme.
        """
        if self.spec.scheme is None and heads is None:
            return 1, self.spec.row_bytes
        start, stop = self._heads(heads) or (0, self._scheme().heads)
        return self._scheme().orders * (stop - start), self.spec.row_bytes

    def prepare_staging(self) -> None:
        """So that the first `stage` takes no longer than the others."""
        self._transport.prepare_filling()

    def stage(
        self,
        ids: Any,
        place: Place,
        step: int,
        *,
        heads: slice | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> tuple[Filling, int]:
        """Start to read entries into a place that is free (engram_client/staging.py); how many they are.

        Its word is stamped with `step` once all are there. Small batches of hits are there when this returns.
        """
        place.unstamp()
        path = self._hit_path if heads is None else self._hit_path_to(heads)
        if (
            path is not None
            and type(ids) is np.ndarray
            and ids.ndim == 2
            and len(ids) <= place.entries
            and ids.size <= INLINE_KEYS_MAX
            and path(ids, place.rows[: len(ids)]) is not None
        ):
            place.stamp(step)
            return LANDED, len(ids)
        query = self._by_rows(ids) if self.spec.scheme is None else self._by_ngrams(ids, heads)
        entries = math.prod(query.shape) // place.entry_bytes
        landing = place.landing(entries, step)
        if not entries:
            place.stamp(step)
            return LANDED, 0
        query = _kept(query)
        begun = self._transport.start_filling(query.request, landing, timeout)
        if begun is None:
            begun = LandingInThread(self._prefetcher, landing, lambda: self._read(query, timeout))
        return begun, entries

    def warm_ngrams(self, ngram_keys: Any) -> bool:
        """Have the service read these records into DRAM, soon; nothing is sent back.

        For rows wanted later than the next step. False where the service dropped (part of) the hint.
        """
        return self._transport.prefetch(_kept(self._by_ngrams(ngram_keys, None)).request)

    @property
    def transport(self) -> Transport:
        """The way to its rows; for what builds on a table."""
        return self._transport

    @property
    def fills_devices(self) -> bool:
        """Whether `fill_device` can be called: over "local:", for rows that fit a page."""
        return isinstance(self._transport, FillsDevices) and self.spec.row_bytes <= PAGE_PAYLOAD_BYTES

    def fill_device(
        self,
        entries: np.ndarray,
        orders: np.ndarray,
        out: Any,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Read whole records in bulk into a device's memory, past DRAM; only where `fills_devices`.

        Record `entries[i]`, a key of order `orders[i]` or a row id, becomes `out[i]`: int64 [n] both, out a
        contiguous uint8 torch tensor [n, record_bytes]. It pays for many records at once, of which nobody is
        waiting for the first. Raises as `lookup_ngrams_into`; then the content of `out` is undefined.
        """
        if not isinstance(self._transport, FillsDevices) or not self.fills_devices:
            raise BadRequest(f"table {self.spec.name!r} cannot be read in bulk here; look rows up")
        self._transport.fill_device(self.spec, entries, orders, out, timeout)

    def dequantize(
        self, rows: Any, *, dtype: torch.dtype | None = None, index: np.ndarray | None = None
    ) -> torch.Tensor:
        """Rows uint8 [..., row_bytes] as a tensor [..., embedding_dim]; needs torch.

        With `index` int64 [...], rows are distinct lines [n, H, row_bytes], and the result is that of
        `rows[index]`.
        """
        from engram_client.dequantize import dequantize

        return dequantize(self.spec.layout, rows, dtype=dtype, index=index)

    def _scheme(self) -> HashScheme:
        if self.spec.scheme is None:
            raise BadRequest(
                f"table {self.spec.name!r} has no hash scheme: its rows are named by row ids alone; "
                "use lookup"
            )
        return self.spec.scheme

    def _hit_path_to(self, heads: slice) -> HitPath | None:
        """The hit path to some heads. Raises BadRequest where there are no such heads."""
        chosen = self._heads(heads)
        if chosen not in self._hit_paths:
            self._hit_paths[chosen] = self._transport.hit_path(self.spec, chosen)
        return self._hit_paths[chosen]

    def _heads(self, heads: slice | None) -> tuple[int, int] | None:
        if heads is None:
            return None
        try:
            start, stop, step = heads.indices(self._scheme().heads)
        except (AttributeError, TypeError):
            raise BadRequest(
                f"table {self.spec.name!r}: heads must be a slice of whole numbers such as slice(0, 4), "
                f"got {heads!r}"
            ) from None
        if step != 1 or start >= stop:
            raise BadRequest(
                f"table {self.spec.name!r}: heads={heads} is not a non-empty range of its "
                f"{self._scheme().heads} heads an order"
            )
        return start, stop

    def _by_ngrams(self, ngram_keys: Any, heads: slice | None) -> _Query:
        spec, scheme = self.spec, self._scheme()
        keys = inputs.as_records(to_host(ngram_keys), "ngram_keys", scheme.orders, "one key per order")
        check_keys(keys, spec.name)
        start, stop = self._heads(heads) or (0, scheme.heads)
        shape = (*keys.shape[:-1], scheme.orders * (stop - start), spec.row_bytes)
        if spec.addressing == "row":
            ids = row_ids_from_keys(scheme, keys).reshape(-1, scheme.orders, scheme.heads)
            return self._query("row", ids[:, :, start:stop].reshape(-1), shape)
        return self._query("ngram", keys.reshape(-1, scheme.orders), shape, (start, stop) if heads else None)

    def _by_heads(self, row_ids: Any, heads: slice | None) -> _Query:
        scheme = self._scheme()
        if scheme.recoverable:
            return self._by_ngrams(recover_keys(scheme, to_host(row_ids)), heads)
        width = scheme.orders * scheme.heads
        ids = inputs.as_records(to_host(row_ids), "row_ids", width, "all heads of all orders")
        check_row_ids(ids, self.spec.rows, self.spec.name)
        start, stop = self._heads(heads) or (0, scheme.heads)
        chosen = ids.reshape(-1, scheme.orders, scheme.heads)[:, :, start:stop]
        shape = (*ids.shape[:-1], scheme.orders * (stop - start), self.spec.row_bytes)
        return self._query("row", chosen.reshape(-1), shape)

    def _by_rows(self, row_ids: Any) -> _Query:
        ids = inputs.as_int64(to_host(row_ids), "row_ids", inputs.ID_DTYPES)
        check_row_ids(ids, self.spec.rows, self.spec.name)
        return self._query("row", ids.reshape(-1), (*ids.shape, self.spec.row_bytes))

    def _query(
        self,
        address: Literal["ngram", "row"],
        ids: np.ndarray,
        shape: tuple[int, ...],
        heads: tuple[int, int] | None = None,
    ) -> _Query:
        ids = np.ascontiguousarray(ids)  # one head of many is a view with gaps
        return _Query(LookupRequest(self.spec.name, self.spec.generation, address, ids, heads), shape)

    def _read(self, query: _Query, timeout: float | None) -> np.ndarray:
        request = query.request
        if not request.ids.size:
            return np.empty(query.shape, np.uint8)
        entry_bytes = math.prod(query.shape) // len(request.ids)
        return self._transport.fetch(request, entry_bytes, timeout).reshape(query.shape)

    def _fill(self, query: _Query, rows: np.ndarray, timeout: float | None) -> None:
        if query.request.ids.size:
            self._transport.lookup(query.request, rows.reshape(len(query.request.ids), -1), timeout)

    def _answer(self, query: _Query, ids: Any, timeout: float | None) -> Array:
        """The rows, where the ids are."""
        if on_device(ids):
            return device_rows.rows_like(self._transport, (query.request, query.shape), ids, timeout)
        return like(self._read(query, timeout), ids)

    def _read_into(self, query: _Query, out: Any, timeout: float | None) -> None:
        host = writable_host_view(out, query.shape)
        if host is not None:
            self._fill(query, host, timeout)
        else:
            device_rows.fill_out(self._transport, query.request, out, timeout)

    def _start_on_device(self, query_of: Callable[[Any], _Query], ids: Any, timeout: float | None) -> Handle:
        def asked(found: np.ndarray) -> device_rows.Query:
            query = query_of(found)
            return query.request, query.shape

        return device_rows.start(self._transport, self._prefetcher, asked, ids, timeout)

    def _start(self, query: _Query, ids: Any, timeout: float | None) -> Handle:
        query = _kept(query)
        if is_tensor(ids):
            kind = ids.new_empty(0)  # without keeping the ids alive
            return self._started(query, timeout, lambda rows: like(rows, kind))
        return self._started(query, timeout, lambda rows: rows)

    def _started(self, query: _Query, timeout: float | None, finish: Callable[[np.ndarray], Array]) -> Handle:
        """In the service, where the transport has a way; else in a thread of this process."""
        request = query.request
        entry_bytes = math.prod(query.shape) // len(request.ids) if request.ids.size else 0

        def begin() -> PendingRows | None:
            return self._transport.start_lookup(request, entry_bytes, timeout) if entry_bytes else None

        handle = self._prefetcher.follow(begin, lambda rows: finish(rows.reshape(query.shape)))
        return handle or self._prefetcher.start(lambda: self._read(query, timeout), finish)
