"""A ring of staging slots at fixed addresses, for readers that ask nobody, such as a captured graph.

    ring = StagingRing(steps, slots=2, entries=256)             # of a StepPrefetcher, or of one Table
    rows, words = ring.rows(1), ring.words(1)                   # of layer 1; their addresses never change
    staged = ring.start(step, token_ids, lookback=lookback)     # right after sampling; microseconds
    graphs[staged.slot].replay()                                # reads rows[slot] once words[slot] == step
    staged.wait(timeout=0.05)                                   # late rows are an error here
    staged.release()

A slot has, for each layer, rows uint8 [entries, H, row_bytes] and a *completion word*, int64. Layers of one
table (one name, one generation) have them in common. `start` takes the slots in turn. It makes a layer's word
-1, then has the rows brought there, and the word becomes the step's number once all rows of that layer are
there. So a reader that finds the number it waits for has that step's rows, and one that finds another number
knows that they are late; it never takes old bytes for new ones. Step numbers must ascend, or a word could
lie. There is one word a layer, so that the first layer can run while the last one's rows are on the way.

Rows of position i of the step are at [slot, i]; what lies behind the step's last position is older. A slot
is its step's until that is released: by `release`, by leaving its `with` block, or because nobody holds it
any more. Release it when the graph has run: from then on the slot's next `start` may overwrite it.

How rows come: over shared memory, hits of a small batch are copied by the caller, the rest by a thread that
never enters Python (engram_client/arena/copying.py), so that a caller who is busy in Python holds nothing
up. With a store in this process small batches of hits are copied by the caller too. What is left, and
everything over a connection, is read by a thread of Python, which needs the interpreter for a moment
before it can stamp. If the daemon goes away meanwhile, words stay unstamped until somebody waits: `wait`
asks again.

The memory is the ring's own, so it outlives daemons and attachments. It is pinned where torch is imported and
has a CUDA device; that was not tried on one yet. A forked child must make a ring of its own.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

from engram_client.arrays import to_host
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, Cancelled, DeadlineExceeded, Overloaded, TierstoreError
from engram_client.hashing import Lookback, inputs
from engram_client.staging_memory import Places, lay_out
from engram_client.step import StepPrefetcher
from engram_client.table import DEFAULT_TIMEOUT_S, Table
from engram_client.transport.base import Filling

STEP_MAX = 2**63 - 1


class _Occupancy:
    """Who writes into a slot. Apart from `StagedStep`, so that the ring does not keep that alive."""

    def __init__(self) -> None:
        self.fillings: dict[int | None, Filling] = {}
        self.released = self._vacated = False

    def vacate(self) -> bool:
        """Give the slot up; whether nobody writes there any more. From anywhere at any time."""
        self.released = True
        if not self._vacated:
            vacated = True
            for filling in self.fillings.values():
                vacated = filling.give_up() and vacated  # each of them, whatever the others say
            self._vacated = vacated
        return self._vacated


class StagingRing:
    """Slots of staging memory, handed out in turn. Thread safe; its steps may be waited for by any thread.

    slots, entries: how many there are, and how many positions each holds
    pinned:         whether CUDA copies from its memory without a detour
    """

    def __init__(
        self,
        source: Table | StepPrefetcher,
        *,
        entries: int,
        slots: int = 2,
        heads: slice | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Of one table, or of all layers of a step. `heads` as in `Table.lookup_ngrams`, for all of them.

        `timeout_s` bounds each read from its start. Raises BadRequest.
        """
        if entries < 1 or slots < 1:
            raise BadRequest(
                f"a staging ring needs slots and entries >= 1; got slots={slots} and entries={entries}"
            )
        Deadline.after(timeout_s)
        self.slots, self.entries = slots, entries
        self._steps = source if isinstance(source, StepPrefetcher) else None
        self._tables = _tables_of(source)
        self._heads, self._timeout_s = heads, timeout_s
        for table in self._tables.values():
            table.prepare_staging()
        self._places = self._lay_out()
        self._occupants: list[_Occupancy | None] = [None] * slots
        self._started, self._last_step = 0, -1
        self._starting = threading.Lock()
        self._pid = os.getpid()

    def _lay_out(self) -> dict[int | None, Places]:
        shared = {_identity(table): table for table in self._tables.values()}
        memory, made = lay_out(
            [(self.slots, self.entries, *table.staged_shape(self._heads)) for table in shared.values()]
        )
        self.pinned = memory.pinned
        by_identity = dict(zip(shared, made, strict=True))
        return {layer: by_identity[_identity(table)] for layer, table in self._tables.items()}

    @property
    def layer_ids(self) -> tuple[int | None, ...]:
        """Layers whose rows it holds; None alone for a ring of one table."""
        return tuple(self._tables)

    def rows(self, layer_id: int | None = None) -> np.ndarray:
        """uint8 [slots, entries, H, row_bytes]; `layer_id` where the ring is a step's."""
        return self._of(layer_id).rows

    def words(self, layer_id: int | None = None) -> np.ndarray:
        """Completion words, int64 [slots]: the number of the step whose rows are there, -1 for none."""
        return self._of(layer_id).words

    def _of(self, layer_id: int | None) -> Places:
        try:
            return self._places[layer_id]
        except KeyError:
            raise BadRequest(f"layer {layer_id} is not in this ring; it has {list(self._places)}") from None

    def start(self, step: int, ids: Any, dead: Any = None, *, lookback: Lookback | None = None) -> StagedStep:
        """Have rows brought into the next slot; returns in microseconds.

        `ids` are token ids [B,T] or [T] (`dead` and `lookback` as `StepPrefetcher.start` takes them); for
        a ring of one table n-gram keys [..., orders], or row ids [...] where it has no hash scheme. Raises
        Overloaded where the slot is still in use, BadRequest where `step` is not above the last one or
        there are more positions than entries, and what a prefetch raises. If that is for a later layer than
        the first, the step's number is used up: its first rows may have been stamped with it.
        """
        if self._pid != os.getpid():  # before the lock, which another thread may have held at the fork
            raise BadRequest("this staging ring is that of the process this one is a fork of; make another")
        with self._starting:
            step = self._checked(step)
            slot = self._started % self.slots
            occupancy = self._move_in(slot)
            staged = StagedStep(self, step, slot, occupancy)
            try:
                self._fill(staged, occupancy.fillings, ids, dead, lookback)
            except BaseException:
                staged.release()
                if occupancy.fillings:
                    self._last_step = step
                raise
            self._started, self._last_step = self._started + 1, step
            return staged

    def _checked(self, step: Any) -> int:
        try:
            number = operator.index(step)
        except TypeError:
            raise BadRequest(f"a step has a whole number, got {step!r}") from None
        if not self._last_step < number <= STEP_MAX:
            raise BadRequest(f"steps must ascend: the last one was {self._last_step}, this one is {number}")
        return number

    def _move_in(self, slot: int) -> _Occupancy:
        """Raises Overloaded."""
        before = self._occupants[slot]
        if before is not None and not (before.released and before.vacate()):
            raise Overloaded(
                f"all {self.slots} slots of this staging ring are in use; release the oldest step, or make "
                "the ring with more slots"
            )
        occupancy = self._occupants[slot] = _Occupancy()
        return occupancy

    def _fill(
        self,
        staged: StagedStep,
        fillings: dict[int | None, Filling],
        ids: Any,
        dead: Any,
        lookback: Lookback | None,
    ) -> None:
        if self._steps is not None:
            tokens = inputs.as_tokens(to_host(ids))
            mask = None if dead is None else inputs.as_dead(to_host(dead), tokens.shape)
            self._fill_layers(staged, fillings, self._steps.keys(tokens, mask, lookback=lookback))
        elif dead is None and lookback is None:
            fillings[None], staged.entries = self._stage(None, ids, staged)
        else:
            raise BadRequest(
                "a ring of one table takes n-gram keys or row ids alone, -1 where nothing is wanted"
            )

    def _fill_layers(
        self,
        staged: StagedStep,
        fillings: dict[int | None, Filling],
        keys_by_layer: Iterable[tuple[int, np.ndarray]],
    ) -> None:
        begun: dict[int, Filling] = {}  # by the places of a table, which layers may share
        for layer, keys in keys_by_layer:
            shared = id(self._places[layer])
            if shared not in begun:
                begun[shared], staged.entries = self._stage(layer, keys, staged)
            fillings[layer] = begun[shared]

    def _stage(self, layer: int | None, ids: Any, staged: StagedStep) -> tuple[Filling, int]:
        table, place = self._tables[layer], self._places[layer].slots[staged.slot]
        try:
            return table.stage(ids, place, staged.step, heads=self._heads, timeout=self._timeout_s)
        except TierstoreError as error:
            raise _named(error, layer, table) from error


def _tables_of(source: Table | StepPrefetcher) -> dict[int | None, Table]:
    if isinstance(source, StepPrefetcher):
        return {layer: source.table(layer) for layer in source.layer_ids}
    return {None: source}


def _identity(table: Table) -> tuple[str, str]:
    return table.spec.name, table.spec.generation


def _named(error: TierstoreError, layer: int | None, table: Table) -> TierstoreError:
    return error if layer is None else type(error)(f"layer {layer} (table {table.spec.name!r}): {error}")


class StagedStep:
    """A step in a slot of a ring. Made by `StagingRing.start`; a context manager.

    step, slot: its number, and where it is
    entries:    how many positions it has
    """

    def __init__(self, ring: StagingRing, step: int, slot: int, occupancy: _Occupancy) -> None:
        self.step, self.slot, self.entries = step, slot, 0
        self._ring = ring
        self._occupancy = occupancy
        self._pid = os.getpid()

    def rows(self, layer_id: int | None = None) -> np.ndarray:
        """Where its rows are, or will be: uint8 [entries, H, row_bytes] of the slot."""
        return self._ring.rows(layer_id)[self.slot, : self.entries]

    def done(self, layer_id: int | None = None) -> bool:
        """Whether `wait` would not wait for rows on their way; with `layer_id` for those of one layer."""
        return self._occupancy.released or all(f.done() for f in self._chosen(layer_id).values())

    def wait(self, timeout: float | None = None, *, layer_id: int | None = None) -> None:
        """Return once all rows are there and stamped, or those of one layer; may be called again.

        `timeout` in seconds. Raises DeadlineExceeded where they are late (the step stays valid), Cancelled
        once it was released, or what the look-up raised; then they will not be stamped.
        """
        if self._pid != os.getpid():
            raise Cancelled("this step is that of the process this one is a fork of")
        deadline = Deadline.after(timeout)
        for layer, filling in self._chosen(layer_id).items():
            if self._occupancy.released:
                break
            try:
                filling.wait(deadline.remaining_s())
            except TierstoreError as error:
                raise _named(error, layer, self._ring._tables[layer]) from error
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"rows of step {self.step} (slot {self.slot}) were not there after {timeout:g} s; wait "
                    "again, or start earlier"
                ) from error
        if self._occupancy.released:
            raise Cancelled(f"step {self.step} was released or cancelled")

    def _chosen(self, layer_id: int | None) -> dict[int | None, Filling]:
        fillings = self._occupancy.fillings
        if layer_id is None:
            return fillings
        self._ring._of(layer_id)
        return {layer_id: fillings[layer_id]}

    def release(self) -> None:
        """Give the slot back; what is late is not stamped any more. Idempotent."""
        if self._pid == os.getpid():
            self._occupancy.vacate()

    cancel = release

    def __enter__(self) -> StagedStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if not self._occupancy.released and not sys.is_finalizing():
            self.release()
