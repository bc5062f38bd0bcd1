"""Rows in a staging ring: whole and right under their stamp, or not stamped; over every way to the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engram_client import Client, CompressedTokenizer, StagingRing, StepPrefetcher, connect, errors
from tests.support.daemon import Daemon
from tests.support.shared_memory import attached, rows_of
from tests.support.stores import (
    PLAIN,
    SCHEME_TABLES,
    V41,
    V41_14,
    Device,
    PackedStore,
    eventually,
    opened,
    random_keys,
    random_rows,
    small_config,
)

LAYERS = {1: V41, 7: V41_14, 14: V41_14}  # two share a table
HASHED_AS = {1: 1, 7: 14, 14: 14}


@pytest.fixture(params=["shared memory", "tcp", "local"])
def client(request: pytest.FixtureRequest, packed: PackedStore, tmp_path: Any) -> Iterator[Client]:
    """A client of each kind, of a service with less DRAM than the tests ask for."""
    if request.param == "local":
        folder = packed.copy_to(tmp_path)
        with opened(folder, small_config(2 << 20)), connect(f"local:{folder}") as client:
            yield client
        return
    daemon: Daemon = request.getfixturevalue("daemon")
    with connect(daemon.unix if request.param == "shared memory" else daemon.tcp) as client:
        assert request.param == "tcp" or attached(client)
        yield client


@pytest.mark.parametrize("name", [*SCHEME_TABLES, PLAIN])
def test_rows_are_right_and_stamped(packed: PackedStore, client: Client, name: str) -> None:
    """Missing, mixed and cached, a few and many, in slots that held other rows before."""
    oracle, table = packed.oracles[name], client.table(name)
    ring = StagingRing(table, entries=400)
    assert (ring.words() == -1).all()
    assert ring.rows().ctypes.data % 4096 == ring.words().ctypes.data % 4096 == 0
    addresses = ring.rows().ctypes.data, ring.words().ctypes.data
    step = 5
    for seed, count in ((1, 2), (1, 3), (2, 40), (2, 60), (3, 300), (3, 400), (3, 1), (4, 0), (3, 400)):
        if name == PLAIN:
            ids = random_rows(oracle, count, seed=seed, masked=0.1)
            expected = rows_of(oracle, ids)[:, None]
        else:
            ids = random_keys(oracle, count, seed=seed, masked=0.1)
            expected = oracle.lookup_ngrams(ids) if count else np.empty((0, *ring.rows().shape[2:]))
        with ring.start(step, ids) as staged:
            staged.wait(30)
            assert staged.done()
            assert ring.words()[staged.slot] == step
            assert np.array_equal(staged.rows(), expected)
            assert np.array_equal(ring.rows()[staged.slot, :count], expected)
        step += 3
    assert addresses == (ring.rows().ctypes.data, ring.words().ctypes.data)


@pytest.mark.parametrize("positions", [1, 30, 200])
def test_a_step_lands_in_one_slot(packed: PackedStore, client: Client, positions: int) -> None:
    tokenizer = CompressedTokenizer(packed.directory.parent / "tokenizer.json")
    steps = StepPrefetcher({layer: client.table(name) for layer, name in LAYERS.items()}, tokenizer)
    ring = StagingRing(steps, entries=200, slots=3, heads=slice(2, 5))
    assert ring.rows(7) is ring.rows(14)
    lookback, random = steps.lookback(positions), np.random.default_rng(4)
    for number in range(7):
        tokens, dead = random.integers(0, 4, (positions, 1)), random.random((positions, 1)) < 0.2
        with ring.start(number, tokens, dead, lookback=lookback) as staged:
            for layer, name in LAYERS.items():
                keys = steps.mapping.ngram_keys(tokens, HASHED_AS[layer], dead, lookback=lookback)
                keys[dead] = -1
                staged.wait(30, layer_id=layer)
                assert staged.done(layer)
                assert ring.words(layer)[staged.slot] == number
                expected = packed.oracles[name].lookup_ngrams(keys[:, 0], slice(2, 5))
                assert np.array_equal(staged.rows(layer), expected)
            staged.wait()
            assert (staged.slot, staged.entries) == (number % 3, positions)
        lookback.advance(tokens)


def test_what_is_refused(packed: PackedStore, client: Client) -> None:
    table, keys = client.table(V41), random_keys(packed.oracles[V41], 4)
    for options in ({"entries": 0}, {"entries": 1, "slots": 0}, {"entries": 2**60}):
        with pytest.raises(errors.BadRequest, match=r"slots and entries >= 1|cannot be mapped"):
            StagingRing(table, **options)
    with pytest.raises(errors.BadRequest, match="no hash scheme"):
        StagingRing(client.table(PLAIN), entries=1, heads=slice(0, 2))
    ring = StagingRing(table, entries=4)
    held = [ring.start(step, keys) for step in (3, 4)]
    with pytest.raises(errors.Overloaded, match="all 2 slots"):
        ring.start(5, keys)
    held[1].release()
    with pytest.raises(errors.Overloaded, match="all 2 slots"):
        ring.start(5, keys)  # slots come in turn
    held[0].wait(30)
    held[0].release()
    for step in (4, 0, -1, 2**63):
        with pytest.raises(errors.BadRequest, match="steps must ascend"):
            ring.start(step, keys)
    with pytest.raises(errors.BadRequest, match=r"whole number, got 5\.5"):
        ring.start(5.5, keys)  # type: ignore[arg-type]
    for wrong, what in (
        (np.repeat(keys, 2, axis=0), "8 entries do not fit a slot of 4"),
        (np.full((1, 3), -2), "neither -1"),
        (keys[:, :2], r"\[\.\.\., 3\]"),
    ):
        with pytest.raises(errors.BadRequest, match=what):
            ring.start(5, wrong)
        assert ring.words()[0] == -1
    with pytest.raises(errors.BadRequest, match="keys or row ids alone"):
        ring.start(5, keys, np.zeros(4, bool))
    with pytest.raises(errors.BadRequest, match="layer 1 is not in this ring"):
        ring.rows(1)
    with ring.start(5, keys) as staged:
        assert staged.slot == 0
        staged.wait(30)
    with pytest.raises(errors.Cancelled):
        staged.wait(0)


def test_a_step_that_failed_at_a_later_layer_has_used_its_number(
    packed: PackedStore, opened_store: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = CompressedTokenizer(packed.directory.parent / "tokenizer.json")
    with connect(f"local:{opened_store.directory}") as client:
        tables = {1: client.table(V41), 14: client.table(V41_14)}
        ring = StagingRing(StepPrefetcher(tables, tokenizer), entries=4)

        def refuse(*_: Any, **__: Any) -> Any:
            raise errors.Overloaded("full")

        with monkeypatch.context() as patched:
            patched.setattr(tables[14], "stage", refuse)
            with pytest.raises(errors.Overloaded, match=r"layer 14 \(table 'v41-14'\): full"):
                ring.start(3, [1, 2])
            patched.setattr(tables[1], "stage", refuse)
            with pytest.raises(errors.Overloaded, match="layer 1 "):
                ring.start(4, [1, 2])
        with pytest.raises(errors.BadRequest, match="the last one was 3"):
            ring.start(3, [1, 2])
        with ring.start(4, [1, 2]) as staged:
            assert staged.slot == 0
            staged.wait(30)


def test_who_drops_a_step_frees_its_slot(packed: PackedStore, client: Client) -> None:
    ring = StagingRing(client.table(V41), entries=40, slots=1)
    for step in range(30):
        staged = ring.start(step, random_keys(packed.oracles[V41], 40, seed=step))
        if step % 2:
            staged.wait(30)
        del staged
        assert eventually(lambda: ring._occupants[0].vacate())  # type: ignore[union-attr]


def test_a_closed_client(packed: PackedStore, client: Client) -> None:
    """What landed stays readable; what did not is an error."""
    keys = random_keys(packed.oracles[V41], 40, seed=77)
    ring = StagingRing(client.table(V41), entries=40)
    landed = ring.start(1, keys)
    landed.wait(30)
    client.close()
    assert np.array_equal(landed.rows(), packed.oracles[V41].lookup_ngrams(keys))
    with pytest.raises((errors.Cancelled, errors.Unavailable)):
        ring.start(2, random_keys(packed.oracles[V41], 40, seed=78)).wait(30)
    assert ring.words().tolist()[1] == -1


def test_a_late_read_is_not_stamped(packed: PackedStore, opened_store: Device) -> None:
    """In this process: the thread that reads for a step that was given up writes nowhere."""
    oracle = packed.oracles[V41]
    old, new = (random_keys(oracle, 5, seed=seed) for seed in (1, 2))
    with connect(f"local:{opened_store.directory}") as client:
        client.table(V41).lookup_ngrams(new)
        ring = StagingRing(client.table(V41), entries=5, slots=1)
        with opened_store.device.held():
            late = ring.start(1, old)
            assert not late.done()
            with pytest.raises(errors.DeadlineExceeded):
                late.wait(0.01)
            assert ring.words()[0] == -1
            late.release()
            staged = ring.start(2, new)
            assert ring.words()[0] == 2
        client.table(V41).lookup_ngrams(old)  # so the late read has ended as well
        assert ring.words()[0] == 2
        assert np.array_equal(staged.rows(), oracle.lookup_ngrams(new))
        staged.release()
        opened_store.device.fail(range(10_000))
        with ring.start(3, random_keys(oracle, 5, seed=3)) as staged:
            for _ in range(2):
                with pytest.raises(errors.StorageError):
                    staged.wait(30)
            assert ring.words()[0] == -1
