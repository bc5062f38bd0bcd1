"""Qwen's per-layer embedding (PLE): the demo's form with grouped norms and a value all streams share.

    embeddings e [B,T,E] --key_proj--> hc_mult keys of D    --value_proj--> one value of D
    gate_h = gate(GroupedRMSNorm(key)_h, GroupedRMSNorm(x)_h)      as in the demo
    v_h    = gate_h * value
    output = v + SiLU(causal depthwise conv(GroupedRMSNorm(v)))     [B,T,hc_mult,D]

How this reads the published description, since *no published vector has checked this module*:

* a grouped norm normalizes each stream by itself, with one weight over all streams' channels,
  and multiplies by (1 + weight), as the family's norms do: a fresh weight is zero;
* one eps serves all three norms (`rms_norm_eps` of the configuration);
* the convolution's dilation is the n-gram size, its kernel is 4, and the norm stands before it;
* projections have no biases; the residual is the caller's.

Names are the checkpoint's (`model.language_model.layers.{L}.ple.*`, without that prefix), norms and
conv over flat [hc_mult * D] channels; `ple_embedding.*`, the table and its hash buffers, is passed over.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_client.modules.checkpoint import (
    StateDict,
    TableBeside,
    filled,
    tensor_of,
    under_prefix,
)
from engram_client.modules.norms import NormWeight, context_gate, rms_norm
from engram_client.modules.shapes import check_streams, flat_embeddings
from engram_client.modules.short_conv import ConvState, causal_conv


class QwenPLE(TableBeside):
    """The PLE module; not checked by a published vector (see the module's docstring for how it was read).

    `embedding_dim` counts all heads of all orders of one token (16 x 160 = 2560).
    """

    table_names = ("ple_embedding.",)

    def __init__(
        self,
        *,
        hidden_size: int,
        hc_mult: int,
        embedding_dim: int,
        ngram_size: int,
        kernel_size: int = 4,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.hidden_size, self.hc_mult, self.embedding_dim = hidden_size, hc_mult, embedding_dim
        self.eps, self.dilation = eps, ngram_size
        channels = hc_mult * hidden_size
        self.key_proj = nn.Linear(embedding_dim, channels, bias=False)
        self.value_proj = nn.Linear(embedding_dim, hidden_size, bias=False)
        self.norm_key = NormWeight(channels, initial=0.0)
        self.norm_query = NormWeight(channels, initial=0.0)
        self.norm_conv = NormWeight(channels, initial=0.0)
        self.conv1d = nn.Conv1d(
            channels, channels, kernel_size, groups=channels, bias=False, dilation=ngram_size
        )
        nn.init.zeros_(self.conv1d.weight)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: StateDict,
        *,
        ngram_size: int,
        prefix: str = "",
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> QwenPLE:
        """The module of a checkpoint's tensors; sizes other than `ngram_size` are read from the shapes.

        Raises FormatError naming every missing, surplus or misshapen tensor.
        """
        state = under_prefix(state_dict, prefix)
        value, key = tensor_of(state, "value_proj.weight", 2), tensor_of(state, "key_proj.weight", 2)
        make = partial(
            cls,
            hidden_size=value.shape[0],
            hc_mult=max(1, key.shape[0] // value.shape[0]),
            embedding_dim=value.shape[1],
            ngram_size=ngram_size,
            kernel_size=tensor_of(state, "conv1d.weight", 3).shape[2],
            eps=eps,
        )
        return filled(make, state, value, dtype)

    def new_state(self, batch_size: int) -> ConvState:
        """The state before a sequence's first token, on the module's device and in its dtype."""
        weight = self.conv1d.weight
        positions = (weight.shape[2] - 1) * self.dilation
        return ConvState(weight.new_zeros((batch_size, weight.shape[0], positions)))

    def forward(self, hidden_states: Tensor, embeddings: Tensor, *, state: ConvState | None = None) -> Tensor:
        """hidden_states [B,T,hc_mult,D], embeddings [B,T,H,dim] or [B,T,H*dim] -> [B,T,hc_mult,D].

        With a `state` these positions continue the sequences it has seen, and it moves on; without
        one they are whole sequences. The result has the dtype of hidden_states.
        """
        check_streams(hidden_states, self.hc_mult, self.hidden_size)
        flat = flat_embeddings(embeddings, hidden_states, self.embedding_dim).to(self.value_proj.weight.dtype)
        keys = self._streams(self.key_proj(flat))
        query_weight, key_weight = self._scale(self.norm_query), self._scale(self.norm_key)
        gate = context_gate(hidden_states, keys, query_weight, key_weight, self.eps)
        values = gate.unsqueeze(-1) * self.value_proj(flat).unsqueeze(-2)
        normed = rms_norm(values, self._scale(self.norm_conv), self.eps).flatten(-2)
        mixed = causal_conv(normed, self.conv1d.weight, dilation=self.dilation, state=state)
        return (values + F.silu(self._streams(mixed))).to(hidden_states.dtype)

    def _streams(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.hc_mult, self.hidden_size))

    def _scale(self, norm: NormWeight) -> Tensor:
        return 1 + self._streams(norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32)))
