"""What a scaled checkpoint of each model consists of: files, tensors, configuration.

Names, dtypes, shapes and configuration keys are the published ones; only the sizes shrink: the prime
search for head sizes starts at `rows_per_head` instead of 16 or 20 million, and the projections have
`hidden_size` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from engram_client.hashing.schemes import engram_schemes, ple_scheme
from engram_client.spec import HashScheme
from tierbench.content import Content, Literal, Random
from tierstore.format.sources.safetensors import DTYPE_BYTES

ROWS_PER_HEAD_MAX = 1 << 40
# Rows a head that the search for head sizes starts at, and bytes of a row, as published.
PUBLISHED_ROWS = {"deepseek-v4.1": 16_000_000, "qwen-ple": 20_000_000, "engram-demo": 646_400}
ROW_BYTES = {"deepseek-v4.1": 264, "qwen-ple": 160, "engram-demo": 128}
STREAMS = 4  # hc_mult of all three models
EMBED_SCALE = Random("e8m0", low=119)  # 127, which is 2^0, give or take eight
PROJECTION_SCALE = Random("e8m0", low=94)  # keeps the projected values near one
WEIGHTS = Random("bf16", low=120)
SMALL_WEIGHTS = Random("bf16", low=112)


@dataclass(frozen=True)
class PlannedTensor:
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    content: Content

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """Files by name, each with its tensors in the order they lie in it, and config.json."""

    files: dict[str, list[PlannedTensor]]
    config: dict[str, Any]

    @property
    def tensors(self) -> dict[str, PlannedTensor]:
        return {t.name: t for tensors in self.files.values() for t in tensors}


@dataclass(frozen=True)
class Size:
    """What the user scales. `compressed_vocab_size` matters to the hash alone."""

    rows_per_head: int
    layers: tuple[int, ...] | None = None
    hidden_size: int = 512
    compressed_vocab_size: int = 99092

    def __post_init__(self) -> None:
        if not 2 <= self.rows_per_head <= ROWS_PER_HEAD_MAX or self.hidden_size < 32 or self.hidden_size % 32:
            raise BadRequest(
                f"need 2 to {ROWS_PER_HEAD_MAX} rows per head and a hidden size of 32, 64, 96, ...; got "
                f"{self.rows_per_head} and {self.hidden_size}"
            )


def plan_checkpoint(model: str, size: Size) -> Plan:
    """The plan for `model`, one of MODELS. Raises BadRequest for another."""
    if model not in _PLANS:
        raise BadRequest(f"unknown model {model!r}; known: {', '.join(_PLANS)}")
    return _PLANS[model](size)


def _numbered(files: list[list[PlannedTensor]]) -> dict[str, list[PlannedTensor]]:
    count = len(files)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": tensors for i, tensors in enumerate(files)}


def table_schemes(model: str, size: Size) -> tuple[HashScheme, ...]:
    """How each of the model's tables is hashed. Raises BadRequest for an unknown model."""
    if model not in _SCHEMES:
        raise BadRequest(f"unknown model {model!r}; known: {', '.join(_SCHEMES)}")
    return _SCHEMES[model](size)


def _engram(size: Size, layers: tuple[int, ...], max_ngram_size: int) -> tuple[HashScheme, ...]:
    return engram_schemes(
        compressed_vocab_size=size.compressed_vocab_size,
        layer_ids=list(size.layers or layers),
        vocab_size_per_ngram=[size.rows_per_head] * (max_ngram_size - 1),
        n_head_per_ngram=8,
        max_ngram_size=max_ngram_size,
        pad_id=2,
        seed=0,
    )


def _ple(size: Size) -> tuple[HashScheme, ...]:
    return (
        ple_scheme(
            vocab_size=248320,
            eos_token_id=248044,
            ngram_size=3,
            heads_per_ngram=8,
            ngram_vocab_base=size.rows_per_head,
            seed=1234,
            layer_index=0,
        ),
    )


_SCHEMES: dict[str, Callable[[Size], tuple[HashScheme, ...]]] = {
    "deepseek-v4.1": lambda size: _engram(size, (1, 14), 4),
    "qwen-ple": _ple,
    "engram-demo": lambda size: _engram(size, (1, 15), 3),
}


def _deepseek_v41(size: Size) -> Plan:
    schemes = table_schemes("deepseek-v4.1", size)
    layers = [s.layer_id for s in schemes]
    config = {
        "vocab_size": 129280,
        "hidden_size": size.hidden_size,
        "hc_mult": STREAMS,
        "rms_norm_eps": 1e-20,
        "engram_layer_ids": layers,
        "engram_num_embeddings": [s.rows for s in schemes],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": size.rows_per_head,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": size.compressed_vocab_size,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [32, 32],
        },
    }
    return Plan(_numbered([_v41_layer(s, size.hidden_size) for s in schemes]), config)


def _v41_layer(scheme: HashScheme, hidden: int) -> list[PlannedTensor]:
    """One file: as in the published one, a table's scales lie far behind its weights."""
    prefix = f"layers.{scheme.layer_id}.engram."
    rows, width, out = scheme.rows, scheme.orders * scheme.heads * 256, (STREAMS + 1) * hidden
    return [
        PlannedTensor(f"{prefix}embed.weight", "F8_E4M3", (rows, 256), Random("e4m3")),
        PlannedTensor(f"{prefix}wkv.weight", "F8_E4M3", (out, width), Random("e4m3")),
        PlannedTensor(f"{prefix}q_weight", "BF16", (STREAMS, hidden), WEIGHTS),
        PlannedTensor(f"{prefix}k_weight", "BF16", (STREAMS, hidden), WEIGHTS),
        PlannedTensor(f"{prefix}wkv.scale", "F8_E8M0", (out // 32, width // 32), PROJECTION_SCALE),
        PlannedTensor(f"{prefix}embed.scale", "F8_E8M0", (rows, 8), EMBED_SCALE),
    ]


def _qwen_ple(size: Size) -> Plan:
    layers = list(size.layers or (1,))
    shards, file_count, dim = 128, 10, 160
    if len(layers) != 1:
        raise BadRequest(f"qwen-ple has one layer with a table; got layers {layers}")
    (scheme,) = table_schemes("qwen-ple", size)
    shard_rows = -(-scheme.rows // shards)
    prefix = f"model.language_model.layers.{layers[0]}.ple.ple_embedding."
    tables = [
        PlannedTensor(
            f"{prefix}ngram_embedding.shard_{i}.weight", "F8_E4M3", (shard_rows, dim), Random("e4m3")
        )
        for i in range(shards)
    ]
    per_file = -(-shards // file_count)
    files = [tables[i : i + per_file] for i in range(0, shards, per_file)]
    files[0] = [*_ple_buffers(prefix, scheme), *files[0]]
    text = {
        "vocab_size": 248320,
        "eos_token_id": 248044,
        "hidden_size": size.hidden_size,
        "hc_count": STREAMS,
        "ple_layer_ids": [layers[0] + 1],  # counted from 1
        "ple_embed_dim": dim * scheme.orders * scheme.heads,
        "ple_conv_kernel_size": 4,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": size.rows_per_head,
        "make_ngram_vocab_size_divisible_by": shards,
        "split_ngram_parts": shards,
    }
    return Plan(_numbered(files), {"model_type": "qwen4_exp", "text_config": text})


def _ple_buffers(prefix: str, scheme: HashScheme) -> list[PlannedTensor]:
    """The checkpoint's own hash, and the one scale of all rows: BF16 2^-8."""
    sizes = [n for order in scheme.head_sizes for n in order]
    offsets = [n for order in scheme.head_offsets for n in order]
    return [
        _int64s(f"{prefix}layer_multipliers", list(scheme.multipliers)),
        _int64s(f"{prefix}ngram_heads_vocab_sizes", sizes),
        _int64s(f"{prefix}ngram_heads_offsets", offsets),
        PlannedTensor(f"{prefix}ngram_embedding.weight_scale", "BF16", (1,), Literal(b"\x80\x3b")),
    ]


def _int64s(name: str, values: list[int]) -> PlannedTensor:
    return PlannedTensor(name, "I64", (len(values),), Literal(np.array(values, "<i8").tobytes()))


def _engram_demo(size: Size) -> Plan:
    schemes = table_schemes("engram-demo", size)
    layers = [s.layer_id for s in schemes]
    config = {
        "engram_vocab_size": [size.rows_per_head] * 2,
        "max_ngram_size": 3,
        "n_embed_per_ngram": 512,
        "n_head_per_ngram": 8,
        "layer_ids": layers,
        "pad_id": 2,
        "seed": 0,
        "kernel_size": 4,
        "compressed_vocab_size": size.compressed_vocab_size,
        "hidden_size": size.hidden_size,
        "hc_mult": STREAMS,
    }
    return Plan(_numbered([_demo_layer(s, size.hidden_size) for s in schemes]), config)


def _demo_layer(scheme: HashScheme, hidden: int) -> list[PlannedTensor]:
    prefix, dim = f"layers.{scheme.layer_id}.engram.", 64
    width = dim * scheme.orders * scheme.heads
    offsets = [n for order in scheme.head_offsets for n in order]

    def weight(name: str, *shape: int, content: Content = WEIGHTS) -> PlannedTensor:
        return PlannedTensor(f"{prefix}{name}", "BF16", shape, content)

    def linear(name: str) -> list[PlannedTensor]:
        return [
            weight(f"{name}.weight", hidden, width, content=SMALL_WEIGHTS),
            weight(f"{name}.bias", hidden, content=SMALL_WEIGHTS),
        ]

    tensors = [
        _int64s(f"{prefix}multi_head_embedding.offsets", offsets),
        weight("multi_head_embedding.embedding.weight", scheme.rows, dim),
        *linear("value_proj"),
        weight("short_conv.conv.weight", STREAMS * hidden, 1, 4, content=SMALL_WEIGHTS),
    ]
    for i in range(STREAMS):
        tensors += linear(f"key_projs.{i}")
        tensors += [weight(f"{name}.{i}.weight", hidden) for name in ("norm1", "norm2", "short_conv.norms")]
    return tensors


_PLANS = {"deepseek-v4.1": _deepseek_v41, "qwen-ple": _qwen_ple, "engram-demo": _engram_demo}
MODELS = tuple(_PLANS)
