"""Run every benchmark that needs a GPU, each in a process of its own, and write a record of each.

`--part 1` and `--part 2` take at most ten minutes each; `--only` names sections, which `--list` tells. With
`--device cpu` everything runs at a tiny size: it shows that it works and says nothing of GPUs. Exit code 1
means that a section failed or ran out of time; a bar that was missed is told and is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest
from tierbench.delivery import DATA_FOLDER, Grid, print_grid
from tierbench.gpu import plan
from tierbench.gpu.isolated import NO_DEVICE, run_isolated
from tierbench.machine import package_versions
from tierbench.options import positive, whole
from tierbench.record import write_record
from tierstore.cli import FOUND_PROBLEM, OK

MORE_PACKAGES = ("triton", "kvikio-cu12", "kvikio-cu13", "xxhash")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda", help="of torch: cuda, cuda:1, cpu (default: %(default)s)")
    add("--only", type=lambda text: text.split(","), default=[], metavar="NAME[,NAME]",
        help="only these sections, and the device's bandwidth")  # fmt: skip
    add("--part", type=int, choices=plan.PARTS, help="one half of the sections")
    add("--list", action="store_true", help="name the sections and what each may take, and run none")
    add("--limit-s", type=positive, metavar="S", help="begin no section that could end later than this")
    add("--timeout-s", type=positive, metavar="S", help="of each section, in place of its own")
    add("--dir", type=Path, default=DATA_FOLDER, help="data, made once and kept (default: %(default)s)")
    add("--seed", type=whole, default=0, help="default: %(default)s")
    add("--json", action="store_true", help="all results as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write the record of each section into this folder")


def run(args: argparse.Namespace) -> int:
    names = plan.chosen(args.only, args.part)
    if args.list:
        for name in names:
            print(f"{name}\t{plan.timeout_of(name):.0f} s")
        return OK
    args.dir.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, dict[str, Any]] = {}
    for name, outcome in _outcomes(args, names):
        outcomes[name] = outcome
        if outcome["status"] == NO_DEVICE:
            raise BadRequest(outcome["error"])
        if args.record and outcome["status"] == "done":
            _write(args, name, outcome, outcomes.get(plan.FIRST, {}))
    if args.json:
        json.dump(outcomes, sys.stdout, indent=2)
        print()
    else:
        print_grid(Grid(f"tierbench gpu on {args.device}", COLUMNS, _lines(outcomes)))
    return OK if all(found["status"] == "done" for found in outcomes.values()) else FOUND_PROBLEM


def _outcomes(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each section's, as it ends."""
    started = time.monotonic()
    scale = "check" if args.device == "cpu" else "gpu"
    options = [
        "--device",
        args.device,
        "--scale",
        scale,
        "--scratch",
        str(args.dir),
        "--seed",
        str(args.seed),
    ]
    for number, name in enumerate(names, 1):
        timeout_s = args.timeout_s or plan.timeout_of(name)
        left_s = None if args.limit_s is None else args.limit_s - (time.monotonic() - started)
        _say(f"[{number}/{len(names)}] {name}: at most {timeout_s:.0f} s")
        if left_s is not None and left_s < timeout_s:
            outcome = {"status": "left out", "error": f"{left_s:.0f} s were left of --limit-s", "took_s": 0.0}
        else:
            outcome = run_isolated(name, options, timeout_s)
        _say(f"[{number}/{len(names)}] {name}: {outcome['status']} after {outcome['took_s']:.1f} s"
             + (f": {outcome['error']}" if "error" in outcome else ""))  # fmt: skip
        yield name, outcome


def _write(
    args: argparse.Namespace, name: str, outcome: Mapping[str, Any], bandwidth: Mapping[str, Any]
) -> None:
    """One section's record, which holds the device's own bandwidth as well."""
    parts = {key: outcome[key] for key in ("device", "results", "bars", "took_s")}
    copies = {} if name == plan.FIRST else {"copy": bandwidth.get("results")}
    path = write_record(
        f"gpu-{name.replace('_', '-')}",
        {**parts, **copies, "packages": package_versions(MORE_PACKAGES)},
        args.record,
        seed=args.seed,
        parameters={"device": args.device, "section": name},
        data_path=args.dir,
    )
    _say(f"record: {path}")


COLUMNS = ("section", "what", "figure", "bar", "verdict")


def _lines(outcomes: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    for name, found in outcomes.items():
        label = f"{name} ({found['took_s']:.1f} s)"
        if found["status"] != "done":
            yield [label, found["error"], "", "", found["status"]]
            continue
        for bar in found["bars"] or [{"what": "no bar", "figure": "", "bar": "", "verdict": "done"}]:
            figure = f"{bar['figure']:.4g}" if isinstance(bar["figure"], float) else str(bar["figure"])
            yield [label, bar["what"], figure, bar["bar"], bar["verdict"]]
            label = ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
