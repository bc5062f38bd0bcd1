"""From what trainers push to one gradient a row: decoded, summed in order, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engram_client.errors import NotFiniteGradient
from engram_client.kernels.gradients import as_float32, mark_not_finite, sum_by_row

Pushed = tuple[np.ndarray, np.ndarray]  # ids int64 [n], gradients [n, dim] as an `UpdateRequest` has them


def summed(pushes: Sequence[Pushed]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct row ids int64 [d] and their summed gradients float32 [d, dim].

    Pushes count in the order given, so the sum is the same bit for bit whenever they are.
    """
    ids = pushes[0][0] if len(pushes) == 1 else np.concatenate([i for i, _ in pushes])
    decoded = [as_float32(g) for _, g in pushes]
    return sum_by_row(ids, decoded[0] if len(decoded) == 1 else np.concatenate(decoded))


def not_finite(gradients: np.ndarray) -> np.ndarray | None:
    """Which rows of float32 [n, dim] hold an infinity or NaN, bool [n]; None where none does."""
    marks = np.zeros(len(gradients), np.bool_)
    return marks if mark_not_finite(gradients, marks) else None


def refusal(table: str, ids: np.ndarray, marks: np.ndarray) -> NotFiniteGradient:
    """Names the first row that is marked."""
    return NotFiniteGradient(
        f"table {table!r}: the gradient of row {ids[np.argmax(marks)]} is not finite ({marks.sum()} such "
        f"rows of "
        f"{ids.size}); nothing was applied; lower the loss scale or the learning rate, or set "
        "training.not_finite=skip"
    )
