"""The store: the tiers composed. The daemon serves this object; `local:` is this object.

A look-up checks its request against the table, copies what DRAM holds without a lock, and
hands the rest to the filler, which reads each missing record once. No lock is held across I/O.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import structs

from engram_client.arrays import address_of
from engram_client.deadline import Deadline
from engram_client.errors import (
    BadRequest,
    BatchTooLarge,
    FormatError,
    IdOutOfRange,
    StorageError,
)
from engram_client.spec import TableSpec
from engram_client.transport.base import LookupRequest
from tierstore.config import Config, check_config, memory_limit
from tierstore.devices.base import PageReader
from tierstore.devices.opening import open_reader
from tierstore.store import hit_path
from tierstore.store.balance import Balance, known_weights
from tierstore.store.bulk import BulkReads
from tierstore.store.fill import Filler, read_scattered
from tierstore.store.gate import Gate
from tierstore.store.hints import HintQueue
from tierstore.store.hit_path import HitPath
from tierstore.store.in_flight import InFlight
from tierstore.store.lock import acquire_store_lock
from tierstore.store.promotion import Promotion
from tierstore.store.reloading import Reloading
from tierstore.store.table import Access, ServedTable
from tierstore.store.tables import Tables, table_bytes
from tierstore.store.warmth import Warmth
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena, DramTier
from tierstore.tiers.extent import ExtentTier
from tierstore.tiers.nvme import NvmeTier
from tierstore.tiers.staging import StagingPool

log = logging.getLogger(__name__)
MakeReader = Callable[[Config], PageReader]


def configured_reader(config: Config) -> PageReader:
    """io_uring where it is allowed, or what the configuration says."""
    nvme = config.nvme
    return open_reader(nvme.engine, queue_depth=nvme.queue_depth, threads=nvme.read_threads)


class Store:
    """Every table of one directory, served within the configured budgets. Thread safe.

    Use `tierstore.store.open_store`, which shares one Store a directory and process.
    """

    def __init__(self, directory: Path, config: Config, make_reader: MakeReader = configured_reader) -> None:
        self.directory = directory
        self.config = config  # budgets as they are in force
        self.counters = Counters()
        self._tables = Tables(directory, config.nvme.direct)  # first: what is not a store gets no lock file
        self._lock_file = acquire_store_lock(directory)
        self._gate = Gate(f"store {directory}")
        period_s = config.serve.earlier_generation_s
        self._reloading = Reloading(self._tables, self._gate, period_s, self._tables_changed)
        self.on_tables: Callable[[], None] = lambda: None  # called when other tables are served
        try:
            self._tables.open()
            self._start_tiers(make_reader)
        except BaseException:
            self._close_files()
            raise

    def _start_tiers(self, make_reader: MakeReader) -> None:
        config = self.config
        sizes = table_bytes(self._tables)
        shares = self.directory / "warm" / "shares.json"
        self._dram = DramTier(config.dram.budget_bytes, known_weights(shares, sizes), self.counters)
        self._staging = StagingPool(config.nvme.staging_bytes, max(sizes, default=0))
        self._reader = make_reader(config)  # what may raise comes before: a reader has threads
        nvme = NvmeTier(
            self._reader,
            self.counters,
            gap_pages_max=config.nvme.coalesce_gap_pages,
            run_pages_max=config.nvme.run_pages_max,
        )
        self.bulk = BulkReads(self._reader, config.hbm, self.counters, self._gate, self.table)
        self._extents = self._open_extents()
        self._filler = Filler(nvme, self._extents, self._staging, InFlight(), self.counters)
        try:
            self._warm_kernels()
        except BaseException:  # Ctrl-C, more likely than not: where they are compiled this takes long
            self._reader.close()
            self._extents.close()
            raise
        self._warmth = Warmth(
            self.directory / "warm", self._dram.arenas(), self._tables.owners(), self.counters, config.dram
        )
        self._balance = Balance(self._dram, shares, config.dram.balance_period_s)
        self.promotion = Promotion(self._dram, self._tables.record_sizes(), config, self.counters)
        self._hints = HintQueue(config.prefetch.workers, config.limits.prefetch_queue_max, self._serve_hint)

    def _open_extents(self) -> ExtentTier:
        sizes = table_bytes(table for table in self._tables if table.extent_pays)
        generations = {
            table.number: table.spec.generation if table.extent_pays else None for table in self._tables
        }
        folder = self.directory / "extent"
        return ExtentTier(folder, self.config, sizes, generations, self._reader, self.counters)

    def wait_warm(self, timeout_s: float | None = None) -> bool:
        """Wait until the cache that an earlier run left is in DRAM; False where that takes longer."""
        return self._warmth.wait_loaded(timeout_s)

    def _warm_kernels(self) -> None:
        """Load or compile what look-ups call, so that none does so while its caller waits."""
        for record_bytes, arena in self._dram.arenas().items():
            arena.warm_up(exchanging=self._extents.extent(record_bytes) is not None)
        hit_path.warm_up()
        self._filler.warm_up()

    def warm_up(self) -> None:
        """Look up one key of every table: the disk is known to answer.

        A table whose first rows cannot be read is logged, as its other rows may be good. Leaves no
        trace in the counters.
        """
        for table in self._tables:
            spec = table.spec
            by_key = spec.addressing == "record" and spec.scheme is not None
            shape = (1, spec.scheme.orders) if by_key and spec.scheme else (1,)
            ids = np.zeros(shape, np.int64)
            out = np.empty(ids.size * spec.record_bytes, np.uint8)
            address: Literal["ngram", "row"] = "ngram" if by_key else "row"
            try:
                self.lookup(LookupRequest(spec.name, spec.generation, address, ids), out)
            except StorageError as error:
                log.error("table %r is damaged: %s", spec.name, error)
        self.counters.forget_lookups()

    def arenas(self) -> dict[int, Arena]:
        """What DRAM holds, by the bytes of its records."""
        return self._dram.arenas()

    def tables(self) -> dict[str, TableSpec]:
        """Every table served, by name."""
        return self._tables.specs()

    def table(self, name: str, generation: str | None = None) -> ServedTable:
        """The current table of a name, or the earlier one where that is `generation`.

        Raises UnknownTable, naming those there are; what is wrong with a damaged one.
        """
        return self._tables.get(name, generation)

    def all_tables(self) -> list[ServedTable]:
        """Current tables, and the earlier generations that clients may still read."""
        return list(self._tables)

    def knows(self, name: str) -> bool:
        """Whether `describe` would answer at once, well or not."""
        return self._tables.knows(name)

    def describe(self, name: str) -> TableSpec:
        """One table; an unknown name is looked for among those packed since. Raises as `table`."""
        if not self.knows(name):
            self.reload(replace=False)
        return self.table(name).spec

    def reload(self, *, replace: bool = True) -> list[str]:
        """Take up tables packed since and, with `replace`, other generations of those served; their names.

        What cannot be served is logged. The generation before is served for `serve.earlier_generation_s`
        more. Raises FormatError or StorageError where the catalog cannot be read.
        """
        return self._reloading.take_up(replace=replace, make_room=self._make_room)

    def _tables_changed(self) -> None:
        self._warmth.owners = self._tables.owners()
        self.on_tables()

    def _make_room(self, table: ServedTable) -> None:
        """For a table that is about to be served. Raises FormatError where there is none."""
        spec = table.spec
        generation = spec.generation if table.extent_pays else None
        if spec.record_bytes > self._staging.record_bytes or not self._extents.take_up(
            table.number, generation
        ):
            raise FormatError(
                f"this process has no room set aside for its records of {spec.record_bytes} bytes, or for "
                "one more table; start it again to serve the table"
            )
        if self._dram.arenas() and self._dram.arena(spec.record_bytes) is None:
            log.warning(
                "table %r: records of %d bytes are cached from the next start on; until then each is read",
                spec.name, spec.record_bytes,
            )  # fmt: skip

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None = None) -> None:
        """Fill `out` (uint8, C-contiguous) with the rows asked for, zeros for -1.

        When this raises, the content of `out` is undefined. Raises BadRequest and its kinds,
        UnknownTable, GenerationMismatch, StorageError, DataCorrupt, DeadlineExceeded.
        """
        deadline = Deadline.after(timeout_s)
        access = self.access(request)
        misses = self.lookup_hits(request, access, out)
        if misses.size:
            self.lookup_misses(request, access, misses, out, deadline)

    def hit_path(self, name: str, generation: str) -> HitPath | None:
        """The shortest way to this table's records; None where it has none or nothing is cached."""
        table = self.table(name, generation)
        spec = table.spec
        arena = self._dram.arena(spec.record_bytes)
        if spec.addressing != "record" or spec.generation != generation or arena is None:
            return None
        keys_max = self.config.limits.lookup_bytes_max // spec.record_bytes
        return HitPath(self._gate, table, arena, self.counters, keys_max)

    def access(self, request: LookupRequest) -> Access:
        """How a request's entries are found; all of it is checked but its ids."""
        self._gate.check()
        return self.table(request.table, request.generation).access(request)

    def lookup_hits(self, request: LookupRequest, access: Access, out: np.ndarray) -> np.ndarray:
        """The part of `lookup` that never waits: fill what DRAM holds, return what is missing."""
        self._check_out(request, access, out)
        ids = request.ids.reshape(-1)
        if arena := self._arena(access):
            misses, masked = arena.read(ids, access.table.owner, access.orders, access.part, address_of(out))
            if misses.size:
                access.table.check_ids(request)
        else:
            access.table.check_ids(request)
            misses = np.flatnonzero(ids >= 0)
            masked = ids.size - misses.size
            out.reshape(ids.size, access.part[1])[ids < 0] = 0
        hits = ids.size - masked - misses.size
        self.counters.add(lookups=1, keys=ids.size, masked=masked, dram_hits=hits, dram_misses=misses.size)
        return misses

    def lookup_misses(
        self, request: LookupRequest, access: Access, misses: np.ndarray, out: np.ndarray, deadline: Deadline
    ) -> None:
        """The part of `lookup` that reads: fill the entries `misses` of the request."""
        self._read(access, request.ids.reshape(-1), misses, out, deadline)

    def _read(
        self, access: Access, ids: np.ndarray, misses: np.ndarray, out: np.ndarray, deadline: Deadline
    ) -> None:
        try:
            with self._gate:
                self._filler.fill(access, self._arena(access), ids, misses, out.ctypes.data, deadline)
        except Exception:
            self.counters.add(failed_lookups=1)
            raise

    def lookup_entries(self, access: Access, ids: np.ndarray, out: np.ndarray, deadline: Deadline) -> None:
        """Fill `out`, uint8 [n * part bytes], with rows of single entries, int64 [n].

        For a reader of the shared arena, who has not found them there and has counted the look-up.
        Raises IdOutOfRange, also for -1, and what `lookup` raises.
        """
        self._gate.check()
        access.table.check_entries(ids, by_key=access.by_key)
        if ids.min() < 0:
            raise IdOutOfRange(f"table {access.table.spec.name!r}: a single entry cannot be -1")
        misses, arena = np.arange(ids.size), self._arena(access)
        if arena is not None:  # another request may have brought them meanwhile
            misses = read_scattered(access, arena, ids, misses, out.ctypes.data)
        self.counters.add(dram_hits=ids.size - misses.size, dram_misses=misses.size)
        if misses.size:
            self._read(access, ids, misses, out, deadline)

    def prefetch(self, request: LookupRequest) -> bool:
        """Read into DRAM, soon, what is not there; False where the hint was dropped."""
        self._gate.check()
        self.check_size(request)
        access = self.table(request.table, request.generation).access(request)
        access.table.check_ids(request)
        if not access.cached:
            raise BadRequest(
                f"table {request.table!r}: single rows of a record-addressed table are not cached; "
                "prefetch n-gram keys instead"
            )
        accepted = self._hints.offer(request)
        self.counters.add(**{"hints_accepted" if accepted else "hints_dropped": 1})
        return accepted

    def check_size(self, request: LookupRequest) -> None:
        """Raises BatchTooLarge where a hint, or a request from outside, holds too many ids to be kept."""
        limit = self.config.limits.request_ids_max
        if request.ids.size > limit:
            raise BatchTooLarge(
                f"table {request.table!r}: {request.ids.size} ids in one request; the limit is {limit} "
                "(limits.request_ids_max); split the batch"
            )

    def _serve_hint(self, request: LookupRequest) -> None:
        access = self.table(request.table, request.generation).access(request)
        arena = self._arena(access)
        if arena is None:
            return  # a DRAM budget of 0: there is nowhere to read to
        ids = request.ids.reshape(-1)
        present = np.flatnonzero(ids >= 0)
        misses = read_scattered(access, arena, ids, present, None)
        self.counters.add(hint_hits=present.size - misses.size, hint_misses=misses.size)
        try:
            with self._gate:
                self._filler.fill(access, arena, ids, misses, None, Deadline.after(None))
        except Exception:
            self.counters.add(hints_failed=1)
            raise
        finally:
            self.counters.add(hints_done=1)

    def _arena(self, access: Access) -> Arena | None:
        return self._dram.arena(access.entry_bytes) if access.cached else None

    def _check_out(self, request: LookupRequest, access: Access, out: np.ndarray) -> None:
        wanted = request.ids.size * access.part[1]
        if wanted > self.config.limits.lookup_bytes_max:
            raise BatchTooLarge(
                f"table {request.table!r}: {request.ids.size} ids ask for {wanted} bytes in one look-up; "
                f"the limit is {self.config.limits.lookup_bytes_max} (limits.lookup_bytes_max); "
                "split the batch"
            )
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes != wanted:
            raise BadRequest(
                f"table {request.table!r}: out must be C-contiguous uint8 of {wanted} bytes, "
                f"got {out.dtype} of {out.nbytes}"
            )

    def set_dram_budget(self, budget_bytes: int) -> None:
        """Grow or shrink the DRAM budget while serving; returns when memory has followed.

        Look-ups go on meanwhile, and records stay as far as they fit. Raises ConfigError for a
        budget the process may not use, or below what every record size needs.
        """
        with self._gate:
            dram = structs.replace(self.config.dram, budget_bytes=budget_bytes)
            wanted = structs.replace(self.config, dram=dram)
            check_config(wanted, memory_limit())
            self._dram.resize(budget_bytes)
            self.config = structs.replace(self.config, dram=dram)

    def stats(self) -> dict[str, int]:
        """Counters since the store was opened, and the sizes of the tiers."""
        self._gate.check()
        return {
            **self.counters.snapshot(),
            "tables_served": len(self._tables),
            "tables_damaged": self._tables.damaged,
            "tables_earlier": len(self._tables.earlier()),
            "dram_bytes": self._dram.total_bytes,
            "dram_budget_bytes": self._dram.budget_bytes,
            "extent_bytes": self._extents.capacity_bytes,
            "extent_index_bytes": self._extents.index_bytes,
            "dram_capacity_records": self._dram.capacity_records,
            **self.promotion.stats(),
        }

    def close(self) -> None:
        """Finish what runs and let go of the directory; idempotent."""
        self._reloading.close()
        self._hints.close()
        if self._gate.close():
            self.promotion.close()
            self._balance.close()
            self._warmth.close()
            self.bulk.close()
            self._reader.close()
            self._extents.close()
            self._dram.close()
            self._close_files()

    def flush_extents(self) -> None:
        """Wait until all that DRAM dropped is in the record extents, or given up; for benchmarks."""
        self._extents.flush()

    def disown_after_fork(self) -> None:
        """In a forked child: let go of the parent's files, above all of its lock."""
        self._gate.abandon()
        self._extents.close_files()
        self._close_files()

    def _close_files(self) -> None:
        self._tables.close()
        self._lock_file.close()
