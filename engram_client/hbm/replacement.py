"""Which record of a set goes: the DRAM tier's two queues and ghosts, in tensors of a device.

A newcomer is on *trial* in a small queue. If it was read by the time it is the oldest there, it moves to
the *main* queue, else it goes; the small queue gives once it has three records, or all there are. The main
queue gives its oldest one more round for each read that was counted, up to four. The set remembers
fingerprints of the last 16 records it let go; one that comes back among them goes straight to the main
queue. This is S3-FIFO within a set, as `tierstore.kernels.replacement` does it, without the duel over how
long the trial is (docs/decisions/0022-replacement-on-the-device.md has the hit rates).

    queue and reads   0, 1   on trial, not read and read
                      2..6   main, 0 to 4 reads
                      7      pinned: never judged

Reads are counted late. A look-up only marks what it has read; the next batch that brings records into a set
first counts one read for each mark there, and takes the marks away. So reads between two of those count
once, which costs no hits worth naming, and readers never write what replacement owns.

A batch is taken set by set: a set looks at the first `ADMISSIONS_PER_SET` newcomers of a batch (16 of a
pinned profile), in the order they were given, one after another; the rest stay out until they are asked for
again.

`admit_plainly` is the twin of the kernel `admit`: the same records in the same slots, the same states. It
works on all sets at once, newcomer by newcomer. It reads values back, which a CPU does not mind; on CUDA it
is what serves where Triton is missing, and makes the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engram_client.hbm.index import WAYS, Index, fingerprint_of, mix, set_of

ADMISSIONS_PER_SET = 8
TRIAL_WAYS = 3
UNREAD, READ, MAIN, MAIN_READ, PINNED = 0, 1, 2, 6, 7
NEWEST = WAYS - 1
STEPS_MAX = WAYS * (MAIN_READ - MAIN + 2)  # more than this no walk can take


@dataclass(frozen=True)
class Newcomers:
    """Records that ask to be let in, in the order of their sets.

    lines:   int64 [n] ascending, the number of sets where a key is none
    order:   int64 [n], which of the batch each is
    keys, owners, records: of the batch as it came: int64, int16 [n], [n, words]
    """

    lines: Tensor
    order: Tensor
    keys: Tensor
    owners: Tensor
    records: Tensor

    @classmethod
    def of(cls, keys: Tensor, owners: Tensor, records: Tensor, sets: int) -> Newcomers:
        lines = torch.where(keys >= 0, set_of(mix(keys.clamp(min=0), owners), sets), sets)
        lines, order = lines.sort(stable=True)
        return cls(lines, order, keys, owners, records)


def admissions_of(pinned: bool) -> int:
    """How many newcomers of a batch a set looks at."""
    return WAYS if pinned else ADMISSIONS_PER_SET


def admit_plainly(index: Index, records: Tensor, new: Newcomers, counters: Tensor, pinned: bool) -> None:
    """Take the newcomers in; adds to counters int64 [3]: admitted, evicted for them, left out."""
    wanted = new.lines < index.sets
    lines, which, counts = torch.unique_consecutive(new.lines, return_inverse=True, return_counts=True)
    rank = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts).index_select(0, which)
    work = _Sets(index, lines)
    per_set = admissions_of(pinned)
    for turn in range(min(per_set, int(counts.max()))):
        chosen = (wanted & (rank == turn)).nonzero().squeeze(1)
        source = new.order.index_select(0, chosen)
        rows = which.index_select(0, chosen)
        ways, placed, drove_out = work.take(
            rows, new.keys.index_select(0, source), new.owners.index_select(0, source), pinned
        )
        slots = lines.index_select(0, rows) * WAYS + ways
        records.index_copy_(0, slots[placed], new.records.index_select(0, source[placed]))
        counters[0] += placed.sum()
        counters[1] += drove_out.sum()
        counters[2] += work.refused
    counters[2] += (wanted & (rank >= per_set)).sum()
    work.write_back(index)


class _Sets:
    """Working copies of the sets that a batch touches, [m, WAYS] each."""

    def __init__(self, index: Index, lines: Tensor) -> None:
        self.lines = lines
        self.keys, self.owners = index.keys.index_select(0, lines), index.owners.index_select(0, lines)
        self.ghosts, self.hands = (
            index.ghosts.index_select(0, lines),
            index.hands.index_select(0, lines).long(),
        )
        states = index.states.index_select(0, lines).long()
        self.queues, self.places = states & 7, states >> 4
        read = index.touched.index_select(0, lines) != 0
        grown = torch.where(self.queues < MAIN, READ, (self.queues + 1).clamp(max=MAIN_READ))
        self.queues = torch.where(read & (self.queues != PINNED), grown, self.queues)
        self.refused = 0

    def write_back(self, index: Index) -> None:
        lines = self.lines
        index.owners.index_copy_(0, lines, self.owners)
        index.states.index_copy_(0, lines, (self.queues | self.places << 4).to(torch.uint8))
        index.touched.index_fill_(0, lines, 0)
        index.ghosts.index_copy_(0, lines, self.ghosts)
        index.hands.index_copy_(0, lines, self.hands.to(torch.int8))
        index.keys.index_copy_(0, lines, self.keys)

    def take(self, rows: Tensor, keys: Tensor, owners: Tensor, pinned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A way for each key, no two of one set; whether it got it, and whether a record had to go."""
        held = self.keys[rows]
        same = (held == keys.unsqueeze(1)) & (self.owners[rows] == owners.unsqueeze(1))
        present = same.any(1)
        if pinned:
            at = present.nonzero().squeeze(1)
            self.queues[rows[at], same[at].long().argmax(1)] = PINNED
        prints = fingerprint_of(mix(keys, owners))
        known = self._recall(rows[~present], prints[~present])
        empty = held == -1
        ways, beaten = self._judge(rows, ~present & ~empty.any(1))
        ways = torch.where(empty.any(1), empty.long().argmax(1), ways)
        placed = ~present & (empty.any(1) | beaten)
        drove_out = placed & ~empty.any(1)
        self.refused = int((~present & ~placed).sum())
        self._remember(rows[drove_out], ways[drove_out])
        queue = torch.full_like(keys, UNREAD)
        queue[~present] = torch.where(known, MAIN, UNREAD)
        at, way = rows[placed], ways[placed]
        self.keys[at, way], self.owners[at, way] = keys[placed], owners[placed]
        self._make_newest(at, way, torch.full_like(at, PINNED) if pinned else queue[placed])
        return ways, placed, drove_out

    def _judge(self, rows: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Walk to the record that goes, in the sets that are asked; its way, and whether there is one."""
        ways = torch.zeros_like(rows)
        for _ in range(STEPS_MAX + 1):
            queues, places = self.queues[rows], self.places[rows]
            small, main = queues <= READ, (queues >= MAIN) & (queues <= MAIN_READ)
            from_small = (small.sum(1) >= TRIAL_WAYS) | ~main.any(1)
            judged = torch.where(from_small.unsqueeze(1), small, main)
            ways = torch.where(judged, places, WAYS).argmin(1)
            queue = queues.gather(1, ways.unsqueeze(1)).squeeze(1)
            again = asked & judged.any(1) & (queue != UNREAD) & (queue != MAIN)
            if not again.any():
                return ways, asked & judged.any(1)
            moved = torch.where(queue == READ, MAIN, queue - 1)
            self._make_newest(rows[again], ways[again], moved[again])
        raise AssertionError("a walk through a set of 16 has an end")

    def _make_newest(self, rows: Tensor, ways: Tensor, queue: Tensor) -> None:
        places = self.places[rows]
        place = places.gather(1, ways.unsqueeze(1))
        self.places[rows] = places - (places > place).long()
        self.places[rows, ways], self.queues[rows, ways] = NEWEST, queue

    def _recall(self, rows: Tensor, prints: Tensor) -> Tensor:
        """Whether each is among the ghosts of its set; it is one of them no more."""
        ghosts = self.ghosts[rows]
        same = ghosts == prints.unsqueeze(1)
        self.ghosts[rows] = torch.where(same, 0, ghosts)
        return same.any(1)

    def _remember(self, rows: Tensor, ways: Tensor) -> None:
        """Put a record that goes in the place of the oldest ghost."""
        hands = (self.hands[rows] + 1) % WAYS
        self.hands[rows] = hands
        self.ghosts[rows, hands] = fingerprint_of(mix(self.keys[rows, ways], self.owners[rows, ways]))
