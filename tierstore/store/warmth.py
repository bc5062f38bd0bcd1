"""Keeping the cache warm over restarts: snapshots are loaded at the start, written from time to time.

Loading goes on in the background while the store serves. A snapshot is written every so many seconds
and when the store is closed; a crash loses what came since the last. Nothing here is needed for right
answers, so every failure is logged and serving goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from engram_client.errors import FormatError, StorageError
from tierstore.config import Dram
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.snapshot import Owners, load_snapshot, write_snapshot

log = logging.getLogger(__name__)


class Warmth:
    """Loads and writes the snapshots in `folder`, one for each arena."""

    def __init__(
        self, folder: Path, arenas: Mapping[int, Arena], owners: Owners, counters: Counters, config: Dram
    ) -> None:
        self._arenas = {folder / f"{record_bytes}.warm": arena for record_bytes, arena in arenas.items()}
        self._folder = folder
        self.owners = owners  # replaced when other tables are served
        self._counters = counters
        self._config = config
        self._closing = threading.Event()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tierstore-warmth", daemon=True)
        self._thread.start()

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait until what an earlier run left is in DRAM; False where that takes longer."""
        return self._loaded.wait(timeout_s)

    def _work(self) -> None:
        for path, arena in self._arenas.items():
            if path.exists() and not self._closing.is_set():
                self._load(path, arena)
        if not self._closing.is_set():
            self._loaded.set()
        while not self._closing.wait(self._config.snapshot_period_s or None):
            self._write_all(self._closing)

    def _load(self, path: Path, arena: Arena) -> None:
        started = time.monotonic()
        try:
            read = load_snapshot(path, arena, self.owners, self._closing)
        except (FormatError, StorageError, OSError, KeyError, ValueError) as error:
            log.warning("the cache starts cold: snapshot %s cannot be used: %s", path, error)
            return
        self._counters.add(snapshot_bytes_read=read)
        log.info("cache restored from %s: %d bytes in %.1f s", path, read, time.monotonic() - started)

    def _write_all(self, stop: threading.Event) -> None:
        for path, arena in self._arenas.items():
            try:
                self._folder.mkdir(exist_ok=True)
                write_snapshot(path, arena, self.owners, stop)
            except (FormatError, StorageError, OSError) as error:
                log.warning("no snapshot of the cache was written, a restart will be colder: %s", error)

    def close(self) -> None:
        """Stop, and write a last snapshot, unless the old one was not even loaded yet."""
        self._closing.set()
        self._thread.join()
        if self._loaded.is_set() and self._config.snapshot_period_s:
            too_late = threading.Event()
            timer = threading.Timer(self._config.snapshot_close_timeout_s, too_late.set)
            timer.daemon = True
            timer.start()
            self._write_all(too_late)
            timer.cancel()
            if too_late.is_set():
                log.warning(
                    "the last snapshot of the cache took too long and was given up; the one before stays"
                )
