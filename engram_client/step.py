"""A whole step in one call: the rows of all layers of a model, asked for as soon as its tokens are known.

    steps = StepPrefetcher({1: client.table("l1"), 14: client.table("l14")}, tokenizer)
    lookback = steps.lookback(batch)
    with steps.start(token_ids, lookback=lookback) as step:    # right after sampling
        lookback.advance(token_ids)
        ...                                                    # layer 0
        rows = step.wait(1)                                    # uint8 [B,T,H,row_bytes]
        ...                                                    # layers 1 to 13
        rows = step.wait(14)

Reads are issued in the order in which layers run: the first has the fewest layers in front of it to
hide behind. Layers that share a table (one name, one generation) share one read. Keys of different tables
name different records, so nothing else is shared between layers.

Within a read, positions whose n-grams are all equal can be asked for once, and their rows handed to each
position. That pays where rows travel over a connection and a step is large: a quarter of 4096 tokens of
source code has been there before, and next to nothing in a decode step. Where this process copies hits
itself, handing them on costs more than asking once saves. So it is done from `DEDUPE_POSITIONS_MIN`
positions on, over connections (docs/decisions/0017-*). The service reads once what several ask for in any
case, and the rows of `wait` always have the shape of the step's tokens.

Drafts are candidates for the next tokens of each sequence, all asked for at once; `choose` keeps one a
sequence. A step is open until its last layer has been waited for, or it is closed, cancelled or dropped; the
number of open steps is bounded. Giving a step up gives up all its reads.

Not promised: that rows of one layer are there before another's, although they were asked for earlier.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from engram_client.arrays import into_device, to_host, writable_host_view
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, Cancelled, Overloaded, TierstoreError
from engram_client.hashing import Lookback, NgramHashMapping, inputs
from engram_client.kernels.distinct import distinct_lines
from engram_client.prefetch import Handle
from engram_client.table import DEFAULT_TIMEOUT_S, Table

DEDUPE_POSITIONS_MIN = 512
STEPS_OPEN_MAX = 8


class StepPrefetcher:
    """Starts steps on the tables of one model. Thread safe; its steps belong to one thread each.

    layer_ids: layers with a table, in the order in which they run
    mapping:   the hashing of all of them
    """

    def __init__(
        self,
        tables: Mapping[int, Table],
        compressed_map: Any = None,
        *,
        steps_open_max: int = STEPS_OPEN_MAX,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        dedupe: bool | None = None,
    ) -> None:
        """`tables` by layer number; `compressed_map` as `Table.mapping` takes it.

        `timeout_s` bounds each read from its start. `dedupe` says whether equal positions are asked for
        once; None decides by the size of a step and the way to the service. Raises BadRequest for a
        table without a hash scheme or tables of different families, VocabularyMismatch.
        """
        if not tables or steps_open_max < 1:
            raise BadRequest(
                f"a step prefetcher needs a table and steps_open_max >= 1; got {len(tables)} tables and "
                f"steps_open_max={steps_open_max}"
            )
        Deadline.after(timeout_s)
        self.layer_ids = tuple(sorted(tables))
        self.timeout_s = timeout_s
        self._tables = {layer: tables[layer] for layer in self.layer_ids}
        schemes = {_scheme(layer, table): None for layer, table in self._tables.items()}
        self.mapping = NgramHashMapping.from_schemes(list(schemes), compressed_map)
        self._dedupe_from = _dedupe_from(dedupe, self._tables.values())
        find_distinct(np.zeros((2, 1), np.int64))  # compiled before the first step
        self._steps_open_max = steps_open_max
        self._open: set[int] = set()
        self._started = 0
        self._changing = threading.RLock()  # the collector may drop a step inside of a change

    @property
    def open_steps(self) -> int:
        """How many steps are open."""
        return len(self._open)

    def table(self, layer_id: int) -> Table:
        """The table of a layer. Raises BadRequest where it has none."""
        try:
            return self._tables[layer_id]
        except KeyError:
            raise BadRequest(
                f"layer {layer_id} has no table; these have one: {list(self.layer_ids)}"
            ) from None

    def lookback(self, batch: int = 1) -> Lookback:
        """Fresh decode state for `batch` sequences; it serves all layers."""
        return self.mapping.lookback(batch)

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Lookback | None = None) -> Step:
        """Ask for the rows of token ids [B,T] or [T] at every layer; returns at once.

        Nothing is fetched for positions that are `dead` (bool of that shape): their rows are zeros. The
        lookback is read, not advanced. Raises Overloaded where too many steps or handles are open,
        and what `NgramHashMapping.ngram_keys` raises; then nothing stays open.
        """
        tokens = inputs.as_tokens(to_host(token_ids))
        mask = None if dead is None else inputs.as_dead(to_host(dead), tokens.shape)
        return self._start(tokens, mask, lookback, tokens.shape)

    def start_drafts(self, drafts: Any, dead: Any = None, *, lookback: Lookback | None = None) -> Step:
        """Ask for the rows of candidates [B,C,T], C for each of B sequences, as `start`.

        The lookback follows the B sequences; each candidate continues its sequence. `wait` gives rows of all
        candidates; after `Step.choose` those of the chosen ones.
        """
        found = inputs.as_int64(to_host(drafts), "drafts", inputs.TOKEN_DTYPES)
        if found.ndim != 3:
            raise BadRequest(f"drafts must be [B,C,T], got shape {list(found.shape)}")
        shape = (found.shape[0] * found.shape[1], found.shape[2])
        mask = None if dead is None else inputs.as_dead(to_host(dead), found.shape).reshape(shape)
        if lookback is not None:
            lookback = lookback.copy()
            lookback.select(np.repeat(np.arange(lookback.batch), found.shape[1]))
        return self._start(found.reshape(shape), mask, lookback, found.shape)

    def _start(
        self, tokens: np.ndarray, dead: np.ndarray | None, lookback: Lookback | None, shape: tuple[int, ...]
    ) -> Step:
        step = Step(self, self._opened(), shape, dead if dead is None else dead.reshape(shape))
        distinct: dict[int, _Keys] = {}
        try:
            for layer, keys in self.keys(tokens, dead, lookback=lookback):
                if id(keys) not in distinct:
                    distinct[id(keys)] = self._distinct(keys)
                step.ask(layer, distinct[id(keys)])
        except BaseException:
            step.close()
            raise
        return step

    def keys(
        self, tokens: np.ndarray, dead: np.ndarray | None, *, lookback: Lookback | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Each layer and its n-gram keys, int64 [positions, orders]; one array where layers hash alike.

        -1 where dead. In the order in which layers run, and hashed no sooner than asked for.
        """
        hashed: dict[int, np.ndarray] = {}
        for layer, table in self._tables.items():
            scheme = _scheme(layer, table).layer_id
            if scheme not in hashed:
                keys = self.mapping.ngram_keys(tokens, scheme, dead, lookback=lookback)
                if dead is not None:
                    keys[dead] = -1
                hashed[scheme] = keys.reshape(-1, keys.shape[-1])
            yield layer, hashed[scheme]

    def _distinct(self, keys: np.ndarray) -> _Keys:
        return find_distinct(keys) if len(keys) >= self._dedupe_from else _Keys(keys, None)

    def _opened(self) -> int:
        with self._changing:
            if len(self._open) >= self._steps_open_max:
                raise Overloaded(
                    f"{len(self._open)} steps are open, the most there may be; wait for their last layers, "
                    "cancel or close them, or allow more with steps_open_max"
                )
            self._started += 1
            self._open.add(self._started)
            return self._started

    def _closed(self, number: int) -> None:
        with self._changing:
            self._open.discard(number)


def _dedupe_from(dedupe: bool | None, tables: Iterable[Table]) -> float:
    """How many positions a step has at least whose equal ones are asked for once."""
    if dedupe is None:
        return math.inf if all(table.reads_hits_itself for table in tables) else DEDUPE_POSITIONS_MIN
    return 2 if dedupe else math.inf


@dataclass(frozen=True)
class _Keys:
    """Lines of n-gram keys [n, orders] to ask for, and which of them each position wants."""

    lines: np.ndarray
    inverse: np.ndarray | None  # int64 [positions]; None where line i is position i's


def find_distinct(keys: np.ndarray) -> _Keys:
    """The distinct lines of keys int64 [n, orders] in order of first appearance."""
    bits = max(1, (2 * len(keys) - 1).bit_length())
    table, lines = np.full(1 << bits, -1, np.int64), np.empty_like(keys)
    inverse = np.empty(len(keys), np.int64)
    count = distinct_lines(keys, table, 64 - bits, lines, inverse)
    return _Keys(keys, None) if count == len(keys) else _Keys(lines[:count], inverse)


class Step:
    """The rows of one step on their way. Made by `StepPrefetcher.start`; a context manager.

    dead: what the step was started with, bool of its tokens' shape, or None
    """

    def __init__(
        self, steps: StepPrefetcher, number: int, shape: tuple[int, ...], dead: np.ndarray | None
    ) -> None:
        self.dead = dead
        self._steps = steps
        self._shape = shape
        self._picks: np.ndarray | None = None  # int64 positions that were chosen
        self._reads: dict[int, tuple[Handle, np.ndarray | None]] = {}
        self._handles: dict[tuple[str, str], Handle] = {}
        self._unclaimed: set[int] = set()
        self._done = weakref.finalize(self, steps._closed, number)
        self._done.atexit = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens whose rows `wait` returns."""
        return self._shape

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers with a table, in the order in which they run."""
        return self._steps.layer_ids

    def table(self, layer_id: int) -> Table:
        """The table of a layer. Raises BadRequest where it has none."""
        return self._steps.table(layer_id)

    def ask(self, layer_id: int, keys: _Keys) -> None:
        """Begin to read one layer's rows; called by `StepPrefetcher`, in the order of the layers."""
        table = self._steps.table(layer_id)
        identity = (table.spec.name, table.spec.generation)
        try:
            if identity not in self._handles:
                handle = table.prefetch_ngrams(keys.lines, timeout=self._steps.timeout_s)
                self._handles[identity] = handle
        except TierstoreError as error:
            raise self._named(error, layer_id) from error
        self._reads[layer_id] = (self._handles[identity], keys.inverse)
        self._unclaimed.add(layer_id)

    def wait(self, layer_id: int, *, out: Any = None, timeout: float | None = None) -> Any:
        """Rows of one layer, uint8 [*shape, H, row_bytes]; zeros at dead positions. May be called again.

        With `out` (uint8 of that shape; numpy or torch, on any device) they are put there, once all
        of them are right, and it is returned. `timeout` in seconds. Raises DeadlineExceeded where
        they are late (the step stays valid), Cancelled, or what the look-up raised, naming layer and table.
        """
        rows, index = self.wait_distinct(layer_id, timeout=timeout)
        shape = (*self._shape, *rows.shape[1:])
        if out is None:
            return rows.reshape(shape) if index is None else rows.take(index, axis=0).reshape(shape)
        host = writable_host_view(out, shape)
        if host is None:
            into_device(rows, out, index)
        elif index is None:
            host[...] = rows.reshape(shape)
        else:
            np.take(rows, index, axis=0, out=host.reshape(-1, *rows.shape[1:]), mode="clip")
        return out

    def wait_distinct(
        self, layer_id: int, *, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As `wait`, without repeating what is equal: rows uint8 [n, H, row_bytes] and an index.

        Position i of the step has the rows `index[i]`; None where it has rows i. `Table.dequantize`
        takes both.
        """
        table = self._steps.table(layer_id)
        if layer_id not in self._reads:
            raise Cancelled(
                f"layer {layer_id} (table {table.spec.name!r}): this step was cancelled or closed"
            )
        handle, index = self._reads[layer_id]
        try:
            rows = np.asarray(handle.wait(timeout=timeout))
        except TierstoreError as error:
            raise self._named(error, layer_id) from error
        self._unclaimed.discard(layer_id)
        if not self._unclaimed:
            self._done()
        if self._picks is not None:
            index = self._picks if index is None else index[self._picks]
        return rows, index

    def done(self, layer_id: int) -> bool:
        """Whether `wait` for this layer would return, or raise, at once."""
        self._steps.table(layer_id)
        return layer_id not in self._reads or self._reads[layer_id][0].done()

    def choose(self, candidates: Any) -> Step:
        """Keep one candidate of each sequence: `candidates` int [B], numbers of 0 to C-1.

        From now on the step is one of [B,T]: `wait` gives the rows of the chosen candidates. Returns
        the step.
        """
        if len(self._shape) != 3:
            raise BadRequest(
                f"only drafts [B,C,T] have candidates to choose; this step is {list(self._shape)}"
            )
        batch, count, length = self._shape
        chosen = inputs.as_int64(to_host(candidates), "candidates", inputs.TOKEN_DTYPES)
        if chosen.shape != (batch,) or ((chosen < 0) | (chosen >= count)).any():
            raise BadRequest(f"candidates must be [{batch}] numbers of 0..{count - 1}, got {chosen.tolist()}")
        first = (np.arange(batch) * count + chosen) * length
        self._picks = (first[:, None] + np.arange(length)).reshape(-1)
        self._shape = (batch, length)
        if self.dead is not None:
            self.dead = self.dead[np.arange(batch), chosen]
        return self

    def cancel(self) -> None:
        """Give up all layers' rows, also those that were waited for; idempotent."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        self._reads.clear()
        self._done()

    close = cancel

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, error: TierstoreError, layer_id: int) -> TierstoreError:
        name = self._steps.table(layer_id).spec.name
        return type(error)(f"layer {layer_id} (table {name!r}): {error}")


def _scheme(layer: int, table: Table) -> Any:
    if table.spec.scheme is None:
        raise BadRequest(
            f"layer {layer}: table {table.spec.name!r} has no hash scheme: its rows are named by row ids "
            "alone; prefetch them with Table.prefetch"
        )
    return table.spec.scheme
