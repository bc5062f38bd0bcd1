"""The first look-up of a process finds its kernels loaded: opening a store, or attaching, has seen to it.

Counted, not timed: whether a kernel comes from the cache on disk or is compiled because there is none,
it gains a specialisation, and none may do so while a caller waits.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, environment
from tests.support.stores import LARGE, PLAIN, PLE, V41, V41_ROWS, PackedStore

PROGRAM = """
import sys
import numpy as np
from engram_client import connect
from engram_client.transport.base import LookupRequest
from engram_client.wire.convert import request_from_message, request_to_message

def loaded():
    return {
        f"{name}.{key}": len(value.signatures)
        for name, module in list(sys.modules.items())
        if name.startswith(("engram_client.", "tierstore."))
        for key, value in vars(module).items()
        if hasattr(value, "signatures") and value.__module__ == name
    }

def ask_for_ngrams(table):
    orders = table.spec.scheme.orders
    for first in (0, 0, 7000):  # the second time they are in DRAM
        table.lookup_ngrams(np.arange(first, first + 300 * orders).reshape(300, orders))
    table.lookup_ngrams(np.arange(5, 5 + orders).reshape(1, orders), heads=slice(0, 4))
    table.prefetch_ngrams(np.arange(900, 900 + orders).reshape(1, orders)).wait()

with connect(sys.argv[1]) as client:
    before = loaded()
    for name in sys.argv[2:]:
        table = client.table(name)
        if table.spec.addressing == "record":
            ask_for_ngrams(table)
        table.lookup(np.arange(20))
        table.prefetch(np.arange(20, 30)).wait()
        if sys.argv[1].startswith("local:"):  # as the daemon gets it over gRPC
            request = LookupRequest(name, table.spec.generation, "row", np.arange(30, 40))
            request = request_from_message(request_to_message(request), 1)
            client._transport._store.lookup(request, np.empty(10 * table.spec.row_bytes, np.uint8))
    assert len(before) > 20, before
    print(*sorted(name for name, count in loaded().items() if count > before.get(name, 0)))
"""


def loaded_late(target: str, *tables: str, **settings: str) -> list[str]:
    """Kernels that got a specialisation between connecting and the end of many kinds of look-ups."""
    command = [sys.executable, "-c", PROGRAM, target, *tables]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment(), **settings}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("engine", ["auto", "pread"])
@pytest.mark.parametrize("extent_bytes", ["0", "8000000"])
def test_no_look_up_in_this_process_loads_a_kernel(
    packed: PackedStore, tmp_path: Path, engine: str, extent_bytes: str
) -> None:
    settings = {
        "TIERSTORE_DRAM_BUDGET_BYTES": "2000000",  # so little that records leave
        "TIERSTORE_EXTENT_BUDGET_BYTES": extent_bytes,
        "TIERSTORE_NVME_ENGINE": engine,
    }
    store = packed.copy_to(tmp_path)
    assert loaded_late(f"local:{store}", V41, PLE, V41_ROWS, PLAIN, LARGE, **settings) == []


def test_no_look_up_through_shared_memory_loads_a_kernel(roomy: Daemon) -> None:
    assert loaded_late(roomy.unix, V41, PLAIN) == []
