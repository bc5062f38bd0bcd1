"""Anonymous memory with the huge-page advice that the service's own arenas have."""

from __future__ import annotations

import mmap

import numpy as np

HUGE_PAGE_LINES = ("AnonHugePages:", "ShmemPmdMapped:")


def resident_rows(rows: int, row_bytes: int, seed: int) -> np.ndarray:
    """A table wholly in memory, uint8 [rows, row_bytes], every page of it touched."""
    memory = mmap.mmap(-1, rows * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    table = np.frombuffer(memory, np.uint8).reshape(rows, row_bytes)
    pattern = np.random.default_rng(seed).integers(0, 256, (min(rows, 1 << 14), row_bytes), np.uint8)
    for start in range(0, rows, len(pattern)):
        table[start : start + len(pattern)] = pattern[: rows - start]
    return table


def huge_page_bytes() -> int:
    """Of this process's memory, shared memory included, how much lies on huge pages now."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        kib = sum(int(line.split()[1]) for line in lines if line.startswith(HUGE_PAGE_LINES))
    return kib * 1024
