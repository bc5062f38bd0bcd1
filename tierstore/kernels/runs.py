"""The numeric part of a read plan: pages sorted, made distinct, joined into runs, cut into windows.

Sorting is by digits of 11 bits, the lowest first: pages of one file differ in 20 to 30 bits, so two or
three passes do, each of which reads and writes every entry once. A few entries are sorted by insertion,
which needs no counters.
"""

from __future__ import annotations

import numpy as np

from engram_client.jit import inline_kernel, kernel

DIGIT_BITS = 11
DIGITS = 1 << DIGIT_BITS
FEW = 64


@inline_kernel
def insert_sort(pages, order):
    for i in range(order.size):
        place = i
        while place > 0 and pages[order[place - 1]] > pages[i]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i


@inline_kernel
def sort_by_digits(pages, order, least, bits):
    """Stable; ends in `order` whatever the number of passes."""
    source, target = np.arange(pages.size), np.empty(pages.size, np.int64)
    counts = np.empty(DIGITS, np.int64)
    for shift in range(0, bits, DIGIT_BITS):
        counts[:] = 0
        for i in range(pages.size):
            counts[((pages[i] - least) >> shift) & (DIGITS - 1)] += 1
        begin = 0
        for digit in range(DIGITS):
            count = counts[digit]
            counts[digit] = begin
            begin += count
        for i in range(pages.size):
            digit = ((pages[source[i]] - least) >> shift) & (DIGITS - 1)
            target[counts[digit]] = source[i]
            counts[digit] += 1
        source, target = target, source
    order[:] = source


@kernel
def sort_pages(pages, order):
    """Write to `order` int64 [n] how `pages` int64 [n] ascend; equal ones keep their order."""
    if pages.size <= FEW:
        insert_sort(pages, order)
        return
    least, most = pages.min(), pages.max()
    bits = 0
    while (most - least) >> bits:
        bits += 1
    sort_by_digits(pages, order, least, bits)


@kernel
def join_runs(sorted_pages, gap_pages_max, run_pages_max, pages, page_of, first_pages, page_counts):
    """Distinct pages and the runs that cover them.

    Two pages share a run when at most `gap_pages_max` unwanted pages lie between them and the run
    stays within `run_pages_max`. `sorted_pages` int64 [n] ascend. Writes the distinct `pages`, the number
    `page_of` of each entry's page, `first_pages` and `page_counts` of the runs, all int64 [n]; returns how
    many pages and how many runs there are.
    """
    count = runs = 0
    for i in range(sorted_pages.size):
        page = sorted_pages[i]
        if count and page == pages[count - 1]:
            page_of[i] = count - 1
            continue
        pages[count] = page
        page_of[i] = count
        count += 1
        if runs:
            first = first_pages[runs - 1]
            gap = page - (first + page_counts[runs - 1])
            if gap <= gap_pages_max and page - first + 1 <= run_pages_max:
                page_counts[runs - 1] = page - first + 1
                continue
        first_pages[runs] = page
        page_counts[runs] = 1
        runs += 1
    return count, runs


@kernel
def cut_windows(
    first_pages, page_counts, pages, page_of, capacity_pages, run_slots, page_slots, piece_slots, starts
):
    """Cut a plan into windows of whole runs that fit `capacity_pages` slots each.

    A page's slot counts from its window's first. Writes `run_slots` int64 [runs], `page_slots` int64
    [pages], `piece_slots` int64 [n] and `starts` int64 [runs + 1, 3]: the first run, page and piece
    of each window, and one row more for the end. Returns the number of windows.
    """
    windows, used, page, piece = 0, capacity_pages, 0, 0
    for run in range(first_pages.size):
        if used + page_counts[run] > capacity_pages:
            starts[windows, 0], starts[windows, 1], starts[windows, 2] = run, page, piece
            windows += 1
            used = 0
        run_slots[run] = used
        end = first_pages[run] + page_counts[run]
        while page < pages.size and pages[page] < end:
            page_slots[page] = used + pages[page] - first_pages[run]
            while piece < page_of.size and page_of[piece] == page:
                piece_slots[piece] = page_slots[page]
                piece += 1
            page += 1
        used += page_counts[run]
    starts[windows, 0], starts[windows, 1], starts[windows, 2] = first_pages.size, page, piece
    return windows
