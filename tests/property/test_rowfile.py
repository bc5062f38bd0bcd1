"""Any table comes out of its row file as it went in, as an independent reader sees it."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rowfile_reader import RowFileOracle
from tests.table_sources import raw_source, write_row_file
from tierstore.format.verify import verify

row_sizes = st.one_of(
    st.integers(1, 400), st.integers(1, 9000), st.sampled_from([84, 90, 264, 4087, 4088, 4089, 8176, 8177])
)


@settings(max_examples=60)
@given(
    row_bytes=row_sizes,
    rows=st.integers(1, 90),
    leaf_pages=st.integers(1, 9),
    cuts=st.lists(st.integers(1, 8999), max_size=2),
    splits=st.lists(st.integers(1, 89), max_size=3),
)
def test_round_trip(row_bytes: int, rows: int, leaf_pages: int, cuts: list[int], splits: list[int]) -> None:
    bounds = [0, *sorted({c for c in cuts if c < row_bytes}), row_bytes]
    field_bytes = [b - a for a, b in itertools.pairwise(bounds)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, expected = raw_source(folder, rows, field_bytes, splits)
        row_file = write_row_file(source, folder, leaf_pages)
        oracle = RowFileOracle(row_file.path)
        assert (oracle.rows, oracle.row_bytes) == (rows, row_bytes)
        assert oracle.all_rows() == expected
        assert verify(row_file.path, lambda done, total: None).whole
        for row in {0, rows // 2, rows - 1}:
            start = row_file.geometry.offset_of_row(row)
            count = min(row_bytes, 4088)
            assert oracle.data[start : start + count] == oracle.row(row)[:count]
