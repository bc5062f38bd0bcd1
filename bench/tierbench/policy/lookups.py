"""From batches of tokens to look-ups of records, and what became of their entries in numbers.

A batch of tokens asks for one look-up in each layer, in the order of the layers: for every token one
entry a column, as clients send them. A column is an order, or one head of one order where a table is
addressed by rows. Kinds number the pairs of a layer and a column, layer after layer.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator
from tierbench.policy.product import FOUND, HELD, REPEATED
from tierstore.kernels.distinct import find_distinct

PARTS = 40  # of a trace, each with figures of its own
TALLIES = 5  # of entries by outcome: FOUND, READ, REPEATED, HELD, KEPT


@simulator
def weave(layer_keys, batch_ends, kind_owners, keys, owners, ends, first_tokens):
    """Look-ups of consecutive batches of tokens.

    `layer_keys` int64 [layers, tokens, columns]; `batch_ends` int64 [batches], in tokens; `kind_owners` int64
    [layers, columns]. Writes `keys`, `owners` int64 [layers * tokens * columns] and for each look-up, int64
    [batches * layers], where it ends among them and which token it begins with.
    """
    layers, _, columns = layer_keys.shape
    at = start = lookup = 0
    for end in batch_ends:
        for layer in range(layers):
            for token in range(start, end):
                for column in range(columns):
                    keys[at] = layer_keys[layer, token, column]
                    owners[at] = kind_owners[layer, column]
                    at += 1
            ends[lookup], first_tokens[lookup] = at, start
            lookup += 1
        start = end


@simulator
def tally(outcome, ends, first_tokens, layers, columns, first_token, tokens, kinds, parts, missed):
    """Count what became of the entries of consecutive look-ups, which go through the layers in turn.

    Adds to `kinds` int64 [layers * columns, TALLIES] and to `parts` int64 [PARTS, TALLIES], by when in all
    `tokens` it was; to `missed` uint16 [tokens], for each token, the entries that no memory had. The
    first token of the first look-up is number `first_token`.
    """
    start = 0
    for lookup in range(ends.size):
        layer = lookup % layers
        for i in range(start, ends[lookup]):
            token = first_token + first_tokens[lookup] + (i - start) // columns
            kinds[layer * columns + (i - start) % columns, outcome[i]] += 1
            parts[token * PARTS // tokens, outcome[i]] += 1
            missed[token] += outcome[i] != FOUND and outcome[i] != HELD
        start = ends[lookup]


@simulator
def pass_on(source, answered, outcome):
    """What became of entries that were asked of another tier in one go; others are left as they are.

    Entry i asked for number source[i], -1 for none, of `answered` uint8. The first to ask for what had to
    be read or came from the extent is said to have been, those behind it are repeats.
    """
    taken = np.zeros(answered.size, np.uint8)
    for i in range(source.size):
        at = source[i]
        if at >= 0:
            outcome[i] = REPEATED if taken[at] and answered[at] != FOUND else answered[at]
            taken[at] = 1


@simulator
def count_extent_pages(pages, source, ends, first_tokens, columns, first_token, pages_read):
    """Add the pages of the extent that each entry read to those of its token, uint32 [tokens].

    `pages` uint8 [m] and `source` as in `pass_on`; the first to ask has read them.
    """
    start, taken = 0, np.zeros(pages.size, np.uint8)
    for lookup in range(ends.size):
        for i in range(start, ends[lookup]):
            at = source[i]
            if at >= 0 and not taken[at]:
                taken[at] = 1
                pages_read[first_token + first_tokens[lookup] + (i - start) // columns] += pages[at]
        start = ends[lookup]


@simulator
def count_repeats(keys, owners, ends):
    """Of the entries of consecutive look-ups, those whose look-up had asked for the same record before."""
    start = longest = repeats = 0
    for end in ends:
        longest, start = max(longest, end - start), end
    size = 16
    while size < 2 * longest:
        size *= 2
    places = np.empty(size, np.int64)
    first, inverse = np.empty(longest, np.int64), np.empty(longest, np.int64)
    start = 0
    for end in ends:
        places[:] = -1
        n = end - start
        repeats += n - find_distinct(keys[start:end], owners[start:end], places, first[:n], inverse[:n])
        start = end
    return repeats
