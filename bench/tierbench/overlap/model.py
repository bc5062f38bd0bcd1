"""A small decoder-only transformer, with V4.1's Engram module at some of its layers.

Plain layers (RMS norm, attention with a cache of keys and values, a GELU feed-forward of four
times the width) with seeded weights: nothing is learned, only the time counts. There is no output head and
only a small token embedding, so that nothing but the layers stands beside what the rows cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_client.modules import DeepseekV41Engram

HEAD_WIDTH = 64
EMBEDDED_TOKENS = 4096  # token ids are taken modulo this
Rows = Callable[[int], Tensor]  # layer -> embeddings [B, T, H, dim]


@dataclass(frozen=True)
class Shape:
    """`engram_layers` have a table each, whose rows come to `row_width` numbers a token."""

    hidden: int
    layers: int
    engram_layers: tuple[int, ...]
    row_width: int


class Cache:
    """Keys and values of what a batch of sequences has seen, [layers][B, heads, positions_max, width]."""

    def __init__(self, shape: Shape, batch: int, positions_max: int, like: Tensor | None = None) -> None:
        """In float32 on the CPU, or where and in the dtype that `like` is."""
        size = (shape.layers, batch, shape.hidden // HEAD_WIDTH, positions_max, HEAD_WIDTH)
        like = torch.empty(0) if like is None else like
        self.keys, self.values = like.new_zeros(size), like.new_zeros(size)
        self.seen = 0


class Block(nn.Module):
    """One layer without its Engram module."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: int) -> Tensor:
        """x [B, T, hidden]; writes keys and values [B, heads, positions_max, width] from `seen` on."""
        batch, length, hidden = x.shape
        parts = self.qkv(self.norm_in(x)).view(batch, length, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        end = seen + length
        keys[:, :, seen:end], values[:, :, seen:end] = parts[1], parts[2]
        ones = torch.ones(length, end, dtype=torch.bool, device=x.device)
        mask = None if length == 1 else ones.tril(diagonal=seen)
        mixed = F.scaled_dot_product_attention(parts[0], keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class Transformer(nn.Module):
    """The model; its weights follow from `seed`."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.embedding = nn.Embedding(EMBEDDED_TOKENS, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape.hidden) for _ in range(shape.layers))
        self.engrams = nn.ModuleDict({str(layer): _engram(shape) for layer in shape.engram_layers})

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Cache, rows: Rows) -> Tensor:
        """tokens int64 [B, T] that follow what the cache has seen -> hidden states [B, T, hidden]."""
        x = self.embedding(tokens % EMBEDDED_TOKENS)
        for layer, block in enumerate(self.blocks):
            if str(layer) in self.engrams:
                x = self.engrams[str(layer)](x.unsqueeze(-2), rows(layer)).squeeze(-2)
            x = block(x, cache.keys[layer], cache.values[layer], cache.seen)
        cache.seen += tokens.shape[1]
        return x


def _engram(shape: Shape) -> DeepseekV41Engram:
    module = DeepseekV41Engram(hidden_size=shape.hidden, hc_mult=1, embedding_dim=shape.row_width)
    nn.init.normal_(module.wkv.weight, std=shape.row_width**-0.5)
    return module
