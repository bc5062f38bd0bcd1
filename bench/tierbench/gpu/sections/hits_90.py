"""Nine records in ten in HBM, the tenth in the DRAM of the same machine, in one look-up.

Beside all of them from pinned host memory, the better of two ways: a kernel that reads them over the bus
where they lie, and a gather by the host into a pinned buffer that is copied. Every batch misses others, as
its tenth would be let in; so batches are made of new keys, and each is looked up once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from engram_client import connect
from engram_client.errors import DataCorrupt
from engram_client.gpu.pinned import pinned_bytes
from engram_client.hbm import HbmTier
from engram_client.hbm.operations import KERNELS, scatter
from tierbench.alternate import against_best, alternate
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import finish
from tierbench.gpu.filled_hbm import HEADS, ORDERS, RECORD_BYTES
from tierbench.gpu.scale import Scale
from tierbench.prepared import prepared_store

TIMEOUT_S = 150
BARS = (Bar("90 % in HBM, over all from pinned memory", "over_pinned.ratio_median", ">=", 3.0),)
MISSING = 10  # one in so many
ROUNDS = 4  # batches of which each is looked up once a window


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Rows/s of look-ups from keys on the device to rows on the device."""
    store, specs = prepared_store(scale.scratch, scale.table_rows_per_head, (1,))
    lines = max(MISSING, scale.batch_rows // (HEADS * ORDERS))
    with connect(f"local:{store}") as client:
        table = client.table(specs[0].name)
        tier = HbmTier([table], budget_bytes=scale.arena_bytes, device=device)
        hot, random = tier.table(specs[0].name), np.random.default_rng(scale.seed)
        known = random.integers(0, 2**63 - 1, (2 * lines, ORDERS), np.int64)
        hot.pin(known, timeout=None)
        rate = partial(_rate, hot, table, known, lines, device, random)
        if not np.array_equal(hot.lookup_ngrams(known[:64]).cpu().numpy(), table.lookup_ngrams(known[:64])):
            raise DataCorrupt(f"the HBM tier on {device} gives other rows than its table")
        contenders: dict[str, Callable[[], float]] = {"ours": rate}
        contenders |= _pinned_ways(device, lines * ORDERS, min(scale.arena_bytes, 4 << 30), scale)
        samples = alternate(scale.windows, contenders, f"90 % hits on {device}")
        stats = tier.stats()
    ours = samples.pop("ours")
    return {
        "rows_a_batch": lines * ORDERS * HEADS,
        "missing_share": 1 / MISSING,
        "pinned_records": stats["hbm_pinned"],
        "by_kernels": KERNELS.serves(device),
        "rows_per_s": float(np.median(ours)),
        "over_pinned": against_best(ours, samples),
    }


def _rate(
    hot: Any, table: Any, known: np.ndarray, lines: int, device: torch.device, random: np.random.Generator
) -> float:
    """Rows/s of a few batches of which one line in ten is new to HBM and was just read into DRAM."""
    batches = []
    for _ in range(ROUNDS):
        batch = known[random.integers(0, len(known), lines)]
        fresh = random.integers(0, 2**63 - 1, (lines // MISSING, ORDERS), np.int64)
        table.lookup_ngrams(fresh)
        batch[random.choice(lines, len(fresh), replace=False)] = fresh
        batches.append(torch.from_numpy(batch).to(device))
    out = torch.empty((lines, ORDERS * HEADS, table.spec.row_bytes), dtype=torch.uint8, device=device)
    finish(device)
    started = time.perf_counter()
    for there in batches:
        hot.lookup_ngrams_into(there, out)
    finish(device)
    return ROUNDS * lines * ORDERS * HEADS / (time.perf_counter() - started)


def _pinned_ways(
    device: torch.device, records: int, resident_bytes: int, scale: Scale
) -> dict[str, Callable[[], float]]:
    """Records at random from pinned memory to the device: over the bus by a kernel, and by the host."""
    held = max(records, resident_bytes // RECORD_BYTES)
    resident = pinned_bytes(held * RECORD_BYTES, device).view(torch.int64).view(held, -1)
    resident.fill_(1)
    picks = torch.from_numpy(np.random.default_rng(scale.seed).integers(0, held, records))
    there = torch.empty((records, RECORD_BYTES // 8), dtype=torch.int64, device=device)
    buffer = pinned_bytes(records * RECORD_BYTES, device).view(torch.int64).view(records, -1)
    on_device, places = picks.to(device), torch.arange(records, device=device)

    def over_the_bus() -> None:
        scatter(resident, on_device, there, places, None, KERNELS.serves(device))

    def by_the_host() -> None:
        torch.index_select(resident, 0, picks, out=buffer)
        there.copy_(buffer, non_blocking=True)
        finish(device)  # the buffer is written again

    ways = {"by_the_host": by_the_host}
    if KERNELS.serves(device) or device.type == "cpu":
        ways["over_the_bus"] = over_the_bus
    return {name: partial(_timed, device, way, records * HEADS) for name, way in ways.items()}


def _timed(device: torch.device, call: Callable[[], None], rows: int) -> float:
    call()
    finish(device)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        call()
    finish(device)
    return ROUNDS * rows / (time.perf_counter() - started)
