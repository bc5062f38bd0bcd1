"""One model, trained for one pass over the text, and what it then makes of text it has not seen.

The batch of a step is so many stretches of the text, each from a place of its own: the text is cut into as
many lanes as a batch has sequences and read from front to back, so every run of a size sees the same tokens
in the same order, and each token once. A step's rows are asked for before the step in front of it computes:
what they are after its update comes from DRAM.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram_client import NgramHashMapping
from tierbench.learn.memory import Memory
from tierbench.learn.model import ENGRAM_LAYER, LanguageModel

WARM_UP_SHARE = 0.05
RATE_FLOOR = 0.1  # of the base rate, at the end
GRADIENT_NORM_MAX = 1.0


@dataclass(frozen=True)
class Recipe:
    """How a run learns; equal for every model that is compared."""

    batch: int
    context: int
    steps: int
    rate: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to; losses in nats a token."""

    validation_loss: float
    training_losses: list[float]  # of each step
    seconds: float  # of the training alone


def lanes(tokens: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Token ids int64 [steps, batch, context + 1]; the last of a stretch is only predicted."""
    lane = recipe.steps * recipe.context + 1
    starts = np.arange(recipe.batch) * lane
    steps = np.arange(recipe.steps) * recipe.context
    places = steps[:, None, None] + starts[None, :, None] + np.arange(recipe.context + 1)
    return tokens[places]


def tokens_needed(recipe: Recipe) -> int:
    return recipe.batch * (recipe.steps * recipe.context + 1)


def train(
    model: LanguageModel,
    memory: Memory | None,
    mapping: NgramHashMapping,
    batches: np.ndarray,
    recipe: Recipe,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[list[float], float]:
    """Losses of each step, and the seconds it took. `batches` as `lanes` gives them."""
    losses, started = [], time.perf_counter()
    for step, loss in enumerate(training_steps(model, memory, mapping, batches, recipe)):
        losses.append(loss)
        on_step(step)
    return losses, time.perf_counter() - started


def training_steps(
    model: LanguageModel,
    memory: Memory | None,
    mapping: NgramHashMapping,
    batches: Iterable[np.ndarray],
    recipe: Recipe,
) -> Iterator[float]:
    """Train by one batch int64 [B, T + 1] and give its loss, each time that a loss is asked for."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95))
    coming = iter(batches)
    following = next(coming, None)
    ahead = None if following is None else _start(memory, mapping, following)
    for step in itertools.count():
        batch, following = following, next(coming, None)
        if batch is None:
            return
        rows = memory.rows(ahead) if memory else None
        if following is not None:
            ahead = _start(memory, mapping, following)
        loss = _loss(model, batch, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
        rate = _rate(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if memory:
            memory.learn(step, rate)
        yield float(loss.detach())


@torch.no_grad()
def validate(
    model: LanguageModel, memory: Memory | None, mapping: NgramHashMapping, batches: np.ndarray
) -> float:
    """Mean loss in nats a token."""
    total = 0.0
    for batch in batches:
        rows = memory.rows(_start(memory, mapping, batch)) if memory else None
        total += float(_loss(model, batch, rows))
    return total / len(batches)


def _start(memory: Memory | None, mapping: NgramHashMapping, batch: np.ndarray) -> object:
    return memory.start(torch.from_numpy(mapping.row_ids(batch[:, :-1], ENGRAM_LAYER))) if memory else None


def _loss(model: LanguageModel, batch: np.ndarray, rows: Tensor | None) -> Tensor:
    tokens = torch.from_numpy(batch)
    logits = model(tokens[:, :-1], rows)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _rate(recipe: Recipe, step: int) -> float:
    """Linear to the base rate, then a cosine down to a tenth of it."""
    warm_up = max(1, int(WARM_UP_SHARE * recipe.steps))
    if step < warm_up:
        return recipe.rate * (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, recipe.steps - warm_up))
    return recipe.rate * (RATE_FLOOR + (1 - RATE_FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
