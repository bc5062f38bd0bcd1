"""Where the rows of a run lie: in a training store within a DRAM budget, or in memory as a whole.

Both begin with the same rows and follow the paper's recipe: Adam at five times the model's rate, without
decay. The resident one is `torch.optim.SparseAdam` on an `nn.Embedding`, and shows what the store has to
equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engram_client import connect
from engram_client.training import EngramEmbedding, EngramOptimizer
from tierstore.config import Config, Training
from tierstore.training import open_training
from tierstore.training.creating import NewTable, create_training

RATE_FACTOR = 5.0  # the paper's
INITIAL_STD = 0.02
TABLE = "memory"


class Memory(Protocol):
    """A table that a model learns."""

    def start(self, row_ids: Tensor) -> Any:
        """Begin to read rows int64 [B,T,H], while the model does something else."""
        ...

    def rows(self, started: Any) -> Tensor:
        """Rows [B,T,H,row_width] that gradients come back through."""
        ...

    def learn(self, step: int, rate: float) -> None:
        """One step along the gradients that have come back since the last; `rate` is the model's."""
        ...


class Resident:
    """All rows in memory, float32 [rows, row_width]; `weight` is where they begin."""

    def __init__(self, weight: Tensor) -> None:
        self.embedding = nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
        self.optimizer = torch.optim.SparseAdam(list(self.embedding.parameters()))

    def start(self, row_ids: Tensor) -> Any:
        return row_ids

    def rows(self, started: Any) -> Tensor:
        rows: Tensor = self.embedding(started)
        return rows

    def learn(self, step: int, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * RATE_FACTOR
        self.optimizer.step()
        self.optimizer.zero_grad()


class Tiered:
    """Rows in a training store in this process, made in `folder`. A context manager.

    `dram_bytes` is for rows and their optimizer's state; `commit_steps` is how often all is made durable.
    """

    def __init__(
        self, folder: Path, rows: int, row_width: int, *, dram_bytes: int, commit_steps: int, seed: int
    ) -> None:
        table = NewTable(TABLE, rows, row_width)
        create_training(folder, [table], optimizer="engram", initial_std=INITIAL_STD, seed=seed)
        self.row_bytes = 0
        _, self._release = open_training(folder, Config(training=Training(dram_bytes=dram_bytes)))
        self.client = connect(f"local:{folder}")
        self.training = self.client.training()
        self.table = self.training.table(TABLE)
        self.row_bytes = self.table.spec.row_bytes
        self.embedding = EngramEmbedding(self.table)
        self.optimizer = EngramOptimizer(self.training, [self.embedding])
        self._commit_steps = commit_steps
        self._commit: Any = None

    def start(self, row_ids: Tensor) -> Any:
        return self.embedding.start(row_ids)

    def rows(self, started: Any) -> Tensor:
        rows: Tensor = self.embedding(started)
        return rows

    def learn(self, step: int, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._commit_steps and (step + 1) % self._commit_steps == 0:
            self.commit()

    def commit(self) -> None:
        """Make the last step durable, while training goes on; the commit before it is waited for."""
        self.settle()
        self._commit = self.optimizer.commit(wait=False)

    def settle(self) -> None:
        """Wait for the commit that is on its way, if one is."""
        if self._commit is not None:
            self._commit.wait()

    def initial(self) -> Tensor:
        """Every row as it is now, float32 [rows, row_width]."""
        ids = torch.arange(self.table.spec.rows)
        weight: Tensor = self.table.dequantize(self.table.lookup(ids), dtype=torch.float32)
        return weight

    def __enter__(self) -> Tiered:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.settle()
        finally:
            self.client.close()
            self._release()
