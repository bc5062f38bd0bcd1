"""A small decoder-only transformer, with the published Engram module at one layer or without.

Without, a feed-forward of as many multiplications stands in the module's place, so that both models spend
the same on a step; what the one has more than the other is its table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_client.modules import Engram

HEAD_WIDTH = 32
MAX_NGRAM_SIZE = 3
ORDERS = MAX_NGRAM_SIZE - 1
ENGRAM_LAYER = 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `row_width` numbers come from the table for each of `heads` heads an order."""

    vocab_size: int
    hidden: int
    layers: int
    context: int
    heads: int = 4
    row_width: int = 16

    @property
    def memory_width(self) -> int:
        """Numbers that the table gives for one token."""
        return ORDERS * self.heads * self.row_width


class Block(nn.Module):
    """Causal attention and a GELU feed-forward, each behind a norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,hidden] -> the same shape."""
        batch, length, hidden = x.shape
        parts = self.qkv(self.norm_in(x)).view(batch, length, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class InPlaceOfMemory(nn.Module):
    """As many multiplications as the Engram module does for a token, without a table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.memory_width)
        self.down = nn.Linear(shape.memory_width, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """The model; everything but the table's rows is its own and follows from `seed`."""

    def __init__(self, shape: Shape, *, with_memory: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.places = nn.Embedding(shape.context, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape.hidden) for _ in range(shape.layers))
        self.norm_out = nn.RMSNorm(shape.hidden)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.memory: nn.Module = _engram(shape) if with_memory else InPlaceOfMemory(shape)

    def forward(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """tokens int64 [B,T] and the table's rows [B,T,H,row_width] -> logits [B,T,vocab_size]."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            if layer == ENGRAM_LAYER:
                x = x + self._remembered(x, rows)
            x = block(x)
        return F.linear(self.norm_out(x), self.tokens.weight)

    def _remembered(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self.memory(x)
        return self.memory(x.unsqueeze(2), rows).squeeze(2)


def _engram(shape: Shape) -> Engram:
    return Engram(
        hidden_size=shape.hidden, hc_mult=1, embedding_dim=shape.memory_width, max_ngram_size=MAX_NGRAM_SIZE
    )
