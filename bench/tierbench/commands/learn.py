"""Show that rows learn: a small model on real text, with an Engram table in tierstore and without one.

A decoder-only transformer reads the standard library's sources once, front to back; one with an Engram module
whose table is in a training store with a tenth of it in DRAM, one with a feed-forward of as many
multiplications in its place. Validation losses over several seeds, and over several sizes of the table with
the line that they come near to in log-log. One size is run with its table in memory as well, for how fast
the store trains beside that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.learn.figures import log_log_fit, over_seeds
from tierbench.learn.model import HEAD_WIDTH
from tierbench.learn.runs import Recipe, tokens_needed
from tierbench.learn.study import Run, Study, measure
from tierbench.options import count, count_list, fraction, positive, whole
from tierbench.progress import count_progress

COLUMNS = ("model", "rows of the table", "validation loss", "std over seeds", "tokens/s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--rows-per-head", type=count_list, default=(1000, 4000, 16000, 64000), metavar="N[,N]",
        help="rows of each of the 8 heads, one table for each number (default: 1000 to 64000)")  # fmt: skip
    add("--seeds", type=count, default=3, metavar="N",
        help="runs without a table, and with the largest (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of the first run; the others count up (default: %(default)s)")
    add("--size-seeds", type=count, default=1, metavar="N", help="with each other (default: %(default)s)")
    add("--steps", type=count, default=1000, metavar="N", help="of training (default: %(default)s)")
    add("--validation-tokens", type=count, default=100_000, metavar="N", help="default: %(default)s")
    add("--commit-steps", type=count, default=100, metavar="N", help="steps from commit to commit")
    add("--processes", type=count, default=1, metavar="N", help="runs at once, of one thread each")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the model is, and how it learns."""
    add = parser.add_argument
    add("--batch", type=count, default=16, metavar="N", help="sequences of a step (default: %(default)s)")
    add("--context", type=count, default=128, metavar="N", help="tokens of a sequence (default: %(default)s)")
    add("--hidden", type=count, default=64, metavar="N", help="size of the model (default: %(default)s)")
    add("--layers", type=count, default=3, metavar="N", help="of the model (default: %(default)s)")
    add("--vocab-size", type=count, default=2048, metavar="N", help="of its tokenizer (default: %(default)s)")
    add("--rate", type=positive, default=3e-3, metavar="R", help="of the model; five times it for rows")
    add("--dram-share", type=fraction, default=0.1, help="of table and state in DRAM (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    recipe = Recipe(args.batch, args.context, args.steps, args.rate)
    _check(args, recipe)
    study = Study(
        args.dir, args.vocab_size, args.hidden, args.layers, recipe, args.validation_tokens, args.dram_share,
        args.commit_steps,
    )  # fmt: skip
    runs = list(_runs(args))
    with count_progress("training", len(runs)) as advance:
        outcomes = measure(study, runs, args.processes, lambda run: advance(1))
    results = _results(args, outcomes, tokens_needed(recipe))
    return deliver("learn", args, results, _lines(results), COLUMNS)


def check_model(args: argparse.Namespace) -> None:
    """Raises BadRequest."""
    if args.hidden % HEAD_WIDTH or args.layers < 2:
        raise BadRequest(
            f"the model needs a hidden size in steps of {HEAD_WIDTH} and two layers, got "
            f"--hidden {args.hidden} --layers {args.layers}"
        )


def _check(args: argparse.Namespace, recipe: Recipe) -> None:
    check_model(args)
    least = recipe.batch * (recipe.context + 1)
    if args.validation_tokens < least:
        raise BadRequest(f"--validation-tokens {args.validation_tokens}: one batch has {least}")


def _runs(args: argparse.Namespace) -> Iterator[Run]:
    *smaller, largest = sorted(set(args.rows_per_head))
    for seed in range(args.seed, args.seed + args.seeds):
        yield Run("without", 0, seed)
        yield Run("tierstore", largest, seed)
    yield Run("resident", largest, args.seed)
    for seed in range(args.seed, args.seed + args.size_seeds):
        yield from (Run("tierstore", rows, seed) for rows in reversed(smaller))


def _results(args: argparse.Namespace, outcomes: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome["kind"], outcome["table_rows"]), []).append(outcome)
    models = [
        {
            "kind": kind,
            "table_rows": rows,
            **over_seeds([o["validation_loss"] for o in found]),
            "tokens_per_s": float(np.median([o["tokens_per_s"] for o in found])),
            "counters": found[0]["counters"],
        }
        for (kind, rows), found in groups.items()
    ]
    tiered = sorted((m for m in models if m["kind"] == "tierstore"), key=lambda m: m["table_rows"])
    by_kind = {m["kind"]: m for m in models if m["kind"] != "tierstore"}
    largest, without, resident = tiered[-1], by_kind["without"], by_kind["resident"]
    fit = log_log_fit([m["table_rows"] for m in tiered], [m["losses"][0] for m in tiered])
    return {
        "training_tokens": tokens,
        "models": models,
        "loss_saved": without["mean"] - largest["mean"],
        "loss_saved_every_seed": min(
            a - b for a, b in zip(without["losses"], largest["losses"], strict=True)
        ),
        "log_log_fit": fit if len(tiered) > 1 else None,
        "tiered_against_resident": {
            "speed_ratio": largest["tokens_per_s"] / resident["tokens_per_s"],
            "loss_difference": largest["losses"][0] - resident["losses"][0],
        },
    }


def _lines(results: dict[str, Any]) -> Iterator[Sequence[str]]:
    for model in results["models"]:
        rows = f"{model['table_rows']:,}" if model["table_rows"] else "none"
        yield (
            model["kind"],
            rows,
            f"{model['mean']:.4f}",
            f"{model['std']:.4f}",
            f"{model['tokens_per_s']:,.0f}",
        )
    fit = results["log_log_fit"]
    if fit:
        yield "loss ~ rows ^", f"{fit['slope']:.4f}", f"r2 {fit['r2']:.3f}", "", ""
    beside = results["tiered_against_resident"]
    yield "store / resident", "", f"{beside['loss_difference']:+.4f}", "", f"{beside['speed_ratio']:.2f}"
