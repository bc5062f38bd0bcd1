"""The index against a dict, its geometry, and its snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.arena.layout import ORDER_BITS
from engram_client.errors import FormatError
from tierstore.kernels.extent import pack_entries
from tierstore.tiers.extent_file import table_identities
from tierstore.tiers.extent_index import ExtentIndex
from tierstore.tiers.extent_layout import ExtentGeometry

OWNER = 1 << ORDER_BITS
UUID = bytes(range(16))
IDENTITIES = table_identities({1: "0123456789abcdef" * 2, 2: None, 3: "fedcba9876543210" * 2})


def owners_of(keys: np.ndarray, owner: int = OWNER) -> np.ndarray:
    return np.full(keys.size, owner)


def hashes_of(geometry: ExtentGeometry, keys: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """What the writer would hand to the index."""
    pages = np.zeros((keys.size * geometry.parts, 512), np.uint64)
    record = np.zeros(geometry.record_bytes, np.uint8)
    hashes = np.empty(keys.size, np.int64)
    pack_entries(
        pages.ctypes.data, 0, geometry.shape, keys, owners, IDENTITIES, record.ctypes.data,
        np.zeros(keys.size, np.int64), hashes,
    )  # fmt: skip
    return hashes


def test_the_index_knows_what_a_dict_knows() -> None:
    geometry = ExtentGeometry(2112, 4000)
    index, known = ExtentIndex(geometry, IDENTITIES), {}
    random = np.random.default_rng(3)
    following = geometry.slots
    for _ in range(60):
        keys = random.choice(1500, 100, replace=False).astype(np.int64)  # many again and again
        owners = OWNER + random.integers(0, 3, 100)
        index.insert(hashes_of(geometry, keys, owners), following, keys.size)
        known.update(zip(zip(keys.tolist(), owners.tolist(), strict=True), range(following, following + 100)))  # noqa: B905
        following += keys.size
        gone = random.choice(100, 20, replace=False)
        sequences = index.probe(keys[gone], owners[gone], 0)
        index.remove(keys[gone], owners[gone], sequences)
        for pair in zip(keys[gone].tolist(), owners[gone].tolist(), strict=True):
            del known[pair]
    oldest = following - geometry.slots
    every = [(key, OWNER + order) for key in range(1500) for order in range(3)]
    keys, owners = (np.array(column) for column in zip(*every, strict=True))
    found = index.probe(keys, owners, oldest)
    expected = np.array([known.get(pair, -1) for pair in every])
    expected[expected < oldest] = -1
    wrong = np.flatnonzero(found != expected)
    assert np.count_nonzero(found[wrong] < 0) < 0.02 * np.count_nonzero(expected >= 0), "too many forgotten"
    assert np.count_nonzero(found[wrong] >= 0) <= 2, "fingerprints that are another record's"


def test_a_record_that_is_overwritten_is_not_known() -> None:
    geometry = ExtentGeometry(2112, 64)
    index, keys = ExtentIndex(geometry, IDENTITIES), np.arange(8)
    index.insert(hashes_of(geometry, keys, owners_of(keys)), geometry.slots, keys.size)
    assert index.probe(keys, owners_of(keys), geometry.slots + 3).tolist() == [-1] * 3 + list(range(67, 72))


def test_other_generations_and_tables_that_are_not_kept_are_not_known() -> None:
    geometry, keys = ExtentGeometry(2112, 64), np.arange(8)
    index = ExtentIndex(geometry, IDENTITIES)
    index.insert(hashes_of(geometry, keys, owners_of(keys)), geometry.slots, keys.size)
    for table in (2, 3):
        assert (index.probe(keys, owners_of(keys, table << ORDER_BITS), 0) == -1).all()


@pytest.mark.parametrize("record_bytes", [1280, 2112, 4056, 4057, 20_000])
def test_the_index_takes_a_hundredth_and_the_file_its_budget(record_bytes: int) -> None:
    geometry = ExtentGeometry.within(64 << 20, record_bytes)
    assert geometry is not None
    assert geometry.file_bytes <= 64 << 20
    assert geometry.file_bytes > (64 << 20) - geometry.parts * 4096 - 1
    assert ExtentIndex(geometry, IDENTITIES).total_bytes <= 0.01 * geometry.file_bytes
    assert geometry.parts == (1 if record_bytes <= 4056 else -(-record_bytes // 4056))


def test_no_two_records_lie_on_each_other() -> None:
    for record_bytes in (100, 1280, 2112, 9000):
        geometry = ExtentGeometry(record_bytes, 60)
        sequences = np.arange(geometry.slots, 2 * geometry.slots)
        pieces = geometry.pieces(sequences, np.zeros(sequences.size, np.int64))
        starts = np.sort(pieces.pages * 4096 + pieces.page_offsets)
        assert starts.size == geometry.slots * geometry.parts
        assert (np.diff(starts) >= geometry.entry_bytes).all()
        assert starts[0] == 4096
        assert (starts % 4096 + geometry.entry_bytes <= 4088).all()
        assert starts[-1] + geometry.entry_bytes <= geometry.file_bytes


def test_small_records_share_pages() -> None:
    assert ExtentGeometry(2112, 100).slots == 100
    assert ExtentGeometry(1280, 100).slots == 300
    assert ExtentGeometry(9000, 100).slots == 33
    assert ExtentGeometry.within(8191, 2112) is None


class TestSnapshot:
    def saved(self, folder: Path) -> tuple[Path, ExtentGeometry, np.ndarray]:
        geometry, keys = ExtentGeometry(2112, 5000), np.arange(2000)
        index = ExtentIndex(geometry, IDENTITIES)
        index.insert(hashes_of(geometry, keys, owners_of(keys)), geometry.slots, keys.size)
        index.save(folder / "2112.index", UUID, geometry.slots + keys.size)
        return folder / "2112.index", geometry, keys

    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        path, geometry, keys = self.saved(tmp_path)
        index = ExtentIndex(geometry, IDENTITIES)
        assert index.load(path, UUID) == geometry.slots + keys.size
        found = index.probe(keys, owners_of(keys), 0)
        assert np.count_nonzero(found == geometry.slots + keys) > 0.99 * keys.size
        assert [file.name for file in tmp_path.iterdir()] == ["2112.index"]

    @pytest.mark.parametrize("at", [0, 20, 4090, 5000, 20_000])
    def test_damage_is_refused_and_leaves_nothing(self, tmp_path: Path, at: int) -> None:
        path, geometry, keys = self.saved(tmp_path)
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)
        index = ExtentIndex(geometry, IDENTITIES)
        with pytest.raises(FormatError, match=r"2112\.index"):
            index.load(path, UUID)
        assert (index.probe(keys, owners_of(keys), 0) == -1).all()

    def test_another_extents_or_half_a_snapshot_is_refused(self, tmp_path: Path) -> None:
        path, geometry, _ = self.saved(tmp_path)
        with pytest.raises(FormatError):
            ExtentIndex(geometry, IDENTITIES).load(path, UUID[::-1])
        with pytest.raises(FormatError):
            ExtentIndex(ExtentGeometry(2112, 5008), IDENTITIES).load(path, UUID)
        path.write_bytes(path.read_bytes()[:-4096])
        with pytest.raises(FormatError):
            ExtentIndex(geometry, IDENTITIES).load(path, UUID)
        path.write_bytes(b"")
        with pytest.raises(FormatError):
            ExtentIndex(geometry, IDENTITIES).load(path, UUID)
