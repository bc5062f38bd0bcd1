"""Measure what a training store costs a model's training: beside a resident table, and beside commits.

The small model of `tierbench learn` trains on real text, its table in a training store with a tenth of it in
DRAM, in turn with the same model whose table is an nn.Embedding with SparseAdam, and with the store while a
commit of all that was learnt since the last is on its way to the disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tierbench.alternate import alternate
from tierbench.commands.learn import add_model_arguments, check_model
from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.learn.memory import Resident, Tiered
from tierbench.learn.model import ENGRAM_LAYER, LanguageModel, Shape
from tierbench.learn.runs import Recipe, lanes
from tierbench.learn.study import STATE_AND_WEIGHT_BYTES, mapping_for
from tierbench.learn.text import make_text
from tierbench.learn.trainers import Trainer
from tierbench.options import count
from tierbench.record import compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=None)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--rows-per-head", type=count, default=64_000, metavar="N", help="of 8 heads (default: %(default)s)")
    add("--steps", type=count, default=10, metavar="N", help="of a window (default: %(default)s)")
    add("--training-batches", type=count, default=200, metavar="N", help="until they come again")


def run(args: argparse.Namespace) -> int:
    check_model(args)
    recipe = Recipe(args.batch, args.context, args.training_batches, args.rate)
    text = make_text(args.dir, args.vocab_size, 0)
    mapping = mapping_for(text.tokenizer, args.rows_per_head)
    shape = Shape(args.vocab_size, args.hidden, args.layers, args.context)
    rows = int(mapping.head_sizes[ENGRAM_LAYER].sum())
    dram_bytes = max(1 << 20, int(rows * shape.row_width * STATE_AND_WEIGHT_BYTES * args.dram_share))
    batches = lanes(text.training, recipe)
    folder = Path(tempfile.mkdtemp(prefix="train-rate-", dir=args.dir))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        store = Tiered(
            folder / "store", rows, shape.row_width, dram_bytes=dram_bytes, commit_steps=0, seed=args.seed
        )
        with store:
            resident = Resident(store.initial())
            ours, theirs = (
                Trainer(
                    LanguageModel(shape, with_memory=True, seed=args.seed), memory, mapping, batches, recipe
                )
                for memory in (store, resident)
            )
            rates = alternate(
                args.windows,
                {
                    "store": lambda: ours.rate(args.steps),
                    "resident": lambda: theirs.rate(args.steps),
                    "store beside commits": lambda: ours.rate_beside_commits(args.steps),
                },
                "training",
            )
            counters = store.client.stats()
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    results = {
        "table_rows": rows,
        "dram_bytes": dram_bytes,
        "store_beside_resident": compare(rates["store"], rates["resident"]),
        "steps_beside_commits": compare(rates["store beside commits"], rates["store"]),
        "counters": {name: value for name, value in counters.items() if name.startswith("training")},
    }
    return deliver("train-rate", args, results, _lines(results))


def _lines(results: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, label in (
        ("store_beside_resident", "a tenth in DRAM, beside resident"),
        ("steps_beside_commits", "beside commits, beside none"),
    ):
        yield rate_row(label, results[name], ">= 0.9", scale=1.0, unit="tokens/s")
