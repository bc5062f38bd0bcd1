"""What of the log has been folded: two slots in turn, so that a torn write leaves the other one.

slot s of DIR/training/superblock, at byte 4096 * s; the whole slot with the higher sequence counts

offset size
     0    8  magic "TSSUPERB"
     8    4  version: 1
    12    4  zero
    16   16  uuid of the store
    32    8  sequence, in slot sequence mod 2
    40    8  folds that were completed; the number of the epochs file
    48    8  start: position of the log's first live block: the commit of the folded step, or 0
    56    8  folded step, or -1: the pages hold the rows as of this one
    64    8  floor: position of the oldest commit that can be gone back to
    72    8  bytes of the epochs file
    80    8  its XXH64, seed 0
  4088    8  XXH64 of the 4088 bytes before, seed 0
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engram_client.errors import DataCorrupt
from tierstore.updates.blocks import checksum_of
from tierstore.updates.disk import Disk

MAGIC, VERSION, SLOT_BYTES = b"TSSUPERB", 1, 4096
FIELDS = struct.Struct("<8sII16sqqqqqqQ")


@dataclass(frozen=True)
class Folded:
    """How far the pages are."""

    sequence: int = 1
    folds: int = 0
    start: int = 0
    step: int = -1
    floor: int = 0
    epochs_bytes: int = 0
    epochs_sum: int = 0


class Superblock:
    """The file, and what it says now."""

    def __init__(self, disk: Disk, folder: Path, uuid: bytes) -> None:
        self._disk, self._path, self._uuid = disk, folder / "superblock", uuid
        self.folded = Folded()

    def create(self) -> None:
        fd = self._disk.open(self._path, create=True)
        try:
            self._disk.write(fd, np.zeros(2 * SLOT_BYTES, np.uint8), 0)
            self._write(fd, self.folded)
        finally:
            self._disk.close(fd)

    def load(self) -> None:
        """Raises DataCorrupt where neither slot is whole."""
        fd = self._disk.open(self._path)
        try:
            raw = np.zeros(2 * SLOT_BYTES, np.uint8)
            self._disk.read(fd, raw, 0)
        finally:
            self._disk.close(fd)
        found = [slot for s in range(2) if (slot := self._decode(raw[s * SLOT_BYTES :][:SLOT_BYTES], s))]
        if not found:
            raise DataCorrupt(
                f"{self._path}: neither of its two slots is whole, so it is not known how much of the log "
                "has been folded; restore the folder from a copy"
            )
        self.folded = max(found, key=lambda slot: slot.sequence)

    def change(self, **fields: int) -> None:
        """Make new values durable; until this returns a crash leaves the old ones or the new."""
        new = replace(self.folded, sequence=self.folded.sequence + 1, **fields)
        fd = self._disk.open(self._path)
        try:
            self._write(fd, new)
        finally:
            self._disk.close(fd)
        self.folded = new

    def _write(self, fd: int, folded: Folded) -> None:
        f = folded
        packed = FIELDS.pack(
            MAGIC, VERSION, 0, self._uuid, f.sequence, f.folds, f.start, f.step, f.floor, f.epochs_bytes,
            f.epochs_sum,
        )  # fmt: skip
        payload = packed.ljust(SLOT_BYTES - 8, b"\0")
        slot = payload + checksum_of(payload).to_bytes(8, "little")
        self._disk.write(fd, np.frombuffer(slot, np.uint8), f.sequence % 2 * SLOT_BYTES)
        self._disk.sync(fd)

    def _decode(self, slot: np.ndarray, number: int) -> Folded | None:
        raw = slot.tobytes()
        if checksum_of(raw[:-8]) != int.from_bytes(raw[-8:], "little"):
            return None
        magic, version, _, uuid, *values = FIELDS.unpack_from(raw)
        if (magic, version, uuid) != (MAGIC, VERSION, self._uuid):
            return None
        folded = Folded(*values)
        return folded if folded.sequence % 2 == number else None
