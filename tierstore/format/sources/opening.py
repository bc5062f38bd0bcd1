"""Picks the reader for a checkpoint, and says which tensors no table covers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from engram_client.errors import BadRequest, FormatError
from tierstore.format.source import TableSource
from tierstore.format.sources import deepseek_v41, engram_demo, plain, qwen_ple
from tierstore.format.sources.checkpoint import Checkpoint, load_checkpoint
from tierstore.format.sources.options import Options
from tierstore.format.sources.safetensors import read_header

PathLike = str | os.PathLike[str]
_DETECTED: dict[str, ModuleType] = {
    "deepseek-v4.1": deepseek_v41,
    "qwen-ple": qwen_ple,
    "engram-demo": engram_demo,
}
_READERS: dict[str, ModuleType] = {**_DETECTED, "plain": plain}
MODELS = ("auto", *_READERS)


def open_checkpoint(
    path: PathLike,
    *,
    model: str = "auto",
    layout_file: PathLike | None = None,
    tokenizer: PathLike | None = None,
    layers: Sequence[int] | None = None,
) -> list[TableSource]:
    """The tables of a checkpoint, a .safetensors file or a folder; only headers are read.

    `model` is one of MODELS; "auto" goes by tensor names, and a `layout_file` means "plain".
    Raises FormatError where the checkpoint is not what it should be, VocabularyMismatch where the
    tokenizer's compressed vocabulary is not the table's, BadRequest for arguments that do not fit.
    """
    if model not in MODELS:
        raise BadRequest(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    if layout_file is not None and model not in ("auto", "plain"):
        raise BadRequest(f"a layout file describes a plain table; it cannot be used with model {model!r}")
    options = Options(
        Path(layout_file) if layout_file is not None else None,
        Path(tokenizer) if tokenizer is not None else None,
        tuple(layers) if layers is not None else None,
    )
    checkpoint = load_checkpoint(Path(path))
    if layout_file is not None:
        model = "plain"
    reader = _detect(checkpoint) if model == "auto" else _READERS[model]
    tables: list[TableSource] = reader.read(checkpoint, options)
    return tables


def _detect(checkpoint: Checkpoint) -> ModuleType:
    found = {name: r for name, r in _DETECTED.items() if r.recognises(checkpoint)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise FormatError(f"{checkpoint.path}: holds tables of {' and '.join(found)}; say which with --model")
    looked_for = "; ".join(f"{name}: {r.WANTED}" for name, r in _DETECTED.items())
    raise FormatError(
        f"{checkpoint.path}: no table recognised. Looked for {looked_for}. "
        f"Found {checkpoint.names()}. For any other [rows, dim] tensor give a layout file. {plain.HOW}"
    )


def uncovered_tensors(path: PathLike, sources: Iterable[TableSource]) -> list[str]:
    """The names of tensors in one .safetensors file that removing it would lose for good.

    `pack --consume` asks before it removes one. Neither rows of `sources` count as lost, nor the small
    tensors that live on in them: hash buffers in the scheme, a global scale in the layout.
    """
    file, tables = Path(path), list(sources)
    starts = {
        extent.offset
        for table in tables
        for extents in table.fields
        for extent in extents
        if extent.path.resolve() == file.resolve()
    }
    return [
        name
        for name, tensor in read_header(file).items()
        if tensor.offset not in starts and not any(_lives_on(name, table) for table in tables)
    ]


def _lives_on(name: str, table: TableSource) -> bool:
    """Whether the table itself holds this tensor's content."""
    reader = _DETECTED.get(table.model or "")
    return reader is not None and table.layer is not None and reader.lives_on(name, table.layer)
