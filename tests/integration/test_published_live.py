"""A real daemon follows what training publishes: readers get rows of one step or the other, never a mix."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from engram_client import Client, connect
from tests.support.daemon import Daemon, running, serve_command
from tests.support.stores import eventually
from tests.support.trained_steps import PLAIN, all_rows, made_store
from tierstore.cli import main
from tierstore.snapshots import open_step

ROWS = 3001


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that serves step 0 of the store in tmp_path / "trained", and is told that it may keep both."""
    trained = made_store(tmp_path / "trained", optimizer="sgd")
    publish(tmp_path, trained, 0)
    command = serve_command(
        tmp_path / "served", serve_unix=tmp_path / "s", serve_tcp="127.0.0.1:0",
        serve_earlier_generation_s=3600, dram_budget_bytes="2MiB", nvme_staging_bytes="2MiB",
        nvme_read_threads=4,
    )  # fmt: skip
    with running(command, tmp_path) as daemon:
        yield daemon


def publish(folder: Path, trained: Path, step: int) -> None:
    arguments = ["--table", PLAIN, "--step", str(step), "--quiet"]
    assert main(["publish", str(trained), str(folder / "served"), *arguments]) == 0


def rows_of_step(trained: Path, step: int) -> np.ndarray:
    with open_step(trained, step) as opened:
        return all_rows(opened, 2)


def generation_of(client: Client) -> str:
    return client.table(PLAIN).spec.generation


def test_readers_move_from_step_to_step_and_back(live: Daemon, tmp_path: Path) -> None:
    """Each batch is wholly of the step whose generation was asked for; the old one answers all along."""
    steps = [rows_of_step(tmp_path / "trained", step) for step in (0, 2)]
    changed = np.flatnonzero((steps[0] != steps[1]).any(axis=1))
    assert changed.size > 50
    done = Event()
    with connect(live.unix) as near, connect(live.tcp) as far, ThreadPoolExecutor(2) as threads:
        of_generation = {generation_of(near): steps[0]}
        first = near.table(PLAIN)

        def read(client: Client, seen: set[str]) -> None:
            """Batches of the generation that is current, and which these were."""
            rng = np.random.default_rng(1)
            while not done.is_set():
                table = client.table(PLAIN)
                generation = table.spec.generation
                ids = np.concatenate([rng.choice(changed, 40), rng.integers(0, ROWS, 20)])
                found = table.lookup(ids)
                if generation not in of_generation:  # it was taken up before this test was told so
                    continue
                np.testing.assert_array_equal(found, of_generation[generation][ids])
                seen.add(generation)

        seen: list[set[str]] = [set(), set()]
        reading = [threads.submit(read, *each) for each in zip((near, far), seen, strict=True)]

        def have_all_read(generation: str) -> bool:
            return all(generation in each for each in seen) or any(thread.done() for thread in reading)

        try:
            old = generation_of(near)
            assert eventually(lambda: have_all_read(old))
            publish(tmp_path, tmp_path / "trained", 2)
            assert generation_of(near) == old, "only when told to"
            live.signal(signal.SIGHUP)
            assert eventually(lambda: generation_of(near) != old)
            new = generation_of(near)
            of_generation[new] = steps[1]
            np.testing.assert_array_equal(near.table(PLAIN).lookup(np.arange(ROWS)), steps[1])
            np.testing.assert_array_equal(first.lookup(np.arange(ROWS)), steps[0])
            later = near.table(PLAIN)
            assert eventually(lambda: have_all_read(new))
            for generations in seen:
                generations.discard(old)
            assert main(["rollback", str(tmp_path / "served"), PLAIN]) == 0
            live.signal(signal.SIGHUP)
            assert eventually(lambda: generation_of(near) == old)
            assert eventually(lambda: have_all_read(old))
            for table, expected in ((near.table(PLAIN), steps[0]), (later, steps[1]), (first, steps[0])):
                np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), expected)
        finally:
            done.set()
        for thread in reading:
            thread.result(60)
