"""The life of a step: late, cancelled, dropped, refused; over every transport."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_client import Client, CompressedTokenizer, StepPrefetcher, connect, errors
from engram_client.modules import DeepseekV41Engram, EngramLayer, EngramLookup, StepRows
from tests.support.daemon import Daemon
from tests.support.stores import PLAIN, PLE, V41, V41_14, Device, PackedStore, opened, small_config

TABLES = {1: V41, 14: V41_14}
BUDGET = 128 << 20


@pytest.fixture(scope="module")
def tokenizer(packed: PackedStore) -> CompressedTokenizer:
    return CompressedTokenizer(packed.directory.parent / "tokenizer.json")


def made(client: Client, tokenizer: Any, **options: Any) -> StepPrefetcher:
    return StepPrefetcher({layer: client.table(name) for layer, name in TABLES.items()}, tokenizer, **options)


def text(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape)


def rows_of(packed: PackedStore, steps: StepPrefetcher, layer: int, tokens: np.ndarray) -> np.ndarray:
    return packed.oracles[TABLES[layer]].lookup_ngrams(steps.mapping.ngram_keys(tokens, layer))


@pytest.mark.parametrize("target", ["unix", "tcp"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 700)])
def test_a_daemon_answers_steps(
    packed: PackedStore, daemon: Daemon, tokenizer: Any, target: str, shape: tuple[int, int]
) -> None:
    """1400 positions are enough that equal ones are asked for once, where rows travel."""
    with connect(getattr(daemon, target)) as client:
        steps, tokens = made(client, tokenizer), text(*shape)
        before = client.stats()["keys"]
        with steps.start(tokens) as step:
            for layer in TABLES:
                assert np.array_equal(step.wait(layer, timeout=30), rows_of(packed, steps, layer, tokens))
        asked = client.stats()["keys"] - before
        wanted = len(TABLES) * tokens.size * 3
        travels = not client.table(V41).reads_hits_itself
        assert asked < wanted if travels and tokens.size > 512 else asked == wanted


def test_tensors_come_in_and_go_out(packed: PackedStore, opened_store: Device, tokenizer: Any) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps, tokens = made(client, tokenizer, dedupe=True), text(2, 6)
        step = steps.start(torch.from_numpy(tokens), torch.zeros(2, 6, dtype=torch.bool))
        out = torch.empty(2, 6, 24, 264, dtype=torch.uint8)
        assert step.wait(14, out=out) is out
        assert np.array_equal(out.numpy(), rows_of(packed, steps, 14, tokens))
        for wrong in (out[:, :5], out.to(torch.int8), np.empty((2, 6, 24, 263), np.uint8)):
            with pytest.raises(errors.BadRequest, match="out must be"):
                step.wait(14, out=wrong)


def test_layers_are_asked_for_in_the_order_in_which_they_run(
    opened_store: Device, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        tables = {layer: client.table(name) for layer, name in reversed(TABLES.items())}
        asked: list[int] = []
        for layer, table in tables.items():
            plain = table.prefetch_ngrams
            monkeypatch.setattr(
                table,
                "prefetch_ngrams",
                lambda keys, layer=layer, plain=plain, **options: (
                    asked.append(layer) or plain(keys, **options)
                ),
            )
        steps = StepPrefetcher(tables, tokenizer)
        steps.start(text(3, 1)).close()
        assert asked == [1, 14] == list(steps.layer_ids)


def test_late_rows_are_an_error_and_never_stale(
    packed: PackedStore, opened_store: Device, tokenizer: Any
) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps, tokens = made(client, tokenizer), text(2, 3)
        out = np.full((2, 3, 24, 264), 9, np.uint8)
        with opened_store.device.held():
            step = steps.start(tokens)
            assert not step.done(14)
            for timeout in (0, 0.01):
                with pytest.raises(
                    errors.DeadlineExceeded, match=r"^layer 14 \(table 'v41-14'\): .*not there"
                ):
                    step.wait(14, out=out, timeout=timeout)
            assert (out == 9).all()
            assert steps.open_steps == 1
        assert np.array_equal(step.wait(14, out=out, timeout=30), rows_of(packed, steps, 14, tokens))
        assert step.done(14)
        assert steps.open_steps == 1
        step.wait(1, timeout=30)
        assert steps.open_steps == 0
        assert np.array_equal(step.wait(1), rows_of(packed, steps, 1, tokens))


def test_a_read_that_takes_too_long_names_its_layer(opened_store: Device, tokenizer: Any) -> None:
    with connect(f"local:{opened_store.directory}") as client, opened_store.device.held():
        steps = made(client, tokenizer, timeout_s=0.05)
        with (
            steps.start(text(2, 3)) as step,
            pytest.raises(errors.DeadlineExceeded, match=r"layer 1 .*'v41'"),
        ):
            step.wait(1, timeout=30)


def test_damage_names_its_layer_and_leaves_the_others(
    packed: PackedStore, opened_store: Device, tokenizer: Any
) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps, tokens = made(client, tokenizer), text(1, 4)
        opened_store.device.fail(range(10_000))
        step = steps.start(tokens)
        with pytest.raises(errors.StorageError, match=r"layer 1 \(table 'v41'\)"):
            step.wait(1, timeout=30)
        step.close()
        opened_store.device.heal()
        with steps.start(tokens) as step:
            assert np.array_equal(step.wait(1), rows_of(packed, steps, 1, tokens))


@pytest.fixture
def little_to_collect() -> Iterator[None]:
    """The collector looks at what a test makes, not at all that its process has imported and compiled."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_to_collect")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["close", "cancel", "drop", "wait", "with", "choose and drop", "half waited"])
def test_no_way_to_leave_a_step_leaks(
    packed: PackedStore, tmp_path: Path, tokenizer: Any, way: str, cached: bool
) -> None:
    """Far more steps than may be open, on a client with as many handles as one step takes."""
    folder = packed.copy_to(tmp_path)
    budget = small_config(BUDGET if cached else 0)
    with (
        opened(folder, budget),
        connect(f"local:{folder}", prefetch_handles_max=len(TABLES)) as client,
    ):
        steps, drafts = made(client, tokenizer, steps_open_max=1), text(2, 3, 2)
        for _ in range(20):
            step = steps.start_drafts(drafts)
            if way == "close":
                step.close()
            elif way == "cancel":
                step.cancel()
                step.cancel()
            elif way == "wait":
                for layer in TABLES:
                    step.wait(layer, timeout=30)
            elif way == "with":
                with pytest.raises(ZeroDivisionError), step:
                    raise ZeroDivisionError
            elif way == "choose and drop":
                step.choose([0, 2])
            elif way == "half waited":
                step.wait(1, timeout=30)
            del step
            gc.collect()
            assert steps.open_steps == 0


def test_a_step_that_is_given_up_says_so(opened_store: Device, tokenizer: Any) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps = made(client, tokenizer)
        with steps.start(text(1, 2)) as step:
            rows = step.wait(1)
            kept = rows.copy()
        with pytest.raises(errors.Cancelled, match=r"layer 1 \(table 'v41'\): this step was cancelled"):
            step.wait(1)
        assert step.done(14)
        for seed in range(20):
            steps.start(text(3, 5, seed=seed)).wait(1)
        assert np.array_equal(rows, kept), "rows that were handed out are the caller's"


def test_open_steps_are_bounded(opened_store: Device, tokenizer: Any) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps = made(client, tokenizer, steps_open_max=2)
        open_steps = [steps.start(text(1, 2)) for _ in range(2)]
        with pytest.raises(errors.Overloaded, match=r"2 steps are open.*steps_open_max"):
            steps.start(text(1, 2))
        open_steps[0].close()
        open_steps.append(steps.start(text(1, 2)))
        with pytest.raises(errors.Overloaded):
            steps.start(text(1, 2))


def test_a_step_that_cannot_be_started_whole_is_not_started(
    packed: PackedStore, tmp_path: Path, tokenizer: Any
) -> None:
    folder = packed.copy_to(tmp_path)
    with (
        opened(folder, small_config(0)) as store,
        connect(f"local:{folder}", prefetch_handles_max=3) as client,
        store.device.held(),
    ):
        steps = made(client, tokenizer)
        first = steps.start(text(1, 1))
        for _ in range(5):
            with pytest.raises(
                errors.Overloaded, match=r"layer 14 \(table 'v41-14'\): .*prefetch_handles_max"
            ):
                steps.start(text(1, 1))
        assert steps.open_steps == 1
        first.close()
        steps.start(text(1, 1)).close()


def test_arguments_are_checked(opened_store: Device, tokenizer: Any) -> None:
    with connect(f"local:{opened_store.directory}") as client:
        steps = made(client, tokenizer)
        with pytest.raises(errors.IdOutOfRange, match=r"token_ids\[0, 1\] is 4"):
            steps.start([[0, 4]])
        with pytest.raises(errors.BadRequest, match="dead must be bool"):
            steps.start([[0, 1]], [[False]])
        with pytest.raises(errors.BadRequest, match="2 sequences, the lookback follows 3"):
            steps.start(text(2, 1), lookback=steps.lookback(3))
        with pytest.raises(errors.BadRequest, match=r"drafts must be \[B,C,T\]"):
            steps.start_drafts(text(2, 3))
        assert steps.open_steps == 0
        step = steps.start_drafts(text(2, 3, 1))
        with pytest.raises(errors.BadRequest, match=r"layer 2 has no table.*\[1, 14\]"):
            step.wait(2)
        for wrong in ([0], [0, 3], [-1, 0]):
            with pytest.raises(errors.BadRequest, match=r"candidates must be \[2\] numbers of 0..2"):
                step.choose(wrong)
        with pytest.raises(errors.BadRequest, match="only drafts"):
            step.choose([0, 1]).choose([0, 0])
        for tables, what in (({}, "needs a table"), ({1: client.table(PLAIN)}, "'plain' has no hash scheme")):
            with pytest.raises(errors.BadRequest, match=what):
                StepPrefetcher(tables, tokenizer)
        with pytest.raises(errors.BadRequest, match="steps_open_max"):
            made(client, tokenizer, steps_open_max=0)
        with pytest.raises(errors.BadRequest, match="different families"):
            StepPrefetcher({1: client.table(V41_14), 2: client.table(PLE)}, tokenizer)
        with pytest.raises(errors.VocabularyMismatch):
            made(client, np.arange(4))


def test_modules_take_their_rows_from_a_step(opened_store: Device, tokenizer: Any) -> None:
    torch.manual_seed(4)
    with connect(f"local:{opened_store.directory}") as client:
        table = client.table(V41)
        engram = DeepseekV41Engram(hidden_size=8, hc_mult=2, embedding_dim=24 * 256)
        ids, hidden = text(2, 40), torch.randn(2, 40, 2, 8)
        dead = np.zeros((2, 40), bool)
        dead[1, 3:9] = True
        alone = EngramLayer(engram, EngramLookup(table.mapping(tokenizer), table, 1))
        expected = alone(hidden, alone.start(ids, dead))
        layer = EngramLayer(engram)
        for dedupe in (True, False):
            steps = made(client, tokenizer, dedupe=dedupe)
            with steps.start(ids, dead) as step:
                assert torch.equal(layer(hidden, StepRows(step, 1)), expected)
        with pytest.raises(errors.BadRequest, match="no source of its own"):
            layer.start(ids)
