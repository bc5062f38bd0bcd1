"""Rows that were never written, computed when they are asked for."""

from __future__ import annotations

import hashlib

import numpy as np

from tierstore.format.header import uuid_words
from tierstore.kernels.initial_rows import BFLOAT16, FLOAT32, fill_normal
from tierstore.updates.spec import TrainedSpec

WEIGHTS = ("weight", "master")
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16}


class InitialRows:
    """Of one table."""

    def __init__(self, spec: TrainedSpec) -> None:
        self._spec = spec
        self._words = uuid_words(hashlib.blake2b(spec.name.encode(), digest_size=16).digest())
        fields = [f for f in spec.layout.fields if f.name in WEIGHTS and f.dtype in KINDS]
        self._fields = [(spec.layout.offset_bytes(f.name), KINDS[f.dtype], f.count) for f in fields]

    def fill(self, ids: np.ndarray, targets: np.ndarray, out: np.ndarray) -> None:
        """Row ids[i] goes to out[targets[i]]; int64 [n] both, out uint8 [m, row_bytes]."""
        if ids.size == 0:
            return
        out[targets] = 0
        if self._spec.partition is not None:  # a row begins the same, whoever keeps it
            ids = self._spec.partition.row_ids(ids)
        initial = self._spec.initial
        if initial.kind == "normal" and initial.std > 0:
            for offset, kind, count in self._fields:
                fill_normal(
                    ids, targets, out, offset, kind, count, initial.std, np.uint64(initial.seed), *self._words
                )
