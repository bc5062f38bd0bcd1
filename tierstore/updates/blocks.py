"""Blocks of the update log: what a header says, and a compact memory of all live blocks.

A block starts and ends on a multiple of 4096 bytes, so an append never rewrites a sector that something
committed lies in. A *position* is a byte of the log counted from its very beginning, whatever has been
folded since.

    offset size
         0    8  magic "TSUPDATE"
         8    4  kind: 1 rows, 2 commit, 3 rollback
        12    4  table                                rows only
        16   16  uuid of the store
        32    8  position of this block
        40    8  number of this block, one more than that of the block before it
        48    8  step                                 rollback: the step gone back to
        56    8  count of rows, or bytes of state     commit: state follows the header
        64    4  row bytes
        68    4  zero
        72    8  bytes of the block, a multiple of 4096
        80    8  checksum of the ids, or of the state: XXH64, seed 0
        88    8  checksum field of the header before it: the chain
        96    8  how far the log was known to be durable at a commit when this was written
       104    8  nonce of the opening that wrote it
       112    8  rollback: position of the commit gone back to; else 0
       120    8  XXH64 of the 120 bytes before, seed 0
       128       rows: int64 [count] ids, then entries (kernels/update_log.py)

The salt of a block's entries is nonce + position. A nonce is drawn at each opening, so what a crash left
behind the last commit never fits the chain that is written over it, though training may repeat it byte for
byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from tierstore.kernels.checksum import bytes_checksum

MAGIC = b"TSUPDATE"
HEADER = struct.Struct("<8sII16sqqqqIIqQQqQq")
HEADER_BYTES = 128
ALIGN = 4096
BLOCK_BYTES_MAX = 4 << 20
STATE_BYTES_MAX = 1 << 20
ROWS, COMMIT, ROLLBACK = 1, 2, 3
WORD = 2**64


def stride_of(row_bytes: int) -> int:
    """Bytes of an entry: the row up to a multiple of 8, and its checksum."""
    return -(-row_bytes // 8) * 8 + 8


def rows_of_block(row_bytes: int, block_bytes_max: int) -> int:
    """How many rows fit a block of at most so many bytes."""
    return (block_bytes_max - HEADER_BYTES) // (8 + stride_of(row_bytes))


def block_bytes(count: int, row_bytes: int) -> int:
    return padded(HEADER_BYTES + count * (8 + stride_of(row_bytes)))


def padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def checksum_of(data: bytes | np.ndarray, seed: int = 0) -> int:
    """XXH64 of all bytes of `data`, which is contiguous."""
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    return int(bytes_checksum(array, np.uint64(seed)))


@dataclass(frozen=True)
class Header:
    """What a block says of itself."""

    kind: int
    table: int
    position: int
    number: int
    step: int
    count: int
    row_bytes: int
    size: int  # bytes, a multiple of 4096
    body_sum: int
    previous: int
    durable: int
    nonce: int
    target: int = 0

    @property
    def end(self) -> int:
        return self.position + self.size

    @property
    def salt(self) -> int:
        return (self.nonce + self.position) % WORD

    @property
    def first_entry(self) -> int:
        """Position of the first row."""
        return self.position + HEADER_BYTES + 8 * self.count

    def encode(self, uuid: bytes) -> tuple[bytes, int]:
        """The 128 bytes, and the checksum that the next block's `previous` holds."""
        packed = HEADER.pack(
            MAGIC, self.kind, self.table, uuid, self.position, self.number, self.step, self.count,
            self.row_bytes, 0, self.size, self.body_sum, self.previous, self.durable, self.nonce,
            self.target,
        )  # fmt: skip
        own = checksum_of(packed)
        return packed + own.to_bytes(8, "little"), own


def decode(raw: bytes, uuid: bytes) -> tuple[Header, int] | None:
    """The header and its checksum, or None where this is no header of this store's log."""
    if raw[:8] != MAGIC or raw[16:32] != uuid or len(raw) < HEADER_BYTES:
        return None
    own = int.from_bytes(raw[120:128], "little")
    if checksum_of(raw[:120]) != own:
        return None
    (_, kind, table, _, position, number, step, count, row_bytes, _, size, body_sum, previous, durable, nonce,
     target) = HEADER.unpack_from(raw)  # fmt: skip
    return Header(
        kind,
        table,
        position,
        number,
        step,
        count,
        row_bytes,
        size,
        body_sum,
        previous,
        durable,
        nonce,
        target,
    ), own


BLOCK = np.dtype(
    [("position", "i8"), ("count", "i8"), ("first_entry", "i8"), ("ids_sum", "u8"), ("table", "i8")]
)


class BlockTable:
    """Every live block with rows, ascending by position: what finding and checking a row needs of it.

    Views that were given stay as they are: blocks are only appended behind them, and cutting makes new
    arrays.
    """

    def __init__(self) -> None:
        self._blocks, self._salts = np.zeros(64, BLOCK), np.zeros(64, np.uint64)
        self._starts = np.zeros(64, np.int64)
        self._count = 0

    def add(self, header: Header) -> None:
        if self._count == self._blocks.size:
            self._copy(self.all(), *self.salts())
        h = header
        self._blocks[self._count] = (h.position, h.count, h.first_entry, h.body_sum, h.table)
        self._starts[self._count], self._salts[self._count] = h.position, h.salt
        self._count += 1

    def all(self) -> np.ndarray:
        """BLOCK [n]."""
        return self._blocks[: self._count]

    def salts(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each starts, int64 [n], and its salt, uint64 [n]."""
        return self._starts[: self._count], self._salts[: self._count]

    def cut(self, start: int, end: int) -> None:
        """Keep the blocks that lie in [start, end)."""
        starts, salts = self.salts()
        kept = slice(*np.searchsorted(starts, (start, end)))
        self._copy(self.all()[kept], starts[kept], salts[kept])

    def _copy(self, blocks: np.ndarray, starts: np.ndarray, salts: np.ndarray) -> None:
        """Make new arrays of these, with as much room again."""
        self._count, room = blocks.size, max(64, blocks.size)
        self._blocks = np.concatenate([blocks, np.zeros(room, BLOCK)])
        self._starts = np.concatenate([starts, np.zeros(room, np.int64)])
        self._salts = np.concatenate([salts, np.zeros(room, np.uint64)])
