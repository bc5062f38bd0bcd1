"""Budgets that are tried, what the replay makes of each, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.arena.layout import WAYS, ArenaGeometry
from engram_client.errors import BadRequest
from tierbench.corpus import Ids, Offsets
from tierbench.hitrate.budget import BudgetRun, Disk
from tierbench.hitrate.live import tokens_max
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import Mix, TokenStream, token_stream
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import Sample
from tierbench.hitrate.study import SAMPLED_ACCESSES
from tierbench.hitrate.tiers import Budgets
from tierbench.plan.timing import Shape, Steps
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.dueling import SETS_MIN

POINTS = 10  # DRAM budgets that are tried where none are named
BEYOND = 1.25  # times the distinct records there are: from there on, only first accesses miss
BUDGETS_MAX = 64
GIB = 1 << 30


@dataclass(frozen=True)
class Prices:
    """For a GiB, in whatever currency."""

    hbm: float
    dram: float
    nvme: float

    def of(self, budgets: Budgets, nvme_bytes: int) -> float:
        memory = budgets.hbm_bytes * self.hbm + budgets.dram_bytes * self.dram
        return (memory + (nvme_bytes + budgets.extent_bytes) * self.nvme) / GIB


def distinct_records(model: Model, stream: TokenStream, progress: Callable[[int], None]) -> int:
    """Of the whole trace, or about, from a sample."""
    sample = Sample(min(1.0, SAMPLED_ACCESSES / (stream.tokens * model.entries_per_token)))
    for lookups in lookups_of(model, stream):
        sample.take(lookups)
        progress(lookups.keys.size // model.entries_per_token)
    return sample.trace.distinct


def dram_candidates(model: Model, distinct: int) -> list[int]:
    """Bytes: none, and then rising by a factor to all that the text asks for, or all there is."""
    slot_bytes = GIB / model.capacity_records(GIB)
    largest = min(model.table_bytes, BEYOND * distinct * slot_bytes)
    least = ArenaGeometry(1, model.record_bytes).total_bytes
    smallest = max(least, min(largest, slot_bytes * SETS_MIN * WAYS))
    return [0, *sorted({round(b) for b in np.geomspace(smallest, max(largest, smallest), POINTS)})]


def combined(hbm: list[int], dram: list[int], extent: list[int], model: Model) -> list[Budgets]:
    """Every combination. Raises BadRequest for too many, or for one that a tier cannot have."""
    found = [Budgets(h, d, e) for h in hbm for e in extent for d in dram]
    if len(found) > BUDGETS_MAX:
        raise BadRequest(f"{len(found)} combinations of budgets; {BUDGETS_MAX} are the most, name fewer")
    for budgets in found:
        budgets.check(model)
    return found


def replay(
    model: Model, stream: TokenStream, budgets: list[Budgets], progress: Callable[[int], None]
) -> list[BudgetRun]:
    """Every budget under the whole trace, from its first step to its last. `progress` is told of tokens."""
    disk = Disk(model, stream.batch_ends.size * len(model.tables), len(budgets))
    runs = [BudgetRun(model, each, stream.tokens, disk, i) for i, each in enumerate(budgets)]
    for lookups in lookups_of(model, stream):
        for run in runs:
            run.take(lookups)
        progress(lookups.keys.size // model.entries_per_token)
    return runs


@dataclass(frozen=True)
class Work:
    """A text as steps. A step's batch is cut into look-ups that a daemon answers whole, as `stream` has it.

    step_ends, step_parts: int64 [steps]: where each ends among the tokens, and into how many it is cut
    """

    stream: TokenStream
    step_ends: np.ndarray

    @property
    def step_parts(self) -> np.ndarray:
        return np.diff(np.searchsorted(self.stream.batch_ends, self.step_ends, "right"), prepend=0)

    @property
    def step_tokens(self) -> np.ndarray:
        return np.diff(self.step_ends, prepend=0)


def work_of(ids: Ids, off: Offsets, mix: Mix, model: Model) -> Work:
    """A trace as this mix asks for it."""
    return Work(token_stream(ids, off, mix, tokens_max(model)), token_stream(ids, off, mix).batch_ends)


def steps_of(run: BudgetRun, model: Model, work: Work) -> Steps:
    """A replayed budget step by step. Hits of HBM are spread evenly over them."""
    starts = np.concatenate([[0], work.step_ends[:-1]])
    tokens = work.step_tokens
    missed, pages = (np.add.reduceat(part.astype(np.int64), starts) for part in run.by_token())
    found = tokens * model.entries_per_token - missed
    tiers = run.told()["hit_rate_by_tier"]
    memory = tiers.get("hbm", 0.0) + tiers["dram"]
    held = np.round(found * (tiers.get("hbm", 0.0) / memory if memory else 0.0)).astype(np.int64)
    return Steps(tokens, work.step_parts * len(model.tables), missed, pages, held)


def shape_of(model: Model) -> Shape:
    return Shape(model.entries_per_token, model.record_bytes)


def nvme_bytes(model: Model) -> int:
    """Of all tables, packed."""
    total = 0
    for table in model.tables:
        geometry = model.geometry(table)
        rows_per_page = geometry.rows_per_page or 1
        total += -(-table.rows // rows_per_page) * geometry.pages_per_row * PAGE_BYTES
    return total


def cheapest(plans: list[dict[str, Any]]) -> int | None:
    """Which plan that meets the target costs least; of equals the one with less waiting."""
    meeting = [i for i, plan in enumerate(plans) if plan["meets"]]
    return min(meeting, key=lambda i: (plans[i]["price"], plans[i]["waiting_share"])) if meeting else None
