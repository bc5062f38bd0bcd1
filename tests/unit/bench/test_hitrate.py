"""The parts of `tierbench hitrate` against plain models: keys, batches, the arena itself, pages, samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tierbench.hitrate.budget import BudgetRun, Disk
from tierbench.hitrate.curve import POINTS, miss_ratio_curve
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import PREFIX_BLOCK_TOKENS, Mix, TokenStream, token_stream
from tierbench.hitrate.model import Model, ModelTable
from tierbench.hitrate.sample import RowSample, Sample
from tierbench.hitrate.tiers import Budgets
from tierbench.models import ROW_BYTES, Size, table_schemes
from tierbench.policy.bounds import belady
from tierbench.policy.classical import lru, sieve

from engram_client import NgramHashMapping
from engram_client.errors import BadRequest
from engram_client.hashing import row_ids_from_keys
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.distinct import find_distinct
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

VOCABULARY = 600
ROWS = 3_000  # a head


def model_of(name: str, rows: int = ROWS) -> Model:
    """A small one: of V4.1's shape or of PLE's."""
    size = Size(rows, compressed_vocab_size=VOCABULARY)
    schemes = table_schemes(name, size)
    tables = [ModelTable(f"layer{s.layer_id}", s, ROW_BYTES[name], s.rows) for s in schemes]
    folded = None if name == "qwen-ple" else np.arange(VOCABULARY)
    return Model(name, tuple(tables), NgramHashMapping.from_schemes(schemes, folded))


@pytest.fixture(scope="module")
def v41() -> Model:
    return model_of("deepseek-v4.1")


def text(tokens: int, documents: int, seed: int = 0, exponent: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Phrases that come again, some often; a trace."""
    random = np.random.default_rng(seed)
    phrases = [random.integers(3, VOCABULARY, random.integers(2, 12)) for _ in range(tokens // 12)]
    chosen = np.minimum(random.pareto(exponent, tokens // 4) * 3, 1e12).astype(np.int64) % len(phrases)
    ids = np.concatenate([phrases[i] for i in chosen])[:tokens].astype(np.uint32)
    cuts = np.sort(random.integers(0, ids.size, documents - 1))
    return ids, np.concatenate([[0], cuts, [ids.size]]).astype(np.int64)


def stream_of(tokens: int, mix: Mix | None = None) -> TokenStream:
    return token_stream(*text(tokens, 12), mix or Mix())


class TestMix:
    def test_prompts_come_in_chunks_and_answers_in_steps(self) -> None:
        """Three documents of 7, 0 and 4 tokens, four sevenths of each a prompt, two sessions, chunks of 3."""
        off = np.array([0, 7, 7, 11])
        mix = Mix(sessions=2, prefill_chunk=3, step=2, prompt_share=4 / 7)
        stream = token_stream(np.arange(11, dtype=np.uint32), off, mix)
        batches = [part.tolist() for part in np.split(stream.positions, stream.batch_ends[:-1])]
        assert batches == [[0, 1, 2, 7, 8, 9], [3, 10], [4, 5], [6]]

    def test_a_session_takes_the_next_document_when_it_is_free(self) -> None:
        off = np.array([0, 3, 3, 8, 10])
        stream = token_stream(np.arange(10, dtype=np.uint32), off, Mix(sessions=2, prompt_share=0))
        assert stream.positions.tolist() == [0, 3, 1, 4, 2, 5, 6, 8, 7, 9]

    def test_shuffling_loses_nothing_and_follows_the_seed(self) -> None:
        one, same, other = (stream_of(500, Mix(order="shuffled", seed=s)).positions for s in (1, 1, 2))
        assert sorted(one.tolist()) == list(range(500))
        assert (one == same).all()
        assert (one != other).any()

    def test_large_batches_are_split(self) -> None:
        off = np.array([0, 25, 32])
        stream = token_stream(np.arange(32, dtype=np.uint32), off, Mix(prefill_chunk=20), batch_tokens_max=8)
        assert stream.batch_ends.tolist() == [8, 16, 20, 25, 32]

    def test_a_prefix_cache_keeps_whole_blocks_of_prompts_away(self) -> None:
        block = np.arange(PREFIX_BLOCK_TOKENS, dtype=np.uint32)
        first = np.concatenate([block, block + 100, [7, 8]])
        other = np.concatenate([block, block + 200, [7, 8]])
        documents = [first, first, other, first[: 2 * PREFIX_BLOCK_TOKENS], block + 100]
        off = np.concatenate([[0], np.cumsum([d.size for d in documents])])
        stream = token_stream(np.concatenate(documents).astype(np.uint32), off, Mix(prefix_cache=True))
        looked_up = Counter(np.searchsorted(off, stream.positions, "right") - 1)
        assert [looked_up[d] for d in range(5)] == [34, 2, 18, 16, 16]


@pytest.mark.parametrize("name", ["deepseek-v4.1", "qwen-ple"])
@pytest.mark.parametrize("stretch", [1, 100, 1 << 20])
def test_keys_are_those_of_whole_documents(name: str, stretch: int) -> None:
    """Whatever the mix and however the stream is cut, each token has its own document's n-grams."""
    model = model_of(name)
    ids, off = text(900, 9)
    if name == "qwen-ple":
        ids[50:700:97] = model.tables[0].scheme.eos_token_id  # n-grams do not cross these either
    mix = Mix(order="shuffled", sessions=3, prefill_chunk=40, step=2, prompt_share=0.5)
    stream = token_stream(ids, off, mix)
    expected = np.stack(
        [
            np.concatenate([model.mapping.ngram_keys(ids[a:b], t.scheme.layer_id) for a, b in pairwise(off)])
            for t in model.tables
        ]
    )
    batch = 0
    for lookups in lookups_of(model, stream, stretch):
        start = 0
        for number, end in enumerate(lookups.ends.tolist()):
            layer = number % len(model.tables)
            at = stream.batch_ends[batch - 1] if batch else 0
            positions = stream.positions[at : stream.batch_ends[batch]]
            keys = lookups.keys[start:end].reshape(-1, model.orders)
            assert (keys == expected[layer, positions]).all()
            owners = lookups.owners[start:end].reshape(-1, model.orders)
            assert (owners == model.first_owners[layer] + np.arange(model.orders)).all()
            assert lookups.first_token + lookups.first_tokens[number] == at
            batch += layer == len(model.tables) - 1
            start = end
    assert batch == stream.batch_ends.size


def arena_misses(model: Model, stream: TokenStream, budget_bytes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each look-up the entries that the product's arena does not find, and those it reads records for."""
    arena = Arena(budget_bytes, model.record_bytes, Counters())
    found = []
    for lookups in lookups_of(model, stream):
        for number, keys in enumerate(np.split(lookups.keys, lookups.ends[:-1])):
            owner = int(model.first_owners[number % len(model.tables)])
            out = np.empty((keys.size, model.record_bytes), np.uint8)
            keys = keys.copy()
            misses, _ = arena.read(keys, owner, model.orders, (0, model.record_bytes), out.ctypes.data)
            wanted, owners = keys[misses], owner + misses % model.orders
            first, inverse = np.empty(wanted.size, np.int64), np.empty(wanted.size, np.int64)
            places = np.full(4 << int(wanted.size).bit_length(), -1, np.int64)
            first = first[: find_distinct(wanted, owners, places, first, inverse)]
            read = misses[first]
            arena.admit(keys[read], owners[first], out.ctypes.data, np.arange(read.size), wanted_soon=False)
            found.append((misses, read))
    arena.close()
    return found


@pytest.mark.parametrize("sets", [3, 100])
@pytest.mark.parametrize(
    "mix", [Mix(), Mix(sessions=4, prefill_chunk=32, prompt_share=0.3)], ids=["one", "four"]
)
def test_a_budget_hits_exactly_where_the_arena_does(v41: Model, sets: int, mix: Mix) -> None:
    """100 sets have a duel, 3 have none. Pages are counted by sets of them, look-up by look-up."""
    budget_bytes = sets * (64 + 16 + 16 * (v41.record_bytes + 16))
    stream = stream_of(4_000, mix)
    told, disk, _ = replayed(v41, stream, budget_bytes)
    misses = arena_misses(v41, stream, budget_bytes)
    missed, pages = np.zeros(stream.tokens, int), 0
    rows: set[tuple[int, int]] = set()
    all_pages: set[tuple[int, int]] = set()
    start = lookup = 0
    for end in stream.batch_ends.tolist():
        for layer, table in enumerate(v41.tables):
            entries, read = misses[lookup]
            np.add.at(missed, start + entries // v41.orders, 1)
            of_lookup = {(layer, int(r)) for r in rows_read(v41, stream, start, end, layer, read)}
            rows |= of_lookup
            per_page = v41.geometry(table).rows_per_page
            pages += len({r // per_page for _, r in of_lookup})
            all_pages |= {(layer, r // per_page) for _, r in of_lookup}
            lookup += 1
        start = end
    accesses = stream.tokens * v41.entries_per_token
    assert told["capacity_records"] == 16 * sets
    assert told["hit_rate"] == pytest.approx(1 - missed.sum() / accesses)
    assert told["missed_records_per_token"]["mean"] == pytest.approx(missed.mean())
    assert told["missed_records_per_token"]["max"] == missed.max()
    assert told["missed_records_per_token"]["p90"] == np.quantile(missed, 0.9, method="inverted_cdf")
    assert told["records_read_per_access"] == pytest.approx(sum(r.size for _, r in misses) / accesses)
    assert told["page_reads_per_token"]["mean"] == pytest.approx(pages / stream.tokens)
    assert told["disk_bytes_per_token"] == pytest.approx(PAGE_BYTES * pages / stream.tokens)
    assert (disk.distinct_rows, disk.distinct_pages) == (len(rows), len(all_pages))


def rows_read(
    model: Model, stream: TokenStream, start: int, end: int, layer: int, read: np.ndarray
) -> np.ndarray:
    part = replace(stream, positions=stream.positions[start:end], batch_ends=np.array([end - start]))
    [lookups] = lookups_of(model, part)
    size = lookups.keys.size // len(model.tables)
    keys = lookups.keys[layer * size : (layer + 1) * size].reshape(-1, model.orders)
    rows = row_ids_from_keys(model.tables[layer].scheme, keys)
    return rows.reshape(-1, model.heads)[read].ravel()


def replayed(model: Model, stream: TokenStream, *budgets: int) -> tuple[dict, Disk, list[dict]]:
    disk = Disk(model, stream.batch_ends.size * len(model.tables), len(budgets))
    runs = [BudgetRun(model, Budgets(dram_bytes=b), stream.tokens, disk, i) for i, b in enumerate(budgets)]
    for lookups in lookups_of(model, stream, 700):
        for run in runs:
            run.take(lookups)
    told = [run.told() for run in runs]
    return told[0], disk, told


def test_budgets_do_not_disturb_each_other(v41: Model) -> None:
    stream = stream_of(3_000)
    alone = [replayed(v41, stream, b)[0] for b in (1 << 19, 1 << 22)]
    _, disk, together = replayed(v41, stream, 1 << 19, 1 << 22)
    _, disk_alone, _ = replayed(v41, stream, 1 << 22)
    for one, other in zip(alone, together, strict=True):
        assert {k: v for k, v in one.items() if k != "simulation"} == {
            k: v for k, v in other.items() if k != "simulation"
        }
    assert (disk.distinct_rows, disk.distinct_pages) == (disk_alone.distinct_rows, disk_alone.distinct_pages)


def test_no_budget_reads_everything_and_a_huge_one_what_is_new(v41: Model) -> None:
    stream = stream_of(3_000)
    _, _, (none, huge) = replayed(v41, stream, 0, 1 << 45)
    assert (none["hit_rate"], none["records_read_per_access"]) == (0, 1)
    assert none["hit_rate_by_tenth"] == [0] * 10
    sample = Sample(1.0)
    for lookups in lookups_of(v41, stream):
        sample.take(lookups)
    accesses = stream.tokens * v41.entries_per_token
    assert huge["records_read_per_access"] == pytest.approx(sample.trace.distinct / accesses)
    assert huge["share_of_tables"] > 1


def sampled(model: Model, stream: TokenStream, rate: float) -> Sample:
    sample = Sample(rate)
    for lookups in lookups_of(model, stream):
        sample.take(lookups)
    return sample


def test_a_sample_of_everything_is_exact(v41: Model) -> None:
    """One token a look-up, so that an access is one of a plain trace but for repeats within the look-up."""
    stream = stream_of(3_000, Mix(prefill_chunk=1))
    trace = sampled(v41, stream, 1.0).trace
    [lookups] = lookups_of(v41, stream, 1 << 20)
    pairs = list(zip(lookups.keys.tolist(), lookups.owners.tolist(), strict=True))
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    ids = np.array([numbers[pair] for pair in pairs], np.int32)
    assert trace.distinct == len(numbers)
    for simulate in (lru, sieve, belady):
        found = np.zeros(ids.size, np.uint8)
        simulate(ids, len(numbers), 700, found)
        assert trace.numbered(simulate, 700).hit_rate == pytest.approx(found.mean())
    budget = 1 << 21
    product = trace.product(v41.capacity_records(budget))
    assert product.hit_rate == pytest.approx(replayed(v41, stream, budget)[0]["hit_rate"])
    assert product.error == 0


def test_one_pass_tells_lru_of_every_size(v41: Model) -> None:
    trace = sampled(v41, stream_of(3_000), 1.0).trace
    for capacity in (1, 16, 300, 2_000, 10**6):
        assert trace.lru(capacity) == trace.numbered(lru, capacity)
    assert trace.lru(0).hit_rate == trace.product(0).hit_rate == 0


def test_a_policy_counts_repeats_of_a_look_up_as_the_service_does(v41: Model) -> None:
    """A record that is new in a look-up and wanted twice there is two misses and one read."""
    ids = np.array([5, 6, 7, 5, 6, 7, 5, 6, 7], np.uint32)
    stream = token_stream(ids, np.array([0, 9]), Mix())
    trace = sampled(v41, stream, 1.0).trace
    assert trace.lru(10**6).hit_rate == 0
    assert trace.lru(10**6).reads_per_access == trace.distinct / (9 * 6)


def test_one_record_in_a_hundred_tells_the_curve_within_a_point() -> None:
    """A million tokens are 6 M accesses, 60,000 of them sampled: a standard error of a few tenths."""
    v41 = model_of("deepseek-v4.1", 400_000)
    ids, off = text(1_000_000, 40, seed=3, exponent=0.4)
    stream = token_stream(ids, off, Mix())
    whole = sampled(v41, stream, 1.0).trace
    part = sampled(v41, stream, 0.01).trace
    assert part.sampled_distinct < whole.distinct / 50
    assert part.distinct == pytest.approx(whole.distinct, rel=0.05)
    curve = miss_ratio_curve(v41, part, None, lambda count: None)
    assert len(curve["points"]) == POINTS
    for point in curve["points"][::5]:
        capacity = v41.capacity_records(point["dram_bytes"])
        exact = {
            "tierstore": whole.product(capacity),
            "lru": whole.lru(capacity),
            "clairvoyant": whole.numbered(belady, capacity),
        }
        for name, estimate in exact.items():
            off_by = abs(point[name]["hit_rate"] - estimate.hit_rate)
            assert off_by <= 0.01, (name, point, estimate)
            assert off_by <= 4 * point[name]["error"]
    rates = [p["tierstore"]["hit_rate"] for p in curve["points"]]
    assert rates[-1] > rates[0] + 0.04


def test_a_sample_too_small_for_a_curve_is_told(v41: Model) -> None:
    stream = stream_of(2_000)
    with pytest.raises(BadRequest, match=r"give 1\.1 times as much text"):
        miss_ratio_curve(v41, sampled(v41, stream, 0.01).trace, None, lambda count: None)
    big = model_of("deepseek-v4.1", 400_000)
    with pytest.raises(BadRequest, match="take a larger --sample, 0"):
        miss_ratio_curve(big, sampled(big, stream_of(30_000), 0.05).trace, None, lambda count: None)


def test_single_rows_are_those_of_the_records(v41: Model) -> None:
    stream = stream_of(2_000)
    rows = RowSample(1.0, v41)
    for lookups in lookups_of(v41, stream):
        rows.take(lookups)
    expected = {
        (layer, int(row))
        for layer, table in enumerate(v41.tables)
        for lookups in lookups_of(v41, stream)
        for row in np.unique(all_rows(v41, lookups.keys, lookups.owners, layer, table))
    }
    assert rows.trace.distinct == len(expected)
    assert rows.accesses_there_were == stream.tokens * 48
    assert 0 < rows.trace.product(v41.capacity_records(1 << 21, rows=True)).hit_rate < 1


def all_rows(model: Model, keys: np.ndarray, owners: np.ndarray, layer: int, table: ModelTable) -> np.ndarray:
    mine = owners >> 8 == layer + 1
    return row_ids_from_keys(table.scheme, keys[mine].reshape(-1, model.orders))
