"""From batches of tokens to look-ups of records, and what became of their entries in numbers.

A batch of tokens asks for one look-up in each layer, in the order of the layers: for every token one
entry an order, as clients send them. Kinds number the pairs of a layer and an order, layer after layer.
"""

from __future__ import annotations

from tierbench.policy.compiled import simulator
from tierbench.policy.product import FOUND

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
    `tokens` it was; to `missed` uint8 [tokens], for each token, the entries that were not found. The
    first token of the first look-up is number `first_token`.
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
