"""Memory of a staging ring: mapped once, never moved; and reads that a thread of Python brings there."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_client.arena import copying
from engram_client.errors import BadRequest
from engram_client.prefetch import Prefetcher
from engram_client.transport.landing import Landing

log = logging.getLogger(__name__)
WORD_BYTES = 8
PORTABLE_AND_MAPPED = 3  # flags of cudaHostRegister


class StagingMemory:
    """Page-aligned private memory, all of its pages there; numpy.asarray(memory) is its bytes.

    pinned: whether CUDA copies from it without a detour
    """

    def __init__(self, size_bytes: int) -> None:
        """Raises BadRequest where there is no room for it."""
        try:
            mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise BadRequest(
                f"a staging ring of {size_bytes} bytes cannot be mapped ({error}); take fewer slots or "
                "entries"
            ) from error
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.__array_interface__ = {
            "data": (self.address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }
        np.asarray(self)[:: mmap.PAGESIZE] = 0
        runtime = _pin(self.address, size_bytes)
        self.pinned = runtime is not None
        weakref.finalize(self, _let_go, runtime, os.getpid(), self.address, mapping).atexit = False


def _pin(address: int, size_bytes: int) -> Any:
    """CUDA's runtime, if it is in use here and took the memory; this imports nothing."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(address, size_bytes, PORTABLE_AND_MAPPED))
    if status == 0:
        return runtime
    log.warning(
        "CUDA did not pin %d bytes of a staging ring (error %d): copies to the device take a detour; "
        "is the limit on locked memory too low?",
        size_bytes, status,
    )  # fmt: skip
    return None


def _let_go(runtime: Any, pid: int, address: int, mapping: mmap.mmap) -> None:
    """The mapping goes with its last user, which is this call. A forked child has nothing pinned."""
    if runtime is not None and pid == os.getpid():
        runtime.cudaHostUnregister(address)


class Place:
    """Where one slot of a ring has the rows of one table, and their completion word.

    rows:  uint8 [entries, H, row_bytes]
    word:  address
    """

    def __init__(self, rows: np.ndarray, address: int, word: int) -> None:
        self.rows = rows
        self.word = word
        self.entries = len(rows)
        self.entry_bytes = rows[0].size
        self._flat = rows.reshape(-1)
        self._address = address

    def unstamp(self) -> None:
        """Nothing is there any more."""
        copying.unstamp(self.word)

    def stamp(self, step: int) -> None:
        """All of a step is there."""
        copying.stamp(self.word, step)

    def landing(self, entries: int, step: int) -> Landing:
        """For one read of so many entries. Raises BadRequest for more than there are."""
        if entries > self.entries:
            raise BadRequest(
                f"{entries} entries do not fit a slot of {self.entries}; make the ring with more entries, or "
                "ask in parts"
            )
        return Landing(self._flat[: entries * self.entry_bytes], self._address, self.word, step)


class Places:
    """The places of one table, one a slot.

    rows:  uint8 [slots, entries, H, row_bytes]
    words: int64 [slots]
    """

    def __init__(self, rows: np.ndarray, words: np.ndarray) -> None:
        self.rows = rows
        self.words = words
        rows_at, words_at = rows.ctypes.data, words.ctypes.data
        self.slots = [
            Place(slot, rows_at + i * slot.nbytes, words_at + i * WORD_BYTES) for i, slot in enumerate(rows)
        ]


def lay_out(shapes: Sequence[tuple[int, int, int, int]]) -> tuple[StagingMemory, list[Places]]:
    """Memory for words and, each from a page on, rows of these shapes [slots, entries, H, row_bytes]."""

    def pages(size_bytes: int) -> int:
        return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    sizes = [slots * entries * width * row_bytes for slots, entries, width, row_bytes in shapes]
    words_bytes = [WORD_BYTES * shape[0] for shape in shapes]
    memory = StagingMemory(pages(sum(words_bytes)) + sum(map(pages, sizes)))
    everything = np.asarray(memory)
    word_at, row_at, made = 0, pages(sum(words_bytes)), []
    for shape, size_bytes, word_bytes in zip(shapes, sizes, words_bytes, strict=True):
        words = everything[word_at : word_at + word_bytes].view(np.int64)
        words[:] = copying.NOT_THERE
        made.append(Places(everything[row_at : row_at + size_bytes].reshape(shape), words))
        word_at, row_at = word_at + word_bytes, row_at + pages(size_bytes)
    return memory, made


class LandingInThread:
    """See `Filling`: rows that a thread of Python reads into memory of their own, and then copies and stamps.

    So a step that was given up while its rows are still being read frees its slot at once.
    """

    def __init__(self, prefetcher: Prefetcher, landing: Landing, read: Callable[[], np.ndarray]) -> None:
        self._landing = landing

        def read_and_land() -> np.ndarray:
            try:
                landing.land(read())
            finally:
                landing.give_up()  # of a read that failed nothing lands any more
            return landing.rows

        self._handle = prefetcher.start(read_and_land, lambda rows: rows)
        self.done = self._handle.done

    def wait(self, timeout_s: float | None) -> None:
        self._handle.wait(timeout_s)

    def give_up(self) -> bool:
        self._landing.give_up()
        self._handle.cancel()
        return self._landing.settled
