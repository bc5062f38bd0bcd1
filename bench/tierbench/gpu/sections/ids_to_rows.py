"""From token ids ready on the device to rows ready on the stream: hashed, found and copied by one kernel.

Beside the same in two steps (hash, then look up), and beside what an engine does that keeps its table in the
device's memory: row ids, then `torch.index_select`. Decode batches are also replayed as a captured graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import DataCorrupt
from engram_client.hbm.arena import HbmArena
from engram_client.hbm.operations import Keys
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import finish
from tierbench.gpu.filled_hbm import HEADS, ORDERS, RECORD_BYTES, ROW_BYTES, host_waits, records_of
from tierbench.gpu.scale import Scale
from tierbench.gpu.sections.hashing import VOCABULARY, v41_mapping
from tierbench.record import summarize

TIMEOUT_S = 90
BARS = (Bar("host synchronisation from ids to rows", "profile.host_waits", "==", "none"),)
CALLS = 200


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Microseconds by number of tokens: each call alone, and of many in a row without waiting "
    "between them."""
    mapping = v41_mapping(scale.seed)
    twin = mapping.on_device(device)
    arena = HbmArena(RECORD_BYTES, scale.arena_bytes, device)
    calls = CALLS if device.type == "cuda" else 3
    resident = torch.ones((scale.arena_bytes // ROW_BYTES, ROW_BYTES // 8), dtype=torch.int64, device=device)
    found: dict[str, Any] = {}
    for tokens in (*scale.decode_batches, scale.prefill_tokens):
        random = np.random.default_rng([scale.seed, tokens])
        shape = (1, tokens) if tokens == scale.prefill_tokens else (tokens, 1)
        ids = torch.from_numpy(random.integers(0, VOCABULARY, shape, np.int64)).to(device)
        ways = _ways(arena, twin, ids, resident)
        found[str(tokens)] = {name: _timed(device, call, calls) for name, call in ways.items()}
        profile = host_waits(device, ways["one_kernel"])
    return {"tokens": found, "by_kernels": not arena.in_order, "profile": profile}


def _ways(arena: HbmArena, twin: Any, ids: Tensor, resident: Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, all of whose records the arena holds; checks that it gives them."""
    keys = twin.ngram_keys(ids, 1).reshape(-1)
    owners = (torch.arange(len(keys), device=keys.device) % ORDERS).short()
    for part in range(0, len(keys), 1 << 12):
        some = slice(part, part + (1 << 12))
        arena.admit(keys[some], owners[some], records_of(keys[some]), pinned=True)
    out = torch.empty((len(keys), RECORD_BYTES), dtype=torch.uint8, device=keys.device)
    found = torch.empty(3 + 2 * len(keys), dtype=torch.int64, device=keys.device)
    hashed = torch.empty_like(keys)
    rows = torch.empty((len(keys) * HEADS, ROW_BYTES // 8), dtype=torch.int64, device=keys.device)

    def two_kernels() -> None:
        arena.lookup_into(Keys(twin.ngram_keys(ids, 1).reshape(-1), 0, ORDERS), out, found)

    def one_kernel() -> None:
        arena.lookup_into(Keys(hashed, 0, ORDERS, twin.inputs(ids, 1)), out, found)

    def resident_table() -> None:
        torch.index_select(resident, 0, twin.row_ids(ids, 1).reshape(-1) % len(resident), out=rows)

    ways: dict[str, Callable[[], object]] = {"two_kernels": two_kernels, "resident_table": resident_table}
    ways["one_kernel"] = two_kernels if arena.in_order else one_kernel
    for way in ("two_kernels", "one_kernel"):
        out.zero_()
        ways[way]()
        if int(found[0]) == 0 and not torch.equal(out, records_of(keys)):
            raise DataCorrupt(f"{way} gave other rows than the keys'")
    if keys.device.type == "cuda" and not arena.in_order:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one_kernel()
        ways["replayed"] = graph.replay
    return ways


def _timed(device: torch.device, call: Callable[[], object], calls: int) -> dict[str, Any]:
    call()
    alone_us = []
    for _ in range(calls):
        finish(device)
        started = time.perf_counter()
        call()
        finish(device)
        alone_us.append(1e6 * (time.perf_counter() - started))
    started = time.perf_counter()
    for _ in range(calls):
        call()
    finish(device)
    return {"alone_us": summarize(alone_us), "in_a_row_us": 1e6 * (time.perf_counter() - started) / calls}
