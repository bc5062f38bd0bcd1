"""Who keeps which row, what a share saves of it, and the step that ranks go on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client import connect
from engram_client.agreement import check_equal, check_shares, common_step
from engram_client.errors import BadRequest, FormatError, StepConflict
from engram_client.partition import Partition
from engram_client.transport.training import TrainedDescription
from engram_client.wire.training import description_from_message, description_to_message
from tierstore.snapshots.rows import numbers_of, open_step
from tierstore.training.creating import NewTable, create_training
from tierstore.updates import TrainedSpec


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 20, 101])
def test_every_row_has_one_owner_and_shares_have_no_gaps(rows: int, world: int) -> None:
    kept = []
    for rank in range(world):
        part = Partition(rank, world, rows)
        ids = np.arange(rows)
        mine = ids[part.owners(ids) == rank]
        assert part.places(mine).tolist() == list(range(mine.size))
        assert part.row_ids(part.places(mine)).tolist() == mine.tolist()
        assert part.store_rows == max(1, mine.size)
        kept += mine.tolist()
    assert sorted(kept) == list(range(rows))


def test_a_share_begins_with_the_rows_of_the_whole_table(tmp_path: Path) -> None:
    whole, shares = tmp_path / "whole", [tmp_path / str(rank) for rank in range(3)]
    options = {"optimizer": "sgd", "initial_std": 0.5, "seed": 3, "learning_rate": 0.1}
    create_training(whole, [NewTable("words", 100, 4)], **options)
    with connect(f"local:{whole}") as client:
        expected = client.training().table("words").lookup(np.arange(100))
    for rank, folder in enumerate(shares):
        create_training(folder, [NewTable("words", 100, 4)], share=(rank, 3), **options)
        with connect(f"local:{folder}") as client:
            training = client.training()
            with pytest.raises(BadRequest, match=rf"share {rank} of 3 .*ShardedTraining"):
                training.table("words")
            share = training.share("words")
            np.testing.assert_array_equal(share.lookup(np.arange(share.spec.rows)), expected[rank::3])
            described = share.description
            assert described.initial == {"kind": "normal", "std": 0.5, "seed": 3}
            assert description_from_message(description_to_message(described)) == described
            check_shares({"words": described}, rank, 3)
            for other in ((rank, 4), ((rank + 1) % 3, 3)):
                with pytest.raises(BadRequest, match=f"share {rank} of 3, opened by rank"):
                    check_shares({"words": described}, *other)


def test_a_whole_table_and_an_unknown_rule_are_refused(tmp_path: Path) -> None:
    (spec,) = create_training(tmp_path, [NewTable("words", 9, 4)], optimizer="sgd", share=(1, 2))
    saved = spec.to_json()
    assert TrainedSpec.from_json(saved) == spec
    saved["partition"]["rule"] = "by size"
    with pytest.raises(FormatError, match="by size"):
        TrainedSpec.from_json(saved)
    with pytest.raises(BadRequest, match="has 4 rows, got 9"):
        TrainedSpec("words", 9, spec.layout, partition=spec.partition)
    whole = TrainedDescription(spec, {})  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="whole; make shares"):
        check_shares({"words": whole}, 0, 2)


def test_a_share_alone_is_not_exported(tmp_path: Path) -> None:
    create_training(tmp_path, [NewTable("words", 9, 4)], optimizer="sgd", share=(1, 2))
    with connect(f"local:{tmp_path}") as client:
        client.training().commit(0)
    with pytest.raises(BadRequest, match=r"share 1 of 2 .*cannot be exported"), open_step(tmp_path) as rows:
        numbers_of(rows, [])


def test_shares_of_different_tables_are_told_apart() -> None:
    with pytest.raises(BadRequest, match=r"rank 1 has \{'rows': 8\}"):
        check_equal([{"words": {"rows": 9}}, {"words": {"rows": 8}}])
    with pytest.raises(BadRequest, match=r"'more'.* rank 0 has None"):
        check_equal([{"words": {"rows": 1}}, {"words": {"rows": 1}, "more": {"rows": 1}}])
    with pytest.raises(BadRequest, match="another order"):
        check_equal([{"a": {}, "b": {}}, {"b": {}, "a": {}}])


def test_ranks_go_on_from_the_last_step_that_all_have() -> None:
    assert common_step([[2, 5], [2, 5]]) == 5
    assert common_step([[2, 5], [0, 2], [2, 5]]) == 2
    assert common_step([[2, 5], [2, 5]], 2) == 2
    for kept, wanted, told in (
        ([[2, 5], [6, 7]], None, "no step is kept by all ranks: rank 0 keeps"),
        ([[0, 5, 6], [0]], None, "rank 0 is more than one commit ahead"),
        ([[2, 5], [5]], 2, "step 2 is not kept by all ranks"),
    ):
        with pytest.raises(StepConflict, match=told):
            common_step(kept, wanted)
    assert common_step([[0, 5, 6], [0]], 0) == 0
