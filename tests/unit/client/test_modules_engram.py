"""The demo's Engram module: the published module's output, its state dict, gradients, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engram_client.errors import BadRequest, FormatError
from engram_client.modules import Engram

GOLDEN = Path(__file__).parents[2] / "golden" / "engram_demo_module.npz"

# The vector's token ids folded through the tokenizer's compressed vocabulary (99,092 ids, pad id 2),
# and what the published rule gives for layer 1, seed 0, primes from 1009 and 2003.
COMPRESSED = [
    [1134, 15695, 237, 2049, 1260, 85761, 237, 12071, 36, 9745, 20232, 290, 16, 1, 1, 1],
    [1132, 10665, 10, 8898, 28, 11373, 96172, 4641, 11, 1791, 16439, 28, 174, 1135, 8898, 3690],
]
PAD = 2
MULTIPLIERS = [76632096046245, 4839876093313, 35959672319349]
PRIMES = [[1009, 1013, 1019, 1021], [2003, 2011, 2017, 2027]]
HEAD_SIZES = [prime for order in PRIMES for prime in order]


def hash_ids(tokens: list[int]) -> list[list[int]]:
    """The demo's hash ids [T][H], head offsets not included, in Python's own integers."""
    rows = []
    for at in range(len(tokens)):
        back = [tokens[at - s] if at >= s else PAD for s in range(3)]
        mixed, row = back[0] * MULTIPLIERS[0], []
        for s in (1, 2):
            mixed ^= back[s] * MULTIPLIERS[s]
            row += [mixed % prime for prime in PRIMES[s - 1]]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def vector() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}


@pytest.fixture(scope="module")
def state(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("param/"): v for k, v in vector.items() if k.startswith("param/")}


@pytest.fixture(scope="module")
def embeddings(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """[2,16,8,16], gathered by hand from the table."""
    starts = np.concatenate([[0], np.cumsum(HEAD_SIZES)[:-1]])
    rows = np.array([hash_ids(tokens) for tokens in COMPRESSED]) + starts
    return state["multi_head_embedding.embedding.weight"][torch.from_numpy(rows)]


def test_output_is_the_published_modules(vector, state, embeddings) -> None:
    engram = Engram.from_state_dict(state, max_ngram_size=3)
    for given in (embeddings, embeddings.flatten(-2)):
        torch.testing.assert_close(
            engram(vector["hidden_states"], given), vector["output"], rtol=1e-5, atol=1e-6
        )


def test_resident_module_needs_no_service(vector, state) -> None:
    ids = torch.tensor([hash_ids(tokens) for tokens in COMPRESSED])
    starts = torch.tensor([0, *np.cumsum(HEAD_SIZES)[:-1]])
    with_offsets = {**state, "multi_head_embedding.offsets": starts}
    for engram in (
        Engram.from_state_dict(with_offsets, max_ngram_size=3, resident=True),
        Engram.from_state_dict(state, max_ngram_size=3, resident=True, head_sizes=HEAD_SIZES),
    ):
        table = engram.multi_head_embedding
        output = engram(vector["hidden_states"], table(ids))
        torch.testing.assert_close(output, vector["output"], rtol=1e-5, atol=1e-6)
        assert torch.equal(table.lookup(ids + starts), table(ids))
        assert set(engram.state_dict()) == set(with_offsets)


def test_inputs_are_left_alone_and_need_no_gradient(vector, state, embeddings) -> None:
    engram = Engram.from_state_dict(state, max_ngram_size=3)
    hidden, given = vector["hidden_states"].clone(), embeddings.clone()
    with torch.no_grad():
        output = engram(hidden, given)
    assert not output.requires_grad
    assert torch.equal(hidden, vector["hidden_states"])
    assert torch.equal(given, embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_agree_to_their_precision(vector, state, embeddings, dtype: torch.dtype) -> None:
    engram = Engram.from_state_dict(state, max_ngram_size=3, dtype=dtype)
    output = engram(vector["hidden_states"].to(dtype), embeddings)
    assert output.dtype == dtype
    worst = (output.double() - vector["output"]).abs().max() / vector["output"].abs().max()
    assert worst < {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}[dtype]


def small(**changes: int) -> Engram:
    """A module of random weights, convolution included, in float64."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 5, "hc_mult": 2, "embedding_dim": 6, "max_ngram_size": 2, "kernel_size": 3}
    engram = Engram(**{**sizes, **changes}).double()
    for parameter in engram.parameters():
        nn.init.normal_(parameter)
    return engram


def test_gradients_reach_states_embeddings_and_parameters() -> None:
    engram = small()
    hidden = torch.randn(1, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    given = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, e: engram(h, e), (hidden, given))
    engram(hidden, given).sum().backward()
    for name, parameter in engram.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_fresh_convolution_adds_nothing() -> None:
    """The paper's recipe: the convolution starts at zero, so the output is the gated value."""
    torch.manual_seed(1)
    engram = Engram(hidden_size=4, hc_mult=2, embedding_dim=6, max_ngram_size=3)
    assert not engram.short_conv.conv.weight.any()
    output = engram(torch.randn(1, 5, 2, 4), torch.randn(1, 5, 6))
    value = output / output[..., :1]
    torch.testing.assert_close(value[:, :, 0], value[:, :, 1])  # one value, scaled by each stream's gate


def test_load_state_dict_passes_the_table_over_inside_a_larger_model(state) -> None:
    donor = Engram.from_state_dict(state, max_ngram_size=3)
    model = nn.ModuleDict({"engram": Engram(hidden_size=96, hc_mult=4, embedding_dim=128, max_ngram_size=3)})
    named = {f"engram.{name}": tensor for name, tensor in state.items()}
    model.load_state_dict(named, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), donor.parameters(), strict=True))
    assert "engram.multi_head_embedding.embedding.weight" in named  # the caller's dict is whole
    named["engram.multi_head_embedding.embedding.weight"] = torch.zeros(10, 24)
    with pytest.raises(
        RuntimeError, match=r"must be \[rows, dim\] with dim a divisor of embedding_dim = 128"
    ):
        model.load_state_dict(named)


def test_a_prefix_picks_one_layer(vector, state, embeddings) -> None:
    named = {f"layers.1.engram.{name}": tensor for name, tensor in state.items()} | {"norm": torch.zeros(3)}
    engram = Engram.from_state_dict(named, max_ngram_size=3, prefix="layers.1.engram.")
    torch.testing.assert_close(
        engram(vector["hidden_states"], embeddings), vector["output"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_proj.bias": None}, r"Missing key.*value_proj\.bias"),
        ({"value_proj.weight": None}, r"'value_proj\.weight' is missing"),
        ({"surprise.weight": torch.zeros(2)}, r"Unexpected key.*surprise\.weight"),
        ({"norm1.2.weight": torch.zeros(95)}, r"size mismatch for norm1\.2\.weight"),
        ({"multi_head_embedding.embedding.weight": torch.zeros(7, 15)}, r"divisor of embedding_dim = 128"),
        ({"short_conv.conv.weight": torch.zeros(384, 4)}, r"conv\.weight must have 3 dimensions"),
    ],
)
def test_a_state_dict_that_does_not_fit(state, change: dict, message: str) -> None:
    broken = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=f"(?s){message}"):
        Engram.from_state_dict(broken, max_ngram_size=3)


def test_resident_tables_must_agree_with_their_head_sizes(state) -> None:
    with pytest.raises(FormatError, match="12120 rows"):
        Engram.from_state_dict(state, max_ngram_size=3, resident=True, head_sizes=[1009, 2003])
    with pytest.raises(FormatError, match=r"multi_head_embedding\.offsets' is missing"):
        Engram.from_state_dict(state, max_ngram_size=3, resident=True)
    with pytest.raises(FormatError, match=r"no tensor is named 'layers\.9\."):
        Engram.from_state_dict(state, max_ngram_size=3, prefix="layers.9.")


@pytest.mark.parametrize(
    ("hidden", "given", "message"),
    [
        ((1, 3, 2, 4), (1, 3, 6), r"hidden_states .* \[\.\.\., 2, 5\]"),
        ((1, 3, 2, 5), (1, 3, 7), r"heads \* dim = 6, got \[1, 3, 7\]"),
        ((1, 3, 2, 5), (1, 4, 6), r"embeddings must be \[1, 3\]"),
        ((1, 3, 2, 5), (1, 3, 1, 2, 3), r"embeddings must be \[1, 3\]"),
    ],
)
def test_shapes_that_cannot_be_meant(hidden: tuple, given: tuple, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        small()(torch.zeros(hidden), torch.zeros(given))


def test_row_bytes_are_not_embeddings() -> None:
    with pytest.raises(BadRequest, match=r"table\.dequantize"):
        small()(torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 6, dtype=torch.uint8))
