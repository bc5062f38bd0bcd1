"""Kernels are loaded, or compiled, when a store opens, not while somebody waits for rows."""

from __future__ import annotations

import numpy as np

from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels import row_index
from tierstore.kernels.initial_rows import FLOAT32, fill_normal
from tierstore.kernels.log_entries import newest_rows, plan_entries, take_entries
from tierstore.kernels.runs import cut_windows, join_runs, sort_pages
from tierstore.kernels.trained_pages import first_wrong_page, put_rows, seal_pages_of_epoch, write_pages
from tierstore.kernels.update_log import (
    copy_pieces,
    copy_waiting,
    first_bad_entry,
    pack_entries,
)
from tierstore.updates.blocks import checksum_of
from tierstore.updates.row_index import RowIndex


def warm_up() -> None:
    """Call every kernel of this package with nothing."""
    none, words = np.zeros(0, np.int64), (np.uint64(0), np.uint64(0))
    rows, salt, pages = np.zeros((0, 8), np.uint8), np.uint64(0), np.zeros((0, PAGE_BYTES // 8), np.uint64)
    checksum_of(b"")
    checksum_of(none)
    pack_entries(rows, 8, 16, none, *words, salt, 0)
    first_bad_entry(rows.reshape(-1), 8, 16, none, *words, salt)
    plan_entries(none, 16, 0, 1, none, none, none)
    salts = np.zeros(0, np.uint64)
    take_entries(0, none, none, 0, none, none, 16, 8, none, none, none, salts, *words, none, 0)
    newest_rows(none, none, none, 16, none, none, none)
    copy_waiting(none, none, none, none, 16, 8, 0)
    copy_pieces(0, none, none, none, none, 0)
    sort_pages(none, none)
    join_runs(none, 0, 1, none, none, none, none)
    cut_windows(none, none, none, none, 1, none, none, none, np.zeros((1, 3), np.int64))
    first_wrong_page(pages, none, none, np.zeros(0, np.uint32), *words)
    seal_pages_of_epoch(pages, none, 1, *words)
    put_rows(rows, none, none, 1, 1, 8, pages)
    write_pages(-1, pages, none)
    fill_normal(none, none, rows, 0, FLOAT32, 1, 1.0, np.uint64(0), *words)
    index = RowIndex()
    index.put(none, 0, 16)
    index.find(none)
    index.forget_before(0, index.map_for(0))
    index.move_all()
    row_index.take_all(none, none, none, none)
