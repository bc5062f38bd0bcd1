"""Anonymous memory with the huge-page advice that the service's own arenas have."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np


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


@dataclass(frozen=True)
class HugePageBytes:
    """How much of this process's memory lies on huge pages now."""

    anonymous: int  # the resident table
    shared: int  # the arenas


def huge_page_bytes() -> HugePageBytes:
    """As the kernel counts it."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
               if name in ("AnonHugePages", "ShmemPmdMapped")}  # fmt: skip
    return HugePageBytes(kib["AnonHugePages"] * 1024, kib["ShmemPmdMapped"] * 1024)
