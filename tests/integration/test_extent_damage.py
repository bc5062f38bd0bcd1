"""The record extent damaged, stale, torn, of another layout or generation: misses, never answers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.daemon import ROOT, environment
from tests.support.extents import MANY, OTHERS, SOME, V41_BYTES, config, extent_file, look_up
from tests.support.stores import (
    PLE,
    V41,
    PackedStore,
    opened,
    repacked_v41,
)
from tierstore.catalog import Catalog
from tierstore.format.header import sealed_pages
from tierstore.tiers.extent_layout import ExtentGeometry


def test_flipped_bits_on_disk_are_misses(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
        look_up(made, packed, V41, OTHERS)
        path = extent_file(folder)
        data = np.memmap(path, np.uint8, "r+")
        pages = data[4096:].reshape(-1, 4096)
        places = np.random.default_rng(1).integers(0, 4088, len(pages))
        pages[np.arange(len(pages)), places] ^= 16
        data.flush()
        again = look_up(made, packed, V41, SOME)
        assert again["extent_damaged"] > 0.9 * again["dram_misses"]
        assert again["extent_hits"] == again["nvme_checksum_failures"] == again["failed_lookups"] == 0
        assert again["records_read"] == again["dram_misses"]
        look_up(made, packed, V41, OTHERS)
        healed = look_up(made, packed, V41, SOME)
        assert healed["extent_hits"] > 0.9 * healed["dram_misses"]


@pytest.mark.parametrize("order", ["fail", "flip", "cut_short"])
def test_a_disk_that_errs_under_the_extent_costs_only_reads(
    packed: PackedStore, tmp_path: Path, order: str
) -> None:
    """The fault is ordered for pages beyond the row file's end, which only the extent has."""
    with opened(packed.copy_to(tmp_path), config()) as made:
        look_up(made, packed, V41, MANY)
        look_up(made, packed, V41, SOME)
        rows_end = made.store.table(V41).row_file.geometry.file_pages
        getattr(made.device, order)(range(rows_end, rows_end + 10_000))
        hurt = look_up(made, packed, V41, SOME)
        assert hurt["extent_damaged"] + hurt["extent_read_errors"] > 0
        assert hurt["failed_lookups"] == 0
        made.device.heal()


def test_a_record_that_is_half_overwritten_is_a_miss(packed: PackedStore, tmp_path: Path) -> None:
    """Every second page is the one of an earlier moment, sound as it is: as after a crash."""
    folder, small = packed.copy_to(tmp_path), config(extent_bytes=4 << 20)
    path = extent_file(folder)
    with opened(folder, small) as made:
        look_up(made, packed, V41, MANY)
    before = np.fromfile(path, np.uint8).reshape(-1, 4096)
    with opened(folder, small) as made:
        look_up(made, packed, V41, SOME)
    after = np.fromfile(path, np.uint8).reshape(-1, 4096)
    changed = (before != after).any(axis=1)
    assert 100 < np.count_nonzero(changed[1:]) < len(after) - 100
    after[1::2] = before[1::2]
    after.tofile(path)
    with opened(folder, small) as made:
        again = look_up(made, packed, V41, SOME)
        assert again["extent_false"] > 100
        assert again["extent_hits"] > 100
        assert again["extent_damaged"] == again["failed_lookups"] == 0


def test_a_stale_index_is_found_out(packed: PackedStore, tmp_path: Path) -> None:
    """As after a kill: the extent went round, the index is of long ago."""
    folder, small = packed.copy_to(tmp_path), config(extent_bytes=4 << 20)
    with opened(folder, small) as made:
        look_up(made, packed, V41, range(3))
    index = extent_file(folder, kind="index")
    old = index.read_bytes()
    with opened(folder, small) as made:
        look_up(made, packed, V41, MANY)
    index.write_bytes(old)
    with opened(folder, small) as made:
        again = look_up(made, packed, V41, range(3))
        assert again["extent_false"] > 100
        assert again["extent_damaged"] == 0
        assert again["records_read"] == again["dram_misses"] - again["extent_hits"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8192)


def replace_by_other(path: Path) -> None:
    path.write_bytes(b"somebody else's file" * 1000)


def flip_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"x")


def of_an_older_layout(path: Path) -> None:
    """A sound header as version 1 wrote it."""
    geometry = ExtentGeometry(V41_BYTES, path.stat().st_size // 4096 - 1)
    packed = struct.pack("<8sIIQQ16s", b"TIEREXTN", 1, 4096, V41_BYTES, geometry.pages, bytes(16))
    with path.open("r+b") as file:
        file.write(sealed_pages(packed.ljust(4088, b"\0"), 0, bytes(16)))


def test_an_older_layout_is_said_and_made_anew(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
    of_an_older_layout(extent_file(folder))
    with opened(folder, config()) as made:
        assert "its layout is version 1, this release writes 2" in caplog.text
        assert look_up(made, packed, V41, OTHERS)["extent_hits"] == 0
        look_up(made, packed, V41, SOME)
        assert look_up(made, packed, V41, OTHERS)["extent_hits"] > 0


@pytest.mark.parametrize("damage", [truncate, replace_by_other, flip_header])
def test_an_extent_that_is_not_one_is_made_anew(
    packed: PackedStore, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
    damage(extent_file(folder))
    with opened(folder, config()) as made:
        assert caplog.text.count("starts empty, and is made anew") == 1
        assert look_up(made, packed, V41, OTHERS)["extent_hits"] == 0
        look_up(made, packed, V41, SOME)
        assert look_up(made, packed, V41, OTHERS)["extent_hits"] > 0


def test_an_index_that_is_damaged_is_said_and_left_out(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
    flip_header(extent_file(folder, kind="index"))
    with opened(folder, config()) as made:
        assert caplog.text.count("starts empty") == 1
        assert look_up(made, packed, V41, OTHERS)["extent_hits"] == 0


def test_pages_of_another_extent_are_never_taken(packed: PackedStore, tmp_path: Path) -> None:
    """An index and a header that fit, over another extent's pages."""
    folder, other = packed.copy_to(tmp_path), packed.copy_to(tmp_path / "other")
    for directory in (folder, other):
        with opened(directory, config()) as made:
            look_up(made, packed, V41, SOME)
    path = extent_file(folder)
    path.write_bytes(path.read_bytes()[:4096] + extent_file(other).read_bytes()[4096:])
    with opened(folder, config()) as made:
        look_up(made, packed, PLE, SOME)
        again = look_up(made, packed, V41, SOME)
        assert again["extent_hits"] == 0
        assert again["extent_damaged"] > 0


def test_another_generation_is_never_served(packed: PackedStore, tmp_path: Path) -> None:
    """The table is packed again with other rows; the extent of the old one is still there."""
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
    with Catalog.open(folder) as catalog:
        before = catalog.entry(V41).spec.generation
    oracle = repacked_v41(tmp_path, folder)
    with Catalog.open(folder) as catalog:
        assert catalog.entry(V41).spec.generation != before
    with opened(folder, config()) as made:
        new = PackedStore(folder, {V41: oracle})
        assert look_up(made, new, V41, SOME)["extent_hits"] == 0
        look_up(made, new, V41, OTHERS)
        assert look_up(made, new, V41, SOME)["extent_hits"] > 0


KILLED = """
import os, sys
import numpy as np
from engram_client import connect, errors
from tierstore.config import Config, Dram, Extent, Nvme
from tierstore.store import open_store

config = Config(dram=Dram(budget_bytes=512 << 10), nvme=Nvme(read_threads=4, staging_bytes=2 << 20),
                extent=Extent(budget_bytes=16 << 20, write_bytes_per_s=1 << 40, period_s=1))
store, _ = open_store(sys.argv[1], config)
client = connect("local:" + sys.argv[1])
table = client.table("v41")
index = os.path.join(sys.argv[1], "extent", "2112.index")
said = 0
for seed in range(10**9):
    random = np.random.default_rng(seed % 20)
    keys = random.integers(0, 2**63 - 1, (40, 3), dtype=np.int64, endpoint=True)
    table.lookup_ngrams(keys)
    if not said and os.path.exists(index):
        print("written", flush=True)
        said = 1
"""


def test_kill_in_the_middle_of_writing(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with opened(folder, config()) as made:
        found = look_up(made, packed, V41, range(20))
        assert found["extent_hits"] > 0
        assert found["extent_damaged"] == found["failed_lookups"] == 0
