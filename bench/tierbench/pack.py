"""How fast `pack` is beside `cp` and fsync of the same source bytes on the same disk, in alternated runs.

Both read the source from disk: its pages are dropped from the page cache before each run. Both end
with everything forced to disk. `pack` writes a little more than `cp` (3.4 % for rows of 264 bytes) and
is timed whole: opening the checkpoint, planning, packing, publishing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from tierbench.alternate import alternate
from tierbench.record import compare
from tierstore.packing import PackOptions, pack

WEIGHT_BYTES, SCALE_BYTES = 256, 8  # a row of DeepSeek-V4.1
CHUNK_BYTES = 16 * 2**20
WARM_ROWS = 1000


def measure_pack(
    workdir: Path, *, source_bytes: int = 2**30, pairs: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Source bytes per second of both, run by run, and their ratio's median and spread.

    Everything is written below `workdir`, which must be on the disk that is meant, and removed again.
    """
    folder = workdir / "pack-benchmark"
    try:
        warm, _ = _write_source(folder / "warm", WARM_ROWS, seed)
        _pack(warm, folder)  # the kernels are compiled or loaded
        rows = source_bytes // (WEIGHT_BYTES + SCALE_BYTES)
        source, file_bytes = _write_source(folder / "source", rows, seed)
        taken_s = alternate(
            pairs,
            {"pack": lambda: _pack(source, folder), "cp": lambda: _copy(source, folder)},
            "pack against cp",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rates = {name: [file_bytes / s for s in samples] for name, samples in taken_s.items()}
    return {
        "source_bytes": file_bytes,
        "rows": rows,
        "row_bytes": WEIGHT_BYTES + SCALE_BYTES,
        "pack_s": taken_s["pack"],
        "cp_s": taken_s["cp"],
        "bytes_per_s": compare(rates["pack"], rates["cp"]),
    }


def _pack(source: Path, folder: Path) -> float:
    store = folder / "store"
    _drop_cached(source)
    started_s = time.perf_counter()
    pack(
        source.parent,
        store,
        PackOptions(layout_file=source.with_name("layout.toml")),
        notify=lambda sentence: None,
        on_progress=lambda progress: None,
    )
    taken_s = time.perf_counter() - started_s
    shutil.rmtree(store)
    return taken_s


def _copy(source: Path, folder: Path) -> float:
    target = folder / "copy"
    _drop_cached(source)
    started_s = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", os.fspath(source), os.fspath(target)], check=True)
    _sync(target)
    taken_s = time.perf_counter() - started_s
    target.unlink()
    return taken_s


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _drop_cached(path: Path) -> None:
    """Let neither contender find the source, or leftovers of the other's writing, in memory."""
    os.sync()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _write_source(folder: Path, rows: int, seed: int) -> tuple[Path, int]:
    """A safetensors file of weights and scales with random bytes, its layout file, and its size."""
    folder.mkdir(parents=True)
    weights, scales = rows * WEIGHT_BYTES, rows * SCALE_BYTES
    header = {
        "embed.weight": {
            "dtype": "F8_E4M3", "shape": [rows, WEIGHT_BYTES], "data_offsets": [0, weights],
        },
        "embed.scale": {
            "dtype": "F8_E8M0", "shape": [rows, SCALE_BYTES], "data_offsets": [weights, weights + scales],
        },
    }  # fmt: skip
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = weights + scales
        while left:
            count = min(left, CHUNK_BYTES)
            file.write(random.bytes(count))
            left -= count
    (folder / "layout.toml").write_text(
        '[[table]]\nname = "table"\nweight = "embed.weight"\nscale = "embed.scale"\n'
    )
    return path, path.stat().st_size
