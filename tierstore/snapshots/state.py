"""What a commit keeps beside the rows: how far each table's training has come, and whose share this is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainingState:
    """`tables` are their progress by uuid; `training` is the sharded training that a share belongs to, or
    ""."""

    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    training: str = ""

    def encode(self) -> bytes:
        found: dict[str, Any] = {"tables": dict(self.tables)}
        if self.training:
            found["training"] = self.training
        return json.dumps(found).encode()

    @classmethod
    def decode(cls, state: bytes) -> TrainingState:
        """Inverse of `encode`; of nothing where there was no commit."""
        found = json.loads(state) if state else {}
        return cls(found.get("tables", {}), found.get("training", ""))
