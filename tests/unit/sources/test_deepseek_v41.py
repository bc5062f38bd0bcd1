"""The V4.1 reader: the published geometry, where the bytes are, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import BadRequest, FormatError, VocabularyMismatch
from tierstore.format.source import TableSource
from tierstore.format.sources import open_checkpoint, uncovered_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "deepseek_v41.json"
# Two heads for each of two orders from 5 on, never the same prime twice: 5 7 | 11 13, then 17 19 | 23 29.
CONFIG = {
    "engram_layer_ids": [1, 3],
    "engram_num_embeddings": [36, 88],
    "engram_max_ngram_size": 3,
    "engram_vocab_size": 5,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 4,
}
ROWS = {1: 36, 3: 88}


def weights_of(layer: int) -> bytes:
    return bytes((layer * 7 + i) % 120 for i in range(ROWS[layer] * 64))


def scales_of(layer: int) -> bytes:
    return bytes((layer + i) % 16 + 119 for i in range(ROWS[layer] * 2))


def tensors_of(layer: int) -> dict[str, Any]:
    prefix = f"layers.{layer}.engram."
    return {
        f"{prefix}embed.weight": ("F8_E4M3", [ROWS[layer], 64], weights_of(layer)),
        f"{prefix}q_weight": ("BF16", [1, 2], bytes(4)),
        f"{prefix}embed.scale": ("F8_E8M0", [ROWS[layer], 2], scales_of(layer)),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, write_file: Any) -> Path:
    """Layer 1 in one file; layer 3 with its scales in another."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    third = tensors_of(3)
    scale = "layers.3.engram.embed.scale"
    files = {
        "a.safetensors": tensors_of(1),
        "b.safetensors": third,
        "c.safetensors": {scale: third.pop(scale)},
    }
    for name, tensors in files.items():
        write_file(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def field_bytes(source: TableSource, field: int) -> bytes:
    size = source.layout.fields[field].bytes
    return b"".join(e.path.read_bytes()[e.offset : e.offset + e.rows * size] for e in source.fields[field])


def configure(folder: Path, **changes: Any) -> None:
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_tables_of_all_layers(checkpoint: Path) -> None:
    sources = open_checkpoint(checkpoint)
    assert [s.name for s in sources] == ["deepseek-v4.1.layer1", "deepseek-v4.1.layer3"]
    for source, layer in zip(sources, ROWS, strict=True):
        assert (source.layer, source.rows, source.layout.row_bytes) == (layer, ROWS[layer], 66)
        assert [f.dtype for f in source.layout.fields] == ["float8_e4m3fn", "float8_e8m0fnu"]
        assert field_bytes(source, 0) == weights_of(layer)
        assert field_bytes(source, 1) == scales_of(layer)
    assert sources[0].scheme is not None
    assert sources[0].scheme.head_sizes == ((5, 7), (11, 13))
    assert sources[0].scheme.head_offsets == ((0, 5), (12, 23))
    assert sources[0].scheme.vocabulary_digest is None


def test_chosen_layers_and_their_absence(checkpoint: Path) -> None:
    assert [s.layer for s in open_checkpoint(checkpoint, layers=[3])] == [3]
    with pytest.raises(BadRequest, match=r"\[2\].*\[1, 3\]"):
        open_checkpoint(checkpoint, layers=[2])


def test_one_file_and_a_folder_without_index(checkpoint: Path) -> None:
    assert [s.layer for s in open_checkpoint(checkpoint / "a.safetensors")] == [1]
    (checkpoint / "model.safetensors.index.json").unlink()
    assert [s.layer for s in open_checkpoint(checkpoint)] == [1, 3]


def test_configuration_under_text_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"text_config": CONFIG}))
    assert len(open_checkpoint(checkpoint)) == 2


def test_the_published_geometry_gives_the_published_hash(
    tmp_path: Path, write_sparse: Callable[..., Path]
) -> None:
    golden = json.loads(GOLDEN.read_text())
    config = golden["config"]
    for layer, rows in zip(config["engram_layer_ids"], config["engram_num_embeddings"], strict=True):
        prefix = f"layers.{layer}.engram.embed."
        tensors = {
            f"{prefix}weight": ("F8_E4M3", [rows, 256], 1),
            f"{prefix}scale": ("F8_E8M0", [rows, 8], 1),
        }
        write_sparse(tmp_path / f"layer{layer}.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in open_checkpoint(tmp_path):
        scheme = source.scheme
        assert scheme is not None
        assert list(scheme.multipliers) == golden["multipliers"][str(source.layer)]
        assert [list(order) for order in scheme.head_sizes] == golden["head_sizes"][str(source.layer)]
        assert source.rows == scheme.rows
        assert source.layout.row_bytes == 264


def test_the_tokenizer_is_recorded_and_held_to_the_configuration(
    checkpoint: Path, tiny_tokenizer: Path
) -> None:
    scheme = open_checkpoint(checkpoint, tokenizer=tiny_tokenizer)[0].scheme
    assert scheme is not None
    assert scheme.vocabulary_digest is not None
    configure(checkpoint, engram_compressed_vocab_size=9)
    with pytest.raises(VocabularyMismatch, match=r"4 compressed ids.*says 9"):
        open_checkpoint(checkpoint, tokenizer=tiny_tokenizer)
    (checkpoint / "tokenizer.json").write_bytes(tiny_tokenizer.read_bytes())
    with pytest.raises(VocabularyMismatch):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engram_vocab_size": 6}, r"has 36 rows, .* sum to"),
        ({"engram_num_embeddings": [37, 88]}, r"has 36 rows, engram_num_embeddings says 37"),
        ({"engram_n_heads": None}, r"config\.json: 'engram_n_heads' is missing"),
        ({"engram_n_heads": "two"}, r"'engram_n_heads' must be of type int, got 'two'"),
        ({"engram_n_heads": True}, r"must be of type int, got True"),
        ({"engram_n_heads": 10**9}, r"at most 1024"),
        ({"engram_max_ngram_size": 1}, r"max n-gram size >= 2"),
        ({"engram_max_ngram_size": 2**60}, r"n-grams up to .* at most 1024 and 64"),
        ({"engram_seed": -(10**6)}, r"config\.json: seed must be >= 0, got -1000000"),
        ({"engram_pad_token_id": -3}, r"config\.json: pad_id must be a raw token id >= 0, got -3"),
        ({"engram_layer_ids": [1]}, r"layer 3 has a table, but the layer ids are \[1\]"),
        ({"engram_layer_ids": ["1", "3"]}, r"must hold integers"),
        ({"engram_head_dim": 128}, r"64 columns, engram_head_dim is 128"),
    ],
)
def test_refuses_a_configuration_that_does_not_fit(
    checkpoint: Path, changes: dict[str, Any], says: str
) -> None:
    configure(checkpoint, **changes)
    with pytest.raises(FormatError, match=says):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (None, "has no scales"),
        (("F32", [36, 2], bytes(288)), "is F32, expected F8_E8M0"),
        (("F8_E8M0", [35, 2], bytes(70)), r"is \[35, 2\], expected \[36"),
        (("F8_E8M0", [36, 3], bytes(108)), r"is \[36, 3\], expected"),
    ],
)
def test_refuses_scales_that_do_not_fit(checkpoint: Path, write_file: Any, scale: Any, says: str) -> None:
    tensors = tensors_of(1)
    tensors.pop("layers.1.engram.embed.scale")
    if scale:
        tensors["layers.1.engram.embed.scale"] = scale
    write_file(checkpoint / "a.safetensors", tensors)
    with pytest.raises(FormatError, match=says):
        open_checkpoint(checkpoint / "a.safetensors")


def test_refuses_an_index_that_does_not_fit(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    (checkpoint / "c.safetensors").rename(checkpoint / "d.safetensors")
    with pytest.raises(FormatError, match=r"c\.safetensors: missing"):
        open_checkpoint(checkpoint)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(FormatError, match="holds no tensor 'x'"):
        open_checkpoint(checkpoint)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(FormatError, match="outside"):
        open_checkpoint(checkpoint)
    index.write_text("{}")
    with pytest.raises(FormatError, match="weight_map"):
        open_checkpoint(checkpoint)


def test_a_tensor_in_two_files_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "z.safetensors").write_bytes((checkpoint / "a.safetensors").read_bytes())
    with pytest.raises(FormatError, match=r"z\.safetensors: tensor .* is also in a\.safetensors"):
        open_checkpoint(checkpoint)


def test_uncovered_tensors_are_what_removing_a_file_would_lose(checkpoint: Path) -> None:
    sources = open_checkpoint(checkpoint)
    assert uncovered_tensors(checkpoint / "a.safetensors", sources) == ["layers.1.engram.q_weight"]
    assert uncovered_tensors(checkpoint / "c.safetensors", sources) == []
    only_third = [s for s in sources if s.layer == 3]
    assert len(uncovered_tensors(checkpoint / "a.safetensors", only_third)) == 3
