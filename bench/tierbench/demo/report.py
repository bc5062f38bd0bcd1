"""The closing table of the demo, and the same figures as a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from tierbench.demo.traffic import Tally
from tierbench.record import summarize
from tierstore.commands.readable import readable_bytes


def figures(
    prefill: Tally,
    decode: Tally,
    before: Mapping[str, int],
    middle: Mapping[str, int],
    after: Mapping[str, int],
) -> dict[str, Any]:
    """All figures; the counters were read before the prefill, between the phases, and at the end."""
    return {
        "prefill": {**_phase(prefill), **_tiers(before, middle)},
        "decode": {**_phase(decode), **_tiers(middle, after)},
        "wrong_rows": prefill.wrong_rows + decode.wrong_rows,
        "gate_rms_mean": sum(prefill.gate_rms) / len(prefill.gate_rms),
    }


def _phase(tally: Tally) -> dict[str, Any]:
    return {
        "tokens": tally.tokens,
        "rows": tally.rows,
        "rows_per_s": tally.rows / tally.elapsed_s,
        "elapsed_s": tally.elapsed_s,
        "waited_s": tally.waited_s,
        "step_ms": summarize(tally.step_ms),
    }


def _tiers(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """Where records came from when they were first asked for: by a hint, else by a look-up.

    A record asked for several times in one request is read once; the repeats count as found.
    """
    d = {name: after[name] - before[name] for name in after}
    looked_up, hinted = d["dram_hits"] + d["dram_misses"], d["hint_hits"] + d["hint_misses"]
    asked = hinted or looked_up
    return {
        "records_asked": asked,
        "dram_hit_rate": 1 - d["records_read"] / asked,
        "lookup_found_in_dram": d["dram_hits"] / looked_up,
        "records_read": d["records_read"],
        "nvme_bytes": d["nvme_bytes"],
        "nvme_reads": d["nvme_reads"],
        "nvme_bytes_per_row": d["nvme_bytes"] / max(1, d["nvme_rows"]),
    }


def print_report(found: Mapping[str, Any], console: Console) -> None:
    grid = Grid(title="What the service did", title_justify="left")
    grid.add_column("")
    grid.add_column("prefill", justify="right")
    grid.add_column("decode, a token at a time", justify="right")
    for label, show in _LINES:
        grid.add_row(label, show(found["prefill"]), show(found["decode"]))
    console.print(grid)
    verdict = "every row is the checkpoint's, byte for byte" if not found["wrong_rows"] else "ROWS ARE WRONG"
    rows = found["prefill"]["rows"] + found["decode"]["rows"]
    console.print(f"{rows:,} rows compared with the checkpoint, {found['wrong_rows']} wrong: {verdict}.")


_LINES = [
    ("tokens", lambda f: f"{f['tokens']:,}"),
    ("rows returned", lambda f: f"{f['rows']:,}"),
    ("rows/s, checking included", lambda f: f"{f['rows_per_s']:,.0f}"),
    ("records found in DRAM (hit rate)", lambda f: f"{f['dram_hit_rate']:.1%}"),
    ("records read from NVMe", lambda f: f"{1 - f['dram_hit_rate']:.1%}"),
    ("look-ups answered from DRAM after warming", lambda f: f"{f['lookup_found_in_dram']:.1%}"),
    ("wait for a step's rows, p50", lambda f: f"{f['step_ms']['p50']:.2f} ms"),
    ("wait for a step's rows, p99", lambda f: f"{f['step_ms']['p99']:.2f} ms"),
    ("bytes read from disk", lambda f: readable_bytes(f["nvme_bytes"])),
    ("read operations", lambda f: f"{f['nvme_reads']:,}"),
    ("bytes read for each row fetched from disk", lambda f: f"{f['nvme_bytes_per_row']:,.0f}"),
]
