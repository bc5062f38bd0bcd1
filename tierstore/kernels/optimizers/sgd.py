"""Stochastic gradient descent, equal to torch.optim.SGD on the rows that have a gradient."""

from __future__ import annotations

import numpy as np

from engram_client.jit import kernel
from tierstore.kernels.optimizer import Optimizer, Request, Settings
from tierstore.kernels.trained_row import DIM, ask_ahead, begin, end, finish, weights_of

LEARNING_RATE, DECAY = range(2)


def _scalars(settings: Settings, request: Request) -> np.ndarray:
    kept = 1.0 - request.learning_rate * request.weight_decay
    return np.array([request.learning_rate, kept], np.float64)


@kernel
def update_sgd(rows, guards, gradients, places, scalars):
    """w <- w * decay - rate * g, as `tierstore.kernels.optimizer` describes the arguments."""
    dim = places[DIM]
    scratch = np.empty(dim, np.float32)
    rate, decay = np.float32(scalars[LEARNING_RATE]), np.float32(scalars[DECAY])
    for i in range(rows.size):
        ask_ahead(rows, guards, places, i)
        if rows[i] == 0:
            continue
        begin(guards[i])
        weights = weights_of(rows[i], places, scratch)
        for j in range(dim):
            weights[j] = weights[j] * decay - rate * gradients[i, j]
        finish(rows[i], places, weights)
        end(guards[i])


OPTIMIZER = Optimizer(
    name="sgd",
    meaning="stochastic gradient descent, no state",
    settings={},
    state=lambda dim, settings: (),
    scalars=_scalars,
    kernel=update_sgd,
)
