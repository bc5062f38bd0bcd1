"""Tables of a client that keeps hot records on a device: the same table, answered from there for "
"ids there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engram_client import Client, connect
from engram_client.errors import BadRequest
from tests.support.daemon import Daemon
from tests.support.stores import PLAIN, PLE, V41, V41_14, PackedStore, opened, random_keys, small_config
from tierstore.config import Hbm


@pytest.fixture(params=["configured", "local", "unix"])
def client(
    request: pytest.FixtureRequest, packed: PackedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    asked = {"hbm_budget_bytes": 2 << 20, "device": "cpu"}
    if request.param == "unix":
        daemon: Daemon = request.getfixturevalue("daemon")
        with connect(daemon.unix, **asked) as client:
            yield client
        return
    folder = packed.copy_to(tmp_path_factory.mktemp("hot"))
    configured = request.param == "configured"
    config = (
        small_config(2 << 20, hbm=Hbm(client_budget_bytes=2 << 20, device="cpu"))
        if configured
        else small_config()
    )
    with opened(folder, config), connect(f"local:{folder}", **({} if configured else asked)) as client:
        yield client


def test_device_ids_are_answered_from_the_device(client: Client, packed: PackedStore) -> None:
    tables = {name: client.table(name) for name in (V41, V41_14, PLE, PLAIN)}
    for turn in range(2):
        for name in (V41, V41_14, PLE):
            keys, oracle = random_keys(packed.oracles[name], 10, seed=1), packed.oracles[name]
            rows = tables[name].lookup_ngrams(torch.from_numpy(keys))
            assert isinstance(rows, torch.Tensor)
            assert np.array_equal(rows.numpy(), oracle.lookup_ngrams(keys))
            again = client.table(name).prefetch_ngrams(torch.from_numpy(keys)).wait(timeout=20)
            assert torch.equal(again, rows)
        ids = torch.arange(12)
        assert np.array_equal(tables[PLAIN].lookup(ids).numpy(), packed.oracles[PLAIN].lookup(ids.numpy()))
        stats = client.stats()
        assert stats["client_hbm_misses"] == 30 + 30 + 20 + 12, turn
    assert stats["client_hbm_hits"] == 3 * 80 + 12
    assert stats["client_hbm_bytes"] <= 2 << 20
    assert "dram_hits" in stats


def test_the_hosts_ids_are_answered_as_ever(client: Client, packed: PackedStore) -> None:
    table, oracle = client.table(V41), packed.oracles[V41]
    keys = random_keys(oracle, 10, seed=2)
    assert isinstance(table.lookup_ngrams(keys), np.ndarray)
    some = table.lookup_ngrams(torch.from_numpy(keys), heads=slice(0, 2))  # the tier holds whole records
    assert np.array_equal(
        some.numpy().reshape(10, 3, 2, -1), oracle.lookup_ngrams(keys).reshape(10, 3, 8, -1)[:, :, :2]
    )
    assert client.stats()["client_hbm_misses"] == 0
    out = np.empty((10, 24, 264), np.uint8)
    table.lookup_ngrams_into(torch.from_numpy(keys), torch.from_numpy(out))
    assert np.array_equal(out, oracle.lookup_ngrams(keys))
    assert client.stats()["client_hbm_misses"] == 30


def test_its_budget_changes_while_it_is_used(client: Client, packed: PackedStore) -> None:
    keys = torch.from_numpy(random_keys(packed.oracles[V41], 10, seed=3))
    rows = client.table(V41).lookup_ngrams(keys)
    client.resize_hbm_tier(1 << 20)
    assert client.stats()["client_hbm_budget_bytes"] <= 1 << 20
    assert torch.equal(client.table(V41).lookup_ngrams(keys), rows)


def test_a_part_of_the_budget_that_is_too_small(
    packed: PackedStore, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path_factory.mktemp("small"))
    with (
        caplog.at_level(logging.WARNING),
        opened(folder, small_config()),
        connect(f"local:{folder}", hbm_budget_bytes=10_000, device="cpu") as client,
    ):
        keys = torch.from_numpy(random_keys(packed.oracles[V41], 3))
        for _ in range(2):
            rows = client.table(V41).lookup_ngrams(keys)
            assert np.array_equal(rows.numpy(), packed.oracles[V41].lookup_ngrams(keys.numpy()))
    assert caplog.text.count("no records of table 'v41' are kept on cpu") == 1


def test_without_a_budget(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = packed.copy_to(tmp_path_factory.mktemp("cold"))
    with opened(folder, small_config()), connect(f"local:{folder}") as client:
        assert type(client.table(V41)).__name__ == "Table"
        assert not any(name.startswith("client_hbm_") for name in client.stats())


def test_a_device_that_is_not_there(
    packed: PackedStore, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Who named it is told; where the configuration did, it is said, and the table serves."""
    folder = packed.copy_to(tmp_path_factory.mktemp("gone"))
    with opened(folder, small_config(hbm=Hbm(client_budget_bytes=1 << 20, device="nowhere"))):
        with pytest.raises(BadRequest, match="nowhere cannot be used"):
            connect(f"local:{folder}", hbm_budget_bytes=1 << 20, device="nowhere")
        with caplog.at_level(logging.WARNING), connect(f"local:{folder}") as client:
            keys = random_keys(packed.oracles[V41], 3)
            assert np.array_equal(
                client.table(V41).lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys)
            )
    assert "no HBM tier" in caplog.text
