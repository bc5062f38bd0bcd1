"""Rows at fixed addresses of a device, here CPU tensors: pulled, delivered, late, never taken for others."""

from __future__ import annotations

import numpy as np
import pytest

from engram_client import StagingRing, StepPrefetcher, connect, errors
from engram_client.gpu import graph_reader
from engram_client.gpu.graph_reader import NOBODY, GraphReader
from tests.support.daemon import Daemon
from tests.support.late_stream import LateSideStream
from tests.support.stores import V41, V41_14, PackedStore, random_keys

ENTRIES = 12


def test_pull_takes_the_expected_step_and_no_other(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        ring = StagingRing(client.table(V41), entries=ENTRIES, slots=2)
        reader = GraphReader(ring, "cpu", polls=3)
        address = reader.rows().data_ptr()
        for step in range(1, 5):
            keys = random_keys(oracle, ENTRIES - step, seed=40 + step, masked=0.1)
            with ring.start(step, keys) as staged:
                staged.wait(timeout=30)
                reader.expect(staged)
                reader.pull(None, staged.slot)  # what a graph does when it is replayed
                reader.check(staged)
                assert not reader.dead()[staged.slot].any()
                rows = reader.rows()[staged.slot, : staged.entries]
                assert np.array_equal(rows.numpy(), oracle.lookup_ngrams(keys))
                assert reader.words()[staged.slot] == step
        assert reader.rows().data_ptr() == address
        with ring.start(9, keys) as staged:  # nobody said that the graph is to take it
            staged.wait(timeout=30)
            reader.pull(None, staged.slot)
            with pytest.raises(errors.DeadlineExceeded, match=r"step 9 \(slot 0\) were late .* found none"):
                reader.check(staged)
            assert reader.dead()[staged.slot].all() and not reader.dead()[1 - staged.slot].any()


def test_late_rows_are_an_error_and_the_next_step_is_fine(packed: PackedStore, obedient: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        ring = StagingRing(client.table(V41), entries=ENTRIES, slots=1)
        reader = GraphReader(ring, "cpu", polls=3)
        for way, step in (("pull", 1), ("deliver", 3)):
            first, second = (random_keys(oracle, ENTRIES, seed=50 + step + n) for n in range(2))
            with ring.start(step, first) as staged:
                reader.deliver(staged, timeout=30)
                reader.check(staged)
            obedient.ask("hold")
            with ring.start(step + 1, second) as staged:
                if way == "pull":
                    reader.expect(staged)
                    reader.pull(None, staged.slot)
                else:
                    with pytest.raises(errors.DeadlineExceeded):
                        reader.deliver(staged, timeout=0.01)
                with pytest.raises(errors.DeadlineExceeded, match="do not use what it made"):
                    reader.check(staged)
                assert reader.words()[0] == NOBODY and reader.dead()[0].all()
                obedient.ask("release")
                staged.wait(timeout=30)
                reader.pull(None, staged.slot)  # replayed
                reader.check(staged)
                assert np.array_equal(reader.rows()[0].numpy(), oracle.lookup_ngrams(second))


def test_a_step_of_layers_is_delivered_in_stream_order(
    packed: PackedStore, roomy: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_reader, "side_stream", LateSideStream)
    with connect(roomy.unix) as client:
        tables = {1: client.table(V41), 5: client.table(V41), 14: client.table(V41_14)}
        steps = StepPrefetcher(tables, np.array([0, 1, 1, 2]))
        ring = StagingRing(steps, entries=ENTRIES)
        reader = GraphReader(ring, "cpu")
        assert reader.rows(1) is reader.rows(5) is not reader.rows(14)  # one table, one memory
        tokens = np.random.default_rng(52).integers(0, 4, (3, 4))
        with ring.start(7, tokens) as staged:
            reader.deliver(staged, timeout=30)
            reader.check(staged)
            for layer, name in ((1, V41), (14, V41_14)):
                expected = packed.oracles[name].lookup_ngrams(steps.mapping.ngram_keys(tokens, layer))
                rows = reader.rows(layer)[staged.slot, :12]
                assert np.array_equal(rows.numpy(), expected.reshape(rows.shape))
        with pytest.raises(errors.BadRequest, match="layer 2 is not in this ring"):
            reader.rows(2)
        with pytest.raises(errors.BadRequest, match="polls"):
            GraphReader(ring, "cpu", polls=0)
