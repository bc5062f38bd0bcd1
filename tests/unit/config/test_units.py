"""Sizes and times as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.config.units import format_bytes, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1_000_000", 1_000_000),
        ("8GiB", 8_589_934_592),
        ("512 MiB", 536_870_912),
        (" 1.5 GiB ", 1_610_612_736),
        ("64kib", 65_536),
        ("2GB", 2_000_000_000),
        ("7B", 7),
        ("1TiB", 1_099_511_627_776),
        ("-1", -1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a number"),
        ("GiB", "not a number"),
        ("1e9", "not a number"),
        ("8G", "GiB or GB"),
        ("8 parsecs", "unknown unit 'parsecs'"),
        ("0.3B", "no whole number"),
    ],
)
def test_sizes_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("500ms", 0.5), ("2 min", 120.0), ("1h", 3600.0), ("0.25s", 0.25)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_a_time_with_an_unknown_unit() -> None:
    with pytest.raises(ValueError, match="use ms, s, min or h"):
        parse_seconds("3 days")


@given(st.integers(0, 2**62))
def test_a_printed_size_reads_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size
