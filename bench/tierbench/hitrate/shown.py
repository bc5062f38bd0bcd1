"""The figures for people: what is asked for, budgets side by side, the curve, the daemon beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tierbench.delivery import Grid

MIB = 1 << 20
Line = tuple[str, Callable[[dict[str, Any]], str]]  # a label, and what to tell of a budget


def summary(results: dict[str, Any]) -> str:
    """What is asked for, in three lines."""
    model, trace = results["model"], results["trace"]
    about = "" if trace["sampling_rate"] == 1 else "about "
    distinct = f"{about}{trace['distinct_records']:,} distinct records"
    if "distinct_rows" in trace:
        distinct += f", {trace['distinct_rows']:,} rows, {trace['distinct_pages']:,} pages"
    by_rows = model["addressing"] == "row"
    cached = f"a record is {model['rows_per_record']} rows, {model['record_bytes']} bytes"
    if by_rows:
        cached = f"addressed by rows of {model['record_bytes']} bytes, so each row is a record of its own"
    notes = "".join(f"\n{note}" for note in results["notes"])
    return (
        f"{model['name']}: {model['rows']:,} rows, {size(model['bytes_of_rows'])}; {cached}\n"
        f"{trace['documents']:,} documents, {trace['tokens']:,} tokens, "
        f"{trace['tokens_looked_up']:,} looked up in {trace['batches']:,} batches; "
        f"{trace['accesses']:,} accesses to records\n"
        f"{distinct}; {percent(trace['compulsory_share'])} of accesses are the first to their record, "
        f"which no cache has{notes}"
    )


def budget_grid(results: dict[str, Any]) -> Grid:
    """One column a budget."""
    budgets = results["budgets"]
    columns = [""] + [f"budget {i + 1}" for i in range(len(budgets))]
    lines: list[Line] = [
        *((f"{name} budget", _size_of(key)) for key, name in TIERS.items() if _anywhere(budgets, key)),
        ("memory, share of the tables", lambda b: share_told(b["share_of_tables"])),
        ("records it holds", lambda b: f"{b['capacity_records']:,}"),
        ("hit rate", lambda b: percent(b["hit_rate"])),
        *_tier_lines(results, budgets),
        *_parts(results, "hit_rate_by_order", "{}-grams"),
        *_parts(results, "hit_rate_by_table", "{}"),
        ("  by tenth of the trace", lambda b: " ".join(f"{100 * r:.0f}" for r in b["hit_rate_by_tenth"])),
        ("missed in memory, records a token", lambda b: spread(b["missed_records_per_token"])),
        ("  page reads a token", lambda b: spread(b["page_reads_per_token"])),
        ("  bytes from disk a token", lambda b: f"{b['disk_bytes_per_token']:,.0f}"),
        ("LRU", lambda b: estimate(b["beside"]["lru"])),
        ("SIEVE", lambda b: estimate(b["beside"]["sieve"])),
        ("clairvoyant bound", lambda b: estimate(b["beside"]["clairvoyant"])),
        *([("single rows, same bytes", _single_rows)] if "single_rows" in budgets[0]["beside"] else []),
        ("simulated, M rows/s", lambda b: speed(b["simulation"])),
    ]
    return Grid("tierbench hitrate", columns, [[label, *(tell(b) for b in budgets)] for label, tell in lines])


TIERS = {"hbm_bytes": "HBM", "dram_bytes": "DRAM", "extent_bytes": "extent"}


def _anywhere(budgets: list[dict[str, Any]], key: str) -> bool:
    return key == "dram_bytes" or any(budget[key] for budget in budgets)


def _size_of(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda budget: size(budget[key])


def _single_rows(budget: dict[str, Any]) -> str:
    return estimate(budget["beside"]["single_rows"])


def _tier_lines(results: dict[str, Any], budgets: list[dict[str, Any]]) -> list[Line]:
    """What each tier answers, where there is more than DRAM; HBM and DRAM by order, too."""
    chosen = [key.partition("_")[0] for key in TIERS if _anywhere(budgets, key)]
    if chosen == ["dram"]:
        return []
    lines: list[Line] = []
    for tier in chosen:
        lines.append((f"  {TIERS[tier + '_bytes']}", _tier_told(tier)))
    return lines


def _tier_told(tier: str) -> Callable[[dict[str, Any]], str]:
    def tell(budget: dict[str, Any]) -> str:
        if tier not in budget["tiers"]:
            return "none"
        found = budget["tiers"][tier]
        orders = " ".join(f"{100 * rate:.0f}" for rate in found["hit_rate_by_order"].values())
        return f"{percent(found['hit_rate'])} (by order {orders})"

    return tell


def _parts(results: dict[str, Any], name: str, label: str) -> list[Line]:
    parts = results["budgets"][0][name]
    return [_part(name, part, "  " + label.format(part)) for part in parts] if len(parts) > 1 else []


def _part(name: str, part: str, label: str) -> Line:
    return label, lambda budget: percent(budget[name][part])


def curve_grid(results: dict[str, Any]) -> Grid:
    """One line a budget."""
    curve = results["curve"]
    title = f"by budget, from {percent(curve['sampling_rate'])} of the records; +- is the standard error"
    columns = {name: label for name, label in CURVES.items() if name in curve["points"][0]}
    lines = [
        [size(p["dram_bytes"]), share_told(p["share_of_tables"]), *(estimate(p[n]) for n in columns)]
        for p in curve["points"]
    ]
    return Grid(title, ["DRAM", "of the tables", *columns.values()], lines)


CURVES = {
    "tierstore": "tierstore",
    "lru": "LRU",
    "sieve": "SIEVE",
    "clairvoyant": "clairvoyant",
    "single_rows": "single rows",
}


def live_grid(results: dict[str, Any]) -> Grid:
    """A daemon beside the simulation."""
    both = results["live"]
    live, simulated = both["live"], both["simulated"]
    return Grid(
        "the daemon beside the simulation",
        ["", "daemon", "simulated", "difference"],
        [
            ["hit rate", percent(live["hit_rate"]), percent(simulated["hit_rate"]),
             f"{both['difference_points']:+.2f} points"],
            ["records read, of accesses", percent(live["records_read_per_access"]),
             percent(simulated["records_read_per_access"]), f"{both['read_difference_points']:+.2f} points"],
            ["disk bytes a token", f"{live['disk_bytes_per_token']:,.0f}",
             f"{simulated['disk_bytes_per_token']:,.0f}", "joined reads fill gaps"],
        ],
    )  # fmt: skip


def size(count: int) -> str:
    """Bytes, rounded."""
    for unit, bytes_ in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= bytes_:
            return f"{count / bytes_:.4g} {unit}"
    return f"{count} B"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def share_told(share: float) -> str:
    return percent(share) + (", all of them" if share >= 1 else "")


def estimate(found: dict[str, float]) -> str:
    error = f" +-{100 * found['error']:.2f}" if found["error"] else ""
    return f"{100 * found['hit_rate']:.2f} %{error}"


def spread(found: dict[str, float]) -> str:
    return f"{found['mean']:.2f}; p50 {found['p50']:.0f}, p99 {found['p99']:.0f}"


def speed(found: dict[str, float]) -> str:
    return f"{found['rows_per_s'] / 1e6:.1f}, with pages {found['rows_with_pages_per_s'] / 1e6:.1f}"
