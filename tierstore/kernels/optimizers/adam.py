"""Adam on the rows that have a gradient, equal to torch.optim.SparseAdam.

Moments of a row that is not in the batch stay as they are. What `step` is in the bias correction has two
answers. By default, as in SparseAdam, it counts the table's updates: a row first seen at update 10,000
meets corrections of 1, and its moments, which start at zero, make its first updates (1 - beta1) / sqrt(1 -
beta2) = 3.2 times as large as those of the first rows. With `per_row_steps` each row counts its own updates
in four bytes more of state, and its first update is as large as that of any other: right for rows seen
rarely.
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

RATE, DECAY, EPS, BETA1, BETA2, STEP_SIZE = range(6)


def _state(dim: int, settings: Settings) -> tuple[Field, ...]:
    moments = (Field("adam_m", "float32", dim), Field("adam_v", "float32", dim))
    return (*moments, Field("adam_steps", "float32", 1)) if settings["per_row_steps"] else moments


def _scalars(settings: Settings, request: Request) -> np.ndarray:
    rate, beta1, beta2 = request.learning_rate, settings["beta1"], settings["beta2"]
    step_size = rate * math.sqrt(1 - beta2**request.steps) / (1 - beta1**request.steps)
    kept = 1.0 - rate * request.weight_decay
    return np.array([rate, kept, settings["eps"], beta1, beta2, step_size], np.float64)


@kernel
def update_adam(rows, guards, gradients, places, scalars):
    """m, v <- moving averages of g, g^2; w <- w * decay - step_size * m / (sqrt(v) + eps)."""
    dim = places[DIM]
    scratch = np.empty(dim, np.float32)
    decay, eps = np.float32(scalars[DECAY]), np.float32(scalars[EPS])
    new1, new2 = np.float32(1.0 - scalars[BETA1]), np.float32(1.0 - scalars[BETA2])
    step_size = np.float32(scalars[STEP_SIZE])
    counting = places[STATE_AT + 2] >= 0
    for i in range(rows.size):
        ask_ahead(rows, guards, places, i)
        row = rows[i]
        if row == 0:
            continue
        begin(guards[i])
        if counting:
            count = floats_at(row + places[STATE_AT + 2], 1)
            count[0] += np.float32(1.0)
            steps = np.float64(count[0])
            corrected = math.sqrt(1.0 - scalars[BETA2] ** steps) / (1.0 - scalars[BETA1] ** steps)
            step_size = np.float32(scalars[RATE] * corrected)
        weights = weights_of(row, places, scratch)
        first = floats_at(row + places[STATE_AT], dim)
        second = floats_at(row + places[STATE_AT + 1], dim)
        for j in range(dim):
            gradient = gradients[i, j]
            m = first[j] + (gradient - first[j]) * new1
            v = second[j] + (gradient * gradient - second[j]) * new2
            first[j] = m
            second[j] = v
            weights[j] = weights[j] * decay - step_size * (m / (math.sqrt(v) + eps))
        finish(row, places, weights)
        end(guards[i])


OPTIMIZER = Optimizer(
    name="adam",
    meaning="Adam on touched rows, as torch.optim.SparseAdam",
    settings={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "per_row_steps": 0.0},
    state=_state,
    scalars=_scalars,
    kernel=update_adam,
)
