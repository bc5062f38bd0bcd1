"""Any [N, D] tensor, described by a small layout file in TOML or JSON:

    [[table]]
    name = "my-table"               # what it is served as
    weight = "embed.weight"         # a tensor, or a list of tensors one after another
    scale = "embed.scale"           # optional: likewise, block scales of the same rows
    global_scale = 0.5              # optional: multiplies every element
    layer = 3                       # optional
    [table.scheme]                  # optional: a hash scheme, fields as in engram_client.spec.HashScheme

A table without a scheme is addressed by row ids.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest, FormatError, StorageError
from engram_client.hashing.schemes import check_scheme
from engram_client.spec import Field, HashScheme, RowLayout, scheme_from_json
from tierstore.format.source import TableSource
from tierstore.format.sources.checkpoint import Checkpoint, field_dtype, stack_extents, table_shape
from tierstore.format.sources.options import Options
from tierstore.format.sources.safetensors import Tensor

HOW = 'It needs two lines of TOML after [[table]]: name = "my-table" and weight = "NAME OF THE TENSOR".'
FLOAT32_MAX = 3.4028234663852886e38
KEYS = ("name", "weight", "scale", "global_scale", "layer", "scheme")


def read(checkpoint: Checkpoint, options: Options) -> list[TableSource]:
    """The tables the layout file lists. Raises FormatError with the path to what is wrong in it."""
    if options.layout_file is None:
        raise BadRequest(
            f"{checkpoint.path}: a plain table needs a layout file. {HOW} Found {checkpoint.names()}"
        )
    file = options.layout_file
    tables = _load(file).get("table")
    entries = [tables] if isinstance(tables, dict) else tables
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise FormatError(f"{file}: no [[table]] in it. {HOW}")
    sources = [_table(checkpoint, entry, f"{file}: $.table[{i}]") for i, entry in enumerate(entries)]
    wanted = [s for s in sources if options.layers is None or s.layer in options.layers]
    if not wanted:
        raise BadRequest(f"{file}: no table in layers {list(options.layers or ())}")
    return wanted


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text("utf-8")
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: neither TOML nor, with the ending .json, JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: expected an object with 'table', got {type(found).__name__}")
    return found


def _table(checkpoint: Checkpoint, entry: dict[str, Any], where: str) -> TableSource:
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        raise FormatError(f"{where}.{unknown[0]}: unknown key; known: {', '.join(KEYS)}")
    name = _typed(entry, "name", str, where)
    layer = None if "layer" not in entry else _typed(entry, "layer", int, where)
    weights = _tensors(checkpoint, entry, "weight", where)
    fields, extents = [_field("weight", weights)], [stack_extents(weights)]
    if "scale" in entry:
        scales = _tensors(checkpoint, entry, "scale", where)
        fields.append(_field("scale", scales))
        extents.append(stack_extents(scales))
    return TableSource(
        name=name,
        model=None,
        layer=layer,
        rows=sum(table_shape(t)[0] for t in weights),
        layout=RowLayout(tuple(fields), _global_scale(entry, where)),
        scheme=_scheme(entry, where),
        fields=tuple(extents),
    )


def _typed(entry: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise FormatError(f"{where}.{key}: expected a value of type {kind.__name__}, got {value!r}. {HOW}")
    return value


def _tensors(checkpoint: Checkpoint, entry: dict[str, Any], key: str, where: str) -> list[Tensor]:
    value = entry.get(key)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise FormatError(f"{where}.{key}: expected a tensor's name or a list of names, got {value!r}. {HOW}")
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise FormatError(
            f"{where}.{key}: {checkpoint.path} has no tensor {missing[0]!r}; it has {checkpoint.names()}"
        )
    return [checkpoint.tensors[name] for name in names]


def _field(name: str, tensors: list[Tensor]) -> Field:
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or table_shape(tensor)[1] != table_shape(first)[1]:
            raise FormatError(
                f"{tensor.path}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"{first.name!r} before it is {first.dtype} {list(first.shape)}; rows must be alike"
            )
    return Field(name, field_dtype(first), table_shape(first)[1])


def _global_scale(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("global_scale")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise FormatError(f"{where}.global_scale: expected a number, got {value!r}")
    if value is not None and not abs(value) <= FLOAT32_MAX:  # NaN is not either
        raise FormatError(f"{where}.global_scale: expected a finite float32 number, got {value!r}")
    return None if value is None else float(value)


def _scheme(entry: dict[str, Any], where: str) -> HashScheme | None:
    if "scheme" not in entry:
        return None
    try:
        scheme = scheme_from_json(entry["scheme"])
        check_scheme(scheme)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}.scheme: incomplete, or with an unknown key: {error}") from error
    except FormatError as error:
        raise FormatError(f"{where}.scheme: {error}") from error
    return scheme
