"""A plan's arithmetic against the same thing done by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tierbench.hitrate.tiers import Budgets
from tierbench.plan.candidates import Prices, cheapest
from tierbench.plan.check import beside
from tierbench.plan.figures import Figures, load_figures
from tierbench.plan.timing import Shape, Steps, Target, Timing, in_the_way

from engram_client.errors import BadRequest, FormatError, StorageError

GIB = 1 << 30
FIGURES = Figures(
    transport="unix",
    record_bytes=1000,
    call_us=5.0,
    record_us=0.5,
    first_read_us=(100.0, 100.0),
    reads_per_s=50_000.0,
    reads_burst_per_s=80_000.0,
    disk_s=20.0,
    row_file_bytes=GIB,
)
SHAPE = Shape(records_per_token=6, record_bytes=2000)


def steps(*columns: tuple[int, int, int, int, int]) -> Steps:
    """(tokens, look-ups, missed, pages, held) of each step."""
    return Steps(*np.array(columns, np.int64).T)


def target(**changes: float) -> Target:
    return dataclasses.replace(Target(tokens_per_s=1000.0, step_tokens=4, waiting_share=0.05), **changes)


def test_a_step_is_the_sum_of_its_terms() -> None:
    timing = Timing(steps((4, 2, 0, 0, 0), (4, 2, 3, 24, 0), (4, 2, 1, 8, 0)), SHAPE, FIGURES, target())
    copying = 24 * 1.0  # twice the bytes that the figures were taken with
    assert timing.terms["calls"].tolist() == [10, 10, 10]
    assert timing.terms["copying"].tolist() == [copying] * 3
    assert timing.terms["first reads"].tolist() == [0, 200, 100]  # two tables, and one record alone
    assert timing.terms["reads"].tolist() == [0, 24 * 20, 8 * 20]
    assert timing.fetch_us.tolist() == [34, 714, 294]
    assert timing.period_us.tolist() == [4000] * 3
    assert timing.waiting_share == pytest.approx((34 + 714 + 294) / 12_000)
    assert timing.disk_share == pytest.approx(32 * 20 / 12_000)
    assert not timing.meets
    ahead = Timing(steps((4, 2, 0, 0, 0), (4, 2, 3, 24, 0)), SHAPE, FIGURES, target(ahead_us=600))
    assert ahead.waiting_us.tolist() == [0, 114]


def test_short_steps_last_as_long_as_full_ones_and_long_ones_longer() -> None:
    assert target().periods_us(np.array([1, 4, 512])).tolist() == [4000, 4000, 512_000]


def test_a_gpu_costs_copies_and_saves_others() -> None:
    gpu = dataclasses.replace(FIGURES, to_device_us=10.0, to_device_bytes_per_s=1e9, hbm_record_us=0.01)
    timing = Timing(steps((4, 2, 0, 0, 20)), SHAPE, gpu, target())
    assert timing.terms["copying"].tolist() == pytest.approx([4 * 1.0 + 20 * 0.02])
    assert timing.terms["device"].tolist() == pytest.approx([2 * 10 + 4 * 2000 / 1e9 * 1e6])


def test_first_reads_are_drawn_from_what_was_measured() -> None:
    figures = dataclasses.replace(FIGURES, first_read_us=(100.0, 200.0, 900.0))
    counts = np.array([0, 1, 3, 20_000])
    drawn = figures.draw_first_reads(counts, np.random.default_rng(4))
    assert drawn[0] == 0
    assert 100 <= drawn[1] <= 900
    assert drawn[3] / 20_000 == pytest.approx((150 + 550) / 2, rel=0.02)
    assert (figures.draw_first_reads(counts, np.random.default_rng(4)) == drawn).all()


def test_a_step_that_is_late_holds_up_the_next() -> None:
    slow = steps((1, 1, 0, 0, 0), (1, 1, 1, 300, 0), (1, 1, 0, 0, 0), (1, 1, 0, 0, 0))
    timing = Timing(slow, Shape(1, 1000), FIGURES, target(step_tokens=1, tokens_per_s=200))
    assert timing.fetch_us.tolist() == [5.5, 6105.5, 5.5, 5.5]
    assert timing.from_due_us().tolist() == pytest.approx([5.5, 6105.5, 1111.0, 5.5])


def test_what_is_in_the_way_is_named() -> None:
    goal = target(waiting_share=0.01)
    few = Timing(steps((4, 2, 3, 24, 0)), SHAPE, FIGURES, goal)
    said = "\n".join(in_the_way(few, goal, 0.3))
    assert "reads 12.00%, first reads 5.00%" in said
    assert "30.0% of accesses are the first" in said
    assert "the disk" not in said
    many = Timing(steps((4, 2, 24, 2000, 0)), SHAPE, FIGURES, goal)
    said = "\n".join(in_the_way(many, goal, 0.3))
    assert "the disk: busy 1000% of the time" in said
    assert "14.3 such disks" in said
    assert "does not keep up" in said
    none = Timing(steps((4, 2, 0, 0, 0)), SHAPE, dataclasses.replace(FIGURES, call_us=500.0), goal)
    said = "\n".join(in_the_way(none, goal, 0.0))
    assert "Fetching is calls 25.00%" in said
    assert "first to their record" not in said
    assert in_the_way(none, target(waiting_share=0.5), 0.0) == []


def test_the_cheapest_that_meets_the_target() -> None:
    plans = [
        {"meets": False, "price": 1.0, "waiting_share": 0.1},
        {"meets": True, "price": 3.0, "waiting_share": 0.01},
        {"meets": True, "price": 2.0, "waiting_share": 0.04},
        {"meets": True, "price": 2.0, "waiting_share": 0.02},
    ]
    assert cheapest(plans) == 3
    assert cheapest(plans[:1]) is None
    prices = Prices(hbm=20, dram=4, nvme=0.5)
    assert prices.of(Budgets(GIB, 2 * GIB, 3 * GIB), 10 * GIB) == 20 + 8 + 6.5


def test_errors_are_told_of_what_was_seen() -> None:
    assert beside("x", 0.5, 0.25, "points")["error"] == 25.0
    assert beside("x", 150, 100)["error"] == 0.5
    assert beside("x", 1, 0)["error"] is None
    assert beside("x", 0, 0)["error"] == 0.0


class TestFigures:
    def test_from_a_record_and_from_themselves(self, tmp_path: Path) -> None:
        plain, record = tmp_path / "plain.json", tmp_path / "record.json"
        plain.write_text(json.dumps(dataclasses.asdict(FIGURES)))
        record.write_text(json.dumps({"results": {"figures": dataclasses.asdict(FIGURES)}}))
        assert load_figures(plain) == load_figures(record) == FIGURES

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "not JSON"),
            ("[]", "not the figures of a machine"),
            ('{"results": {"curves": 1}}', "not the figures of a machine"),
            (json.dumps(dataclasses.asdict(FIGURES) | {"call_us": 0}), "call_us is 0"),
            (json.dumps(dataclasses.asdict(FIGURES) | {"reads_per_s": "fast"}), "reads_per_s is 'fast'"),
            (json.dumps(dataclasses.asdict(FIGURES) | {"first_read_us": [2, 1]}), "rising percentiles"),
            (json.dumps(dataclasses.asdict(FIGURES) | {"first_read_us": 5}), "figures"),
            (json.dumps(dataclasses.asdict(FIGURES) | {"hbm_record_us": -1}), "hbm_record_us is -1"),
        ],
    )
    def test_others_are_refused(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "figures.json"
        path.write_text(text)
        with pytest.raises(FormatError, match=r"figures\.json") as caught:
            load_figures(path)
        assert said in str(caught.value)

    def test_absent_ones(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="cannot be read"):
            load_figures(tmp_path / "absent")

    def test_numbers_that_cannot_be(self) -> None:
        with pytest.raises(BadRequest, match="record_us"):
            dataclasses.replace(FIGURES, record_us=float("nan"))
