"""The PLE reader: shards in order, the checkpoint's own hash before the derived one, and refusals."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import FormatError
from tierstore.format.sources import open_checkpoint, uncovered_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_ple.json"
PREFIX = "model.language_model.layers.1.ple.ple_embedding."
TEXT = {
    "vocab_size": 100,
    "eos_token_id": 9,
    "ple_layer_ids": [2],
    "ngram_size": 3,
    "heads_per_ngram": 1,
    "ngram_vocab_size_base": 4,
}


def int64s(*values: int) -> tuple[str, list[int], bytes]:
    return "I64", [len(values)], struct.pack(f"<{len(values)}q", *values)


def shard(i: int) -> tuple[str, list[int], bytes]:
    return "F8_E4M3", [2, 4], bytes(range(i * 8, i * 8 + 8))


def table(shards: int = 12) -> dict[str, Any]:
    """12 shards of 2 rows; the names sort as 0, 1, 10, 11, 2, ..."""
    names = sorted(f"{PREFIX}ngram_embedding.shard_{i}.weight" for i in range(shards))
    tensors: dict[str, Any] = {n: shard(int(n.split("shard_")[1].split(".")[0])) for n in names}
    tensors[f"{PREFIX}ngram_embedding.weight_scale"] = ("BF16", [1], b"\x00\x3f")  # 0.5
    return tensors


def buffers() -> dict[str, Any]:
    return {
        f"{PREFIX}layer_multipliers": int64s(3, 5, 7),
        f"{PREFIX}ngram_heads_vocab_sizes": int64s(11, 12),
        f"{PREFIX}ngram_heads_offsets": int64s(0, 11),
    }


@pytest.fixture
def made(tmp_path: Path, write_file: Any) -> Callable[..., Path]:
    def make(tensors: dict[str, Any], **changes: Any) -> Path:
        write_file(tmp_path / "model.safetensors", tensors)
        text = {k: v for k, v in {**TEXT, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
        return tmp_path

    return make


def test_shards_follow_their_numbers(made: Callable[..., Path]) -> None:
    (source,) = open_checkpoint(made(table() | buffers()))
    assert (source.name, source.layer, source.rows) == ("qwen-ple.layer1", 1, 24)
    raw = b"".join(e.path.read_bytes()[e.offset : e.offset + e.rows * 4] for e in source.fields[0])
    assert raw == bytes(range(96))
    assert source.layout.global_scale == 0.5
    assert source.layout.row_bytes == 4


def test_buffers_win_over_the_configuration(made: Callable[..., Path]) -> None:
    own = open_checkpoint(made(table() | buffers()))[0].scheme
    derived = open_checkpoint(made(table()))[0].scheme
    assert own is not None
    assert derived is not None
    assert own.multipliers == (3, 5, 7)
    assert own.head_sizes == ((11,), (12,))
    assert own.head_offsets == ((0,), (11,))
    assert derived.head_sizes == ((5,), (7,))
    assert derived.multipliers != own.multipliers
    assert own.layer_id == derived.layer_id == 1
    assert own.eos_token_id == derived.eos_token_id == 9


def test_derived_scheme_is_the_published_one(tmp_path: Path, write_sparse: Callable[..., Path]) -> None:
    golden = json.loads(GOLDEN.read_text())
    tensors = {f"{PREFIX}ngram_embedding.shard_{i}.weight": ("BF16", [2_500_012, 160], 2) for i in range(128)}
    write_sparse(tmp_path / "model.safetensors", tensors)
    text = {
        "vocab_size": golden["config"]["vocab_size"],
        "eos_token_id": [golden["config"]["eos_token_id"], 3],
        "ple_layer_ids": [2],
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20_000_000,
        "split_ngram_parts": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    (source,) = open_checkpoint(tmp_path)
    assert source.scheme is not None
    assert list(source.scheme.multipliers) == golden["multipliers"]
    assert [n for order in source.scheme.head_sizes for n in order] == golden["head_sizes"]
    assert (source.rows, source.scheme.rows) == (320_001_536, 320_001_446)
    assert source.layout.global_scale is None


def test_one_unsplit_tensor_and_float32_scale(made: Callable[..., Path]) -> None:
    tensors = {
        f"{PREFIX}ngram_embedding.weight": ("F8_E4M3", [24, 4], bytes(96)),
        f"{PREFIX}ngram_embedding.weight_scale": ("F32", [], struct.pack("<f", 0.125)),
    }
    (source,) = open_checkpoint(made(tensors | buffers()))
    assert (source.rows, source.layout.global_scale) == (24, 0.125)


def changed(name: str, value: Any) -> dict[str, Any]:
    tensors = table() | buffers()
    if value is None:
        tensors.pop(PREFIX + name)
    else:
        tensors[PREFIX + name] = value
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ngram_embedding.shard_5.weight", None, r"11 of 12 shards, \[5\] are missing"),
        (
            "ngram_embedding.shard_5.weight",
            ("BF16", [2, 4], bytes(16)),
            r"is BF16 \[2, 4\], expected F8_E4M3",
        ),
        ("ngram_embedding.shard_5.weight", ("F8_E4M3", [4, 2], bytes(8)), r"\[4, 2\], expected"),
        ("ngram_embedding.shard_5.weight", ("F8_E4M3", [8], bytes(8)), r"must be \[rows, dim\]"),
        ("ngram_embedding.weight_scale", None, "no weight_scale"),
        ("ngram_embedding.weight_scale", ("F32", [2], bytes(8)), "one BF16, F16 or F32 number"),
        ("ngram_embedding.shard_0.weight_scale", ("BF16", [1], b"\x80\x3f"), "2 different weight_scale"),
        ("ngram_embedding.weight_scale", ("BF16", [1], b"\xc0\x7f"), "is nan, expected a finite scale"),
        ("layer_multipliers", None, "lacks the hash buffers layer_multipliers"),
        ("layer_multipliers", ("I32", [3], bytes(12)), "must be I64"),
        ("layer_multipliers", int64s(3, 5, 2**62), "63-bit"),
        ("ngram_heads_vocab_sizes", int64s(11, 12, 13), "equally many heads"),
        ("ngram_heads_vocab_sizes", int64s(11, 0), "head sizes must be >= 1"),
        ("ngram_heads_vocab_sizes", int64s(11, 14), r"rows up to 24, but there are 24 rows"),
        ("ngram_heads_offsets", int64s(0, -1), "head offsets >= 0"),
    ],
)
def test_refuses_tensors_that_do_not_fit(made: Callable[..., Path], name: str, value: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        open_checkpoint(made(changed(name, value)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"eos_token_id": 100}, r"eos_token_id must be 0\.\.99, got 100"),
        ({"ple_layer_ids": [5]}, r"layer 1 holds a table, but ple_layer_ids \(counted from 1\) is \[5\]"),
        ({"split_ngram_parts": 13}, r"12 of 13 shards"),
        ({"ngram_size": 2**60}, r"n-grams up to .* at most 1024 and 64"),
    ],
)
def test_refuses_a_configuration_that_does_not_fit(
    made: Callable[..., Path], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(FormatError, match=says):
        open_checkpoint(made(table(), **changes))


def test_what_the_table_keeps_is_not_lost_with_the_file(made: Callable[..., Path]) -> None:
    other = {
        "model.language_model.layers.2.ple.ple_embedding.layer_multipliers": int64s(1),
        "norm": int64s(2),
    }
    folder = made(table() | buffers() | other)
    lost = uncovered_tensors(folder / "model.safetensors", open_checkpoint(folder))
    assert sorted(lost) == sorted(other)
