"""Hits of the HBM tier and hashing on a device, beside what the device itself can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import DataCorrupt
from engram_client.hashing import NgramHashMapping
from engram_client.hbm.arena import HbmArena
from tierbench.alternate import Step, alternate, rate
from tierbench.gpu.device import finish
from tierbench.record import compare

ROW_BYTES, HEADS = 264, 8  # DeepSeek-V4.1's
RECORD_BYTES = ROW_BYTES * HEADS
RECORD_WORDS = RECORD_BYTES // 8
FILL = 0.75  # of the slots are offered a record
BATCHES = 8
V41_VOCABULARY = 99_092


def records_of(keys: Tensor) -> Tensor:
    """Bytes that tell whose they are: uint8 [n, RECORD_BYTES] of keys int64 [n]."""
    return (keys.unsqueeze(1) ^ torch.arange(RECORD_WORDS, device=keys.device)).view(torch.uint8)


class FilledHbm:
    """An arena of `arena_bytes`, and the keys it holds, int64 [held]."""

    def __init__(self, arena_bytes: int, device: torch.device, seed: int) -> None:
        self.arena = HbmArena(RECORD_BYTES, arena_bytes, device)
        random = np.random.default_rng(seed)
        offered = random.integers(0, 2**63 - 1, int(self.arena.slots * FILL), np.int64)
        held = []
        for part in torch.from_numpy(offered).split(max(1, self.arena.slots // 16)):
            keys = part.to(device)
            self.arena.admit(keys, self.owners(keys), records_of(keys))
        for part in torch.from_numpy(offered).split(max(1, self.arena.slots // 16)):
            keys = part.to(device)
            out = torch.empty((len(keys), RECORD_BYTES), dtype=torch.uint8, device=device)
            held.append(keys[~self.arena.lookup_into(keys, self.owners(keys), out)])
        self.keys = torch.cat(held)

    @staticmethod
    def owners(keys: Tensor) -> Tensor:
        return torch.zeros_like(keys, dtype=torch.int16)


def hits(arena_bytes: int, rows: int, device: torch.device, seed: int, windows: int, window_s: float) -> Any:
    """Rows/s of whole records that are all there, beside the same number of rows from a resident tensor."""
    filled = FilledHbm(arena_bytes, device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    records = rows // HEADS
    picks = torch.randint(len(filled.keys), (BATCHES, records), device=device, generator=generator)
    batches = [filled.keys[pick] for pick in picks]
    out = torch.empty((records, RECORD_BYTES), dtype=torch.uint8, device=device)
    lookup = _lookup_step(filled, batches, out)
    lookup(0)
    if not torch.equal(out, records_of(batches[0])):
        raise DataCorrupt(f"the HBM tier on {device} gave other bytes than were put in")
    resident = torch.empty(
        (arena_bytes // ROW_BYTES, ROW_BYTES // 8), dtype=torch.int64, device=device
    ).fill_(1)
    row_ids = torch.randint(len(resident), (BATCHES, records * HEADS), device=device, generator=generator)
    contenders: dict[str, Callable[[], float]] = {
        "ours": partial(rate, lookup, window_s),
        "index_select": partial(rate, _gather_step(resident, row_ids, device), window_s),
        "copy": partial(rate, _copy_step(resident, records, device), window_s),
    }
    samples = alternate(windows, contenders, f"hits on {device}")
    copy_bytes_per_s = 2 * ROW_BYTES * float(np.median(samples["copy"]))  # read and written
    return {
        "arena_bytes": filled.arena.bytes,
        "held_records": len(filled.keys),
        "rows_a_batch": records * HEADS,
        "over_index_select": compare(samples["ours"], samples["index_select"]),
        "over_copy": compare(samples["ours"], samples["copy"]),
        "copy_bytes_per_s": copy_bytes_per_s,
        "waits_for_the_device": waits(device, lambda: filled.arena.lookup_into(*_named(batches[0]), out)),
    }


def hashing(tokens: int, device: torch.device, seed: int, windows: int, window_s: float) -> Any:
    """N-gram keys/s of V4.1's scheme on the device, beside the compiled kernel on one core."""
    mapping = NgramHashMapping.engram(
        np.arange(V41_VOCABULARY),
        layer_ids=[1],
        vocab_size_per_ngram=[16_000_000] * 3,
        n_head_per_ngram=HEADS,
        max_ngram_size=4,
        pad_id=2,
        seed=seed,
    )
    twin = mapping.on_device(device)
    ids = np.random.default_rng(seed).integers(0, V41_VOCABULARY, (1, tokens), np.int64)
    there = torch.from_numpy(ids).to(device)
    if not np.array_equal(twin.ngram_keys(there, 1).cpu().numpy(), mapping.ngram_keys(ids, 1)):
        raise DataCorrupt(f"hashing on {device} gives other keys than the compiled kernel")

    def on_device(call: int) -> int:
        twin.ngram_keys(there, 1)
        finish(device)
        return tokens * 3

    def compiled(call: int) -> int:
        mapping.ngram_keys(ids, 1)
        return tokens * 3

    contenders = {"ours": partial(rate, on_device, window_s), "kernel": partial(rate, compiled, window_s)}
    samples = alternate(windows, contenders, f"hashing on {device}")
    return {
        "tokens": tokens,
        "over_kernel": compare(samples["ours"], samples["kernel"]),
        "waits_for_the_device": waits(device, lambda: twin.ngram_keys(there, 1)),
    }


def waits(device: torch.device, call: Callable[[], object]) -> str:
    """Whether a call makes the host wait for a GPU: what torch's own debug mode says of it."""
    if device.type != "cuda":
        return "not a GPU"
    finish(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"yes: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def _named(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys, FilledHbm.owners(keys)


def _lookup_step(filled: FilledHbm, batches: list[Tensor], out: Tensor) -> Step:
    named = [_named(batch) for batch in batches]

    def step(call: int) -> int:
        filled.arena.lookup_into(*named[call % len(named)], out)
        finish(out.device)
        return len(out) * HEADS

    return step


def _gather_step(table: Tensor, row_ids: Tensor, device: torch.device) -> Step:
    out = torch.empty((row_ids.shape[1], table.shape[1]), dtype=table.dtype, device=device)

    def step(call: int) -> int:
        torch.index_select(table, 0, row_ids[call % len(row_ids)], out=out)
        finish(device)
        return len(out)

    return step


def _copy_step(table: Tensor, records: int, device: torch.device) -> Step:
    """As many bytes, one after another."""
    source = torch.ones((records, RECORD_WORDS), dtype=table.dtype, device=device)
    out = torch.empty_like(source)

    def step(call: int) -> int:
        out.copy_(source)
        finish(device)
        return records * HEADS

    return step
