"""The shapes every module takes, checked once and named in the error."""

from __future__ import annotations

import math

from torch import Tensor

from engram_client.errors import BadRequest


def check_streams(hidden_states: Tensor, hc_mult: int, hidden_size: int) -> None:
    """hidden_states must be floating [..., hc_mult, hidden_size]."""
    if not hidden_states.is_floating_point() or hidden_states.shape[-2:] != (hc_mult, hidden_size):
        raise BadRequest(
            f"hidden_states must be floating, [..., hc_mult, hidden_size] = [..., {hc_mult}, {hidden_size}], "
            f"got {hidden_states.dtype} {list(hidden_states.shape)}"
        )


def flat_embeddings(embeddings: Tensor, hidden_states: Tensor, embedding_dim: int) -> Tensor:
    """Embeddings [..., H, dim] or [..., H * dim] for the positions of hidden_states, as [..., H * dim]."""
    if not embeddings.is_floating_point():
        raise BadRequest(
            f"embeddings must be floating, got {embeddings.dtype}; rows as looked up are bytes: pass them "
            "through table.dequantize(rows) first"
        )
    positions = hidden_states.shape[:-2]
    if embeddings.shape == (*positions, embedding_dim):
        return embeddings
    heads = embeddings.shape[len(positions) :]
    if (
        embeddings.shape[: len(positions)] == positions
        and len(heads) == 2
        and math.prod(heads) == embedding_dim
    ):
        return embeddings.flatten(-2)
    raise BadRequest(
        f"embeddings must be {list(positions)} + [heads, dim] or [heads * dim] with heads * dim = "
        f"{embedding_dim}, got {list(embeddings.shape)}"
    )
