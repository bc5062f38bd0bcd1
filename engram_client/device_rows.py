"""Look-ups for tensors on a device: rows by way of its carrier. torch is imported by whoever brings a tensor.

`engram_client.gpu.carrier` tells what waits for what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_client.deadline import Deadline
from engram_client.prefetch import Handle, Prefetcher
from engram_client.transport.base import LookupRequest, Transport

if TYPE_CHECKING:
    import torch

    from engram_client.arrays import Array
    from engram_client.gpu.carrier import Fill

Query = tuple[LookupRequest, tuple[int, ...]]  # and the shape of its rows


def rows_like(transport: Transport, query: Query, ids: torch.Tensor, timeout_s: float | None) -> torch.Tensor:
    """The rows, where the ids are."""
    from engram_client.gpu.carrier import carrier_of

    request, shape = query
    out = carrier_of(ids.device).empty(shape)
    fill_out(transport, request, out, timeout_s)
    return out


def fill_out(
    transport: Transport, request: LookupRequest, out: torch.Tensor, timeout_s: float | None
) -> None:
    """The rows, into a contiguous tensor of their size, in the order of the current stream."""
    from engram_client.gpu.carrier import carrier_of

    carrier_of(out.device).fill(out, len(request.ids), _reading(transport, request, timeout_s))


def start(
    transport: Transport,
    prefetcher: Prefetcher,
    query_of: Callable[[np.ndarray], Query],
    ids: torch.Tensor,
    timeout_s: float | None,
) -> Handle:
    """A handle for ids that nobody has waited for: who reads does, and their errors are `wait`'s."""
    from engram_client.gpu.carrier import carrier_of

    carrier = carrier_of(ids.device)
    pending = carrier.start_ids(ids)

    def read() -> Any:
        request, shape = query_of(pending.wait())
        return carrier.bring(shape, len(request.ids), _reading(transport, request, timeout_s))

    return prefetcher.start(read, _taken)


def _reading(transport: Transport, request: LookupRequest, timeout_s: float | None) -> Fill:
    """Reads some of the entries at a time; `timeout_s` is for all of them together."""
    deadline = Deadline.after(timeout_s)

    def fill(part: slice, rows: np.ndarray) -> None:
        asked = LookupRequest(
            request.table, request.generation, request.address, request.ids[part], request.heads
        )
        transport.lookup(asked, rows, deadline.remaining_s())

    return fill


def _taken(landed: Any) -> Array:
    """Rows that were copied to a device, in the order of the current stream."""
    rows: Array = landed.take()
    return rows
