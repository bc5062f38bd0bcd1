"""Steps of two layers by `StepPrefetcher`: what finding equal positions gains, and whose rows come first.

Texts are token ids [steps, B, CONTEXT + T]: the first CONTEXT of each sequence are what came before the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from engram_client import Lookback, Step, StepPrefetcher, Table
from engram_client.modules import StepRows
from engram_client.step import find_distinct
from tierbench.alternate import alternate
from tierbench.record import compare, summarize

STEPS = (6, 60)  # in a window, fewest and most
TOKENS_A_WINDOW = 8192
POLL_S = 20e-6
CONTEXT = 3  # tokens that the longest n-gram looks back on
Use = Callable[[Step], None]


def steps_in_window(shape: tuple[int, int]) -> int:
    return min(STEPS[1], max(STEPS[0], TOKENS_A_WINDOW // (shape[0] * shape[1])))


def _numbers(step: Step) -> None:
    for layer in step.layer_ids:
        StepRows(step, layer).wait()


def _bytes(step: Step) -> None:
    for layer in step.layer_ids:
        step.wait(layer)


def _before(steps: StepPrefetcher, text: np.ndarray) -> Lookback:
    lookback = steps.lookback(len(text))
    lookback.advance(text[:, :CONTEXT])
    return lookback


def _window(use: Use, steps: StepPrefetcher, texts: np.ndarray) -> float:
    """Microseconds of a step in the median."""
    taken = []
    for text in texts:
        lookback = _before(steps, text)
        before = time.perf_counter()
        with steps.start(text[:, CONTEXT:], lookback=lookback) as step:
            use(step)
        taken.append(time.perf_counter() - before)
    return float(np.median(taken)) * 1e6


def compare_dedupe(
    tables: Mapping[int, Table], vocabulary: Any, found: np.ndarray, windows: int, label: str
) -> dict[str, Any]:
    """Whole steps on the texts `found`, with equal positions asked for once or each by itself.

    `numbers`: up to the embeddings; `bytes`: up to the rows.
    """
    ways = {str(once): StepPrefetcher(tables, vocabulary, dedupe=once) for once in (True, False)}
    told = _search(ways["True"], found)
    for name, use in (("numbers", _numbers), ("bytes", _bytes)):
        contenders = {once: partial(_window, use, way, found) for once, way in ways.items()}
        alternate(1, contenders, f"{label}, warming")
        samples = alternate(windows, contenders, f"{label}, {name}")
        told[name] = {
            "once_us": summarize(samples["True"]),
            "each_us": summarize(samples["False"]),
            "ratio": compare(samples["True"], samples["False"]),
        }
    return told


def _search(steps: StepPrefetcher, found: np.ndarray) -> dict[str, Any]:
    """How much of one layer's keys is distinct, and how long it takes to find out."""
    mapping, layer = steps.mapping, steps.layer_ids[0]
    orders = mapping.scheme(layer).orders
    keys = [mapping.ngram_keys(text, layer)[:, CONTEXT:].reshape(-1, orders) for text in found]
    taken: dict[str, list[float]] = {"search_us": [], "numpy_unique_us": []}
    for part in keys:
        for name, search in (("search_us", find_distinct), ("numpy_unique_us", _numpy_unique)):
            before = time.perf_counter()
            search(part)
            taken[name].append((time.perf_counter() - before) * 1e6)
    shares = [len(find_distinct(part).lines) / len(part) for part in keys]
    return {"distinct_share": float(np.mean(shares)), **{n: summarize(t) for n, t in taken.items()}}


def _numpy_unique(keys: np.ndarray) -> object:
    """By the longest n-gram's key alone, which two lines hardly ever share."""
    return np.unique(keys[:, -1], return_index=True, return_inverse=True)


def order_of_arrival(tables: Mapping[int, Table], vocabulary: Any, found: np.ndarray) -> dict[str, Any]:
    """When each layer's rows were there, milliseconds from the start of a step, over the texts `found`."""
    steps = StepPrefetcher(tables, vocabulary)
    arrived = np.array([_arrivals(steps, text) for text in found]) * 1e3
    first, last = arrived[:, 0], arrived[:, -1]
    return {
        "steps": len(found),
        "first_layer_ms": summarize(first),
        "last_layer_ms": summarize(last),
        "in_order_share": float((first <= last).mean()),
    }


def _arrivals(steps: StepPrefetcher, text: np.ndarray) -> list[float]:
    """Seconds by layer; the layers are asked again and again, so that no wait hurries one of them."""
    lookback = _before(steps, text)
    started = time.perf_counter()
    there: dict[int, float] = {}
    with steps.start(text[:, CONTEXT:], lookback=lookback) as step:
        while len(there) < len(steps.layer_ids):
            for layer in steps.layer_ids:
                if layer not in there and step.done(layer):
                    there[layer] = time.perf_counter() - started
            time.sleep(POLL_S)
        for layer in steps.layer_ids:
            step.wait_distinct(layer)
    return [there[layer] for layer in steps.layer_ids]
