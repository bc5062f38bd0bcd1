"""Rows of a daemon's DRAM for ids on the device: read by the device itself, or staged by the CPU.

Everything is cached. From ids ready on the device to rows ready on its stream, at the sizes of decoding and
prefill; beside both, one copy of as many bytes from pinned memory, which no way can beat by much. The answer
to which way wins at which size is `over_staged`; `DeviceTable(bus_entries_max=...)` takes it as a setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client import Table, connect
from engram_client.errors import DataCorrupt
from engram_client.gpu.bus import BusReader
from engram_client.gpu.pinned import pinned_bytes
from tierbench.alternate import alternate
from tierbench.daemon import running_daemon
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import bytes_per_s, finish
from tierbench.gpu.scale import Scale
from tierbench.prepared import prepared_table
from tierbench.record import compare, summarize

TIMEOUT_S = 100
FILL, KEYS_A_CALL, FILL_TIMEOUT_S = 0.125, 6144, 120.0  # of DRAM: far above caches, and read in seconds
BARS = (
    Bar("over the bus beats staging for one token", "decode_1.over_staged.ratio_median", ">=", 1.0),
    Bar("a read over the bus does not make the host wait", "waits_for_the_device", "==", "no"),
)


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Rows/s by either way and of a copy, and how long one look-up takes, for each size."""
    prepared = prepared_table(scale.scratch, scale.table_rows_per_head)
    sizes = {f"decode_{batch}": batch for batch in scale.decode_batches} | {"prefill": scale.prefill_tokens}
    with (
        running_daemon(prepared.store, dram_bytes=scale.dram_bytes) as daemon,
        connect(daemon.unix) as client,
    ):
        table = client.table(prepared.spec.name)
        held = _filled(table, scale)
        reader = BusReader(table, device, entries_max=held.shape[1] * max(sizes.values()))
        found: dict[str, Any] = {"device_reads": reader.serving, "held_records": held.size}
        for name, tokens in sizes.items():
            found[name] = _of_size(table, reader, held, tokens, scale)
        found["waits_for_the_device"] = _waits(reader, held[:1])
        reader.close()
    return found


def _filled(table: Table, scale: Scale) -> np.ndarray:
    """N-gram keys int64 [n, orders] whose records DRAM holds, all of them."""
    scheme = table.spec.scheme
    assert scheme is not None, "V4.1's tables have one"
    count = int(FILL * scale.dram_bytes / table.spec.record_bytes / scheme.orders)
    keys = np.random.default_rng(scale.seed).integers(0, 2**63 - 1, (count, scheme.orders), np.int64)
    for first in range(0, count, KEYS_A_CALL):
        table.lookup_ngrams(keys[first : first + KEYS_A_CALL], timeout=FILL_TIMEOUT_S)
    return keys


def _of_size(table: Table, reader: BusReader, held: np.ndarray, tokens: int, scale: Scale) -> dict[str, Any]:
    device, spec = reader.device, table.spec
    picks = np.random.default_rng(scale.seed + tokens).integers(0, len(held), tokens)
    lines = held[picks]
    keys = torch.from_numpy(lines).to(device)
    out = torch.empty((keys.numel(), spec.record_bytes), dtype=torch.uint8, device=device)
    rows = keys.numel() * spec.record_rows
    staged_out = out.view(tokens, -1, spec.row_bytes)
    pinned = pinned_bytes(out.nbytes, device).view(out.shape)
    works: dict[str, Callable[[], object]] = {
        "bus": lambda: reader.read(keys, out),
        "staged": lambda: table.lookup_ngrams_into(keys, staged_out),
        "copy": lambda: out.copy_(pinned, non_blocking=True),
    }
    missing = _checked(reader, table, lines, keys, out)
    contenders = {
        name: partial(bytes_per_s, device, rows, work, scale.window_s) for name, work in works.items()
    }
    samples = alternate(scale.windows, contenders, f"{tokens} tokens on {device}")
    alone = alternate(
        max(20, scale.windows), {name: partial(_once_us, work, device) for name, work in works.items()}, "one"
    )
    return {
        "tokens": tokens,
        "bytes": out.nbytes,
        "missing_records": missing,
        "over_staged": compare(samples["bus"], samples["staged"]),
        "over_copy": compare(samples["bus"], samples["copy"]),
        "one_us": {name: summarize(taken) for name, taken in alone.items()},
    }


def _checked(reader: BusReader, table: Table, lines: np.ndarray, keys: Tensor, out: Tensor) -> int:
    """How many records are missing, all else being right. Raises DataCorrupt."""
    reader.read(keys, out)
    missed = reader.missed()
    reader.fill(out, missed)
    expected = np.asarray(table.lookup_ngrams(lines)).reshape(out.shape)
    if not np.array_equal(out.cpu().numpy(), expected):
        raise DataCorrupt(f"{reader.device} read other rows over the bus than the service gives")
    return len(missed.ids)


def _once_us(work: Callable[[], object], device: torch.device) -> float:
    """One look-up from an idle device until its rows are ready."""
    finish(device)
    before = time.perf_counter()
    work()
    finish(device)
    return (time.perf_counter() - before) * 1e6


def _waits(reader: BusReader, lines: np.ndarray) -> str:
    """Whether a read makes the host wait for a GPU: what torch's own debug mode says of it."""
    if reader.device.type != "cuda":
        return "not a GPU"
    keys = torch.from_numpy(lines).to(reader.device)
    out = torch.empty((keys.numel(), reader.entry_bytes), dtype=torch.uint8, device=reader.device)
    finish(reader.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reader.read(keys, out)
    except RuntimeError as error:
        return f"yes: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"
