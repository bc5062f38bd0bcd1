"""Qwen's PLE form against its description, worked out number by number in Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from engram_client.errors import FormatError
from engram_client.modules import QwenPLE

STREAMS, D, E, NGRAM, KERNEL, EPS = 3, 4, 6, 3, 4, 1e-6


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(38)
    shapes = {
        "key_proj.weight": (STREAMS * D, E),
        "value_proj.weight": (D, E),
        "norm_key.weight": (STREAMS * D,),
        "norm_query.weight": (STREAMS * D,),
        "norm_conv.weight": (STREAMS * D,),
        "conv1d.weight": (STREAMS * D, 1, KERNEL),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def normalized(numbers: list[float], weights: list[float]) -> list[float]:
    rms = math.sqrt(sum(x * x for x in numbers) / len(numbers) + EPS)
    return [x / rms * (1 + w) for x, w in zip(numbers, weights, strict=True)]


def by_hand(state: dict[str, torch.Tensor], hidden: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """hidden [T,streams,D], embeddings [T,E] -> [T,streams,D]."""
    p = {name: tensor.numpy() for name, tensor in state.items()}
    steps = len(hidden)
    values = np.zeros((steps, STREAMS, D))
    normed = np.zeros((steps, STREAMS * D))
    for t in range(steps):
        value = p["value_proj.weight"] @ embeddings[t]
        key = p["key_proj.weight"] @ embeddings[t]
        for h in range(STREAMS):
            own = slice(h * D, (h + 1) * D)
            q = normalized(list(hidden[t, h]), list(p["norm_query.weight"][own]))
            k = normalized(list(key[own]), list(p["norm_key.weight"][own]))
            g = sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(D)
            g = math.copysign(math.sqrt(max(abs(g), 1e-6)), g)
            values[t, h] = value / (1 + math.exp(-g))
            normed[t, own] = normalized(list(values[t, h]), list(p["norm_conv.weight"][own]))
    output = values.copy()
    for t in range(steps):
        for c in range(STREAMS * D):
            taps = [(KERNEL - 1 - j, t - j * NGRAM) for j in range(KERNEL)]
            mixed = sum(p["conv1d.weight"][c, 0, tap] * normed[at, c] for tap, at in taps if at >= 0)
            output[t, c // D, c % D] += mixed / (1 + math.exp(-mixed))
    return output


def test_output_follows_the_description(state) -> None:
    rng = np.random.default_rng(5)
    hidden, embeddings = rng.standard_normal((2, 14, STREAMS, D)), rng.standard_normal((2, 14, E))
    ple = QwenPLE.from_state_dict(state, ngram_size=NGRAM, eps=EPS)
    output = ple(torch.from_numpy(hidden), torch.from_numpy(embeddings).unflatten(-1, (3, 2)))
    expected = np.stack([by_hand(state, h, e) for h, e in zip(hidden, embeddings, strict=True)])
    np.testing.assert_allclose(output.detach(), expected, rtol=1e-11, atol=1e-12)


def test_fresh_norms_are_plain_and_a_fresh_convolution_silent(state) -> None:
    """Norm weights count from one, so a fresh module's are zero."""
    fresh = QwenPLE(hidden_size=D, hc_mult=STREAMS, embedding_dim=E, ngram_size=NGRAM)
    assert not any(fresh.state_dict()[name].any() for name in state if name.startswith(("norm", "conv")))
    zeroed = {k: v if "proj" in k else torch.zeros_like(v) for k, v in state.items()}
    fresh.load_state_dict(zeroed)
    rng = np.random.default_rng(6)
    hidden, embeddings = rng.standard_normal((3, STREAMS, D)), rng.standard_normal((3, E))
    output = fresh(torch.from_numpy(hidden)[None].float(), torch.from_numpy(embeddings)[None].float())
    np.testing.assert_allclose(output[0].detach(), by_hand(zeroed, hidden, embeddings), rtol=1e-5, atol=1e-6)


def test_gradients_reach_states_embeddings_and_parameters(state) -> None:
    ple = QwenPLE.from_state_dict(state, ngram_size=NGRAM)
    torch.manual_seed(2)
    hidden = torch.randn(1, 5, STREAMS, D, dtype=torch.float64, requires_grad=True)
    given = torch.randn(1, 5, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, e: ple(h, e), (hidden, given))
    ple(hidden, given).square().sum().backward()
    assert all(parameter.grad.any() for parameter in ple.parameters())


def test_the_table_and_its_hash_buffers_are_passed_over(state) -> None:
    prefix = "model.language_model.layers.1.ple."
    table = {
        "ple_embedding.ngram_embedding.shard_0.weight": torch.zeros((9, 2), dtype=torch.float8_e4m3fn),
        "ple_embedding.ngram_embedding.weight_scale": torch.ones(1),
        "ple_embedding.layer_multipliers": torch.ones(3, dtype=torch.int64),
        "ple_embedding.ngram_heads_offsets": torch.ones(3, dtype=torch.int64),
    }
    named = {prefix + name: tensor for name, tensor in (state | table).items()}
    ple = QwenPLE.from_state_dict(named, ngram_size=NGRAM, prefix=prefix, dtype=torch.float32)
    assert {p.dtype for p in ple.parameters()} == {torch.float32}
    model = nn.ModuleDict({"ple": QwenPLE(hidden_size=D, hc_mult=STREAMS, embedding_dim=E, ngram_size=NGRAM)})
    model.load_state_dict({f"ple.{name}": tensor for name, tensor in (state | table).items()})
    assert torch.equal(model["ple"].key_proj.weight, ple.key_proj.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_conv.weight": None}, r"Missing key.*norm_conv\.weight"),
        ({"key_proj.bias": torch.zeros(12)}, r"Unexpected key.*key_proj\.bias"),
        ({"norm_key.weight": torch.zeros(D)}, r"size mismatch for norm_key\.weight"),
        (
            {"ple_embedding.ngram_embedding.shard_0.weight": torch.zeros(3, 4)},
            r"divisor of embedding_dim = 6",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit(state, change: dict, message: str) -> None:
    broken = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=f"(?s){message}"):
        QwenPLE.from_state_dict(broken, ngram_size=NGRAM)
