"""A store of this process whose look-ups are timed, beside others over the same rows.

A directory can be open once in a process. Contenders that need a cache each are given directories of
their own, which share the row file by a hard link.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import StorageError
from engram_client.transport.base import LookupRequest
from tierbench.prepared import PreparedTable, packed_tables
from tierstore.config import Config
from tierstore.store import Store, open_store
from tierstore.store.store import MakeReader, configured_reader


def linked_store(prepared: PreparedTable, folder: Path) -> Path:
    """The store once more in `folder`, made anew; its row file takes no space of its own."""
    return linked_copy(prepared.store, folder)


def linked_copy(store: Path, folder: Path) -> Path:
    """Any store once more in `folder`, made anew: row files are links, its snapshot and extent stay behind.

    Across file systems the links are symbolic. Raises StorageError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    left_out = shutil.ignore_patterns("warm", "extent", "lock")
    try:
        shutil.copytree(store, folder, ignore=left_out, copy_function=_link_rows)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{store}: cannot be linked into {folder}: {error}") from error
    return folder


def _link_rows(source: str, target: str) -> str:
    if not source.endswith(".rows"):
        shutil.copyfile(source, target)
        return target
    try:
        os.link(source, target)
    except OSError:  # another file system, or somebody else's file
        os.symlink(os.path.realpath(source), target)
    return target


def look_up(store: Store, request: LookupRequest, out: np.ndarray) -> np.ndarray:
    """Look up as `Store.lookup` does; the positions that DRAM did not hold, int64."""
    access = store.access(request)
    misses = store.lookup_hits(request, access, out)
    if misses.size:
        store.lookup_misses(request, access, misses, out, Deadline.after(None))
    return misses


class TimedStore:
    """The one table of a store, looked up by n-gram keys as a daemon does it."""

    def __init__(
        self, directory: Path, config: Config, *, tokens_max: int, make_reader: MakeReader = configured_reader
    ) -> None:
        self.directory = directory
        self.store, self._release = open_store(directory, config, make_reader=make_reader)
        self.store.warm_up()
        ((self.spec, _),) = packed_tables(directory)
        assert self.spec.scheme is not None
        self.orders = self.spec.scheme.orders
        self._tokens_max = tokens_max
        self._out = np.empty(tokens_max * self.orders * self.spec.record_bytes, np.uint8)

    def look_up(self, keys: np.ndarray) -> tuple[float, np.ndarray]:
        """Look up int64 [tokens, orders]: seconds, and the flat positions that DRAM did not hold."""
        request, out = self._request(keys)
        started = time.perf_counter()
        misses = look_up(self.store, request, out)
        return time.perf_counter() - started, misses

    def _request(self, keys: np.ndarray) -> tuple[LookupRequest, np.ndarray]:
        """The request for keys int64 [tokens, orders], and the buffer for its rows."""
        ids = np.ascontiguousarray(keys)
        request = LookupRequest(self.spec.name, self.spec.generation, "ngram", ids)
        return request, self._out[: keys.size * self.spec.record_bytes]

    def make_warm(self, keys: np.ndarray) -> None:
        """Read int64 [n, orders] into DRAM, as much at a time as the buffer holds."""
        for start in range(0, len(keys), self._tokens_max):
            self.look_up(keys[start : start + self._tokens_max])

    def whole_tokens(self, keys: np.ndarray) -> np.ndarray:
        """Those of int64 [n, orders] of which DRAM holds every record now."""
        whole = np.ones(keys.size, bool)
        for start in range(0, len(keys), self._tokens_max):
            request, out = self._request(keys[start : start + self._tokens_max])
            misses = self.store.lookup_hits(request, self.store.access(request), out)
            whole[start * self.orders + misses] = False
        return keys[whole.reshape(keys.shape).all(axis=1)]

    def close(self) -> None:
        self._release()
