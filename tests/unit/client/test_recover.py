"""Row ids back to keys: whole records, padding, and ids that are not one n-gram's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engram_client.errors import BadRequest, ForeignIds, IdOutOfRange
from engram_client.hashing import (
    NgramHashMapping,
    engram_schemes,
    head_offsets,
    recover_keys,
    row_ids_from_keys,
)
from engram_client.spec import HashScheme
from tests.vectors import load_json

V41, _ = engram_schemes(
    compressed_vocab_size=99092,
    layer_ids=[1, 14],
    vocab_size_per_ngram=[16_000_000] * 3,
    n_head_per_ngram=8,
    max_ngram_size=4,
    pad_id=2,
    seed=0,
)
LARGEST = 2**63 - 1


def with_sizes(*sizes: tuple[int, ...]) -> HashScheme:
    """A scheme of these head sizes."""
    return HashScheme("ple", 0, (1,) * (len(sizes) + 1), sizes, head_offsets(sizes), 10, eos_token_id=0)


class TestWholeRecords:
    def test_every_published_row_id(self) -> None:
        mapping = NgramHashMapping([V41], np.arange(99092))
        for case in load_json("deepseek_v41")["cases"]:
            rows = np.array(case["row_ids"]["1"])
            keys = recover_keys(mapping.scheme(1), rows)
            np.testing.assert_array_equal(row_ids_from_keys(V41, keys), rows)

    @pytest.mark.parametrize("dtype", [np.int64, np.int32])
    def test_extreme_keys(self, dtype: Any) -> None:
        keys = np.array([[0, 1, LARGEST], [LARGEST - 1, 2**62, 16_000_057], [-1, 5, -1], [-1, -1, -1]])
        rows = row_ids_from_keys(V41, keys).astype(dtype)
        assert (rows[2].reshape(3, 8) == -1).all(axis=1).tolist() == [True, False, True]
        np.testing.assert_array_equal(recover_keys(V41, rows), keys)

    @pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 0, 3), (1, 2, 2, 1)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        keys = np.random.default_rng(0).integers(0, LARGEST, (*shape, 3))
        rows = row_ids_from_keys(V41, keys)
        assert rows.shape == (*shape, 24)
        np.testing.assert_array_equal(recover_keys(V41, rows), keys)

    def test_two_heads_are_enough_when_they_are_large(self) -> None:
        scheme = with_sizes((2**31 - 1, 2**31 - 19, 2**31 - 61))
        keys = np.array([[0], [LARGEST], [12345678901234567]])
        np.testing.assert_array_equal(recover_keys(scheme, row_ids_from_keys(scheme, keys)), keys)

    def test_heads_that_share_a_factor_are_passed_over(self) -> None:
        scheme = with_sizes((2**21, 2**20, 3**13, 5**9, 1, 7**7, 2**10))
        keys = np.random.default_rng(1).integers(0, LARGEST, (50, 1))
        np.testing.assert_array_equal(recover_keys(scheme, row_ids_from_keys(scheme, keys)), keys)


def changed(place: tuple[int, ...], row: int) -> np.ndarray:
    """Valid rows of [2, 5] tokens with one id replaced."""
    rows = row_ids_from_keys(V41, np.random.default_rng(2).integers(0, LARGEST, (2, 5, 3)))
    rows[place] = row
    return rows


class TestForeignIds:
    @pytest.mark.parametrize("head", range(8))
    def test_one_row_of_another_ngram(self, head: int) -> None:
        row = V41.head_offsets[1][head] + 77
        with pytest.raises(
            ForeignIds, match=r"row_ids\[1, 3\] are not one n-gram's: order 3, head \d"
        ) as caught:
            recover_keys(V41, changed((1, 3, 8 + head), row))
        assert "expected" in str(caught.value)
        assert "lookup(row_ids)" in str(caught.value)

    def test_the_first_wrong_head_and_what_it_should_be(self) -> None:
        good = changed((0, 0, 0), -1)[1, 2]
        bad = good.copy()
        bad[16 + 5] = V41.head_offsets[2][5] + (good[16 + 5] == V41.head_offsets[2][5])
        with pytest.raises(ForeignIds, match=f"head 5 got row {bad[21]}, expected {good[21]} by key"):
            recover_keys(V41, bad)

    def test_a_row_of_another_head(self) -> None:
        row = V41.head_offsets[0][4]
        with pytest.raises(ForeignIds, match=rf"order 2, head 3 got row {row}, expected \d+\.\.{row - 1},"):
            recover_keys(V41, changed((0, 4, 3), row))

    def test_padding_in_part_of_a_record(self) -> None:
        with pytest.raises(ForeignIds, match="order 4, head 6 is -1 where other heads hold rows"):
            recover_keys(V41, changed((1, 0, 22), -1))

    @pytest.mark.parametrize("too_large", [2**63, 2**64 - 1, 2**64, 2**64 + 5, 2**92])
    def test_heads_that_make_a_number_above_63_bits(self, too_large: int) -> None:
        scheme = with_sizes((2**31 - 1, 2**31 - 19, 2**31 - 61))
        rows = [
            too_large % size + offset
            for size, offset in zip(scheme.head_sizes[0], scheme.head_offsets[0], strict=True)
        ]
        with pytest.raises(ForeignIds, match=r"head 2 got row \d+, expected one that makes a 63-bit key"):
            recover_keys(scheme, [rows])


class TestRefusals:
    @pytest.mark.parametrize("row", [-2, -(2**63), V41.rows, LARGEST])
    def test_ids_outside_the_table(self, row: int) -> None:
        message = rf"row_ids\[1, 3, 11\] is {row}; the table's hashed rows are 0\.\.{V41.rows - 1}"
        with pytest.raises(IdOutOfRange, match=message):
            recover_keys(V41, changed((1, 3, 11), row))

    @pytest.mark.parametrize("shape", [(), (8,), (2, 25)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BadRequest, match=r"row_ids must be \[\.\.\., 24\]"):
            recover_keys(V41, np.zeros(shape, dtype=np.int64))

    def test_dtypes(self) -> None:
        with pytest.raises(BadRequest, match="row_ids must be int64 or int32, got float64"):
            recover_keys(V41, np.zeros(24))

    @pytest.mark.parametrize("sizes", [(50, 51, 53), (2**20, 2**21, 2**22, 2**23), (2**62 - 57, 2**61 - 1)])
    def test_tables_whose_heads_do_not_determine_keys(self, sizes: tuple[int, ...]) -> None:
        with pytest.raises(BadRequest, match=r"layer 0, order 2: .* look the rows up with lookup\(row_ids\)"):
            recover_keys(with_sizes(sizes), np.zeros(len(sizes), dtype=np.int64))

    def test_only_what_determines_keys_is_called_recoverable(self) -> None:
        assert V41.recoverable
        assert not dataclasses.replace(V41, head_sizes=((50, 51),) * 3).recoverable
