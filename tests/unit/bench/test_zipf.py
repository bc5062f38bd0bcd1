"""Made-up traces obey the laws they are made by, and parameters are found again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tierbench import cli
from tierbench.corpus import load_trace, save_trace
from tierbench.policy.phrases import FIRST_TOKEN
from tierbench.zipf.fit import fit, ngram_sample, target_of
from tierbench.zipf.search import least
from tierbench.zipf.workload import ALL, Workload, length_quantiles, load_workload, save_workload
from tokenizers import Tokenizer, models

from engram_client.errors import BadRequest, FormatError

VOCABULARY = 50_000
Capture = pytest.CaptureFixture[str]


def workload(tokens: int, lengths: tuple[int, ...] = (1000,), **knobs: float) -> Workload:
    return Workload({k.name: k.default for k in ALL} | knobs, lengths, tokens, VOCABULARY)


def single_tokens(tokens: int, **knobs: float) -> list[int]:
    """A trace in which nearly each phrase is one token, and different ones differ."""
    made = workload(tokens, phrase_tokens=1.05, openers=1e5, opener_exponent=0.0, **knobs)
    ids, _ = dataclasses.replace(made, vocabulary=4_000_000_000).make(3)
    return ids.tolist()


class TestWorkload:
    @pytest.mark.parametrize("exponent", [0.7, 1.0, 1.4])
    def test_phrases_are_as_popular_as_zipf_says(self, exponent: float) -> None:
        """By the slope of counts over ranks 10 to 100 of 4-grams, which lie inside phrases of many tokens."""
        made = workload(400_000, exponent=exponent, population=2_000, phrase_tokens=30)
        ids, _ = made.make(1)
        grams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), 4) @ (
            VOCABULARY ** np.arange(4)
        )
        firsts = np.unique(grams, return_counts=True)[1]
        counts = np.sort(firsts)[::-1].astype(float)
        ranks = np.array([10, 100]) * 30  # a phrase has about so many of them
        slope = np.log(counts[ranks[0]] / counts[ranks[1]]) / np.log(10)
        assert slope == pytest.approx(exponent, abs=0.2)

    def test_drift_changes_what_ranks_stand_for(self) -> None:
        """Of 300 ranks a fifth change hands in 200,000 tokens at a drift of 1: 360 phrases instead of 300."""
        still, moving = (set(single_tokens(200_000, population=300, exponent=0.1, drift=d)) for d in (0, 1))
        assert len(moving) / len(still) == pytest.approx(1.2, abs=0.05)

    def test_what_is_cold_was_never_there(self) -> None:
        none, half = (len(set(single_tokens(40_000, population=100, cold=c))) for c in (0.0, 0.5))
        assert none < 5_000
        assert half - none == pytest.approx(20_000, rel=0.1)

    def test_sessions_repeat_themselves_and_nobody_else(self) -> None:
        made = workload(60_000, (500,), cold=0.4, session=0.6, session_exponent=1.0)
        ids, off = made.make(2)
        seen: Counter[str] = Counter()
        documents: dict[tuple[int, ...], int] = {}
        for document, (a, b) in enumerate(pairwise(off)):
            for gram in np.lib.stride_tricks.sliding_window_view(ids[a:b], 4).tolist():
                known = documents.setdefault(tuple(gram), document)
                seen["own" if known == document else "other"] += 1
        assert seen["other"] < 0.03 * seen["own"], "but for first phrases, which have no past"
        assert seen["own"] - len(documents) > 0.1 * ids.size

    def test_the_seed_decides(self) -> None:
        made = workload(5_000, (3, 50, 800))
        one, same, other = made.make(1), made.make(1), made.make(2)
        assert (one[0] == same[0]).all()
        assert (one[1] == same[1]).all()
        assert (one[0] != other[0]).any()
        assert one[0].min() >= FIRST_TOKEN
        assert one[0].max() < FIRST_TOKEN + VOCABULARY
        lengths = np.diff(one[1])
        assert one[1][-1] == one[0].size == 5_000
        assert lengths.min() >= 1
        assert lengths[:-1].min() >= 3
        assert lengths.max() <= 800

    def test_a_file_holds_numbers_and_nothing_else(self, tmp_path: Path) -> None:
        ids = np.arange(1, 5_000, dtype=np.uint32)
        made = workload(4_999, length_quantiles(np.array([0, 1_000, 1_000, 4_999])), exponent=1.2)
        save_workload(tmp_path / "w.json", made)
        assert load_workload(tmp_path / "w.json") == made
        kept = json.loads((tmp_path / "w.json").read_text())
        assert set(kept) == {
            "schema", "kind", "knobs", "document_tokens", "tokens", "vocabulary", "fitted_to"
        }  # fmt: skip
        assert len(kept["document_tokens"]) == 33 < ids.size

    @pytest.mark.parametrize(
        "wrong",
        [{"exponent": -1}, {"cold": 0.6, "session": 0.6}, {"phrase_tokens": float("nan")}, {"population": 1}],
    )
    def test_knobs_out_of_range(self, wrong: dict[str, float]) -> None:
        with pytest.raises(BadRequest, match=next(iter(wrong))):
            workload(100, **wrong)


class TestFit:
    def test_the_least_of_a_bent_valley_is_found(self) -> None:
        def valley(p: np.ndarray) -> float:
            x, y = 4 * p[0] - 2, 4 * p[1] - 1
            return float(100 * (y - x * x) ** 2 + (1 - x) ** 2 + 5 * (p[2:] - 0.3) @ (p[2:] - 0.3))

        told: list[int] = []
        found, value = least(
            valley, np.full(5, 0.9), evaluations=2_000, good_enough=1e-8, seed=1, progress=told.append
        )
        assert value < 1e-6
        assert found == pytest.approx([0.75, 0.5, 0.3, 0.3, 0.3], abs=0.01)
        assert sum(told) < 2_000

    def test_a_search_comes_nearer_than_where_it_began(self) -> None:
        truth = workload(
            20_000, (50, 400, 3_000), exponent=1.1, population=3e4, cold=0.2, session=0.2, follow=0.6,
            phrase_tokens=5, openers=100,
        )  # fmt: skip
        fold = np.arange(VOCABULARY + FIRST_TOKEN, dtype=np.uint32)
        target = target_of(*truth.make(5), fold, 3, VOCABULARY)
        _, first = fit(target, evaluations=1, seed=0, progress=lambda count: None)
        found, apart = fit(target, evaluations=90, seed=0, progress=lambda count: None)
        assert apart < 0.7 * first
        again = ngram_sample(*found.make(0), fold, 3, target.rate).lru_by_owner(target.capacities, 20_000)
        rms = 100 * np.sqrt(((again - target.hit_rates).mean(axis=0) ** 2).mean())
        assert rms < 1.2 * apart, "what is returned is what was judged"

    def test_ngrams_are_those_of_documents(self) -> None:
        """The same tokens in two documents and in one: what crosses their border is another n-gram."""
        ids, fold = np.array([5, 6, 7, 5, 6, 7], np.uint32), np.arange(10, dtype=np.uint32)
        apart = ngram_sample(ids, np.array([0, 3, 6]), fold, 3, 1.0)
        together = ngram_sample(ids, np.array([0, 6]), fold, 3, 1.0)
        assert apart.distinct == 9
        assert together.distinct == 4 + 5 + 6
        folded = ngram_sample(ids, np.array([0, 3, 6]), np.zeros(10, np.uint32), 1, 1.0)
        assert folded.distinct == 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipf") / "tokenizer.json"
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, 600)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    return path


def run(*arguments: object) -> int:
    return cli.main(["zipf", *map(str, arguments)])


class TestCommand:
    def test_a_trace_is_made_fitted_and_made_again(
        self, tmp_path: Path, tokenizer: Path, capsys: Capture
    ) -> None:
        trace, fitted, again = tmp_path / "t.npz", tmp_path / "p.json", tmp_path / "again.npz"
        made = ["--tokens", 9_000, "--vocabulary", 500, "--exponent", 1.2, "--population", 900]
        assert run("make", trace, *made, "--document-tokens", 300) == 0
        assert "9,000 tokens in 30 documents; exponent 1.2" in capsys.readouterr().out
        options = ["--model", "engram-demo", "--tokenizer", tokenizer, "--evaluations", 15]
        assert run("fit", trace, *options, "--out", fitted, "--json", "--record", tmp_path / "r") == 0
        found = json.loads(capsys.readouterr().out)
        near = found["nearness"]
        assert near["tierstore_points_apart_max"] == max(
            abs(p["tierstore"]["points_apart"]) for p in near["points"]
        )
        assert 0 < near["original"]["cold_share"] < 1
        [record] = (tmp_path / "r").iterdir()
        assert json.loads(record.read_text())["results"] == found
        assert str(tmp_path) not in record.read_text()
        assert load_workload(fitted).knobs == found["knobs"]
        assert run("make", again, "--parameters", fitted, "--tokens", 500, "--drift", 3, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["tokens"], told["knobs"]["drift"]) == (500, 3)
        assert load_trace(again)[0].size == 500
        assert run("fit", trace, *options) == 0
        assert "points at most" in capsys.readouterr().out

    def refused(self, capsys: Capture, code: int, message: str, *arguments: object) -> None:
        assert run(*arguments) == code
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""

    def test_what_is_no_file_of_parameters(self, tmp_path: Path, capsys: Capture) -> None:
        out, wrong = tmp_path / "t.npz", tmp_path / "p.json"
        self.refused(capsys, 3, "cannot be read", "make", out, "--parameters", wrong)
        for text in ("{", "[]", '{"kind": "x"}'):
            wrong.write_text(text)
            self.refused(capsys, 3, str(wrong), "make", out, "--parameters", wrong)
        kept = {"schema": 1, "kind": "tierbench zipf workload", "document_tokens": [5], "tokens": 9}
        wrong.write_text(json.dumps(kept))
        self.refused(capsys, 3, "a parameter is missing", "make", out, "--parameters", wrong)
        wrong.write_text(json.dumps(kept | {"knobs": {}, "vocabulary": 99}))
        with pytest.raises(FormatError, match="exponent nan"):
            load_workload(wrong)

    def test_knobs_that_are_none(self, tmp_path: Path, capsys: Capture) -> None:
        out = tmp_path / "t.npz"
        self.refused(capsys, 2, "exponent -1: need", "make", out, "--exponent", "-1")
        self.refused(capsys, 2, "together 1.2", "make", out, "--cold", "0.6", "--recent", "0.6")
        self.refused(capsys, 2, "tokens: need", "make", out, "--tokens", 10**12)
        self.refused(capsys, 3, "cannot be written", "make", tmp_path / "absent" / "t.npz")

    def test_nothing_to_fit_to(self, tmp_path: Path, tokenizer: Path, capsys: Capture) -> None:
        options = ["--model", "engram-demo", "--tokenizer", tokenizer]
        save_trace(tmp_path / "t.npz", np.arange(100, dtype=np.uint32), np.array([0, 100]))
        self.refused(capsys, 2, "too few", "fit", tmp_path / "t.npz", *options)
        save_trace(tmp_path / "t.npz", np.full(9_000, 999, np.uint32), np.array([0, 9_000]))
        self.refused(capsys, 2, "outside the model's vocabulary", "fit", tmp_path / "t.npz", *options)
        self.refused(capsys, 3, "absent", "fit", tmp_path / "absent.npz", *options)
