"""Measure the HBM tier's hits and hashing on a device, beside that device's own gather and copy.

Records of 8 rows of 264 bytes, all held, against `torch.index_select` of as many single rows from a
tensor of the arena's size, viewed as int64, and against copying as many bytes in a row. Hashing is
DeepSeek-V4.1's, against the compiled kernel on one core. What is looked up and hashed is compared first. The
device needs room for twice --arena-bytes. On a CPU this shows that it works and says nothing of GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from engram_client.errors import BadRequest
from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.device_hits import HEADS, hashing, hits
from tierbench.gpu.device import device_of
from tierbench.options import byte_size, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=0.5)
    add = parser.add_argument
    add("--device", default="cuda", help="of torch: cuda, cuda:1, cpu (default: %(default)s)")
    add("--arena-bytes", type=byte_size, default=8 << 30, metavar="BYTES", help="default: 8GiB")
    add("--rows", type=count, default=1_000_000, metavar="N", help="of a batch (default: %(default)s)")
    add("--tokens", type=count, default=1 << 20, metavar="N", help="hashed at once (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.rows < HEADS or args.tokens < 1:
        raise BadRequest(f"--rows takes at least {HEADS} and --tokens 1, got {args.rows} and {args.tokens}")
    device = device_of(args.device)
    timed = {"device": device, "seed": args.seed, "windows": args.windows, "window_s": args.window_s}
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "hits": hits(args.arena_bytes, args.rows, **timed),
        "hashing": hashing(args.tokens, **timed),
    }
    return deliver("hbm", args, results, _lines(results))


def _lines(results: Mapping[str, Any]) -> Iterator[list[str]]:
    found = results["hits"]
    yield rate_row("hits, index_select", found["over_index_select"], ">= 1.2")
    yield rate_row("hits, copy", found["over_copy"], ">= 0.6")
    yield rate_row("hashing, kernel", results["hashing"]["over_kernel"], ">= 1000 M/s", unit="M keys/s")
    for name in ("hits", "hashing"):
        yield [f"{name}: waits for the device", results[name]["waits_for_the_device"], "", "", "", "no"]
