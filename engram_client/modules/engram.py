"""Engram as its paper and the published demo have it: gate, shared value, short convolution.

    rows' embeddings e [B,T,E] --key_projs[h]--> key_h   gate_h = gate(key_h, x_h)   one a stream h
                               --value_proj----> value   v_h = gate_h * value
    output = v + SiLU(causal depthwise conv(RMSNorm(v)))      [B,T,hc_mult,D]

The output is what the layer adds to its streams; the residual is the caller's. Names follow the
published state dict, `multi_head_embedding` apart: that is the table, and where rows come from a
service it is not here at all (`resident=True` keeps it, to run a small model without one).

Checked against the published module's own output (tests/golden/engram_demo_module.npz).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_client.errors import FormatError
from engram_client.modules.checkpoint import (
    StateDict,
    TableBeside,
    filled,
    tensor_of,
    under_prefix,
)
from engram_client.modules.norms import NormWeight, context_gate, rms_norm, stacked_weights
from engram_client.modules.resident import MultiHeadEmbedding
from engram_client.modules.shapes import check_streams, flat_embeddings
from engram_client.modules.short_conv import ConvState, causal_conv

CONV_NORM_EPS = 1e-5


class ShortConv(nn.Module):
    """SiLU(conv(RMSNorm(v))), a norm for each stream; the conv starts at zero, the paper's recipe."""

    def __init__(self, hidden_size: int, hc_mult: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        channels = hidden_size * hc_mult
        self.dilation = dilation
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False, dilation=dilation)
        nn.init.zeros_(self.conv.weight)
        self.norms = nn.ModuleList(NormWeight(hidden_size) for _ in range(hc_mult))

    def forward(self, values: Tensor, state: ConvState | None) -> Tensor:
        """values [B,T,hc_mult,D] -> the same shape."""
        normed = rms_norm(values, stacked_weights(self.norms), CONV_NORM_EPS).flatten(2)
        mixed = causal_conv(normed, self.conv.weight, dilation=self.dilation, state=state)
        return F.silu(mixed).reshape(values.shape)


class Engram(TableBeside):
    """The demo's module; `embedding_dim` counts all heads of all orders of one token.

    `eps` is that of the key and query norms; None is what the demo has, the eps of the arithmetic's
    dtype. `head_sizes` makes the table part of the module (`multi_head_embedding`).
    """

    table_names = ("multi_head_embedding.",)

    def __init__(
        self,
        *,
        hidden_size: int,
        hc_mult: int,
        embedding_dim: int,
        max_ngram_size: int,
        kernel_size: int = 4,
        eps: float | None = None,
        head_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.hc_mult, self.embedding_dim = hidden_size, hc_mult, embedding_dim
        self.eps = eps
        if head_sizes is not None:
            self.multi_head_embedding = MultiHeadEmbedding(head_sizes, embedding_dim // len(head_sizes))
        self.value_proj = nn.Linear(embedding_dim, hidden_size)
        self.key_projs = nn.ModuleList(nn.Linear(embedding_dim, hidden_size) for _ in range(hc_mult))
        self.norm1 = nn.ModuleList(NormWeight(hidden_size) for _ in range(hc_mult))
        self.norm2 = nn.ModuleList(NormWeight(hidden_size) for _ in range(hc_mult))
        self.short_conv = ShortConv(hidden_size, hc_mult, kernel_size, max_ngram_size)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: StateDict,
        *,
        max_ngram_size: int,
        prefix: str = "",
        resident: bool = False,
        head_sizes: Sequence[int] | None = None,
        eps: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Engram:
        """The module of a published state dict; all sizes but `max_ngram_size` are read from it.

        `resident=True` loads the table too; `head_sizes` then stands in for `.offsets` where the
        state dict has none. Raises FormatError naming every missing, surplus or misshapen tensor.
        """
        state = under_prefix(state_dict, prefix)
        value = tensor_of(state, "value_proj.weight", 2)
        conv = tensor_of(state, "short_conv.conv.weight", 3)
        if resident:
            head_sizes = _head_sizes(state, head_sizes)
            state.setdefault("multi_head_embedding.offsets", MultiHeadEmbedding.offsets_of(head_sizes))
        make = partial(
            cls,
            hidden_size=value.shape[0],
            hc_mult=max(1, conv.shape[0] // value.shape[0]),
            embedding_dim=value.shape[1],
            max_ngram_size=max_ngram_size,
            kernel_size=conv.shape[2],
            eps=eps,
            head_sizes=head_sizes if resident else None,
        )
        return filled(make, state, value, dtype)

    def new_state(self, batch_size: int) -> ConvState:
        """The state before a sequence's first token, on the module's device and in its dtype."""
        weight = self.short_conv.conv.weight
        positions = (weight.shape[2] - 1) * self.short_conv.dilation
        return ConvState(weight.new_zeros((batch_size, weight.shape[0], positions)))

    def forward(self, hidden_states: Tensor, embeddings: Tensor, *, state: ConvState | None = None) -> Tensor:
        """hidden_states [B,T,hc_mult,D], embeddings [B,T,H,dim] or [B,T,H*dim] -> [B,T,hc_mult,D].

        With a `state` these positions continue the sequences it has seen, and it moves on; without
        one they are whole sequences. The result has the dtype of hidden_states.
        """
        check_streams(hidden_states, self.hc_mult, self.hidden_size)
        flat = flat_embeddings(embeddings, hidden_states, self.embedding_dim).to(self.value_proj.weight.dtype)
        keys = torch.stack([project(flat) for project in self.key_projs], dim=-2)
        key_weight, query_weight = stacked_weights(self.norm1), stacked_weights(self.norm2)
        gate = context_gate(hidden_states, keys, query_weight, key_weight, self.eps)
        values = gate.unsqueeze(-1) * self.value_proj(flat).unsqueeze(-2)
        return (values + self.short_conv(values, state)).to(hidden_states.dtype)


def _head_sizes(state: StateDict, head_sizes: Sequence[int] | None) -> Sequence[int]:
    weight = tensor_of(state, "multi_head_embedding.embedding.weight", 2)
    if head_sizes is None:
        starts = [int(o) for o in tensor_of(state, "multi_head_embedding.offsets", 1)]
        ends = [*starts[1:], weight.shape[0]]
        head_sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    if not head_sizes or min(head_sizes) < 1 or sum(head_sizes) != weight.shape[0]:
        raise FormatError(
            f"multi_head_embedding: head sizes {list(head_sizes)} sum to {sum(head_sizes)}, but the table "
            f"has {weight.shape[0]} rows; pass the head sizes of this layer"
        )
    return head_sizes
