"""Hashing against the conformance vectors; decode state; arguments that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engram_client.errors import BadRequest, FormatError, IdOutOfRange, VocabularyMismatch
from engram_client.hashing import (
    NgramHashMapping,
    check_scheme,
    engram_schemes,
    head_offsets,
    ple_scheme,
    row_ids_from_keys,
)
from engram_client.hashing.primes import is_prime, primes_from
from tests.vectors import compressed_map, load_json

SMALL: dict[str, Any] = {
    "layer_ids": [3, 7],
    "vocab_size_per_ngram": [50, 60],
    "n_head_per_ngram": 2,
    "max_ngram_size": 3,
    "pad_id": 1,
    "seed": 5,
}
SMALL_MAP = np.array([0, 1, 1, 2, 3, 0])


def small() -> NgramHashMapping:
    return NgramHashMapping.engram(SMALL_MAP, **SMALL)


def v41() -> NgramHashMapping:
    config = load_json("deepseek_v41")["config"]
    return NgramHashMapping.engram(
        compressed_map(),
        layer_ids=config["engram_layer_ids"],
        vocab_size_per_ngram=[config["engram_vocab_size"]] * (config["engram_max_ngram_size"] - 1),
        n_head_per_ngram=config["engram_n_heads"],
        max_ngram_size=config["engram_max_ngram_size"],
        pad_id=config["engram_pad_token_id"],
        seed=0,
    )


def qwen() -> NgramHashMapping:
    config = dict(load_json("qwen_ple")["config"])
    return NgramHashMapping.ple(layer_index=config.pop("ple_layer_index"), **config)


def demo() -> tuple[NgramHashMapping, dict[str, Any]]:
    vectors = load_json("engram_demo")["configs"][0]
    config = dict(vectors["config"])
    config.pop("n_embed_per_ngram")
    starts = config.pop("engram_vocab_size")
    return NgramHashMapping.engram(compressed_map(), vocab_size_per_ngram=starts, **config), vectors


def assert_parameters(mapping: NgramHashMapping, vectors: dict[str, Any]) -> None:
    for layer in mapping.layer_ids:
        assert mapping.multipliers[layer].tolist() == vectors["multipliers"][str(layer)]
        assert mapping.head_sizes[layer].tolist() == vectors["head_sizes"][str(layer)]


class TestVectors:
    def test_engram_demo(self) -> None:
        mapping, vectors = demo()
        assert_parameters(mapping, vectors)
        for case in vectors["cases"]:
            for layer in mapping.layer_ids:
                scheme = mapping.scheme(layer)
                offsets = np.array(scheme.head_offsets).reshape(-1)
                hash_ids = mapping.row_ids(case["token_ids"], layer) - offsets
                assert hash_ids.tolist() == case["hash_ids"][str(layer)]

    def test_deepseek_v41(self) -> None:
        mapping, vectors = v41(), load_json("deepseek_v41")
        assert_parameters(mapping, vectors)
        for case in vectors["cases"]:
            dead = np.zeros(len(case["token_ids"]), dtype=bool)
            dead[case["dead"]] = True
            for layer in mapping.layer_ids:
                rows = mapping.row_ids([case["token_ids"]], layer, [dead])
                assert rows[0].tolist() == case["row_ids"][str(layer)]  # at dead positions too

    def test_deepseek_v41_row_counts(self) -> None:
        counts = load_json("deepseek_v41")["config"]["engram_num_embeddings"]
        assert [v41().scheme(layer).rows for layer in (1, 14)] == counts

    def test_qwen_ple(self) -> None:
        mapping, vectors = qwen(), load_json("qwen_ple")
        assert mapping.multipliers[0].tolist() == vectors["multipliers"]
        assert mapping.head_sizes[0].reshape(-1).tolist() == vectors["head_sizes"]
        assert mapping.scheme(0).rows == 320_001_446
        for case in vectors["cases"]:
            assert mapping.row_ids(case["token_ids"], 0).tolist() == case["row_ids"]

    def test_a_served_scheme_hashes_like_the_published_parameters(self) -> None:
        published = v41()
        served = NgramHashMapping.from_schemes([published.scheme(1), published.scheme(14)], compressed_map())
        tokens = np.random.default_rng(3).integers(0, 129280, (2, 50), dtype=np.uint32)
        for layer in (1, 14):
            np.testing.assert_array_equal(served.row_ids(tokens, layer), published.row_ids(tokens, layer))


class TestShapes:
    def test_one_sequence_needs_no_batch_axis(self) -> None:
        mapping, tokens = small(), np.array([0, 3, 4, 5])
        assert mapping.ngram_keys(tokens, 3).shape == (4, 2)
        assert mapping.row_ids(tokens, 3).shape == (4, 4)
        np.testing.assert_array_equal(mapping.row_ids(tokens[None], 3)[0], mapping.row_ids(tokens, 3))

    @pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (5, 0)])
    def test_nothing_gives_nothing(self, shape: tuple[int, ...]) -> None:
        tokens = np.zeros(shape, dtype=np.int64)
        assert small().row_ids(tokens, 3).shape == (*shape, 4)

    @pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
    def test_dtypes_and_layouts_do_not_matter(self, dtype: Any) -> None:
        mapping, tokens = small(), np.random.default_rng(0).integers(0, 6, (4, 9))
        expected = mapping.row_ids(tokens, 7)
        given = tokens.astype(dtype)
        for same in (given, np.asfortranarray(given), np.repeat(given, 2, axis=1)[:, ::2]):
            np.testing.assert_array_equal(mapping.row_ids(same, 7), expected)

    def test_read_only_input(self) -> None:
        tokens = np.array([[0, 3, 4]])
        tokens.setflags(write=False)
        np.testing.assert_array_equal(small().row_ids(tokens, 3), small().row_ids(tokens.copy(), 3))

    def test_lists_are_welcome(self) -> None:
        assert small().row_ids([[0, 1], [2, 3]], 3).shape == (2, 2, 4)


class TestRefusals:
    @pytest.mark.parametrize("wrong", [-1, -2, 6, 2**40])
    def test_ids_outside_the_vocabulary(self, wrong: int) -> None:
        with pytest.raises(IdOutOfRange, match=rf"token_ids\[1, 2\] is {wrong}; the vocabulary is 0\.\.5"):
            small().ngram_keys([[0, 0, 0], [0, 0, wrong]], 3)
        with pytest.raises(IdOutOfRange, match=r"token_ids\[1\]"):
            small().ngram_keys([0, wrong, 0], 3)

    def test_ids_at_dead_positions_are_not_read(self) -> None:
        mapping, dead = small(), [False, True, False]
        np.testing.assert_array_equal(
            mapping.ngram_keys([3, -7, 4], 3, dead), mapping.ngram_keys([3, 5, 4], 3, dead)
        )

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.uint64, np.int16, object, ">i8"])
    def test_dtypes(self, dtype: Any) -> None:
        with pytest.raises(BadRequest, match="must be int64 or int32 or uint32"):
            small().ngram_keys(np.zeros((1, 3), dtype=dtype), 3)

    @pytest.mark.parametrize("shape", [(), (1, 1, 1)])
    def test_axes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BadRequest, match=r"\[B,T\] or \[T\]"):
            small().ngram_keys(np.zeros(shape, dtype=np.int64), 3)

    def test_ragged_lists(self) -> None:
        with pytest.raises(BadRequest, match="cannot be read as an array"):
            small().ngram_keys([[0], [0, 1]], 3)

    @pytest.mark.parametrize("dead", [[0, 1], [True], [[True, False]]])
    def test_dead_masks(self, dead: Any) -> None:
        with pytest.raises(BadRequest, match="dead must be bool"):
            small().ngram_keys([0, 1], 3, dead)

    def test_layers(self) -> None:
        with pytest.raises(BadRequest, match=r"no hash scheme for layer 4; there are \[3, 7\]"):
            small().ngram_keys([0], 4)

    @pytest.mark.parametrize("wrong", [[], [[0]], [0.5], [-1, 0]])
    def test_compressed_maps(self, wrong: Any) -> None:
        with pytest.raises(BadRequest, match="compressed_map must be"):
            NgramHashMapping.engram(wrong, **SMALL)

    @pytest.mark.parametrize(
        "change",
        [
            {"vocab_size_per_ngram": [50]},
            {"vocab_size_per_ngram": [50, 0]},
            {"n_head_per_ngram": 0},
            {"max_ngram_size": 1, "vocab_size_per_ngram": []},
            {"layer_ids": []},
            {"layer_ids": [3, 3]},
            {"pad_id": 6},
        ],
    )
    def test_parameters(self, change: dict[str, Any]) -> None:
        with pytest.raises((BadRequest, FormatError)):
            NgramHashMapping.engram(SMALL_MAP, **{**SMALL, **change})

    def test_keys(self) -> None:
        scheme = small().scheme(3)
        with pytest.raises(IdOutOfRange, match=r"ngram_keys\[1, 0\] is -2"):
            row_ids_from_keys(scheme, [[5, -1], [-2, 4]])
        with pytest.raises(BadRequest, match=r"ngram_keys must be \[\.\.\., 2\]"):
            row_ids_from_keys(scheme, [[5, 6, 7]])
        with pytest.raises(BadRequest, match="must be int64 or int32, got float64"):
            row_ids_from_keys(scheme, [0.5, 1.5])


class TestVocabulary:
    def test_another_map_of_the_same_size(self) -> None:
        scheme = small().scheme(3)
        other = np.array([0, 1, 2, 2, 3, 0])
        with pytest.raises(VocabularyMismatch) as caught:
            NgramHashMapping.from_scheme(scheme, other)
        digest = NgramHashMapping.engram(other, **SMALL).scheme(3).vocabulary_digest
        assert scheme.vocabulary_digest in str(caught.value)
        assert digest in str(caught.value)

    def test_another_size(self) -> None:
        unknown = dataclasses.replace(small().scheme(3), vocabulary_digest=None)
        NgramHashMapping.from_scheme(unknown, SMALL_MAP)
        with pytest.raises(VocabularyMismatch, match="of 4 ids, digest unknown; the one given has 6 ids"):
            NgramHashMapping.from_scheme(unknown, np.arange(6))

    def test_a_map_is_needed_or_not(self) -> None:
        with pytest.raises(BadRequest, match="give a CompressedTokenizer"):
            NgramHashMapping.from_scheme(small().scheme(3))
        with pytest.raises(BadRequest, match="give no compressed_map"):
            NgramHashMapping.from_scheme(qwen().scheme(0), SMALL_MAP)

    def test_schemes_that_do_not_belong_together(self) -> None:
        first = small().scheme(3)
        for schemes in ([], [first, first], [first, qwen().scheme(0)]):
            with pytest.raises(BadRequest):
                NgramHashMapping.from_schemes(schemes, SMALL_MAP)


class TestSchemes:
    def test_every_scheme_of_ours_passes_its_own_check(self) -> None:
        for mapping in (small(), v41(), qwen()):
            for layer in mapping.layer_ids:
                check_scheme(mapping.scheme(layer))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"multipliers": (1, 3)}, "need 1 orders"),
            ({"head_sizes": ((5, 7), (11,))}, "equally many heads"),
            ({"head_sizes": ()}, "equally many heads"),
            ({"head_sizes": ((0, 7), (11, 13))}, "must be >= 1"),
            ({"head_offsets": ((0, 5), (12, -23))}, "offsets >= 0"),
            ({"multipliers": (1, 3, 2**62)}, "63-bit"),
            ({"multipliers": (1, 3, -5)}, "63-bit"),
            ({"pad_id": None}, "pad_id"),
            ({"kind": "ple"}, "eos_token_id"),
        ],
    )
    def test_foreign_schemes_are_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(FormatError, match=message):
            check_scheme(dataclasses.replace(small().scheme(3), **change))

    def test_published_parameters_are_kept(self) -> None:
        assert small().scheme(7).parameters == SMALL

    def test_offsets_follow_one_another(self) -> None:
        assert head_offsets([[5, 7], [11, 13]]) == ((0, 5), (12, 23))

    def test_a_prime_serves_one_head_only(self) -> None:
        schemes = engram_schemes(compressed_vocab_size=100, **{**SMALL, "vocab_size_per_ngram": [50, 50]})
        sizes = [size for scheme in schemes for row in scheme.head_sizes for size in row]
        assert sizes == [53, 59, 61, 67, 71, 73, 79, 83]

    def test_a_vocabulary_of_one(self) -> None:
        scheme = ple_scheme(
            vocab_size=1,
            eos_token_id=0,
            ngram_size=2,
            heads_per_ngram=1,
            ngram_vocab_base=2,
            seed=0,
            layer_index=0,
        )
        assert NgramHashMapping.from_scheme(scheme).row_ids([0, 0], 0).tolist() == [[0], [0]]


def test_primes_against_a_sieve() -> None:
    bound = 20_000
    sieve = np.ones(bound, dtype=bool)
    sieve[:2] = False
    for number in range(2, 142):
        sieve[number * number :: number] = False
    expected = np.flatnonzero(sieve).tolist()
    assert [number for number in range(-3, bound) if is_prime(number)] == expected
    following = primes_from(14)
    assert [next(following) for _ in range(3)] == [17, 19, 23]


@pytest.mark.parametrize("composite", [3215031751, 3825123056546413051, 318665857834031151167461])
def test_strong_pseudoprimes_are_no_primes(composite: int) -> None:
    assert not is_prime(composite)
    assert is_prime(2**61 - 1)


class TestLookback:
    TOKENS = np.random.default_rng(1).integers(0, 6, (3, 12))

    def test_one_token_at_a_time(self) -> None:
        mapping = small()
        state = mapping.lookback(3)
        for t in range(12):
            step = self.TOKENS[:, t : t + 1]
            for layer in mapping.layer_ids:  # one state serves all layers
                whole = mapping.row_ids(self.TOKENS, layer)
                np.testing.assert_array_equal(mapping.row_ids(step, layer, lookback=state)[:, 0], whole[:, t])
            state.advance(step)

    def test_accepted_drafts(self) -> None:
        mapping, accepted = small(), [0, 4, 2]
        state = mapping.lookback(3)
        state.advance(self.TOKENS[:, :5])
        state.advance(self.TOKENS[:, 5:9], lengths=accepted)
        for b, count in enumerate(accepted):
            single = mapping.lookback()
            single.advance(self.TOKENS[b, : 5 + count])
            np.testing.assert_array_equal(state.ids[b], single.ids[0])

    def test_copy_and_restore(self) -> None:
        state = small().lookback(3)
        state.advance(self.TOKENS[:, :3])
        before, snapshot = state.ids, state.copy()
        state.advance(self.TOKENS[:, 3:])
        np.testing.assert_array_equal(snapshot.ids, before)
        assert (state.ids != before).any()
        state.restore(snapshot)
        state.advance(self.TOKENS[:, 3:4])
        np.testing.assert_array_equal(snapshot.ids, before)

    def test_select_and_reset(self) -> None:
        state = small().lookback(3)
        state.advance(self.TOKENS)
        before = state.ids
        state.select([2, 0, 2, 1])
        np.testing.assert_array_equal(state.ids, before[[2, 0, 2, 1]])
        state.reset([1, 3])
        assert (state.ids[[1, 3]] == -1).all()
        np.testing.assert_array_equal(state.ids[[0, 2]], before[[2, 2]])

    def test_a_refused_step_changes_nothing(self) -> None:
        state = small().lookback(2)
        state.advance([[3], [4]])
        before = state.ids
        with pytest.raises(IdOutOfRange, match=r"token_ids\[1, 1\] is 6"):
            state.advance([[0, 0], [0, 6]])
        np.testing.assert_array_equal(state.ids, before)
        state.advance([[0, 0], [0, 6]], lengths=[2, 1])  # what is not stepped over is not looked at

    def test_refusals(self) -> None:
        mapping, state = small(), small().lookback(2)
        with pytest.raises(BadRequest, match="hold 3 sequences, the lookback follows 2"):
            mapping.ngram_keys(self.TOKENS, 3, lookback=state)
        with pytest.raises(BadRequest, match="hold 3 sequences, the lookback follows 2"):
            state.advance(self.TOKENS)
        with pytest.raises(BadRequest, match="mapping's own lookback"):
            qwen().ngram_keys([[1], [2]], 0, lookback=state)
        with pytest.raises(BadRequest, match="another hash mapping"):
            qwen().lookback().restore(state)
        for lengths in ([1], [1, -1], [1, 3]):
            with pytest.raises(BadRequest, match=r"lengths must be \[2\] numbers of 0\.\.2"):
                state.advance([[0, 0], [0, 0]], lengths=lengths)
        for indices in ([2], [-1], [[0]]):
            with pytest.raises(BadRequest, match=r"indices must be"):
                state.select(indices)
