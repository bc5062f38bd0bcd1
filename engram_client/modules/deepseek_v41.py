"""The Engram of DeepSeek-V4.1: one projection, a gate a stream, no convolution, residual inside.

    embeddings [..., E] --wkv--> hc_mult keys and one value, D numbers each, in that order
    dot_h  = sum(x_h * q_weight_h * k_weight_h * key_h) / (rms(x_h) * rms(key_h) * sqrt(D))
    gate_h = sigmoid(sign(dot_h) * sqrt(max(|dot_h|, 1e-6))), and 0 at a dead position
    x_h   += gate_h * value

The gate runs in float32 at least. Every position is by itself, so streaming needs no state.
Names are the checkpoint's (`layers.{L}.engram.*`, without that prefix); the FP8 `wkv.weight` with
its `wkv.scale` is made whole when it is loaded, and `embed.*`, the table, is passed over.

Checked against tests/golden/deepseek_v41_gate.npz.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engram_client.errors import BadRequest
from engram_client.gpu import fused
from engram_client.modules.checkpoint import (
    StateDict,
    TableBeside,
    filled,
    tensor_of,
    under_prefix,
    unscale,
)
from engram_client.modules.norms import context_gate
from engram_client.modules.shapes import check_streams, flat_embeddings

PUBLISHED_EPS = 1e-20  # the checkpoint's rms_norm_eps


class DeepseekV41Engram(TableBeside):
    """V4.1's module; `embedding_dim` counts all heads of all orders of one token (24 x 256 = 6144)."""

    table_names = ("embed.",)

    def __init__(
        self, *, hidden_size: int, hc_mult: int, embedding_dim: int, eps: float = PUBLISHED_EPS
    ) -> None:
        super().__init__()
        self.hidden_size, self.hc_mult, self.embedding_dim = hidden_size, hc_mult, embedding_dim
        self.eps = eps
        self.wkv = nn.Linear(embedding_dim, (hc_mult + 1) * hidden_size, bias=False)
        self.q_weight = nn.Parameter(torch.ones(hc_mult, hidden_size))
        self.k_weight = nn.Parameter(torch.ones(hc_mult, hidden_size))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: StateDict,
        *,
        prefix: str = "",
        eps: float = PUBLISHED_EPS,
        dtype: torch.dtype | None = None,
    ) -> DeepseekV41Engram:
        """The module of a checkpoint's tensors, for instance with prefix "layers.1.engram.".

        Sizes are read from the shapes; `dtype` defaults to that of wkv, bfloat16 where it is FP8.
        Raises FormatError naming every missing, surplus or misshapen tensor.
        """
        state = under_prefix(state_dict, prefix)
        wkv, q_weight = tensor_of(state, "wkv.weight", 2), tensor_of(state, "q_weight", 2)
        hc_mult, hidden_size = q_weight.shape
        sizes = {"hidden_size": hidden_size, "hc_mult": hc_mult, "embedding_dim": wkv.shape[1]}
        return filled(partial(cls, **sizes, eps=eps), state, wkv, dtype)

    def prepare_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Fold `wkv.scale` into `wkv.weight`; block sizes follow from both shapes."""
        scale = state_dict.pop(f"{prefix}wkv.scale", None)
        if scale is not None:
            weight = tensor_of(state_dict, f"{prefix}wkv.weight", 2)
            state_dict[f"{prefix}wkv.weight"] = unscale(weight, scale)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, *, dead: Tensor | None = None) -> Tensor:
        """hidden_states [..., hc_mult, D], embeddings [..., H, dim] or [..., H*dim] -> [..., hc_mult, D].

        `...` is [T] or [B,T]; `dead` is bool [...], True where a position holds no token of the
        text (an image patch): its streams pass unchanged. Returns the streams with the memory added.
        """
        check_streams(hidden_states, self.hc_mult, self.hidden_size)
        flat = flat_embeddings(embeddings, hidden_states, self.embedding_dim)
        mixed = self.wkv(flat.to(self.wkv.weight.dtype))
        if dead is not None:
            dead = _checked_dead(dead, hidden_states)
        if fused.gates(hidden_states, mixed, self.q_weight, self.k_weight):
            return fused.gate(hidden_states, mixed, self.q_weight, self.k_weight, self.eps, dead)
        projected = mixed.unflatten(-1, (self.hc_mult + 1, self.hidden_size))
        keys, value = projected[..., :-1, :], projected[..., -1:, :]
        gate = context_gate(hidden_states, keys, self.q_weight, self.k_weight, self.eps)
        if dead is not None:
            gate = gate.masked_fill(dead.unsqueeze(-1), 0.0)
        return (hidden_states + gate.unsqueeze(-1) * value).to(hidden_states.dtype)


def _checked_dead(dead: Tensor, hidden_states: Tensor) -> Tensor:
    positions = hidden_states.shape[:-2]
    if dead.dtype != torch.bool or dead.shape != positions:
        raise BadRequest(f"dead must be bool {list(positions)}, got {dead.dtype} {list(dead.shape)}")
    return dead.to(hidden_states.device)
