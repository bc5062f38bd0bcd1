"""All budgets against the target: the replay, the prices, the verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.hitrate.model import Model
from tierbench.hitrate.shown import size
from tierbench.hitrate.tiers import Asked, Budgets, check_memory
from tierbench.plan.candidates import (
    Prices,
    Work,
    cheapest,
    combined,
    distinct_records,
    dram_candidates,
    nvme_bytes,
    replay,
    shape_of,
    steps_of,
)
from tierbench.plan.figures import Figures
from tierbench.plan.timing import Target, Timing, in_the_way
from tierbench.progress import count_progress

STEPS_MIN = 25
SMALL_FILE_BYTES = 8 << 30  # a host may hold a smaller one in memory


@dataclass(frozen=True)
class Question:
    """What a plan is asked for. Empty budgets: of DRAM those that the text suggests, of others none."""

    model: Model
    work: Work
    target: Target
    prices: Prices
    dram: tuple[Asked, ...] = ()
    hbm: tuple[Asked, ...] = ()
    extent: tuple[Asked, ...] = ()
    seed: int = 0


def planned(question: Question, figures: Figures, source: str) -> dict[str, Any]:
    """The plan; `source` says where the figures come from. Raises BadRequest for budgets that cannot be."""
    model, work, target = question.model, question.work, question.target
    tokens = work.stream.tokens
    if any(asked.bytes_of(model) for asked in question.hbm) and figures.hbm_record_us is None:
        raise BadRequest(
            "--hbm: no GPU was measured; run where there is one, or give --figures of such a run"
        )
    with count_progress("counting records", tokens) as progress:
        distinct = distinct_records(model, work.stream, progress)
    budgets = _budgets(question, distinct)
    check_memory(model, budgets, tokens)
    with count_progress("replaying", tokens) as progress:
        runs = replay(model, work.stream, budgets, progress)
    judged = [steps_of(run, model, work).full(target.step_tokens) for run in runs]
    timings = [Timing(steps, shape_of(model), figures, target, question.seed) for steps in judged]
    plans = [
        _plan(question, each, run.told(), timing)
        for each, run, timing in zip(budgets, runs, timings, strict=True)
    ]
    compulsory, best = distinct / (tokens * model.entries_per_token), cheapest(plans)
    least = least_waiting(plans)
    return {
        "model": {
            "name": model.name,
            "tables": [table.name for table in model.tables],
            "bytes_of_rows": model.table_bytes,
            "record_bytes": model.record_bytes,
        },
        "trace": {
            "tokens": int(work.stream.ids.size),
            "tokens_looked_up": tokens,
            "steps": int(work.step_ends.size),
            "steps_judged": int(judged[0].tokens.size),
            "step_tokens_max": int(work.step_tokens.max()),
            "compulsory_share": compulsory,
        },
        "target": dataclasses.asdict(target),
        "prices": dataclasses.asdict(question.prices),
        "figures": dataclasses.asdict(figures),
        "assumptions": _assumptions(question, figures, source, judged[0].tokens.size),
        "nvme_bytes": nvme_bytes(model),
        "price_all_in_dram": question.prices.of(Budgets(dram_bytes=model.table_bytes), nvme_bytes(model)),
        "plans": plans,
        "cheapest": best,
        "in_the_way": in_the_way(timings[least], target, compulsory) if best is None else [],
    }


def check_sessions(work: Work, target: Target) -> None:
    """Raises BadRequest where the text has too few steps with all sessions in them to judge by."""
    full = int(np.count_nonzero(work.step_tokens >= target.step_tokens))
    if full < STEPS_MIN:
        documents = work.stream.document_starts.size
        raise BadRequest(
            f"--sessions: {full} of {work.step_ends.size} steps of this text have {target.step_tokens} "
            f"tokens or more, and {STEPS_MIN} are needed to judge by: give more text, which has {documents} "
            "documents, or fewer sessions"
        )


def least_waiting(plans: list[dict[str, Any]]) -> int:
    """Which of them waits least; of equals the cheapest."""
    return min(range(len(plans)), key=lambda i: (plans[i]["waiting_share"], plans[i]["price"]))


def _budgets(question: Question, distinct: int) -> list[Budgets]:
    model = question.model
    dram = [asked.bytes_of(model) for asked in question.dram] or dram_candidates(model, distinct)
    hbm, extent = (
        [asked.bytes_of(model) for asked in named] or [0] for named in (question.hbm, question.extent)
    )
    return combined(hbm, sorted(set(dram)), extent, model)


def _plan(question: Question, budgets: Budgets, told: dict[str, Any], timing: Timing) -> dict[str, Any]:
    pages = told["page_reads_per_token"]["mean"]
    return {
        "hbm_bytes": budgets.hbm_bytes,
        "dram_bytes": budgets.dram_bytes,
        "extent_bytes": budgets.extent_bytes,
        "price": question.prices.of(budgets, nvme_bytes(question.model)),
        "hit_rate": told["hit_rate"],
        "hit_rate_by_tier": told["hit_rate_by_tier"],
        "page_reads_per_token": pages,
        "reads_per_s": pages * question.target.tokens_per_s,
        **timing.told(),
    }


def _assumptions(question: Question, figures: Figures, source: str, judged: int) -> list[dict[str, str]]:
    target = question.target
    told = [
        *figures.assumptions(source),
        ("rows are needed", f"{target.ahead_us:,.0f} us after they are asked for", "--ahead-us"),
        ("a step lasts", f"{target.periods_us(question.work.step_tokens[:1] * 0)[0]:,.0f} us or more",
            "--tokens-per-s, --sessions, --step"),
        ("the disk may be busy", f"{target.disk_share:.0%} of the time", "--disk-share"),
        ("disks", str(target.disks), "--disks"),
        ("the cache begins", "empty", "always so"),
        ("full steps, which are judged", f"{judged:,} of {question.work.step_ends.size:,}", "the text"),
        ("a step's tables are asked", "one after another", "always so"),
        ("one engine asks", "nobody else uses daemon or disk", "always so"),
        *((f"a GiB of {t.upper()}", f"{p:g}", f"--price-{t}") for t, p in vars(question.prices).items()),
    ]  # fmt: skip
    if figures.row_file_bytes < SMALL_FILE_BYTES:
        held = f"{size(figures.row_file_bytes)}: a host may hold it in memory, and reads look faster"
        told.append(("the row file that was read", held, "its table"))
    return [{"what": what, "value": value, "from": origin} for what, value, origin in told]
