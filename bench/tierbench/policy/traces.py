"""Record traces: which records a model asks for, one after another.

A token of V4.1 asks for six records, one of each order in each of two layers. A look-up is a batch
of tokens of one layer, so the trace holds the records of 512 tokens in the first layer, then the
same tokens' in the second. Keys are those of the real geometry, 16 million rows a head; no table is
needed for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engram_client.hashing.mapping import NgramHashMapping
from engram_client.tokenizer import CompressedTokenizer
from tierbench.corpus import Ids, Offsets
from tierbench.policy.schedule import server_batches

ROWS_PER_HEAD, ORDERS, LAYERS, PAD_ID, SEED = 16_000_000, 3, (1, 14), 2, 0
BATCH_TOKENS = 512


@dataclass(frozen=True)
class RecordTrace:
    """`ids` int32 [n] numbers the records; `keys` int64 and `owners` int64 [distinct] name them."""

    name: str
    ids: np.ndarray
    keys: np.ndarray
    owners: np.ndarray

    @property
    def distinct(self) -> int:
        return self.keys.size


def v41_mapping(tokenizer: CompressedTokenizer) -> NgramHashMapping:
    """The hashing of DeepSeek-V4.1 at its real size."""
    return NgramHashMapping.engram(
        tokenizer,
        layer_ids=LAYERS,
        vocab_size_per_ngram=[ROWS_PER_HEAD] * ORDERS,
        n_head_per_ngram=8,
        max_ngram_size=ORDERS + 1,
        pad_id=PAD_ID,
        seed=SEED,
    )


def documents(ids: Ids, off: Offsets) -> list[Ids]:
    return [ids[a:b] for a, b in pairwise(off)]


def _layer_keys(mapping: NgramHashMapping, layer: int, sequences: list[Ids]) -> np.ndarray:
    """int64 [tokens, orders], the sequences one after another; n-grams do not cross them."""
    found = [mapping.ngram_keys(np.ascontiguousarray(s), layer) for s in sequences if len(s)]
    return np.concatenate(found)


def text_trace(
    name: str, mapping: NgramHashMapping, sequences: list[Ids], *, sessions: int = 1
) -> RecordTrace:
    """The records that these documents ask for, read one by one or in `sessions` side by side."""
    keys = [_layer_keys(mapping, layer, sequences) for layer in LAYERS]
    if sessions > 1:
        lengths = np.array([len(s) for s in sequences], np.int64)
        starts = np.cumsum(lengths) - lengths
        order, _ = server_batches(starts, np.zeros_like(lengths), lengths, sessions=sessions, chunk=1, step=1)
        keys = [k[order] for k in keys]
    both = np.stack(keys)  # [layers, tokens, orders]
    owners = np.arange(1, len(LAYERS) + 1)[:, None, None] << 8 | np.arange(ORDERS)
    batches = range(0, both.shape[1], BATCH_TOKENS)
    flat = np.concatenate([both[:, b : b + BATCH_TOKENS].reshape(-1) for b in batches])
    owner = np.concatenate(
        [np.broadcast_to(owners, both[:, b : b + BATCH_TOKENS].shape).reshape(-1) for b in batches]
    )
    return numbered(name, flat, owner)


def numbered(name: str, keys: np.ndarray, owners: np.ndarray) -> RecordTrace:
    """A trace of records given by key and owner. Keys of different owners are taken to differ."""
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return RecordTrace(name, inverse.reshape(-1).astype(np.int32), distinct, owners[first])


def zipf_trace(
    name: str, exponent: float, length: int, population: int, *, seed: int, phases: int = 1
) -> RecordTrace:
    """Independent draws by rank; with several phases, each has the same shape over other records.

    From one phase to the next a fifth of the ranks changes hands.
    """
    random = np.random.default_rng(seed)
    weights = np.cumsum(np.arange(1, population + 1, dtype=np.float64) ** -exponent)
    record_of_rank = random.permutation(population)
    parts = []
    for _ in range(phases):
        draws = random.random(length // phases) * weights[-1]
        parts.append(record_of_rank[np.searchsorted(weights, draws)])
        moved = random.choice(population, population // 5, replace=False)
        record_of_rank[moved] = record_of_rank[random.permutation(moved)]
    return _made_up(name, np.concatenate(parts), random)


def with_scans(name: str, trace: RecordTrace, *, every: int, burst: int, seed: int) -> RecordTrace:
    """After each `every` accesses, `burst` records that are asked for once and never again."""
    random = np.random.default_rng(seed)
    cuts = np.array_split(np.arange(trace.ids.size), max(1, trace.ids.size // every))
    parts, fresh = [], trace.distinct
    for cut in cuts:
        parts += [trace.ids[cut], np.arange(fresh, fresh + burst, dtype=np.int32)]
        fresh += burst
    new = fresh - trace.distinct
    keys = np.concatenate([trace.keys, random.integers(0, 2**63 - 1, new)])
    owners = np.concatenate([trace.owners, np.full(new, 1 << 8 | ORDERS - 1)])
    return RecordTrace(name, np.concatenate(parts).astype(np.int32), keys, owners)


def _made_up(name: str, records: np.ndarray, random: np.random.Generator) -> RecordTrace:
    used, ids = np.unique(records, return_inverse=True)
    keys = random.integers(0, 2**63 - 1, used.size)
    return RecordTrace(name, ids.reshape(-1).astype(np.int32), keys, np.full(used.size, 1 << 8))
