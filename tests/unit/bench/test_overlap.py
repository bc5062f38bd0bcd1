"""The overlap benchmark's own parts: its model is a causal one, and sources that disagree are found out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tierbench.ahead.busy_caller import turns_for, work
from tierbench.overlap.figures import PREFETCHED, crossings
from tierbench.overlap.model import Cache, Shape, Transformer
from tierbench.overlap.windows import run_window, run_windows
from torch import Tensor

from engram_client.errors import DataCorrupt

SHAPE = Shape(hidden=64, layers=3, engram_layers=(1,), row_width=32)


class Rows:
    """Embeddings that follow from the token alone; `wrong` changes those of one step."""

    def __init__(self, wrong: int | None = None) -> None:
        self.waited_s: dict[int, list[float]] = {1: []}
        self.begun: list[int] = []
        self.order: list[str] = []
        self._wrong = wrong
        self._steps: list[np.ndarray] = []
        self._over = 0

    def begin(self, batch: int) -> None:
        self.begun.append(batch)

    def start(self, tokens: np.ndarray) -> None:
        self.order.append("start")
        self._steps.append(tokens)

    def rows(self, layer: int) -> Tensor:
        self.order.append("rows")
        self.waited_s[layer].append(0.5)
        numbers = torch.from_numpy(self._steps[0] % 7).float()
        if self._over == self._wrong:
            numbers = numbers + 1
        return numbers[..., None, None].expand(*numbers.shape, 4, 8)

    def end_step(self) -> None:
        self.order.append("end")
        self._steps.pop(0)
        self._over += 1


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SHAPE, seed=3).eval()


def test_pieces_of_any_length_give_the_whole(model: Transformer) -> None:
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 9000, (2, 12)))

    def outputs(cuts: list[int]) -> Tensor:
        cache, found = Cache(SHAPE, 2, 12), []
        for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
            source = Rows()
            source.start(tokens[:, start:stop].numpy())
            found.append(model(tokens[:, start:stop], cache, source.rows))
        return torch.cat(found, dim=1)

    whole = outputs([])
    torch.testing.assert_close(outputs(list(range(1, 12))), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs([5, 6]), whole, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(whole[:, 0], whole[:, 1]).all()


def test_a_chunk_starts_the_next_ones_rows(model: Transformer) -> None:
    steps = np.zeros((3, 2, 4), np.int64)
    source = Rows()
    window = run_window(model, source, steps, ahead=True)
    assert source.order == ["start", "start", "rows", "end", "start", "rows", "end", "rows", "end"]
    assert source.begun == [2]
    assert window.waited_s == {1: [0.5] * 3}
    rest = window.after(1)
    assert (rest.step_s, rest.waited_s) == (window.step_s[1:], {1: [0.5] * 2})
    source = Rows()
    run_window(model, source, steps, ahead=False)
    assert source.order == ["start", "rows", "end"] * 3


def test_a_source_with_other_rows_ends_the_run(model: Transformer) -> None:
    texts = np.random.default_rng(2).integers(0, 9000, (2, 3, 2, 1))
    same = run_windows(model, {"a": Rows(), "b": Rows()}, texts, ahead=False, label="test")
    assert [len(windows) for windows in same.values()] == [2, 2]
    with pytest.raises(DataCorrupt, match="step 1 of window 1 differs between b and a"):
        run_windows(model, {"a": Rows(), "b": Rows(wrong=4)}, texts, ahead=False, label="test")


def test_crossings_say_where_the_bar_is_missed() -> None:
    def size(hidden: int, ratio: float) -> dict[str, object]:
        over = {"over_resident": {"ratio_median": ratio}}
        tenth = {PREFETCHED: over, "compute_ms_a_layer": hidden / 100, "read_ms_a_layer": 2.0}
        return {"kind": "decode", "batch": 1, "length": 1, "threads": 1, "hidden": hidden, "tenth": tenth}

    (found,) = crossings([size(100, 1.2), size(200, 1.03), size(400, 0.99)])
    assert found["over_at"] == [100]
    assert found["within_at"] == [200, 400]
    assert [s["compute_over_read"] for s in found["sizes"]] == [0.5, 1.0, 2.0]


def test_being_busy_is_at_least_one_turn_of_work() -> None:
    assert turns_for(0.0) == 1
    assert work(3) == 27
