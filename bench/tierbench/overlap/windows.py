"""Windows of steps: the same text through the same model, with the rows from one source after another.

A step begins when its tokens are known (for decoding: right after sampling) and ends with its output. In
prefilling, the next chunk's tokens are known at the beginning of a chunk, so a source may start them then;
a window's first chunk has nothing in front of it and is told apart. Every window starts fresh sequences,
and its text is read by every source, so a cache behind one of them sees each text once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import DataCorrupt
from tierbench.alternate import alternate
from tierbench.overlap.model import Cache, Transformer
from tierbench.overlap.sources import Source


@dataclass(frozen=True)
class Window:
    """How long each step took and stood still, and what it gave."""

    step_s: list[float]
    waited_s: dict[int, list[float]]  # by layer
    asked_s: list[float]  # hashing, and asking where a source asks ahead
    outputs: list[Tensor]

    def after(self, steps: int) -> Window:
        """Without its first steps."""
        waits = {layer: waited[steps:] for layer, waited in self.waited_s.items()}
        return Window(self.step_s[steps:], waits, self.asked_s[steps:], self.outputs[steps:])


def run_window(model: Transformer, source: Source, steps: np.ndarray, *, ahead: bool) -> Window:
    """One window over token ids [steps, B, T]; with `ahead`, each step starts the next one's rows."""
    count, batch, length = steps.shape
    cache = Cache(model.shape, batch, count * length)
    source.begin(batch)
    for waits in source.waited_s.values():
        waits.clear()
    taken, asked, outputs = [], [], []
    for i in range(count):
        tokens = torch.from_numpy(steps[i])
        before = time.perf_counter()
        if i == 0 or not ahead:
            source.start(steps[i])
        if ahead and i + 1 < count:
            source.start(steps[i + 1])
        asked.append(time.perf_counter() - before)
        outputs.append(model(tokens, cache, source.rows))
        source.end_step()
        taken.append(time.perf_counter() - before)
    waited_s = {layer: list(waits) for layer, waits in source.waited_s.items()}
    return Window(taken, waited_s, asked, outputs)


class Contender:
    """Runs window after window, each time the next one of `texts` [windows, steps, B, T]."""

    def __init__(self, model: Transformer, source: Source, texts: np.ndarray, ahead: bool) -> None:
        self._model, self._source, self._texts, self._ahead = model, source, texts, ahead
        self._next = 0

    def __call__(self) -> Window:
        window = run_window(self._model, self._source, self._texts[self._next], ahead=self._ahead)
        self._next += 1
        return window


def run_windows(
    model: Transformer, sources: Mapping[str, Source], texts: np.ndarray, *, ahead: bool, label: str
) -> dict[str, list[Window]]:
    """All windows by source, in turn. Raises DataCorrupt where two sources give different outputs."""
    contenders = {name: Contender(model, source, texts, ahead) for name, source in sources.items()}
    found = alternate(len(texts), contenders, label)
    first = next(iter(found))
    for name, windows in found.items():
        for w, (ours, theirs) in enumerate(zip(windows, found[first], strict=True)):
            for i, (a, b) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
                if not torch.equal(a, b):
                    raise DataCorrupt(f"{label}: step {i} of window {w} differs between {name} and {first}")
    return found
