"""A group of kernels is tried once, and what fails its trial never serves; it is said once, in words."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch

from engram_client.errors import BadRequest
from engram_client.gpu import KernelGroup, as_device, out_of_memory, probe

GPU = torch.device("cuda", 0)  # a name only: nothing is put there
CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU that Triton compiles for, and no capture under way."""
    monkeypatch.setattr(probe, "triton_missing", lambda device: None)
    monkeypatch.setattr(probe, "capturing", lambda device: False)
    monkeypatch.setattr(probe, "made_current", lambda device: nullcontext())


@pytest.mark.usefixtures("compiled")
class TestTrials:
    @pytest.mark.parametrize("error", [RuntimeError("no C compiler\nsee the log"), AssertionError("differs")])
    def test_what_fails_is_said_once(self, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
        tried = []

        def trial(device: torch.device) -> None:
            tried.append(device)
            raise error

        group = KernelGroup("probing", "a dozen small operations a call", trial)
        with caplog.at_level(logging.WARNING):
            assert [group.serves(GPU) for _ in range(3)] == [False] * 3
        assert tried == [GPU]
        (line,) = caplog.messages
        assert str(error).partition("\n")[0] in line
        assert "a dozen small operations a call" in line and "see the log" not in line

    def test_each_device_is_tried(self) -> None:
        tried = []
        group = KernelGroup("probing", "", tried.append)
        other = torch.device("cuda", 1)
        assert all(group.serves(device) for device in (GPU, other, GPU))
        assert tried == [GPU, other]

    def test_no_trial_while_a_graph_is_captured(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        group = KernelGroup("probing", "slow", lambda device: None)
        monkeypatch.setattr(probe, "capturing", lambda device: True)
        with caplog.at_level(logging.WARNING):
            assert not group.serves(GPU) and not group.serves(GPU)
        assert len(caplog.messages) == 1 and "before capturing" in caplog.text
        monkeypatch.setattr(probe, "capturing", lambda device: False)
        assert group.serves(GPU)  # the capture has settled nothing


def test_no_kernels_for_cpu_tensors(caplog: pytest.LogCaptureFixture) -> None:
    def trial(device: torch.device) -> None:
        raise AssertionError("was tried")

    with caplog.at_level(logging.WARNING):
        assert not KernelGroup("probing", "", trial).serves(CPU)
    assert not caplog.messages  # nobody expects them there


def test_why_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert "tierstore[gpu]" in (probe.triton_missing(GPU) or "")
    assert "not for Triton" in (probe.triton_missing(CPU) or "")


def test_devices() -> None:
    assert as_device("cpu") == CPU
    with pytest.raises(BadRequest, match="device nonsense cannot be used"):
        as_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match="cuda cannot be used"):
            as_device("cuda")


def test_what_is_want_of_memory() -> None:
    """Of torch's allocator, of the driver, and of Triton as it loads a kernel; nothing else is."""
    wanting = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "can't allocate memory: 8")
    assert all(out_of_memory(RuntimeError(text)) for text in wanting)
    assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(ValueError("out of memory"))
