"""What one section's process does: run it, judge its bars, write both down."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engram_client.errors import BadRequest
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import describe_device, device_of
from tierbench.gpu.isolated import NO_DEVICE
from tierbench.gpu.scale import SCALES, Scale

SECTIONS = "tierbench.gpu.sections."


def run_section(name: str, device: torch.device, scale: Scale) -> dict[str, Any]:
    """{"status": "done", "device": ..., "results": ..., "bars": [...]}."""
    module = importlib.import_module(SECTIONS + name)
    results = module.run(device, scale)
    bars: tuple[Bar, ...] = getattr(module, "BARS", ())
    return {
        "status": "done",
        "device": describe_device(device),
        "results": results,
        "bars": [bar.judge(results, device.type == "cuda") for bar in bars],
    }


def _outcome(args: argparse.Namespace) -> dict[str, Any]:
    try:
        device = device_of(args.device)
    except BadRequest as error:
        return {"status": NO_DEVICE, "error": str(error)}
    try:
        return run_section(args.name, device, SCALES[args.scale](args.scratch, args.seed))
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    found = _outcome(args)
    half = args.out.with_suffix(".half")
    half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    os.replace(half, args.out)
    return 0 if found["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
