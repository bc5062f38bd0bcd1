"""DeepSeek-V4.1: `layers.{L}.engram.embed.weight` in FP8 E4M3 with E8M0 scales, block 32."""

from __future__ import annotations

import re
from pathlib import Path

from engram_client.errors import FormatError
from engram_client.spec import Field, HashScheme, RowLayout
from tierstore.format.source import TableSource
from tierstore.format.sources.checkpoint import Checkpoint, field_dtype, stack_extents, table_shape
from tierstore.format.sources.options import Options, choose_layers
from tierstore.format.sources.safetensors import Tensor
from tierstore.format.sources.schemes import (
    check_bounds,
    derive_engram_schemes,
    load_vocabulary,
    scheme_of,
)

WANTED = "layers.{L}.engram.embed.weight"
SEED = 0  # not in the published configuration; it is what the published tables were hashed with
_WEIGHT = re.compile(r"^(?:model\.)?layers\.(\d+)\.engram\.embed\.weight$")


def recognises(checkpoint: Checkpoint) -> bool:
    return any(_WEIGHT.match(name) for name in checkpoint.tensors)


def lives_on(name: str, layer: int) -> bool:
    """Whether a packed table of `layer` holds the content of this tensor besides its rows: none does."""
    return False


def read(checkpoint: Checkpoint, options: Options) -> list[TableSource]:
    """One table a layer, named `deepseek-v4.1.layer{L}`."""
    weights = {int(m[1]): t for name, t in checkpoint.tensors.items() if (m := _WEIGHT.match(name))}
    if not weights:
        raise FormatError(f"{checkpoint.path}: no tensor {WANTED}; found {checkpoint.names()}")
    chosen = choose_layers(list(weights), options, checkpoint)
    where = checkpoint.folder / "config.json"
    schemes = _schemes(checkpoint, options, where)
    return [_table(checkpoint, layer, weights[layer], scheme_of(schemes, layer, where)) for layer in chosen]


def _schemes(checkpoint: Checkpoint, options: Options, where: Path) -> dict[int, HashScheme]:
    max_ngram_size, heads = checkpoint.require("engram_max_ngram_size"), checkpoint.require("engram_n_heads")
    check_bounds(where, heads, max_ngram_size)
    size_key = "engram_compressed_vocab_size"
    return derive_engram_schemes(
        where,
        load_vocabulary(options.tokenizer, checkpoint.folder, checkpoint.require(size_key), size_key),
        layer_ids=checkpoint.require_ints("engram_layer_ids"),
        vocab_size_per_ngram=[checkpoint.require("engram_vocab_size")] * (max_ngram_size - 1),
        n_head_per_ngram=heads,
        max_ngram_size=max_ngram_size,
        pad_id=checkpoint.require("engram_pad_token_id"),
        seed=checkpoint.require("engram_seed", default=SEED),
    )


def _table(checkpoint: Checkpoint, layer: int, weight: Tensor, scheme: HashScheme) -> TableSource:
    rows, dim = table_shape(weight)
    scale = checkpoint.tensors.get(weight.name.removesuffix("weight") + "scale")
    if scale is None:
        raise FormatError(f"{checkpoint.path}: {weight.name!r} has no scales {WANTED[:-6]}scale beside it")
    _check_tensors(checkpoint, weight, scale)
    _check_rows(checkpoint, layer, weight, scheme)
    fields = (
        Field("weight", field_dtype(weight), dim),
        Field("scale", "float8_e8m0fnu", scale.shape[1]),
    )
    return TableSource(
        name=f"deepseek-v4.1.layer{layer}",
        model="deepseek-v4.1",
        layer=layer,
        rows=rows,
        layout=RowLayout(fields),
        scheme=scheme,
        fields=(stack_extents([weight]), stack_extents([scale])),
    )


def _check_tensors(checkpoint: Checkpoint, weight: Tensor, scale: Tensor) -> None:
    rows, dim = table_shape(weight)
    if weight.dtype != "F8_E4M3":
        raise FormatError(f"{weight.path}: tensor {weight.name!r} is {weight.dtype}, expected F8_E4M3")
    if scale.dtype not in ("F8_E8M0", "U8"):  # the same byte; older writers had no name for it
        raise FormatError(f"{scale.path}: tensor {scale.name!r} is {scale.dtype}, expected F8_E8M0")
    if len(scale.shape) != 2 or scale.shape[0] != rows or scale.shape[1] < 1 or dim % scale.shape[1]:
        raise FormatError(
            f"{scale.path}: tensor {scale.name!r} is {list(scale.shape)}, expected [{rows}, blocks of {dim}]"
        )
    head_dim = checkpoint.setting("engram_head_dim", dim)
    if head_dim != dim:
        raise FormatError(f"{weight.path}: {weight.name!r} has {dim} columns, engram_head_dim is {head_dim}")


def _check_rows(checkpoint: Checkpoint, layer: int, weight: Tensor, scheme: HashScheme) -> None:
    """The primes must add up to the rows that are there, or every row id would be wrong."""
    rows = weight.shape[0]
    if scheme.rows != rows:
        raise FormatError(
            f"{weight.path}: {weight.name!r} has {rows} rows, but the head sizes derived from config.json "
            f"sum to {scheme.rows}; check engram_vocab_size, engram_n_heads and engram_layer_ids"
        )
    if checkpoint.setting("engram_num_embeddings") is None:
        return
    counts = checkpoint.require_ints("engram_num_embeddings")
    expected = dict(zip(checkpoint.require_ints("engram_layer_ids"), counts, strict=False)).get(layer)
    if expected != rows:
        raise FormatError(
            f"{weight.path}: {weight.name!r} has {rows} rows, engram_num_embeddings says {expected}"
        )
