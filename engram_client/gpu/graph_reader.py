"""Rows of a staging ring at fixed addresses of a device, for a captured graph, and whose they are.

    ring = StagingRing(steps, slots=2, entries=256)
    reader = GraphReader(ring, "cuda")
    for slot in range(2):                                       # one graph a slot
        with torch.cuda.graph(graphs[slot]):
            reader.pull(1, slot)                                # waits on the device, boundedly, and copies
            ... module(hidden, dequantize(reader.rows(1)[slot]), dead=reader.dead(1)[slot])

    staged = ring.start(step, token_ids, lookback=lookback) reader.expect(staged)
    # whose rows the graph is to take graphs[staged.slot].replay()                                # the host
    waits for nothing reader.check(staged)                                        # waits for the stream;
    late rows are an error here staged.release()

A slot has, for each layer, rows uint8 [entries, H, row_bytes], a word int64 and a flag a position, all on
the device. `pull` is three operations of a graph: a kernel that looks at the ring's completion word until it
is that of the expected step, `polls` times at most (a look takes about a microsecond over the bus); a copy
of the whole slot; a kernel that looks again. Only where both found the step's number does the device's word
become it; else it becomes -1 and `dead` True. So a late row reaches nobody who looks at either: with `dead`
the gate of V4.1 passes the streams unchanged, and `check` raises before the host uses what the graph has
made.

`deliver` is the other way, without kernels: the host waits for the rows, then has them copied on a side
stream, with the word behind them, and the current stream waits for that. It serves where Triton is missing,
and for those who would rather replay only what is complete.

Slots of the ring belong to their step until it is released: release it after the graph has run.
Checked on CPU tensors and under Triton's interpreter; never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, DeadlineExceeded
from engram_client.gpu.pinned import pinned_bytes
from engram_client.gpu.probe import KernelGroup, as_device, capturing, interpreted, made_current
from engram_client.gpu.streams import SideStream, record_current, side_stream
from engram_client.staging import StagedStep, StagingRing

POLLS = 2000
NOBODY = -1  # in a word


class _Layer:
    """One layer's memory: the ring's on the host, and what the device has of it."""

    def __init__(self, ring: StagingRing, layer: int | None, device: torch.device) -> None:
        self.source = torch.from_numpy(ring.rows(layer))
        self.source_words = torch.from_numpy(ring.words(layer))
        with torch.inference_mode(False):
            self.rows = torch.zeros(self.source.shape, dtype=torch.uint8, device=device)
            self.words = torch.full((ring.slots,), NOBODY, dtype=torch.int64, device=device)
            self.late = torch.ones(ring.slots, dtype=torch.bool, device=device)


class GraphReader:
    """Fixed memory on a device that follows a ring. One thread and one stream at a time."""

    def __init__(self, ring: StagingRing, device: torch.device | str, *, polls: int = POLLS) -> None:
        """`polls` bounds how often a graph looks for a late step's word. Raises BadRequest."""
        if polls < 1:
            raise BadRequest(f"a graph reader looks at least once; got polls={polls}")
        self.device = as_device(device)
        self._ring, self._polls = ring, polls
        self._layers: dict[int | None, _Layer] = {}
        places: dict[int, _Layer] = {}  # layers of one table have theirs in common
        for layer in ring.layer_ids:
            at = ring.rows(layer).ctypes.data
            if at not in places:
                places[at] = _Layer(ring, layer, self.device)
            self._layers[layer] = places[at]
        expected = pinned_bytes(8 * ring.slots, self.device).view(torch.int64)
        self._expected = expected.fill_(NOBODY)
        self._side: SideStream = side_stream(self.device)

    def rows(self, layer_id: int | None = None) -> Tensor:
        """uint8 [slots, entries, H, row_bytes] on the device; its address never changes."""
        return self._of(layer_id).rows

    def words(self, layer_id: int | None = None) -> Tensor:
        """int64 [slots] on the device: the step whose rows are there, -1 for none."""
        return self._of(layer_id).words

    def dead(self, layer_id: int | None = None) -> Tensor:
        """bool [slots, entries] on the device: True for every position of a slot whose rows were late."""
        late = self._of(layer_id).late
        return late.unsqueeze(1).expand(self._ring.slots, self._ring.entries)

    def _of(self, layer_id: int | None) -> _Layer:
        try:
            return self._layers[layer_id]
        except KeyError:
            raise BadRequest(f"layer {layer_id} is not in this ring; it has {list(self._layers)}") from None

    def expect(self, staged: StagedStep) -> None:
        """Have the next `pull` from this step's slot take its rows and no others'."""
        self._expected[staged.slot] = staged.step

    def pull(self, layer_id: int | None, slot: int) -> None:
        """Bring a slot's rows to the device once they are the expected step's; may be captured.

        Raises BadRequest where no kernel serves or the ring's memory is not pinned: use `deliver`.
        """
        layer = self._of(layer_id)
        on_gpu = self.device.type == "cuda"
        pinned = self._ring.pinned and self._expected.is_pinned()
        if on_gpu and not (pinned and WAITING.serves(self.device)):
            raise BadRequest(
                f"{self.device} cannot wait for this ring's words (its memory is "
                f"{'pinned' if pinned else 'not pinned'}; the log says what else); use deliver"
            )
        place = slice(slot, slot + 1)
        word, found, late = layer.source_words[place], layer.words[place], layer.late[place]
        _await(word, self._expected[place], found, self._polls)
        layer.rows[slot].copy_(layer.source[slot], non_blocking=True)
        _confirm(word, found, late)

    def deliver(self, staged: StagedStep, timeout: float | None = None) -> None:
        """Wait on the host for a step's rows, and have them on the device in the order of the current stream.

        Raises what `StagedStep.wait` does; the device's words then are not this step's.
        """
        if capturing(self.device):
            raise BadRequest("deliver makes the host wait, which a capture cannot: use pull")
        deadline = Deadline.after(timeout)
        self.expect(staged)
        self._side.wait_for(record_current(self.device))  # what read the slot before has done so
        try:
            for layer_id, layer in self._distinct():
                self._side.run(partial(_forget, layer, staged.slot), uses=(layer.words, layer.late))
                staged.wait(deadline.remaining_s(), layer_id=layer_id)
                self._side.run(partial(_copy, layer, staged), uses=(layer.rows, layer.words, layer.late))
        finally:
            self._side.record().block_current(self.device)

    def check(self, staged: StagedStep) -> None:
        """Wait for the current stream. Raises DeadlineExceeded where it has run without this step's rows."""
        for layer_id, layer in self._distinct():
            found = int(layer.words[staged.slot])
            if found != staged.step:
                had = "none" if found == NOBODY else f"those of step {found}"
                named = "" if layer_id is None else f" of layer {layer_id}"
                raise DeadlineExceeded(
                    f"rows{named} of step {staged.step} (slot {staged.slot}) were late for the graph, which "
                    f"found {had}; do not use what it made, but wait for the step and "
                    "replay; start steps earlier, or raise polls"
                )

    def _distinct(self) -> Iterable[tuple[int | None, _Layer]]:
        """Each layer's memory once, under the name of the first layer that has it."""
        seen: dict[int, tuple[int | None, _Layer]] = {}
        for layer_id, layer in self._layers.items():
            seen.setdefault(id(layer), (layer_id, layer))
        return seen.values()


def _forget(layer: _Layer, slot: int) -> None:
    layer.words[slot] = NOBODY
    layer.late[slot] = True


def _copy(layer: _Layer, staged: StagedStep) -> None:
    slot, entries = staged.slot, staged.entries
    layer.rows[slot, :entries].copy_(layer.source[slot, :entries], non_blocking=True)
    layer.late[slot] = False
    layer.words[slot : slot + 1].copy_(layer.source_words[slot : slot + 1], non_blocking=True)


def _await(word: Tensor, expected: Tensor, found: Tensor, polls: int) -> None:
    if found.device.type == "cpu" and not interpreted():
        seen = word.numpy()
        wanted, left = int(expected), polls
        while seen[0] != wanted and left:
            left -= 1
        found.fill_(wanted if seen[0] == wanted >= 0 else NOBODY)
        return
    from engram_client.gpu.late_kernels import await_word

    with made_current(found.device):
        await_word[(1,)](word, expected, found, polls, INTERPRETED=interpreted(), num_warps=1)


def _confirm(word: Tensor, found: Tensor, late: Tensor) -> None:
    if found.device.type == "cpu" and not interpreted():
        there = int(found) >= 0 and int(word) == int(found)
        found.fill_(int(found) if there else NOBODY)
        late.fill_(not there)
        return
    from engram_client.gpu.late_kernels import confirm_word

    with made_current(found.device):
        confirm_word[(1,)](word, found, late, INTERPRETED=interpreted(), num_warps=1)


def _trial(device: torch.device) -> None:
    """A word that is there, one that never comes, and one that is taken away meanwhile."""
    memory = pinned_bytes(16, device).view(torch.int64)
    word, expected = memory[:1], memory[1:]
    found = torch.zeros(1, dtype=torch.int64, device=device)
    late = torch.zeros(1, dtype=torch.bool, device=device)
    for before, after, outcome in ((7, 7, 7), (6, 6, NOBODY), (7, 8, NOBODY)):
        word.fill_(before)
        expected.fill_(7)
        _await(word, expected, found, 3)
        first = int(found)  # waits for the device
        word.fill_(after)
        _confirm(word, found, late)
        if (int(found), bool(late)) != (outcome, outcome == NOBODY) or (first == 7) != (before == 7):
            raise RuntimeError("completion words were not seen as they are")


WAITING = KernelGroup("waiting for rows on the device", "the host waits for them and has them copied", _trial)
