"""Plain tensors by a layout file, and how a checkpoint is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import BadRequest, FormatError, StorageError
from tierstore.format.sources import open_checkpoint

TENSORS = {
    "part.0": ("I8", [3, 4], bytes(range(12))),
    "part.1": ("I8", [2, 4], bytes(range(12, 20))),
    "scales": ("F32", [5, 1], bytes(20)),
    "bias": ("F32", [4], bytes(16)),
    "other": ("F16", [2, 4], bytes(16)),
}
SCHEME = {
    "kind": "ple",
    "layer_id": 0,
    "multipliers": [3, 5],
    "head_sizes": [[2, 3]],
    "head_offsets": [[0, 2]],
    "vocab_size": 10,
    "eos_token_id": 1,
}


@pytest.fixture
def tensors(tmp_path: Path, write_file: Any) -> Path:
    return Path(write_file(tmp_path / "x.safetensors", TENSORS))


def layout(folder: Path, text: str, name: str = "layout.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_toml_with_stacked_tensors_and_scales(tensors: Path, tmp_path: Path) -> None:
    text = """
        [[table]]
        name = "mine"
        weight = ["part.0", "part.1"]
        scale = "scales"
        global_scale = 2
        layer = 7
    """
    (source,) = open_checkpoint(tensors, layout_file=layout(tmp_path, text))
    assert (source.name, source.layer, source.rows, source.scheme, source.model) == ("mine", 7, 5, None, None)
    assert source.layout.global_scale == 2.0
    assert source.layout.row_bytes == 8
    raw = tensors.read_bytes()
    assert b"".join(raw[e.offset : e.offset + e.rows * 4] for e in source.fields[0]) == bytes(range(20))


def test_json_with_a_scheme(tensors: Path, tmp_path: Path) -> None:
    entry = {"name": "mine", "weight": ["part.0", "part.1"], "scheme": SCHEME}
    file = layout(tmp_path, json.dumps({"table": entry}), "layout.json")
    (source,) = open_checkpoint(tensors, layout_file=file, model="plain")
    assert source.scheme is not None
    assert source.scheme.head_sizes == ((2, 3),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"no \[\[table\]\] in it"),
        ("[[table", "neither TOML nor"),
        ('[[table]]\nweight = "part.0"', r"\$\.table\[0\]\.name: expected a value of type str, got None"),
        ('[[table]]\nname = "a"', r"\$\.table\[0\]\.weight: expected a tensor's name"),
        ('[[table]]\nname = "a"\nweight = "none"', r"has no tensor 'none'; it has bias, other"),
        ('[[table]]\nname = "a"\nweight = "bias"', r"'bias' must be \[rows, dim\]"),
        ('[[table]]\nname = "a"\nweight = ["part.0", "other"]', "rows must be alike"),
        ('[[table]]\nname = "a"\nweight = "part.0"\nscale = "scales"', "hold 5 rows, the table has 3"),
        ('[[table]]\nname = "a"\nweight = "part.0"\nglobal_scale = "x"', "global_scale: expected a number"),
        ('[[table]]\nname = "a"\nweight = "part.0"\nglobal_scale = nan', "global_scale: expected a finite"),
        ('[[table]]\nname = "a"\nweight = "part.0"\nglobal_scale = -inf', "global_scale: expected a finite"),
        ('[[table]]\nname = "a"\nweight = "part.0"\nscales = 1', r"\$\.table\[0\]\.scales: unknown key"),
        ('[[table]]\nname = "a"\nweight = "part.0"\n[table.scheme]\nkind = "ple"', r"scheme: incomplete"),
    ],
)
def test_refuses_a_layout(tensors: Path, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        open_checkpoint(tensors, layout_file=layout(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head_sizes": [[2, 0]]}, "head sizes must be >= 1"),
        ({"kind": "Ple"}, "kind must be engram or ple, got 'Ple'"),
        ({"multipliers": [3.5, 5]}, r"multipliers must hold integers, got 3\.5"),
        ({"head_sizes": [[2.0, 3]]}, r"head_sizes must hold integers, got 2\.0"),
        ({"layer_id": "1"}, "layer_id must hold integers, got '1'"),
        ({"vocab_size": True}, "vocab_size must hold integers, got True"),
        ({"vocabulary_digest": 5}, "vocabulary_digest must be text"),
    ],
)
def test_refuses_a_scheme_that_cannot_be_hashed(
    tensors: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    entry = {"name": "mine", "weight": "part.0", "scheme": SCHEME | change}
    with pytest.raises(FormatError, match=rf"\$\.table\[0\]\.scheme: .*{says}"):
        open_checkpoint(tensors, layout_file=layout(tmp_path, json.dumps({"table": entry}), "layout.json"))


def test_a_plain_table_needs_its_layout_file(tensors: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"needs a layout file.*\[\[table\]\].*Found bias"):
        open_checkpoint(tensors, model="plain")
    with pytest.raises(StorageError, match=r"absent\.toml: cannot be read"):
        open_checkpoint(tensors, layout_file=tmp_path / "absent.toml")
    with pytest.raises(BadRequest, match="cannot be used with model 'qwen-ple'"):
        open_checkpoint(tensors, model="qwen-ple", layout_file=tmp_path / "absent.toml")


def test_nothing_recognised_tells_what_was_looked_for(tensors: Path) -> None:
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tensors)
    for part in (
        "engram.embed.weight",
        "ngram_embedding.shard_",
        "multi_head_embedding",
        "part.0",
        "[[table]]",
    ):
        assert part in str(caught.value)


def test_two_kinds_in_one_checkpoint_must_be_told_apart(tmp_path: Path, write_file: Any) -> None:
    row = ("BF16", [1, 1], bytes(2))
    names = {"multi_head_embedding.embedding.weight": row, "layers.1.engram.embed.weight": row}
    path = write_file(tmp_path / "x.safetensors", names)
    with pytest.raises(FormatError, match=r"deepseek-v4\.1 and engram-demo; say which"):
        open_checkpoint(path)


@pytest.mark.parametrize("model", ["deepseek-v4.1", "qwen-ple", "engram-demo"])
def test_a_model_that_is_not_there(tensors: Path, model: str) -> None:
    with pytest.raises(FormatError, match="found bias, other"):
        open_checkpoint(tensors, model=model)


def test_paths_and_models_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(FormatError, match=r"holds no \*\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(BadRequest, match=r"unknown model 'gpt'; known: auto"):
        open_checkpoint(tmp_path, model="gpt")


def test_a_broken_config_is_named(tensors: Path, tmp_path: Path) -> None:
    for text, says in (("{", "not valid JSON"), ("[1]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError, match=rf"config\.json: {says}"):
            open_checkpoint(tensors)
