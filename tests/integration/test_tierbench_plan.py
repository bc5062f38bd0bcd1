"""`tierbench plan` on a packed store: measured, checked by a daemon, and nothing of the store touched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench import cli
from tierbench.checkpoint import make_checkpoint
from tierbench.commands import plan
from tierbench.corpus import save_trace
from tierbench.plan import measure
from tierbench.plan.figures import Figures
from tokenizers import Tokenizer, models

from tierstore.packing import PackOptions, pack

WORDS, TOKENS = 800, 6_000
MACHINE = Figures("unix", 2112, 5.0, 0.2, (80.0, 120.0, 900.0), 50_000.0, 80_000.0, 20.0, 1 << 34)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a store with a snapshot of its cache, a trace of phrases that come again, and figures."""
    folder = tmp_path_factory.mktemp("plan")
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, WORDS)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    tokenizer = folder / "tokenizer.json"
    checkpoint = make_checkpoint("deepseek-v4.1", 600, folder / "checkpoint", tokenizer=tokenizer)
    pack(checkpoint.path, folder / "store", PackOptions(), notify=print, on_progress=lambda p: None)
    (folder / "store" / "warm").mkdir()
    (folder / "store" / "warm" / "2112.warm").write_bytes(b"what another daemon has kept")
    random = np.random.default_rng(7)
    phrases = [random.integers(1, WORDS, 8) for _ in range(1_000)]
    chosen = np.minimum(random.pareto(0.7, TOKENS // 8) * 5, 1e9).astype(int) % len(phrases)
    ids = np.concatenate([phrases[i] for i in chosen]).astype(np.uint32)
    save_trace(folder / "trace.npz", ids, np.arange(0, ids.size + 1, 300))
    (folder / "machine.json").write_text(json.dumps(dataclasses.asdict(MACHINE)))
    return folder


def options(folder: Path, *more: object) -> list[str]:
    base = [folder / "trace.npz", "--tokenizer", folder / "tokenizer.json", "--dir", folder / "data"]
    return ["plan", *map(str, (*base, "--sessions", 8, *more))]


def content(store: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and when it was written."""
    files = sorted(p for p in store.rglob("*") if p.is_file() and p.name != "lock.mdb")  # LMDB's readers
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def brief_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is measured, from a few calls each."""
    for name, few in (("WARM_TOKENS", 512), ("HIT_CALLS", 64), ("MISS_CALLS", 20), ("PACED_CALLS", 20)):
        monkeypatch.setattr(measure, name, few)
    monkeypatch.setattr(measure, "BUSY_TOKENS", 64)
    monkeypatch.setattr(measure, "WINDOW_S", 0.1)
    monkeypatch.setattr(plan, "DISK_S_MIN", 0.2)


@pytest.mark.usefixtures("brief_measuring")
def test_a_plan_is_checked_and_leaves_the_store_alone(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    before = content(folder / "store")
    asked = ["--table", folder / "store", "--tokens-per-s", 8000, "--waiting", 1, "--disk-share", 1]
    asked += ["--disk-s", 0.2, "--check", "--check-s", 0.2, "--record", tmp_path]
    assert cli.main(options(folder, *asked)) == 0
    shown = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    found = record["results"]
    assert content(folder / "store") == before
    assert list((folder / "data").iterdir()) == []
    assert str(folder) not in path.read_text()
    figures = Figures(**found["figures"])
    assert figures.reads_per_s <= figures.reads_burst_per_s
    assert found["trace"]["tokens_looked_up"] == TOKENS
    assert len(found["plans"]) == 11
    check_agrees(found["check"])
    for said in ("measured now", "the row file that was read", "beside a daemon with", "predicted", "seen"):
        assert said in shown.out
    assert shown.err == f"record: {path}\n"


def check_agrees(check: dict[str, Any]) -> None:
    """Counts are those of the daemon; times are at least there."""
    lines = {line["what"]: line for line in check["lines"]}
    assert check["paced_steps"] >= 25
    assert check["steps"] == 900  # 20 documents of 300 tokens, 8 side by side: three rounds
    assert abs(lines["hit rate"]["error"]) <= 0.5, lines["hit rate"]
    assert abs(lines["records read a token"]["error"]) <= 0.03
    assert abs(lines["pages read a token"]["error"]) <= 0.03
    assert 0 < lines["hit rate"]["seen"] < 1
    for what in ("a step's rows, p50 us", "from when it was due, p99 us", "share of the time spent waiting"):
        assert lines[what]["seen"] > 0


def planned(folder: Path, capsys: Capture, *more: object) -> dict[str, Any]:
    asked = ["--table", folder / "store", "--figures", folder / "machine.json", *more]
    assert cli.main(options(folder, *asked, "--json")) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_more_memory_waits_less_and_the_cheapest_is_chosen(folder: Path, capsys: Capture) -> None:
    found = planned(folder, capsys, "--tokens-per-s", 500, "--waiting", 0.3, "--disk-share", 1)
    plans = found["plans"]
    assert [p["dram_bytes"] for p in plans] == sorted(p["dram_bytes"] for p in plans)
    assert plans[0]["hit_rate"] == 0
    assert plans[-1]["hit_rate"] > 0.5
    assert plans[-1]["waiting_share"] < plans[0]["waiting_share"]
    best = found["cheapest"]
    assert best is not None
    assert plans[best]["meets"]
    assert not any(p["meets"] for p in plans[:best])
    assert found["in_the_way"] == []
    assert found["price_all_in_dram"] > plans[best]["price"]


def test_named_budgets_and_an_extent(folder: Path, capsys: Capture) -> None:
    asked = ["--dram", "1MiB,50%", "--extent", "0,8MiB"]
    found = planned(folder, capsys, "--tokens-per-s", 100, *asked)
    assert len(found["plans"]) == 4
    bare, extent = found["plans"][0], found["plans"][2]
    assert bare["dram_bytes"] == extent["dram_bytes"] == 1 << 20
    assert extent["extent_bytes"] == 8 << 20
    assert extent["page_reads_per_token"] < bare["page_reads_per_token"]
    assert extent["price"] > bare["price"]


def test_a_target_that_nothing_meets(folder: Path, capsys: Capture) -> None:
    asked = ["--table", folder / "store", "--figures", folder / "machine.json", "--tokens-per-s", 1e6]
    assert cli.main(options(folder, *asked)) == 0
    shown = capsys.readouterr().out
    assert "no budget meets 1,000,000 tokens/s" in shown
    assert "the disk: busy" in shown
    assert "it does not keep up" in shown


WRONG = {
    "no tables": (["--tokens-per-s", 1], "one of --model and --table"),
    "two": (["--tokens-per-s", 1, "--model", "qwen-ple", "--table", "x"], "one of --model and --table"),
    "no store": (["--tokens-per-s", 1, "--table", "absent"], "give the folder of a store"),
    "unmeasured": (["--tokens-per-s", 1, "--model", "engram-demo"], "take a packed store"),
    "few steps": (["--tokens-per-s", 1, "--table", "STORE", "--check"], "fewer than 25 say nothing"),
    "sessions": (["--tokens-per-s", 1, "--table", "STORE", "--sessions", 21], "0 of 300 steps"),
    "hbm": (["--tokens-per-s", 1, "--table", "STORE", "--figures", "MACHINE", "--hbm", "1GiB"], "no GPU"),
    "hbm check": (["--tokens-per-s", 1, "--table", "STORE", "--hbm", "1GiB", "--check"], "leave out --hbm"),
    "tiny": (["--tokens-per-s", 1, "--table", "STORE", "--figures", "MACHINE", "--dram", "5B"], "at least"),
    "brief": (["--tokens-per-s", 1, "--table", "STORE", "--disk-s", "0.5"], "--disk-s 0.5"),
    "figures": (["--tokens-per-s", 1, "--table", "STORE", "--figures", "absent.json"], "cannot be read"),
    "no rate": (["--tokens-per-s", 0, "--table", "STORE"], "expected a number above 0"),
    "vast": (["--tokens-per-s", "1e308", "--table", "STORE"], "expected 0.001 to 1e+09"),
    "share": (["--tokens-per-s", 1, "--table", "STORE", "--waiting", "3%"], "expected a finite number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions_are_one_line(name: str, folder: Path, capsys: Capture) -> None:
    asked, said = WRONG[name]
    places = {"STORE": folder / "store", "MACHINE": folder / "machine.json"}
    try:
        code: Any = cli.main(options(folder, *(places.get(str(word), word) for word in asked)))
    except SystemExit as left:
        code = left.code
    assert code in (2, 3)
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
