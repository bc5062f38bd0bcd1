"""The late disk is a page reader like any other, and each of its reads begins late."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tierbench.late_reader import late

from engram_client.deadline import Deadline
from tierstore.devices.base import PageReader
from tierstore.devices.pread import PreadReader
from tierstore.testing.page_reader_suite import SOON, PageReaderSuite, pages_buffer, start


class TestLateReader(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return late(PreadReader(4), 0.001)


def test_each_read_begins_after_the_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").write_bytes(b"x" * 4096)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    fd, reader = os.open(tmp_path / "page", os.O_RDONLY), late(PreadReader(1), 3600)
    try:
        for count in (1, 2):
            buffer = pages_buffer(1)
            start(reader, fd, [0], [1], [0], buffer).wait(Deadline.after(SOON))
            assert slept == [3600] * count
            assert (buffer.reshape(-1).view("uint8")[:4096] == ord("x")).all()
    finally:
        reader.close()
        os.close(fd)
