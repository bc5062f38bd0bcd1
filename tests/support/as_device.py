"""CPU tensors taken for a device's, with side streams that work as late as they may."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import engram_client.arrays
import engram_client.table
from engram_client.arrays import is_tensor
from engram_client.gpu import carrier
from tests.support.late_stream import LateSideStream


@pytest.fixture
def tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every torch tensor takes the ways of one on a device."""
    monkeypatch.setattr(engram_client.arrays, "on_device", is_tensor)
    monkeypatch.setattr(engram_client.table, "on_device", is_tensor)
    monkeypatch.setattr(carrier, "side_stream", LateSideStream)
    monkeypatch.setattr(carrier, "_carriers", {})
    yield
    LateSideStream.made.clear()
