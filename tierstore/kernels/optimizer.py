"""What an optimizer is to the service: state that lies in the row, settings, and one kernel.

Each optimizer is one file of `tierstore.kernels.optimizers` that holds an `OPTIMIZER`; to add one is to add a
file. Its kernel updates a batch of rows by their addresses,

    kernel(rows, guards, gradients, places, scalars)

rows and guards int64 [n] as `trained_row` tells, row 0 is passed over; gradients float32 [n, dim], one for
each row; places int64 [PLACES]; scalars float64, the same for all rows. Rows are distinct.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engram_client.spec import Field

Settings = Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """What one update asks for, beside its gradients."""

    learning_rate: float
    weight_decay: float  # decoupled: weights of touched rows shrink by learning_rate * weight_decay
    steps: int  # updates of the table so far, this one included


@dataclass(frozen=True)
class Optimizer:
    """`settings` are its own, with the values that its publication or torch gives them."""

    name: str
    meaning: str
    settings: Settings
    state: Callable[[int, Settings], tuple[Field, ...]]  # of an embedding dim: fields behind the weights
    scalars: Callable[[Settings, Request], np.ndarray]
    kernel: Callable[..., None]
