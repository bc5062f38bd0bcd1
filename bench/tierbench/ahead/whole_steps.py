"""Steps of two layers by `StepPrefetcher`: what finding equal positions gains, and whose rows come first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from engram_client import StepPrefetcher, Table
from engram_client.modules import StepRows
from engram_client.step import find_distinct
from tierbench.alternate import alternate
from tierbench.record import compare, summarize

STEPS = (6, 60)  # in a window, fewest and most
TOKENS_A_WINDOW = 8192
POLL_S = 20e-6
Use = Callable[[StepPrefetcher, np.ndarray], None]
Texts = Callable[[int], np.ndarray]  # how many steps -> token ids [steps, B, T]


def steps_in_window(shape: tuple[int, int]) -> int:
    return min(STEPS[1], max(STEPS[0], TOKENS_A_WINDOW // (shape[0] * shape[1])))


def _numbers(steps: StepPrefetcher, tokens: np.ndarray) -> None:
    with steps.start(tokens) as step:
        for layer in steps.layer_ids:
            StepRows(step, layer).wait()


def _bytes(steps: StepPrefetcher, tokens: np.ndarray) -> None:
    with steps.start(tokens) as step:
        for layer in steps.layer_ids:
            step.wait(layer)


def _window(
    use: Callable[[StepPrefetcher, np.ndarray], None], steps: StepPrefetcher, texts: np.ndarray
) -> float:
    """Microseconds of a step in the median."""
    taken = []
    for tokens in texts:
        before = time.perf_counter()
        use(steps, tokens)
        taken.append(time.perf_counter() - before)
    return float(np.median(taken)) * 1e6


def compare_dedupe(
    tables: Mapping[int, Table], vocabulary: Any, found: np.ndarray, windows: int, label: str
) -> dict[str, Any]:
    """Whole steps on token ids `found` [steps, B, T], with equal positions asked for once or each by itself.

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
    keys = [mapping.ngram_keys(tokens, layer).reshape(-1, mapping.scheme(layer).orders) for tokens in found]
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


def order_of_arrival(
    tables: Mapping[int, Table], vocabulary: Any, texts: Texts, shape: tuple[int, int], label: str
) -> dict[str, Any]:
    """When each layer's rows were there, milliseconds from the start of a step, over one window of steps."""
    steps = StepPrefetcher(tables, vocabulary)
    found = texts(2 * steps_in_window(shape))
    arrived = np.array([_arrivals(steps, tokens) for tokens in found]) * 1e3
    first, last = arrived[:, 0], arrived[:, -1]
    return {
        "steps": len(found),
        "first_layer_ms": summarize(first),
        "last_layer_ms": summarize(last),
        "in_order_share": float((first <= last).mean()),
    }


def _arrivals(steps: StepPrefetcher, tokens: np.ndarray) -> list[float]:
    """Seconds by layer; the layers are asked again and again, so that no wait hurries one of them."""
    started = time.perf_counter()
    there: dict[int, float] = {}
    with steps.start(tokens) as step:
        while len(there) < len(steps.layer_ids):
            for layer in steps.layer_ids:
                if layer not in there and step.done(layer):
                    there[layer] = time.perf_counter() - started
            time.sleep(POLL_S)
        for layer in steps.layer_ids:
            step.wait_distinct(layer)
    return [there[layer] for layer in steps.layer_ids]
