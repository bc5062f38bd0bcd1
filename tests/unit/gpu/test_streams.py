"""Side streams, events and pinned memory on a CPU: in order, and with a double that is late."""

from __future__ import annotations

import mmap
import threading
from functools import partial

import pytest
import torch

from engram_client.errors import BadRequest, DeadlineExceeded
from engram_client.gpu import PinnedRing, pinned_bytes, record_current, side_stream, streams
from engram_client.gpu.streams import HostSideStream, SideStream
from tests.support.late_stream import LateSideStream

CPU = torch.device("cpu")


def copy(there: torch.Tensor, here: torch.Tensor) -> None:
    there.copy_(here)


@pytest.fixture(params=[HostSideStream, LateSideStream])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SideStream:
    monkeypatch.setattr(streams, "HostSideStream", request.param)
    return side_stream(CPU)


def test_work_is_seen_by_who_waits(side: SideStream) -> None:
    here, there = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    side.wait_for(record_current(CPU))
    side.run(partial(copy, there, here), uses=(here, there))
    event = side.record()
    event.block_current(CPU)
    assert event.done() and there.tolist() == [0, 1, 2, 3]
    event.synchronize()


def test_the_double_is_late() -> None:
    side, there = LateSideStream(CPU), torch.zeros(1)
    side.run(partial(copy, there, torch.tensor([7.0])))
    first = side.record()
    side.run(partial(copy, there, torch.tensor([8.0])))
    assert not first.done() and there.item() == 0
    first.synchronize()
    assert first.done() and not side.record().done() and there.item() == 7
    other = LateSideStream(CPU)
    other.wait_for(side.record())
    other.record().synchronize()
    assert there.item() == 8


def test_plain_memory_is_aligned() -> None:
    for size_bytes in (1, 4096, 5000):
        memory = pinned_bytes(size_bytes, CPU)
        assert memory.shape == (size_bytes,) and memory.data_ptr() % mmap.PAGESIZE == 0


class TestRing:
    def test_a_buffer_is_reused_once_its_copy_has_ended(self) -> None:
        ring, side = PinnedRing(CPU, buffers=2, buffer_bytes=8), LateSideStream(CPU)
        out = torch.zeros((5, 8), dtype=torch.uint8)
        for number in range(5):
            with ring.take() as buffer:
                buffer.memory.fill_(number)  # would change what is not copied yet
                memory = buffer.memory
                side.run(partial(copy, out[number], memory))
                buffer.busy_until(side.record())
        side.record().synchronize()
        assert out[:, 0].tolist() == [0, 1, 2, 3, 4]

    def test_it_is_bounded(self) -> None:
        ring = PinnedRing(CPU, buffers=1, buffer_bytes=8)
        held = ring.take()
        with pytest.raises(DeadlineExceeded, match="all 1 staging buffers of 8 bytes were in use for 0 s"):
            ring.take(timeout_s=0)
        taken: list[int] = []
        waiting = threading.Thread(target=lambda: taken.append(ring.take(timeout_s=20).memory.data_ptr()))
        waiting.start()
        address = held.memory.data_ptr()
        held.give_back()
        held.give_back()
        waiting.join()
        assert taken == [address]

    def test_a_failed_fill_gives_its_buffer_back(self) -> None:
        ring = PinnedRing(CPU, buffers=1, buffer_bytes=8)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), ring.take(timeout_s=0):
                raise ZeroDivisionError

    def test_nonsense(self) -> None:
        with pytest.raises(BadRequest, match="at least a byte"):
            PinnedRing(CPU, buffers=0, buffer_bytes=8)
