"""What every page reader must do; subclass it in a test file and say how to make one.

    class TestMyReader(PageReaderSuite):
        def make_reader(self) -> PageReader: ...

Pages of the test file hold their own number, so a page that lands in the wrong place shows.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram_client.deadline import Deadline
from engram_client.errors import Unavailable
from tierstore.devices.base import PageRead, PageReader, PageReadFailed, PageStream
from tierstore.format.direct import aligned_bytes
from tierstore.kernels import jobs

PAGES = 512
PAGE_WORDS = 512
SOON = 60.0  # only a net under a reader that hangs


class PageReaderSuite:
    """Tests of one implementation of `PageReader`."""

    def make_reader(self) -> PageReader:
        raise AssertionError("say how to make the reader")

    @pytest.fixture
    def reader(self) -> Iterator[PageReader]:
        reader = self.make_reader()
        yield reader
        reader.close()

    @pytest.fixture
    def fd(self, tmp_path: Path) -> Iterator[int]:
        numbers = np.repeat(np.arange(PAGES, dtype=np.uint64), PAGE_WORDS)
        (tmp_path / "pages").write_bytes(numbers.tobytes())
        fd = os.open(tmp_path / "pages", os.O_RDONLY)
        yield fd
        os.close(fd)

    def test_runs_land_in_their_slots(self, reader: PageReader, fd: int) -> None:
        rng = np.random.default_rng(1)
        for _ in range(50):
            counts = rng.integers(1, 9, 40)
            firsts = rng.integers(0, PAGES - 8, 40)
            slots = rng.permutation(40) * 8
            buffer = pages_buffer(320)
            start(reader, fd, firsts, counts, slots, buffer).wait(Deadline.after(SOON))
            expect_runs(buffer, firsts, counts, slots)

    def test_more_requests_than_can_be_open_at_once(self, reader: PageReader, fd: int) -> None:
        buffer = pages_buffer(1)
        for page in range(300):
            start(reader, fd, [page], [1], [0], buffer).wait(Deadline.after(SOON))
            assert (buffer[0] == page).all()

    def test_concurrent_requests_do_not_mix(self, reader: PageReader, fd: int) -> None:
        failures: list[BaseException] = []

        def ask(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    firsts, slots = rng.integers(0, PAGES, 24), rng.permutation(24)
                    buffer = pages_buffer(24)
                    start(reader, fd, firsts, np.ones(24), slots, buffer).wait(Deadline.after(SOON))
                    expect_runs(buffer, firsts, np.ones(24, int), slots)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_the_end_of_the_file_is_an_error_that_names_the_page(self, reader: PageReader, fd: int) -> None:
        buffer = pages_buffer(4)
        read = start(reader, fd, [3, PAGES - 1], [1, 2], [0, 1], buffer)
        with pytest.raises(PageReadFailed) as caught:
            read.wait(Deadline.after(SOON))
        assert caught.value.page == PAGES
        assert caught.value.errno == errno.EIO
        assert read.ended()

    def test_a_failed_read_fails_only_its_request(self, reader: PageReader, fd: int) -> None:
        buffer = pages_buffer(2)
        bad = start(reader, 999_999, [0], [1], [1], buffer)
        start(reader, fd, [7], [1], [0], buffer).wait(Deadline.after(SOON))
        assert (buffer[0] == 7).all()
        with pytest.raises(PageReadFailed) as caught:
            bad.wait(Deadline.after(SOON))
        assert caught.value.errno == errno.EBADF

    def test_a_withdrawn_read_ends(self, reader: PageReader, fd: int) -> None:
        buffer = pages_buffer(PAGES)
        every = np.arange(PAGES)
        read = start(reader, fd, every, np.ones(PAGES), every, buffer, hint=True)
        read.withdraw()
        read.wait(Deadline.after(SOON))
        assert read.ended()
        landed = buffer[:, 0] == every  # page 0 looks landed either way
        assert (buffer[landed] == every[landed, None]).all(), "a page landed in part"

    def test_waiting_past_the_deadline_leaves_a_read_that_ends(self, reader: PageReader, fd: int) -> None:
        buffer = pages_buffer(PAGES)
        read = start(reader, fd, np.arange(PAGES), np.ones(PAGES), np.arange(PAGES), buffer)
        try:
            read.wait(Deadline.after(0))
        except TimeoutError:
            read.withdraw()
            deadline = Deadline.after(SOON)
            while not read.ended():
                deadline.check("waiting for a withdrawn read to end")

    def test_closing_ends_what_was_started(self, fd: int) -> None:
        reader = self.make_reader()
        buffer = pages_buffer(64)
        read = start(reader, fd, np.arange(64), np.ones(64), np.arange(64), buffer)
        waiter = threading.Thread(target=read.wait, args=(Deadline.after(SOON),))
        waiter.start()
        waiter.join()
        reader.close()
        expect_runs(buffer, np.arange(64), np.ones(64, int), np.arange(64))
        with pytest.raises(Unavailable):
            start(reader, fd, [0], [1], [0], buffer).wait(Deadline.after(SOON))

    def test_a_stream_reads_through_fewer_slots_than_it_has_runs(self, reader: PageReader, fd: int) -> None:
        ring, fates, buffer = 8, np.zeros(PAGES, np.uint32), pages_buffer(8)
        pages = np.random.default_rng(3).permutation(PAGES)
        stream = start_stream(reader, fd, pages, np.arange(PAGES) % ring, buffer, ring, fates)
        table, job, workers = stream.words
        for run, page in enumerate(pages):
            landed(stream, fates, run)
            assert (buffer[run % ring] == page).all(), f"run {run}"
            assert not fates[run + ring :].any(), "a run beyond the limit was read"
            jobs.raise_limit(table, job, min(run + 1 + ring, PAGES), workers)
        stream.wait(Deadline.after(SOON))
        assert stream.ended()

    def test_a_run_of_a_stream_fails_alone(self, reader: PageReader, fd: int) -> None:
        fates, buffer = np.zeros(4, np.uint32), pages_buffer(4)
        stream = start_stream(reader, fd, [5, PAGES, 6, 7], np.arange(4), buffer, 4, fates)
        for run in range(4):
            landed(stream, fates, run)
        assert fates.tolist() == [jobs.LANDED, jobs.FAILED, jobs.LANDED, jobs.LANDED]
        assert buffer[[0, 2, 3], 0].tolist() == [5, 6, 7]

    def test_a_withdrawn_stream_ends(self, reader: PageReader, fd: int) -> None:
        fates, buffer = np.zeros(PAGES, np.uint32), pages_buffer(8)
        stream = start_stream(reader, fd, np.arange(PAGES), np.arange(PAGES) % 8, buffer, 8, fates)
        landed(stream, fates, 0)
        stream.withdraw()
        deadline = Deadline.after(SOON)
        while not stream.ended():
            deadline.check("waiting for a withdrawn stream to end")
        assert not fates[8:].any()


def start_stream(
    reader: PageReader,
    fd: int,
    pages: object,
    slots: object,
    buffer: np.ndarray,
    limit: int,
    fates: np.ndarray,
) -> PageStream:
    first_pages, places = np.array(pages, np.int64), np.array(slots, np.int64)
    ones = np.ones_like(first_pages)
    return reader.stream(
        fd, first_pages, ones, places, buffer.ctypes.data, hint=False, reads=[], limit=limit, fates=fates
    )


def landed(stream: PageStream, fates: np.ndarray, run: int) -> None:
    """Wait until a run has ended, one way or the other."""
    deadline = Deadline.after(SOON)
    while fates[run] == jobs.UNREAD:
        stream.advance(deadline)
        os.sched_yield()


def start(
    reader: PageReader,
    fd: int,
    firsts: object,
    counts: object,
    slots: object,
    buffer: np.ndarray,
    hint: bool = False,
) -> PageRead:
    first_pages, page_counts, places = (np.array(a, np.int64) for a in (firsts, counts, slots))
    reads: list[PageRead] = []
    read = reader.start(fd, first_pages, page_counts, places, buffer.ctypes.data, hint=hint, reads=reads)
    assert reads == [read], "whoever keeps the buffer must know of what is read into it"
    return read


def pages_buffer(pages: int) -> np.ndarray:
    return aligned_bytes(pages * 4096).view(np.uint64).reshape(pages, PAGE_WORDS)


def expect_runs(buffer: np.ndarray, firsts: np.ndarray, counts: np.ndarray, slots: np.ndarray) -> None:
    for first, count, slot in zip(firsts, counts, slots, strict=True):
        expected = np.arange(first, first + count, dtype=np.uint64)
        assert (buffer[slot : slot + count] == expected[:, None]).all(), f"run {first}+{count} in slot {slot}"
