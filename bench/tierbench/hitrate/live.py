"""The same look-ups against a running daemon: what it says of them beside what the simulation says.

One caller, one look-up after another, so the order is the same in both. A daemon answers a large look-up
in parts, and what an earlier part has brought a later one finds; so batches are cut to what goes in one
part, for both. Only a cache that begins empty can agree, so a daemon that has served before is told of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client import Client
from engram_client.errors import BadRequest, Unavailable
from engram_client.spec import TableSpec
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import TokenStream
from tierbench.hitrate.model import Model

PART_BYTES = 512 << 10  # of one look-up's answer
SETTLING_S = 5.0  # what a client found in shared memory is counted a little later
COUNTERS = ("dram_hits", "dram_misses", "records_read", "nvme_pages", "nvme_bytes", "extent_pages")


@dataclass(frozen=True)
class Live:
    """Shares of accesses, as a daemon counted them. `began_empty`: its cache held nothing before.

    `has_extent`: what its cache drops it may read from its record extent, and not from rows.
    """

    hit_rate: float
    records_read_per_access: float
    disk_bytes_per_token: float
    began_empty: bool
    has_extent: bool

    def beside(self, simulated: dict[str, Any]) -> dict[str, Any]:
        """Both, and their difference in points."""
        ours = {k: simulated[k] for k in ("hit_rate", "records_read_per_access", "disk_bytes_per_token")}
        return {
            "live": self.__dict__,
            "simulated": ours,
            "difference_points": 100 * (self.hit_rate - ours["hit_rate"]),
            "read_difference_points": 100 * (self.records_read_per_access - ours["records_read_per_access"]),
        }


def chosen_specs(client: Client, names: list[str]) -> list[TableSpec]:
    """The tables of these names, or all that are addressed by records. Raises UnknownTable, BadRequest.

    A daemon that serves records of several sizes moves its budget between them, so nobody can say
    what each has.
    """
    sizes = {spec.record_bytes for spec in client.tables().values()}
    if len(sizes) > 1:
        raise BadRequest(
            f"{client.target}: its budget is shared by records of {', '.join(map(str, sorted(sizes)))} "
            "bytes; serve one model's tables from a store of their own to compare"
        )
    if names:
        return [client.table(name).spec for name in names]
    found = [spec for spec in client.tables().values() if spec.addressing == "record" and spec.scheme]
    if not found:
        raise BadRequest(f"{client.target}: serves no table that is addressed by n-gram keys")
    return found


def tokens_max(model: Model) -> int:
    """Of one batch."""
    return max(1, PART_BYTES // (model.columns * model.record_bytes))


def replay_live(client: Client, model: Model, stream: TokenStream, progress: Callable[[int], None]) -> Live:
    """Look everything up. `progress` is told of tokens. Raises what look-ups raise."""
    tables = [client.table(table.name) for table in model.tables]
    before, accesses = client.stats(), 0
    buffer = np.empty(tokens_max(model) * model.columns * model.record_bytes, np.uint8)
    for lookups in lookups_of(model, stream):
        start = 0
        for number, end in enumerate(lookups.ends.tolist()):
            keys = lookups.keys[start:end].reshape(-1, model.columns)
            rows = buffer[: keys.size * model.record_bytes]
            shape = (len(keys), model.orders * model.heads, model.row_bytes)
            table = tables[number % len(tables)]
            look_up = table.lookup_into if model.by_rows else table.lookup_ngrams_into
            look_up(keys, rows.reshape(shape))
            start = end
        accesses += start
        progress(start // model.entries_per_token)
    counted = settled(client, before, accesses)
    return Live(
        counted["dram_hits"] / accesses,
        counted["records_read"] / accesses,
        counted["nvme_bytes"] / stream.tokens,
        before["records_admitted"] + before["records_restored"] == 0,
        before["extent_bytes"] > 0,
    )


def settled(client: Client, before: dict[str, int], accesses: int) -> dict[str, int]:
    """What was counted, once all of it is. Raises Unavailable where others use the daemon too."""
    end = time.monotonic() + SETTLING_S
    while True:
        now = client.stats()
        counted = {name: now[name] - before[name] for name in COUNTERS}
        answered = counted["dram_hits"] + counted["dram_misses"]
        if answered == accesses:
            return counted
        if time.monotonic() > end:
            raise Unavailable(
                f"{client.target}: counted {answered} accesses, {accesses} were made here; replay against a "
                "daemon that nobody else uses meanwhile"
            )
        time.sleep(0.05)
