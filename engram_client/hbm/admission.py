"""Taking records into the HBM arena, in Triton: the twin of `replacement.admit_plainly`.

There is one program for each newcomer of a batch. The first of each set takes in all of that set, one after
another, with the set's 16 ways in its registers; the others end at once. Records are copied as they are let
in, so of two that get one slot the later stays. `kernels.py` tells how readers get on meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engram_client.hbm.kernels import (
    MAIN,
    MAIN_READ,
    NEWEST,
    PINNED,
    PRINT_MASK,
    READ,
    TRIAL_WAYS,
    UNREAD,
    WAYS,
    load_words,
    mix,
    store_words,
)


@triton.jit
def fingerprint_of(key, owner):
    return tl.maximum(mix(key, owner) & PRINT_MASK, 1).to(tl.int16)


@triton.jit
def judge(queue, place):
    """The way whose turn it is to go or to move on, -1 where all are pinned; and its queue."""
    small, main = queue <= READ, (queue >= MAIN) & (queue <= MAIN_READ)
    smalls, mains = tl.sum(small.to(tl.int32), 0), tl.sum(main.to(tl.int32), 0)
    from_small = (smalls >= TRIAL_WAYS) | (mains == 0)
    judged = (small & from_small) | (main & (from_small == 0))
    oldest = tl.min(tl.where(judged, place, WAYS), 0)
    way = tl.max(tl.where(judged & (place == oldest), tl.arange(0, WAYS), -1), 0)
    return way, tl.sum(tl.where(tl.arange(0, WAYS) == way, queue, 0), 0)


@triton.jit
def make_newest(queue, place, way, its_queue):
    here = tl.arange(0, WAYS) == way
    its_place = tl.sum(tl.where(here, place, 0), 0)
    place = tl.where(here, NEWEST, place - (place > its_place).to(tl.int32))
    return tl.where(here, its_queue, queue), place


@triton.jit
def choose_way(held, queue, place):
    """An empty way, else the one whose record goes, else -1; queues and places once it has been chosen."""
    ways = tl.arange(0, WAYS)
    way = tl.min(tl.where(held == -1, ways, WAYS), 0)
    if way == WAYS:
        way, its_queue = judge(queue, place)
        while (way >= 0) & (its_queue != UNREAD) & (its_queue != MAIN):
            moved = tl.where(its_queue == READ, MAIN, its_queue - 1)
            queue, place = make_newest(queue, place, way, moved)
            way, its_queue = judge(queue, place)
    return way, queue, place


@triton.jit
def remember(ghosts, hand, key, owner, gone):
    """Put a record that goes in the place of the oldest ghost."""
    moved = tl.where(gone, (hand + 1) % WAYS, hand)
    here = gone & (tl.arange(0, WAYS) == moved)
    return tl.where(here, fingerprint_of(key, owner), ghosts), moved


@triton.jit
def copy_in(
    newcomers, batch, records, slot, WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    one, zero = tl.full([1], 1, tl.int1), tl.full([1], 0, tl.int64)
    head, tail = load_words(newcomers, zero + batch, one, WORDS, HEAD, TAIL)
    store_words(records, zero + slot, one, one, head, tail, WORDS, HEAD, TAIL)


@triton.jit
def take(
    line, batch, key, owner, held, held_owners, queue, place, ghosts, hand, newcomers, records,
    WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, PINS: tl.constexpr,
):  # fmt: skip
    """Let a newcomer into a set that may hold it; the set then, admitted, evicted, refused."""
    ways = tl.arange(0, WAYS)
    admitted, evicted, refused = 0, 0, 0
    same = (held == key) & (held_owners == owner)
    if tl.max(same.to(tl.int32), 0) > 0:
        if PINS:
            queue = tl.where(same, PINNED, queue)
    else:
        back = ghosts == fingerprint_of(key, owner)
        ghosts = tl.where(back, tl.zeros_like(ghosts), ghosts)
        its_queue = tl.where(tl.max(back.to(tl.int32), 0) > 0, MAIN, UNREAD)
        if PINS:
            its_queue = tl.where(its_queue == UNREAD, PINNED, PINNED)
        way, queue, place = choose_way(held, queue, place)
        if way < 0:
            refused = 1
        else:
            here = ways == way
            old = tl.sum(tl.where(here, held, 0), 0)
            old_owner = tl.sum(tl.where(here, held_owners.to(tl.int32), 0), 0)
            ghosts, hand = remember(ghosts, hand, tl.maximum(old, 0), old_owner, old != -1)
            queue, place = make_newest(queue, place, way, its_queue)
            held, held_owners = tl.where(here, key, held), tl.where(here, owner, held_owners)
            admitted = 1
            evicted = (old != -1).to(tl.int32)
            copy_in(newcomers, batch, records, line * WAYS + way, WORDS, HEAD, TAIL)
    return held, held_owners, queue, place, ghosts, hand, admitted, evicted, refused


@triton.jit(do_not_specialize=["sets", "n"])
def admit(
    lines, order, keys, owners, newcomers,
    index_keys, index_owners, states, touched, ghosts_at, hands, sequences, records, counters, sets, n,
    WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, PER_SET: tl.constexpr, PINS: tl.constexpr,
):  # fmt: skip
    """See `replacement.Newcomers`: lines, order int64 [n]; `counters` points at the count of admissions."""
    turn = tl.program_id(0)
    line = tl.load(lines + turn)
    before = tl.load(lines + turn - 1, mask=turn > 0, other=-1)
    if line == before:
        earlier = tl.load(lines + turn - PER_SET, mask=turn >= PER_SET, other=-1)
        if (earlier == line) & (line < sets):
            tl.atomic_add(counters + 2, 1, sem="relaxed")
    elif line < sets:
        tl.atomic_add(sequences + line, 1, sem="acq_rel")
        tl.debug_barrier()
        at = line * WAYS + tl.arange(0, WAYS)
        held, held_owners = tl.load(index_keys + at), tl.load(index_owners + at)
        state, ghosts, hand = (
            tl.load(states + at).to(tl.int32),
            tl.load(ghosts_at + at),
            tl.load(hands + line),
        )
        hand, queue, place = hand.to(tl.int32), state & 7, state >> 4
        seen = (tl.load(touched + at, cache_modifier=".cg") != 0) & (queue != PINNED)
        queue = tl.where(seen, tl.where(queue < MAIN, READ, tl.minimum(queue + 1, MAIN_READ)), queue)
        admitted, evicted, refused = 0, 0, 0
        last = tl.minimum(turn + PER_SET, n)
        taking = True
        while taking:
            batch = tl.load(order + turn)
            key, owner = tl.load(keys + batch), tl.load(owners + batch)
            held, held_owners, queue, place, ghosts, hand, got, drove_out, stayed_out = take(
                line, batch, key, owner, held, held_owners, queue, place, ghosts, hand, newcomers, records,
                WORDS, HEAD, TAIL, PINS,
            )  # fmt: skip
            admitted, evicted, refused = admitted + got, evicted + drove_out, refused + stayed_out
            turn += 1
            taking = tl.load(lines + turn, mask=turn < last, other=-1) == line
        tl.store(index_keys + at, held)
        tl.store(index_owners + at, held_owners)
        tl.store(states + at, (queue | place << 4).to(tl.uint8))
        tl.store(touched + at, tl.zeros_like(queue).to(tl.uint8))
        tl.store(ghosts_at + at, ghosts)
        tl.store(hands + line, hand.to(tl.int8))
        tl.atomic_add(counters, admitted, sem="relaxed")
        tl.atomic_add(counters + 1, evicted, sem="relaxed")
        tl.atomic_add(counters + 2, refused, sem="relaxed")
        tl.debug_barrier()
        tl.atomic_add(sequences + line, 1, sem="release")
