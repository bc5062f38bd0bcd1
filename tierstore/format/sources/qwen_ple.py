"""Qwen PLE: one flat table split over `ngram_embedding.shard_{i}.weight`, in BF16 or in FP8 with one scale.

The checkpoint carries its hash as three I64 buffers; where they are present they win over what the
configuration would give. `ple_layer_ids` counts layers from 1, tensor names count them from 0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from engram_client.errors import BadRequest, FormatError
from engram_client.hashing.schemes import check_scheme, ple_scheme
from engram_client.spec import Field, HashScheme, RowLayout
from tierstore.format.source import TableSource
from tierstore.format.sources.checkpoint import (
    Checkpoint,
    field_dtype,
    read_int64s,
    read_scalar,
    stack_extents,
    table_shape,
)
from tierstore.format.sources.options import Options, choose_layers
from tierstore.format.sources.safetensors import Tensor
from tierstore.format.sources.schemes import check_bounds

WANTED = "model.language_model.layers.{L}.ple.ple_embedding.ngram_embedding.shard_{i}.weight"
SEED = 1234  # not in the published configuration; it reproduces the published buffers
BUFFERS = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
_PART = re.compile(
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(?P<layer>\d+)\.ple\.ple_embedding\."
    r"(?P<rest>.+)$"
)
_WEIGHT = re.compile(r"^ngram_embedding\.(?:shard_(\d+)\.)?weight$")
_SCALE = re.compile(r"^ngram_embedding\.(?:shard_\d+\.)?weight_scale$")


@dataclass
class _Parts:
    """What one layer's table consists of."""

    shards: dict[int, Tensor] = field(default_factory=dict)
    scales: list[Tensor] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def recognises(checkpoint: Checkpoint) -> bool:
    return any(parts.shards for parts in _collect(checkpoint).values())


def lives_on(name: str, layer: int) -> bool:
    """Whether a packed table of `layer` holds the content of this tensor: its hash, its scale."""
    match = _PART.match(name)
    if not match or int(match["layer"]) != layer:
        return False
    return bool(_SCALE.match(match["rest"])) or match["rest"].removeprefix("ngram_embedding.") in BUFFERS


def read(checkpoint: Checkpoint, options: Options) -> list[TableSource]:
    """One table a layer, named `qwen-ple.layer{L}`."""
    found = {layer: parts for layer, parts in _collect(checkpoint).items() if parts.shards}
    if not found:
        raise FormatError(f"{checkpoint.path}: no tensor {WANTED}; found {checkpoint.names()}")
    return [
        _table(checkpoint, layer, found[layer]) for layer in choose_layers(list(found), options, checkpoint)
    ]


def _collect(checkpoint: Checkpoint) -> dict[int, _Parts]:
    layers: dict[int, _Parts] = {}
    for name, tensor in checkpoint.tensors.items():
        if not (match := _PART.match(name)):
            continue
        parts, rest = layers.setdefault(int(match["layer"]), _Parts()), match["rest"]
        if weight := _WEIGHT.match(rest):
            parts.shards[int(weight[1] or 0)] = tensor
        elif _SCALE.match(rest):
            parts.scales.append(tensor)
        elif rest.removeprefix("ngram_embedding.") in BUFFERS:
            parts.buffers[rest.removeprefix("ngram_embedding.")] = tensor
    return layers


def _table(checkpoint: Checkpoint, layer: int, parts: _Parts) -> TableSource:
    shards = _shards_in_order(checkpoint, layer, parts.shards)
    rows = sum(table_shape(t)[0] for t in shards)
    dtype, dim = field_dtype(shards[0]), table_shape(shards[0])[1]
    layout = RowLayout((Field("weight", dtype, dim),), _global_scale(checkpoint, layer, dtype, parts.scales))
    return TableSource(
        name=f"qwen-ple.layer{layer}",
        model="qwen-ple",
        layer=layer,
        rows=rows,
        layout=layout,
        scheme=_scheme(checkpoint, layer, parts.buffers),
        fields=(stack_extents(shards),),
    )


def _shards_in_order(checkpoint: Checkpoint, layer: int, shards: dict[int, Tensor]) -> list[Tensor]:
    """All shards from 0 on, of one width and dtype."""
    count = max(checkpoint.setting("split_ngram_parts", 0) if len(shards) > 1 else 0, max(shards) + 1)
    missing = [i for i in range(count) if i not in shards]
    if missing:
        raise FormatError(
            f"{checkpoint.path}: layer {layer} has {len(shards)} of {count} shards, {missing[:8]} "
            "are missing; download the whole checkpoint"
        )
    first = shards[0]
    for tensor in shards.values():
        if tensor.dtype != first.dtype or table_shape(tensor)[1] != table_shape(first)[1]:
            raise FormatError(
                f"{tensor.path}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {first.dtype} [rows, {first.shape[1]}] as {first.name!r}"
            )
    return [shards[i] for i in range(count)]


def _global_scale(checkpoint: Checkpoint, layer: int, dtype: str, scales: list[Tensor]) -> float | None:
    read = [(t, read_scalar(t)) for t in scales]
    for tensor, value in read:
        if not math.isfinite(value):
            raise FormatError(f"{tensor.path}: {tensor.name!r} is {value}, expected a finite scale")
    values = sorted({value for _, value in read})
    if len(values) > 1:
        raise FormatError(
            f"{checkpoint.path}: layer {layer} has {len(values)} different weight_scale values "
            f"({values[0]} to {values[-1]}); a table has one scale"
        )
    if not values and dtype.startswith("float8"):
        raise FormatError(f"{checkpoint.path}: layer {layer} holds {dtype} rows but no weight_scale")
    return values[0] if values else None


def _scheme(checkpoint: Checkpoint, layer: int, buffers: dict[str, Tensor]) -> HashScheme:
    if not buffers:
        return _derived_scheme(checkpoint, layer)
    missing = [name for name in BUFFERS if name not in buffers]
    if missing:
        raise FormatError(f"{checkpoint.path}: layer {layer} lacks the hash buffers {', '.join(missing)}")
    multipliers, sizes, offsets = (read_int64s(buffers[name]) for name in BUFFERS)
    orders = len(multipliers) - 1
    where = buffers[BUFFERS[0]].path
    if orders < 1 or not sizes or len(sizes) % orders or len(sizes) != len(offsets):
        raise FormatError(
            f"{where}: layer {layer}: {len(multipliers)} multipliers, {len(sizes)} head sizes and "
            f"{len(offsets)} offsets do not describe {orders} orders of equally many heads"
        )
    scheme = HashScheme(
        kind="ple",
        layer_id=layer,
        multipliers=tuple(multipliers),
        head_sizes=_by_order(sizes, orders),
        head_offsets=_by_order(offsets, orders),
        vocab_size=checkpoint.require("vocab_size"),
        eos_token_id=_eos(checkpoint),
        parameters={"source": "checkpoint buffers"},
    )
    return _checked(scheme, where)


def _checked(scheme: HashScheme, where: Path) -> HashScheme:
    try:
        check_scheme(scheme)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    return scheme


def _by_order(values: list[int], orders: int) -> tuple[tuple[int, ...], ...]:
    heads = len(values) // orders
    return tuple(tuple(values[o * heads : (o + 1) * heads]) for o in range(orders))


def _eos(checkpoint: Checkpoint) -> int:
    """The end-of-segment id; configurations that list several mean the first."""
    value = checkpoint.setting("eos_token_id")
    if isinstance(value, list) and value and type(value[0]) is int:
        return int(value[0])
    return int(checkpoint.require("eos_token_id"))


def _derived_scheme(checkpoint: Checkpoint, layer: int) -> HashScheme:
    where = checkpoint.folder / "config.json"
    ngram_size, heads = checkpoint.require("ngram_size"), checkpoint.require("heads_per_ngram")
    check_bounds(where, heads, ngram_size)
    try:
        scheme = ple_scheme(
            vocab_size=checkpoint.require("vocab_size"),
            eos_token_id=_eos(checkpoint),
            ngram_size=ngram_size,
            heads_per_ngram=heads,
            ngram_vocab_base=checkpoint.require("ngram_vocab_size_base"),
            seed=checkpoint.require("seed", default=SEED),
            layer_index=_layer_index(checkpoint, layer),
        )
    except (BadRequest, FormatError) as error:
        raise FormatError(f"{where}: {error}") from error
    # The hash counts PLE layers from 0; a table is known by the layer of the model it belongs to.
    return _checked(replace(scheme, layer_id=layer), where)


def _layer_index(checkpoint: Checkpoint, layer: int) -> int:
    """Which of the PLE layers this is, counted from 0."""
    ids = checkpoint.require_ints("ple_layer_ids")
    if layer + 1 not in ids:
        raise FormatError(
            f"{checkpoint.folder / 'config.json'}: layer {layer} holds a table, but ple_layer_ids "
            f"(counted from 1) is {ids}"
        )
    return ids.index(layer + 1)
