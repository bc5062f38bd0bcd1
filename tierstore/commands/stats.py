"""`tierstore stats`: how a daemon that serves or trains is doing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from engram_client import connect
from tierstore.commands.readable import readable_bytes

EPILOG = """\
Counters are since the daemon's start; --json has all of them, by the names that the README explains. Ask
twice for what happened in between.
"""
MS_PER_S, US_PER_S = 1000, 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("target", metavar="TARGET", help="the daemon: unix:PATH or tcp://HOST:PORT")
    parser.add_argument("--json", action="store_true", help="every counter as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints what an operator asks first."""
    with connect(args.target) as client:
        stats = client.stats()
    if args.json:
        json.dump(stats, sys.stdout, indent=2, sort_keys=True)
        print()
    else:
        print("\n".join([*_serving(stats), *(_training(stats) if "training_commits" in stats else ())]))
    return 0


def _serving(s: dict[str, int]) -> Iterator[str]:
    damaged = f", {s['tables_damaged']} damaged" if s["tables_damaged"] else ""
    yield f"serving {s['tables_served']} tables{damaged}"
    yield (
        f"  DRAM: {readable_bytes(s['dram_bytes'])} of {readable_bytes(s['dram_budget_bytes'])}, "
        f"{_share(s['dram_hits'], s['dram_misses'])} of records found there"
    )


def _training(s: dict[str, int]) -> Iterator[str]:
    yield f"training, {_committed(s)}; {s['training_updates']} updates, {s['training_commits']} commits"
    yield (
        f"  DRAM: {readable_bytes(s['training_dram_bytes'])} for {s['training_capacity_rows']} rows, "
        f"{s['training_dirty_rows']} of them newer than the log"
    )
    updated = s["training_rows_updated"] - s["training_update_misses"]
    yield (
        f"  {_share(s['training_read_hits'], s['training_read_misses'])} of rows read and "
        f"{_share(updated, s['training_update_misses'])} of rows updated found there; "
        f"{s['training_rows_written_back']} written back"
    )
    log, queue = (_of_most(s, f"training_{name}_bytes") for name in ("log", "queue"))
    yield f"  log: {log}, {queue} queued; {_folds(s)}"
    yield (
        f"  trainers waited {s['training_waits_us'] / US_PER_S:.1f} s in all, "
        f"{s['training_waits_for_room']} times for room in queue or log"
    )
    if s["training_rows_not_finite"]:
        yield f"  {s['training_rows_not_finite']} rows had gradients that are not finite"
    if s["training_steps_read"]:
        yield f"  steps open to be read, which holds up folding: {s['training_steps_read']}"


def _of_most(s: dict[str, int], name: str) -> str:
    return f"{readable_bytes(s[name])} of at most {readable_bytes(s[name + '_max'])}"


def _committed(s: dict[str, int]) -> str:
    if "training_committed_step" not in s:
        return "nothing committed yet"
    age = s.get("training_commit_age_ms")
    ago = "before the daemon's start" if age is None else f"{age / MS_PER_S:.1f} s ago"
    return f"step {s['training_committed_step']} committed {ago}"


def _folds(s: dict[str, int]) -> str:
    now = ", one under way" if s["training_folding"] else ""
    failing = ", THE LAST FAILED (see the daemon's log)" if s["training_fold_failing"] else ""
    return f"{s['training_folds']} folds of {s['training_folded_pages']} pages{now}{failing}"


def _share(hits: int, misses: int) -> str:
    return f"{100 * hits / (hits + misses):.1f} %" if hits + misses else "none"
