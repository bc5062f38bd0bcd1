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
    groups = -(-keys.size // geometry.group.records)
    pages = np.zeros((groups * geometry.group.pages, 512), np.uint64)
    record = np.zeros(geometry.record_bytes, np.uint8)
    hashes = np.empty(keys.size, np.int64)
    pack_entries(
        pages.ctypes.data, 0, geometry.shape, keys, owners, IDENTITIES, record.ctypes.data,
        np.zeros(keys.size, np.int64), hashes,
    )  # fmt: skip
    return hashes


def test_the_index_knows_what_a_dict_knows() -> None:
    geometry = ExtentGeometry(2112, 2700)
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
    geometry = ExtentGeometry(2112, 63)
    index, keys = ExtentIndex(geometry, IDENTITIES), np.arange(8)
    index.insert(hashes_of(geometry, keys, owners_of(keys)), geometry.slots, keys.size)
    expected = [-1] * 3 + list(range(geometry.slots + 3, geometry.slots + 8))
    assert index.probe(keys, owners_of(keys), geometry.slots + 3).tolist() == expected


def test_other_generations_and_tables_that_are_not_kept_are_not_known() -> None:
    geometry, keys = ExtentGeometry(2112, 63), np.arange(8)
    index = ExtentIndex(geometry, IDENTITIES)
    index.insert(hashes_of(geometry, keys, owners_of(keys)), geometry.slots, keys.size)
    for table in (2, 3):
        assert (index.probe(keys, owners_of(keys, table << ORDER_BITS), 0) == -1).all()


@pytest.mark.parametrize("record_bytes", [1280, 2112, 4056, 4057, 20_000])
def test_the_index_takes_a_hundredth_and_the_file_its_budget(record_bytes: int) -> None:
    geometry = ExtentGeometry.within(64 << 20, record_bytes)
    assert geometry is not None
    assert geometry.file_bytes <= 64 << 20
    assert geometry.file_bytes > (64 << 20) - geometry.group_bytes
    assert ExtentIndex(geometry, IDENTITIES).total_bytes <= 0.01 * geometry.file_bytes


@pytest.mark.parametrize("record_bytes", [84, 100, 501, 1280, 2112, 4056, 4057, 9000, 70_001])
def test_no_two_records_lie_on_each_other_and_each_is_whole(record_bytes: int) -> None:
    geometry = ExtentGeometry(record_bytes, 5 * ExtentGeometry(record_bytes, 0).group.pages)
    sequences = np.random.default_rng(2).permutation(np.arange(geometry.slots, 2 * geometry.slots))
    pieces = geometry.pieces(sequences, np.arange(sequences.size) * record_bytes)
    assert pieces.lengths is not None
    starts = pieces.pages * 4096 + pieces.page_offsets
    ends = starts + 32 + pieces.lengths
    by_place = np.argsort(starts)
    assert starts[by_place[0]] == 4096
    assert ends.max() <= geometry.file_bytes
    assert (starts[by_place[1:]] >= ends[by_place[:-1]]).all()
    assert (starts % 8 == 0).all()
    assert (pieces.page_offsets + 32 + pieces.lengths <= 4088).all()
    by_target = np.argsort(pieces.targets)
    targets, lengths = pieces.targets[by_target], pieces.lengths[by_target]
    assert targets[0] == 0
    assert np.array_equal(targets[1:], (targets + lengths)[:-1]), "every byte of the records, once"
    assert targets[-1] + lengths[-1] == sequences.size * record_bytes
    pages = pieces.pages[by_target]
    assert (np.diff(pages)[targets[1:] % record_bytes != 0] == 1).all(), "a record's pages are adjacent"


def test_records_are_cut_where_that_gains_more_than_it_costs() -> None:
    def found(record_bytes: int) -> tuple[float, float]:
        group = ExtentGeometry(record_bytes, 0).group
        return group.records / group.pages, group.pages_per_record

    assert found(2112) == pytest.approx((17 / 9, 25 / 17))
    assert found(1280) == (3, 1)
    assert found(4056) == (1, 1)
    assert found(4057)[0] > 0.9
    assert found(9000) == pytest.approx((4 / 9, 3))
    assert ExtentGeometry.within(10 * 4096, 2112) == ExtentGeometry(2112, 9)
    assert ExtentGeometry.within(10 * 4096 - 1, 2112) is None


class TestSnapshot:
    def saved(self, folder: Path) -> tuple[Path, ExtentGeometry, np.ndarray]:
        geometry, keys = ExtentGeometry(2112, 4500), np.arange(2000)
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
            ExtentIndex(ExtentGeometry(2112, 4509), IDENTITIES).load(path, UUID)
        path.write_bytes(path.read_bytes()[:-4096])
        with pytest.raises(FormatError):
            ExtentIndex(geometry, IDENTITIES).load(path, UUID)
        path.write_bytes(b"")
        with pytest.raises(FormatError):
            ExtentIndex(geometry, IDENTITIES).load(path, UUID)
