"""How a look-up is cut into calls: near 1 MiB of rows each, and no call of more than the daemon takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from engram_client.transport.base import LookupRequest
from engram_client.wire import memory_pb2 as pb

CALL_BYTES_MAX = 3 << 19  # rows in one reply; more go in equal parts, which are then near 1 MiB
HINT_IDS_MAX = 1 << 17  # ids in one hint: near 1 MiB of request
ENVELOPE_BYTES = 4096  # of a request beside its ids: name, generation, range of heads
ID_BYTES = 8


@dataclass(frozen=True)
class Limits:
    """What a daemon takes in one request, and how many at once, as it says; without bounds until it has."""

    request_ids_max: int = sys.maxsize
    reply_bytes_max: int = sys.maxsize
    message_bytes_max: int = sys.maxsize
    requests_max: int = sys.maxsize

    @property
    def ids_max(self) -> int:
        """Ids in one request, by their number and by their bytes."""
        return max(1, min(self.request_ids_max, (self.message_bytes_max - ENVELOPE_BYTES) // ID_BYTES))


def limits_told(message: pb.Limits) -> Limits:
    """What a daemon has told; 0 is what it has not."""
    return Limits(
        message.request_ids_max or sys.maxsize,
        message.reply_bytes_max or sys.maxsize,
        message.message_bytes_max or sys.maxsize,
        message.requests_max or sys.maxsize,
    )


def entries_per_call(request: LookupRequest, entry_bytes: int, limits: Limits) -> int:
    """How many of the request's entries, of so many bytes of rows each, go in each of equal calls.

    At least one, also where the daemon will refuse it. The request is not empty.
    """
    entries = len(request.ids)
    ids_each = request.ids.size // entries
    rows = min(CALL_BYTES_MAX, limits.reply_bytes_max) // entry_bytes
    calls = -(-entries // max(1, min(rows, limits.ids_max // ids_each)))
    return -(-entries // calls)


def entries_per_hint(request: LookupRequest, limits: Limits) -> int:
    """The same for a hint, which is answered without rows."""
    ids_each = max(1, request.ids.size // max(1, len(request.ids)))
    return max(1, min(HINT_IDS_MAX, limits.ids_max) // ids_each)


def split(request: LookupRequest, entries_max: int) -> list[LookupRequest]:
    """The same request in parts of so many entries, the last one shorter."""
    parts = range(0, request.ids.shape[0], entries_max)
    return [replace(request, ids=request.ids[i : i + entries_max]) for i in parts]
