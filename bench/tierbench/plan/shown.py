"""A plan for people: what it assumes, what each budget does and costs, the verdict, the check."""

from __future__ import annotations

from typing import Any

from tierbench.delivery import Grid
from tierbench.hitrate.shown import percent, size

ROUGH = (
    "Hit rates and reads come from the product's own code on this text; daemons agree within half a point. "
    "Times are sums of what was measured; on shared or virtual disks they may be off by half or more: "
    "--check tells."
)


def assumption_grid(results: dict[str, Any]) -> Grid:
    rows = [[a["what"], a["value"], a["from"]] for a in results["assumptions"]]
    return Grid("what this plan assumes", ["", "", "from"], rows)


def plan_grid(results: dict[str, Any]) -> Grid:
    """One line for each combination of budgets."""
    plans = results["plans"]
    tiers = [t for t in ("hbm", "extent") if any(plan[f"{t}_bytes"] for plan in plans)]
    columns = [
        "DRAM",
        *(t.upper() if t == "hbm" else t for t in tiers),
        "price",
        "hit rate",
        "reads a token",
        "disk busy",
        "waiting",
        "a step p50",
        "p99",
        "",
    ]
    return Grid(
        "budgets",
        columns,
        [_plan_line(plan, tiers, i == results["cheapest"]) for i, plan in enumerate(plans)],
    )


def _plan_line(plan: dict[str, Any], tiers: list[str], best: bool) -> list[str]:
    fetch = plan["fetch_us"]
    verdict = "cheapest" if best else "meets" if plan["meets"] else ""
    return [
        size(plan["dram_bytes"]),
        *(size(plan[f"{tier}_bytes"]) for tier in tiers),
        f"{plan['price']:,.2f}",
        percent(plan["hit_rate"]),
        f"{plan['page_reads_per_token']:.2f}",
        percent(plan["disk_share"]),
        percent(plan["waiting_share"]),
        _us(fetch["p50"]),
        _us(fetch["p99"]),
        verdict,
    ]


def check_grid(results: dict[str, Any]) -> Grid:
    check = results["check"]
    lines = [
        [line["what"], _figure(line, "predicted"), _figure(line, "seen"), _error(line)]
        for line in check["lines"]
    ]
    title = (
        f"beside a daemon with {size(check['dram_bytes'])} of DRAM: {check['steps']:,} steps, of "
        f"which {check['paced_steps']:,} at the target's pace"
    )
    return Grid(title, ["", "predicted", "seen", "error"], lines)


def verdict(results: dict[str, Any]) -> str:
    """What came of it, in a few lines."""
    target, best = results["target"], results["cheapest"]
    asked = (
        f"{_rate(target['tokens_per_s'])} tokens/s in steps of {target['step_tokens']} tokens, waiting "
        f"{target['waiting_share']:.2%} of the time at most"
    )
    if best is None:
        return "\n".join(
            [f"no budget meets {asked}. In the way, with the most memory:", *results["in_the_way"]]
        )
    plan = results["plans"][best]
    tiers = [
        ("DRAM", plan["dram_bytes"]),
        ("HBM", plan["hbm_bytes"]),
        ("record extent", plan["extent_bytes"]),
    ]
    named = ", ".join(f"{size(count)} of {name}" for name, count in tiers if count or name == "DRAM")
    return (
        f"{named} meets {asked}, for {plan['price']:,.2f}; all rows in DRAM would cost "
        f"{results['price_all_in_dram']:,.2f}. NVMe holds {size(results['nvme_bytes'])} and reads "
        f"{plan['reads_per_s']:,.0f} pages/s"
    )


def _figure(line: dict[str, Any], name: str) -> str:
    value = line[name]
    if line["unit"] == "points":
        return percent(value)
    return f"{value:,.1f}" if value >= 100 else f"{value:.3f}"


def _error(line: dict[str, Any]) -> str:
    if line["error"] is None:
        return "none was seen"
    return f"{line['error']:+.2f} points" if line["unit"] == "points" else f"{line['error']:+.1%}"


def _us(value: float) -> str:
    return f"{value:,.0f} us" if value < 1e4 else f"{value / 1e3:,.1f} ms"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
