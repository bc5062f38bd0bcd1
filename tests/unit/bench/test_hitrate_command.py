"""`tierbench hitrate` as people call it: what it tells, and what it says to input that is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench import cli
from tierbench.corpus import load_trace, save_trace
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = 400
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, WORDS)}}
    tiny = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tiny.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.save(str(path))
    return path


def words(count: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    return " ".join(f"word{i}" for i in (1 + (random.pareto(0.8, count) * 2).astype(int) % (WORDS - 1)))


def hitrate(*arguments: object) -> int:
    return cli.main(["hitrate", *map(str, arguments)])


def figures(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert hitrate(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    ids = random.zipf(1.3, 3_000).astype(np.uint32) % WORDS
    save_trace(tmp_path / "trace.npz", ids, np.array([0, 700, 700, 3_000]))
    return tmp_path / "trace.npz"


@pytest.fixture
def base(tokenizer: Path) -> list[object]:
    return ["--model", "engram-demo", "--tokenizer", tokenizer]


def test_every_kind_of_input_is_read(tmp_path: Path, base: list[object], capsys: Capture) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("word3 word4")
    (folder / "deeper" / "a.md").write_text("word5")
    save_trace(folder / "trace.npz", np.array([7], np.uint32), np.array([0, 1]))
    (folder / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (folder / ".git" / "hidden").write_text("word9")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "word1 word2"}\n\n{"body": "word6", "id": 3}\n')
    save_trace(tmp_path / "t.npz", np.array([7, 8], np.uint32), np.array([0, 1, 2]))
    kept = tmp_path / "kept.npz"
    inputs = [folder, lines, tmp_path / "t.npz", folder / "b.txt"]
    found = figures(capsys, *inputs, *base, "--field", "body", "--dram", "10%", "--save-trace", kept)
    ids, off = load_trace(kept)
    assert ids.tolist() == [3, 4, 5, 1, 2, 6, 7, 8, 3, 4]
    assert off.tolist() == [0, 2, 3, 5, 6, 7, 8, 10]
    assert found["trace"]["documents"] == 7
    assert found["trace"]["tokens"] == 10


def test_byte_order_marks_are_not_text(tmp_path: Path, base: list[object], capsys: Capture) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword1 word2")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "word3"}')
    found = figures(capsys, tmp_path, *base, "--dram", "10%", "--save-trace", tmp_path / "t.npz")
    assert load_trace(tmp_path / "t.npz")[0].tolist() == [1, 2, 3]
    assert found["trace"]["documents"] == 2


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path, base: list[object], capsys: Capture) -> None:
    (tmp_path / "a.txt").write_text("word1")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    assert hitrate(tmp_path, *base, "--dram", "1MiB", "--json") == 0
    assert "files left out that are no UTF-8 text: 1" in capsys.readouterr().err


def test_what_the_command_tells(trace: Path, base: list[object], tmp_path: Path, capsys: Capture) -> None:
    mix = ["--order", "shuffled", "--sessions", "4", "--prefill-chunk", "64", "--prompt-share", "0.5"]
    options = [*base, "--dram", "64KiB,1MiB,50%", *mix, "--record", tmp_path / "records"]
    found = figures(capsys, trace, *options)
    assert found["trace"]["tokens_looked_up"] == 3_000
    assert found["trace"]["accesses"] == 3_000 * 2 * 2
    small, _, large = found["budgets"]
    assert 0 < small["hit_rate"] < large["hit_rate"] < 1 - found["trace"]["compulsory_share"] + 1e-9
    for budget in found["budgets"]:
        beside = budget["beside"]
        assert beside["clairvoyant"]["reads_per_access"] <= budget["records_read_per_access"]
        assert beside["clairvoyant"]["reads_per_access"] <= beside["lru"]["reads_per_access"]
        assert set(budget["hit_rate_by_order"]) == {"2", "3"}
        assert len(budget["hit_rate_by_tenth"]) == 10
        assert budget["hit_rate_by_tier"]["nvme"] == pytest.approx(1 - budget["hit_rate"])
        assert np.mean(list(budget["hit_rate_by_table"].values())) == pytest.approx(budget["hit_rate"])
        assert budget["page_reads_per_token"]["p99"] >= budget["page_reads_per_token"]["p50"]
        assert budget["simulation"]["rows_per_s"] == 8 * budget["simulation"]["records_per_s"]
    [record] = (tmp_path / "records").iterdir()
    assert json.loads(record.read_text())["results"] == found
    assert str(tmp_path) not in record.read_text()


def test_people_get_a_table_and_a_curve(trace: Path, base: list[object], capsys: Capture) -> None:
    assert hitrate(trace, *base, "--dram", "256KiB", "--curve") == 0
    shown = capsys.readouterr()
    assert "clairvoyant bound" in shown.out
    assert "the first to their record" in shown.out
    assert "by budget, from 100.00 % of the records" in shown.out
    assert shown.err == ""


def test_packed_tables_are_taken_from_row_files_and_stores(
    tmp_path: Path, tokenizer: Path, capsys: Capture
) -> None:
    (tmp_path / "a.txt").write_text(words(500))
    store, checkpoint = tmp_path / "store", tmp_path / "checkpoint"
    options = ["--model", "deepseek-v4.1", "--rows-per-head", "600", "--tokenizer", str(tokenizer)]
    assert cli.main(["make-checkpoint", *options, "--out", str(checkpoint)]) == 0
    from tierstore.cli import main

    assert main(["pack", str(checkpoint), str(store), "--quiet"]) == 0
    capsys.readouterr()
    common = [tmp_path / "a.txt", "--tokenizer", tokenizer, "--dram", "1MiB"]
    whole = figures(capsys, *common, "--table", store)
    files = sorted(store.rglob("*.rows"))
    assert len(whole["model"]["tables"]) == len(files) == 2
    both = figures(capsys, *common, "--table", files[1], "--table", files[0])
    assert both["budgets"][0]["hit_rate"] == whole["budgets"][0]["hit_rate"]
    assert figures(capsys, *common, "--table", files[0])["trace"]["accesses"] == 500 * 3


class TestWrongInput:
    def refused(self, capsys: Capture, code: int, message: str, *arguments: object) -> None:
        assert hitrate(*arguments) == code
        err = capsys.readouterr().err
        assert message in err, err
        assert "Traceback" not in err
        assert err.startswith("tierbench: ")
        assert len(err.strip().splitlines()) == 1

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "folder"])
    def test_no_text(self, tmp_path: Path, base: list[object], capsys: Capture, name: str) -> None:
        path = tmp_path / name
        path.mkdir() if name == "folder" else path.write_text("")
        self.refused(capsys, 2, "no tokens in there", path, *base, "--dram", "1MiB")

    def test_an_empty_trace(self, tmp_path: Path, base: list[object], capsys: Capture) -> None:
        save_trace(tmp_path / "t.npz", np.zeros(0, np.uint32), np.zeros(1, np.int64))
        self.refused(capsys, 2, "no tokens in there", tmp_path / "t.npz", *base, "--dram", "1MiB")

    @pytest.mark.parametrize("data", [b"\x00\x01\x02", b"\xff\xfe\xfd", "latin: \xe9".encode("latin-1")])
    def test_binary_files(self, tmp_path: Path, base: list[object], capsys: Capture, data: bytes) -> None:
        (tmp_path / "a.txt").write_bytes(data)
        self.refused(capsys, 3, "not UTF-8 text", tmp_path / "a.txt", *base, "--dram", "1MiB")

    def test_a_file_that_is_not_there(self, tmp_path: Path, base: list[object], capsys: Capture) -> None:
        for name in ("absent.txt", "absent.npz", "absent.jsonl", "absent"):
            self.refused(capsys, 3, "absent", tmp_path / name, *base, "--dram", "1MiB")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not a line of JSON"),
            ('{"body": "x"}', "got body; choose with --field"),
            ('{"text": 3}', "got int in it; choose"),
            ("[1]", "got list; choose"),
            ("[" * 100_000, "not a line of JSON"),
            (r'{"text": "word1 \ud800"}', r"the text has \ud800, half of a character"),
        ],
    )
    def test_lines_of_something_else(
        self, tmp_path: Path, base: list[object], capsys: Capture, line: str, message: str
    ) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "word1"}\n' + line + "\n")
        self.refused(capsys, 3, message, tmp_path / "a.jsonl", *base, "--dram", "1MiB")

    def test_a_folder_with_one_that_may_not_be_read(
        self, tmp_path: Path, base: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "texts" / "closed").mkdir(parents=True)
        scandir = os.scandir

        def closed(path: str) -> Any:
            if Path(path).name == "closed":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)  # who runs tests as root may read everything
        self.refused(capsys, 3, "closed: cannot be read", tmp_path / "texts", *base, "--dram", "1MiB")

    def test_binary_lines(self, tmp_path: Path, base: list[object], capsys: Capture) -> None:
        (tmp_path / "a.jsonl").write_bytes(b"\xff\xff")
        self.refused(capsys, 3, "not UTF-8 text", tmp_path / "a.jsonl", *base, "--dram", "1MiB")

    def test_offsets_that_fall(self, tmp_path: Path, base: list[object], capsys: Capture) -> None:
        np.savez(tmp_path / "t.npz", ids=np.zeros(5, np.uint32), off=np.array([0, 4, 3, 5]))
        message = "document 1 starts at 4 and the next at 3"
        self.refused(capsys, 3, message, tmp_path / "t.npz", *base, "--dram", "1MiB")

    def test_ids_of_another_vocabulary(self, tmp_path: Path, base: list[object], capsys: Capture) -> None:
        ids = np.array([1, 2, 3, WORDS, 5], np.uint32)
        save_trace(tmp_path / "t.npz", ids, np.array([0, 2, 5]))
        message = f"document 1, token 1: id {WORDS} is outside the model's vocabulary 0..{WORDS - 1}"
        self.refused(capsys, 2, message, tmp_path / "t.npz", *base, "--dram", "1MiB")

    def test_no_tokenizer(self, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        monkeypatch.setattr("tierbench.hitrate.model.installed_tokenizer", lambda: None)
        for model in ("deepseek-v4.1", "engram-demo"):
            self.refused(capsys, 2, "no tokenizer", trace, "--model", model, "--dram", "1MiB")

    def test_the_installed_tokenizer_is_not_taken_for_another_models(
        self, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setattr("tierbench.hitrate.model.installed_tokenizer", lambda: tokenizer)
        (tmp_path / "a.txt").write_text("word1")
        text = [tmp_path / "a.txt", "--model", "qwen-ple", "--dram", "1MiB"]
        self.refused(capsys, 2, "text needs the model's tokenizer", *text)
        assert hitrate(*text, "--tokenizer", tokenizer) == 0

    def test_a_trace_of_raw_ids_needs_no_tokenizer(self, trace: Path, capsys: Capture) -> None:
        found = figures(capsys, trace, "--model", "qwen-ple", "--dram", "1MiB")
        assert found["model"]["rows"] > 300e6

    def test_a_foreign_tokenizer(self, tmp_path: Path, trace: Path, capsys: Capture) -> None:
        (tmp_path / "t.json").write_text("{}")
        options = ["--model", "engram-demo", "--tokenizer", tmp_path / "t.json", "--dram", "1MiB"]
        self.refused(capsys, 3, "not a Hugging Face tokenizer.json", trace, *options)

    def test_a_budget_that_holds_nothing(self, trace: Path, base: list[object], capsys: Capture) -> None:
        self.refused(capsys, 2, "takes at least", trace, *base, "--dram", "1KiB")

    def test_nothing_to_find_out(self, trace: Path, base: list[object], capsys: Capture) -> None:
        self.refused(capsys, 2, "--curve", trace, *base)
        self.refused(capsys, 2, "one of --model", trace, "--dram", "1MiB")
        self.refused(capsys, 2, "one of --model", trace, *base, "--table", "x", "--dram", "1MiB")
        self.refused(capsys, 2, "say --dram, too", trace, *base, "--hbm", "1MiB")
        self.refused(capsys, 2, "--addressing is for --model", trace, "--table", "x", "--addressing", "row",
            "--dram", "1MiB")  # fmt: skip
        self.refused(capsys, 2, "--hbm 1KiB: a cache", trace, *base, "--dram", "1MiB", "--hbm", "1KiB")
        self.refused(capsys, 2, "the daemon's own budgets", trace, "--live", "unix:x", "--dram", "1MiB")

    def test_sizes_of_no_mix(self, trace: Path, base: list[object], capsys: Capture) -> None:
        for name, wrong in (("sessions", "0"), ("step", "-1"), ("prompt-share", "1.5"), ("sample", "0")):
            with pytest.raises(SystemExit) as left:
                hitrate(trace, *base, "--dram", "1MiB", f"--{name}={wrong}")
            assert left.value.code == 2
            assert f"--{name}: '{wrong}': expected" in capsys.readouterr().err
        self.refused(capsys, 2, "--sample 1.5", trace, *base, "--dram", "1MiB", "--sample", "1.5")
        for asked in (("--dram", "1MiB"), ("--curve",)):
            self.refused(capsys, 2, "no error can be told", trace, *base, *asked, "--sample", "1e-12")

    def test_no_table_there(self, tmp_path: Path, trace: Path, tokenizer: Path, capsys: Capture) -> None:
        options = ["--tokenizer", tokenizer, "--dram", "1MiB", "--table"]
        self.refused(capsys, 2, "no store with tables", trace, *options, tmp_path)
        self.refused(capsys, 3, "no such file", trace, *options, tmp_path / "absent.rows")
        self.refused(capsys, 3, "trace.npz", trace, *options, trace)

    def test_no_daemon_there(self, tmp_path: Path, trace: Path, tokenizer: Path, capsys: Capture) -> None:
        self.refused(
            capsys, 4, "absent", trace, "--tokenizer", tokenizer, "--live", f"unix:{tmp_path}/absent"
        )

    @pytest.mark.parametrize("budget", ["8G", "x", "-1", "-5%", "nan%", "1MiB,"])
    def test_budgets_that_are_none(
        self, trace: Path, base: list[object], capsys: Capture, budget: str
    ) -> None:
        with pytest.raises(SystemExit) as left:
            hitrate(trace, *base, f"--dram={budget}")
        assert left.value.code == 2
        assert "--dram" in capsys.readouterr().err


def test_no_budget_and_more_than_the_tables_are_answered(
    trace: Path, base: list[object], capsys: Capture
) -> None:
    budgets = figures(capsys, trace, *base, "--dram", "0,200%,99999999999TiB")["budgets"]
    none, all_of_it, beyond_reason = budgets
    assert (none["hit_rate"], none["capacity_records"], none["beside"]["lru"]["hit_rate"]) == (0, 0, 0)
    assert all_of_it["share_of_tables"] == pytest.approx(2)
    assert all_of_it["hit_rate"] == pytest.approx(all_of_it["beside"]["clairvoyant"]["hit_rate"])
    assert beyond_reason["hit_rate"] == all_of_it["hit_rate"]
    assert hitrate(trace, *base, "--dram", "200%") == 0
    assert "200.00 %, all of them" in capsys.readouterr().out


def test_tiers_are_told_side_by_side(trace: Path, base: list[object], capsys: Capture) -> None:
    """All pairs of what is asked for, each with what its tiers answer, for machines and for people."""
    tiers = ["--dram", "0,256KiB", "--hbm", "64KiB", "--extent", "0,1MiB"]
    budgets = figures(capsys, trace, *base, *tiers)["budgets"]
    assert [(b["hbm_bytes"], b["dram_bytes"], b["extent_bytes"]) for b in budgets] == [
        (1 << 16, dram, extent) for dram in (0, 1 << 18) for extent in (0, 1 << 20)
    ]
    assert [set(b["tiers"]) for b in budgets] == [{"hbm", "dram"}, {"hbm", "dram", "extent"}] * 2
    for budget in budgets:
        assert sum(budget["hit_rate_by_tier"].values()) == pytest.approx(1)
        for name, tier in budget["tiers"].items():
            assert tier["hit_rate"] == budget["hit_rate_by_tier"][name]
            assert np.mean(list(tier["hit_rate_by_table"].values())) == pytest.approx(tier["hit_rate"])
    assert budgets[1]["disk_bytes_per_token"] < budgets[0]["disk_bytes_per_token"]
    assert hitrate(trace, *base, *tiers) == 0
    shown = capsys.readouterr().out
    assert "HBM budget" in shown
    assert "extent budget" in shown


def test_a_model_packed_by_rows(trace: Path, base: list[object], capsys: Capture) -> None:
    found = figures(capsys, trace, *base, "--addressing", "row", "--dram", "256KiB")
    assert (found["model"]["addressing"], found["model"]["rows_per_record"]) == ("row", 1)
    assert found["trace"]["accesses"] == 3_000 * 2 * 16
    assert "single_rows" not in found["budgets"][0]["beside"]
    assert hitrate(trace, *base, "--addressing", "row", "--dram", "256KiB", "--curve") == 0
    assert "each row is a record of its own" in capsys.readouterr().out
