"""What everything on a device has in common: is it there, streams beside the caller's, pinned memory.

    probe.py     whether CUDA and Triton are there; a group of kernels is tried once before it serves
    streams.py   work beside the caller's stream, and events between the two; on a CPU all of it is in order
    pinned.py    host memory that a device copies from without a detour, and a bounded ring of it

Importing this package imports torch; nothing outside of the device paths does. Checked on CPU tensors,
never run on a GPU yet.
"""

from engram_client.gpu.pinned import PinnedRing, pinned_bytes
from engram_client.gpu.probe import (
    KernelGroup,
    as_device,
    capturing,
    made_current,
    out_of_memory,
    triton_missing,
)
from engram_client.gpu.streams import Event, SideStream, record_current, side_stream

__all__ = [
    "Event",
    "KernelGroup",
    "PinnedRing",
    "SideStream",
    "as_device",
    "capturing",
    "made_current",
    "out_of_memory",
    "pinned_bytes",
    "record_current",
    "side_stream",
    "triton_missing",
]
