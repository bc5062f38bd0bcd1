"""From the disk into device memory: three paths, over records scattered in a table and over a dense part.

    by_lookup   what `pin` did before: look-ups of the embedded store into pinned memory, and one copy each
    pinned      in bulk by io_uring (or pread) into pinned memory, one copy a window, checked on the device
    direct      in bulk by cuFile into device memory (GPUDirect Storage), checked on the device

`direct` is measured where the probe says that it is real, also on short runs, which the product would not
do; `gds` says what the probe found. DRAM caches nothing here. All paths' records are compared first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from engram_client import connect
from engram_client.errors import DataCorrupt
from engram_client.table import Table
from tierbench.alternate import alternate, rate
from tierbench.gpu.device import finish
from tierbench.gpu.scale import Scale
from tierbench.prepared import prepared_table
from tierbench.record import compare
from tierstore.config import Config, Dram
from tierstore.devices.gds_probe import probe_gds
from tierstore.store import Store, open_store
from tierstore.store.bulk import BulkReads

TIMEOUT_S = 120
LINES_AT_ONCE = 4096
WINDOWS_MAX = 5  # of a second or more each


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Rows/s of each path and pattern, and each against `pinned`."""
    prepared = prepared_table(scale.scratch, scale.table_rows_per_head)
    config = Config(dram=Dram(budget_bytes=0))
    store, release = open_store(prepared.store, config)
    try:
        with connect(f"local:{prepared.store}") as client:
            table = client.table(prepared.spec.name)
            probe = probe_gds(prepared.row_file, device.index or 0, config.hbm.gds_probe_timeout_s)
            paths = Paths(store, table, device, direct=probe.usable and device.type == "cuda")
            found = {name: _measure(paths, keys, scale) for name, keys in _patterns(table, scale).items()}
    finally:
        release()
    return {"gds": {"state": probe.state, "reason": probe.reason}, **found}


def _patterns(table: Table, scale: Scale) -> dict[str, np.ndarray]:
    """Keys int64 [n, orders]: from anywhere, and such that every row of a stretch of each head is wanted."""
    scheme = table.spec.scheme
    assert scheme is not None
    random = np.random.default_rng(scale.seed)
    lines = max(8, min(scale.batch_rows // table.spec.record_rows // 4, 32_768))
    scattered = random.integers(0, 2**63 - 1, (lines, scheme.orders), np.int64)
    dense = random.permutation(lines)[:, None] + np.zeros((1, scheme.orders), np.int64)
    return {"scattered": scattered, "dense": dense}


class Paths:
    """Each fills `out` uint8 [n, record_bytes] on the device with records of keys [lines, orders]."""

    def __init__(self, store: Store, table: Table, device: torch.device, *, direct: bool) -> None:
        self.table, self.device, self.ways = table, device, dict[str, str]()
        hbm = store.config.hbm
        bulk = {"pinned": structs.replace(hbm, gds="off")}
        if direct:
            bulk["direct"] = structs.replace(hbm, gds_run_bytes=4096)
        self.all: dict[str, Callable[[np.ndarray, Tensor], None]] = {"by_lookup": self._by_lookup}
        for name, settings in bulk.items():
            self.all[name] = partial(self._in_bulk, name, store.bulk.using(settings))

    def _in_bulk(self, name: str, bulk: BulkReads, keys: np.ndarray, out: Tensor) -> None:
        spec, entries = self.table.spec, keys.ravel()
        orders = np.tile(np.arange(keys.shape[1]), len(keys))
        way = bulk.read(spec.name, spec.generation, entries, orders, out)
        if way != name:
            raise DataCorrupt(f"pages came the way {way!r} where {name!r} was measured; see the log")
        self.ways[name] = way

    def _by_lookup(self, keys: np.ndarray, out: Tensor) -> None:
        spec, pin = self.table.spec, self.device.type == "cuda"
        assert spec.scheme is not None
        shape = (LINES_AT_ONCE, spec.record_rows * spec.scheme.orders, spec.row_bytes)
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        at = 0
        for part in np.split(keys, range(LINES_AT_ONCE, len(keys), LINES_AT_ONCE)):
            rows = memory[: len(part)]
            self.table.lookup_ngrams_into(part, rows.numpy(), timeout=None)
            out[at : at + part.size].copy_(rows.view(part.size, -1), non_blocking=True)
            finish(self.device)
            at += part.size


def _measure(paths: Paths, keys: np.ndarray, scale: Scale) -> dict[str, Any]:
    spec, device = paths.table.spec, paths.device
    out = torch.empty((keys.size, spec.record_bytes), dtype=torch.uint8, device=device)
    expected = torch.empty_like(out)
    paths.all["by_lookup"](keys, expected)

    def step(fill: Callable[[np.ndarray, Tensor], None], call: int) -> int:
        fill(keys, out)
        finish(device)
        return keys.size * spec.record_rows

    for name, fill in paths.all.items():
        out.zero_()
        step(fill, 0)
        if not torch.equal(out, expected):
            raise DataCorrupt(f"path {name!r} brought other bytes than look-ups did")
    contenders = {
        name: partial(rate, partial(step, fill), scale.window_s) for name, fill in paths.all.items()
    }
    samples = alternate(min(scale.windows, WINDOWS_MAX), contenders, "rows from the disk")
    return {
        "records": int(keys.size),
        "row_bytes": spec.row_bytes,
        "rows_per_s": {name: float(np.median(rates)) for name, rates in samples.items()},
        "over_pinned": {
            name: compare(rates, samples["pinned"]) for name, rates in samples.items() if name != "pinned"
        },
    }
