"""Copies of rows to a GPU and gathers within it; nothing where there is none. Not yet run on a GPU."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

SMALL_BYTES, LARGE_BYTES = 64 << 10, 64 << 20
REPEATS = 50
RECORDS = 1 << 16


def copy_figures(record_bytes: int) -> tuple[float, float, float] | None:
    """Microseconds of a copy of nothing much, bytes a second of a large one out of pinned memory, and
    microseconds of gathering one record in the device's memory; None without a GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    host = torch.empty(LARGE_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(LARGE_BYTES, dtype=torch.uint8, device="cuda")

    def copy(count: int) -> float:
        part, from_part = device[:count], host[:count]
        return _median_s(lambda: part.copy_(from_part, non_blocking=True), torch.cuda.synchronize)

    small_s, large_s = copy(SMALL_BYTES), copy(LARGE_BYTES)
    bytes_per_s = (LARGE_BYTES - SMALL_BYTES) / max(1e-9, large_s - small_s)
    table = torch.zeros((RECORDS, record_bytes), dtype=torch.uint8, device="cuda")
    wanted, out = torch.randint(RECORDS, (RECORDS,), device="cuda"), torch.empty_like(table)
    gather_s = _median_s(lambda: torch.index_select(table, 0, wanted, out=out), torch.cuda.synchronize)
    return max(0.1, (small_s - SMALL_BYTES / bytes_per_s) * 1e6), bytes_per_s, gather_s / RECORDS * 1e6


def _median_s(work: Callable[[], object], finish: Callable[[], None]) -> float:
    taken = []
    for _ in range(REPEATS):
        finish()
        started = time.perf_counter()
        work()
        finish()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[REPEATS // 2]
