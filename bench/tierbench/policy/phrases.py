"""Made-up token traces in which n-grams are asked for as in text: Zipf by phrase, with drift and locality.

Tokens drawn one by one from a Zipf law make n-grams that hardly ever come again; text repeats itself in
runs. So what is drawn here are *phrases*, short runs of tokens that are always the same, and n-grams inside
a phrase are as popular as it is. Each next phrase is, in this order of decision,

    what followed last time    while a repetition goes on, with probability `follow`
    a new one                  with probability `cold`: never said before, though it may be repeated
    one of this document       with probability `session`, so many phrases back, by a power law
    one of the whole past      with probability `recent`, likewise
    one of the population      else: rank r with probability proportional to r^-exponent

A rank's phrase is replaced by another at random times, `drift` times a million tokens: at any time a share of
the ranks has just changed hands, the popular ones like all others. A phrase is nothing but a number, of
which its length (geometric) and tokens are hashes, so a population of any size takes no memory. Its first
token is one of few `openers`, which are popular by a power law, too: as words like "the" do, they join
phrases into bigrams that come again although the phrases beside them never met.

Power laws are drawn by inverting their integral, so the first few ranks are a little off the exact sums.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.read import mix
from tierbench.policy.compiled import simulator
from tierbench.policy.sampling import THRESHOLD_BITS

UNIT = 1.0 / (1 << 53)
FIRST_TOKEN = 16  # below lie special tokens of most vocabularies
FRESH = np.int64(1) << 40  # numbers of phrases that were said once; others are hashes
SAMPLE_SHIFT = 63 - THRESHOLD_BITS
LENGTH_SALT, TOKEN_SALT, TIME_SALT = 1 << 20, 1 << 30, 77
(
    EXPONENT, POPULATION, DRIFT, COLD, SESSION, SESSION_EXPONENT, RECENT, RECENT_EXPONENT, FOLLOW,
    PHRASE_TOKENS, OPENERS, OPENER_EXPONENT, KNOBS,
) = range(13)  # fmt: skip


@simulator
def _draw(state):
    """A number of [0, 1), by xorshift64*."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return np.float64((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * UNIT


@simulator
def _unit_hash(a, b):
    return np.float64(mix(np.int64(a), np.int64(b)) >> np.uint64(11)) * UNIT


@simulator
def _power_law(u, exponent, most):
    """A rank of 1..most for u of [0, 1)."""
    most = np.float64(most)
    if abs(exponent - 1.0) < 1e-6:
        rank = most**u
    else:
        rest = 1.0 - exponent
        rank = ((most**rest - 1.0) * u + 1.0) ** (1.0 / rest)
    return np.int64(max(1.0, min(rank, most)))


@simulator
def _of_population(state, knobs, tokens):
    """The phrase that a rank drawn now stands for."""
    rank = _power_law(_draw(state), knobs[EXPONENT], knobs[POPULATION])
    turn = np.int64(tokens * 1e-6 * knobs[DRIFT] + _unit_hash(rank, TIME_SALT))
    return np.int64(mix(rank, turn) >> np.uint64(2))


@simulator
def _next_phrase(state, knobs, past, said, document_first, source, tokens, fresh):
    """The next phrase, and where in the past it was repeated from, -1 if nowhere; `fresh` counts new ones."""
    if 0 <= source < said - 1 and _draw(state) < knobs[FOLLOW]:
        return past[source + 1], source + 1
    u = _draw(state)
    if u < knobs[COLD]:
        fresh[0] += 1
        return FRESH + fresh[0], np.int64(-1)
    u -= knobs[COLD]
    back = np.int64(0)
    if u < knobs[SESSION]:
        if said > document_first:
            back = _power_law(_draw(state), knobs[SESSION_EXPONENT], said - document_first)
    elif u < knobs[SESSION] + knobs[RECENT] and said > 0:
        back = _power_law(_draw(state), knobs[RECENT_EXPONENT], said)
    if back:
        return past[said - back], said - back
    return _of_population(state, knobs, tokens), np.int64(-1)


@simulator
def _token_of(phrase, place, knobs, vocabulary):
    u = _unit_hash(phrase, TOKEN_SALT + place)
    if place == 0:
        return FIRST_TOKEN + _power_law(u, knobs[OPENER_EXPONENT], min(knobs[OPENERS], vocabulary)) - 1
    return FIRST_TOKEN + np.int64(u * vocabulary)


@simulator
def write_phrases(knobs, lengths, seed, vocabulary, ids, past):
    """Write tokens to `ids` uint32 [sum of lengths], document by document; `lengths` int64 [documents].

    `knobs` float64 [KNOBS] as numbered above. Ids are FIRST_TOKEN and the `vocabulary` - 1 behind it. `past`
    int64 [tokens] takes the phrases; returns how many there are.
    """
    state, fresh = np.empty(1, np.uint64), np.zeros(1, np.int64)
    state[0] = mix(np.int64(seed), np.int64(1)) | np.uint64(1)
    go_on = 1.0 - 1.0 / knobs[PHRASE_TOKENS]
    at = said = np.int64(0)
    for length in lengths:
        source, document_first, end = np.int64(-1), said, at + length
        while at < end:
            phrase, source = _next_phrase(state, knobs, past, said, document_first, source, at, fresh)
            past[said] = phrase
            said += 1
            place = 0
            while at < end:
                ids[at] = _token_of(phrase, place, knobs, vocabulary)
                at += 1
                place += 1
                if _unit_hash(phrase, LENGTH_SALT + place) >= go_on:
                    break
    return said


@simulator
def pick_ngrams(ids, off, fold, orders, chunk, threshold, hashes, owners, lookups):
    """The n-grams of a trace whose hash lies in the sample, in look-ups of `chunk` tokens of a document.

    `fold` uint32 [vocabulary] maps tokens to what models hash. N-grams have 2 to `orders` + 1 tokens. Writes
    names `hashes`, `owners` (0 for bigrams) and numbers of look-ups, int64 as many as fit; returns how many.
    """
    count = lookup = np.int64(0)
    for d in range(off.size - 1):
        for t in range(off[d], off[d + 1]):
            lookup += (t - off[d]) % chunk == 0
            h = np.int64(fold[ids[t]])
            for order in range(orders):
                before = t - order - 1
                token = np.int64(fold[ids[before]]) if before >= off[d] else np.int64(-1)
                h = np.int64(mix(h, token) >> np.uint64(1))
                if h >> SAMPLE_SHIFT < threshold and count < hashes.size:
                    hashes[count], owners[count], lookups[count] = h, order, lookup
                    count += 1
    return count
