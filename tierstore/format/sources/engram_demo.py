"""The published Engram demo: `multi_head_embedding.embedding.weight`, one state dict a layer or all in one.

config.json beside it holds the fields of the demo's EngramConfig (without its tokenizer):
engram_vocab_size, max_ngram_size, n_embed_per_ngram, n_head_per_ngram, layer_ids, pad_id, seed; and
compressed_vocab_size, which is needed only where no tokenizer.json is given.
"""

from __future__ import annotations

import re
from pathlib import Path

from engram_client.errors import FormatError
from engram_client.spec import Field, HashScheme, RowLayout
from tierstore.format.source import TableSource
from tierstore.format.sources.checkpoint import (
    Checkpoint,
    field_dtype,
    read_int64s,
    stack_extents,
    table_shape,
)
from tierstore.format.sources.options import Options, choose_layers
from tierstore.format.sources.safetensors import Tensor
from tierstore.format.sources.schemes import derive_engram_schemes, load_vocabulary, scheme_of

WANTED = "multi_head_embedding.embedding.weight (with or without a prefix such as layers.{L}.engram.)"
DTYPES = ("BF16", "F16", "F32")
_WEIGHT = re.compile(r"^(?P<prefix>.*\.)?multi_head_embedding\.embedding\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def recognises(checkpoint: Checkpoint) -> bool:
    return any(_WEIGHT.match(name) for name in checkpoint.tensors)


def lives_on(name: str, layer: int) -> bool:
    """Whether the scheme of a packed table of `layer` holds the content of this tensor."""
    named = _LAYER.search(name)
    return name.endswith("multi_head_embedding.offsets") and (named is None or int(named[1]) == layer)


def read(checkpoint: Checkpoint, options: Options) -> list[TableSource]:
    """One table a layer, named `engram-demo.layer{L}`."""
    weights = [t for name, t in checkpoint.tensors.items() if _WEIGHT.match(name)]
    if not weights:
        raise FormatError(f"{checkpoint.path}: no tensor {WANTED}; found {checkpoint.names()}")
    where = checkpoint.folder / "config.json"
    schemes = _schemes(checkpoint, options, where)
    by_layer: dict[int, Tensor] = {}
    for weight in weights:
        layer = _layer_of(checkpoint, weight, schemes, options)
        if layer in by_layer:
            raise FormatError(
                f"{checkpoint.path}: {by_layer[layer].name!r} and {weight.name!r} are both layer {layer}"
            )
        by_layer[layer] = weight
    chosen = choose_layers(list(by_layer), options, checkpoint)
    return [_table(checkpoint, layer, by_layer[layer], scheme_of(schemes, layer, where)) for layer in chosen]


def _schemes(checkpoint: Checkpoint, options: Options, where: Path) -> dict[int, HashScheme]:
    size_key = "compressed_vocab_size"
    compressed = checkpoint.setting(size_key)
    expected = None if compressed is None else checkpoint.require(size_key)
    return derive_engram_schemes(
        where,
        load_vocabulary(options.tokenizer, checkpoint.folder, expected, size_key),
        layer_ids=checkpoint.require_ints("layer_ids"),
        vocab_size_per_ngram=checkpoint.require_ints("engram_vocab_size"),
        n_head_per_ngram=checkpoint.require("n_head_per_ngram"),
        max_ngram_size=checkpoint.require("max_ngram_size"),
        pad_id=checkpoint.require("pad_id"),
        seed=checkpoint.require("seed", default=0),
    )


def _layer_of(
    checkpoint: Checkpoint, weight: Tensor, schemes: dict[int, HashScheme], options: Options
) -> int:
    """The layer in the tensor's name; else the one whose head sizes add up to its rows."""
    if match := _LAYER.search(weight.name):
        return int(match[1])
    rows = table_shape(weight)[0]
    fitting = [layer for layer, scheme in schemes.items() if scheme.rows == rows]
    if options.layers is not None and len(options.layers) == 1:
        fitting = [layer for layer in fitting if layer in options.layers]
    if len(fitting) == 1:
        return fitting[0]
    expected = ", ".join(f"{scheme.rows} for layer {layer}" for layer, scheme in schemes.items())
    raise FormatError(
        f"{weight.path}: which layer {weight.name!r} belongs to is unclear: it has {rows} rows, "
        f"{checkpoint.folder / 'config.json'} gives {expected}; check its numbers, or name the layer"
    )


def _table(checkpoint: Checkpoint, layer: int, weight: Tensor, scheme: HashScheme) -> TableSource:
    rows, dim = table_shape(weight)
    if weight.dtype not in DTYPES:
        raise FormatError(f"{weight.path}: {weight.name!r} is {weight.dtype}, expected {', '.join(DTYPES)}")
    if rows != scheme.rows:
        raise FormatError(
            f"{weight.path}: {weight.name!r} has {rows} rows, the head sizes derived from config.json sum to "
            f"{scheme.rows}; check engram_vocab_size, n_head_per_ngram and layer_ids"
        )
    _check_dim(checkpoint, weight, dim)
    _check_offsets(checkpoint, weight, scheme)
    return TableSource(
        name=f"engram-demo.layer{layer}",
        model="engram-demo",
        layer=layer,
        rows=rows,
        layout=RowLayout((Field("weight", field_dtype(weight), dim),)),
        scheme=scheme,
        fields=(stack_extents([weight]),),
    )


def _check_dim(checkpoint: Checkpoint, weight: Tensor, dim: int) -> None:
    width = checkpoint.setting("n_embed_per_ngram")
    if width is not None and width != dim * checkpoint.require("n_head_per_ngram"):
        raise FormatError(
            f"{weight.path}: {weight.name!r} has {dim} columns; expected n_embed_per_ngram {width} / "
            f"n_head_per_ngram {checkpoint.require('n_head_per_ngram')}"
        )


def _check_offsets(checkpoint: Checkpoint, weight: Tensor, scheme: HashScheme) -> None:
    """The state dict's own offsets, where it has them, must be the derived ones."""
    tensor = checkpoint.tensors.get(weight.name.removesuffix("embedding.weight") + "offsets")
    if tensor is None:
        return
    derived = [offset for offsets in scheme.head_offsets for offset in offsets]
    if (got := read_int64s(tensor)) != derived:
        raise FormatError(
            f"{tensor.path}: {tensor.name!r} starts {got[:4]}, config.json gives {derived[:4]}; "
            "the two are not of one model"
        )
