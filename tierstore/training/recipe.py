"""How a table is trained: which optimizer, with which settings, and what its rows hold for it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, FormatError
from engram_client.spec import Field, RowLayout
from tierstore.kernels.optimizer import Optimizer, Request
from tierstore.kernels.optimizers import OPTIMIZERS
from tierstore.kernels.trained_row import DIM, MASTER_AT, PLACES, ROUNDED, ROW_BYTES, STATE_AT, WEIGHT_AT

WEIGHT_DTYPES = ("float32", "bfloat16")
ALIGNMENT_BYTES = 4  # of every float32 field


@dataclass(frozen=True)
class Recipe:
    """`settings` are the optimizer's own, all of them. A request may give another rate and decay.

    Learning rates are the model's: the table learns `rate_scale` times as fast.
    """

    optimizer: str
    settings: dict[str, float] = field(default_factory=dict)
    learning_rate: float | None = None  # of updates that give none
    weight_decay: float = 0.0
    rate_scale: float = 1.0

    def __post_init__(self) -> None:
        known = self.kind.settings
        if unknown := sorted(set(self.settings) - set(known)):
            raise BadRequest(
                f"optimizer {self.optimizer!r} has no setting {unknown[0]!r}; it has: "
                f"{', '.join(known) or 'none'}"
            )
        object.__setattr__(self, "settings", {**known, **{k: float(v) for k, v in self.settings.items()}})
        _check_numbers(self)

    @property
    def kind(self) -> Optimizer:
        """Raises BadRequest for an optimizer that is not there."""
        if self.optimizer not in OPTIMIZERS:
            near = difflib.get_close_matches(self.optimizer, [*OPTIMIZERS, *PRESETS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadRequest(
                f"no optimizer {self.optimizer!r}{hint}; there are: {', '.join(OPTIMIZERS)}, and the presets "
                f"{', '.join(PRESETS)}"
            )
        return OPTIMIZERS[self.optimizer]

    def scalars(self, learning_rate: float | None, weight_decay: float | None, steps: int) -> np.ndarray:
        """What the kernel takes, for the update that makes `steps` of them. Raises BadRequest."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        decay = self.weight_decay if weight_decay is None else weight_decay
        if rate is None:
            raise BadRequest("no learning rate: the table was made without one, give it with each update")
        _check_number("learning rate", rate)
        _check_number("weight decay", decay)
        return self.kind.scalars(self.settings, Request(rate * self.rate_scale, decay, steps))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`. Raises FormatError."""
        try:
            return cls(**obj)
        except (TypeError, ValueError, BadRequest) as error:
            raise FormatError(f"a table's optimizer cannot be read: {error}") from error


# "The paper's recipe": Adam at five times the model's rate, without weight decay.
PRESETS: dict[str, dict[str, Any]] = {"engram": {"optimizer": "adam", "rate_scale": 5.0}}


def make_recipe(optimizer: str, **given: Any) -> Recipe:
    """By the name of an optimizer or preset; `given` are fields of `Recipe`. Raises BadRequest."""
    return Recipe(**{**PRESETS.get(optimizer, {"optimizer": optimizer}), **given})


def _check_numbers(recipe: Recipe) -> None:
    for name, value in recipe.settings.items():
        _check_number(f"setting {name!r}", value)
        if name.startswith("beta") and value >= 1:
            raise BadRequest(f"setting {name!r} must be below 1, got {value}")
    if recipe.learning_rate is not None:
        _check_number("learning rate", recipe.learning_rate)
    _check_number("weight decay", recipe.weight_decay)
    _check_number("rate scale", recipe.rate_scale)


def _check_number(what: str, value: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRequest(f"{what} must be a finite number >= 0, got {value!r}")


def layout_of(dim: int, recipe: Recipe, *, dtype: str = "float32", master: bool = True) -> RowLayout:
    """The fields of a row: weights, their float32 master where they are rounded, the optimizer's state.

    `master` false leaves it out: weights are then bfloat16 alone. Raises BadRequest.
    """
    if dim < 1:
        raise BadRequest(f"a row has at least one element, got {dim}")
    if dtype not in WEIGHT_DTYPES:
        raise BadRequest(f"weights are trained as {' or '.join(WEIGHT_DTYPES)}, got {dtype!r}")
    weight = Field("weight", dtype, dim)
    if weight.bytes % ALIGNMENT_BYTES:
        raise BadRequest(f"bfloat16 rows have an even number of elements, got {dim}; use float32, or pad")
    keeps = dtype != "float32" and master
    fields = (weight, *((Field("master", "float32", dim),) if keeps else ()))
    return RowLayout((*fields, *recipe.kind.state(dim, recipe.settings)))


def places_of(layout: RowLayout) -> np.ndarray:
    """Where a layout's fields lie, as `tierstore.kernels.trained_row` takes it: int64 [PLACES]."""
    places = np.full(PLACES, -1, np.int64)
    weight = layout.field("weight")
    places[DIM], places[ROW_BYTES] = weight.count, layout.row_bytes
    places[WEIGHT_AT], places[ROUNDED] = layout.offset_bytes("weight"), weight.dtype != "float32"
    names = [f.name for f in layout.fields]
    if "master" in names:
        places[MASTER_AT] = layout.offset_bytes("master")
    for i, name in enumerate(n for n in names if n not in ("weight", "master")):
        places[STATE_AT + i] = layout.offset_bytes(name)
    return places
