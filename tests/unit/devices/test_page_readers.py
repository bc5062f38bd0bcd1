"""Every page reader through the shipped suite, and what only one of them does."""

import errno
import os

import numpy as np
import pytest

from engram_client.deadline import Deadline
from engram_client.errors import StorageError
from tierstore.devices import opening
from tierstore.devices.base import PageReader
from tierstore.devices.opening import open_reader
from tierstore.devices.pread import PreadReader
from tierstore.devices.ring import Ring
from tierstore.devices.uring import UringReader
from tierstore.testing.device import SimulatedDevice
from tierstore.testing.page_reader_suite import SOON, PageReaderSuite, pages_buffer, start


def uring_allowed() -> bool:
    try:
        Ring(2).close()
        return True
    except OSError:
        return False


needs_uring = pytest.mark.skipif(not uring_allowed(), reason="io_uring is not allowed here")


class TestOnePreadThread(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return PreadReader(1)


class TestManyPreadThreads(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return PreadReader(32)


@needs_uring
class TestShallowRing(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return UringReader(1)


@needs_uring
class TestDeepRing(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return UringReader(64)


class TestFaultlessDevice(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return SimulatedDevice(PreadReader(4))


def test_a_read_somebody_waits_for_overtakes_hints(tmp_path):
    """One thread, a long hint, then a demand: the demand must not wait for the hint's last run."""
    pages = 20_000
    with open(tmp_path / "pages", "wb") as file:
        file.truncate(pages * 4096)
    fd = os.open(tmp_path / "pages", os.O_RDONLY)
    reader = PreadReader(1)
    try:
        slots = np.zeros(pages)  # all into one slot: what is read does not matter here
        buffer = pages_buffer(2)
        hint = start(reader, fd, np.arange(pages), np.ones(pages), slots, buffer, hint=True)
        start(reader, fd, [1], [1], [1], buffer).wait(Deadline.after(SOON))
        assert not hint.ended()
        hint.wait(Deadline.after(SOON))
    finally:
        reader.close()
        os.close(fd)


def refuse_rings(monkeypatch, number):
    def refuse(depth, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tierstore.devices.ring._setup", refuse)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_without_io_uring_threads_read_and_it_is_said(monkeypatch, caplog, number):
    refuse_rings(monkeypatch, number)
    reader = open_reader("auto", queue_depth=8, threads=2)
    try:
        assert isinstance(reader, PreadReader)
        assert "io_uring is not available" in caplog.text
        assert len(caplog.records) == 1
    finally:
        reader.close()


def test_io_uring_asked_for_and_refused_is_an_error(monkeypatch):
    refuse_rings(monkeypatch, errno.EPERM)
    with pytest.raises(StorageError, match="seccomp"):
        open_reader("io_uring", queue_depth=8, threads=2)


def test_engines_are_what_was_asked_for():
    reader = opening.open_reader("pread", queue_depth=8, threads=3)
    assert isinstance(reader, PreadReader)
    reader.close()
