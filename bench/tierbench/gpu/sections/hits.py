"""All hits: records of 8 x 264 bytes out of an HBM arena, as bytes and as numbers.

Beside `torch.index_select` of as many rows from a resident tensor of the arena's size, viewed as int64, into
memory that is there; beside the same decoded by torch; and as a share of what the device copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from engram_client.dequantize import dequantize
from engram_client.hbm.operations import Decoding, Keys
from tierbench.alternate import alternate
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import bytes_per_s
from tierbench.gpu.filled_hbm import HEADS, LAYOUT, RECORD_BYTES, ROW_BYTES, FilledHbm, host_waits
from tierbench.gpu.scale import Scale
from tierbench.record import compare

TIMEOUT_S = 90
BARS = (
    Bar("all hits, over index_select of the same rows", "over_index_select.ratio_median", ">=", 1.2),
    Bar("all hits, share of the device's copy bandwidth", "over_copy.ratio_median", ">=", 0.6),
    Bar("host synchronisation on the hit path", "profile.host_waits", "==", "none"),
)


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes/s read and written by each, so that the device's copy is a yardstick, too."""
    filled = FilledHbm(scale.arena_bytes, device, scale.seed)
    records = max(1, scale.batch_rows // HEADS)
    batches = filled.batches(records, scale.seed)
    out = torch.empty((records, RECORD_BYTES), dtype=torch.uint8, device=device)
    numbers = torch.empty((records, HEADS, 256), dtype=torch.bfloat16, device=device)
    found = torch.empty(3 + 2 * records, dtype=torch.int64, device=device)
    resident = torch.ones((scale.arena_bytes // ROW_BYTES, ROW_BYTES // 8), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(scale.seed)
    picks = torch.randint(len(resident), (len(batches), records * HEADS), device=device, generator=generator)
    gathered = torch.empty((records * HEADS, ROW_BYTES // 8), dtype=torch.int64, device=device)
    here, there = (torch.ones(scale.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    turn = iter(range(1 << 62))

    def ours() -> None:
        filled.arena.lookup_into(Keys(batches[next(turn) % len(batches)], 0, 1), out, found)

    def decoded() -> None:
        asked = Keys(batches[next(turn) % len(batches)], 0, 1)
        filled.arena.lookup_into(asked, numbers, found, Decoding(LAYOUT, HEADS))

    def index_select() -> None:
        torch.index_select(resident, 0, picks[next(turn) % len(picks)], out=gathered)

    def select_and_decode() -> None:
        index_select()
        dequantize(LAYOUT, gathered.view(torch.uint8))

    moved = 2 * records * RECORD_BYTES
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "ours": (moved, ours),
        "index_select": (moved, index_select),
        "copy": (2 * scale.copy_bytes, partial(there.copy_, here)),
        "decoded": (moved, decoded),
        "select_and_decode": (moved, select_and_decode),
    }
    contenders = {
        name: partial(bytes_per_s, device, count, call, scale.window_s)
        for name, (count, call) in calls.items()
    }
    samples = alternate(scale.windows, contenders, f"hits on {device}")
    rows_per_s = {
        name: float(np.median(s)) / (2 * ROW_BYTES) for name, s in samples.items() if name != "copy"
    }
    return {
        "arena_bytes": filled.arena.bytes,
        "held_records": len(filled.keys),
        "rows_a_batch": records * HEADS,
        "by_kernels": not filled.arena.in_order,
        "rows_per_s": rows_per_s,
        "copy_bytes_per_s": float(np.median(samples["copy"])),
        "over_index_select": compare(samples["ours"], samples["index_select"]),
        "over_copy": compare(samples["ours"], samples["copy"]),
        "decoded_over_torch": compare(samples["decoded"], samples["select_and_decode"]),
        "profile": host_waits(device, ours),
    }
