"""A committed step as a checkpoint: OUT/model.safetensors, and config.json and layout.json beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from engram_client.spec import Field
from tierstore.format.decode import column
from tierstore.packing import Progress
from tierstore.packing.run import OnProgress
from tierstore.snapshots.fresh import fresh_folder, no_room
from tierstore.snapshots.names import (
    config_of,
    demo_tables,
    field_name,
    layout_entry,
    offsets_name,
    weight_name,
)
from tierstore.snapshots.rows import StepRows, batches, numbers_of
from tierstore.snapshots.tensors import NewTensor, TensorFile
from tierstore.updates import TrainedSpec

FILE_NAME, CONFIG_NAME, LAYOUT_NAME = "model.safetensors", "config.json", "layout.json"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    tables: dict[str, str]  # names of tables -> names of their weights
    file_bytes: int


@dataclass(frozen=True)
class _Table:
    number: int
    spec: TrainedSpec
    weight: str
    as_demo: bool
    fields: tuple[Field, ...]


def export_step(
    rows: StepRows,
    out: Path | str,
    *,
    tables: Sequence[str] = (),
    with_optimizer: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> Exported:
    """Write the weights of `rows`, and all else in them where `with_optimizer`, into the new folder `out`.

    No `tables`: all. Raises BadRequest where `out` exists, UnknownTable, StorageError, and what reading
    raises; `out` is not there then.
    """
    out = Path(out)
    chosen = _chosen(rows, tables, with_optimizer)
    with fresh_folder(out) as folder:
        file = TensorFile(folder / FILE_NAME, _tensors(chosen), _metadata(rows, chosen, with_optimizer))
        try:
            try:
                file.begin()
                for table in chosen:
                    _write(rows, table, file, on_progress)
                file.finish()
            finally:
                file.close()
            demo = [table.spec for table in chosen if table.as_demo]
            if demo:
                _write_json(folder / CONFIG_NAME, config_of(demo[0]))
            layout = {"table": [layout_entry(t.spec, t.weight) for t in chosen]}
            _write_json(folder / LAYOUT_NAME, layout)
        except OSError as error:
            raise no_room(out, error, file.bytes) from error
    return Exported(out, rows.step, {t.spec.name: t.weight for t in chosen}, file.bytes)


def _chosen(rows: StepRows, names: Sequence[str], with_optimizer: bool) -> list[_Table]:
    numbers = numbers_of(rows, names)
    demo = demo_tables([rows.tables[number] for number in numbers])
    chosen = []
    for number in numbers:
        spec = rows.tables[number]
        fields = spec.layout.fields if with_optimizer else (spec.layout.field("weight"),)
        as_demo = spec.name in demo
        chosen.append(_Table(number, spec, weight_name(spec, as_demo), as_demo, fields))
    return chosen


def _tensors(chosen: Sequence[_Table]) -> list[NewTensor]:
    tensors = []
    for t in chosen:
        for field in t.fields:
            shape = (t.spec.rows, field.count)
            tensors.append(NewTensor(field_name(t.weight, field.name), field.dtype, shape))
        if t.as_demo and t.spec.scheme:
            heads = t.spec.scheme.orders * t.spec.scheme.heads
            tensors.append(NewTensor(offsets_name(t.spec.scheme), "int64", (heads,)))
    names = [tensor.name for tensor in tensors]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadRequest(f"two tables would both have a tensor {twice[0]!r}; export them one by one")
    return tensors


def _metadata(rows: StepRows, chosen: Sequence[_Table], with_optimizer: bool) -> dict[str, str]:
    """Texts, as safetensors has them: which step it is, and how it came about."""
    about: dict[str, Any] = {
        t.spec.name: {"weight": t.weight, "uuid": t.spec.uuid, "optimizer": t.spec.optimizer} for t in chosen
    }
    found = {"format": "pt", "step": str(rows.step), "tables": json.dumps(about)}
    if with_optimizer and rows.state:
        found["state"] = rows.state.decode()
    return found


def _write(rows: StepRows, table: _Table, file: TensorFile, on_progress: OnProgress) -> None:
    spec = table.spec
    if table.as_demo and spec.scheme:
        offsets = np.array(spec.scheme.head_offsets, np.int64)
        file.write(offsets_name(spec.scheme), 0, offsets)
    row_bytes = sum(field.bytes for field in table.fields)
    for ids in batches(spec, 0, spec.rows):
        batch = np.empty((ids.size, spec.row_bytes), np.uint8)
        rows.read(table.number, ids, batch)
        for field in table.fields:
            data = column(batch, spec.layout, field.name)
            file.write(field_name(table.weight, field.name), int(ids[0]) * field.bytes, data)
        done = int(ids[-1]) + 1
        on_progress(Progress(spec.name, done * row_bytes, spec.rows * row_bytes, 0))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("x") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
