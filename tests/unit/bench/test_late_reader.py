"""The late disk is a page reader like any other, and it is late."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tierbench.late_reader import LateReader

from engram_client.deadline import Deadline
from engram_client.errors import DeadlineExceeded
from tierstore.devices.base import PageReader
from tierstore.devices.pread import PreadReader
from tierstore.testing.page_reader_suite import PageReaderSuite, pages_buffer, start


class TestLateReader(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return LateReader(PreadReader(4), 0.001)


def test_what_is_there_already_is_not_handed_out_before_its_time(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"x" * 4096)
    fd, reader, buffer = (
        os.open(tmp_path / "page", os.O_RDONLY),
        LateReader(PreadReader(1), 3600),
        pages_buffer(1),
    )
    try:
        read = start(reader, fd, [0], [1], [0], buffer)
        while not read.ended():
            pass
        with pytest.raises(DeadlineExceeded, match="late"):
            read.wait(Deadline.after(0.01))
    finally:
        reader.close()
        os.close(fd)
