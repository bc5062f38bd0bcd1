"""The read plan, executed on bytes in memory, against reading each row where it lies."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES, Geometry
from tierstore.tiers.plan import plan_reads


def row_from_file(file: np.ndarray, geometry: Geometry, row: int) -> bytes:
    """Straight from the format's definition, one row at a time."""
    if geometry.row_bytes <= PAYLOAD_BYTES:
        start = geometry.offset_of_row(row)
        return file[start : start + geometry.row_bytes].tobytes()
    first = geometry.page_of_row(row)
    pages = file.reshape(-1, PAGE_BYTES)[first : first + geometry.pages_per_row, :PAYLOAD_BYTES]
    return pages.tobytes()[: geometry.row_bytes]


@given(
    row_bytes=st.one_of(st.integers(1, 700), st.integers(4000, 9000)),
    rows=st.integers(1, 200),
    gap=st.integers(0, 4),
    run_max=st.integers(1, 8),
    capacity=st.integers(8, 32),
    seed=st.integers(0, 2**32 - 1),
)
def test_plan_brings_every_row_to_its_place(row_bytes, rows, gap, run_max, capacity, seed):
    rng = np.random.default_rng(seed)
    geometry = Geometry(row_bytes, rows, first_page=2)
    file = rng.integers(0, 256, geometry.file_bytes, np.uint8)
    wanted = rng.integers(0, rows, rng.integers(1, 100))
    targets = rng.permutation(wanted.size) * row_bytes
    out = np.zeros(wanted.size * row_bytes, np.uint8)

    plan = plan_reads(geometry, wanted, targets, gap_pages_max=gap, run_pages_max=run_max)
    assert (np.diff(plan.pages) > 0).all(), "each page is wanted once"
    assert plan.run_page_counts.max() <= run_max
    for window in plan.windows(capacity):
        assert window.pages_read <= capacity
        buffer = read_runs(file, window, capacity)
        copy_pieces(plan.pieces, window, buffer, row_bytes, out)

    for row, target in zip(wanted, targets, strict=True):
        assert out[target : target + row_bytes].tobytes() == row_from_file(file, geometry, row)


def read_runs(file, window, capacity):
    buffer = np.zeros((capacity, PAGE_BYTES), np.uint8)
    runs = zip(window.run_first_pages, window.run_page_counts, window.run_slots, strict=True)
    for first, count, slot in runs:
        pages = file.reshape(-1, PAGE_BYTES)[first : first + count]
        assert pages.shape[0] == count, "no read past the end of the file"
        buffer[slot : slot + count] = pages
    return buffer


def copy_pieces(pieces, window, buffer, row_bytes, out):
    part = window.pieces
    lengths = pieces.lengths[part] if pieces.lengths is not None else [row_bytes] * window.piece_slots.size
    rows = zip(window.piece_slots, pieces.page_offsets[part], lengths, pieces.targets[part], strict=True)
    for slot, offset, length, target in rows:
        out[target : target + length] = buffer[slot, offset : offset + length]
