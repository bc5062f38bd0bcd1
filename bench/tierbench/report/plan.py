"""The plan: which budgets meet a target, which of them is cheapest, and how far the prediction was off."""

from __future__ import annotations

from collections.abc import Sequence

from tierbench.records import Record
from tierbench.report.section import Section

COMMAND = "tierbench plan TEXT --model deepseek-v4.1 --record bench/results"


def plan_section(records: Sequence[Record]) -> Section:
    return Section("plan", "The plan", missing=[("Budgets against a target", COMMAND)])
