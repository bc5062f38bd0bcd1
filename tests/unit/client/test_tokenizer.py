"""The compressed vocabulary against the published digest and samples, and files that are no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import BadRequest, FormatError
from engram_client.tokenizer import CompressedTokenizer, vocabulary_digest
from tests.vectors import load_json, tokenizer_json


@pytest.fixture(scope="module")
def tokenizer() -> CompressedTokenizer:
    return CompressedTokenizer(tokenizer_json())


def word_level(path: Path, words: list[str]) -> Path:
    """A small tokenizer.json that knows these words, ids in order."""
    model = {
        "type": "WordLevel",
        "vocab": {word: place for place, word in enumerate(words)},
        "unk_token": words[0],
    }
    whitespace = {"type": "WhitespaceSplit"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": whitespace, "model": model}))
    return path


class TestDeepSeek:
    def test_digest_is_the_published_one(self, tokenizer: CompressedTokenizer) -> None:
        expected = load_json("engram_demo")["compressed_map_sha256_int64_le"]
        assert tokenizer.digest == expected
        assert vocabulary_digest(tokenizer.lookup_table) == expected

    def test_sizes(self, tokenizer: CompressedTokenizer) -> None:
        assert tokenizer.vocab_size == 99092
        assert tokenizer.raw_vocab_size == 129280
        assert tokenizer.lookup_table.dtype == np.int64

    def test_samples(self, tokenizer: CompressedTokenizer) -> None:
        vectors = load_json("engram_demo")
        assert tokenizer.lookup_table[:64].tolist() == vectors["compressed_map_head"]
        sample = vectors["compressed_map_sample"]
        raw = [int(raw_id) for raw_id in sample]
        assert tokenizer.compress(raw).tolist() == list(sample.values())

    def test_encodes_the_published_texts(self, tokenizer: CompressedTokenizer) -> None:
        for case in load_json("engram_demo")["configs"][0]["cases"]:
            ids = tokenizer.encode(case["text"])
            assert ids.dtype == np.int64
            assert ids.tolist() == case["token_ids"]

    def test_first_ids_of_equal_text_come_first(self, tokenizer: CompressedTokenizer) -> None:
        _, first = np.unique(tokenizer.lookup_table, return_index=True)
        assert (np.diff(first) > 0).all()

    def test_compress_keeps_the_shape(self, tokenizer: CompressedTokenizer) -> None:
        ids = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
        assert tokenizer.compress(ids).shape == (2, 3, 4)
        assert tokenizer.compress([]).shape == (0,)

    @pytest.mark.parametrize("wrong", [[-1], [129280], [0.5]])
    def test_compress_refuses(self, tokenizer: CompressedTokenizer, wrong: list[float]) -> None:
        with pytest.raises(BadRequest, match="token id"):
            tokenizer.compress(wrong)

    def test_lookup_table_cannot_be_changed(self, tokenizer: CompressedTokenizer) -> None:
        with pytest.raises(ValueError, match="read-only"):
            tokenizer.lookup_table[0] = 1


@pytest.mark.parametrize(
    ("word", "twin"),
    [
        ("apple", "APPLE"),
        ("cafe", "café"),
        ("cafe\u0301", "café"),
        ("fi", "\ufb01"),  # a ligature
        ("a b", "a \t\r\n b"),
        ("a", "  a\n"),
        (" ", "\n\n"),  # blanks alone stay one space
        ("\u212b", "å"),  # the Angstrom sign
    ],
)
def test_words_that_read_alike_fold_into_one(tmp_path: Path, word: str, twin: str) -> None:
    path = word_level(tmp_path / "tokenizer.json", ["<unk>", word, twin, "other"])
    assert CompressedTokenizer(path).lookup_table.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("a", "b"),
        ("\ufffd", "\ufffd\ufffd"),  # not valid text by itself: the raw token stands for it
        ("\u0301", "\u0300"),  # an accent alone normalizes to nothing: its text is kept
    ],
)
def test_words_that_do_not_stay_apart(tmp_path: Path, word: str, other: str) -> None:
    path = word_level(tmp_path / "tokenizer.json", ["<unk>", word, other])
    assert CompressedTokenizer(path).lookup_table.tolist() == [0, 1, 2]


class TestForeignFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"none\.json: no such file"):
            CompressedTokenizer(tmp_path / "none.json")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="no such file"):
            CompressedTokenizer(tmp_path)

    @pytest.mark.parametrize("text", ["", "not json", "{}", '{"model": {"type": "Unheard"}}'])
    def test_not_a_tokenizer(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text(text)
        with pytest.raises(FormatError, match=r"tokenizer\.json: not a Hugging Face tokenizer\.json"):
            CompressedTokenizer(path)

    def test_binary(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(bytes(range(256)))
        with pytest.raises(FormatError, match="not a Hugging Face"):
            CompressedTokenizer(path)
