"""The simulators against plain Python models, the arena against its simulator, and the command."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from tierbench import cli
from tierbench.policy.bounds import belady
from tierbench.policy.classical import clock, lru, sieve
from tierbench.policy.product import DEMAND, Replay, hinted, tierstore
from tierbench.policy.s3fifo import s3_fifo
from tierbench.policy.sets import two_queues
from tierbench.policy.traces import RecordTrace, with_scans, zipf_trace
from tierbench.policy.wtinylfu import w_tinylfu

from tierstore.kernels.dueling import EAGER, NEUTRAL, PASSING_READS, PATIENT, STANCE, TRIAL_WAYS


@pytest.fixture(scope="module")
def trace() -> RecordTrace:
    return zipf_trace("zipf", 0.9, 20_000, 4_000, seed=1, phases=4)


def simulated(simulate: object, trace: RecordTrace, capacity: int) -> int:
    found = np.zeros(trace.ids.size, np.uint8)
    simulate(trace.ids, trace.distinct, capacity, found)  # type: ignore[operator]
    return int(found.sum())


def test_lru_is_an_ordered_dictionary(trace: RecordTrace) -> None:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for x in trace.ids.tolist():
        if x in cache:
            hits += 1
            cache.move_to_end(x)
        else:
            if len(cache) == 100:
                cache.popitem(last=False)
            cache[x] = None
    assert simulated(lru, trace, 100) == hits


def test_sieve_and_clock_are_lists_with_a_hand(trace: RecordTrace) -> None:
    for simulate, in_place in ((clock, True), (sieve, False)):
        ring: list[int] = []  # oldest first
        visited: set[int] = set()
        present: set[int] = set()
        hits = hand = 0
        for x in trace.ids.tolist():
            if x in present:
                hits += 1
                visited.add(x)
                continue
            if len(ring) < 100:
                ring.append(x)
            else:
                hand %= 100
                while ring[hand] in visited:
                    visited.discard(ring[hand])
                    hand = (hand + 1) % 100
                present.discard(ring[hand])
                if in_place:
                    ring[hand] = x
                    hand += 1
                else:
                    at_end = hand == 99
                    ring.pop(hand)
                    ring.append(x)
                    hand = 0 if at_end else hand
            present.add(x)
        assert simulated(simulate, trace, 100) == hits, simulate


def test_nothing_beats_the_clairvoyant(trace: RecordTrace) -> None:
    bound = simulated(belady, trace, 200)
    rates = {f.__name__: simulated(f, trace, 200) for f in (lru, clock, sieve, s3_fifo, w_tinylfu)}
    assert max(rates.values()) < bound
    assert min(rates["s3_fifo"], rates["w_tinylfu"]) > rates["lru"]  # as published, on skewed traces


def test_belady_finds_the_optimum_of_small_traces() -> None:
    """Against a search over every choice of what to keep."""
    random = np.random.default_rng(2)
    for _ in range(20):
        ids = random.integers(0, 5, 12).astype(np.int32)
        states: dict[frozenset[int], int] = {frozenset(): 0}
        for x in ids.tolist():
            following: dict[frozenset[int], int] = {}
            for cache, hits in states.items():
                every = cache | {x}
                choices = [cache] if x not in cache else []
                choices += [every] if len(every) <= 2 else [every - {y} for y in every]
                for choice in choices:
                    following[choice] = max(following.get(choice, 0), hits + (x in cache))
            states = following
        found = np.zeros(ids.size, np.uint8)
        belady(ids, 5, 2, found)
        assert found.sum() == max(states.values())


@pytest.mark.parametrize("capacity", [48, 320, 960])
@pytest.mark.parametrize("stance", [NEUTRAL, EAGER, PATIENT])
def test_the_arena_hits_exactly_where_its_simulator_does(
    trace: RecordTrace, capacity: int, stance: int
) -> None:
    """So few sets have no duel: all of them keep the stance they are given."""
    replay, model = Replay(capacity), np.zeros(trace.ids.size, np.uint8)
    replay.duel[STANCE] = stance
    hits = replay.play(trace.keys[trace.ids], trace.owners[trace.ids], DEMAND)
    choices = (TRIAL_WAYS[stance], PASSING_READS[stance], 16, 12, 4)
    two_queues(trace.ids, trace.keys, trace.owners, capacity, model, *choices)
    assert (hits == model).all()


def test_independent_draws_make_the_arena_eager() -> None:
    zipf = zipf_trace("zipf", 1.0, 1_000_000, 500_000, seed=3)
    replay = Replay(16_000)
    replay.play(zipf.keys[zipf.ids], zipf.owners[zipf.ids], DEMAND)
    assert replay.duel[STANCE] == EAGER


def test_reads_that_come_twice_soon_and_never_again_make_the_arena_patient() -> None:
    """Beside records that are read again and again, but after long."""
    random = np.random.default_rng(4)
    loved = random.integers(0, 2**62, 12_000)
    parts = []
    for _ in range(60):
        passing = random.integers(2**62, 2**63 - 1, 4_000)
        parts += [passing, passing, random.choice(loved, 4_000)]
    keys, replay = np.concatenate(parts), Replay(16_000)
    replay.play(keys, np.full(keys.size, 256), DEMAND)
    assert replay.duel[STANCE] == PATIENT


def test_what_is_hinted_is_found_and_read_once(trace: RecordTrace) -> None:
    found, read = hinted(trace, 1600, 200)
    demand = np.zeros(trace.ids.size, np.uint8)
    tierstore(trace, 1600, demand)
    assert found > 0.999
    assert read <= 1.01 * (1 - demand.mean())


def test_scans_are_never_asked_for_again(trace: RecordTrace) -> None:
    scanned = with_scans("scans", trace, every=5_000, burst=300, seed=3)
    counts = np.bincount(scanned.ids)
    assert scanned.ids.size == trace.ids.size + 4 * 300
    assert (counts[trace.distinct :] == 1).all()
    assert scanned.keys.size == scanned.owners.size == counts.size


def test_the_command_tells_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "3000", "--sizes", "200", "--shares", "0.1", "--policies", "lru,belady,tierstore"]
    options = ["--zipf", *sizes, "--hint-tokens", "16", "--dir", str(tmp_path), "--json"]
    assert cli.main(["policy", *options, "--record", str(tmp_path)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in results["traces"]][:2] == ["zipf-0.8", "zipf-0.8-drift"]
    for trace in results["traces"]:
        for size in trace["sizes"]:
            assert 0 < size["whole"]["tierstore"] < size["whole"]["belady"] < 1
    [record] = tmp_path.glob("policy-*.json")
    assert json.loads(record.read_text())["results"] == results


def test_the_command_wants_something_to_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policy"]) == 2
    assert "--stdlib" in capsys.readouterr().err
