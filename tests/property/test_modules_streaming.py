"""Feeding a sequence in any pieces gives the output of feeding it whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engram_client.errors import BadRequest
from engram_client.modules import ConvState, DeepseekV41Engram, Engram, QwenPLE

STREAMS, D, E = 2, 3, 4

Streaming = Engram | QwenPLE


def engram(dilation: int, kernel: int) -> Engram:
    sizes = {"hidden_size": D, "hc_mult": STREAMS, "embedding_dim": E}
    return Engram(**sizes, max_ngram_size=dilation, kernel_size=kernel)


def qwen_ple(dilation: int, kernel: int) -> QwenPLE:
    sizes = {"hidden_size": D, "hc_mult": STREAMS, "embedding_dim": E}
    return QwenPLE(**sizes, ngram_size=dilation, kernel_size=kernel)


def randomized(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.double()


def sequence(batch: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((batch, steps, STREAMS, D), generator=generator, dtype=torch.float64)
    return hidden, torch.randn((batch, steps, E), generator=generator, dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    make=st.sampled_from([engram, qwen_ple]),
    dilation=st.integers(1, 4),
    kernel=st.integers(1, 4),
    batch=st.integers(1, 3),
    pieces=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_pieces_give_the_whole(
    make: Callable[[int, int], Streaming],
    dilation: int,
    kernel: int,
    batch: int,
    pieces: list[int],
    seed: int,
) -> None:
    module = randomized(make(dilation, kernel), seed)
    hidden, embeddings = sequence(batch, sum(pieces), seed)
    state, at, outputs = module.new_state(batch), 0, []
    size = state.bytes
    for length in pieces:
        piece = slice(at, at + length)
        outputs.append(module(hidden[:, piece], embeddings[:, piece], state=state))
        assert state.bytes == size == batch * STREAMS * D * (kernel - 1) * dilation * 8
        assert state.history.untyped_storage().nbytes() == size  # it keeps no piece alive
        at += length
    torch.testing.assert_close(torch.cat(outputs, 1), module(hidden, embeddings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [engram, qwen_ple])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_at_a_time_in_model_dtypes(
    make: Callable[[int, int], Streaming], dtype: torch.dtype
) -> None:
    module = randomized(make(3, 4), 1).to(dtype)
    hidden, embeddings = (t.to(dtype) for t in sequence(2, 40, 2))
    state = module.new_state(2)
    steps = [module(hidden[:, t : t + 1], embeddings[:, t : t + 1], state=state) for t in range(40)]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    whole = module(hidden, embeddings).detach()
    atol = tolerance * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("make", [engram, qwen_ple])
def test_a_clone_keeps_its_place(make: Callable[[int, int], Streaming]) -> None:
    """A draft that is rejected leaves no trace in the state it was tried from."""
    module = randomized(make(2, 4), 3)
    hidden, embeddings = sequence(2, 12, 4)
    state = module.new_state(2)
    module(hidden[:, :7], embeddings[:, :7], state=state)
    draft = state.clone()
    module(hidden[:, :5] * 9, embeddings[:, :5] * 9, state=draft)
    assert not torch.equal(draft.history, state.history)
    rest = module(hidden[:, 7:], embeddings[:, 7:], state=state)
    torch.testing.assert_close(rest, module(hidden, embeddings)[:, 7:])


@pytest.mark.parametrize("make", [engram, qwen_ple])
def test_selected_sequences_go_on_as_their_originals(make: Callable[[int, int], Streaming]) -> None:
    module = randomized(make(3, 3), 5)
    hidden, embeddings = sequence(3, 10, 6)
    state = module.new_state(3)
    module(hidden[:, :6], embeddings[:, :6], state=state)
    chosen = [2, 0, 2]
    beams = state.select(chosen)
    rest = module(hidden[chosen, 6:], embeddings[chosen, 6:], state=beams)
    torch.testing.assert_close(rest, module(hidden, embeddings)[chosen, 6:])
    assert state.select(torch.tensor([1])).batch_size == 1


def test_gradients_flow_between_pieces_until_detached() -> None:
    module = randomized(engram(2, 3), 7)
    hidden, embeddings = sequence(1, 6, 8)
    first = embeddings[:, :3].clone().requires_grad_()
    state = module.new_state(1)
    module(hidden[:, :3], first, state=state)
    kept = module(hidden[:, 3:], embeddings[:, 3:], state=state.clone()).sum()
    cut = module(hidden[:, 3:], embeddings[:, 3:], state=state.detach()).sum()
    assert torch.autograd.grad(kept, first)[0].any()
    assert torch.autograd.grad(cut, first, allow_unused=True)[0] is None


def test_every_v41_position_is_by_itself() -> None:
    module = randomized(DeepseekV41Engram(hidden_size=D, hc_mult=STREAMS, embedding_dim=E), 9)
    hidden, embeddings = sequence(2, 9, 10)
    steps = [module(hidden[:, t], embeddings[:, t]) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), module(hidden, embeddings))


def test_a_state_of_another_batch_or_module_is_refused() -> None:
    module = randomized(engram(2, 3), 11)
    hidden, embeddings = sequence(2, 3, 12)
    for state in (module.new_state(3), engram(3, 3).new_state(2), ConvState(torch.zeros(2, 1, 4))):
        with pytest.raises(BadRequest, match=r"expected \[batch, channels, positions\] = \[2, 6, 4\]"):
            module(hidden, embeddings, state=state)
    for index in ([0, 2], [-1], torch.tensor([[0]])):
        with pytest.raises(BadRequest, match="from 0 to 1"):
            module.new_state(2).select(index)
