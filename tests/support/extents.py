"""Stores with a record extent, looked up and held against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from engram_client import connect
from tests.support.stores import Device, PackedStore, random_keys, small_config
from tierstore.config import Config, Dram, Extent

DRAM_BYTES = 512 << 10  # some sixty records of each size
V41_BYTES = 2112


def config(extent_bytes: int = 16 << 20, dram_bytes: int = DRAM_BYTES, **settings: Any) -> Config:
    extent = Extent(budget_bytes=extent_bytes, write_bytes_per_s=1 << 40, **settings)
    dram = Dram(budget_bytes=dram_bytes, snapshot_period_s=0)  # or a restart finds them in DRAM
    return structs.replace(small_config(extent=extent), dram=dram)


def extent_file(folder: Path, record_bytes: int = V41_BYTES, kind: str = "extent") -> Path:
    return folder / "extent" / f"{record_bytes}.{kind}"


def look_up(
    made: Device, packed: PackedStore, name: str, seeds: range, count: int = 40, *, flush: bool = True
) -> dict[str, int]:
    """Look keys up, hold them against the oracle, wait for what is written; how the counters changed."""
    oracle = packed.oracles[name]
    with connect(f"local:{made.directory}") as client:
        before = client.stats()
        table = client.table(name)
        for seed in seeds:
            keys = random_keys(oracle, count, seed, masked=0.05)
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        if flush:
            made.store._extents.flush()
        return {key: value - before[key] for key, value in client.stats().items()}


SOME, OTHERS = range(8), range(100, 108)  # 900 records each, far more than DRAM holds
MANY = range(100, 124)
