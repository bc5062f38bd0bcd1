"""`tierbench learn`: every token once, equal work with and without a table, the store equal to memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tierbench.cli import main
from tierbench.learn.figures import log_log_fit, over_seeds
from tierbench.learn.model import LanguageModel, Shape
from tierbench.learn.runs import Recipe, lanes, tokens_needed
from tierbench.learn.study import Run, Study, run_one
from tierbench.learn.text import split_documents

RECIPE = Recipe(batch=3, context=8, steps=5, rate=3e-3)


def test_a_run_reads_every_token_once_and_predicts_the_next() -> None:
    tokens = np.arange(tokens_needed(RECIPE) + 7)
    batches = lanes(tokens, RECIPE)
    assert batches.shape == (5, 3, 9)
    assert np.array_equal(batches[:, :, 1:], batches[:, :, :-1] + 1)
    read = batches[:, :, :-1].ravel()
    assert len(set(read.tolist())) == read.size == 5 * 3 * 8


def test_no_document_is_both_learnt_from_and_held_out() -> None:
    documents = [f"document {i % 300}" for i in range(400)]
    training, held_out = split_documents(documents)
    assert sorted(training + held_out) == sorted(documents)
    assert held_out
    assert not set(training) & set(held_out)


def test_the_line_through_points_that_lie_on_one() -> None:
    rows = [1000, 4000, 16000]
    fit = log_log_fit(rows, [3.0 * r**-0.02 for r in rows])
    assert fit["slope"] == pytest.approx(-0.02)
    assert fit["r2"] == pytest.approx(1.0)
    assert log_log_fit(rows, [2.0, 3.0, 2.0])["r2"] < 0.5
    assert over_seeds([1.0, 3.0])["std"] == pytest.approx(2**0.5)


def test_both_models_do_the_same_number_of_multiplications() -> None:
    shape = Shape(vocab_size=50, hidden=32, layers=2, context=8)
    parts = [LanguageModel(shape, with_memory=with_memory, seed=0).memory for with_memory in (False, True)]
    weights = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in parts]
    assert weights[0] == weights[1]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two hundred small documents of words from a short list."""
    random = np.random.default_rng(5)
    words = ["row", "table", "read", "write", "page", "step", "log", "the", "of", "a"]
    documents = [" ".join(random.choice(words, 60)) + f" {i}" for i in range(200)]
    monkeypatch.setattr("tierbench.learn.text.stdlib_text", lambda: documents)
    return Study(tmp_path / "learn", 300, 32, 2, replace(RECIPE, steps=6), 60, 0.1, 2)


def test_the_store_learns_what_memory_learns(study: Study) -> None:
    """A tenth of the table in DRAM, commits on the way; SparseAdam on a resident table is the oracle."""
    threads = torch.get_num_threads()
    try:
        found = [run_one(study, Run(kind, 400, 1)) for kind in ("tierstore", "resident", "without")]
    finally:
        torch.set_num_threads(threads)
    tiered, resident, without = (f["validation_loss"] for f in found)
    assert tiered == pytest.approx(resident, abs=1e-4)
    assert abs(without - resident) > 1e-6, "the table is not read"
    assert not list(study.folder.glob("learn-*-*/")), "stores are left behind"


def test_rates_beside_memory_and_beside_commits(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--batch 3 --context 8 --vocab-size 300 --hidden 32 --layers 2 --rows-per-head 400"
    counts = "--windows 2 --steps 2 --training-batches 9 --json"
    assert main(["train-rate", "--dir", str(study.folder), *sizes.split(), *counts.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    for name in ("store_beside_resident", "steps_beside_commits"):
        assert len(told[name]["ours"]) == 2
        assert min(told[name]["ours"]) > 0
    assert told["counters"]["training_commits"] >= 2


def test_the_record_holds_every_loss(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs in this process: the text that the fixture puts in place is here alone."""

    def measured(study: Study, runs: list[Run], processes: int, done: Callable[[Run], None]) -> list[Any]:
        return [run_one(study, run) for run in runs]

    monkeypatch.setattr("tierbench.commands.learn.measure", measured)
    sizes = "--batch 3 --context 8 --vocab-size 300 --hidden 32 --layers 2 --rows-per-head 300,400"
    counts = "--steps 3 --seeds 2 --seed 7 --validation-tokens 60"
    threads = torch.get_num_threads()
    try:
        command = ["learn", "--dir", str(study.folder), *sizes.split(), *counts.split()]
        assert main([*command, "--record", str(tmp_path / "records")]) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    models = record["results"]["models"]
    assert record["seed"] == 7
    assert sorted(len(m["losses"]) for m in models) == [1, 1, 2, 2]
    assert record["results"]["log_log_fit"]["r2"] <= 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hidden", "40"], "in steps of 32"),
        (["--validation-tokens", "10"], "one batch has"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_sizes(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["learn", "--dir", str(tmp_path), *options])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert told in capsys.readouterr().err
