"""The demo's reader: names with and without a prefix, and state dicts that do not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import FormatError
from tierstore.format.sources import open_checkpoint, uncovered_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "engram_demo.json"
# Heads of layer 1: 5 7 | 11 13; of layer 4: 17 19 | 23 29.
CONFIG = {
    "engram_vocab_size": [5, 5],
    "max_ngram_size": 3,
    "n_embed_per_ngram": 8,
    "n_head_per_ngram": 2,
    "layer_ids": [1, 4],
    "pad_id": 2,
    "seed": 0,
    "compressed_vocab_size": 4,
}
WEIGHT = "multi_head_embedding.embedding.weight"
OFFSETS = "multi_head_embedding.offsets"


def weight(rows: int = 36, dim: int = 4, dtype: str = "BF16") -> tuple[str, list[int], bytes]:
    size = rows * dim * (4 if dtype == "F32" else 2)
    return dtype, [rows, dim], bytes(i % 50 for i in range(size))


def offsets(*values: int) -> tuple[str, list[int], bytes]:
    return "I64", [len(values)], struct.pack(f"<{len(values)}q", *values)


@pytest.fixture
def made(tmp_path: Path, write_file: Any) -> Callable[..., Path]:
    def make(tensors: dict[str, Any], **changes: Any) -> Path:
        config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return Path(write_file(tmp_path / "state.safetensors", tensors))

    return make


@pytest.mark.parametrize("prefix", ["layers.4.engram.", "model.layers.4.engram."])
def test_the_layer_is_in_the_name(made: Callable[..., Path], prefix: str) -> None:
    tensors = {prefix + OFFSETS: offsets(0, 17, 36, 59), prefix + WEIGHT: weight(88)}
    (source,) = open_checkpoint(made(tensors))
    assert (source.name, source.layer, source.rows) == ("engram-demo.layer4", 4, 88)
    (extent,) = source.fields[0]
    raw = extent.path.read_bytes()[extent.offset : extent.offset + 88 * 8]
    assert raw == weight(88)[2]


@pytest.mark.parametrize("prefix", ["", "engram."])
@pytest.mark.parametrize(("rows", "layer"), [(36, 1), (88, 4)])
def test_without_it_the_rows_tell(made: Callable[..., Path], prefix: str, rows: int, layer: int) -> None:
    (source,) = open_checkpoint(made({prefix + WEIGHT: weight(rows)}))
    assert source.layer == layer


@pytest.mark.parametrize(("dtype", "row_bytes"), [("BF16", 8), ("F16", 8), ("F32", 16)])
def test_dtypes(made: Callable[..., Path], dtype: str, row_bytes: int) -> None:
    (source,) = open_checkpoint(made({WEIGHT: weight(36, 4, dtype)}))
    assert source.layout.row_bytes == row_bytes


def test_the_default_configuration_gives_the_published_hash(
    tmp_path: Path, write_sparse: Callable[..., Path]
) -> None:
    golden = json.loads(GOLDEN.read_text())["configs"][0]
    rows = {layer: sum(map(sum, sizes)) for layer, sizes in golden["head_sizes"].items()}
    tensors = {f"layers.{layer}.engram.{WEIGHT}": ("BF16", [n, 64], 2) for layer, n in rows.items()}
    write_sparse(tmp_path / "state.safetensors", tensors)
    config = golden["config"] | {"compressed_vocab_size": golden["compressed_vocab_size"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sources = open_checkpoint(tmp_path)
    assert [s.layer for s in sources] == [1, 15]
    for source in sources:
        assert source.scheme is not None
        assert list(source.scheme.multipliers) == golden["multipliers"][str(source.layer)]
        assert [list(o) for o in source.scheme.head_sizes] == golden["head_sizes"][str(source.layer)]


@pytest.mark.parametrize(
    ("tensors", "changes", "says"),
    [
        ({WEIGHT: weight(37)}, {}, r"has 37 rows, .*36 for layer 1, 88 for layer 4"),
        ({"layers.1.engram." + WEIGHT: weight(88)}, {}, r"88 rows, the head sizes .* sum to 36"),
        ({"layers.2.engram." + WEIGHT: weight(36)}, {}, r"layer 2 has a table, but the layer ids are"),
        ({"a." + WEIGHT: weight(), "b." + WEIGHT: weight()}, {}, "are both layer 1"),
        ({WEIGHT: weight(36, 5)}, {}, "has 5 columns; expected n_embed_per_ngram 8"),
        ({WEIGHT: ("I8", [36, 4], bytes(144))}, {}, "is I8, expected BF16, F16, F32"),
        ({WEIGHT: weight(), OFFSETS: offsets(0, 5, 12, 24)}, {}, "the two are not of one model"),
        ({WEIGHT: weight()}, {"compressed_vocab_size": None}, "give a tokenizer.json, or put"),
        ({WEIGHT: weight()}, {"engram_vocab_size": [5]}, "one size >= 1 for each order"),
        ({WEIGHT: weight()}, {"layer_ids": None}, "'layer_ids' is missing"),
    ],
)
def test_refuses(made: Callable[..., Path], tensors: Any, changes: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        open_checkpoint(made(tensors, **changes))


def test_the_tokenizer_can_stand_for_the_size(made: Callable[..., Path], tiny_tokenizer: Path) -> None:
    path = made({WEIGHT: weight()}, compressed_vocab_size=None)
    scheme = open_checkpoint(path, tokenizer=tiny_tokenizer)[0].scheme
    assert scheme is not None
    assert scheme.vocab_size == 4


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "state.pt", tmp_path):
        with pytest.raises(FormatError, match=r"convert it first: python -c .* state\.pt state\.safetensors"):
            open_checkpoint(path)


def test_offsets_live_on_in_the_scheme(made: Callable[..., Path]) -> None:
    path = made({OFFSETS: offsets(0, 5, 12, 23), WEIGHT: weight(), "value_proj.weight": weight(1)})
    assert uncovered_tensors(path, open_checkpoint(path)) == ["value_proj.weight"]
