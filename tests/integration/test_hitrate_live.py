"""The simulation beside a real daemon: the same look-ups, the same hit rate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tierbench import cli
from tierbench.checkpoint import make_checkpoint
from tierbench.corpus import save_trace
from tierbench.hitrate.live import chosen_specs
from tokenizers import Tokenizer, models

from engram_client import connect
from engram_client.errors import BadRequest
from tests.support.daemon import Daemon, running, serve_command
from tests.support.stores import V41, PackedStore
from tierstore.packing import PackOptions, pack

WORDS = 800
TOKENS = 12_000
BUDGET_BYTES = 8 << 20  # 3,700 records, and as many sets as the policy's duel takes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "tokenizer.json"
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, WORDS)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    return path


@pytest.fixture(scope="module")
def store(tokenizer: Path) -> Path:
    checkpoint = make_checkpoint("deepseek-v4.1", 600, tokenizer.parent / "checkpoint", tokenizer=tokenizer)
    pack(checkpoint.path, tokenizer.parent / "store", PackOptions(), notify=print, on_progress=lambda p: None)
    return tokenizer.parent / "store"


@pytest.fixture(scope="module")
def trace(tokenizer: Path) -> Path:
    """Phrases that come again, in many documents."""
    random = np.random.default_rng(7)
    phrases = [random.integers(1, WORDS, 8) for _ in range(2_000)]
    chosen = np.minimum(random.pareto(0.7, TOKENS // 8) * 5, 1e9).astype(int) % len(phrases)
    ids = np.concatenate([phrases[i] for i in chosen]).astype(np.uint32)
    path = tokenizer.parent / "trace.npz"
    save_trace(path, ids, np.arange(0, ids.size + 1, 600))
    return path


@pytest.fixture
def daemon(store: Path, tmp_path: Path) -> Iterator[Daemon]:
    options = {"dram_budget_bytes": BUDGET_BYTES, "dram_snapshot_period_s": 0}
    command = serve_command(store, serve_unix=tmp_path / "socket", serve_tcp="127.0.0.1:0", **options)
    with running(command, tmp_path) as started:
        yield started


@pytest.mark.parametrize("way", ["unix", "tcp"])
@pytest.mark.parametrize("mix", [[], ["--sessions", "8", "--prompt-share", "0.5", "--prefill-chunk", "200"]])
def test_the_daemon_and_the_simulation_agree(
    daemon: Daemon, trace: Path, tokenizer: Path, mix: list[str], way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through shared memory and over gRPC, reading prompts and decoding: within half a point."""
    target = daemon.unix if way == "unix" else daemon.tcp
    options = ["--tokenizer", str(tokenizer), "--live", target, *mix]
    assert cli.main(["hitrate", str(trace), *options, "--json"]) == 0
    shown = capsys.readouterr()
    both = json.loads(shown.out)["live"]
    assert shown.err == ""
    assert 0.2 < both["simulated"]["hit_rate"] < 0.95
    assert abs(both["difference_points"]) <= 0.5, both
    assert abs(both["read_difference_points"]) <= 0.5, both
    assert both["live"]["began_empty"]


def test_a_daemon_that_has_served_is_told_of_and_shown(
    daemon: Daemon, trace: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(daemon.unix) as client:
        [name, _] = client.tables()
        client.table(name).lookup_ngrams(np.arange(3).reshape(1, 3))
    options = ["--tokenizer", str(tokenizer), "--live", daemon.unix, "--table", name]
    assert cli.main(["hitrate", str(trace), *options]) == 0
    shown = capsys.readouterr()
    assert "cache was not empty" in shown.err
    assert "the daemon beside the simulation" in shown.out


def test_a_budget_that_is_shared_by_sizes_is_refused(packed: PackedStore, tmp_path: Path) -> None:
    with (
        connect(f"local:{packed.copy_to(tmp_path)}") as client,
        pytest.raises(BadRequest, match="is shared by"),
    ):
        chosen_specs(client, [V41])


def test_tables_of_another_model_are_refused(
    daemon: Daemon, trace: Path, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]")).save(str(other))
    assert cli.main(["hitrate", str(trace), "--tokenizer", str(other), "--live", daemon.unix]) != 0
    assert "was trained with a compressed vocabulary" in capsys.readouterr().err
    options = ["--tokenizer", str(tokenizer), "--live", daemon.unix, "--table", "absent"]
    assert cli.main(["hitrate", str(trace), *options]) != 0
    assert "no table 'absent'" in capsys.readouterr().err
