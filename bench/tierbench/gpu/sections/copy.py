"""The device's own copy bandwidth: within it, to it from pinned and pageable memory, and back.

Within a device each byte counts twice, as it is read and written; over the bus once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tierbench.alternate import alternate
from tierbench.gpu.device import bytes_per_s
from tierbench.gpu.scale import Scale
from tierbench.record import summarize

TIMEOUT_S = 45


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes/s of each direction."""
    size, pin = scale.copy_bytes, device.type == "cuda"
    here, there = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
    pageable = torch.ones(size, dtype=torch.uint8)
    copies = {
        "device_to_device": (2 * size, partial(there.copy_, here)),
        "pinned_to_device": (size, partial(here.copy_, pinned, non_blocking=True)),
        "device_to_pinned": (size, partial(pinned.copy_, here, non_blocking=True)),
        "pageable_to_device": (size, partial(here.copy_, pageable)),
    }
    contenders = {
        name: partial(bytes_per_s, device, count, copy, scale.window_s)
        for name, (count, copy) in copies.items()
    }
    samples = alternate(scale.windows, contenders, f"copies on {device}")
    return {
        "copy_bytes": size,
        **{f"{name}_bytes_per_s": summarize(found) for name, found in samples.items()},
    }
