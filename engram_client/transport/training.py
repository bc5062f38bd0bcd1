"""What trainers ask of a service that trains tables, and the interface a transport offers for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engram_client.partition import Partition
from engram_client.spec import TableSpec

BFLOAT16_BITS = np.dtype(np.uint16)  # numpy has no bfloat16: its bits stand for it
GRADIENT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16_BITS)


@dataclass(frozen=True)
class UpdateRequest:
    """Gradients of one step for rows of one table, from one trainer.

    `ids` int64 [n], -1 for no row; `gradients` [n, dim] float32, float16, or uint16 for the bits of bfloat16.
    `push` names this push: who repeats it with the same number is not applied twice. A push may come in
    `parts`, of which this is number `part`; it counts once all are there.
    """

    table: str
    generation: str
    step: int
    ids: np.ndarray
    gradients: np.ndarray
    learning_rate: float | None = None
    weight_decay: float | None = None
    rank: int = 0
    world: int = 1
    push: int = 0
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class TrainedDescription:
    """A table in training: what readers see of it, and how it learns."""

    spec: TableSpec  # its layout holds the weight alone
    optimizer: dict[str, Any] = field(default_factory=dict)
    committed_step: int | None = None
    updated_step: int | None = None  # of the newest update, committed or not
    partition: Partition | None = None  # `spec` is of one share of a larger table
    initial: dict[str, Any] = field(default_factory=dict)  # what rows are before they are trained
    not_finite: str = "refuse"  # or "skip": rows whose gradient is not finite
    training: str = ""  # of a share: with which others it has learned, as commits were told


class OpenStep(Protocol):
    """A committed step that is held open to be read while training goes on. Errors as of look-ups."""

    step: int
    state: bytes
    tables: list[Any]  # what the service knows of each, as it describes them

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows `ids` int64 [n] of table number `table` into `out` uint8 [n, row_bytes]."""

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        """Those of rows [first, last) that may differ from the initial ones: int64 [n], ascending."""

    def close(self) -> None: ...


class TrainingTransport(Protocol):
    """Where updates go. Thread safe; every error is an engram_client.errors class."""

    def describe(self) -> list[TrainedDescription]:
        """Every table in training."""

    def update(self, request: UpdateRequest, timeout_s: float | None) -> None:
        """Apply, or contribute to, one update; returns when it is applied.

        Raises NotFiniteGradient, StepConflict, GenerationMismatch, DeadlineExceeded, and what look-ups raise.
        """

    def commit(self, step: int, timeout_s: float | None, training: str = "") -> None:
        """Close a step over all tables; returns when it is on its way to the disk.

        `training` names the sharded training of a share, which keeps it. Raises BadRequest where it has
        another.
        """

    def wait_durable(self, step: int, timeout_s: float | None) -> None:
        """Returns when a committed step is on the disk."""

    def rollback(self, step: int, timeout_s: float | None) -> None:
        """Go back to a step that is kept; tables get a new generation. Durable when it returns."""

    def steps(self) -> list[int]:
        """Committed steps that are kept, oldest first."""

    def open_step(self, step: int | None) -> OpenStep:
        """A kept step, None: the last; its caller closes it. Raises BadRequest, Overloaded."""
