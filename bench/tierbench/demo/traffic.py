"""The demo's two kinds of traffic: a prefill over the whole text, then single decode steps.

Prefill goes in steps of some thousand tokens, several steps to a window. The addresses of the next
window are known already, so the service is told to read them into DRAM (`warm_ngrams`) while this one
is worked on; large hints read the disk in long, sorted sweeps. Within a window the next step's
rows are on their way (`prefetch_ngrams`) while this step's are checked. A window begins once its
hints are done: running ahead of them would only read the same disk in smaller pieces.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from engram_client import Client, Handle, NgramHashMapping, Table
from engram_client.hashing import row_ids_from_keys
from tierbench.demo.gate import Gate
from tierbench.demo.original import OriginalRows

STEP_TOKENS = 2048
WINDOW_STEPS = 8
POLL_S = 0.01
GATED_TOKENS = 64  # of each step: the gate's matrix product is the model's work, not the store's


@dataclass
class Layer:
    """One table with what the demo needs around it."""

    layer_id: int
    table: Table
    mapping: NgramHashMapping
    original: OriginalRows
    gate: Gate


@dataclass
class Tally:
    """What the traffic saw."""

    tokens: int = 0
    rows: int = 0
    wrong_rows: int = 0
    waited_s: float = 0.0  # blocked in `wait`: the rows were not there yet
    elapsed_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)  # wait, a step and layer
    gate_rms: list[float] = field(default_factory=list)


def prefill(
    client: Client, layers: list[Layer], ids: np.ndarray, off: np.ndarray, on_step: Callable[[int], None]
) -> Tally:
    """Look up every token's rows at every layer and check each against the checkpoint.

    `ids` uint32 holds all documents, document i from `off[i]` to `off[i + 1]`.
    """
    tally = Tally()
    started = time.perf_counter()
    spans = list(pairwise(off.tolist()))
    keys = [np.concatenate([x.mapping.ngram_keys(ids[a:b], x.layer_id) for a, b in spans]) for x in layers]
    window_tokens = WINDOW_STEPS * STEP_TOKENS
    hints = Hints(client)
    hints.send(layers, [k[:window_tokens] for k in keys])
    for start in range(0, ids.size, window_tokens):
        before = time.perf_counter()
        hints.wait()
        tally.waited_s += time.perf_counter() - before
        after = start + window_tokens
        hints.send(layers, [k[after : after + window_tokens] for k in keys])
        _run_window(layers, [k[start:after] for k in keys], tally, on_step)
    tally.tokens = ids.size
    tally.elapsed_s = time.perf_counter() - started
    return tally


class Hints:
    """Warming hints, and waiting until the service has worked them off."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done = client.stats()["hints_done"]

    def send(self, layers: list[Layer], keys: list[np.ndarray]) -> None:
        for layer, part in zip(layers, keys, strict=True):
            if part.size and layer.table.warm_ngrams(part):
                self._done += 1

    def wait(self) -> None:
        while self._client.stats()["hints_done"] < self._done:
            time.sleep(POLL_S)


def _run_window(
    layers: list[Layer], keys: list[np.ndarray], tally: Tally, on_step: Callable[[int], None]
) -> None:
    steps = [slice(at, at + STEP_TOKENS) for at in range(0, len(keys[0]), STEP_TOKENS)]

    def prefetch(step: slice) -> list[Handle]:
        return [x.table.prefetch_ngrams(k[step]) for x, k in zip(layers, keys, strict=True)]

    ahead = deque([prefetch(steps[0])])
    for i, step in enumerate(steps):
        if i + 1 < len(steps):
            ahead.append(prefetch(steps[i + 1]))
        for layer, key, handle in zip(layers, keys, ahead.popleft(), strict=True):
            _check_step(layer, key[step], handle, tally)
        on_step(len(keys[0][step]))


def _check_step(layer: Layer, keys: np.ndarray, handle: Handle, tally: Tally) -> None:
    before = time.perf_counter()
    rows = np.asarray(handle.wait(timeout=120))
    waited_s = time.perf_counter() - before
    tally.waited_s += waited_s
    tally.step_ms.append(waited_s * 1e3)
    row_ids = row_ids_from_keys(layer.mapping.scheme(layer.layer_id), keys)
    tally.wrong_rows += layer.original.count_wrong(rows, row_ids)
    tally.rows += row_ids.size
    tally.gate_rms.append(layer.gate.run(layer.table, rows[:GATED_TOKENS]))


def decode(layers: list[Layer], ids: np.ndarray) -> Tally:
    """One token at a time, all layers: what one decode step waits for its rows over the socket."""
    tally = Tally()
    lookback = layers[0].mapping.lookback()
    started = time.perf_counter()
    for token in ids.reshape(-1, 1, 1):
        keys = [x.mapping.ngram_keys(token, x.layer_id, lookback=lookback) for x in layers]
        before = time.perf_counter()
        rows = [np.asarray(x.table.lookup_ngrams(k)) for x, k in zip(layers, keys, strict=True)]
        tally.step_ms.append((time.perf_counter() - before) * 1e3)
        for layer, key, got in zip(layers, keys, rows, strict=True):
            row_ids = row_ids_from_keys(layer.mapping.scheme(layer.layer_id), key)
            tally.wrong_rows += layer.original.count_wrong(got, row_ids)
            tally.rows += row_ids.size
        lookback.advance(token)
        tally.tokens += 1
    tally.elapsed_s = time.perf_counter() - started
    return tally
