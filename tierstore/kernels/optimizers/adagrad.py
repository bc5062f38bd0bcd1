"""Adagrad with a sum an element, equal to torch.optim.Adagrad with sparse gradients."""

from __future__ import annotations

import math

import numpy as np

from engram_client.jit import kernel
from engram_client.spec import Field
from tierstore.kernels.optimizer import Optimizer, Request, Settings
from tierstore.kernels.trained_row import (
    DIM,
    STATE_AT,
    ask_ahead,
    begin,
    end,
    finish,
    floats_at,
    weights_of,
)

RATE, DECAY, EPS, INITIAL = range(4)


def _scalars(settings: Settings, request: Request) -> np.ndarray:
    rate = request.learning_rate / (1 + (request.steps - 1) * settings["lr_decay"])
    kept = 1.0 - request.learning_rate * request.weight_decay
    return np.array([rate, kept, settings["eps"], settings["initial_accumulator_value"]], np.float64)


@kernel
def update_adagrad(rows, guards, gradients, places, scalars):
    """s <- s + g^2; w <- w * decay - rate * g / (sqrt(s) + eps)."""
    dim = places[DIM]
    scratch = np.empty(dim, np.float32)
    rate, decay = np.float32(scalars[RATE]), np.float32(scalars[DECAY])
    eps, initial = np.float32(scalars[EPS]), np.float32(scalars[INITIAL])
    for i in range(rows.size):
        ask_ahead(rows, guards, places, i)
        if rows[i] == 0:
            continue
        begin(guards[i])
        weights = weights_of(rows[i], places, scratch)
        sums = floats_at(rows[i] + places[STATE_AT], dim)
        for j in range(dim):
            gradient = gradients[i, j]
            total = sums[j] + gradient * gradient
            sums[j] = total
            weights[j] = weights[j] * decay - rate * (gradient / (math.sqrt(total + initial) + eps))
        finish(rows[i], places, weights)
        end(guards[i])


OPTIMIZER = Optimizer(
    name="adagrad",
    meaning="Adagrad, one sum an element",
    settings={"eps": 1e-10, "lr_decay": 0.0, "initial_accumulator_value": 0.0},
    state=lambda dim, settings: (Field("adagrad_sum", "float32", dim),),
    scalars=_scalars,
    kernel=update_adagrad,
)
