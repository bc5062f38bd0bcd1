"""What a caller can get wrong: each is refused with the place, both values and a way out; nothing is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engram_client import Client, Table, connect, errors
from tests.support.stores import (
    ALL_TABLES,
    DEMO,
    LARGE,
    PLAIN,
    PLE,
    SCHEME_TABLES,
    V41,
    V41_ROWS,
    PackedStore,
    opened,
    random_keys,
    random_rows,
    small_config,
)
from tierstore.config import Limits


@pytest.fixture(scope="module", params=["local", "unix"])
def client(
    request: pytest.FixtureRequest, packed: PackedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    if request.param == "unix":
        with connect(request.getfixturevalue("daemon").unix) as client:
            yield client
        return
    folder = packed.copy_to(tmp_path_factory.mktemp("local"))
    config = small_config(limits=Limits(lookup_bytes_max=64 << 10))
    with opened(folder, config), connect(f"local:{folder}") as client:
        yield client


def refused(client: Client, kind: type[Exception], what: str, call: Callable[[], Any]) -> None:
    """`call` raises `kind` saying `what` (a pattern), and the disk was left alone."""
    before = client.stats()["nvme_reads"]
    with pytest.raises(kind, match=what) as caught:
        call()
    assert type(caught.value) is kind
    assert client.stats()["nvme_reads"] == before


@pytest.mark.parametrize("name", ALL_TABLES)
@pytest.mark.parametrize("bad", ["rows", "rows+1", -2, -(2**63), 2**63 - 1])
def test_row_ids_outside_the_table(client: Client, packed: PackedStore, name: str, bad: str | int) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    rows = oracle.rows.shape[0]
    ids = random_rows(oracle, 12).reshape(3, 4)
    ids[2, 1] = {"rows": rows, "rows+1": rows + 1}.get(str(bad), bad)
    what = re.escape(f"'{name}': row id {ids[2, 1]} at position [2, 1]") + rf".*\[0, {rows - 1}\]"
    out = np.empty((3, 4, oracle.row_bytes), np.uint8)
    for call in (table.lookup, table.prefetch, lambda ids: table.lookup_into(ids, out)):
        refused(client, errors.IdOutOfRange, what, lambda call=call: call(ids))


@pytest.mark.parametrize("name", SCHEME_TABLES)
@pytest.mark.parametrize("bad", [-2, -(2**63)])
def test_negative_keys(client: Client, packed: PackedStore, name: str, bad: int) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    keys = random_keys(oracle, 4)
    keys[3, 1] = bad
    what = re.escape(f"'{name}': n-gram key {bad} at position [3, 1]")
    for call in (table.lookup_ngrams, table.prefetch_ngrams, table.warm_ngrams):
        refused(client, errors.IdOutOfRange, what, lambda call=call: call(keys))


@pytest.mark.parametrize("name", [V41, V41_ROWS, PLE])
def test_row_ids_of_different_ngrams(client: Client, packed: PackedStore, name: str) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    ids = oracle.row_ids(random_keys(oracle, 5))
    for head in (0, 3, 7):  # a determining head, and heads that are only checked
        size, first = oracle.heads[1][head]
        mixed = ids.copy()
        mixed[2, 8 + head] = first + (mixed[2, 8 + head] - first + 1) % size
        refused(client, errors.ForeignIds, r"\[2\].*order 3", lambda mixed=mixed: table.lookup_heads(mixed))
    swapped = ids.copy()
    swapped[1, [8, 9]] = swapped[1, [9, 8]]
    refused(client, errors.ForeignIds, r"order 3, head \d got row", lambda: table.lookup_heads(swapped))
    half_masked = ids.copy()
    half_masked[4, 9] = -1
    refused(client, errors.ForeignIds, "is -1 where other heads", lambda: table.lookup_heads(half_masked))
    outside = ids.copy()
    outside[0, 0] = oracle.rows.shape[0]
    refused(client, errors.IdOutOfRange, "row_ids", lambda: table.lookup_heads(outside))


@pytest.mark.parametrize("ids", [
    np.zeros(3), np.zeros(3, np.float32), np.zeros(3, np.uint64), np.zeros(3, np.int16), np.zeros(3, bool),
    np.zeros(3, ">i8"), np.array(["1"]), np.array([2**70]), "5", None, {1}, object(), [[1], [1, 2]],
])  # fmt: skip
def test_ids_of_another_type(client: Client, ids: Any) -> None:
    table = client.table(PLAIN)
    refused(client, errors.BadRequest, "row_ids", lambda: table.lookup(ids))
    refused(client, errors.BadRequest, "row_ids", lambda: table.prefetch(ids))
    refused(client, errors.BadRequest, "ngram_keys", lambda: client.table(V41).lookup_ngrams(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8", "bool"])
def test_tensors_of_another_type(client: Client, dtype: str) -> None:
    import torch

    ids = torch.zeros(3, dtype=getattr(torch, dtype))
    refused(client, errors.BadRequest, "int64 or int32", lambda: client.table(PLAIN).lookup(ids))
    sparse = torch.zeros(3, dtype=torch.int64).to_sparse()
    refused(client, errors.BadRequest, "int64 or int32", lambda: client.table(PLAIN).lookup(sparse))


@pytest.mark.parametrize("name", SCHEME_TABLES)
def test_keys_and_whole_ngrams_of_another_shape(client: Client, packed: PackedStore, name: str) -> None:
    table, orders = client.table(name), packed.oracles[name].orders
    for shape in ((), (orders + 1,), (orders, 1), (5, orders - 1), (orders, 0)):
        keys = np.zeros(shape, np.int64)
        what = rf"ngram_keys must be \[\.\.\., {orders}\].*{re.escape(str(list(shape)))}"
        refused(client, errors.BadRequest, what, lambda keys=keys: table.lookup_ngrams(keys))
    for shape in ((), (orders * 8 + 1,), (5, orders)):
        ids = np.zeros(shape, np.int64)
        what = rf"row_ids must be \[\.\.\., {orders * 8}\]"
        refused(client, errors.BadRequest, what, lambda ids=ids: table.lookup_heads(ids))


@pytest.mark.parametrize(
    "heads", [slice(3, 3), slice(5, 2), slice(0, 8, 2), slice(8, 9), slice(None, None, -1)]
)
def test_heads_that_are_no_range(client: Client, packed: PackedStore, heads: slice) -> None:
    for name in (V41, V41_ROWS):
        keys = random_keys(packed.oracles[name], 2)
        table = client.table(name)
        refused(
            client, errors.BadRequest, "heads=slice", lambda k=keys, t=table: t.lookup_ngrams(k, heads=heads)
        )


@pytest.mark.parametrize("heads", [3, (0, 2), "0:2", slice("a", "b"), slice(0.0, 2.0)])
def test_heads_that_are_no_slice(client: Client, packed: PackedStore, heads: Any) -> None:
    keys = random_keys(packed.oracles[V41], 2)
    call = lambda: client.table(V41).lookup_ngrams(keys, heads=heads)  # noqa: E731
    refused(client, errors.BadRequest, "heads must be a slice", call)


@pytest.mark.parametrize("out", [
    np.empty((2, 3, 24), np.int8), np.empty((3, 2, 24), np.uint8), np.empty((2, 3, 48), np.uint8)[..., ::2],
    np.empty((24, 3, 2), np.uint8).T, np.broadcast_to(np.uint8(0), (2, 3, 24)), bytearray(144), None,
])  # fmt: skip
def test_buffers_that_do_not_fit(client: Client, out: Any) -> None:
    ids = np.arange(6).reshape(2, 3)
    refused(client, errors.BadRequest, "out must be", lambda: client.table(PLAIN).lookup_into(ids, out))


def test_tensor_buffers_that_do_not_fit(client: Client) -> None:
    import torch

    ids = torch.arange(6).reshape(2, 3)
    for out in (torch.empty(2, 3, 24), torch.empty(2, 3, 48, dtype=torch.uint8)[..., ::2]):
        call = lambda out=out: client.table(PLAIN).lookup_into(ids, out)  # noqa: E731
        refused(client, errors.BadRequest, "out must be", call)


@pytest.mark.parametrize("name", [PLAIN, LARGE])
def test_tables_without_a_hash_scheme_have_no_keys(client: Client, name: str) -> None:
    table, keys = client.table(name), np.zeros((2, 3), np.int64)
    for call in (
        lambda: table.lookup_ngrams(keys),
        lambda: table.lookup_heads(keys),
        lambda: table.prefetch_ngrams(keys),
        lambda: table.warm_ngrams(keys),
        table.mapping,
    ):
        refused(client, errors.BadRequest, f"'{name}' has no hash scheme", call)


def test_tables_that_are_not_there(client: Client) -> None:
    for name in ("nosuch", "", "V41", "../v41", "v41\0", "ü" * 3000, "x" * 500_000):
        with pytest.raises(errors.UnknownTable, match="no table") as caught:
            client.table(name)
        assert len(str(caught.value)) < 1_000_000
    with pytest.raises(KeyError, match=f"served: {', '.join(sorted(ALL_TABLES))}"):
        client.table("nosuch")


def of_another_generation(table: Table) -> Table:
    spec = replace(table.spec, generation="ab" * 16)
    return Table(spec, table._transport, table._prefetcher, table)


def test_another_generation(client: Client, packed: PackedStore) -> None:
    for name in ALL_TABLES:
        table = client.table(name)
        other, both = of_another_generation(table), rf"{'ab' * 16}.*{table.spec.generation}"
        refused(client, errors.GenerationMismatch, both, lambda other=other: other.lookup(np.arange(3)))
        refused(client, errors.GenerationMismatch, both, lambda o=other: o.prefetch(np.arange(3)).wait(30))
    keys = random_keys(packed.oracles[V41], 3)
    other = of_another_generation(client.table(V41))
    refused(client, errors.GenerationMismatch, "ab" * 16, lambda: other.lookup_ngrams(keys))
    refused(client, errors.GenerationMismatch, "ab" * 16, lambda: other.warm_ngrams(keys))


def test_another_tokenizer(client: Client) -> None:
    own = np.array([0, 1, 1, 2])
    for name in (V41, V41_ROWS, DEMO):
        assert client.table(name).mapping(own).multipliers is not None
        for other in (np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3]), np.array([0, 1, 1]), np.arange(50)):
            with pytest.raises(errors.VocabularyMismatch, match=r"vocabulary|digest"):
                client.table(name).mapping(other)
        with pytest.raises(errors.BadRequest, match="compressed"):
            client.table(name).mapping()
    with pytest.raises(errors.BadRequest, match="PLE"):
        client.table(PLE).mapping(own)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), "5", (1,)])
def test_timeouts_that_are_no_time(client: Client, timeout: Any) -> None:
    with pytest.raises(errors.BadRequest, match="timeout"):
        client.table(PLAIN).lookup(np.arange(3), timeout=timeout)
    handle = client.table(PLAIN).prefetch(np.arange(3))
    with pytest.raises(errors.BadRequest, match="timeout"):
        handle.wait(timeout)
    assert handle.wait(30).shape == (3, 24)


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300, 10**12, np.float32(30), 30])
def test_timeouts_that_are_long(client: Client, packed: PackedStore, timeout: Any) -> None:
    table, expected = client.table(PLAIN), packed.oracles[PLAIN].rows[:3]
    assert np.array_equal(table.lookup(np.arange(3), timeout=timeout), expected)
    assert np.array_equal(table.prefetch(np.arange(3), timeout=timeout).wait(timeout), expected)


def test_a_time_of_nothing_is_too_short_for_the_disk(client: Client, packed: PackedStore) -> None:
    table = client.table(V41)
    keys = random_keys(packed.oracles[V41], 5, seed=77)
    with pytest.raises(errors.DeadlineExceeded):
        table.lookup_ngrams(keys, timeout=0)
    with pytest.raises(TimeoutError):
        table.prefetch_ngrams(keys, timeout=0).wait(30)


def test_a_batch_over_the_local_limit(client: Client, packed: PackedStore) -> None:
    table, oracle = client.table(PLAIN), packed.oracles[PLAIN]
    most = (64 << 10) // 24
    ids = random_rows(oracle, most + 1)
    assert np.array_equal(table.lookup(ids[:most]), oracle.lookup(ids[:most]))
    if not client.target.startswith("local"):  # a remote look-up of any size is split into requests
        assert np.array_equal(table.lookup(ids), oracle.lookup(ids))
        return
    what = rf"'plain': {most + 1} ids ask for {(most + 1) * 24} bytes.*{64 << 10} \(limits.lookup_bytes_max\)"
    refused(client, errors.BatchTooLarge, what, lambda: table.lookup(ids))
    refused(client, errors.BatchTooLarge, what, lambda: table.prefetch(ids).wait(30))
