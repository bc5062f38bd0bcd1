"""Measure pack beside cp and fsync of the same bytes on the same disk."""

from __future__ import annotations

import argparse
from typing import Any

from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.options import byte_size
from tierbench.pack import measure_pack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=None)
    parser.add_argument(
        "--source-bytes",
        type=byte_size,
        default=1 << 30,
        metavar="BYTES",
        help="of the checkpoint that is packed and copied (default: 1GiB)",
    )


def run(args: argparse.Namespace) -> int:
    args.dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = measure_pack(
        args.dir, source_bytes=args.source_bytes, pairs=args.windows, seed=args.seed
    )
    pairs = {**results["bytes_per_s"], "yardstick_name": "cp, fsync"}
    return deliver("pack", args, results, [rate_row("source bytes", pairs, ">= 0.7", 1e6, "MB/s")])
