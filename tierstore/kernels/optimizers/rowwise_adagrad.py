"""Row-wise Adagrad: one sum a row, of the mean squared gradient, as large recommendation tables are trained.

Four bytes of state a row instead of four an element; each row still has a learning rate of its own.
"""

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

RATE, DECAY, EPS = range(3)


def _scalars(settings: Settings, request: Request) -> np.ndarray:
    kept = 1.0 - request.learning_rate * request.weight_decay
    return np.array([request.learning_rate, kept, settings["eps"]], np.float64)


@kernel
def update_rowwise_adagrad(rows, guards, gradients, places, scalars):
    """s <- s + mean(g^2); w <- w * decay - rate / (sqrt(s) + eps) * g."""
    dim = places[DIM]
    scratch = np.empty(dim, np.float32)
    rate, decay, eps = np.float32(scalars[RATE]), np.float32(scalars[DECAY]), np.float32(scalars[EPS])
    for i in range(rows.size):
        ask_ahead(rows, guards, places, i)
        if rows[i] == 0:
            continue
        squares = 0.0  # in float64: the order of the sum does not show
        for j in range(dim):
            squares += np.float64(gradients[i, j]) * np.float64(gradients[i, j])
        begin(guards[i])
        weights = weights_of(rows[i], places, scratch)
        total = floats_at(rows[i] + places[STATE_AT], 1)
        total[0] += np.float32(squares / dim)
        factor = rate / (math.sqrt(total[0]) + eps)
        for j in range(dim):
            weights[j] = weights[j] * decay - factor * gradients[i, j]
        finish(rows[i], places, weights)
        end(guards[i])


OPTIMIZER = Optimizer(
    name="rowwise_adagrad",
    meaning="Adagrad, one sum a row",
    settings={"eps": 1e-10},
    state=lambda dim, settings: (Field("rowwise_adagrad_sum", "float32", 1),),
    scalars=_scalars,
    kernel=update_rowwise_adagrad,
)
