"""How large the sections measure: at a GPU's size, or so small that a CPU shows only that they work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scale:
    """Sizes that all sections draw on; `scratch` lies on the disk that is measured and is kept."""

    scratch: Path
    seed: int
    windows: int  # alternated, of each contender
    window_s: float  # length of one
    copy_bytes: int  # copied at once to measure the device's own bandwidth
    arena_bytes: int  # of an HBM arena
    batch_rows: int  # rows of 264 bytes in a large look-up
    hashed_tokens: int  # hashed at once
    table_rows_per_head: int  # of a packed table of DeepSeek-V4.1's geometry
    dram_bytes: int  # of a daemon's or store's DRAM tier
    decode_batches: tuple[int, ...]  # sequences that decode one token each
    prefill_tokens: int
    model_layers: int
    model_hidden: int


def gpu_scale(scratch: Path, seed: int) -> Scale:
    """One data-centre GPU: an arena much larger than its caches, batches of a million rows."""
    return Scale(
        scratch=scratch,
        seed=seed,
        windows=10,
        window_s=0.2,
        copy_bytes=1 << 30,
        arena_bytes=8 << 30,
        batch_rows=1_000_000,
        hashed_tokens=1 << 20,
        table_rows_per_head=500_000,  # 3.3 GB a layer
        dram_bytes=4 << 30,
        decode_batches=(1, 16, 128),
        prefill_tokens=8192,
        model_layers=8,
        model_hidden=2048,
    )


def check_scale(scratch: Path, seed: int) -> Scale:
    """Seconds on a CPU; the figures say nothing."""
    return Scale(
        scratch=scratch,
        seed=seed,
        windows=2,
        window_s=0.01,
        copy_bytes=1 << 20,
        arena_bytes=1 << 20,
        batch_rows=240,
        hashed_tokens=256,
        table_rows_per_head=500,
        dram_bytes=8 << 20,
        decode_batches=(1, 2),
        prefill_tokens=16,
        model_layers=3,
        model_hidden=64,
    )


SCALES = {"gpu": gpu_scale, "check": check_scale}
