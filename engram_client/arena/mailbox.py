"""The mailbox: how one client and the daemon talk, in one memfd made by the daemon for this client.

A client answers by itself what it finds in the arena. What it does not find it asks for here; here it
says what it read, so that replacement learns, and how much it answered, so that counters are whole.

    header    0     int64  look-ups, keys, masked, hits   answered by the client alone
              64    int64  pending    bit s: slot s holds a request that nobody has taken up
              128   int64  touches    how many were ever written
    slots     4096  64 of 1024 bytes, one for each request on its way
    touches         int64 [touches], a ring
    data            keys of requests, and room for their rows

    slot      0     int64  number     of the request, in this slot the next one each time
              8     int64  table      number of the table, as the layout message tells it
              16    int64  address    what the entries are: BY_KEY or BY_ROW, and WHOLE
              24    int64  entries
              32    int64  at         where the request's memory begins in the data, a multiple of 64
              40    int64  heads      first << 32 | end of the range to be copied; 0 for all
              48    int64  timeout_ns from now on; below 0 without a limit
              56    int64  withdrawn  1 once nobody waits any more
              64    int64  done       number of the last request that was answered; waiters sleep here
              72    int64  text_bytes 0 where the rows are there, else the length of what went wrong
              128   text: the code of an error, a line feed, its message, in UTF-8

    memory of a request, each part from a multiple of 64 on
              int64 [entries] keys or row ids, uint8 [entries] order of each, rows one after another

A request holds what its client lacks: single entries, each with its order; or with WHOLE a look-up as
it was made, where entry i has order i % orders, the orders are not read, and -1 gets zeros.

    touch     bit 60 1, bits 52..59 number of the region modulo 256, 20..51 set, 16..19 way, 0..15 tag

The client writes its words of a slot, sets the bit in `pending` and rings the daemon's eventfd. A
thread of the daemon clears the bit, copies words and keys before it checks them, writes rows where the client
wants them and stamps `done`. The client may write to all of this at any moment, so the daemon reads each
word once and believes none: what it writes through the mailbox harms nobody but its client. The memory of a
request belongs to the daemon until `done` says otherwise, also when its client has stopped
waiting; so a late row never falls into memory that was given to another request.

Touches are written over the oldest when the ring is full, and the daemon zeroes what it took. A touch
that is stale or made up names a set, a way and a tag: where the tag still matches, one read is counted.

Not promised: that touches arrive. Counters of a client are what the client says.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

COUNTERS_AT, PENDING_AT, TOUCH_HEAD_AT = 0, 64, 128
LOOKUPS, KEYS, MASKED, HITS = 0, 1, 2, 3  # words at COUNTERS_AT
SLOTS_AT, SLOTS, SLOT_BYTES = 4096, 64, 1024
NUMBER, TABLE, ADDRESS, ENTRIES, AT, HEADS, TIMEOUT_NS, WITHDRAWN = range(8)  # words of a slot
REQUEST_WORDS = 8
DONE_AT, TEXT_BYTES_AT, TEXT_AT = 64, 72, 128  # bytes in a slot
TEXT_BYTES_MAX = SLOT_BYTES - TEXT_AT
BY_KEY, BY_ROW, WHOLE = 0, 1, 2
TOUCHES_AT = SLOTS_AT + SLOTS * SLOT_BYTES
PART_ALIGNMENT_BYTES = 64

TOUCH, TOUCH_REGION_SHIFT, TOUCH_SET_SHIFT, TOUCH_WAY_SHIFT = 1 << 60, 52, 20, 16
TOUCH_REGIONS = 256


def aligned(size_bytes: int, to_bytes: int = PART_ALIGNMENT_BYTES) -> int:
    """The next multiple of `to_bytes`."""
    return -(-size_bytes // to_bytes) * to_bytes


@dataclass(frozen=True)
class RequestMemory:
    """Where the parts of one request lie, in bytes from where its memory begins."""

    entries: int
    part_bytes: int  # of each entry's rows

    @property
    def orders_at(self) -> int:
        return aligned(8 * self.entries)

    @property
    def rows_at(self) -> int:
        return self.orders_at + aligned(self.entries)

    @property
    def total_bytes(self) -> int:
        return self.rows_at + aligned(self.entries * self.part_bytes)


def entries_within(size_bytes: int, part_bytes: int) -> int:
    """How many entries a request of at most so many bytes may have, 0 where not even one fits."""
    spare_bytes = size_bytes - 3 * PART_ALIGNMENT_BYTES
    return max(0, spare_bytes // (8 + 1 + part_bytes))


@dataclass(frozen=True)
class MailboxGeometry:
    """Enough to find every byte of a mailbox; `touches` is a power of two."""

    touches: int
    data_bytes: int

    @classmethod
    def of(cls, touch_ring_bytes: int, data_bytes: int) -> MailboxGeometry:
        """With a ring of at most so many bytes, and data that ends on a page."""
        touches = 1 << (touch_ring_bytes // 8).bit_length() - 1
        return cls(touches, aligned(data_bytes, mmap.PAGESIZE))

    @property
    def data_at(self) -> int:
        return aligned(TOUCHES_AT + 8 * self.touches, mmap.PAGESIZE)

    @property
    def total_bytes(self) -> int:
        return self.data_at + self.data_bytes
