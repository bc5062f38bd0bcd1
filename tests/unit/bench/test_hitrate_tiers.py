"""Tiers one behind the other: who answers what, against the product's arenas and a ring in plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tierbench.hitrate.budget import BudgetRun, Disk
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import Mix
from tierbench.hitrate.model import Model
from tierbench.hitrate.tiers import Asked, Budgets, check_memory
from tierbench.policy.hbm import smallest_bytes

from engram_client.errors import BadRequest
from tests.unit.bench.test_hitrate import model_of, stream_of
from tierstore.kernels.distinct import find_distinct
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

TOKENS = 4_000
MIX = Mix(sessions=4, prefill_chunk=32, prompt_share=0.3)


@pytest.fixture(scope="module")
def v41() -> Model:
    return model_of("deepseek-v4.1")


def replayed(model: Model, budgets: Budgets, tokens: int = TOKENS) -> dict:
    stream = stream_of(tokens, MIX)
    run = BudgetRun(model, budgets, tokens, Disk(model, stream.batch_ends.size * len(model.tables), 1), 0)
    for lookups in lookups_of(model, stream, 700):
        run.take(lookups)
    return run.told()


class Ring:
    """The record extent: a bounded list of what was written, of which each record's last place counts.

    The service's index forgets a little more, the oldest first: some sets of it have more records than ways.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.next, self.place = slots, 0, dict[tuple[int, int], int]()

    def has(self, name: tuple[int, int], younger: int = 0) -> bool:
        return self.place.get(name, -2 * self.slots) >= self.next - self.slots + younger

    def offer(self, names: list[tuple[int, int]]) -> None:
        for name in [n for n in names if not self.has(n, self.slots // 2)]:
            self.place[name] = self.next
            self.next += 1


class Behind:
    """DRAM and the extent as the service has them: its own arena, which exchanges, and the ring."""

    def __init__(self, model: Model, budgets: Budgets) -> None:
        self.model = model
        self.arena = Arena(budgets.dram_bytes, model.record_bytes, Counters()) if budgets.dram_bytes else None
        extent = budgets.extent_geometry(model)
        self.ring = Ring(extent.slots) if extent else None
        self.counts = {"dram": 0, "extent": 0, "read": 0}

    def look_up(self, keys: np.ndarray, owners: np.ndarray) -> None:
        out = np.zeros((keys.size, self.model.record_bytes), np.uint8)
        misses = np.arange(keys.size)
        if self.arena:
            part = (0, self.model.record_bytes)
            misses, _ = self.arena.read(keys, int(owners[0]), self.model.orders, part, out.ctypes.data)
        self.counts["dram"] += keys.size - misses.size
        first, inverse = np.empty(misses.size, np.int64), np.empty(misses.size, np.int64)
        places = np.full(4 << int(misses.size).bit_length(), -1, np.int64)
        wanted, theirs = keys[misses], owners[misses]
        first = first[: find_distinct(wanted, theirs, places, first, inverse)]
        wanted, theirs = wanted[first].copy(), theirs[first].copy()
        names = list(zip(wanted.tolist(), theirs.tolist(), strict=True))
        kept = sum(self.ring.has(name) for name in names) if self.ring else 0
        self.counts["extent"] += kept
        self.counts["read"] += len(names) - kept
        if self.arena:
            exchange = np.arange(wanted.size)
            self.arena.exchange(wanted, theirs, out.ctypes.data, exchange, wanted_soon=False)
        if self.ring:
            left = zip(wanted.tolist(), theirs.tolist(), strict=True)
            self.ring.offer([name for name in left if name[0] >= 0])


def sets_of(model: Model, sets: int) -> int:
    return sets * (64 + 16 + 16 * (model.record_bytes + 16))


@pytest.mark.parametrize("dram_sets", [0, 40])
def test_dram_and_the_extent_answer_what_the_services_do(v41: Model, dram_sets: int) -> None:
    budgets = Budgets(dram_bytes=sets_of(v41, dram_sets), extent_bytes=4 << 20)
    told, product = replayed(v41, budgets), Behind(v41, budgets)
    stream = stream_of(TOKENS, MIX)
    for lookups in lookups_of(v41, stream):
        for start, end in pairwise([0, *lookups.ends.tolist()]):
            product.look_up(lookups.keys[start:end].copy(), lookups.owners[start:end].copy())
    if product.arena:
        product.arena.close()
    accesses = TOKENS * v41.entries_per_token
    assert product.counts["extent"] > 0.03 * accesses, "the case tests nothing"
    assert told["hit_rate_by_tier"]["dram"] == product.counts["dram"] / accesses
    kept, read = (product.counts[name] / accesses for name in ("extent", "read"))
    assert kept - 0.005 < told["hit_rate_by_tier"]["extent"] <= kept
    assert told["records_read_per_access"] - read == pytest.approx(kept - told["hit_rate_by_tier"]["extent"])
    assert told["page_reads_per_token"]["mean"] > 0


def test_a_tier_before_another_leaves_it_what_it_misses(v41: Model) -> None:
    """What HBM answers does not depend on what is behind it, and the rest goes on, each record once."""
    hbm, dram = smallest_bytes(v41.record_bytes) * 20, sets_of(v41, 40)
    alone, both = (replayed(v41, Budgets(hbm_bytes=hbm, dram_bytes=d)) for d in (0, dram))
    behind = replayed(v41, Budgets(dram_bytes=dram))
    assert alone["tiers"]["hbm"] == both["tiers"]["hbm"]
    assert 0.1 < alone["hit_rate"] < both["hit_rate"]
    assert both["hit_rate_by_tier"]["dram"] < behind["hit_rate_by_tier"]["dram"]
    assert both["hit_rate"] == pytest.approx(sum(both["hit_rate_by_tier"][t] for t in ("hbm", "dram")))
    assert both["tiers"]["dram"]["hit_rate_of_what_reached_it"] == pytest.approx(
        both["hit_rate_by_tier"]["dram"] / (1 - both["hit_rate_by_tier"]["hbm"])
    )
    assert sum(both["hit_rate_by_tier"].values()) == pytest.approx(1)
    huge = replayed(v41, Budgets(hbm_bytes=1 << 40, dram_bytes=dram))
    assert huge["hit_rate_by_tier"]["dram"] == 0, "what HBM never drops is asked for once"


def test_the_warm_up_adds_up(v41: Model) -> None:
    told = replayed(v41, Budgets(hbm_bytes=1 << 20, dram_bytes=1 << 21))
    warm = told["warm_up"]
    sizes = np.diff([0, *warm["tokens_until"]])
    assert warm["tokens_until"][-1] == TOKENS
    assert np.average(warm["hit_rate"], weights=sizes) == pytest.approx(told["hit_rate"])
    for tier in ("hbm", "dram", "extent"):
        mean = np.average(warm["hit_rate_by_tier"][tier], weights=sizes)
        assert mean == pytest.approx(told["hit_rate_by_tier"][tier])
    few = replayed(v41, Budgets(dram_bytes=1 << 20), tokens=12)["warm_up"]
    assert few["tokens_until"] == list(range(1, 13))


def test_rows_are_entries_where_a_table_is_addressed_by_them() -> None:
    """48 rows a token, of one owner a table; a record's rows come and go together, so hit rates are near."""
    records, rows = model_of("deepseek-v4.1", 30_000), model_of("deepseek-v4.1", 30_000)
    rows = Model(rows.name, rows.tables, rows.mapping, by_rows=True)
    assert (rows.entries_per_token, rows.record_bytes) == (48, 264)
    budgets = Budgets(dram_bytes=3 << 20)
    by_record, by_row = replayed(records, budgets), replayed(rows, budgets)
    assert by_row["capacity_records"] > 7 * by_record["capacity_records"]
    assert by_row["hit_rate"] == pytest.approx(by_record["hit_rate"], abs=0.05)
    assert by_row["missed_records_per_token"]["max"] == 48
    assert set(by_row["hit_rate_by_order"]) == {"2", "3", "4"}
    for lookups in lookups_of(rows, stream_of(200, MIX)):
        keys = lookups.keys.reshape(-1, 24)
        offsets = np.array(rows.tables[0].scheme.head_offsets).ravel()
        sizes = np.array(rows.tables[0].scheme.head_sizes).ravel()
        assert ((offsets <= keys[0]) & (keys[0] < offsets + sizes)).all()
        assert set(lookups.owners.tolist()) == {1 << 8, 2 << 8}


class TestBudgets:
    def test_too_small_for_a_tier(self, v41: Model) -> None:
        for budgets in (Budgets(hbm_bytes=1000), Budgets(dram_bytes=1000), Budgets(extent_bytes=1000)):
            with pytest.raises(BadRequest, match="give"):
                budgets.check(v41)
        Budgets(smallest_bytes(v41.record_bytes), sets_of(v41, 1), 1 << 20).check(v41)

    def test_an_extent_that_gains_nothing(self, v41: Model) -> None:
        rows = Model(v41.name, v41.tables, v41.mapping, by_rows=True)
        with pytest.raises(BadRequest, match="keeps no extent"):
            Budgets(extent_bytes=1 << 30).check(rows)

    def test_shares_are_of_all_tables(self, v41: Model) -> None:
        assert Asked(share=0.5).bytes_of(v41) == v41.table_bytes // 2
        assert Asked(size_bytes=7).bytes_of(v41) == 7

    def test_what_is_odd_is_told(self, v41: Model) -> None:
        assert Budgets(dram_bytes=1 << 20).notes(v41) == []
        [note] = Budgets(dram_bytes=2 * v41.table_bytes).notes(v41)
        assert "more than all rows" in note
        [note] = Budgets().notes(v41)
        assert "no memory at all" in note

    def test_more_than_there_is_memory_to_replay(self, v41: Model) -> None:
        check_memory(v41, [Budgets(dram_bytes=1 << 30)], 1000)
        with pytest.raises(BadRequest, match="fewer or smaller budgets"):
            check_memory(v41, [Budgets(dram_bytes=1 << 50)] * 3, 10**12)
