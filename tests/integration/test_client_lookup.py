"""Every way to ask for rows, in this process and through a daemon, against the checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engram_client import Client, connect
from tests.support.daemon import Daemon
from tests.support.stores import (
    ALL_TABLES,
    LARGE,
    PLAIN,
    PLE,
    RECORD_TABLES,
    SCHEME_TABLES,
    V41,
    V41_ROWS,
    PackedStore,
    eventually,
    opened,
    random_keys,
    random_rows,
    small_config,
)


@pytest.fixture(scope="module", params=["local", "unix"])
def client(
    request: pytest.FixtureRequest, packed: PackedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    if request.param == "local":
        folder = packed.copy_to(tmp_path_factory.mktemp("local"))
        with opened(folder, small_config(2 << 20)), connect(f"local:{folder}") as client:
            yield client
        return
    daemon: Daemon = request.getfixturevalue("daemon")
    with connect(getattr(daemon, request.param)) as client:
        yield client


def test_every_table_is_listed_with_its_shape(client: Client, packed: PackedStore) -> None:
    specs = client.tables()
    assert set(specs) == set(ALL_TABLES)
    for name, spec in specs.items():
        oracle = packed.oracles[name]
        assert (spec.rows, spec.row_bytes) == oracle.rows.shape
        assert spec.addressing == ("record" if name in RECORD_TABLES else "row")
        assert client.table(name).spec == spec


@pytest.mark.parametrize("name", ALL_TABLES)
def test_rows_by_row_id(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    ids = random_rows(oracle, 2400, seed=1, masked=0.1).reshape(8, 300)
    expected = oracle.lookup(ids)
    for _ in range(2):  # from disk, then from wherever they are now
        assert np.array_equal(table.lookup(ids), expected)
    assert np.array_equal(table.lookup(ids.astype(np.int32)), expected)
    assert np.array_equal(table.lookup(ids.tolist()), expected)
    ends = np.array([0, oracle.rows.shape[0] - 1])
    assert np.array_equal(table.lookup(ends), oracle.lookup(ends))
    assert table.lookup(ids[0, 0]).shape == (oracle.row_bytes,)


@pytest.mark.parametrize("name", SCHEME_TABLES)
def test_rows_by_ngram_key(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    keys = random_keys(oracle, 600, seed=2, masked=0.1).reshape(3, 200, oracle.orders)
    keys[0, 0], keys[0, 1] = 0, 2**63 - 1
    expected = oracle.lookup_ngrams(keys)
    for _ in range(2):
        assert np.array_equal(table.lookup_ngrams(keys), expected)
    small = keys[1] % 2**31
    assert np.array_equal(table.lookup_ngrams(small.astype(np.int32)), oracle.lookup_ngrams(small))


@pytest.mark.parametrize("name", SCHEME_TABLES)
@pytest.mark.parametrize("heads", [slice(0, 1), slice(2, 5), slice(7, 8), slice(-3, None), slice(0, 8)])
def test_a_rank_gets_its_heads(client: Client, packed: PackedStore, name: str, heads: slice) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    keys = random_keys(oracle, 100, seed=3, masked=0.1)
    expected = oracle.lookup_ngrams(keys, heads)
    for _ in range(2):
        assert np.array_equal(table.lookup_ngrams(keys, heads=heads), expected)
    assert np.array_equal(table.lookup_heads(oracle.row_ids(keys), heads=heads), expected)
    assert np.array_equal(table.prefetch_ngrams(keys, heads=heads).wait(30), expected)


@pytest.mark.parametrize("name", SCHEME_TABLES)
def test_rows_by_whole_ngrams_row_ids(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    ids = oracle.row_ids(random_keys(oracle, 300, seed=4, masked=0.1)).reshape(2, 150, -1)
    expected = oracle.lookup(ids)
    for _ in range(2):
        assert np.array_equal(table.lookup_heads(ids), expected)
    assert np.array_equal(table.lookup_heads(ids.astype(np.int32)), expected)


def test_keys_and_their_row_ids_share_records(client: Client, packed: PackedStore) -> None:
    """`lookup_heads` on a record-addressed table is as good as keys: nothing is read again."""
    oracle, table = packed.oracles[PLE], client.table(PLE)
    keys = random_keys(oracle, 1, seed=5)  # records that even one full set keeps side by side
    table.lookup_ngrams(keys)
    before = client.stats()
    assert np.array_equal(table.lookup_heads(oracle.row_ids(keys)), oracle.lookup_ngrams(keys))
    assert client.stats()["records_read"] == before["records_read"]
    assert client.stats()["dram_hits"] == before["dram_hits"] + keys.size


@pytest.mark.parametrize("name", [V41, V41_ROWS, LARGE])
def test_into_the_callers_buffer(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    ids = random_rows(oracle, 50, seed=6, masked=0.2).reshape(5, 10)
    out = np.full((5, 10, oracle.row_bytes), 7, np.uint8)
    table.lookup_into(ids, out)
    assert np.array_equal(out, oracle.lookup(ids))
    if oracle.orders:
        keys = random_keys(oracle, 40, seed=6, masked=0.2)
        out = np.full((40, 8 * oracle.orders, oracle.row_bytes), 7, np.uint8)
        table.lookup_ngrams_into(keys, out)
        assert np.array_equal(out, oracle.lookup_ngrams(keys))


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_tensors_come_back_as_tensors(client: Client, packed: PackedStore, dtype: str) -> None:
    import torch

    oracle, table = packed.oracles[V41], client.table(V41)
    keys = random_keys(oracle, 30, seed=7, masked=0.1) % 2**31
    ids = random_rows(oracle, 30, seed=7, masked=0.1)
    given = torch.from_numpy(keys).to(getattr(torch, dtype))
    found = table.lookup_ngrams(given)
    assert isinstance(found, torch.Tensor)
    assert np.array_equal(found.numpy(), oracle.lookup_ngrams(keys))
    waited = table.prefetch(torch.from_numpy(ids)).wait(30)
    assert isinstance(waited, torch.Tensor)
    assert np.array_equal(waited.numpy(), oracle.lookup(ids))
    out = torch.full((30, 24, 264), 7, dtype=torch.uint8)
    table.lookup_ngrams_into(given, out)
    assert np.array_equal(out.numpy(), oracle.lookup_ngrams(keys))
    strided = torch.from_numpy(np.repeat(ids, 2))[::2]
    assert np.array_equal(table.lookup(strided).numpy(), oracle.lookup(ids))


@pytest.mark.parametrize("name", ALL_TABLES)
def test_an_empty_batch_is_an_empty_answer(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    assert table.lookup(np.empty((0, 3), np.int64)).shape == (0, 3, oracle.row_bytes)
    assert table.prefetch(np.empty(0, np.int64)).wait(30).shape == (0, oracle.row_bytes)
    table.lookup_into(np.empty(0, np.int64), np.empty((0, oracle.row_bytes), np.uint8))
    if oracle.orders:
        shape = (2, 0, oracle.orders * 8, oracle.row_bytes)
        assert table.lookup_ngrams(np.empty((2, 0, oracle.orders), np.int64)).shape == shape
        assert table.lookup_heads(np.empty((2, 0, oracle.orders * 8), np.int64)).shape == shape
        assert table.warm_ngrams(np.empty((0, oracle.orders), np.int64)) in (True, False)


@pytest.mark.parametrize("name", ALL_TABLES)
def test_only_masked_ids_are_answered_with_zeros_and_counted(
    client: Client, packed: PackedStore, name: str
) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    before = client.stats()
    assert not table.lookup(np.full(37, -1)).any()
    after = client.stats()
    assert after["masked"] == before["masked"] + 37
    assert after["nvme_reads"] == before["nvme_reads"]
    if oracle.orders:
        assert not table.lookup_ngrams(np.full((5, oracle.orders), -1)).any()
        assert not table.lookup_heads(np.full((5, oracle.orders * 8), -1)).any()


def test_a_million_duplicates_are_read_once(client: Client, packed: PackedStore) -> None:
    oracle, table = packed.oracles[PLAIN], client.table(PLAIN)
    ids = np.full(1_000_000, 1234)
    ids[::7] = -1
    before = client.stats()["nvme_pages"]
    found = table.lookup(ids)
    assert found.shape == (1_000_000, 24)
    assert np.array_equal(found[1:7], np.tile(oracle.rows[1234], (6, 1)))
    assert (found.reshape(-1, 24) == oracle.lookup(ids[:7])[np.arange(1_000_000) % 7]).all()
    # Each RPC reads for itself what none has brought into DRAM before it began.
    assert client.stats()["nvme_pages"] - before <= (1 if client.target.startswith("local") else 4)


def test_duplicates_beyond_one_staging_buffer_are_read_once(client: Client, packed: PackedStore) -> None:
    oracle, table = packed.oracles[V41], client.table(V41)
    keys = np.repeat(random_keys(oracle, 3, seed=8), 130, axis=0)  # one RPC, several staging buffers
    np.random.default_rng(8).shuffle(keys)
    before = client.stats()["records_read"]
    assert np.array_equal(
        table.lookup_ngrams(keys, heads=slice(0, 2)), oracle.lookup_ngrams(keys, slice(0, 2))
    )
    assert client.stats()["records_read"] - before == 9


@pytest.mark.parametrize("name", [V41, V41_ROWS])
def test_prefetched_rows_are_the_rows(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    keys, ids = random_keys(oracle, 200, seed=9, masked=0.1), random_rows(oracle, 200, seed=9, masked=0.1)
    by_key, by_row = table.prefetch_ngrams(keys), table.prefetch(ids)
    assert np.array_equal(by_row.wait(30), oracle.lookup(ids))
    assert np.array_equal(by_key.wait(30), oracle.lookup_ngrams(keys))
    assert by_key.done()
    assert np.array_equal(by_key.wait(), oracle.lookup_ngrams(keys))


def test_a_prefetch_keeps_the_ids_it_was_given(client: Client, packed: PackedStore) -> None:
    """Engines fill one array with the ids of step after step."""
    oracle, table = packed.oracles[V41], client.table(V41)
    steps = [random_keys(oracle, 100, seed=seed) for seed in range(10, 16)]
    buffer, handles = np.empty_like(steps[0]), []
    for step in steps:
        buffer[:] = step
        handles.append(table.prefetch_ngrams(buffer))
        buffer[:] = -1
    for step, handle in zip(steps, handles, strict=True):
        assert np.array_equal(handle.wait(30), oracle.lookup_ngrams(step))


@pytest.mark.parametrize("name", [V41, V41_ROWS, PLE])
def test_warmed_records_are_hits(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    keys = random_keys(oracle, 12, seed=17, masked=0.1)
    wanted = keys.copy()
    done = client.stats()["hints_done"]
    assert table.warm_ngrams(keys)
    keys[:] = -1  # the hint has ids of its own
    assert eventually(lambda: client.stats()["hints_done"] > done)
    before = client.stats()
    assert np.array_equal(table.lookup_ngrams(wanted), oracle.lookup_ngrams(wanted))
    after = client.stats()
    # every 256th admission to a set gives up a hint, if there is one, for those whose reader never comes
    assert after["dram_misses"] - before["dram_misses"] <= 2
    assert after["nvme_reads"] - before["nvme_reads"] <= 2
    assert after["dram_hits"] > before["dram_hits"]


def test_dequantized_rows_have_the_tables_dimension(client: Client, packed: PackedStore) -> None:
    import torch

    oracle, table = packed.oracles[V41], client.table(V41)
    ids = random_rows(oracle, 6, seed=18).reshape(2, 3)
    numbers = table.dequantize(table.lookup(ids))
    raw = torch.from_numpy(oracle.rows[ids])
    scales = torch.exp2(raw[..., 256:].float() - 127).repeat_interleave(32, -1)
    expected = (raw[..., :256].contiguous().view(torch.float8_e4m3fn).float() * scales).to(torch.bfloat16)
    assert numbers.dtype == torch.bfloat16
    assert torch.equal(numbers.nan_to_num(), expected.nan_to_num())


def test_a_table_keeps_its_client(client: Client, packed: PackedStore) -> None:
    def table_of_a_client_nobody_keeps() -> Any:
        return connect(client.target).table(PLAIN)

    table = table_of_a_client_nobody_keeps()
    assert np.array_equal(table.lookup(np.arange(5)), packed.oracles[PLAIN].rows[:5])


def test_over_tcp_too(daemon: Daemon, packed: PackedStore) -> None:
    oracle = packed.oracles[V41]
    keys, ids = random_keys(oracle, 400, seed=19, masked=0.1), random_rows(oracle, 5000, seed=19)
    with connect(daemon.tcp) as client:
        table = client.table(V41)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))  # more than 1 MiB
        assert np.array_equal(table.lookup(ids), oracle.lookup(ids))
