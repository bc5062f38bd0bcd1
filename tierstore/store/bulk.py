"""Whole records in bulk from NVMe into a device's memory: what fills a hot set at its start.

The part that needs torch, tiers/hbm_fill.py, is imported when it is first asked for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, IdOutOfRange
from tierstore.config import Hbm
from tierstore.devices.base import PageReader
from tierstore.devices.gds import open_gds_reader
from tierstore.devices.gds_probe import GdsProbe, probe_gds
from tierstore.store.gate import Gate
from tierstore.store.table import Access, ServedTable
from tierstore.tiers.counters import Counters

if TYPE_CHECKING:
    from tierstore.tiers.hbm_fill import DeviceFill, DirectWay

log = logging.getLogger(__name__)


class BulkReads:
    """Reads in bulk into tensors of any device. Thread safe; one read a device at a time."""

    def __init__(
        self,
        reader: PageReader,
        config: Hbm,
        counters: Counters,
        gate: Gate,
        table: Callable[[str], ServedTable],
    ) -> None:
        self._reader, self._config, self._counters = reader, config, counters
        self._gate, self._table = gate, table
        self._fills: dict[str, DeviceFill] = {}
        self._direct: list[PageReader] = []
        self._making = threading.Lock()

    def using(self, config: Hbm) -> BulkReads:
        """The same store's with other settings, the caller's to close; for benchmarks."""
        return BulkReads(self._reader, config, self._counters, self._gate, self._table)

    def read(
        self,
        name: str,
        generation: str,
        entries: np.ndarray,
        orders: np.ndarray,
        out: Any,
        timeout_s: float | None = None,
    ) -> str:
        """Record i becomes `out[i]`: out uint8 [n, record_bytes], a contiguous torch tensor of any device.

        `entries` int64 [n] are keys of orders int64 [n], or row ids (orders of 0) of a row-addressed table.
        DRAM is neither asked nor filled. Returns the way that pages took, in a word. Raises what
        `Store.lookup` raises, IdOutOfRange for -1 as well, and BadRequest where the device has no memory.
        """
        deadline, table = Deadline.after(timeout_s), self._table(name)
        with self._gate:
            table.check_generation(generation)
            by_key = table.spec.addressing == "record"
            access = table.access_entries("ngram" if by_key else "row", orders, None)
            table.check_entries(entries, by_key=by_key)
            if entries.size and entries.min() < 0:
                raise IdOutOfRange(f"table {name!r}: a single entry cannot be -1")
            return self._read(access, entries, out, deadline)

    def _read(self, access: Access, entries: np.ndarray, out: Any, deadline: Deadline) -> str:
        shape, row_bytes = (entries.size, access.entry_bytes), access.table.spec.row_bytes
        if tuple(out.shape) != shape or str(out.dtype) != "torch.uint8" or not out.is_contiguous():
            raise BadRequest(
                f"table {access.table.spec.name!r}: records in bulk need a contiguous uint8 tensor "
                f"{list(shape)}, got {out.dtype} {list(out.shape)}"
            )
        row_ids = access.row_ids(entries, access.owners(np.arange(entries.size))).ravel()
        fill = self._fill(out.device, access.table.file.path)
        rows = out.view(row_ids.size, row_bytes)
        way = fill.read_rows(
            access.table.row_file, access.table.file, row_ids, np.arange(row_ids.size), rows, deadline
        )
        self._counters.add(records_read=entries.size)
        return way

    def _fill(self, device: Any, sample: Path) -> DeviceFill:
        with self._making:
            if str(device) not in self._fills:
                self._fills[str(device)] = self._made(device, sample)
            return self._fills[str(device)]

    def _made(self, device: Any, sample: Path) -> DeviceFill:
        from tierstore.tiers.hbm_fill import DeviceFill

        config = self._config
        return DeviceFill(
            self._reader,
            self._counters,
            device,
            staging_bytes=config.staging_bytes,
            gap_pages_max=min(config.fill_gap_pages, config.fill_run_pages_max - 1),
            run_pages_max=config.fill_run_pages_max,
            direct_run_bytes=config.gds_run_bytes,
            direct_timeout_s=config.gds_timeout_s,
            make_direct=self._direct_maker(device, sample),
        )

    def _direct_maker(self, device: Any, sample: Path) -> Callable[[int], DirectWay | None]:
        def make(capacity_pages: int) -> DirectWay | None:
            if device.type != "cuda" or self._config.gds == "off":
                return None
            probe = probe_gds(sample, device.index or 0, self._config.gds_probe_timeout_s)
            say_gds(probe)
            if not probe.usable:
                return None
            return self._open_direct(probe, device, capacity_pages)

        return make

    def _open_direct(self, probe: GdsProbe, device: Any, capacity_pages: int) -> DirectWay | None:
        from tierstore.tiers.hbm_fill import DirectWay

        try:
            reader = open_gds_reader(probe, self._config.gds_threads)
        except Exception as error:  # kvikio raises whatever it likes
            log.warning("GPUDirect Storage was there a moment ago and does not open: %s", error)
            return None
        self._direct.append(reader)
        try:
            return DirectWay(reader, device, capacity_pages)
        except BadRequest as error:
            log.warning("GPUDirect Storage is not used: %s", error)
            return None

    def close(self) -> None:
        """Stop the readers that are its own."""
        for reader in self._direct:
            reader.close()


def say_gds(probe: GdsProbe) -> None:
    """What the probe found, in the log."""
    if probe.usable:
        log.info("GPUDirect Storage is used for long reads: %s", probe.reason)
    elif probe.state == "compat":
        log.warning(
            "no GPUDirect Storage, only its compatibility mode (%s): pages go through pinned memory and one "
            "copy, which is the same and costs less", probe.reason,
        )  # fmt: skip
    else:
        log.warning("no GPUDirect Storage (%s): pages go through pinned memory and one copy", probe.reason)
