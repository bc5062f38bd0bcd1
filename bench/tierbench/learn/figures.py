"""What runs say together: losses over seeds, and the line that loss against table size comes near to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def over_seeds(losses: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample) and all of them."""
    values = np.asarray(losses, np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": spread, "losses": [float(v) for v in values]}


def log_log_fit(rows: Sequence[int], losses: Sequence[float]) -> dict[str, float]:
    """Least squares of log loss = a + slope * log rows; `r2` is 1 where it is a straight line."""
    x, y = np.log(np.asarray(rows, np.float64)), np.log(np.asarray(losses, np.float64))
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 if spread == 0 else 1.0 - float((left**2).sum()) / spread
    return {
        "slope": float(slope),
        "loss_at_one_row": math.exp(float(intercept)),
        "r2": r2,
        "worst_residual_percent": 100 * math.expm1(float(np.abs(left).max())),
    }
