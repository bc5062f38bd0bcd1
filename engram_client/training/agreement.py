"""What the ranks of a sharded training agree on before they begin: one world, the same tables, one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram_client.errors import BadRequest, StepConflict
from engram_client.transport.training import TrainedDescription

Tables = Mapping[str, TrainedDescription]
AS_CREATED = 0  # the step that every share begins with, so that there is always one that all have


def check_shares(tables: Tables, rank: int, world: int) -> None:
    """Raises BadRequest unless every table is share `rank` of `world`."""
    for name, description in tables.items():
        part = description.partition
        if part is None:
            raise BadRequest(
                f"table {name!r} of this store is whole; make shares "
                f"(tierstore create --share {rank}/{world})"
            )
        if (part.rank, part.world) != (rank, world):
            raise BadRequest(
                f"table {name!r} is share {part.rank} of {part.world}, opened by rank {rank} of {world}; "
                f"start {part.world} ranks, each with the store of its share"
            )


def summary(tables: Tables) -> dict[str, Any]:
    """What must be equal on all ranks, as JSON."""
    return {
        name: {
            "rows": d.partition.rows if d.partition else None,
            "fields": [[f.name, f.dtype, f.count] for f in d.spec.layout.fields],
            "scheme": repr(d.partition.scheme) if d.partition else None,
            "optimizer": d.optimizer,
        }
        for name, d in tables.items()
    }


def check_equal(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadRequest, naming the first rank whose tables are not rank 0's."""
    for rank, other in enumerate(summaries):
        names = [*summaries[0], *(name for name in other if name not in summaries[0])]
        for name in names:
            if summaries[0].get(name) != other.get(name):
                raise BadRequest(
                    f"shares of table {name!r} are not of one table: rank 0 has {summaries[0].get(name)}, "
                    f"rank {rank} has {other.get(name)}; create them with the same arguments"
                )
        if list(other) != list(summaries[0]):
            raise BadRequest(f"rank {rank} has its tables in another order: create them in the same one")


def common_step(kept: Sequence[Sequence[int]], wanted: int | None = None) -> int:
    """The last step that all ranks keep, of the steps each keeps; `wanted` instead, if all keep that.

    A commit begins only when all ranks have the one before, so a crash leaves some ranks one step ahead,
    never two: where that is not so, some store is not of this training, and going back would lose what others
    have learned. Raises StepConflict.
    """
    told = "; ".join(f"rank {rank} keeps {list(steps)}" for rank, steps in enumerate(kept))
    common = set(kept[0]).intersection(*kept[1:])
    if wanted is not None:
        if wanted not in common:
            raise StepConflict(f"step {wanted} is not kept by all ranks: {told}")
        return wanted
    if not common:
        raise StepConflict(
            f"no step is kept by all ranks: {told}; shares need training.keep_steps of 2 or more, and a "
            "store that was lost must come back from a copy of a step the others keep"
        )
    last = max(common)
    for rank, steps in enumerate(kept):
        if sum(step > last for step in steps) > 1:
            raise StepConflict(
                f"the last step that all ranks keep is {last}, and rank {rank} is more than one commit "
                f"ahead, which no crash does: {told}; is some store an old copy, or new? "
                f"ShardedTraining(..., step={last}) goes back to it all the same"
            )
    return last
