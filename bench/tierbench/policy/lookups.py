"""From batches of tokens to look-ups of records, and from what became of them to reads of pages.

A batch of tokens asks for one look-up in each layer, in the order of the layers: for every token one
entry an order, as clients send them. Kinds number the pairs of a layer and an order, layer after layer.

The pages that a look-up reads are those that the rows of its missing records lie on, each counted once, as
the service plans them. A page remembers the number of the look-up that read it last, so this takes
no sorting; a number that was never given means a page that nobody has read yet.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator
from tierbench.policy.product import FOUND, READ

TENTHS = 10
TALLIES = 3  # of entries by outcome: FOUND, READ, REPEATED


@simulator
def weave(layer_keys, batch_ends, first_owners, keys, owners, ends, first_tokens):
    """Look-ups of consecutive batches of tokens.

    `layer_keys` int64 [layers, tokens, orders]; `batch_ends` int64 [batches], in tokens; `first_owners` int64
    [layers], the owner of a layer's order 0. Writes `keys`, `owners` int64 [layers * tokens * orders] and for
    each look-up, int64 [batches * layers], where it ends among them and which token it begins with.
    """
    layers, _, orders = layer_keys.shape
    at = start = lookup = 0
    for end in batch_ends:
        for layer in range(layers):
            for token in range(start, end):
                for order in range(orders):
                    keys[at] = layer_keys[layer, token, order]
                    owners[at] = first_owners[layer] + order
                    at += 1
            ends[lookup], first_tokens[lookup] = at, start
            lookup += 1
        start = end


@simulator
def tally(outcome, ends, first_tokens, layers, orders, first_token, tokens, kinds, tenths, missed):
    """Count what became of the entries of consecutive look-ups, which go through the layers in turn.

    Adds to `kinds` int64 [layers * orders, TALLIES] and to `tenths` int64 [TENTHS, TALLIES], by when in all
    `tokens` it was; to `missed` uint8 [tokens], for each token, the entries that were not found. The first token
    of the first look-up is number `first_token`.
    """
    start = 0
    for lookup in range(ends.size):
        layer = lookup % layers
        for i in range(start, ends[lookup]):
            token = first_token + first_tokens[lookup] + (i - start) // orders
            kinds[layer * orders + (i - start) % orders, outcome[i]] += 1
            tenths[token * TENTHS // tokens, outcome[i]] += 1
            missed[token] += outcome[i] != FOUND
        start = ends[lookup]


@simulator
def count_pages(
    keys, outcome, ends, first_tokens, layers, orders, first_token, head_sizes, head_offsets, firsts,
    rows_per_page, pages_per_row, lookups_before, read_last, rows_seen, pages,
):  # fmt: skip
    """Count the pages that look-ups read for their missing records.

    `head_sizes`, `head_offsets` int64 [kinds, heads]; `firsts` int64 [layers, 2]: page and row that a layer
    begins with when all layers lie one after another. `read_last` uint32 [pages of all layers] and `rows_seen`
    uint8 [rows of all layers / 8], bits, are kept from call to call; look-ups are numbered from
    `lookups_before` + 1. Adds to `pages` uint16 [tokens], for each token, the pages that its records are
    the first of their look-up to want. Returns how many rows and pages were never read before.
    """
    start = new_rows = new_pages = 0
    for lookup in range(ends.size):
        layer = lookup % layers
        stamp = lookups_before + lookup + 1
        for i in range(start, ends[lookup]):
            if outcome[i] != READ:
                continue
            token = first_token + first_tokens[lookup] + (i - start) // orders
            kind = layer * orders + (i - start) % orders
            for head in range(head_sizes.shape[1]):
                in_layer = np.int64(np.uint64(keys[i]) % np.uint64(head_sizes[kind, head]))
                in_layer += head_offsets[kind, head]
                page = firsts[layer, 0] + in_layer // rows_per_page
                row = firsts[layer, 1] + in_layer
                bit = 1 << (row & 7)
                if not rows_seen[row >> 3] & bit:
                    rows_seen[row >> 3] |= bit
                    new_rows += 1
                if read_last[page] != stamp:
                    new_pages += pages_per_row if read_last[page] == 0 else 0
                    read_last[page] = stamp
                    pages[token] += pages_per_row
        start = ends[lookup]
    return new_rows, new_pages
