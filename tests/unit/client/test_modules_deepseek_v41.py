"""V4.1's gate: the golden vector, FP8 checkpoints, dead positions, gradients, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engram_client.errors import BadRequest, FormatError
from engram_client.modules import DeepseekV41Engram

GOLDEN = Path(__file__).parents[2] / "golden" / "deepseek_v41_gate.npz"


@pytest.fixture(scope="module")
def vector() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def state(vector) -> dict[str, torch.Tensor]:
    names = {"wkv.weight": "wkv", "q_weight": "q_weight", "k_weight": "k_weight"}
    return {name: vector[key] for name, key in names.items()}


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-13), (torch.float32, 1e-5, 1e-6)]
)
def test_output_is_the_vectors(vector, state, dtype: torch.dtype, rtol: float, atol: float) -> None:
    module = DeepseekV41Engram.from_state_dict(state, eps=float(vector["eps"]), dtype=dtype)
    hidden, rows = vector["hidden_states"].to(dtype), vector["rows"].to(dtype)
    output = module(hidden, rows, dead=vector["dead"])
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), vector["output"], rtol=rtol, atol=atol)
    batched = module(hidden.expand(3, -1, -1, -1), rows.expand(3, -1, -1), dead=vector["dead"].expand(3, -1))
    for sequence in batched:
        torch.testing.assert_close(sequence, output)


def test_a_dead_position_passes_unchanged_whatever_its_rows(vector, state) -> None:
    module = DeepseekV41Engram.from_state_dict(state)
    dead = vector["dead"]
    assert dead.any() and not dead.all()
    output = module(vector["hidden_states"], vector["rows"], dead=dead)
    assert torch.equal(output[dead], vector["hidden_states"][dead])
    assert not torch.isclose(output[~dead], vector["hidden_states"][~dead]).all(dim=-1).any()
    alive = module(vector["hidden_states"], vector["rows"])
    assert torch.equal(alive[~dead], output[~dead])
    assert not torch.equal(alive[dead], output[dead])


def test_bfloat16_is_gated_in_float32(vector, state) -> None:
    """Streams of one sign and keys nearly orthogonal to them: a bfloat16 dot would lose the gate."""
    module = DeepseekV41Engram.from_state_dict(state, dtype=torch.bfloat16)
    hidden, rows = vector["hidden_states"].bfloat16(), vector["rows"].bfloat16()
    exact = DeepseekV41Engram.from_state_dict(
        {k: v.bfloat16() for k, v in state.items()}, dtype=torch.float64
    )
    output = module(hidden, rows)
    assert output.dtype == torch.bfloat16
    expected = exact(hidden.double(), rows.double())
    assert (output.double() - expected).abs().max() / expected.abs().max() < 1e-2


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 32), (640, 64)])
@pytest.mark.parametrize("as_codes", [True, False])
def test_fp8_projection_is_made_whole_when_loaded(block: tuple[int, int], as_codes: bool) -> None:
    rng = np.random.default_rng(23)
    shape = (640, 512)  # 128 numbers a stream, 4 streams and the value
    weight = torch.from_numpy(rng.standard_normal(shape)).to(torch.float8_e4m3fn)
    codes = rng.integers(120, 132, (shape[0] // block[0], shape[1] // block[1]), dtype=np.uint8)
    scale = torch.from_numpy(codes) if as_codes else torch.from_numpy(np.exp2(codes - 127.0)).float()
    whole = np.kron(np.exp2(codes - 127.0), np.ones(block)) * weight.double().numpy()
    state = {
        "layers.1.engram.wkv.weight": weight,
        "layers.1.engram.wkv.scale": scale,
        "layers.1.engram.q_weight": torch.ones(4, 128, dtype=torch.bfloat16),
        "layers.1.engram.k_weight": torch.ones(4, 128, dtype=torch.bfloat16),
        "layers.1.engram.embed.weight": torch.zeros((5, 64), dtype=torch.float8_e4m3fn),
        "layers.1.engram.embed.scale": torch.zeros((5, 2), dtype=torch.uint8),
    }
    module = DeepseekV41Engram.from_state_dict(state, prefix="layers.1.engram.")
    assert module.wkv.weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(module.wkv.weight.detach().double(), whole)  # E4M3 and 2^k fit bfloat16
    model = nn.ModuleDict({"engram": DeepseekV41Engram(hidden_size=128, hc_mult=4, embedding_dim=512)})
    model.load_state_dict({k.removeprefix("layers.1."): v for k, v in state.items()})
    np.testing.assert_array_equal(model["engram"].wkv.weight.detach().double(), whole)
    assert "layers.1.engram.wkv.scale" in state


def test_e8m0_scales_in_torchs_own_dtype(state) -> None:
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no E8M0 dtype")
    codes = torch.randint(120, 130, (15, 3), dtype=torch.uint8)
    loaded = [
        DeepseekV41Engram.from_state_dict({**state, "wkv.scale": scale}, dtype=torch.float32).wkv.weight
        for scale in (codes, codes.view(torch.float8_e8m0fnu))
    ]
    assert torch.equal(*loaded)


def test_gradients_reach_states_embeddings_and_parameters() -> None:
    torch.manual_seed(4)
    module = DeepseekV41Engram(hidden_size=3, hc_mult=2, embedding_dim=4).double()
    hidden = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    dead = torch.tensor([False, True, False])
    assert torch.autograd.gradcheck(lambda h, e: module(h, e, dead=dead), (hidden, rows))
    module(hidden, rows, dead=dead).square().sum().backward()
    assert not rows.grad[1].any() and rows.grad[0].any()
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wkv.weight": None}, r"'wkv\.weight' is missing"),
        ({"k_weight": None}, r"Missing key.*k_weight"),
        ({"wkv.weight": torch.zeros(239, 384)}, r"size mismatch for wkv\.weight"),
        ({"wkv.scale": torch.zeros(7, 3)}, r"do not cut weights \[240, 384\]"),
        ({"wkv.scale": torch.zeros(2, 3)}, r"power of two along dimension 0"),
        ({"wkv.scale": torch.zeros((15, 3), dtype=torch.int8)}, r"must be E8M0, .* got torch\.int8"),
        ({"wkv.weight": torch.zeros((240, 384), dtype=torch.uint8)}, r"must be floating, got torch\.uint8"),
        ({"wkv.scale": torch.zeros(5)}, r"both must be matrices"),
        ({"embed.weight": torch.zeros(5, 7)}, r"divisor of embedding_dim = 384"),
        ({"short_conv.weight": torch.zeros(5)}, r"Unexpected key.*short_conv\.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit(state, change: dict, message: str) -> None:
    broken = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=f"(?s){message}"):
        DeepseekV41Engram.from_state_dict(broken)


def test_dead_must_say_yes_or_no_for_every_position(vector, state) -> None:
    module = DeepseekV41Engram.from_state_dict(state)
    for dead in (vector["dead"].long(), vector["dead"][:-1]):
        with pytest.raises(BadRequest, match=r"dead must be bool \[11\]"):
            module(vector["hidden_states"], vector["rows"], dead=dead)
