"""An HBM arena full of records that tell whose they are, and what the sections measure against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import DataCorrupt
from engram_client.hbm.arena import HbmArena
from engram_client.hbm.operations import Keys
from engram_client.spec import Field, RowLayout
from tierbench.gpu.device import finish

ROW_BYTES, HEADS, ORDERS = 264, 8, 3  # DeepSeek-V4.1's
RECORD_BYTES = ROW_BYTES * HEADS
RECORD_WORDS = RECORD_BYTES // 8
LAYOUT = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)), None)
FILL = 0.75  # of the slots are offered a record
BATCHES = 8
WAITS = ("Synchronize", "Memcpy DtoH", "EventQuery")


def records_of(keys: Tensor) -> Tensor:
    """Bytes that tell whose they are: uint8 [n, RECORD_BYTES] of keys int64 [n]."""
    return (keys.unsqueeze(1) ^ torch.arange(RECORD_WORDS, device=keys.device)).view(torch.uint8)


class FilledHbm:
    """An arena of `arena_bytes`, and the keys it holds, int64 [held], all of owner 0."""

    def __init__(self, arena_bytes: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.arena = HbmArena(RECORD_BYTES, arena_bytes, device)
        random = np.random.default_rng(seed)
        offered = torch.from_numpy(random.integers(0, 2**63 - 1, int(self.arena.slots * FILL), np.int64))
        parts = [part.to(device) for part in offered.split(max(1, self.arena.slots // 16))]
        for keys in parts:
            self.arena.admit(keys, torch.zeros_like(keys, dtype=torch.int16), records_of(keys))
        self.keys = torch.cat([self._held(keys) for keys in parts])

    def _held(self, keys: Tensor) -> Tensor:
        out = torch.empty((len(keys), RECORD_BYTES), dtype=torch.uint8, device=self.device)
        found = self.look_up(keys, out)
        missing = found[1 : 1 + 2 * int(found[0])].view(-1, 2)[:, 0]
        here = torch.ones_like(keys, dtype=torch.bool)
        here[missing] = False
        return keys[here]

    def look_up(self, keys: Tensor, out: Tensor) -> Tensor:
        """What was missing, as `HbmArena.lookup_into` lists it."""
        found = torch.empty(3 + 2 * len(keys), dtype=torch.int64, device=self.device)
        self.arena.lookup_into(Keys(keys, 0, 1), out, found)
        return found

    def batches(self, records: int, seed: int) -> list[Tensor]:
        """Keys of random records that are all there; checks the bytes of the first batch."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (BATCHES, records)
        picks = torch.randint(len(self.keys), shape, device=self.device, generator=generator)
        batches = [self.keys[pick] for pick in picks]
        out = torch.empty((records, RECORD_BYTES), dtype=torch.uint8, device=self.device)
        found = self.look_up(batches[0], out)
        if int(found[0]) or not torch.equal(out, records_of(batches[0])):
            raise DataCorrupt(f"the HBM tier on {self.device} gave other bytes than were put in")
        return batches


def host_waits(device: torch.device, call: Callable[[], object]) -> dict[str, Any]:
    """Whether a call makes the host wait for a GPU: as torch's debug mode says, and as a profile shows.

    {"host_waits": "none", or what waits, or "not a GPU", "kernels": names of what it launched}
    """
    if device.type != "cuda":
        return {"host_waits": "not a GPU", "kernels": []}
    call()
    finish(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return {"host_waits": str(error).partition("\n")[0], "kernels": []}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = [event.name for event in profile.events()]
    found = sorted({name for name in names if any(wait in name for wait in WAITS)} - _ITS_OWN)
    kernels = [event.name for event in profile.events() if "CUDA" in str(event.device_type)]
    return {"host_waits": ", ".join(found) or "none", "kernels": kernels}


_ITS_OWN = {"cudaDeviceSynchronize"}  # the profiler waits for the device when it stops
