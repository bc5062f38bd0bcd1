"""`tierbench make-checkpoint`: what it writes opens as a real checkpoint, and is what its generator says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench import checkpoint as making
from tierbench.cli import main
from tierbench.content import content_bytes

from engram_client.errors import BadRequest, StorageError
from tierstore.format.sources import open_checkpoint, uncovered_tensors

ROOT = Path(__file__).parents[2]
SEED = 11


@pytest.fixture(autouse=True)
def _no_installed_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding a whole vocabulary takes seconds; only the tests that are about it do so."""
    monkeypatch.setattr(making, "installed_tokenizer", lambda: None)


def make(out: Path, model: str, rows: int = 300, **options: Any) -> making.Made:
    return making.make_checkpoint(model, rows, out, seed=SEED, **options)


def tensors_on_disk(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor, parsed here by hand."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], raw[start + begin : start + end])
    return found


@pytest.mark.parametrize("model", ["deepseek-v4.1", "qwen-ple", "engram-demo"])
def test_a_made_checkpoint_opens_and_holds_what_the_generator_says(tmp_path: Path, model: str) -> None:
    made = make(tmp_path / "c", model)
    sources = open_checkpoint(tmp_path / "c")
    on_disk = tensors_on_disk(tmp_path / "c")
    assert {s.model for s in sources} == {model}
    assert made.bytes == sum(len(raw) for _, _, raw in on_disk.values())
    assert set(made.plan.tensors) == set(on_disk)
    random = np.random.default_rng(1)
    for name, (_, shape, raw) in on_disk.items():
        row_bytes = len(raw) // shape[0] if shape else len(raw)
        for row in random.integers(0, max(1, shape[0] if shape else 1), 4):
            first = int(row) * row_bytes
            expected = content_bytes(made.plan.tensors[name].content, SEED, name, first, row_bytes)
            assert raw[first : first + row_bytes] == expected.tobytes(), (name, row)


def test_published_names_dtypes_and_shapes_of_v41(tmp_path: Path) -> None:
    made = make(tmp_path / "c", "deepseek-v4.1", hidden_size=64)
    on_disk = tensors_on_disk(tmp_path / "c")
    rows = made.plan.config["engram_num_embeddings"]
    for layer, count in zip((1, 14), rows, strict=True):
        prefix = f"layers.{layer}.engram."
        shapes = {n.removeprefix(prefix): (d, s) for n, (d, s, _) in on_disk.items() if n.startswith(prefix)}
        assert shapes == {
            "embed.weight": ("F8_E4M3", [count, 256]),
            "embed.scale": ("F8_E8M0", [count, 8]),
            "wkv.weight": ("F8_E4M3", [5 * 64, 6144]),
            "wkv.scale": ("F8_E8M0", [10, 192]),
            "q_weight": ("BF16", [4, 64]),
            "k_weight": ("BF16", [4, 64]),
        }
    assert made.plan.config["engram_compressed_vocab_size"] == 99092
    assert made.tokenizer is None
    lost = uncovered_tensors(
        tmp_path / "c" / "model-00001-of-00002.safetensors", open_checkpoint(tmp_path / "c")
    )
    assert sorted(n.removeprefix("layers.1.engram.") for n in lost) == [
        "k_weight",
        "q_weight",
        "wkv.scale",
        "wkv.weight",
    ]


def test_ple_is_split_and_padded_as_published(tmp_path: Path) -> None:
    make(tmp_path / "c", "qwen-ple")
    (source,) = open_checkpoint(tmp_path / "c")
    assert source.scheme is not None
    assert source.rows % 128 == 0
    assert 0 <= source.rows - source.scheme.rows < 128
    assert len(source.fields[0]) == 128
    assert len(source.files) == 10
    assert source.layout.global_scale == 2.0**-8


def test_the_published_library_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    make(tmp_path / "c", "engram-demo", layers=(1,))
    (file,) = (tmp_path / "c").glob("*.safetensors")
    with safe_open(file, framework="np") as opened:
        offsets = opened.get_tensor("layers.1.engram.multi_head_embedding.offsets")
        assert offsets[0] == 0
        assert len(opened.keys()) == 5 + 4 * 5


def test_a_tokenizer_is_copied_and_its_vocabulary_hashed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"[UNK]": 0, "apple": 1, "Apple": 2, "pear": 3}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    made = make(tmp_path / "c", "deepseek-v4.1", tokenizer=tmp_path / "t.json")
    assert made.tokenizer == tmp_path / "c" / "tokenizer.json"
    assert made.plan.config["engram_compressed_vocab_size"] == 3
    scheme = open_checkpoint(tmp_path / "c")[0].scheme
    assert scheme is not None
    assert scheme.vocab_size == 3
    assert scheme.vocabulary_digest is not None


def test_the_same_call_again_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "c", "qwen-ple")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()}
    assert make(tmp_path / "c", "qwen-ple").reused
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()} == before


def test_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    make(tmp_path / "c", "qwen-ple")
    whole = tensors_on_disk(tmp_path / "c")
    (tmp_path / "c" / "model-00003-of-00010.safetensors").unlink()
    assert not make(tmp_path / "c", "qwen-ple").reused
    assert tensors_on_disk(tmp_path / "c") == whole


def test_another_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "c", "qwen-ple")
    with pytest.raises(BadRequest, match="other parameters"):
        make(tmp_path / "c", "qwen-ple", 301)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(BadRequest, match="was not made by tierbench"):
        make(tmp_path / "mine", "qwen-ple")
    (tmp_path / "mine" / making.NOTE_NAME).write_text("not ours")
    for occupied in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        with pytest.raises(BadRequest, match="was not made by tierbench"):
            make(occupied, "qwen-ple")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"precious"


def test_a_disk_too_small_is_told_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"takes .* GB, .* GB are free there"):
        make(tmp_path / "c", "deepseek-v4.1", 10**12)
    assert not list((tmp_path / "c").glob("*"))


LIMITED = """
import resource, sys
from tierbench import checkpoint, cli
checkpoint.installed_tokenizer = lambda: None
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_refused_write_is_one_line_and_a_second_run_finishes(tmp_path: Path) -> None:
    arguments = ["--model", "deepseek-v4.1", "--rows-per-head", "300", "--out", str(tmp_path / "c")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "make-checkpoint", *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("tierbench: ")
    assert "writing the checkpoint failed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "c").glob("*.partial"))
    assert main(["make-checkpoint", *arguments]) == 0
    assert len(open_checkpoint(tmp_path / "c")) == 2


def test_the_command_tells_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "engram-demo", "--rows-per-head", "50", "--out", str(tmp_path / "c")]
    assert main(["make-checkpoint", *arguments, "--layers", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sum(len(raw) for _, _, raw in tensors_on_disk(tmp_path / "c").values())
    assert (told["reused"], told["tokenizer"]) == (False, None)
    assert main(["make-checkpoint", *arguments, "--layers", "3"]) == 0
    out = capsys.readouterr().out
    assert "was there already" in out
    assert "no tokenizer.json was found" in out
