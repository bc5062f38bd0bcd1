"""One table in training: where its rows are kept, and how far its training has come."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from engram_client.arena.layout import ORDER_BITS
from engram_client.errors import BadRequest, GenerationMismatch
from engram_client.ids import check_row_ids
from engram_client.spec import RowLayout, TableSpec
from engram_client.transport.base import LookupRequest
from engram_client.transport.training import GRADIENT_DTYPES, TrainedDescription, UpdateRequest
from tierstore.tiers.trained import TrainedArena
from tierstore.training.recipe import Recipe, places_of
from tierstore.updates import TrainedSpec


class TrainedTable:
    """`number` is its place among the store's tables. Steps are written by whose turn it is."""

    def __init__(self, spec: TrainedSpec, number: int, arena: TrainedArena) -> None:
        self.trained, self.number, self.arena = spec, number, arena
        self.owner = (number + 1) << ORDER_BITS
        self.recipe = Recipe.from_json(spec.optimizer)
        self.places = places_of(spec.layout)
        weight = spec.layout.field("weight")
        self.dim = weight.count
        self.part = (spec.layout.offset_bytes("weight"), weight.bytes)
        self.updates = 0  # so far: steps with an update, as optimizers count them
        self.updated_step: int | None = None
        self.spec: TableSpec

    @staticmethod
    def number_of(owner: int) -> int:
        return (owner >> ORDER_BITS) - 1

    @property
    def name(self) -> str:
        return self.trained.name

    def begin_history(self, history: bytes) -> None:
        """Whatever was learned about rows before belongs to another generation."""
        spec = self.trained
        generation = hashlib.blake2b(bytes.fromhex(spec.uuid) + history, digest_size=16).hexdigest()
        layout = RowLayout((spec.layout.field("weight"),))
        self.spec = TableSpec(
            spec.name, generation, spec.uuid, spec.rows, layout, "row", spec.scheme, spec.layer, spec.model
        )

    def check_generation(self, generation: str) -> None:
        if generation != self.spec.generation:
            raise GenerationMismatch(
                f"table {self.name!r}: the request is for generation {generation}, now is "
                f"{self.spec.generation}; "
                "the table was opened anew or rolled back, and updates since its last commit are gone: "
                "fetch the "
                "table anew, and go on from a model checkpoint of the same step"
            )

    def check_lookup(self, request: LookupRequest, out: np.ndarray) -> None:
        """Raises BadRequest and its kinds, GenerationMismatch."""
        self.check_generation(request.generation)
        if request.address != "row" or request.heads is not None:
            raise BadRequest(f"table {self.name!r} is in training, so it is addressed by row ids; use lookup")
        self._check_ids(request.ids)
        if out.dtype != np.uint8 or out.nbytes != request.ids.size * self.part[1] or not out.flags.carray:
            raise BadRequest(
                f"table {self.name!r}: expected room for {request.ids.size * self.part[1]} bytes, writable "
                f"and "
                f"C-contiguous, got {out.nbytes}"
            )

    def check_update(self, request: UpdateRequest) -> None:
        """All but its numbers. Raises BadRequest and its kinds, GenerationMismatch."""
        self.check_generation(request.generation)
        self._check_ids(request.ids)
        gradients = request.gradients
        if gradients.dtype not in GRADIENT_DTYPES:
            raise BadRequest(
                f"table {self.name!r}: gradients are float32, bfloat16 or float16, got {gradients.dtype}"
            )
        if gradients.shape != (request.ids.size, self.dim) and (request.ids.size or gradients.size):
            raise BadRequest(
                f"table {self.name!r}: {request.ids.size} row ids need gradients of shape "
                f"[{request.ids.size}, {self.dim}], got {list(gradients.shape)}"
            )
        if request.step < 0:
            raise BadRequest(f"table {self.name!r}: steps are counted from 0, got {request.step}")
        if not 0 <= request.part < request.parts:
            raise BadRequest(f"table {self.name!r}: part {request.part} of {request.parts} parts")

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.dtype != np.int64 or ids.ndim != 1 or not ids.flags.c_contiguous:
            raise BadRequest(
                f"table {self.name!r}: row ids must be C-contiguous int64 [n], got {ids.dtype} "
                f"{list(ids.shape)}"
            )
        check_row_ids(ids, self.trained.rows, self.name)

    def steps_with(self, step: int) -> int:
        """How many updates there will have been with one of `step`."""
        return self.updates + (self.updated_step is None or step > self.updated_step)

    def note_update(self, step: int) -> None:
        self.updates = self.steps_with(step)
        self.updated_step = step if self.updated_step is None else max(step, self.updated_step)

    def progress(self) -> dict[str, Any]:
        """What a commit keeps, for `restore`."""
        return {"updates": self.updates, "updated_step": self.updated_step}

    def restore(self, progress: dict[str, Any] | None) -> None:
        """As it was then; None: as at the beginning."""
        self.updates = int(progress["updates"]) if progress else 0
        self.updated_step = progress["updated_step"] if progress else None

    def describe(self, committed_step: int | None, not_finite: str, training: str) -> TrainedDescription:
        trained = self.trained
        return TrainedDescription(
            self.spec, trained.optimizer, committed_step, self.updated_step, trained.partition,
            trained.initial.described(), not_finite, training,
        )  # fmt: skip
