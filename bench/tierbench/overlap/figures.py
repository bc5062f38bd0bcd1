"""From windows to figures: step times, ratios window by window, who waited where, and where it crosses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tierbench.overlap.windows import Window
from tierbench.record import compare, summarize

OVERHEAD_MAX = 1.03  # of the step with resident tables
RESIDENT, AGAIN, PREFETCHED, IN_THE_LAYER = "resident", "resident again", "prefetched", "in the layer"


def figures(found: Mapping[str, list[Window]], layers: int) -> dict[str, Any]:
    """Everything about one size of the model and the step, against the first resident source."""
    told = {name: _told(windows) for name, windows in found.items()}
    totals = {name: [sum(w.step_s) for w in windows] for name, windows in found.items()}
    base = _steps(found[RESIDENT])
    for name, windows in found.items():
        if name != RESIDENT:
            told[name]["over_resident"] = {
                **compare(totals[name], totals[RESIDENT]),
                "step_ratio_median": float(np.median(_steps(windows) / base)),
            }
    still = sum(np.concatenate([w.waited_s[layer] for w in found[RESIDENT]]) for layer in _layers(found))
    reads = [np.concatenate([w.waited_s[layer] for w in found[IN_THE_LAYER]]) for layer in _layers(found)]
    return {
        **told,
        "compute_ms_a_layer": float(np.median(base - still)) / layers * 1e3,
        "read_ms_a_layer": float(np.median(np.concatenate(reads))) * 1e3,
    }


def _layers(found: Mapping[str, list[Window]]) -> list[int]:
    return list(found[RESIDENT][0].waited_s)


def _steps(windows: Iterable[Window]) -> np.ndarray:
    return np.concatenate([w.step_s for w in windows])


def _told(windows: list[Window]) -> dict[str, Any]:
    steps = _steps(windows)
    waits = {layer: np.concatenate([w.waited_s[layer] for w in windows]) for layer in windows[0].waited_s}
    return {
        "step_ms": summarize(steps * 1e3),
        "asked_ms": summarize(np.concatenate([w.asked_s for w in windows]) * 1e3),
        "waited_share": {f"layer_{layer}": float(w.sum() / steps.sum()) for layer, w in waits.items()},
        "waited_ms": {f"layer_{layer}": summarize(w * 1e3) for layer, w in waits.items()},
    }


def crossings(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of step, the hidden sizes at which prefetching costs more than OVERHEAD_MAX.

    Beside each stands how much one layer computes in the time of one read.
    """
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for size in found:
        ratio = size["tenth"][PREFETCHED]["over_resident"]["ratio_median"]
        part = size["tenth"]["compute_ms_a_layer"] / max(size["tenth"]["read_ms_a_layer"], 1e-9)
        kinds.setdefault((size["kind"], size["batch"], size["length"], size["threads"]), []).append(
            {"hidden": size["hidden"], "compute_over_read": part, "ratio": ratio}
        )
    return [
        {
            **dict(zip(("kind", "batch", "length", "threads"), kind, strict=True)),
            "sizes": sizes,
            "over_at": [s["hidden"] for s in sizes if s["ratio"] > OVERHEAD_MAX],
            "within_at": [s["hidden"] for s in sizes if s["ratio"] <= OVERHEAD_MAX],
        }
        for kind, sizes in kinds.items()
    ]
