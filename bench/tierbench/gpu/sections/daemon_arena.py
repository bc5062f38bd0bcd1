"""Hits out of the daemon's arena in device memory, beside a cache of this process's own, and DRAM by the CPU.

    daemon   a daemon's arena, opened by CUDA IPC (on a CPU: shared memory) and read one-sided
    own      `HbmTier` in this process over the same table, holding the same records
    dram     the client's look-up in shared DRAM into pinned memory, and one copy

Records of DeepSeek-V4.1, all of them hits on either path (`hit_share` tells how many in the daemon's
arena). What each path brings is compared first. `memory_bytes` is the daemon's resident memory: torch
comes with the arena.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client import connect
from engram_client.errors import DataCorrupt, Unavailable
from engram_client.hbm import HbmTier
from engram_client.hbm.daemon import DaemonTable
from engram_client.hbm.misses import Misses
from engram_client.table import Table
from tierbench.alternate import alternate, rate
from tierbench.daemon import running_daemon
from tierbench.gpu.device import finish
from tierbench.gpu.scale import Scale
from tierbench.prepared import prepared_table
from tierbench.record import compare

TIMEOUT_S = 120
BARS = ()
HOT_SHARE = 0.98  # of the records in the daemon's arena before anything is measured
HEATING_S = 40.0


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Rows/s of each path for decode and prefill sizes, and what the daemon takes."""
    prepared = prepared_table(scale.scratch, scale.table_rows_per_head)
    budget = min(scale.arena_bytes, scale.dram_bytes) // 2
    arena = {
        "hbm.budget_bytes": budget, "hbm.device": str(device), "hbm.promote_reads": 1,
        "hbm.promote_period_s": 0.05,
    }  # fmt: skip
    with running_daemon(prepared.store, dram_bytes=scale.dram_bytes, settings=arena) as daemon:
        with connect(daemon.unix) as client:
            table = client.table(prepared.spec.name)
            keys = _keys(table, scale)
            hot = DaemonTable(table, device)
            hit_share = _heat(table, hot, keys)
            own = HbmTier([table], budget_bytes=budget, device=device).table(table.spec.name)
            sizes = (*scale.decode_batches, scale.prefill_tokens)
            found = {str(n): _measure(table, hot, own, keys[:n], scale) for n in sizes if n <= len(keys)}
            stats = client.stats()
        memory = daemon.memory_bytes()
    return {
        "hit_share": hit_share,
        "memory_bytes": memory,
        "hbm_bytes": stats["hbm_bytes"],
        "hbm_promoted": stats["hbm_promoted"],
        "tokens": found,
    }


def _keys(table: Table, scale: Scale) -> Tensor:
    """Of as many tokens as the largest batch; int64 [tokens, orders] on the host."""
    assert table.spec.scheme is not None
    tokens = max(*scale.decode_batches, scale.prefill_tokens)
    random = np.random.default_rng(scale.seed)
    return torch.from_numpy(random.integers(0, 2**63 - 1, (tokens, table.spec.scheme.orders), np.int64))


def _heat(table: Table, hot: DaemonTable, keys: Tensor) -> float:
    """Ask for what is missing until nearly all of it is in the daemon's arena; the share that is."""
    there = keys.to(hot.device)
    out = torch.empty((len(keys), *_shape(table)), dtype=torch.uint8, device=hot.device)
    deadline = time.monotonic() + HEATING_S
    while True:
        missing = missing_of(hot.hits_into(there, out)).view(keys.shape).any(-1).cpu()
        share = 1 - float(missing.float().mean())
        if share >= HOT_SHARE:
            return share
        if time.monotonic() > deadline:
            raise Unavailable(f"{share:.2f} of the records came to the daemon's arena in {HEATING_S:.0f} s")
        for _ in range(4):
            table.lookup_ngrams(keys[missing].numpy())
        time.sleep(0.1)


def missing_of(misses: Misses) -> Tensor:
    """Which of the flat batch were not found, bool [n]; waits for the device."""
    places = misses.found[1:].view(-1, 2)[: int(misses.count), 0]
    return torch.zeros(len(misses.keys), dtype=torch.bool, device=places.device).index_fill(0, places, True)


def _shape(table: Table) -> tuple[int, int]:
    assert table.spec.scheme is not None
    return table.spec.scheme.orders * table.spec.record_rows, table.spec.row_bytes


def _measure(table: Table, hot: DaemonTable, own: Any, keys: Tensor, scale: Scale) -> dict[str, Any]:
    device, pin = hot.device, hot.device.type == "cuda"
    there = keys.to(device)
    out = torch.empty((len(keys), *_shape(table)), dtype=torch.uint8, device=device)
    memory = torch.empty(out.shape, dtype=torch.uint8, pin_memory=pin)
    host_keys = keys.numpy()

    def by_dram() -> None:
        table.lookup_ngrams_into(host_keys, memory.numpy())
        out.copy_(memory, non_blocking=True)

    paths = {
        "daemon": lambda: hot.hits_into(there, out),
        "own": lambda: own.hits_into(there, out),
        "dram": by_dram,
    }
    expected = torch.from_numpy(np.array(table.lookup_ngrams(host_keys))).to(device)
    for _ in range(2):
        own.lookup_ngrams_into(there, out)
    for name, path in paths.items():
        misses = path()
        same = (out == expected).all(2).view(len(keys), -1, table.spec.record_rows).all(2)
        if not bool((same if misses is None else same | missing_of(misses).view(same.shape)).all()):
            raise DataCorrupt(f"path {name!r} brought other bytes than look-ups did")

    def step(path: Any, call: int) -> int:
        path()
        finish(device)
        return len(keys) * _shape(table)[0]

    contenders = {name: partial(rate, partial(step, path), scale.window_s) for name, path in paths.items()}
    samples = alternate(scale.windows, contenders, f"{len(keys)} tokens")
    return {
        "rows_per_s": {name: float(np.median(rates)) for name, rates in samples.items()},
        "daemon_over_own": compare(samples["daemon"], samples["own"]),
        "daemon_over_dram": compare(samples["daemon"], samples["dram"]),
    }
