"""Rows to numbers and V4.1's gate by one kernel each, beside the plain PyTorch form and a copy.

Rows lie scattered, and are named by an index. A figure below `over_plain` of 1 says that the plain form was
faster. On a CPU no kernel serves, so both contenders are plain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.dequantize import by_arithmetic
from engram_client.errors import DataCorrupt
from engram_client.gpu import fused
from engram_client.modules.norms import context_gate
from engram_client.spec import Field, RowLayout
from tierbench.alternate import alternate
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import bytes_per_s, finish
from tierbench.gpu.scale import Scale
from tierbench.record import compare

TIMEOUT_S = 60
LAYOUT = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)))
ROWS_A_TOKEN, STREAMS, EPS = 24, 4, 1e-20
HIDDEN = {True: 5120, False: 64}  # V4.1's on a GPU
WORKS = {"decode": "decoding scattered rows", "gate": "the gate", "module": "all from rows to streams"}
BARS = tuple(
    Bar(f"{what} beats plain operations at prefill", f"prefill.{name}.over_plain.ratio_median", ">=", 1.0)
    for name, what in WORKS.items()
)


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes of rows a second (decode), positions a second (gate, module), for each size of a step."""
    sizes = {f"decode_{batch}": batch for batch in scale.decode_batches} | {"prefill": scale.prefill_tokens}
    pool = _rows(4 * scale.prefill_tokens, scale.seed).to(device)
    return {
        "kernels_serve": fused.decodes(LAYOUT, torch.bfloat16, device),
        **{name: _of_size(tokens, pool, device, scale) for name, tokens in sizes.items()},
    }


def _rows(tokens: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (tokens, ROWS_A_TOKEN, LAYOUT.row_bytes), np.uint8)
    rows[..., :256] &= 0xF7  # no NaN
    rows[..., 256:] = random.integers(118, 128, rows[..., 256:].shape)
    return torch.from_numpy(rows)


def _of_size(tokens: int, pool: Tensor, device: torch.device, scale: Scale) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(scale.seed)
    hidden = HIDDEN[device.type == "cuda"]
    index = torch.randint(len(pool), (tokens,), generator=generator).to(device)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=generator) * std
        return made.to(torch.bfloat16).to(device)

    wkv = normal((STREAMS + 1) * hidden, ROWS_A_TOKEN * 256, std=(ROWS_A_TOKEN * 256) ** -0.5)
    x, weights = normal(tokens, STREAMS, hidden), (normal(STREAMS, hidden), normal(STREAMS, hidden))
    projected = normal(tokens, (STREAMS + 1) * hidden)
    works: dict[str, tuple[int, Callable[[], Tensor], Callable[[], Tensor]]] = {
        "decode": (
            tokens * ROWS_A_TOKEN * LAYOUT.row_bytes,
            partial(_decoded, pool, index),
            lambda: by_arithmetic(LAYOUT, pool[index], torch.bfloat16),
        ),
        "gate": (tokens, partial(_gated, x, projected, weights), partial(_plain_gate, x, projected, weights)),
        "module": (
            tokens,
            lambda: _gated(x, _decoded(pool, index).flatten(1) @ wkv.T, weights),
            lambda: _plain_gate(
                x, by_arithmetic(LAYOUT, pool[index], torch.bfloat16).flatten(1) @ wkv.T, weights
            ),
        ),
    }
    with torch.inference_mode():
        return {name: _beside(name, *work, x, device, scale) for name, work in works.items()}


def _beside(
    name: str, count: int, ours: Callable[[], Tensor], plain: Callable[[], Tensor], x: Tensor,
    device: torch.device, scale: Scale,
) -> dict[str, Any]:  # fmt: skip
    found, wanted = ours(), plain()
    finish(device)
    if not torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2):
        raise DataCorrupt(f"{name}: the kernel on {device} gives other numbers than the plain form")
    out = torch.empty_like(x)
    contenders = {
        "ours": partial(bytes_per_s, device, count, ours, scale.window_s),
        "plain": partial(bytes_per_s, device, count, plain, scale.window_s),
        "copy": partial(bytes_per_s, device, 2 * x.nbytes, lambda: out.copy_(x), scale.window_s),
    }
    samples = alternate(scale.windows, contenders, f"{name} on {device}")
    return {
        "a_call": count,
        "over_plain": compare(samples["ours"], samples["plain"]),
        "copy_bytes_per_s": float(np.median(samples["copy"])),
    }


def _decoded(pool: Tensor, index: Tensor) -> Tensor:
    if fused.decodes(LAYOUT, torch.bfloat16, pool.device):
        return fused.decode(LAYOUT, pool, torch.bfloat16, index)
    return by_arithmetic(LAYOUT, pool[index], torch.bfloat16)


def _gated(x: Tensor, projected: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    if fused.gates(x, projected, *weights):
        return fused.gate(x, projected, *weights, EPS)
    return _plain_gate(x, projected, weights)


def _plain_gate(x: Tensor, projected: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    parts = projected.unflatten(-1, (STREAMS + 1, x.shape[-1]))
    let_in = context_gate(x, parts[:, :-1], *weights, EPS)
    return (x + let_in.unsqueeze(-1) * parts[:, -1:]).to(x.dtype)
