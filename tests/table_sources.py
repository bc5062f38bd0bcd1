"""Small tables to pack: raw files with extents for the format, safetensors with a layout file for `pack`."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_client.spec import Field, RowLayout, TableSpec
from tierstore.format.reads import FileRows
from tierstore.format.rowfile import RowFile
from tierstore.format.source import Extent, TableSource
from tierstore.format.writer import RowFileJob, finish, write_rows


def raw_source(
    folder: Path, rows: int, field_bytes: Sequence[int], splits: Sequence[int] = (), seed: int = 0
) -> tuple[TableSource, bytes]:
    """A source whose fields are cut into files at rows `splits`, and its rows as they must come out."""
    random = np.random.default_rng(seed)
    columns = [random.integers(0, 256, (rows, count), dtype=np.uint8) for count in field_bytes]
    cuts = [0, *sorted({s for s in splits if 0 < s < rows}), rows]
    fields = []
    for f, column in enumerate(columns):
        extents = []
        for first, last in itertools.pairwise(cuts):
            path = folder / f"field{f}-row{first}.bin"
            path.write_bytes(b"\xff" * (f + 3) + column[first:last].tobytes() + b"\xff" * 5)
            extents.append(Extent(path, f + 3, first, last - first))
        fields.append(tuple(extents))
    names = ("weight", "scale", "third")
    layout = RowLayout(tuple(Field(names[f], "uint8", count) for f, count in enumerate(field_bytes)))
    source = TableSource("t", None, None, rows, layout, None, tuple(fields))
    return source, np.concatenate(columns, axis=1).tobytes()


def write_row_file(
    source: TableSource, folder: Path, leaf_pages: int = 4, spec: TableSpec | None = None
) -> RowFile:
    """Pack `source` without a catalog."""
    partial = folder / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    spec = spec or TableSpec(source.name, "0" * 32, uuid.uuid4().hex, source.rows, source.layout, "row")
    job = RowFileJob.plan(source, spec, partial, leaf_pages)
    journal = job.open_journal()
    write_rows(job, FileRows(source), journal, lambda rows: None, lambda rows: None)
    return RowFile.open(finish(job, journal, folder / "done"))


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file, written by hand."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def plain_checkpoint(
    folder: Path, shard_rows: Sequence[int], dim: int = 40, names: Sequence[str] = ("t",), seed: int = 0
) -> tuple[Path, dict[str, bytes]]:
    """Tables `names`, each in one file per entry of `shard_rows`; the layout file and each table's rows.

    Weights are BF16 [rows, dim], scales U8-sized [rows, 4], in the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows: dict[str, bytes] = {}
    text = ""
    for name in names:
        parts = []
        for i, count in enumerate(shard_rows):
            weight = random.integers(0, 2**16, (count, dim), dtype=np.uint16)
            scale = random.integers(0, 256, (count, 4), dtype=np.uint8)
            tensors = {f"{name}.{i}.weight": ("BF16", weight), f"{name}.{i}.scale": ("F8_E8M0", scale)}
            write_safetensors(folder / f"{name}-{i}.safetensors", tensors)
            parts.append(np.concatenate([weight.view(np.uint8), scale], axis=1))
        rows[name] = np.concatenate(parts).tobytes()
        weights, scales = (
            [f"{name}.{i}.{kind}" for i in range(len(shard_rows))] for kind in ("weight", "scale")
        )
        text += f"[[table]]\nname = {name!r}\nweight = {weights!r}\nscale = {scales!r}\n"
    layout = folder / "layout.toml"
    layout.write_text(text)
    return layout, rows
