"""A causal, dilated, depthwise convolution over time that can be fed in pieces.

Output t of a channel reads its inputs t, t - d, t - 2d, ..., t - (k-1)d (k taps, dilation d), so
all that a later piece needs of the earlier ones is the last (k-1)*d inputs:

    history [B, C, (k-1)*d] | piece [B, C, T]  --conv, no padding-->  [B, C, T]
                  `---- the last (k-1)*d of both become the next history

An empty history is zeros, which is what padding a whole sequence at its start gives; feeding any
pieces therefore gives the whole sequence's output, to the rounding of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_client.errors import BadRequest


class ConvState:
    """What a convolution remembers between pieces: `history` [B, C, (kernel-1)*dilation].

    A module advances the state it is given. The tensor is replaced and never written to, so
    `clone` costs nothing and a clone keeps its place while the original moves on.
    """

    def __init__(self, history: Tensor) -> None:
        self.history = history

    @property
    def batch_size(self) -> int:
        return self.history.shape[0]

    @property
    def bytes(self) -> int:
        """Memory of the history; it does not grow with the sequence."""
        return self.history.numel() * self.history.element_size()

    def clone(self) -> ConvState:
        """A second state at the same place, for trying a continuation."""
        return ConvState(self.history)

    def select(self, batch_index: Tensor | Sequence[int]) -> ConvState:
        """The states of some sequences of the batch, in that order; one may be named repeatedly."""
        index = torch.as_tensor(batch_index, dtype=torch.int64)
        if index.ndim != 1 or (
            index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size
        ):
            raise BadRequest(
                f"ConvState.select: batch_index must be a list of numbers from 0 to {self.batch_size - 1}, "
                f"got {index.tolist()}"
            )
        return ConvState(self.history.index_select(0, index.to(self.history.device)))

    def detach(self) -> ConvState:
        """The same place without its autograd graph: truncates backpropagation through time."""
        return ConvState(self.history.detach())


def causal_conv(x: Tensor, weight: Tensor, *, dilation: int, state: ConvState | None = None) -> Tensor:
    """x [B, T, C] convolved with weight [C, 1, kernel] -> [B, T, C]; T may be 0.

    With a state, x continues the sequence the state has seen, and the state moves on by T.
    Raises BadRequest where the state is another batch's or another module's.
    """
    channels, _, kernel = weight.shape
    positions = (kernel - 1) * dilation
    piece = x.transpose(1, 2).to(weight.dtype)
    expected = (x.shape[0], channels, positions)
    if state is not None and tuple(state.history.shape) != expected:
        raise BadRequest(
            f"convolution state: expected [batch, channels, positions] = {list(expected)}, got "
            f"{list(state.history.shape)}; make it with new_state(batch_size) of this module, or select() "
            "the sequences of this batch"
        )
    history = piece.new_zeros(expected) if state is None else state.history.to(piece)
    seen = torch.cat((history, piece), dim=2)
    if state is not None:
        state.history = seen[:, :, seen.shape[2] - positions :].clone()  # a view would keep the piece alive
    if x.shape[1] == 0:
        return x.to(weight.dtype)
    return F.conv1d(seen, weight, dilation=dilation, groups=channels).transpose(1, 2)
