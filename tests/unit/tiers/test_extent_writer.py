"""The writer: round the ring, within its allowance, and when the disk refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from engram_client.arena.layout import ORDER_BITS
from tierstore.kernels.extent import FOREIGN, GOOD
from tierstore.tiers.counters import Counters
from tierstore.tiers.extent_file import ExtentFile, open_extent, table_identities
from tierstore.tiers.extent_index import ExtentIndex
from tierstore.tiers.extent_layout import ExtentGeometry
from tierstore.tiers.extent_writer import ByteAllowance, ExtentWriter

GENERATION = "00112233445566778899aabbccddeeff"
IDENTITIES = table_identities({1: GENERATION})
OWNER = 1 << ORDER_BITS
MUCH = 1 << 40


class Made(SimpleNamespace):
    file: ExtentFile
    index: ExtentIndex
    writer: ExtentWriter
    counters: Counters

    def offer(self, keys: Any) -> None:
        keys = np.asarray(keys)
        source = content(keys, self.file.geometry.record_bytes)
        self.writer.offer(keys, np.full(keys.size, OWNER), source.ctypes.data, np.arange(keys.size))

    def known(self, keys: Any) -> np.ndarray:
        keys = np.asarray(keys)
        return self.index.probe(keys, np.full(keys.size, OWNER), self.writer.oldest)


def content(keys: np.ndarray, record_bytes: int) -> np.ndarray:
    return np.stack(
        [np.random.default_rng(k).integers(0, 256, record_bytes, np.uint8) for k in keys.tolist()]
    )


def make(
    folder: Path, record_bytes: int, pages: int, allowed: int = MUCH, buffer_bytes: int = 1 << 20
) -> Made:
    geometry = ExtentGeometry(record_bytes, pages)
    index, counters = ExtentIndex(geometry, IDENTITIES), Counters()
    file = open_extent(folder / "extent", geometry, index, "auto")
    writer = ExtentWriter(
        file, index, IDENTITIES, ByteAllowance(allowed, 4096), counters,
        buffer_bytes=buffer_bytes, period_s=1000,
    )  # fmt: skip
    return Made(file=file, index=index, writer=writer, counters=counters)


@pytest.fixture
def closing() -> Iterator[list[Made]]:
    opened: list[Made] = []
    yield opened
    for made in opened:
        made.writer.close()
        made.file.close()


def read_record(
    data: bytes, geometry: ExtentGeometry, uuid: bytes, sequence: int
) -> tuple[int, bytes, bytes]:
    """Key, generation and bytes of a record, by the entries' description alone; checksums verified."""
    size, found = geometry.record_bytes, b""
    pieces = geometry.pieces(np.array([sequence]), np.zeros(1, np.int64))
    for number, at, begin in zip(pieces.pages, pieces.page_offsets, pieces.targets, strict=True):
        page = data[number * 4096 : (number + 1) * 4096]
        seed = xxhash.xxh64_intdigest(uuid + int(number).to_bytes(8, "little"))
        assert xxhash.xxh64_intdigest(page[:4088], seed) == int.from_bytes(page[4088:], "little")
        assert page[at + 24] == 0
        assert int.from_bytes(page[at + 25 : at + 28], "little") * 8 == begin == len(found)
        assert int.from_bytes(page[at + 28 : at + 32], "little") == size
        found += page[at + 32 : min(4088, at + 32 + size - len(found))]
    return int.from_bytes(page[at : at + 8], "little"), page[at + 8 : at + 24], found


@pytest.mark.parametrize(("record_bytes", "pages"), [(2112, 45), (1280, 40), (501, 40), (9000, 63)])
def test_round_and_round(tmp_path: Path, closing: list[Made], record_bytes: int, pages: int) -> None:
    made = make(tmp_path, record_bytes, pages, buffer_bytes=256 << 10)
    closing.append(made)
    g, random, last = made.file.geometry, np.random.default_rng(1), 0
    while made.counters.snapshot()["extent_written"] < 5 * g.slots:
        count = int(random.integers(1, max(2, g.slots // 4)))
        made.offer(np.arange(last, last + count))
        last += count
        made.writer.flush()  # often in the middle of a page
    recent = np.arange(max(0, last - g.slots // 3), last)
    sequences = made.known(recent)
    assert np.count_nonzero(sequences >= 0) > 0.6 * recent.size
    data = made.file.path.read_bytes()
    assert len(data) == g.file_bytes
    for key, sequence in zip(recent.tolist(), sequences.tolist(), strict=True):
        if sequence >= 0:
            expected = (key, bytes.fromhex(GENERATION), content(np.array([key]), record_bytes).tobytes())
            assert read_record(data, g, made.file.uuid, sequence) == expected
    assert (made.known(np.arange(g.slots // 2)) == -1).all(), "they were overwritten"


def take(made: Made, keys: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions taken, the bytes at every place, and fates."""
    out = np.zeros((keys.size, made.file.geometry.record_bytes), np.uint8)
    fates = np.full(keys.size, GOOD, np.uint8)
    owners = np.full(keys.size, OWNER)
    return made.writer.take(sequences, keys, owners, out.ctypes.data, fates), out, fates


@pytest.mark.parametrize("record_bytes", [2112, 1280, 9000])
def test_what_waits_to_be_written_can_be_had(tmp_path: Path, closing: list[Made], record_bytes: int) -> None:
    made = make(tmp_path, record_bytes, 9 * 500, buffer_bytes=8 << 20)
    closing.append(made)
    keys = np.arange(10)  # too few to fill a buffer, so nobody writes them
    made.offer(keys)
    sequences = made.known(keys)
    assert (sequences >= 0).all()
    taken, out, fates = take(made, keys, sequences)
    assert taken.tolist() == keys.tolist()
    assert (fates == GOOD).all()
    assert np.array_equal(out, content(keys, record_bytes))
    made.writer.flush()
    assert take(made, keys, sequences)[0].size == 0, "by now they are to be read"
    assert (made.known(keys) == sequences).all()


def test_what_waits_is_never_taken_for_another(tmp_path: Path, closing: list[Made]) -> None:
    """As after a crash: an index that knows records which were never written."""
    made = make(tmp_path, 2112, 4500, buffer_bytes=8 << 20)
    closing.append(made)
    keys = np.arange(10)
    made.offer(keys)
    strangers = np.array([100, 101, 102, 103])
    sequences = made.known(keys)[[3, 9, 0, 0]] + [0, 1, 1000, -1]
    taken, out, fates = take(made, strangers, sequences)
    assert taken.tolist() == [0]
    assert fates.tolist() == [FOREIGN, GOOD, GOOD, GOOD], "the others are to be read"
    assert not out.any()


def test_what_is_written_survives_a_restart_and_goes_on_behind_it(
    tmp_path: Path, closing: list[Made]
) -> None:
    made = make(tmp_path, 2112, 405)
    made.offer(np.arange(100))
    made.writer.close()
    made.file.close()
    again = make(tmp_path, 2112, 405)
    closing.append(again)
    before = again.known(np.arange(100))
    assert np.count_nonzero(before >= 0) >= 99
    again.offer(np.arange(100, 200))
    again.writer.flush()
    assert again.known(np.arange(100, 200)).min() > before.max()
    assert (again.known(np.arange(100)) == before).all()


def test_a_full_buffer_drops_and_counts(tmp_path: Path, closing: list[Made]) -> None:
    made = make(tmp_path, 2112, 4050, buffer_bytes=256 << 10)  # 7 buffers of a group
    closing.append(made)
    keys = np.arange(2000)
    made.offer(keys)
    made.writer.flush()
    counts = made.counters.snapshot()
    assert counts["extent_dropped"] > 0
    assert counts["extent_written"] >= 7 * 17
    assert counts["extent_written"] + counts["extent_dropped"] == keys.size
    assert counts["extent_bytes_written"] == 9 * 4096 * -(-counts["extent_written"] // 17)


def test_the_allowance_is_what_was_configured() -> None:
    clock = [0.0]
    allowance = ByteAllowance(10_000, 4096, lambda: clock[0])
    assert allowance.take(10, 4096) == 2  # a second's worth at first
    assert allowance.take(10, 4096) == 0
    written = 0
    for _ in range(1000):
        clock[0] += 0.05
        written += allowance.take(3, 4096)
    assert written * 4096 == pytest.approx(50 * 10_000, rel=0.03)
    allowance.spend(100_000)
    clock[0] += 5
    assert allowance.take(10, 4096) == 0
    clock[0] += 1000
    assert allowance.take(10, 4096) == 2  # not a thousand seconds' worth


def test_less_than_a_page_a_second_is_still_something() -> None:
    clock = [0.0]
    allowance = ByteAllowance(1000, 4096, lambda: clock[0])
    assert allowance.take(5, 4096) == 1
    clock[0] += 5
    assert allowance.take(5, 4096) == 1


def test_nothing_is_written_beyond_the_allowance(tmp_path: Path, closing: list[Made]) -> None:
    made = make(tmp_path, 2112, 4050, allowed=18 * 4096 + 1)  # two groups
    closing.append(made)
    made.offer(np.arange(100))
    made.writer.flush()
    counts = made.counters.snapshot()
    assert (counts["extent_written"], counts["extent_dropped"]) == (34, 66)


def test_a_disk_that_refuses_writes_is_said_once(
    tmp_path: Path, closing: list[Made], caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path, 2112, 405)
    closing.append(made)
    os.close(made.file.write_fd)
    made.file.write_fd = os.open(made.file.path, os.O_RDONLY)  # every write fails: EBADF
    for start in (0, 100, 200):
        made.offer(np.arange(start, start + 100))
        made.writer.flush()
    counts = made.counters.snapshot()
    assert (counts["extent_written"], counts["extent_dropped"]) == (0, 300)
    assert caplog.text.count("is not written any more") == 1
    assert (made.known(np.arange(300)) == -1).all()
