"""The HBM tier, on CPU tensors, in front of real tables: every row against the checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_client import Client, connect
from engram_client.errors import BadRequest, Cancelled, IdOutOfRange, UnknownTable
from engram_client.hashing import NgramHashMapping
from engram_client.hbm import HbmTier
from engram_client.hbm.misses import Misses, distinct_lines
from engram_client.modules import EngramLookup
from tests.support.daemon import Daemon
from tests.support.stores import (
    LARGE,
    PLAIN,
    PLE,
    V41,
    V41_14,
    V41_ROWS,
    WORDS,
    PackedStore,
    opened,
    random_keys,
    random_rows,
    small_config,
)

RECORD_BYTES = 8 * 264


@pytest.fixture(scope="module", params=["local", "unix"])
def client(
    request: pytest.FixtureRequest, packed: PackedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    if request.param == "local":
        folder = packed.copy_to(tmp_path_factory.mktemp("hbm"))
        with opened(folder, small_config(2 << 20)), connect(f"local:{folder}") as client:
            yield client
        return
    daemon: Daemon = request.getfixturevalue("daemon")
    with connect(daemon.unix) as client:
        yield client


def tier_of(client: Client, *names: str, budget_bytes: int = 1 << 20) -> HbmTier:
    return HbmTier([client.table(name) for name in names], budget_bytes=budget_bytes, device="cpu")


def missing_of(misses: Misses) -> np.ndarray:
    """bool [n]; checks the list against the keys it was made of."""
    count = int(misses.count[0])
    pairs = misses.found[1 : 1 + 2 * count].view(-1, 2).numpy()
    missing = np.zeros(len(misses.keys), np.bool_)
    missing[pairs[:, 0]] = True
    assert np.array_equal(misses.keys.numpy()[pairs[:, 0]], pairs[:, 1]) and missing.sum() == count
    return missing


def few_keys(packed: PackedStore, name: str, count: int, seed: int) -> np.ndarray:
    """Lines of which many are equal, and with padding."""
    random = np.random.default_rng(seed)
    keys = random_keys(packed.oracles[name], 60, seed=9)[random.integers(0, 60, count)]
    keys[random.random(keys.shape) < 0.1] = -1
    return keys


@pytest.mark.parametrize("name", [V41, PLE])
def test_rows_are_the_checkpoints(client: Client, packed: PackedStore, name: str) -> None:
    """Cold, warm, and with most records gone again: always the same bytes."""
    tier = tier_of(client, name, budget_bytes=200_000)
    hot, oracle = tier.table(name), packed.oracles[name]
    for seed in range(12):
        keys = few_keys(packed, name, 40, seed) if seed % 3 else random_keys(oracle, 100, seed, masked=0.2)
        expected = oracle.lookup_ngrams(keys)
        assert np.array_equal(hot.lookup_ngrams(keys).numpy(), expected)
        out = torch.empty(expected.shape, dtype=torch.uint8)
        hot.lookup_ngrams_into(torch.from_numpy(keys), out)
        assert np.array_equal(out.numpy(), expected)
    stats = tier.stats()
    assert stats["hbm_hits"] > 0
    assert stats["hbm_evicted"] > 0
    assert stats["hbm_bytes"] <= 200_000


def test_tables_share_the_tier_and_never_each_others_rows(client: Client, packed: PackedStore) -> None:
    """The same keys name other rows in another table and at another order."""
    tier = tier_of(client, V41, V41_14)
    keys = np.repeat(random_keys(packed.oracles[V41], 20)[:, :1], 3, axis=1)
    for _ in range(3):
        for name in (V41, V41_14):
            rows = tier.table(name).lookup_ngrams(keys)
            assert np.array_equal(rows.numpy(), packed.oracles[name].lookup_ngrams(keys))
    assert tier.stats()["hbm_records"] == 2 * 3 * 20


@pytest.mark.parametrize("name", [V41_ROWS, PLAIN, LARGE])
def test_row_addressed_tables(client: Client, packed: PackedStore, name: str) -> None:
    hot, oracle = tier_of(client, name).table(name), packed.oracles[name]
    for seed in range(4):
        ids = random_rows(oracle, 60, seed % 2, masked=0.1).reshape(3, 20)
        expected = oracle.lookup(ids)
        assert np.array_equal(hot.lookup(ids).numpy(), expected)
        out = torch.empty(expected.shape, dtype=torch.uint8)
        hot.lookup_into(torch.from_numpy(ids).int(), out)
        assert np.array_equal(out.numpy(), expected)
        assert not missing_of(hot.hits_into(torch.from_numpy(ids), out)).any()


def test_a_repeated_record_is_asked_for_once(client: Client, packed: PackedStore) -> None:
    hot = tier_of(client, V41).table(V41)
    keys = np.repeat(random_keys(packed.oracles[V41], 3), 50, axis=0)
    before = client.stats()["keys"]
    hot.lookup_ngrams(keys)
    assert client.stats()["keys"] - before == 9
    hot.lookup_ngrams(keys)
    assert client.stats()["keys"] - before == 9  # nothing is asked for now


def test_hits_alone_tell_what_is_missing(client: Client, packed: PackedStore) -> None:
    hot, oracle = tier_of(client, V41).table(V41), packed.oracles[V41]
    known, unknown = random_keys(oracle, 8, seed=1), random_keys(oracle, 8, seed=2)
    hot.lookup_ngrams(known)
    keys = torch.from_numpy(
        np.concatenate([known, unknown, np.full_like(known, -1), np.full_like(known, -2)])
    )
    out = torch.full((32, 24, 264), 7, dtype=torch.uint8)
    misses = hot.hits_into(keys, out)
    expected = [[False] * 3] * 8 + [[True] * 3] * 8 + [[False] * 3] * 8 + [[True] * 3] * 8
    assert missing_of(misses).reshape(32, 3).tolist() == expected
    assert np.array_equal(out[:8].numpy(), oracle.lookup_ngrams(known))
    assert not out[8:].any()


def test_pinned_records_stay(client: Client, packed: PackedStore) -> None:
    tier, oracle = tier_of(client, V41, budget_bytes=400_000), packed.oracles[V41]
    hot, profile = tier.table(V41), random_keys(oracle, 10, seed=3)
    hot.pin(profile)
    for seed in range(5):
        hot.lookup_ngrams(random_keys(oracle, 200, 50 + seed))
    out = torch.empty((10, 24, 264), dtype=torch.uint8)
    assert not missing_of(hot.hits_into(torch.from_numpy(profile), out)).any()
    assert np.array_equal(out.numpy(), oracle.lookup_ngrams(profile))
    assert tier.stats()["hbm_pinned"] == 30


def test_pinned_rows(client: Client, packed: PackedStore) -> None:
    tier, ids = tier_of(client, PLAIN), np.arange(100)
    tier.table(PLAIN).pin(ids)
    assert tier.stats()["hbm_pinned"] == 100
    assert np.array_equal(tier.table(PLAIN).lookup(ids).numpy(), packed.oracles[PLAIN].lookup(ids))
    assert tier.stats()["hbm_misses"] == 0


def test_prefetched_rows(client: Client, packed: PackedStore) -> None:
    hot, oracle = tier_of(client, V41).table(V41), packed.oracles[V41]
    keys = random_keys(oracle, 30, masked=0.1)
    hot.lookup_ngrams(keys[:10])
    for _ in range(2):  # some hits, then all
        handle = hot.prefetch_ngrams(keys)
        rows = handle.wait(timeout=20)
        assert handle.done()
        assert handle.wait() is rows
        assert np.array_equal(rows.numpy(), oracle.lookup_ngrams(keys))
    cancelled = hot.prefetch_ngrams(random_keys(oracle, 3, seed=8))
    cancelled.cancel()
    with pytest.raises(Cancelled):
        cancelled.wait(timeout=20)


def test_resizing_while_it_is_used(client: Client, packed: PackedStore) -> None:
    tier, oracle = tier_of(client, V41), packed.oracles[V41]
    for seed, budget_bytes in enumerate((300_000, 2 << 20, 100_000, 1 << 20)):
        tier.resize(budget_bytes)
        keys = few_keys(packed, V41, 50, seed)
        assert np.array_equal(tier.table(V41).lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        assert tier.stats()["hbm_bytes"] <= budget_bytes == tier.stats()["hbm_budget_bytes"]


def test_tokens_to_embeddings_without_leaving_the_device(client: Client) -> None:
    """Hashing on the device and the HBM tier under a module's source, beside the ordinary way."""
    table = client.table(V41)
    mapping = NgramHashMapping.from_scheme(table.spec.scheme, np.array([0, 1, 1, 2]))
    assert mapping.raw_vocab_size == len(WORDS)
    layer = mapping.layer_ids[0]
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (2, 30)))
    dead = torch.from_numpy(np.random.default_rng(1).random((2, 30)) < 0.2)
    device_way = EngramLookup(mapping.on_device("cpu"), tier_of(client, V41).table(V41), layer)
    host_way = EngramLookup(mapping, table, layer)
    for mask in (None, dead):
        expected = host_way.start(tokens, mask).wait(timeout=20)
        assert torch.equal(device_way.start(tokens, mask).wait(timeout=20), expected)


def test_inside_and_outside_of_inference_mode(client: Client, packed: PackedStore) -> None:
    """Engines make things in inference mode and use them outside of it, or the other way round."""
    keys = random_keys(packed.oracles[V41], 20, seed=4)
    expected = packed.oracles[V41].lookup_ngrams(keys)
    with torch.inference_mode():
        made_inside = tier_of(client, V41)
        made_inside.resize(300_000)
    made_outside = tier_of(client, V41)
    for tier in (made_inside, made_outside):
        for inference in (False, True, False):
            with torch.inference_mode(inference):
                assert np.array_equal(tier.table(V41).lookup_ngrams(keys).numpy(), expected)
                tier.table(V41).pin(keys[:2])
        tier.resize(400_000)
    with torch.inference_mode():
        handle = made_inside.table(V41).prefetch_ngrams(random_keys(packed.oracles[V41], 5, seed=5))
    assert handle.wait(timeout=20).shape == (5, 24, 264)
    assert made_inside.stats()["hbm_hits"] > 0


def test_another_default_device_changes_nothing(client: Client, packed: PackedStore) -> None:
    keys = random_keys(packed.oracles[V41], 20, seed=4)
    with torch.device("meta"):
        hot = tier_of(client, V41).table(V41)
        for _ in range(2):
            rows = hot.lookup_ngrams(keys)
        prefetched = hot.prefetch_ngrams(keys[::-1].copy()).wait(timeout=20)
    assert np.array_equal(rows.numpy(), packed.oracles[V41].lookup_ngrams(keys))
    assert torch.equal(prefetched, rows.flip(0))


class TestRefusals:
    def test_ids(self, client: Client) -> None:
        tier = tier_of(client, V41)
        with pytest.raises(IdOutOfRange, match=r"n-gram key -2 at position \[1, 2\]"):
            tier.table(V41).lookup_ngrams([[1, 2, 3], [4, 5, -2]])
        with pytest.raises(IdOutOfRange, match=r"n-gram key -9 at position"):
            tier.table(V41).pin([[1, 2, -9]])
        rows = tier_of(client, PLAIN).table(PLAIN)
        for wrong in (3001, -2):
            with pytest.raises(IdOutOfRange, match=rf"row id {wrong} at position \[1\]"):
                rows.lookup([0, wrong])
        assert tier.stats()["hbm_records"] == 0

    def test_an_id_outside_the_vocabulary(self, client: Client) -> None:
        """What hashing on the device cannot raise, the look-up does."""
        table = client.table(V41)
        twin = NgramHashMapping.from_scheme(table.spec.scheme, np.array([0, 1, 1, 2])).on_device("cpu")
        keys = twin.ngram_keys(torch.tensor([1, 2, 77]), twin.layer_ids[0])
        with pytest.raises(IdOutOfRange, match=r"n-gram key -2 at position \[2, 0\]"):
            tier_of(client, V41).table(V41).lookup_ngrams(keys)

    def test_shapes_and_kinds(self, client: Client) -> None:
        hot, rows = tier_of(client, V41).table(V41), tier_of(client, PLAIN).table(PLAIN)
        keys = torch.zeros((2, 3), dtype=torch.int64)
        with pytest.raises(BadRequest, match=r"must be \[\.\.\., 3\]"):
            hot.lookup_ngrams(torch.zeros(2, dtype=torch.int64))
        with pytest.raises(BadRequest, match="int64 or int32"):
            hot.lookup_ngrams(keys.float())
        with pytest.raises(BadRequest, match="int64 or int32"):
            hot.lookup_ngrams(keys.numpy().astype(np.float32))
        with pytest.raises(BadRequest, match="single rows up with the table itself"):
            hot.lookup([1])
        with pytest.raises(BadRequest, match="addressed by rows"):
            rows.lookup_ngrams(keys)
        with pytest.raises(BadRequest, match="takes int64 tensors on cpu"):
            hot.hits_into(keys.int(), torch.empty((2, 24, 264), dtype=torch.uint8))
        with pytest.raises(BadRequest, match="uint8 tensor on cpu"):
            hot.lookup_ngrams_into(keys, torch.empty((2, 24, 264)))
        with pytest.raises(BadRequest, match=r"contiguous and \[2, 24, 264\]"):
            hot.lookup_ngrams_into(keys, torch.empty((2, 24, 263), dtype=torch.uint8))

    def test_tiers(self, client: Client) -> None:
        with pytest.raises(BadRequest, match="records of one size"):
            tier_of(client, V41, PLE)
        with pytest.raises(BadRequest, match="different names"):
            tier_of(client, V41, V41)
        with pytest.raises(BadRequest, match="different names"):
            tier_of(client)
        with pytest.raises(BadRequest, match="too small"):
            tier_of(client, V41, budget_bytes=1000)
        with pytest.raises(BadRequest, match="no-such-device cannot be used"):
            HbmTier([client.table(V41)], budget_bytes=1 << 20, device="no-such-device")
        with pytest.raises(UnknownTable, match="not made for table 'x'"):
            tier_of(client, V41).table("x")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=40))
def test_lines_hold_each_id_once(wanted: list[tuple[int, int]]) -> None:
    ids, columns = np.array(wanted, np.int64).T
    lines, source = distinct_lines(ids, columns, 3)
    assert (lines.reshape(-1)[source] == ids).all()
    assert (source % 3 == columns).all()
    for column in range(3):
        held = lines[:, column][lines[:, column] >= 0].tolist()
        assert sorted(held) == sorted({key for key, of in wanted if of == column})
    assert len(lines) == max(len({key for key, of in wanted if of == column}) for column in range(3))
