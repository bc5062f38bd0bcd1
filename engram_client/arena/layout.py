"""The arena: a set-associative cache of records that is read without a lock.

A record is found by its 63-bit key and its owner (which table and which order). Their hash picks
one set of 16 ways. The *index* has one 64-byte line, one cache line, for each set; the *slots* hold
the records, way after way, set after set; after them come the *ghosts*, 16 bytes for each set.

    index line     0..31  uint16 tags[16]    part of the hash; 0 = empty way
                  32..47  uint8  states[16]  bits 0..2 queue and reads: 0..2 small queue, 0 to 2
                                                       reads; 3..7 main queue, 0 to 4 reads
                                             bit  3    1 while a hint's reader is awaited
                                             bits 4..7 place in the set's order of arrival, 0 = oldest
                  48..55  int64  sequence    odd while a writer is inside the set
                  56..63  uint4  ghosts[16]  upper bits of the ghosts' fingerprints, newest in the lowest
    ghost line     0..15  uint8  ghosts[16]  lower bits of the same, for writers alone
    slot           0..7   int64  key
                   8..15  int64  owner       table number << 8 | order
                  16..    uint8  record      then padding to a multiple of 8

A reader notes the sequence, matches tags, compares key and owner in full, copies, and accepts the
copy only if the sequence is still the same and even; after a few tries it calls the record a miss.
So a reader never waits for a writer and a writer never waits for a reader. Writers exclude each
other by a lock outside the arena. States and ghosts steer replacement alone, as
`tierstore.kernels.replacement` tells. A reader counts with a plain byte store, which may undo what
a writer has just changed in that byte: this costs a worse victim, never a wrong row.

Not promised: that a record stays. Any record may be gone at the next look.
"""

from __future__ import annotations

from dataclasses import dataclass

WAYS = 16
LINE_BYTES = 64
GHOST_BYTES = 16  # of a set's ghost line
TAGS_AT, STATES_AT, SEQUENCE_AT, GHOSTS_AT = 0, 32, 48, 56
SMALL, SMALL_READ, MAIN, MAIN_READ = 0, 2, 3, 7  # the two ends of each queue's reads, in a state
QUEUE_MASK, WANTED, PLACE_SHIFT = 7, 8, 4
KEY_AT, OWNER_AT, RECORD_AT = 0, 8, 16
SLOT_ALIGNMENT_BYTES = 8

ORDER_BITS = 8  # of an owner


def slot_bytes_for(record_bytes: int) -> int:
    """Bytes one cached record takes in the slots."""
    return -(-(RECORD_AT + record_bytes) // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES


@dataclass(frozen=True)
class ArenaGeometry:
    """How many sets of which slots; enough to find every byte of an arena."""

    sets: int
    record_bytes: int

    @classmethod
    def within(cls, budget_bytes: int, record_bytes: int) -> ArenaGeometry:
        """The largest arena whose index and slots together fit the budget (at least one set)."""
        set_bytes = LINE_BYTES + GHOST_BYTES + WAYS * slot_bytes_for(record_bytes)
        return cls(max(1, budget_bytes // set_bytes), record_bytes)

    @property
    def slot_bytes(self) -> int:
        return slot_bytes_for(self.record_bytes)

    @property
    def capacity_records(self) -> int:
        return self.sets * WAYS

    @property
    def index_bytes(self) -> int:
        return self.sets * LINE_BYTES

    @property
    def ghosts_at(self) -> int:
        """Where the ghosts begin, in bytes from the index."""
        return self.index_bytes + self.capacity_records * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return self.ghosts_at + self.sets * GHOST_BYTES
