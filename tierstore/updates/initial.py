"""Rows that were never written: computed when they are asked for, or read from what the table was before."""

from __future__ import annotations

import hashlib

import numpy as np

from engram_client.deadline import Deadline
from tierstore.format.header import uuid_words
from tierstore.kernels.initial_rows import BFLOAT16, FLOAT32, fill_normal
from tierstore.updates.base_rows import BaseRows
from tierstore.updates.disk import Disk
from tierstore.updates.reading import PieceReader
from tierstore.updates.spec import TrainedSpec

WEIGHTS = ("weight", "master")
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16}


class InitialRows:
    """Of one table. Open and close it where there is something to read."""

    def __init__(self, spec: TrainedSpec) -> None:
        self._spec = spec
        self._words = uuid_words(hashlib.blake2b(spec.name.encode(), digest_size=16).digest())
        fields = [f for f in spec.layout.fields if f.name in WEIGHTS and f.dtype in KINDS]
        self._fields = [(spec.layout.offset_bytes(f.name), KINDS[f.dtype], f.count) for f in fields]
        self._base: BaseRows | None = None

    def open(self, disk: Disk) -> None:
        """Raises FormatError where what the table began with is not there."""
        if self._spec.initial.kind == "packed":
            self._base = BaseRows(disk, self._spec)

    def close(self) -> None:
        if self._base:
            self._base.close()
            self._base = None

    @property
    def are_zeros(self) -> bool:
        initial = self._spec.initial
        return initial.kind == "zeros" or (initial.kind == "normal" and initial.std == 0)

    def fill(
        self, ids: np.ndarray, targets: np.ndarray, out: np.ndarray, reader: PieceReader, deadline: Deadline
    ) -> None:
        """Row ids[i] goes to out[targets[i]]; int64 [n] both, out uint8 [m, row_bytes].

        Raises DataCorrupt, StorageError, DeadlineExceeded where rows are read; `out` is undefined then.
        """
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
        if initial.kind == "packed":
            assert self._base is not None
            self._base.fill(ids, targets, out, reader, deadline)
