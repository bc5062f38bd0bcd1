"""What a table is called in a checkpoint, and the files beside it from which it can be packed again.

A table of the Engram demo's rule has the demo's names, and config.json the demo's numbers: `tierstore pack`
knows it by these. Every table, of whatever scheme or none, is in layout.json as well: `--model plain --layout
OUT/layout.json` packs them all, under their own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from engram_client.errors import BadRequest, FormatError
from engram_client.hashing.schemes import engram_schemes
from engram_client.spec import HashScheme
from tierstore.updates import TrainedSpec

WEIGHT = "multi_head_embedding.embedding.weight"
OFFSETS = "multi_head_embedding.offsets"


def is_demo(spec: TrainedSpec) -> bool:
    """Whether the table's scheme follows from the numbers that config.json holds, so all is said by them."""
    scheme = spec.scheme
    if scheme is None or scheme.kind != "engram" or scheme.rows != spec.rows:
        return False
    try:
        derived = engram_schemes(
            compressed_vocab_size=scheme.vocab_size, vocabulary_digest=scheme.vocabulary_digest,
            **scheme.parameters,
        )  # fmt: skip
    except (TypeError, BadRequest, FormatError):
        return False
    return scheme in derived


def demo_tables(specs: Sequence[TrainedSpec]) -> set[str]:
    """Names of the tables that get the demo's names: those of one model, each layer once."""
    model: tuple[object, ...] | None = None  # what config.json holds, the same for all
    layers: set[int] = set()
    names = set()
    for spec in specs:
        scheme = spec.scheme
        if scheme is None or not is_demo(spec) or scheme.layer_id in layers:
            continue
        numbers = (scheme.parameters, scheme.vocab_size, spec.layout.embedding_dim)
        model = model or numbers
        if numbers == model:
            layers.add(scheme.layer_id)
            names.add(spec.name)
    return names


def weight_name(spec: TrainedSpec, as_demo: bool) -> str:
    """The other fields are called like it, with another end."""
    if as_demo and spec.scheme:
        return f"layers.{spec.scheme.layer_id}.engram.{WEIGHT}"
    return f"{spec.name}.weight"


def offsets_name(scheme: HashScheme) -> str:
    return f"layers.{scheme.layer_id}.engram.{OFFSETS}"


def field_name(weight: str, field: str) -> str:
    """Such as ...embedding.adam_m."""
    return weight.removesuffix("weight") + field


def config_of(spec: TrainedSpec) -> dict[str, Any]:
    """config.json of a model whose tables have the demo's names; `spec` is one of them."""
    scheme = spec.scheme
    assert scheme is not None
    p = scheme.parameters
    return {
        "engram_vocab_size": p["vocab_size_per_ngram"],
        "max_ngram_size": p["max_ngram_size"],
        "n_embed_per_ngram": spec.layout.embedding_dim * p["n_head_per_ngram"],
        "n_head_per_ngram": p["n_head_per_ngram"],
        "layer_ids": p["layer_ids"],
        "pad_id": p["pad_id"],
        "seed": p["seed"],
        "compressed_vocab_size": scheme.vocab_size,
    }


def layout_entry(spec: TrainedSpec, weight: str) -> dict[str, Any]:
    """A [[table]] of the layout file."""
    entry: dict[str, Any] = {"name": spec.name, "weight": weight}
    if spec.layer is not None:
        entry["layer"] = spec.layer
    if spec.scheme is not None:
        entry["scheme"] = dataclasses.asdict(spec.scheme)
    return entry
