"""What the shares of a sharded training agree on: one training, one world, the same tables, one step.

Ranks agree before they begin, and whoever puts shares together afterwards checks the same things.
"""

from __future__ import annotations

import hashlib
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
                f"start {part.world} ranks, each with the store of its share, or deal the rows out anew "
                "(tierstore reshard)"
            )


def summary(tables: Tables) -> dict[str, Any]:
    """What must be equal on all ranks, as JSON."""
    return {
        name: {
            "rows": d.partition.rows if d.partition else None,
            "fields": [[f.name, f.dtype, f.count] for f in d.spec.layout.fields],
            "scheme": repr(d.partition.scheme) if d.partition else None,
            "optimizer": d.optimizer,
            "initial rows": d.initial,
            "training.not_finite": d.not_finite,
        }
        for name, d in tables.items()
    }


def check_equal(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadRequest, naming the first rank whose tables are not rank 0's, and what is different."""
    for rank, other in enumerate(summaries):
        names = [*summaries[0], *(name for name in other if name not in summaries[0])]
        for name in names:
            first, its = summaries[0].get(name), other.get(name)
            if first is not None and its is not None:
                what = [key for key in first if first[key] != its.get(key)]
                first, its = ({key: each.get(key) for key in what} for each in (first, its))
            if first != its:
                raise BadRequest(
                    f"shares of table {name!r} are not of one table: rank 0 has {first}, rank {rank} has "
                    f"{its}; create them with the same arguments, and configure all ranks alike"
                )
        if list(other) != list(summaries[0]):
            raise BadRequest(f"rank {rank} has its tables in another order: create them in the same one")


def training_of(uuids: Sequence[Sequence[str]]) -> str:
    """The name of the training whose rank r has tables of uuids[r]: 32 hexadecimal digits.

    It follows from the shares alone, so ranks need not draw one together. Commits keep it: a share tells by
    it whose shares it has learned with.
    """
    told = ";".join(",".join(one) for one in uuids)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def check_training(told: Sequence[str], expected: str, names: Sequence[str]) -> None:
    """Raises BadRequest unless these shares have learned with each other, or with none yet ("")."""
    if strangers := [name for name, each in zip(names, told, strict=True) if each not in ("", expected)]:
        fresh = [name for name, each in zip(names, told, strict=True) if not each]
        also = f"; {', '.join(fresh)} with none yet" if fresh else ""
        raise BadRequest(
            f"shares are not of one training: {', '.join(strangers)} learned with other shares than "
            f"these{also}; give the stores that were trained together"
        )


def common_step(
    kept: Sequence[Sequence[int]],
    wanted: int | None = None,
    *,
    names: Sequence[str] = (),
    go_back: str = "ShardedTraining(..., step={})",
) -> int:
    """The last step that all ranks keep, of the steps each keeps; `wanted` instead, if all keep that.

    A commit begins only when all ranks have the one before, so a crash leaves some ranks one step ahead,
    never two: where that is not so, some store is not of this training, and going back would lose what others
    have learned. `names` are what errors call ranks; `go_back` is how a step is wanted. Raises StepConflict.
    """
    names = names or [f"rank {rank}" for rank in range(len(kept))]
    told = "; ".join(f"{name} keeps {_shortened(steps)}" for name, steps in zip(names, kept, strict=True))
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
    for name, steps in zip(names, kept, strict=True):
        if sum(step > last for step in steps) > 1:
            raise StepConflict(
                f"the last step that all ranks keep is {last}, and {name} is more than one commit "
                f"ahead, which no crash does: {told}; is some store an old copy, or new? "
                f"{go_back.format(last)} goes back to it all the same"
            )
    return last


def _shortened(steps: Sequence[int]) -> str:
    """The last ones; a store's log may hold thousands."""
    return str(list(steps)) if len(steps) <= 8 else f"[..., {str(list(steps[-8:]))[1:]}"
