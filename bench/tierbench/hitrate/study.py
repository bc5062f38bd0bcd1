"""All that is to be found out about a trace, from one pass over it: budgets, other policies, the curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.hitrate.budget import BudgetRun, Disk
from tierbench.hitrate.curve import POINTS, miss_ratio_curve
from tierbench.hitrate.lookups import Lookups, lookups_of
from tierbench.hitrate.mix import TokenStream
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import Estimate, RowSample, Sample
from tierbench.hitrate.tiers import Budgets
from tierbench.policy.bounds import belady
from tierbench.policy.classical import sieve
from tierbench.policy.sampling import GROUPS

SAMPLED_ACCESSES = 4_000_000  # what a sample holds, about, where no rate is given
OTHERS = ("lru", "sieve", "clairvoyant", "single_rows")  # beside the product, for each budget


class Study:
    """Sets of budgets; `sample_rate` None takes as many accesses as are quickly done."""

    def __init__(
        self,
        model: Model,
        stream: TokenStream,
        budgets: list[Budgets],
        *,
        sample_rate: float | None,
        curve: bool,
    ) -> None:
        self._model, self._stream, self._curve = model, stream, curve
        accesses = stream.tokens * model.entries_per_token
        lookups = stream.batch_ends.size * len(model.tables)
        rate = sample_rate or min(1.0, SAMPLED_ACCESSES / accesses)
        self._sample = Sample(rate)
        row_rate = min(rate, SAMPLED_ACCESSES / accesses / model.heads)
        self._rows = None if model.by_rows else RowSample(row_rate, model)
        self._disk = Disk(model, lookups, len(budgets))
        self._runs = [
            BudgetRun(model, budget, stream.tokens, self._disk, number)
            for number, budget in enumerate(budgets)
        ]
        self.figures_total = len(OTHERS) * len(budgets) + (POINTS if curve else 0)

    def replay(self, progress: Callable[[int], None]) -> None:
        """Go through the trace. `progress` is told of tokens."""
        if self._runs:
            self._compile()
        for lookups in lookups_of(self._model, self._stream):
            self._sample.take(lookups)
            for run in self._runs:
                run.take(lookups)
            if self._rows:
                self._rows.take(lookups)
            progress(lookups.keys.size // self._model.entries_per_token)

    def _compile(self) -> None:
        """Replay no look-up at all, so that compiling the simulators does not count as replaying."""
        none = np.zeros(0, np.int64)
        for run in self._runs:
            BudgetRun(self._model, run.budgets, 1, self._disk, 0).take(Lookups(none, none, none, none, 0, 0))

    def told(self, progress: Callable[[int], None]) -> dict[str, Any]:
        """The figures. `progress` is told of each that takes time."""
        found: dict[str, Any] = {
            "model": self._model_told(),
            "trace": self._trace_told(),
            "notes": sorted({note for run in self._runs for note in run.budgets.notes(self._model)}),
            "budgets": [run.told() | {"beside": self._beside(run, progress)} for run in self._runs],
        }
        if self._curve:
            found["curve"] = miss_ratio_curve(
                self._model, self._sample.trace, self._rows.trace if self._rows else None, progress
            )
        return found

    def _model_told(self) -> dict[str, Any]:
        model = self._model
        return {
            "name": model.name,
            "tables": [table.name for table in model.tables],
            "rows": sum(table.rows for table in model.tables),
            "bytes_of_rows": model.table_bytes,
            "record_bytes": model.record_bytes,
            "addressing": "row" if model.by_rows else "record",
            "rows_per_record": model.rows_per_entry,
            "records_per_token": model.entries_per_token,
        }

    def _trace_told(self) -> dict[str, Any]:
        trace, disk, stream = self._sample.trace, self._disk, self._stream
        if trace.rate < 1 and trace.sampled_distinct < GROUPS:
            raise BadRequest(
                f"--sample: {trace.rate:.2g} of this text's records are {trace.sampled_distinct}, and from "
                f"fewer than {GROUPS} no error can be told; take a larger share, or more text"
            )
        accesses = stream.tokens * self._model.entries_per_token
        found = {
            "documents": int(stream.document_starts.size),
            "tokens": int(stream.ids.size),
            "tokens_looked_up": stream.tokens,
            "batches": int(stream.batch_ends.size),
            "accesses": accesses,
            "row_accesses": accesses * self._model.rows_per_entry,
            "sampling_rate": trace.rate,
            "distinct_records": trace.distinct,
            "compulsory_share": trace.distinct / accesses,
        }
        if self._runs:
            found |= {"distinct_rows": disk.distinct_rows, "distinct_pages": disk.distinct_pages}
        return found

    def _beside(self, run: BudgetRun, progress: Callable[[int], None]) -> dict[str, Any]:
        """The same memory for others, by the same look-ups: an access hits if its record was there before.

        What two tiers have is one cache's here.
        """
        trace, model = self._sample.trace, self._model
        capacity, memory = run.capacity_records, run.budgets.hbm_bytes + run.budgets.dram_bytes
        others: dict[str, Callable[[], Estimate]] = {
            "lru": lambda: trace.lru(capacity),
            "sieve": lambda: trace.numbered(sieve, capacity),
            "clairvoyant": lambda: trace.numbered(belady, capacity),
        }
        if self._rows:
            rows = self._rows.trace
            others["single_rows"] = lambda: rows.product(model.capacity_records(memory, rows=True))
        found: dict[str, Any] = {}
        for name, judge in others.items():
            found[name] = judge().told()
            progress(1)
        return found | ({"single_rows_sampling_rate": self._rows.rate} if self._rows else {})
