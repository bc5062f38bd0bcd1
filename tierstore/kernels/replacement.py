"""Which record of a set goes: two queues by arrival, a few counted reads, and a memory of the dead.

Text asks for most of its n-grams once or twice within a few thousand tokens and never again, and for
some again and again. So a newcomer is on trial in a *small* queue of a few of a set's 16 ways. If it
was read there often enough by the time it is the oldest, it moves to the *main* queue, else it goes.
The main queue gives the oldest one more round for each read that was counted, up to four. The set
remembers fingerprints of the last 16 records it let go, as many as it holds; one that comes back
among them was thrown out too early and goes straight to the main queue. This is S3-FIFO (Yang et
al., SOSP 2023) done within a set, with more room on trial and a memory of both queues. How many
ways are on trial and how many reads pass it is the set's stance, which `dueling` finds.
docs/decisions/0006-replacement.md and 0014-*.md hold all of it against others.

Both queues lie in the 16 state bytes, as `engram_client.arena.layout` draws them: the place in the
order of arrival, over both queues, makes the oldest of each easy to find, and a record moves to the
newest place by one pass over the states. A record on trial needs only two reads, since its
move begins the count anew, so queue and reads share three bits. A fingerprint is 12 bits of the
tag: 8 would take every sixteenth newcomer for an old acquaintance.

A hint says what ordinary caches never know: that a record will be read. Such a record is *wanted*
and passed over until its reader has come. Where a set holds nothing else, more is hinted than fits,
and the newest goes, as it is the one read last. A hint whose reader never comes is forgotten in
time: every 32nd admission to a set takes the mark from the oldest that bears it where half of the set
does, every 256th elsewhere, so that few fresh hints fall to this.

All of this is written under the arena's lock. A reader that counts at the same moment may undo one
change of one state, so places may repeat and queues be off by one: the loops below end whatever the
bytes say.
"""

from __future__ import annotations

from engram_client.arena.atomics import load_byte, load_half, load_word, store_byte, store_word
from engram_client.arena.layout import (
    GHOSTS_AT,
    MAIN,
    MAIN_READ,
    PLACE_SHIFT,
    QUEUE_MASK,
    SEQUENCE_AT,
    SMALL,
    STATES_AT,
    TAGS_AT,
    WANTED,
    WAYS,
)
from engram_client.jit import inline_kernel
from tierstore.kernels.dueling import PASSING_READS, TRIAL_WAYS

STEPS_MAX = WAYS * (MAIN_READ - MAIN + 2)  # more than this only readers that count meanwhile could cause
PATIENCE = 256  # admissions to a set between two hints that it gives up
PATIENCE_CROWDED = 32  # the same where they hold half of the set


@inline_kernel
def make_newest(line, way, state):
    """Give the way this state (its place aside) and the newest place; those behind it move up."""
    states = line + STATES_AT
    place = load_byte(states + way) >> PLACE_SHIFT
    for other in range(WAYS):
        its = load_byte(states + other)
        if its >> PLACE_SHIFT > place:
            store_byte(states + other, its - (1 << PLACE_SHIFT))
    store_byte(states + way, state | (WAYS - 1) << PLACE_SHIFT)


@inline_kernel
def newest_way(line):
    newest = newest_place = -1
    for way in range(WAYS):
        place = load_byte(line + STATES_AT + way) >> PLACE_SHIFT
        if place > newest_place:
            newest, newest_place = way, place
    return newest


@inline_kernel
def give_up_oldest_hint(line, admissions):
    """Let the oldest hint go, if after so many admissions it is time for it."""
    hints, oldest, oldest_place = 0, -1, WAYS
    for way in range(WAYS):
        state = load_byte(line + STATES_AT + way)
        hints += state & WANTED != 0
        if state & WANTED and state >> PLACE_SHIFT < oldest_place:
            oldest, oldest_place = way, state >> PLACE_SHIFT
    if oldest >= 0 and (2 * hints >= WAYS or admissions % PATIENCE == 0):
        state = load_byte(line + STATES_AT + oldest)
        store_byte(line + STATES_AT + oldest, state & ~WANTED)


@inline_kernel
def oldest_to_judge(line, trial_ways, kept):
    """The oldest of the queue that must give: the small one where it has its ways or is all there is.

    Wanted records are in neither, nor ways of the bits `kept`; -1 where there are no others.
    """
    small = main = -1
    small_place = main_place = WAYS
    small_count = 0
    for way in range(WAYS):
        state = load_byte(line + STATES_AT + way)
        place = state >> PLACE_SHIFT
        if state & WANTED or kept >> way & 1:
            continue
        if state & QUEUE_MASK >= MAIN:
            if place < main_place:
                main, main_place = way, place
        else:
            small_count += 1
            if place < small_place:
                small, small_place = way, place
    return small if small_count >= trial_ways or main < 0 else main


@inline_kernel
def choose_way(line, stance, kept):
    """An empty way, else the one whose record goes: none of the bits `kept`, unless all others are wanted."""
    for way in range(WAYS):
        if load_half(line + TAGS_AT + 2 * way) == 0:
            return way
    admissions = load_word(line + SEQUENCE_AT) // 2
    if admissions % PATIENCE_CROWDED == 0:
        give_up_oldest_hint(line, admissions)
    trial_ways, passing = TRIAL_WAYS[stance], SMALL + PASSING_READS[stance]
    way = oldest_to_judge(line, trial_ways, kept)
    for _ in range(STEPS_MAX):
        if way < 0:
            return newest_way(line)
        queue = load_byte(line + STATES_AT + way) & QUEUE_MASK
        if queue < passing or queue == MAIN:
            break
        make_newest(line, way, MAIN if queue < MAIN else queue - 1)
        way = oldest_to_judge(line, trial_ways, kept)
    return way


@inline_kernel
def fingerprint(tag):
    """12 bits of a tag, never 0, which stands for no ghost."""
    return max(1, tag >> 4)


@inline_kernel
def remember(line, ghost_line, tag):
    """Put a record that goes first among the ghosts; the last of them is forgotten."""
    print_ = fingerprint(tag)
    low = load_word(ghost_line)
    store_word(ghost_line + 8, load_word(ghost_line + 8) << 8 | (low >> 56 & 0xFF))
    store_word(ghost_line, low << 8 | (print_ & 0xFF))
    store_word(line + GHOSTS_AT, load_word(line + GHOSTS_AT) << 4 | print_ >> 8)


@inline_kernel
def recall(line, ghost_line, tag):
    """Whether a record is among the ghosts; it is one of them no more."""
    print_ = fingerprint(tag)
    upper = load_word(line + GHOSTS_AT)
    for place in range(WAYS):
        if load_byte(ghost_line + place) == print_ & 0xFF and upper >> 4 * place & 0xF == print_ >> 8:
            store_byte(ghost_line + place, 0)
            store_word(line + GHOSTS_AT, upper & ~(0xF << 4 * place))
            return True
    return False
