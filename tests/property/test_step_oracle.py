"""A step against plain look-ups of the checkpoint: any shape, dead positions, lookback, drafts, equal or not.

What a step must return is worked out from whole sequences, hashed at once without a lookback, and from the
checkpoint's rows. The vocabulary has three ids, so positions that are equal are the rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engram_client import Client, CompressedTokenizer, StepPrefetcher, connect
from engram_client.step import find_distinct
from tests.support.stores import V41, V41_14, V41_ROWS, WORDS, PackedStore, opened, small_config

LAYERS = {1: V41, 4: V41_ROWS, 9: V41_14, 14: V41_14}  # two share a table, two hash alike
LAYER_HASHED = {1: 1, 4: 14, 9: 14, 14: 14}
TOKENS = st.integers(0, len(WORDS) - 1)
EXAMPLES = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def client(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = packed.copy_to(tmp_path_factory.mktemp("steps"))
    with opened(folder, small_config(350_000)), connect(f"local:{folder}") as client:
        yield client


@pytest.fixture(scope="module")
def prefetchers(client: Client, packed: PackedStore) -> dict[bool | None, StepPrefetcher]:
    tokenizer = CompressedTokenizer(packed.directory.parent / "tokenizer.json")
    tables = {layer: client.table(name) for layer, name in LAYERS.items()}
    return {dedupe: StepPrefetcher(tables, tokenizer, dedupe=dedupe) for dedupe in (None, True, False)}


def expected(
    steps: StepPrefetcher, packed: PackedStore, layer: int, text: np.ndarray, dead: np.ndarray, first: int
) -> np.ndarray:
    """Rows of text[..., first:] [n, T], hashed as whole sequences; zeros where dead."""
    keys = steps.mapping.ngram_keys(text, LAYER_HASHED[layer], dead)[:, first:]
    keys[dead[:, first:]] = -1
    return packed.oracles[LAYERS[layer]].lookup_ngrams(keys)


@EXAMPLES
@given(dedupe=st.sampled_from([None, True, False]), batch=st.integers(0, 4), data=st.data())
def test_chunks_of_sequences(
    prefetchers: dict[bool | None, StepPrefetcher],
    packed: PackedStore,
    dedupe: bool | None,
    batch: int,
    data: st.DataObject,
) -> None:
    steps = prefetchers[dedupe]
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    shape = (batch, sum(lengths))
    text = data.draw(arrays(np.int64, shape, elements=TOKENS))
    dead = data.draw(arrays(np.bool_, shape))
    lookback, at = steps.lookback(batch), 0
    for length in lengths:
        part = slice(at, at + length)
        with steps.start(text[:, part], dead[:, part], lookback=lookback) as step:
            lookback.advance(text[:, part], dead[:, part])
            for layer in data.draw(st.permutations(list(LAYERS))):
                rows = expected(steps, packed, layer, text[:, : at + length], dead[:, : at + length], at)
                assert np.array_equal(step.wait(layer), rows)
                out = np.full_like(rows, 7)
                assert step.wait(layer, out=out) is out
                assert np.array_equal(out, rows)
        at += length
    assert steps.open_steps == 0


@EXAMPLES
@given(
    dedupe=st.sampled_from([None, True, False]),
    batch=st.integers(1, 3),
    candidates=st.integers(1, 3),
    data=st.data(),
)
def test_drafts(
    prefetchers: dict[bool | None, StepPrefetcher],
    packed: PackedStore,
    dedupe: bool | None,
    batch: int,
    candidates: int,
    data: st.DataObject,
) -> None:
    """Draft after draft: each is chosen from and accepted in part, which moves the lookback on."""
    steps = prefetchers[dedupe]
    lookback = steps.lookback(batch)
    texts: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(3):
        shape = (batch, candidates, data.draw(st.integers(1, 4)))
        drafts = data.draw(arrays(np.int64, shape, elements=TOKENS))
        dead = data.draw(arrays(np.bool_, shape)) if candidates == 1 else np.zeros(shape, bool)
        picks = data.draw(arrays(np.int64, batch, elements=st.integers(0, candidates - 1)))
        accepted = data.draw(arrays(np.int64, batch, elements=st.integers(0, shape[2])))
        with steps.start_drafts(drafts, dead, lookback=lookback) as step:
            whole = {layer: step.wait(layer) for layer in (1, 9)}
            assert step.choose(picks) is step
            assert step.shape == (batch, shape[2])
            for b in range(batch):
                for layer in LAYERS:
                    for c in range(candidates) if layer in whole else ():
                        text = np.array([texts[b] + drafts[b, c].tolist()])
                        masked = np.array([[False] * len(texts[b]) + dead[b, c].tolist()])
                        rows = expected(steps, packed, layer, text, masked, len(texts[b]))[0]
                        assert np.array_equal(whole[layer][b, c], rows)
                        if c == picks[b]:
                            assert np.array_equal(step.wait(layer)[b], rows)
            assert np.array_equal(step.dead, dead[np.arange(batch), picks])
        if candidates == 1:
            accepted[:] = 0  # a dead position in the text is the other test's business
        chosen = drafts[np.arange(batch), picks]
        lookback.advance(chosen, lengths=accepted)
        for b in range(batch):
            texts[b] += chosen[b, : accepted[b]].tolist()
    assert steps.open_steps == 0


@given(keys=arrays(np.int64, st.tuples(st.integers(0, 60), st.integers(1, 3)), elements=st.integers(-1, 2)))
def test_distinct_lines_put_together_are_all_lines(keys: np.ndarray) -> None:
    found = find_distinct(keys)
    lines = {tuple(line) for line in keys.tolist()}
    assert len(found.lines) == len(lines)
    again = found.lines if found.inverse is None else found.lines[found.inverse]
    assert np.array_equal(again, keys)
