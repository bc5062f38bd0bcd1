"""Measuring a machine: a daemon over a copy of a store, one client, and the disk kept busy for a while.

The copy shares its row files by links and has neither a snapshot of the cache nor an extent of its own, and
the daemon writes none: whatever the store at hand had warm stays as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engram_client import Client, connect
from engram_client.errors import BadRequest
from tierbench.alternate import latencies_us
from tierbench.daemon import running_daemon
from tierbench.hitrate.model import Model
from tierbench.open_loop.window import run_paced
from tierbench.plan.figures import Figures
from tierbench.plan.gpu_copy import copy_figures

DRAM_BYTES = 256 << 20
SMALL_TABLE_BYTES = 16 * DRAM_BYTES
WARM_TOKENS = 8192  # 50 MB of V4.1's records: more than a processor's caches
TOKENS = (1, 64)  # of the two look-ups that a line is drawn through
HIT_CALLS, MISS_CALLS = 2000, 400
PACED_CALLS, PAUSE_NS = 200, 2_000_000
BUSY_TOKENS = 512
WINDOW_S = 1.0
DISK_S_MIN = 2 * WINDOW_S
SUSTAINED_PERCENT = 10
PERCENTILES = 101
Advance = Callable[[int], None]
TRANSPORTS = ("unix", "tcp")


@contextmanager
def served(store: Path, transport: str, dram_bytes: int, extent_bytes: int = 0) -> Iterator[Client]:
    """A client of a daemon over `store`, which belongs to the caller."""
    settings = {"extent.budget_bytes": extent_bytes}
    with (
        running_daemon(store, dram_bytes=dram_bytes, settings=settings) as daemon,
        connect(daemon.unix if transport == "unix" else daemon.tcp) as client,
    ):
        yield client


class Asker:
    """Look-ups of one table of a model, into one buffer."""

    def __init__(self, client: Client, model: Model, tokens_max: int, number: int = 0) -> None:
        self._model, self._table = model, client.table(model.tables[number].name)
        self._look_up = self._table.lookup_into if model.by_rows else self._table.lookup_ngrams_into
        self._buffer = np.empty(tokens_max * model.columns * model.record_bytes, np.uint8)
        self._largest = model.tables[number].rows if model.by_rows else 2**63 - 1

    def strangers(self, random: np.random.Generator, tokens: int) -> np.ndarray:
        """Keys int64 [tokens, columns] that hardly anybody has asked for."""
        return random.integers(0, self._largest, (tokens, self._model.columns), np.int64)

    def ask(self, keys: np.ndarray) -> None:
        model = self._model
        shape = (len(keys), model.orders * model.heads, model.row_bytes)
        self._look_up(keys, self._buffer[: keys.size * model.record_bytes].reshape(shape))


def measure(
    store: Path,
    model: Model,
    row_file_bytes: int,
    *,
    transport: str,
    disk_s: float,
    seed: int,
    progress: Advance,
) -> Figures:
    """The figures of this machine, in little more than `disk_s`, whose seconds `progress` is told of."""
    if model.by_rows and model.table_bytes < SMALL_TABLE_BYTES:
        raise BadRequest(
            f"tables of {model.table_bytes:,} bytes that are addressed by rows: the cache holds too much "
            "of them to measure reads; give --figures of a larger one"
        )
    random = np.random.default_rng(seed)
    with served(store, transport, DRAM_BYTES) as client:
        asker = Asker(client, model, BUSY_TOKENS)
        call_us, record_us = _hits(asker, model, random)
        first_read_us = _first_read_us(asker, client, random, call_us + model.columns * record_us)
        rates = _busy_disk(asker, client, random, disk_s, progress)
    sustained = float(np.percentile(rates[len(rates) // 2 :], SUSTAINED_PERCENT))
    to_device_us, to_device_bytes_per_s, hbm_record_us = copy_figures(model.record_bytes) or (
        None,
        None,
        None,
    )
    return Figures(
        transport=transport,
        record_bytes=model.record_bytes,
        call_us=call_us,
        record_us=record_us,
        first_read_us=first_read_us,
        reads_per_s=sustained,
        reads_burst_per_s=max(rates),
        disk_s=disk_s,
        row_file_bytes=row_file_bytes,
        to_device_us=to_device_us,
        to_device_bytes_per_s=to_device_bytes_per_s,
        hbm_record_us=hbm_record_us,
    )


def _hits(asker: Asker, model: Model, random: np.random.Generator) -> tuple[float, float]:
    """Microseconds of a call without its records, and of a record.

    A record is the slope between two sizes, call after call. A call is timed as steps make them, with a pause
    before each: caches have been used by others since, and processors slept, which is most of what it costs.
    """
    keys = asker.strangers(random, WARM_TOKENS)
    for _ in range(2):  # the second time, whatever was on trial stays
        for start in range(0, WARM_TOKENS, BUSY_TOKENS):
            asker.ask(keys[start : start + BUSY_TOKENS])
    medians = []
    for tokens in TOKENS:
        parts = keys.reshape(-1, tokens, keys.shape[1])
        order = random.permutation(len(parts))

        def step(call: int, parts: np.ndarray = parts, order: np.ndarray = order) -> int:
            asker.ask(parts[order[call % order.size]])
            return 1

        medians.append(float(np.median(latencies_us(step, HIT_CALLS // tokens + 100))))
    few, many = medians
    record_us = max(1e-3, (many - few) / (TOKENS[1] - TOKENS[0]) / model.columns)
    due_ns = np.arange(PACED_CALLS) * PAUSE_NS
    paced = run_paced(lambda number: asker.ask(keys[number : number + 1]), due_ns)
    return max(0.1, float(np.median(paced.service_ns())) / 1e3 - model.columns * record_us), record_us


def _first_read_us(
    asker: Asker, client: Client, random: np.random.Generator, hit_us: float
) -> tuple[float, ...]:
    """How much longer one token takes that nobody has asked for, but for what its pages take among many.

    By percentile, 0 to 100 in steps of 1.
    """
    before = client.stats()["nvme_pages"]
    alone = latencies_us(lambda call: _strangers(asker, random, 1), MISS_CALLS)
    pages = (client.stats()["nvme_pages"] - before) / (1.1 * MISS_CALLS)
    before = client.stats()["nvme_pages"]
    many = latencies_us(lambda call: _strangers(asker, random, TOKENS[1]), MISS_CALLS // 10)
    more_pages = (client.stats()["nvme_pages"] - before) / (1.1 * MISS_CALLS // 10)
    page_us = max(0.0, (np.median(many) - np.median(alone)) / max(1.0, more_pages - pages))
    longer = np.percentile(alone, np.linspace(0, 100, PERCENTILES)) - hit_us - pages * page_us
    return tuple(np.maximum(1.0, longer).round(1).tolist())


def _strangers(asker: Asker, random: np.random.Generator, tokens: int) -> int:
    asker.ask(asker.strangers(random, tokens))
    return tokens


def _busy_disk(
    asker: Asker, client: Client, random: np.random.Generator, disk_s: float, progress: Advance
) -> list[float]:
    """Pages a second in every whole window of the time."""
    rates, end = [], time.monotonic() + disk_s
    while time.monotonic() + WINDOW_S <= end + 0.5 * WINDOW_S:
        before, started = client.stats()["nvme_pages"], time.monotonic()
        while time.monotonic() < started + WINDOW_S:
            _strangers(asker, random, BUSY_TOKENS)
        wall_s = time.monotonic() - started
        rates.append((client.stats()["nvme_pages"] - before) / wall_s)
        progress(1)
    return rates
