"""The demo's own embedding source: all heads' tables in one, wholly in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadEmbedding(nn.Module):
    """One table of all heads, one after another; `offsets` [H] says where each head starts."""

    offsets: Tensor

    def __init__(self, head_sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(head_sizes), dim)
        self.register_buffer("offsets", self.offsets_of(head_sizes))

    @staticmethod
    def offsets_of(head_sizes: Sequence[int]) -> Tensor:
        """Where each head's rows start: int64 [H]."""
        return torch.tensor([0, *accumulate(head_sizes)][:-1], dtype=torch.int64)

    def forward(self, hash_ids: Tensor) -> Tensor:
        """hash_ids int64 [..., H], each within its own head, as the demo has them -> [..., H, dim]."""
        return self.embedding(hash_ids + self.offsets)

    def lookup(self, row_ids: Tensor) -> Tensor:
        """row_ids int64 [..., H] with the head offsets included, as our hashing gives -> [..., H, dim]."""
        return F.embedding(row_ids, self.embedding.weight)
