"""Models in the middle of training, to be timed in turn: the table in a store, and in memory as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle

import numpy as np

from engram_client import NgramHashMapping
from tierbench.learn.memory import Memory, Tiered
from tierbench.learn.model import LanguageModel
from tierbench.learn.runs import Recipe, train

WARM_STEPS = 5


class Trainer:
    """One model and its table; every call of `steps` goes on behind the last."""

    def __init__(
        self,
        model: LanguageModel,
        memory: Memory,
        mapping: NgramHashMapping,
        batches: np.ndarray,
        recipe: Recipe,
    ) -> None:
        """`batches` int64 [steps, B, T + 1] come again when they are used up."""
        self.memory = memory
        self._model, self._mapping, self._recipe = model, mapping, recipe
        self._batches: Iterator[np.ndarray] = cycle(batches)
        self.rate(WARM_STEPS)

    def rate(self, steps: int) -> float:
        """Tokens a second over so many further steps."""
        batches = np.stack([next(self._batches) for _ in range(steps)])
        _, seconds = train(self._model, self.memory, self._mapping, batches, self._recipe)
        return steps * self._recipe.batch * self._recipe.context / seconds

    def rate_beside_commits(self, steps: int) -> float:
        """The same, while all that has been learnt since the last commit is made durable beside it.

        Handing over counts; a commit that goes on when the steps are over is waited for outside of the time.
        """
        assert isinstance(self.memory, Tiered)
        started = time.perf_counter()
        self.memory.commit()
        handed_over_s = time.perf_counter() - started
        rate = self.rate(steps)
        tokens = steps * self._recipe.batch * self._recipe.context
        self.memory.settle()
        return tokens / (tokens / rate + handed_over_s)
