"""RMS normalization and the context gate that all published forms share.

The arithmetic runs in float32 at least (float64 where an input is float64), whatever the dtype of
the model: a gate is the square root of a small dot product, and bfloat16 has too few digits for it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_SMALLEST_DOT = 1e-6


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors, and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def inverse_rms(x: Tensor, eps: float | None) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as one; None means the dtype's own eps."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """x / rms(x) * weight in the compute dtype of both; `weight` broadcasts against x."""
    wide = x.to(compute_dtype(x, weight))
    return wide * inverse_rms(wide, eps) * weight


def context_gate(
    x: Tensor, keys: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float | None
) -> Tensor:
    """How much of the memory each stream lets in: a number in (0, 1) a stream.

    g = RMSNorm(key) . RMSNorm(x) / sqrt(D); gate = sigmoid(sign(g) * sqrt(max(|g|, 1e-6))).
    x and keys [..., streams, D], weights of both norms [streams, D]. Returns [..., streams].
    """
    dtype = compute_dtype(x, keys, query_weight, key_weight)
    x, keys = x.to(dtype), keys.to(dtype)
    weight = query_weight.to(dtype) * key_weight.to(dtype)  # a bfloat16 product would lose digits
    dot = (x * weight * keys).sum(dim=-1)
    norms = (inverse_rms(x, eps) * inverse_rms(keys, eps)).squeeze(-1)
    similarity = dot * norms * x.shape[-1] ** -0.5
    return torch.sigmoid(similarity.abs().clamp_min(_SMALLEST_DOT).sqrt() * similarity.sign())


class NormWeight(nn.Module):
    """The weight of one norm under its checkpoint name; the arithmetic is in the functions above."""

    def __init__(self, size: int, *, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial))


def stacked_weights(norms: nn.ModuleList) -> Tensor:
    """The weights of one norm a stream, [streams, D]."""
    return torch.stack([cast(NormWeight, norm).weight for norm in norms])
