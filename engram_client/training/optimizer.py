"""`EngramOptimizer`: what `EngramEmbedding`s have learned goes to the service, in the manner of torch.optim.

    optimizer = EngramOptimizer(training, [embedding], lr=1e-3)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    optimizer.commit()                      # rows durable as of this step, together with your model's
    checkpoint

The rows' optimizer and its state are in the service, beside the rows; this sends gradients, rate and decay.
It is a torch optimizer to schedulers and to GradScaler: its groups hold the leaves that have gradients. A
step that GradScaler skips is not counted. With several trainers every rank must step as often, so a rank must
not skip alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engram_client.errors import BadRequest, StepConflict
from engram_client.table import DEFAULT_TIMEOUT_S
from engram_client.trained import COMMIT_TIMEOUT_S, PendingCommit, Training
from engram_client.training.embedding import EngramEmbedding
from engram_client.training.sharded import ShardedTraining


class EngramOptimizer(torch.optim.Optimizer):
    """Pushes the gradients of `embeddings`, each of another table. One group for each, in order.

    `lr` and `weight_decay` None take the table's own; groups may change theirs. The first step is the one
    behind the last that the tables have seen. `timeout` in seconds is for one table's update.
    """

    def __init__(
        self,
        training: Training | ShardedTraining,
        embeddings: Sequence[EngramEmbedding],
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        names = [embedding.table.spec.name for embedding in embeddings]
        if not names or len(set(names)) != len(names):
            raise BadRequest(f"one embedding for each table is wanted, got tables {names}; share the module")
        groups = [{"params": [], "table": name} for name in names]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.embeddings = list(embeddings)
        for group, embedding in zip(self.param_groups, self.embeddings, strict=True):
            group["params"] = embedding.gradients.leaves
        self.training, self.timeout = training, timeout
        self.steps_done = _last_step(training)
        self._applied: set[str] = set()  # tables that have their update of the step being made

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Push the gradients of all tables as one step.

        Where it raises DeadlineExceeded or StorageError, calling it again goes on where it stopped; after
        NotFiniteGradient, `zero_grad` drops what could not be applied. Raises what `TrainedTable.update`
        raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = self.steps_done + 1
        for group, embedding in zip(self.param_groups, self.embeddings, strict=True):
            table = embedding.table
            if table.spec.name in self._applied:
                continue
            ids, gradients = embedding.gradients.take(table.dim)
            if ids.size or table.world > 1:  # ranks wait for each other, also for those with nothing to say
                rates = {"learning_rate": group["lr"], "weight_decay": group["weight_decay"]}
                table.update(ids, gradients, step=number, timeout=self.timeout, **rates)
            self._applied.add(table.spec.name)
            embedding.forget(ids)
        for embedding in self.embeddings:
            embedding.gradients.clear()
        self._next_step()
        return loss

    def _next_step(self) -> None:
        self.steps_done += 1
        self._applied.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that were not pushed."""
        if self._applied:  # some tables have had theirs: that was a step
            self._next_step()
        for embedding in self.embeddings:
            embedding.gradients.clear()

    def commit(self, *, wait: bool = True, timeout: float | None = COMMIT_TIMEOUT_S) -> PendingCommit:
        """Make all tables durable as of the last step; with `wait` false, on the way when this returns.

        Save the model with `state_dict()` of this optimizer beside it, to go on from both. Raises as
        `Training.commit`.
        """
        pending = self.training.start_commit(self.steps_done, timeout=timeout)
        if wait:
            pending.wait(timeout)
        return pending

    def state_dict(self) -> dict[str, Any]:
        """The step, and the rates; rows and their optimizer's state are in the service."""
        groups = [{name: group[name] for name in group if name != "params"} for group in self.param_groups]
        return {"steps_done": self.steps_done, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rates as they were. Raises StepConflict where the tables are not at the state's step."""
        now = _last_step(self.training)
        if state_dict["steps_done"] != now:
            raise StepConflict(
                f"the model's checkpoint is of step {state_dict['steps_done']}, the tables are at step "
                f"{now}; "
                f"they can go back to {self.training.steps()} (training.rollback)"
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.steps_done = now


def _last_step(training: Training | ShardedTraining) -> int:
    """That the tables have seen, committed or not; -1: none."""
    described = training.tables().values()
    seen = [step for d in described for step in (d.committed_step, d.updated_step) if step is not None]
    return max(seen, default=-1)
