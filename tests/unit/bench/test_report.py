"""The report as a document: whole, self-contained, honest about what is missing, deaf to hostile records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tierbench.cli import main
from tierbench.commands.report import PAGE_BYTES_MAX
from tierbench.record import RESULTS
from tierbench.report.charts import linear_axis, log_axis, nines_axis, thinned
from tierbench.report.markup import escape, tag
from tierbench.report.shown import NBSP, size, tidy, time_us

from tests.support.html_page import HtmlPage
from tests.support.records import record_of, written

SECTIONS = ("state", "bars", "hit-rates", "latency", "paths", "plan", "records")
ELSEWHERE = re.compile(
    r"(?i)https?:|//[a-z]|@import|url\(|<script|<link|<iframe|<object|<img|\bon\w+=|javascript:"
)


def report(tmp_path: Path, *places: Path, code: int = 0) -> str:
    out = tmp_path / "report.html"
    assert main(["report", *map(str, places), "--out", str(out)]) == code
    return out.read_text(encoding="utf-8")


def sound(text: str) -> HtmlPage:
    """The page, which has to be well formed, unique in its ids, whole in its references and alone."""
    page = HtmlPage(text)
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    assert set(SECTIONS) <= set(page.ids)
    for name, value in ((n, v) for _, n, v in page.attributes if n in ("href", "aria-labelledby")):
        for target in value.split():
            assert target.removeprefix("#") in page.ids, (name, value)
    assert not ELSEWHERE.search(text), ELSEWHERE.search(text)
    assert len(text.encode()) < PAGE_BYTES_MAX
    return page


def test_the_committed_records_make_a_sound_page(tmp_path: Path) -> None:
    page = sound(report(tmp_path, RESULTS))
    assert "Miss ratio by DRAM budget" in page.text
    charts = [v for t, n, v in page.attributes if t == "svg" and n == "role" and v == "img"]
    assert len(charts) >= 3
    assert page.tags.count("title") == 1 + len(charts) == 1 + page.tags.count("desc")
    assert page.tags.count("figure") == page.tags.count("figcaption")
    assert page.text.count("From ") >= page.tags.count("figure")  # each names its record


def test_no_tag_of_a_figure_hides_its_numbers(tmp_path: Path) -> None:
    text = report(tmp_path, RESULTS)
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.S)
    assert figures and all("<table" in figure for figure in figures)


def test_what_is_missing_says_which_command_makes_it(tmp_path: Path) -> None:
    written(tmp_path, record_of("pack", {"rows": 1}))
    page = sound(report(tmp_path, tmp_path))
    served = ("cold", "lookup", "shm", "remote", "serve", "overlap", "hitrate", "plan")
    trained = ("optimizer", "commit", "publish", "learn", "train-rate", "train-sharded")
    for name in served + trained:
        assert f"tierbench {name}" in page.text, name
    assert "make bench-gpu" in page.text
    assert "✓" not in page.text and "✗" not in page.text


def test_records_of_training_are_judged_and_drawn(tmp_path: Path) -> None:
    def ratio(median: float) -> dict[str, float]:
        return {"ratio_median": median, "ratio_min": median - 0.1, "ratio_max": median + 0.1}

    figures: dict[str, dict[str, Any]] = {
        "optimizer": {"adam": {"kernel": {"p50": 3.25e6}, "kernel_beside_torch": ratio(5.0)}},
        "commit": {"durable": {**ratio(0.43), "yardstick_name": "a plain write"}},
        "train-rate": {"store_beside_resident": ratio(0.95), "steps_beside_commits": ratio(0.81)},
        "publish": {"longest_ms": 36.5}, "learn": {"loss_saved": 0.75},
        "train-sharded": {"ranks_beside_one_process": ratio(0.71)},
    }  # fmt: skip
    for name, results in figures.items():
        written(tmp_path, record_of(name, results), f"{name}.json")
    page = sound(report(tmp_path, tmp_path))
    for words in ("3.25 M", "36.5 ms", "0.75 nats", "a plain write", "one process, no model", "0.71"):
        assert words.replace(" ", NBSP) in page.text or words in page.text, words
    assert page.text.count("✗ missed") == 2 * 2  # of a commit, and beside one: bars and ratios


def cold(ratio: float, **changes: Any) -> dict[str, Any]:
    compared = {"ratio_median": ratio, "ratio_min": ratio - 0.1, "ratio_max": ratio + 0.1}
    return record_of("cold", {"io_uring": {"callers_1": {"beside_fio": compared}}}, **changes)


def test_bars_are_judged_by_the_latest_record(tmp_path: Path) -> None:
    written(tmp_path, cold(0.5, date_utc="2026-01-01T00:00:00Z"), "old.json")
    written(tmp_path, cold(0.95, date_utc="2026-01-02T00:00:00Z"), "new.json")
    page = sound(report(tmp_path, tmp_path))
    assert f"0.95{NBSP}\u00d7" in page.text and f"0.85 to 1.05{NBSP}\u00d7" in page.text
    assert page.text.count("✓ met") == 2 and "✗" not in page.text  # the bar, and its line among the ratios
    written(tmp_path, cold(0.5, date_utc="2026-01-03T00:00:00Z"), "newest.json")
    page = sound(report(tmp_path, tmp_path))
    assert "✓ met" not in page.text and page.text.count("✗ missed") == 2


def test_a_figure_of_a_smaller_size_is_shown_but_not_judged(tmp_path: Path) -> None:
    compared = {"ratio_median": 9.0, "ratio_min": 8.0, "ratio_max": 10.0}
    part = {"arena_bytes": 64 << 20, "batch": {"threads_1": compared}}
    written(tmp_path, record_of("lookup", {"records": part}))
    page = sound(report(tmp_path, tmp_path))
    assert f"measured with an arena of 64{NBSP}MiB; the bar is for 4 GiB" in page.text


def test_gpu_sections_bring_their_own_bars(tmp_path: Path) -> None:
    bars = [
        {"what": "hits beside index_select", "bar": ">= 0.9", "figure": 1.25, "verdict": "met"},
        {"what": "the bus", "bar": ">= 0.8", "figure": 0.5, "verdict": "missed"},
        {"what": "on a CPU", "bar": ">= 1", "figure": 0.1, "verdict": "not judged on a CPU"},
    ]
    compared = {"ratio_median": 1.25, "ratio_min": 1.2, "ratio_max": 1.3}
    results = {"bars": bars, "device": {"type": "cuda"}, "results": {"rows": compared}}
    written(tmp_path, record_of("gpu-hits", results))
    page = sound(report(tmp_path, tmp_path))
    assert "✓ met" in page.text and "✗ missed" in page.text and "○ not judged" in page.text
    assert "On the GPU" in page.text and "make bench-gpu" not in page.text


def plan_results(best: int | None) -> dict[str, Any]:
    plans = [
        {"dram_bytes": (1 << 30) * 4**i, "hbm_bytes": 0, "extent_bytes": 0, "price": 3.5 * 4**i,
         "hit_rate": 0.6 + i / 10, "waiting_share": 0.04 / 4**i, "disk_share": 0.3, "fetch_us": {"p99": 9.0},
         "meets": i >= 1}
        for i in range(3)
    ]  # fmt: skip
    lines = [{"what": "hit rate", "predicted": 0.61, "seen": 0.6, "error": 1.0, "unit": "points"},
             {"what": "pages", "predicted": 5.5, "seen": 5.0, "error": 0.1, "unit": "share"}]  # fmt: skip
    return {"plans": plans, "cheapest": best, "price_all_in_dram": 700.0, "in_the_way": ["the disk"],
            "target": {"tokens_per_s": 5000.0, "waiting_share": 0.02},
            "assumptions": [{"what": "disks", "value": "1", "from": "--disks"}],
            "check": {"dram_bytes": 1 << 32, "lines": lines}}  # fmt: skip


def test_the_plan_is_told_and_checked(tmp_path: Path) -> None:
    written(tmp_path, record_of("plan", plan_results(1)))
    page = sound(report(tmp_path, tmp_path))
    assert f"4{NBSP}GiB of DRAM is the cheapest of 3 budgets" in page.text and "✓ cheapest" in page.text
    assert "--disks" in page.text and "+1.00 points" in page.text and "+10.0 %" in page.text
    written(tmp_path, record_of("plan", plan_results(None)))
    assert "None of 3 budgets" in sound(report(tmp_path, tmp_path)).text


def serve_results() -> dict[str, Any]:
    def curve(slow: float) -> dict[str, Any]:
        points = [
            {"offered_per_s": 1000.0 * 2**i, "verdict": "kept" if i < 4 else "saturated",
             "latency_us": {"p50": slow * (1 + i), "p99": slow * 3 * (1 + i), "p99.9": slow * 9 * (1 + i)}}
            for i in range(5)
        ]  # fmt: skip
        return {
            "saturation_per_s": 8000.0,
            "saturation_found": True,
            "limit": "all busy",
            "points": points,
        }

    return {
        "ways": {"shared memory": {"ours": curve(4.0)}, "tcp": {"ours": curve(400.0), "empty": curve(300.0)}}
    }


def test_load_is_drawn_up_to_saturation(tmp_path: Path) -> None:
    written(tmp_path, record_of("serve", serve_results()))
    page = sound(report(tmp_path, tmp_path))
    assert "Throughput against latency, tcp" in page.text and "an empty service, p99" in page.text
    assert f"saturation 8{NBSP}k/s" in page.text and "all busy" in page.text
    assert "Latency under load" in page.text and f"tcp, 4{NBSP}k calls/s" in page.text
    assert f"16.0{NBSP}k" not in page.text  # the rate that was not kept has no latency to speak of


HOSTILE = "</td><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\u202e\x00`a`"


def hostile(value: Any) -> Any:
    """The same shape with every text hostile."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_texts_of_records_are_never_markup(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        record["results"], record["machine"] = hostile(record["results"]), hostile(record["machine"])
        record["parameters"] = hostile(record["parameters"])
        for peers in (record["results"].get("peers"), record["results"].get("hit_rate_by_order")):
            if isinstance(peers, dict):
                peers[HOSTILE] = next(iter(peers.values()))
        written(tmp_path, record, path.name)
    text = report(tmp_path, tmp_path)
    page = HtmlPage(text)
    assert page.problems == [] and len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags and "img" not in page.tags
    assert not [n for _, n, _ in page.attributes if n.startswith("on")]
    assert "\u202e" not in text and "\x00" not in text and "alert(1)" in page.text


@pytest.mark.parametrize("value", ["text", -1.0, 0, [], {}, [[1]], True, None, 1e299, [{"points": 1}]])
def test_no_shape_of_results_ends_in_a_traceback(tmp_path: Path, value: Any) -> None:
    """Each part of each committed record replaced, one level at a time, by what does not belong there."""
    latest = {p.name.partition("-")[0]: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    latest |= {"plan": record_of("plan", plan_results(1)), "load": record_of("serve", serve_results())}
    for depth in (1, 2, 3, 4):
        for name, record in latest.items():
            changed = record | {"results": _replaced(record["results"], depth, value)}
            written(tmp_path, changed, f"{name}.json")
        sound(report(tmp_path, tmp_path))


def _replaced(found: Any, depth: int, value: Any) -> Any:
    if depth == 0:
        return value
    if isinstance(found, dict):
        return {k: _replaced(v, depth - 1, value) for k, v in found.items()}
    return [_replaced(v, depth - 1, value) for v in found] if isinstance(found, list) else value


def test_a_record_of_endless_lists_costs_its_own_figures_only(tmp_path: Path) -> None:
    points = [
        {"dram_bytes": 1e6 + i, "share_of_tables": 0.1, "tierstore": {"hit_rate": 0.5}} for i in range(20_000)
    ]
    budgets = [{"dram_bytes": 1e6 + i, "share_of_tables": 0.1, "hit_rate": 0.5} for i in range(2_000)]
    plans = [{"dram_bytes": 1e6 + i, "waiting_share": 0.1, "hbm_bytes": i} for i in range(2_000)]
    bars = [{"what": "w" * 300, "bar": ">= 1", "figure": 1.0, "verdict": "met"} for _ in range(2_000)]
    written(tmp_path, record_of("hitrate", {"budgets": budgets, "curve": {"points": points}}), "a.json")
    written(tmp_path, record_of("plan", {"plans": plans, "assumptions": plans}), "b.json")
    written(tmp_path, record_of("gpu-hits", {"bars": bars}), "c.json")
    assert len(report(tmp_path, tmp_path).encode()) < PAGE_BYTES_MAX / 4


def test_names_of_files_and_members_cannot_steer_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, cold(0.95))
    written(tmp_path, record_of("cold", {"\x1b]0;title\x07": {"a": "x" * 20_000}}), "\x1b[31mred.json")
    report(tmp_path, tmp_path, code=1)
    captured = capsys.readouterr()
    assert "a text of 20,000 characters" in captured.err and "\x1b" not in captured.err + captured.out


def test_refused_files_are_named_and_change_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, cold(0.95))
    (tmp_path / "broken<script>.json").write_text("{")
    page = sound(report(tmp_path, tmp_path, code=1))
    assert "Files that were refused" in page.text and "broken<script>.json" in page.text
    assert "refused" in capsys.readouterr().err


def test_wrong_usage_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert main(["report", str(tmp_path / "absent")]) == 3
    written(tmp_path, cold(0.95))
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("tierbench: ") for line in lines)
    assert "no record to report" in lines[0] and "no such record or folder" in lines[1]
    assert not list(tmp_path.glob(".*"))  # no half report is left


def test_json_tells_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, cold(0.95))
    out = tmp_path / "r.html"
    images = tmp_path / "png"
    assert main(["report", str(tmp_path), "--out", str(out), "--png", str(images), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records"] == 1 and told["refused"] == [] and told["bytes"] == out.stat().st_size
    assert [Path(p).read_bytes()[:8] for p in told["images"]] == [b"\x89PNG\r\n\x1a\n"]


def test_markup_escapes_everything_that_is_not_markup() -> None:
    assert tag("td", "<b>", class_='"x"') == '<td class="&quot;x&quot;">&lt;b&gt;</td>'
    assert tag("td", tag("b", "&")) == "<td><b>&amp;</b></td>"
    assert escape("a\ud800b\u202ec\x07") == "a\ufffdb\ufffdc\ufffd"
    assert len(tag("p", "x" * 10_000)) < 700 and "…" in tag("p", "x" * 10_000)
    assert len(tag("path", d="M0 0" * 1000)) > 4000  # what is drawn is never cut


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5.0, 5.0], [1e-9, 1e12], [3.0, 4.0], [-2.0, 7.0]])
def test_axes_hold_all_values_and_have_ticks(values: list[float]) -> None:
    axes = [linear_axis("", values, str), linear_axis("", values, str, tight=True), log_axis("", values, str),
            log_axis("", values, str, base=4.0, whole=True),
            nines_axis("", [min(max(v, 0), 1) for v in values])]  # fmt: skip
    for axis in axes:
        assert axis.low < axis.high and len(axis.ticks) >= 2, axis
        assert all(0 <= axis.place(v) <= 1 for v in values)
        assert axis.place(axis.low) == 0 and axis.place(axis.high) == pytest.approx(1)


def test_numbers_as_people_read_them() -> None:
    assert size(20275803240) == f"18.9{NBSP}GiB" and size(0) == f"0{NBSP}B"
    assert time_us(0.5) == f"500{NBSP}ns" and time_us(1500) == f"1.50{NBSP}ms"
    assert tidy(f"1.50{NBSP}ms") == f"1.5{NBSP}ms" and tidy("2.00") == "2" and tidy("100") == "100"
    assert thinned(3) == [0, 1, 2] and thinned(100)[0] == 0 and thinned(100)[-1] == 99
