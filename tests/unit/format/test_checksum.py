"""The checksum kernels against the xxhash library, page for page."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash

from tierstore.format.header import uuid_words
from tierstore.kernels.checksum import bad_pages, first_bad_page, page_checksum, seal_pages

UUID = bytes(range(100, 116))


def reference(page: np.ndarray, number: int, uuid: bytes) -> int:
    seed = xxhash.xxh64_intdigest(uuid + struct.pack("<Q", number))
    return xxhash.xxh64_intdigest(page.tobytes()[:4088], seed)


@pytest.fixture
def pages() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, (9, 512), dtype=np.uint64)


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**40 + 7])
def test_page_checksum_is_published_xxh64(pages: np.ndarray, number: int) -> None:
    for page in pages:
        computed = page_checksum(page, number, *uuid_words(UUID))
        assert int(computed) == reference(page, number, UUID)


def test_words_of_a_uuid_may_be_plain_integers(pages: np.ndarray) -> None:
    low, high = (int(word) for word in uuid_words(UUID))
    assert int(page_checksum(pages[0], 3, low, high)) == reference(pages[0], 3, UUID)


def test_sealed_pages_are_good_and_only_in_their_place(pages: np.ndarray) -> None:
    seal_pages(pages, 5, *uuid_words(UUID), 0, len(pages))
    numbers = np.arange(5, 5 + len(pages))
    assert [int(p[511]) for p in pages] == [
        reference(p, n, UUID) for p, n in zip(pages, numbers, strict=True)
    ]
    assert first_bad_page(pages, numbers, *uuid_words(UUID), 0, len(pages)) == -1
    assert first_bad_page(pages, numbers + 1, *uuid_words(UUID), 2, len(pages)) == 2
    assert first_bad_page(pages, numbers, *uuid_words(UUID[::-1]), 0, len(pages)) == 0


def test_seal_leaves_other_pages_alone(pages: np.ndarray) -> None:
    before = pages.copy()
    seal_pages(pages, 0, *uuid_words(UUID), 3, 5)
    changed = np.flatnonzero((pages != before).any(axis=1))
    assert changed.tolist() == [3, 4]


def test_every_bit_of_a_page_counts() -> None:
    page = np.random.default_rng(2).integers(0, 2**64, (1, 512), dtype=np.uint64)
    seal_pages(page, 9, *uuid_words(UUID), 0, 1)
    numbers = np.array([9])
    for bit in range(4096 * 8):
        page[0, bit // 64] ^= np.uint64(1 << bit % 64)
        assert first_bad_page(page, numbers, *uuid_words(UUID), 0, 1) == 0, bit
        page[0, bit // 64] ^= np.uint64(1 << bit % 64)
    assert first_bad_page(page, numbers, *uuid_words(UUID), 0, 1) == -1


def test_bad_pages_names_each(pages: np.ndarray) -> None:
    seal_pages(pages, 5, *uuid_words(UUID), 0, len(pages))
    pages[[2, 7], [0, 511]] += np.uint64(1)
    found = np.empty(len(pages), dtype=np.int64)
    assert bad_pages(pages, 5, *uuid_words(UUID), 0, len(pages), found) == 2
    assert found[:2].tolist() == [2, 7]
