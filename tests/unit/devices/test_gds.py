"""GPUDirect Storage: the probe never hangs or dies, and the reader is a page reader like the others."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from engram_client.deadline import Deadline
from tests.support.kvikio_stand_in import FailingCuFile, HangingCuFile, HostCuFile
from tierstore.devices import gds_probe
from tierstore.devices.base import PageReader, PageReadFailed
from tierstore.devices.gds import FILES_MAX, CuFiles, GdsReader
from tierstore.devices.gds_probe import GdsProbe, probe_gds
from tierstore.testing.page_reader_suite import SOON, PageReaderSuite, pages_buffer, start


class TestGdsReader(PageReaderSuite):
    """Over a stand-in for kvikio whose device memory is the host's."""

    def make_reader(self) -> PageReader:
        return GdsReader(HostCuFile, threads=4)


class TestGdsReaderOfShortReads(PageReaderSuite):
    def make_reader(self) -> PageReader:
        return GdsReader(lambda path: HostCuFile(path, short=1000), threads=2)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def test_a_read_that_fails_names_its_page_and_is_said_once(
    page: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = GdsReader(FailingCuFile, threads=1)
    with open(page, "rb") as file, caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(PageReadFailed) as caught:
                start(reader, file.fileno(), [0], [1], [0], pages_buffer(1)).wait(Deadline.after(SOON))
            assert (caught.value.page, caught.value.errno) == (0, errno.EIO)
    reader.close()
    assert len(caplog.messages) == 1 and "not happy" in caplog.text


def test_a_read_that_hangs_is_given_up_and_closing_does_not_wait_for_it(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierstore.devices.gds.CLOSE_TIMEOUT_S", 0.01)
    HostCuFile.opened.clear()
    reader = GdsReader(HangingCuFile, threads=1)
    buffer = pages_buffer(1)
    with open(page, "rb") as file:
        read = start(reader, file.fileno(), [0], [1], [0], buffer)
        with pytest.raises(TimeoutError):
            read.wait(Deadline.after(0.05))
        assert not read.ended()
        reader.close()
        (hanging,) = HostCuFile.opened
        assert isinstance(hanging, HangingCuFile) and not hanging.closed
        hanging.let_go.set()
        deadline = Deadline.after(SOON)
        while not read.ended():
            deadline.check("waiting for a read that hung")
    assert bytes(buffer.view(np.uint8)[0]) == page.read_bytes()


def test_files_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    """A descriptor's number comes back for another file; so few are kept open."""
    files = CuFiles(HostCuFile)
    HostCuFile.opened.clear()
    count = FILES_MAX + 3
    for number in range(count):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 4096)
        fd = os.open(path, os.O_RDONLY)
        with files.file(fd) as file:
            buffer = pages_buffer(1)
            told = {"typestr": "|u1", "shape": (4096,), "data": (buffer.ctypes.data, False)}
            file.raw_read(type("Buffer", (), {"__cuda_array_interface__": told}), 4096, 0, 0)
        os.close(fd)
        assert (buffer.view(np.uint8) == number).all()
    assert [file.closed for file in HostCuFile.opened] == [True] * 3 + [False] * FILES_MAX
    files.close()
    assert all(file.closed for file in HostCuFile.opened)


class TestProbe:
    """`libcuda` and kvikio are there as far as the parent can see; the child is one of ours."""

    @pytest.fixture(autouse=True)
    def seemingly_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(gds_probe.ctypes, "CDLL", lambda name: None)
        monkeypatch.setattr(gds_probe.importlib.util, "find_spec", lambda name: "there")
        monkeypatch.setattr(gds_probe, "CHILD", "gds_test_child")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        self.child = tmp_path / "gds_test_child.py"

    def probed(self, page: Path, child: str, timeout_s: float = 60) -> GdsProbe:
        self.child.write_text(child)
        return probe_gds(page, 0, timeout_s)

    @pytest.mark.parametrize("state", ["gds", "compat", "none"])
    def test_what_the_child_says_counts_and_only_gds_is_gds(self, page: Path, state: str) -> None:
        answer = json.dumps({"state": state, "reason": "because"})
        found = self.probed(page, f"print('noise of a library')\nprint({answer!r})")
        assert (found.state, found.reason, found.usable) == (state, "because", state == "gds")

    def test_compatibility_mode_is_forbidden_to_the_child(self, page: Path) -> None:
        child = (
            "import json, os, sys\n"
            "print(json.dumps({'state': 'none', 'reason': os.environ['KVIKIO_COMPAT_MODE'] + sys.argv[2]}))"
        )
        assert self.probed(page, child).reason == "OFF0"

    def test_a_child_that_hangs_is_killed(self, page: Path, tmp_path: Path) -> None:
        child = (
            f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
        )
        found = self.probed(page, child, timeout_s=1.0)
        assert found.state == "none" and "did not answer within 1 s (hbm.gds_probe_timeout_s)" in found.reason
        if (tmp_path / "pid").exists():  # on a machine that is busy it may not have come so far
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / "pid").read_text() or -1), 0)

    @pytest.mark.parametrize(
        ("child", "told"),
        [
            ("import os\nos.abort()", "exit code -6: it said nothing"),
            ("raise SystemExit('no driver fits')", "exit code 1: no driver fits"),
            ("print('{}')", "exit code 0: it said nothing"),
        ],
    )
    def test_a_child_that_dies_is_an_answer(self, page: Path, child: str, told: str) -> None:
        found = self.probed(page, child)
        assert found.state == "none" and told in found.reason

    def test_without_kvikio(self, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gds_probe.importlib.util, "find_spec", lambda name: None)
        assert "kvikio is not installed" in probe_gds(page, 0, 60).reason


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="there is a driver")
def test_without_a_driver_nothing_is_imported(page: Path) -> None:
    found = probe_gds(page, 0, 60)
    assert found.state == "none" and "no CUDA driver" in found.reason
    assert "kvikio" not in sys.modules


def test_the_real_child_says_what_is_missing(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch or kvikio or a GPU is missing it answers in words, in every case."""
    monkeypatch.setattr(gds_probe.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(gds_probe.importlib.util, "find_spec", lambda name: "there")
    found = probe_gds(page, 0, 60)
    assert found.state in ("gds", "compat", "none") and found.reason
