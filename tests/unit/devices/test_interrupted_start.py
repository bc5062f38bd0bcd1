"""A signal in the middle of starting a read: whoever keeps the buffer knows of the read all the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engram_client.deadline import Deadline
from engram_client.errors import DeadlineExceeded
from tests.support.idle_reader import IdleReader
from tierstore.devices.job_table import PLACES
from tierstore.kernels import jobs
from tierstore.tiers.staging import BUFFERS_MAX, Staging, StagingPool

SOON = 60.0  # only a net


@pytest.fixture
def reader() -> Iterator[IdleReader]:
    reader = IdleReader()
    yield reader
    reader.close()


@contextmanager
def interrupting(monkeypatch: pytest.MonkeyPatch, *, before: bool) -> Iterator[None]:
    """Ctrl-C is noticed just before the workers are told of a read, or just after."""
    real = jobs.open_job

    def open_job(*arguments: Any) -> None:
        if not before:
            real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "open_job", open_job)
        try:
            yield
        except KeyboardInterrupt:
            return
    raise AssertionError("no read was started")


def start(reader: IdleReader, staging: Staging, pages: np.ndarray) -> None:
    ring = staging.ring.ctypes.data
    reader.start(0, pages, np.ones_like(pages), pages, ring, hint=False, reads=staging.reads)


def free_buffers(pool: StagingPool) -> int:
    """How many can be taken now."""
    with pool.take(Deadline.after(0)):
        try:
            return 1 + free_buffers(pool)
        except DeadlineExceeded:
            return 1


def test_what_nobody_has_claimed_is_not_read(reader: IdleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, pages = StagingPool(1 << 20, 4096), np.arange(4)
    with interrupting(monkeypatch, before=False), pool.take(Deadline.after(SOON)) as staging:
        start(reader, staging, pages)
    assert jobs.claim_run(reader.address, PLACES, 0) == (-1, 0)
    assert free_buffers(pool) == BUFFERS_MAX


def test_its_arrays_and_its_buffer_are_kept_until_it_has_ended(
    reader: IdleReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, pages = StagingPool(1 << 20, 4096), np.arange(4)
    kept = weakref.ref(pages)
    real_withdraw = jobs.withdraw

    def claim_and_withdraw(table: int, place: int) -> None:
        jobs.claim_run(table, PLACES, 0)  # a worker was quicker
        real_withdraw(table, place)

    monkeypatch.setattr(jobs, "withdraw", claim_and_withdraw)
    with interrupting(monkeypatch, before=False), pool.take(Deadline.after(SOON)) as staging:
        start(reader, staging, pages)
    del pages, staging
    gc.collect()
    assert kept() is not None, "a worker reads these numbers"
    assert free_buffers(pool) == BUFFERS_MAX - 1, "a worker reads into this buffer"
    jobs.end_run(jobs.job_at(reader.address, 0), 0, jobs.LANDED)
    assert pool.drain(SOON)
    gc.collect()
    assert kept() is None
    assert free_buffers(pool) == BUFFERS_MAX


def test_one_that_was_not_begun_leaves_nothing_behind(
    reader: IdleReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, pages = StagingPool(1 << 20, 4096), np.arange(4)
    for _ in range(2 * PLACES):
        with interrupting(monkeypatch, before=True), pool.take(Deadline.after(SOON)) as staging:
            start(reader, staging, pages)
    assert free_buffers(pool) == BUFFERS_MAX
