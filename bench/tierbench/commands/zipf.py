"""Workloads by Zipf's law: traces made from an exponent and drift, or from parameters fitted to a trace.

`zipf make FILE` writes a token trace (.npz), which every command takes that takes text: phrases of tokens
are drawn by Zipf's law, so n-grams are as popular as the phrases they lie in. `zipf fit INPUT` finds
parameters under which a made-up trace misses a cache as often as yours does, order by order, at every size;
they are a dozen numbers and the lengths of documents, hold no text, and can be given to others, who say
`zipf make --parameters`. It prints how near the two curves come.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import CompressedTokenizer
from engram_client.errors import BadRequest
from tierbench.commands.hitrate import TOKENIZER_HELP, notify
from tierbench.corpus import Ids, Offsets, save_trace
from tierbench.delivery import DATA_FOLDER, Grid, deliver
from tierbench.hitrate.inputs import Reading, check_vocabulary, read_inputs, text_bytes
from tierbench.hitrate.model import Model, fold_tokenizer, published_model
from tierbench.hitrate.shown import percent, size
from tierbench.models import MODELS
from tierbench.options import count, whole
from tierbench.policy.phrases import FIRST_TOKEN
from tierbench.progress import byte_progress, count_progress, stage
from tierbench.record import check_place
from tierbench.zipf.fit import fit, target_of
from tierbench.zipf.nearness import asked_of, nearness
from tierbench.zipf.workload import ALL, Workload, load_workload, save_workload

NAME = "zipf"
TOKENS, DOCUMENT_TOKENS, VOCABULARY = 1_000_000, 1_000, 99_000
EVALUATIONS = 800
SEARCH_TOKENS = 8_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_make(verbs.add_parser("make", help="write a token trace"))
    _add_fit(verbs.add_parser("fit", help="find the parameters of a trace"))


def _add_make(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="FILE", help="the trace (.npz)")
    add("--parameters", type=Path, metavar="FILE", help="those that `zipf fit` wrote; options go before them")
    add("--tokens", type=count, metavar="N", help=f"in all (default: the parameters', else {TOKENS})")
    add("--document-tokens", type=count, metavar="N",
        help=f"of each document (default: the parameters' lengths, else {DOCUMENT_TOKENS})")  # fmt: skip
    add("--vocabulary", type=count, metavar="N",
        help=f"different tokens, of ids {FIRST_TOKEN} and up (default: the parameters', else "
        f"{VOCABULARY})")  # fmt: skip
    for knob in ALL:
        add(f"--{knob.name.replace('_', '-')}", type=float, metavar="X", dest=knob.name,
            help=f"{knob.help} (default: the parameters', else {knob.default:g})")  # fmt: skip
    add("--seed", type=whole, default=0, help="(default: %(default)s)")
    add("--json", action="store_true", help="what was made as JSON on stdout")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="text, folder, .jsonl or token trace (.npz)")
    add("--out", type=Path, metavar="FILE", help="write the parameters here (JSON)")
    add("--field", default="text", metavar="NAME", help="of JSONL that holds the text (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help=TOKENIZER_HELP)
    add("--model", choices=MODELS, default="deepseek-v4.1",
        help="whose n-grams are compared (default: %(default)s)")  # fmt: skip
    add("--evaluations", type=count, default=EVALUATIONS, metavar="N",
        help="guesses at most (default: %(default)s)")  # fmt: skip
    add("--search-tokens", type=count, default=SEARCH_TOKENS, metavar="N",
        help="of the first documents that guesses are compared with (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of the search (default: %(default)s)")
    add("--dir", type=Path, default=DATA_FOLDER, help=argparse.SUPPRESS)
    add("--json", action="store_true", help="the figures as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write a record into this folder")


def run(args: argparse.Namespace) -> int:
    if args.out:
        check_place(args.out)
    return _make(args) if args.verb == "make" else _fit(args)


def _make(args: argparse.Namespace) -> int:
    workload = _asked_workload(args)
    with stage("drawing tokens"):
        ids, off = workload.make(args.seed)
    save_trace(args.out, ids, off)
    told = {
        "trace": args.out.name, "tokens": int(ids.size), "documents": int(off.size - 1),
        "distinct_tokens": int(np.unique(ids).size), "knobs": workload.knobs, "seed": args.seed,
    }  # fmt: skip
    if args.json:
        json.dump(told, sys.stdout, indent=2)
        print()
    else:
        shares = ", ".join(f"{name} {value:g}" for name, value in workload.knobs.items())
        print(f"{args.out}: {told['tokens']:,} tokens in {told['documents']:,} documents; {shares}")
    return 0


def _asked_workload(args: argparse.Namespace) -> Workload:
    """The parameters in a file, or the defaults; with what the options say instead."""
    if args.parameters:
        base = load_workload(args.parameters)
    else:
        knobs = {knob.name: float(knob.default) for knob in ALL}
        base = Workload(knobs, (DOCUMENT_TOKENS,), TOKENS, VOCABULARY)
    given = {knob.name: getattr(args, knob.name) for knob in ALL if getattr(args, knob.name) is not None}
    lengths = (args.document_tokens,) if args.document_tokens else base.document_tokens
    return Workload(
        base.knobs | given, lengths, args.tokens or base.tokens, args.vocabulary or base.vocabulary
    )


def _fit(args: argparse.Namespace) -> int:
    installed = fold_tokenizer(args.tokenizer)
    model = published_model(args.model, installed)
    tokenizer = installed if model.folds_vocabulary else args.tokenizer
    with byte_progress("reading text", text_bytes(args.inputs)) as progress:
        ids, off = read_inputs(args.inputs, Reading(tokenizer, args.field, notify, progress))
    raw = model.mapping.raw_vocab_size
    check_vocabulary(ids, off, raw)
    vocabulary = raw - 2 * FIRST_TOKEN
    if vocabulary < 2:
        raise BadRequest(f"a vocabulary of {raw} tokens is too small to make traces of")
    fold = np.arange(raw, dtype=np.uint32)
    if model.folds_vocabulary and installed:
        fold = np.asarray(CompressedTokenizer(installed).lookup_table).astype(np.uint32)
    target = target_of(*_first_documents(ids, off, args.search_tokens), fold, model.orders, vocabulary)
    with count_progress("guessing", args.evaluations) as progress:
        found, apart = fit(target, evaluations=args.evaluations, seed=args.seed, progress=progress)
    results = _compared(args, model, ids, off, found.with_tokens(int(ids.size)))
    results["search"] = {"tokens": target.tokens, "points_apart": apart}
    if args.out:
        fitted_to = {name: results["nearness"]["original"][name] for name in _TRAITS}
        chosen = Workload(
            found.knobs,
            found.document_tokens,
            int(ids.size),
            found.vocabulary,
            {"model": args.model} | fitted_to,
        )
        save_workload(args.out, chosen)
    return deliver("zipf-fit", _recorded(args), results, grids=[_knob_grid(results), _curve_grid(results)])


_TRAITS = ("cold_share", "repeated_within_chunk_share")


def _first_documents(ids: Ids, off: Offsets, tokens: int) -> tuple[Ids, Offsets]:
    """Whole documents from the start, as many as hold about so many tokens; a part of one if it is longer."""
    last = max(1, int(np.searchsorted(off, tokens, "right")) - 1)
    kept = np.minimum(off[: last + 1], tokens)
    return ids[: kept[-1]], kept


def _compared(
    args: argparse.Namespace, model: Model, ids: Ids, off: Offsets, found: Workload
) -> dict[str, Any]:
    """The workload beside the trace, made with a seed that the search has not seen."""
    made = found.make(args.seed + 1)
    with count_progress("comparing", 2 * int(ids.size)) as progress:
        original, other = (asked_of(model, *each, progress) for each in ((ids, off), made))
    return {
        "model": args.model,
        "tokens": int(ids.size),
        "documents": int(off.size - 1),
        "knobs": found.knobs,
        "document_tokens": found.document_tokens,
        "nearness": nearness(model, original, other),
    }


def _recorded(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "out": None, "inputs": [path.name for path in args.inputs]})


def _knob_grid(results: dict[str, Any]) -> Grid:
    near = results["nearness"]
    help_of = {knob.name: knob.help for knob in ALL}
    lines = [[name, f"{value:.4g}", help_of[name]] for name, value in results["knobs"].items()]
    for name in _TRAITS:
        both = f"{percent(near['original'][name])}; made {percent(near['made'][name])}"
        lines.append([name.replace("_", " "), "", both])
    return Grid("tierbench zipf fit", ["", "found", ""], lines)


def _curve_grid(results: dict[str, Any]) -> Grid:
    near = results["nearness"]
    lines = [
        [size(p["dram_bytes"]), *(_pair(p[name]) for name in ("tierstore", "lru"))] for p in near["points"]
    ]
    worst = (f"{near[f'{name}_points_apart_max']:.2f} points at most" for name in ("tierstore", "lru"))
    lines.append(["apart", *worst])
    title = "hit rates: the trace, one made from the parameters with another seed, points apart"
    return Grid(title, ["DRAM", "tierstore", "LRU"], lines)


def _pair(both: dict[str, float]) -> str:
    return f"{percent(both['original'])}  {percent(both['made'])}  {both['points_apart']:+.2f}"
