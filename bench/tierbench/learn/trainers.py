"""Models in the middle of training, to be timed in turn: the table in a store, and in memory as a whole."""

from __future__ import annotations

import time
from itertools import cycle

import numpy as np

from engram_client import NgramHashMapping
from tierbench.learn.memory import Memory, Tiered
from tierbench.learn.model import LanguageModel
from tierbench.learn.runs import Recipe, training_steps

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
        self._tokens = recipe.batch * recipe.context  # of a step
        self._steps = training_steps(model, memory, mapping, cycle(batches), recipe)
        self.rate(WARM_STEPS)

    def rate(self, steps: int) -> float:
        """Tokens a second over so many further steps."""
        started = time.perf_counter()
        for _ in range(steps):
            next(self._steps)
        return steps * self._tokens / (time.perf_counter() - started)

    def rate_beside_commits(self, steps: int) -> float:
        """The same, while all that has been learnt since the last commit is made durable beside it.

        Handing over counts; a commit that goes on when the steps are over is waited for outside of the time.
        """
        assert isinstance(self.memory, Tiered)
        started = time.perf_counter()
        self.memory.commit()
        handed_over_s = time.perf_counter() - started
        rate = self.rate(steps)
        tokens = steps * self._tokens
        self.memory.settle()
        return tokens / (tokens / rate + handed_over_s)
