"""Rows over pages: waste, no straddling, and every row in exactly the page that claims it."""

from __future__ import annotations

import pytest

from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES, Geometry


def test_waste_is_below_eight_per_cent_for_the_rows_of_real_models() -> None:
    wasteful = [b for b in range(84, 321) if Geometry(b, 10_000_000, 2).waste >= 0.08]
    assert wasteful == []


def test_deepseek_v41_has_15_rows_to_a_page() -> None:
    geometry = Geometry(264, 384_006_168, 2)
    assert geometry.rows_per_page == 15
    assert geometry.data_pages == 25_600_412
    assert geometry.waste < 0.034


@pytest.mark.parametrize("row_bytes", [1, 3, 264, 2044, 2045, 4087, 4088, 4089, 8176, 8177, 9000])
def test_pages_hold_the_rows_that_claim_them(row_bytes: int) -> None:
    geometry = Geometry(row_bytes, 50, 3)
    assert (geometry.rows_per_page == 0) == (row_bytes > PAYLOAD_BYTES)
    for row in range(50):
        page = geometry.page_of_row(row)
        assert row in geometry.rows_of_page(page)
        start = geometry.offset_of_row(row) - page * PAGE_BYTES
        if geometry.rows_per_page:
            assert start + row_bytes <= PAYLOAD_BYTES
        else:
            assert start == 0
            assert all(row in geometry.rows_of_page(page + k) for k in range(geometry.pages_per_row))
    counted = sum(len(geometry.rows_of_page(p)) for p in range(3, geometry.file_pages))
    assert counted == 50 * geometry.pages_per_row
