"""`tierbench compare`: changes beyond the spread are found, noise is not, and what else differs is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench.cli import main
from tierbench.comparison.figures import direction
from tierbench.comparison.verdict import BESIDE, BETTER, WITHIN, WORSE, compare_records
from tierbench.record import RESULTS, compare, summarize
from tierbench.records import Record, find_records, load_all, load_record

from tests.support.records import record_of, written


def loaded(tmp_path: Path, file: str, results: dict[str, Any], **changes: Any) -> Record:
    return load_record(written(tmp_path, record_of("cold", results, **changes), file))


def noisy(seed: int, level: float, spread: float = 0.1) -> list[float]:
    return (level * np.exp(np.random.default_rng(seed).normal(0, spread, 10))).tolist()


def verdicts(first: Record, second: Record) -> dict[str, str]:
    return {change.place: change.verdict for change in compare_records(first, second).changes}


def test_a_record_beside_itself_has_not_changed() -> None:
    records, _ = load_all(find_records([RESULTS]))
    for record in records:
        found = compare_records(record, record)
        assert {c.verdict for c in found.changes} <= {WITHIN, BESIDE}, record.file
        assert not found.only["first"] and not found.only["second"]
        assert all("were not committed" in words for words in found.warnings)
        assert found.changes, record.file


def test_noise_raises_no_alarm(tmp_path: Path) -> None:
    """Windows that differ by chance alone, 10 % either way, of a path of 0.9 of its yardstick."""
    first, second = (
        {
            f"x{seed}": compare(noisy(seed, 9e5), noisy(seed + 10**6, 1e6))
            for seed in range(start, start + 500)
        }
        for start in (0, 1000)
    )
    second = {f"x{i}": found for i, found in enumerate(second.values())}
    found = verdicts(loaded(tmp_path, "a.json", first), loaded(tmp_path, "b.json", second))
    judged = [verdict for place, verdict in found.items() if place.endswith(".ratio")]
    assert len(judged) == 500 and judged.count(WITHIN) >= 498


def test_a_real_change_is_found_and_has_a_direction(tmp_path: Path) -> None:
    steady = noisy(3, 1e6, 0.02)
    first = {
        "rows_per_s": compare(noisy(1, 1e6, 0.02), steady),
        "slow_over_fast": compare(noisy(2, 1e6, 0.02), steady),
        "taken_us": summarize(noisy(4, 100.0, 0.02)),
        "unchanged_per_s": noisy(5, 7.0, 0.02),
    }
    second = {
        "rows_per_s": compare(noisy(6, 7e5, 0.02), steady),
        "slow_over_fast": compare(noisy(7, 7e5, 0.02), steady),
        "taken_us": summarize(noisy(8, 150.0, 0.02)),
        "unchanged_per_s": noisy(9, 7.0, 0.02),
    }
    found = verdicts(loaded(tmp_path, "a.json", first), loaded(tmp_path, "b.json", second))
    assert found["rows_per_s.ratio"] == WORSE
    assert found["slow_over_fast.ratio"] == BETTER
    assert found["taken_us"] == WORSE
    assert found["unchanged_per_s"] == WITHIN
    assert found["rows_per_s.ours"] == BESIDE  # its yardstick tells whether it was the machine


def test_each_model_of_a_list_is_compared_with_itself(tmp_path: Path) -> None:
    sizes = [
        {"kind": "tierstore", "table_rows": rows, "tokens_per_s": rate}
        for rows, rate in ((9, 5.0), (99, 7.0))
    ]
    record = loaded(tmp_path, "a.json", {"models": sizes})
    found = verdicts(record, loaded(tmp_path, "b.json", {"models": sizes[::-1]}))
    assert found == {f"models[kind=tierstore, table_rows={rows}].tokens_per_s": WITHIN for rows in (9, 99)}


def test_a_faster_machine_is_no_change_of_ours(tmp_path: Path) -> None:
    ours, yardstick = noisy(1, 1e6, 0.05), noisy(2, 1e6, 0.05)
    first = {"rows_per_s": compare(ours, yardstick)}
    second = {"rows_per_s": compare([2 * v for v in ours], [2 * v for v in yardstick])}
    found = verdicts(loaded(tmp_path, "a.json", first), loaded(tmp_path, "b.json", second))
    assert set(found.values()) == {WITHIN, BESIDE}


def test_hit_rates_spread_by_their_standard_error(tmp_path: Path) -> None:
    first = {"lru": {"hit_rate": 0.70, "error": 0.001}}
    near, far = {"lru": {"hit_rate": 0.704, "error": 0.001}}, {"lru": {"hit_rate": 0.72, "error": 0.001}}
    record = loaded(tmp_path, "a.json", first)
    assert verdicts(record, loaded(tmp_path, "b.json", near)) == {"lru.hit_rate": WITHIN}
    assert verdicts(record, loaded(tmp_path, "c.json", far)) == {"lru.hit_rate": BETTER}


def test_what_else_differs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"cpu": "another", "cores_usable": 4, "memory_bytes": 8 << 30}
    changes = {"seed": 7, "commit": "f" * 40, "dirty": True, "machine": machine, "parameters": {"windows": 3}}
    other = record_of("cold", {"rows": 5, "a_per_s": 1.0}, **changes)
    first = written(tmp_path, record_of("cold", {"rows": 4, "b_per_s": 1.0}), "a.json")
    assert main(["compare", str(first), str(written(tmp_path, other, "b.json"))]) == 0
    out = capsys.readouterr().out
    for words in ("machine.cpu: a processor and another", "machine.cores_usable: 2 and 4", "commit: 0123",
                  "seed: 0 and 7", "parameters.windows: 10 and 3", "rows: 4 and 5", "not committed",
                  "only in a.json: 1 figures", "only in b.json: 1 figures"):  # fmt: skip
        assert words in out, words


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        "rows_per_s": noisy(1, 100.0, 0.01),
        "p": {"count": 20_000, "min": 1, "max": 9, "p50": 1.0, "p99": 2.0},
    }
    bad = {
        "rows_per_s": noisy(2, 80.0, 0.01),
        "p": {"count": 20_000, "min": 1, "max": 9, "p50": 2.0, "p99": 2.0},
    }
    a = str(written(tmp_path, record_of("cold", good), "a.json"))
    b = str(written(tmp_path, record_of("cold", bad), "b.json"))
    assert main(["compare", a, b]) == 0  # tells, and judges only when asked
    assert main(["compare", a, b, "--fail-above", "10"]) == 1
    assert "rows_per_s got worse by 2" in capsys.readouterr().err
    assert main(["compare", a, b, "--fail-above", "40"]) == 0  # p.p50 doubled, but its spread is assumed
    assert main(["compare", a, b, "--fail-above", "40", "--strict"]) == 1
    assert main(["compare", b, a, "--fail-above", "0", "--strict"]) == 0  # better is no failure


def test_records_of_different_benchmarks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder, name in zip(folders, ("cold", "shm"), strict=True):
        folder.mkdir()
        written(folder, record_of(name, {}))
    assert main(["compare", *(str(f / "record.json") for f in folders)]) == 2
    assert main(["compare", *map(str, folders)]) == 2
    assert main(["compare", str(folders[0]), str(tmp_path / "absent")]) == 3
    (folders[0] / "record.json").write_text("{")
    assert main(["compare", *(str(f / "record.json") for f in folders)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 4
        and "'cold'" in lines[0]
        and "'shm'" in lines[0]
        and "holds records of cold" in lines[1]
    )


def test_folders_are_compared_by_their_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    written(one, record_of("cold", {"x_per_s": 1.0}, date_utc="2026-01-01T00:00:00Z"), "old.json")
    written(one, record_of("cold", {"x_per_s": 5.0}, date_utc="2026-02-01T00:00:00Z"), "new.json")
    written(one, record_of("shm", {"x_per_s": 5.0}), "shm.json")
    written(other, record_of("cold", {"x_per_s": 5.0}))
    assert main(["compare", str(one), str(other), "--json"]) == 0
    captured = capsys.readouterr()
    (told,) = json.loads(captured.out)
    assert told["first"].endswith("new.json")
    assert [f["verdict"] for f in told["figures"]] == [WITHIN]
    assert "has records of shm" in captured.err


def test_labels_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        "[bold red]x[/] \x1b[31m_per_s": 1.0,
        "[/nonsense]": {"a_per_s": 2.0},
        "yardstick_name": "\x1b]0;t\x07",
    }
    a = str(written(tmp_path, record_of("cold", results), "a.json"))
    b = str(written(tmp_path, record_of("cold", results | {"yardstick_name": "[/x]"}), "b.json"))
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[bold red]x[/]" in out and "[/nonsense]" in out


@pytest.mark.parametrize(
    "value", ["text", 0, 0.0, -1.5, [], {}, [1, "x"], True, [{"a": 1}, {"a": 2}], 1e299, 5e-324]
)
def test_no_shape_of_results_ends_in_a_traceback(tmp_path: Path, value: Any) -> None:
    good = {
        "r": compare([1.0, 2, 3], [1.0, 2, 3]),
        "s": summarize([1.0, 2.0]),
        "x": 1.0,
        "l": [1.0, 2.0, 3.0],
    }
    a = written(tmp_path, record_of("cold", good), "a.json")
    for name in good:
        for results in (
            good | {name: value},
            good | {"r": good["r"] | dict.fromkeys(("ours", "ratio_min"), value)},
        ):
            b = written(tmp_path, record_of("cold", results), "b.json")
            assert main(["compare", str(a), str(b), "--json"]) == 0
            assert main(["compare", str(b), str(a), "--fail-above", "1"]) in (0, 1)


@pytest.mark.parametrize(
    ("place", "better"),
    [("a.rows_per_s", "more"), ("a.took_us.p50", "less"), ("budgets[dram_bytes=5].hit_rate", "more"),
     ("phases.publish.calls_beyond_bar_per_s", "less"), ("longest_ms_that_waited", "less"),
     ("loss_saved", "more"), ("step_parts.ranks.exchange_us", "less"),
     ("reads_per_seen_record", "less"), ("x.cores", "less"), ("threads", ""), ("file_bytes", "")],
)  # fmt: skip
def test_directions(place: str, better: str) -> None:
    assert direction(place) == better
