"""From a model's published hash parameters to a `HashScheme` with every number resolved.

Two families are known. Both multiply the last tokens by odd 63-bit constants and XOR the
products; they differ in how the constants are drawn, which primes size the heads, and what
stands in for tokens that are not there.

    engram   constants from numpy's default generator, seeded per layer; one set of used primes
             over all layers, the search restarting for every order (Engram demo, DeepSeek-V4.1)
    ple      constants from splitmix64; primes rising over all heads (Qwen PLE)

No product overflows: the constants are bounded so that (vocab_size - 1) * multiplier < 2^63, so
the XOR of products, the n-gram key, is a non-negative 63-bit number. `check_scheme` holds
schemes that come from elsewhere (a checkpoint's own buffers, a service) to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from numbers import Integral

import numpy as np

from engram_client.errors import BadRequest, FormatError
from engram_client.hashing.primes import primes_from
from engram_client.spec import HashScheme

INT64_MAX = 2**63 - 1
MASK64 = 2**64 - 1
LAYER_STRIDE = 10007  # what one layer adds to the seed, in both families
GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment


def engram_schemes(
    *,
    compressed_vocab_size: int,
    layer_ids: Sequence[int],
    vocab_size_per_ngram: Sequence[int],
    n_head_per_ngram: int,
    max_ngram_size: int,
    pad_id: int,
    seed: int,
    vocabulary_digest: str | None = None,
) -> tuple[HashScheme, ...]:
    """One scheme per layer by the Engram demo's rule, which V4.1 shares.

    `vocab_size_per_ngram` holds, per order 2..max_ngram_size, where the prime search starts;
    `pad_id` is a raw token id. No tokenizer is needed, only the size of its compressed
    vocabulary. Raises BadRequest for lengths that do not fit or duplicate layers, FormatError
    for numbers that cannot be hashed with.
    """
    _check_shape(layer_ids, vocab_size_per_ngram, n_head_per_ngram, max_ngram_size)
    _check_vocab_size(compressed_vocab_size)
    if pad_id < 0:
        raise BadRequest(f"pad_id must be a raw token id >= 0, got {pad_id}")
    parameters = {
        "layer_ids": [int(layer) for layer in layer_ids],
        "vocab_size_per_ngram": [int(size) for size in vocab_size_per_ngram],
        "n_head_per_ngram": n_head_per_ngram,
        "max_ngram_size": max_ngram_size,
        "pad_id": pad_id,
        "seed": seed,
    }
    taken: set[int] = set()
    schemes = []
    for layer_id in map(int, layer_ids):
        sizes = tuple(_unused_primes(start, n_head_per_ngram, taken) for start in vocab_size_per_ngram)
        scheme = HashScheme(
            kind="engram",
            layer_id=layer_id,
            multipliers=_engram_multipliers(seed, layer_id, max_ngram_size, compressed_vocab_size),
            head_sizes=sizes,
            head_offsets=head_offsets(sizes),
            vocab_size=compressed_vocab_size,
            pad_id=pad_id,
            vocabulary_digest=vocabulary_digest,
            parameters=parameters,
        )
        check_scheme(scheme)
        schemes.append(scheme)
    return tuple(schemes)


def ple_scheme(
    *,
    vocab_size: int,
    eos_token_id: int,
    ngram_size: int,
    heads_per_ngram: int,
    ngram_vocab_base: int,
    seed: int,
    layer_index: int,
) -> HashScheme:
    """The scheme of a Qwen PLE table; raw token ids are hashed. Raises BadRequest."""
    _check_shape([layer_index], [ngram_vocab_base] * (ngram_size - 1), heads_per_ngram, ngram_size)
    _check_vocab_size(vocab_size)
    primes = list(islice(primes_from(ngram_vocab_base), heads_per_ngram * (ngram_size - 1)))
    sizes = tuple(tuple(primes[i : i + heads_per_ngram]) for i in range(0, len(primes), heads_per_ngram))
    scheme = HashScheme(
        kind="ple",
        layer_id=layer_index,
        multipliers=_ple_multipliers(seed, layer_index, ngram_size, vocab_size),
        head_sizes=sizes,
        head_offsets=head_offsets(sizes),
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        parameters={
            "vocab_size": vocab_size,
            "eos_token_id": eos_token_id,
            "ngram_size": ngram_size,
            "heads_per_ngram": heads_per_ngram,
            "ngram_vocab_base": ngram_vocab_base,
            "seed": seed,
            "layer_index": layer_index,
        },
    )
    check_scheme(scheme)
    return scheme


def head_offsets(head_sizes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """First row of each head when heads lie one after another, order by order."""
    starts = iter([0, *accumulate(size for sizes in head_sizes for size in sizes)])
    return tuple(tuple(next(starts) for _ in sizes) for sizes in head_sizes)


def check_scheme(scheme: HashScheme) -> None:
    """Raise FormatError where a scheme cannot be hashed with: ragged, overflowing, incomplete."""
    where = f"hash scheme of layer {scheme.layer_id}"
    _check_types(scheme, where)
    lengths = {len(row) for rows in (scheme.head_sizes, scheme.head_offsets) for row in rows}
    same_orders = len(scheme.head_sizes) == len(scheme.head_offsets) == len(scheme.multipliers) - 1
    if not scheme.head_sizes or not same_orders or len(lengths) != 1 or 0 in lengths:
        raise FormatError(
            f"{where}: {len(scheme.multipliers)} multipliers need {len(scheme.multipliers) - 1} orders of "
            f"equally many heads; got {len(scheme.head_sizes)} orders of sizes and "
            f"{len(scheme.head_offsets)} of offsets with {sorted(lengths)} heads"
        )
    if min(map(min, scheme.head_sizes)) < 1 or min(map(min, scheme.head_offsets)) < 0:
        raise FormatError(f"{where}: head sizes must be >= 1 and head offsets >= 0")
    largest = max(scheme.multipliers) * (scheme.vocab_size - 1)
    if min(scheme.multipliers) < 0 or scheme.vocab_size < 1 or largest > INT64_MAX:
        raise FormatError(
            f"{where}: multipliers {scheme.multipliers} with a vocabulary of {scheme.vocab_size} do not give "
            "non-negative 63-bit n-gram keys; are they of another vocabulary?"
        )
    _check_filler(scheme, where)


def _check_types(scheme: HashScheme, where: str) -> None:
    """A scheme read from a file may hold anything; numpy would cut 3.5 to 3 without a word."""
    if scheme.kind not in ("engram", "ple"):
        raise FormatError(f"{where}: kind must be engram or ple, got {scheme.kind!r}")
    numbers = {
        "layer_id": (scheme.layer_id,),
        "multipliers": scheme.multipliers,
        "head_sizes": [size for sizes in scheme.head_sizes for size in sizes],
        "head_offsets": [offset for offsets in scheme.head_offsets for offset in offsets],
        "vocab_size": (scheme.vocab_size,),
        "pad_id": () if scheme.pad_id is None else (scheme.pad_id,),
        "eos_token_id": () if scheme.eos_token_id is None else (scheme.eos_token_id,),
    }
    for name, values in numbers.items():
        if wrong := [v for v in values if not isinstance(v, Integral) or isinstance(v, bool)]:
            raise FormatError(f"{where}: {name} must hold integers, got {wrong[0]!r}")
    if not isinstance(scheme.vocabulary_digest, str | None) or not isinstance(scheme.parameters, dict):
        raise FormatError(f"{where}: vocabulary_digest must be text and parameters a table")


def _check_filler(scheme: HashScheme, where: str) -> None:
    """The id that stands in for absent tokens must be there."""
    if scheme.kind == "engram":
        if scheme.pad_id is None or scheme.pad_id < 0:
            raise FormatError(f"{where}: an engram scheme needs a pad_id >= 0, got {scheme.pad_id}")
    elif scheme.eos_token_id is None or not 0 <= scheme.eos_token_id < scheme.vocab_size:
        raise FormatError(
            f"{where}: eos_token_id must be 0..{scheme.vocab_size - 1}, got {scheme.eos_token_id}"
        )


def _check_shape(layers: Sequence[int], starts: Sequence[int], heads: int, max_ngram: int) -> None:
    if max_ngram < 2 or heads < 1 or not layers:
        raise BadRequest(
            "need max n-gram size >= 2, heads >= 1 and a layer; "
            f"got {max_ngram}, {heads}, layers {list(layers)}"
        )
    if len(starts) != max_ngram - 1 or min(starts) < 1:
        raise BadRequest(
            f"vocab_size_per_ngram needs one size >= 1 for each order 2..{max_ngram}, got {list(starts)}"
        )
    if len(set(layers)) != len(layers) or min(layers) < 0:
        raise BadRequest(f"layer ids must be distinct and >= 0, got {list(layers)}")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < 1:
        raise BadRequest(f"the vocabulary must hold at least one token, got {vocab_size}")


def _unused_primes(start: int, count: int, taken: set[int]) -> tuple[int, ...]:
    """The first `count` primes >= start that no head has yet; they are taken from now on."""
    found = tuple(islice((p for p in primes_from(start) if p not in taken), count))
    taken.update(found)
    return found


def _half_bound(vocab_size: int) -> int:
    return max(1, (INT64_MAX // vocab_size) // 2)


def _engram_multipliers(seed: int, layer_id: int, count: int, vocab_size: int) -> tuple[int, ...]:
    if seed + LAYER_STRIDE * layer_id < 0:
        raise BadRequest(f"seed must be >= 0, got {seed}")
    generator = np.random.default_rng(seed + LAYER_STRIDE * layer_id)
    drawn = generator.integers(0, _half_bound(vocab_size), size=count, dtype=np.int64)
    return tuple(2 * int(number) + 1 for number in drawn)


def _ple_multipliers(seed: int, layer_index: int, count: int, vocab_size: int) -> tuple[int, ...]:
    base = seed + LAYER_STRIDE * layer_index
    return tuple(
        2 * (splitmix64(base + GOLDEN_GAMMA * (position + 1)) % _half_bound(vocab_size)) + 1
        for position in range(count)
    )


def splitmix64(state: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood, 2014): advance the state, scramble it."""
    state = (state + GOLDEN_GAMMA) & MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)
