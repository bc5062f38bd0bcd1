"""The client with ids and rows on a device, here CPU tensors: look-ups, prefetches, steps, their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engram_client import StepPrefetcher, connect, errors
from engram_client.gpu.carrier import Carrier, carrier_of
from engram_client.modules.lookup import StepRows
from tests.support.as_device import tensors_on_a_device  # noqa: F401
from tests.support.daemon import Daemon
from tests.support.oracle import Oracle
from tests.support.shared_memory import rows_of
from tests.support.stores import PLE, V41, V41_ROWS, PackedStore, random_keys, random_rows

pytestmark = pytest.mark.usefixtures("tensors_on_a_device")
CPU = torch.device("cpu")


@pytest.fixture
def small_buffers() -> Carrier:
    """A carrier whose buffers hold five records of V4.1, so that look-ups take several."""
    from engram_client.gpu import carrier

    made = carrier_of(CPU)
    made.__init__(CPU, rows_buffer_bytes=5 * 3 * 2112)  # type: ignore[misc]
    assert carrier.carrier_of(CPU) is made
    return made


@pytest.mark.parametrize("name", [V41, V41_ROWS, PLE])
def test_look_ups_and_prefetches(
    packed: PackedStore, roomy: Daemon, small_buffers: Carrier, name: str
) -> None:
    oracle: Oracle = packed.oracles[name]
    with connect(roomy.unix) as client:
        table = client.table(name)
        keys = random_keys(oracle, 43, seed=21, masked=0.1)
        there = torch.from_numpy(keys)
        expected = oracle.lookup_ngrams(keys)
        assert np.array_equal(table.lookup_ngrams(there).numpy(), expected)
        handle = table.prefetch_ngrams(there.reshape(43, 1, -1))
        out = torch.empty(expected.shape, dtype=torch.uint8)
        table.lookup_ngrams_into(there.int() if keys.max() < 2**31 else there, out)
        assert np.array_equal(out.numpy(), expected)
        for _ in range(2):
            assert np.array_equal(handle.wait(timeout=30).numpy(), expected[:, None])
        if name != PLE:
            part = table.lookup_ngrams(there, heads=slice(2, 4))
            whole = expected.reshape(43, keys.shape[1], -1, table.spec.row_bytes)[:, :, 2:4]
            assert np.array_equal(part.numpy(), whole.reshape(part.shape))
        ids = random_rows(oracle, 50, seed=22, masked=0.1)
        assert np.array_equal(table.lookup(torch.from_numpy(ids)).numpy(), rows_of(oracle, ids))
        assert np.array_equal(table.prefetch(torch.from_numpy(ids)).wait().numpy(), rows_of(oracle, ids))
        empty = table.lookup_ngrams(there[:0])
        assert tuple(empty.shape) == (0, *expected.shape[1:])
        assert table.prefetch(torch.from_numpy(ids[:0])).wait().shape == (0, table.spec.row_bytes)


def test_a_prefetch_has_the_ids_as_they_were_when_it_began(packed: PackedStore, roomy: Daemon) -> None:
    """The stream goes on writing to the same ids; what side streams copy late is copied in order."""
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 9, seed=23)
        there = torch.from_numpy(keys.copy())
        rows = table.prefetch_ngrams(there).wait()
        there.fill_(-1)
        assert np.array_equal(rows.numpy(), oracle.lookup_ngrams(keys))


def test_what_is_wrong_is_said(packed: PackedStore, roomy: Daemon) -> None:
    with connect(roomy.unix) as client:
        table = client.table(V41)
        bad = torch.tensor([[1, 2, -5]])
        handle = table.prefetch_ngrams(bad)  # nobody has looked at them yet
        with pytest.raises(errors.IdOutOfRange):
            handle.wait()
        with pytest.raises(errors.IdOutOfRange):
            table.lookup_ngrams(bad)
        with pytest.raises(errors.BadRequest, match="float32"):
            table.lookup_ngrams(torch.zeros(1, 3))
        with pytest.raises(errors.BadRequest, match=r"\[\.\.\., 3\]"):
            table.prefetch_ngrams(torch.zeros((1, 2), dtype=torch.int64)).wait()
        with pytest.raises(errors.BadRequest, match="heads"):
            table.prefetch_ngrams(bad, heads=slice(9, 9))
        with pytest.raises(errors.BadRequest, match="out must be"):
            table.lookup_ngrams_into(torch.zeros((1, 3), dtype=torch.int64), torch.zeros(3))


def test_steps_take_tokens_on_a_device(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        steps = StepPrefetcher({1: client.table(V41)}, np.array([0, 1, 1, 2]), dedupe=True)
        tokens = torch.from_numpy(np.random.default_rng(24).integers(0, 4, (4, 6)))
        dead = torch.zeros((4, 6), dtype=torch.bool)
        dead[1, 2] = True
        expected = oracle.lookup_ngrams(steps.mapping.ngram_keys(tokens.numpy(), 1, dead.numpy()))
        expected[1, 2] = 0
        with steps.start(tokens, dead) as step:
            out = torch.full(expected.shape, 3, dtype=torch.uint8)
            assert step.wait(1, out=out) is out
            assert np.array_equal(out.numpy(), expected)
            embeddings = StepRows(step, 1).wait(device=CPU)
            assert torch.equal(embeddings, client.table(V41).dequantize(torch.from_numpy(expected)))


def test_want_of_device_memory_is_said() -> None:
    with pytest.raises(errors.BadRequest, match="has no 4503599627370496 bytes"):
        Carrier(CPU).empty((1 << 50, 4))


def test_rows_picked_on_the_way(small_buffers: Carrier) -> None:
    random = np.random.default_rng(25)
    rows = random.integers(0, 256, (40, 3, 704), np.uint8)
    index = random.integers(0, 40, 77)
    out = torch.zeros((77, 3, 704), dtype=torch.uint8)
    small_buffers.send_into(rows, out, index)
    assert np.array_equal(out.numpy(), rows[index])
    assert np.array_equal(small_buffers.send(rows).numpy(), rows)
    large = random.integers(0, 256, (2, 40_000), np.uint8)  # an entry larger than a buffer
    assert np.array_equal(small_buffers.send(large).numpy(), large)
