"""Random content: any range of it is the same, and every element is finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierbench.content import BLOCK_BYTES, Literal, Random, block, content_bytes

KINDS = [Random("e4m3"), Random("e8m0", low=119), Random("bf16", low=120), Random("bf16", low=112)]


@pytest.mark.parametrize("content", KINDS)
def test_every_element_is_finite(content: Random) -> None:
    raw = block(content, 5, "layers.1.engram.embed.weight", 0)
    assert raw.nbytes == BLOCK_BYTES
    if content.kind == "e4m3":
        assert set(range(256)) - set(raw.tolist()) == {0x7F, 0xFF}
    elif content.kind == "e8m0":
        assert (raw.min(), raw.max()) == (119, 134)
    else:
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        assert np.isfinite(values).all()
        exponents = np.frexp(np.abs(values))[1] - 1 + 127
        assert (exponents.min(), exponents.max()) == (content.low, content.low + 7)


@given(first=st.integers(0, 3 * BLOCK_BYTES), count=st.integers(0, BLOCK_BYTES + 100))
def test_a_range_is_a_slice_of_the_whole(first: int, count: int) -> None:
    content = Random("e4m3")
    whole = np.concatenate([block(content, 1, "t", i) for i in range(5)])
    assert np.array_equal(content_bytes(content, 1, "t", first, count), whole[first : first + count])


def test_seed_name_and_block_all_matter() -> None:
    content = Random("e4m3")
    base = block(content, 1, "t", 0)
    for seed, name, index in ((2, "t", 0), (1, "u", 0), (1, "t", 1)):
        assert np.mean(base == block(content, seed, name, index)) < 0.01


def test_the_stream_is_the_same_on_every_machine() -> None:
    """Pinned: a change here makes every made checkpoint another one."""
    assert content_bytes(Random("e4m3"), 0, "t", 0, 8).tobytes().hex() == "32faea485d2ce235"


def test_literals_are_their_bytes() -> None:
    assert content_bytes(Literal(b"abcdef"), 0, "t", 2, 3).tobytes() == b"cde"
