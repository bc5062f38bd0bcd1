"""Triton: reading records out of a daemon's shared arena, over the bus, by the device itself.

One program reads one record, as `engram_client.arena.read.copy_if_present` does, in the same memory
(engram_client/arena/layout.py draws it), while the daemon's writer may be anywhere in it.

**Order.** The sequence is loaded with acquire at system scope, tags, keys and rows as relaxed system-scope
loads behind it; then every thread fences, and the sequence is loaded again. The weak loads that the compiler
would choose may come out of the first-level cache of an earlier read; and its volatile loads are not joined,
so that two neighbours in one thread ask for one sector of the bus twice. Hence the loads in PTX, 16
bytes each where the layout allows.

**One decision for all threads.** Each thread executes the load of a scalar by itself, so with a writer about
two threads may read different sequences from one line of the program, and one could copy what the other's
sequence has never vouched for. So what is decided by such a load is written to `scratch` by one thread and
read back by all behind a barrier: the sequence (before anything it guards is read), the way, the verdict.

The registers hold the record until the verdict: `out` gets a whole record that is right, or zeros.

Checked under Triton's interpreter, which has one thread, and by compiling for sm_90; never run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    MAIN_READ,
    OWNER_AT,
    QUEUE_MASK,
    RECORD_AT,
    SEQUENCE_AT,
    SMALL_READ,
    STATES_AT,
    TAGS_AT,
    WANTED,
    WAYS,
)
from engram_client.arena.listed_read import LISTED_WORDS, MASKED, MISSED, TOUCHED
from engram_client.arena.mailbox import TOUCH, TOUCH_SET_SHIFT, TOUCH_WAY_SHIFT
from engram_client.arena.read import TRIES
from engram_client.arena.shared_read import (
    CONTROL,
    INDEX,
    NEW_REGION,
    OLD_REGION,
    PART_AT,
    SERVING,
    SETS,
    SLOT_BYTES,
    SLOTS,
    TABLE_OWNER,
    TOUCH_REGION,
)
from engram_client.gpu.bus_launch import SCRATCH_WORDS
from engram_client.gpu.system_memory import (
    acquire_at,
    again_at,
    bytes_at,
    fence,
    halves_at,
    units_at,
    words_at,
)

_SEEN, _WAY, _VERDICT = (tl.constexpr(n) for n in (0, 1, 2))
_ABSENT, _STALE, _WHOLE = (tl.constexpr(n) for n in (0, 1, 2))  # verdicts
_TRIES, _WAYS = tl.constexpr(TRIES), tl.constexpr(WAYS)
_CONTROL, _SERVING, _OWNER, _PART_AT = (tl.constexpr(n) for n in (CONTROL, SERVING, TABLE_OWNER, PART_AT))
_NEW, _OLD = tl.constexpr(NEW_REGION), tl.constexpr(OLD_REGION)
_INDEX, _SLOTS, _SETS, _SLOT_BYTES = (tl.constexpr(n) for n in (INDEX, SLOTS, SETS, SLOT_BYTES))
_REGION = tl.constexpr(TOUCH_REGION)
_LINE, _TAGS, _STATES, _SEQUENCE = (tl.constexpr(n) for n in (LINE_BYTES, TAGS_AT, STATES_AT, SEQUENCE_AT))
_KEY_AT, _OWNER_AT, _RECORD_AT = (tl.constexpr(n) for n in (KEY_AT, OWNER_AT, RECORD_AT))
_QUEUE, _AWAITED, _SMALL_READ, _MAIN_READ = (
    tl.constexpr(n) for n in (QUEUE_MASK, WANTED, SMALL_READ, MAIN_READ)
)
_TOUCH, _SET_SHIFT, _WAY_SHIFT = (tl.constexpr(n) for n in (TOUCH, TOUCH_SET_SHIFT, TOUCH_WAY_SHIFT))
_MISSED, _MASKED, _TOUCHED = (tl.constexpr(n) for n in (MISSED, MASKED, TOUCHED))
_LISTED, _SCRATCH_WORDS = tl.constexpr(LISTED_WORDS), tl.constexpr(SCRATCH_WORDS)


@triton.jit
def _mix(key, owner):
    """As `engram_client.arena.read.mix`."""
    h = key.to(tl.uint64, bitcast=True) ^ (owner.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    return h ^ (h >> 31)


@triton.jit
def _agree(scratch, value):
    """What one thread has found is what all have: behind this, `value` is the same everywhere."""
    tl.store(scratch, value)
    tl.debug_barrier()
    return tl.load(scratch, volatile=True)


@triton.jit
def _find_way(line, set_slots, slot_bytes, tag, key, owner, wanted, INTERPRETED: tl.constexpr):
    """The way that holds exactly this record, or -1; threads may differ in it."""
    ways = tl.arange(0, _WAYS).to(tl.int64)
    tags = halves_at(line + _TAGS + 2 * ways, ways * 0 + wanted.to(tl.int64) != 0, INTERPRETED)
    same = (tags == tag) & wanted
    slot = set_slots + ways * slot_bytes
    same = same & (words_at(slot + _KEY_AT, same, INTERPRETED) == key)
    same = same & (words_at(slot + _OWNER_AT, same, INTERPRETED) == owner)
    return tl.max(tl.where(same, ways, -1), axis=0)


@triton.jit
def _try_region(view, at, scratch, key, owner, units, lanes, UNIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """One try: verdict (all threads agree), way, tag, set, and the record's units where it is whole."""
    h = _mix(key, owner)
    sets, slot_bytes = tl.load(view + at + _SETS), tl.load(view + at + _SLOT_BYTES)
    which = (((h >> 32) * sets.to(tl.uint64, bitcast=True)) >> 32).to(tl.int64, bitcast=True)
    tag = (h & 0xFFFF).to(tl.int64, bitcast=True)
    tag = tl.where(tag == 0, 1, tag)
    line = tl.load(view + at + _INDEX) + which * _LINE
    set_slots = tl.load(view + at + _SLOTS) + which * _WAYS * slot_bytes
    before = _agree(scratch + _SEEN, acquire_at(line + _SEQUENCE, INTERPRETED))
    still = (before & 1) == 0
    way = _agree(scratch + _WAY, _find_way(line, set_slots, slot_bytes, tag, key, owner, still, INTERPRETED))
    source = set_slots + way * slot_bytes + _RECORD_AT + tl.load(view + _PART_AT)
    first, second = units_at(source + lanes * UNIT, (lanes < units) & (way >= 0), UNIT, INTERPRETED)
    way = fence(way, INTERPRETED)
    tl.debug_barrier()  # no thread looks again before all have loaded
    unchanged = still & (again_at(line + _SEQUENCE, INTERPRETED) == before)
    verdict = tl.where(unchanged, tl.where(way >= 0, _WHOLE, _ABSENT), _STALE).to(tl.int64)
    verdict = _agree(scratch + _VERDICT, verdict)
    whole = verdict == _WHOLE
    return verdict, way, tag, which, tl.where(whole, first, 0), tl.where(whole, second, 0)


@triton.jit
def _note_touch(view, at, which, way, tag, found, touches, touch_mask, counters, INTERPRETED: tl.constexpr):
    """Where counting this read would change the record's state, a touch into the ring, over the oldest."""
    line = tl.load(view + at + _INDEX) + which * _LINE
    state = bytes_at(line + _STATES + tl.maximum(way, 0), found, INTERPRETED)
    queue = state & _QUEUE
    news = found & (((state & _AWAITED) != 0) | ((queue != _SMALL_READ) & (queue != _MAIN_READ)))
    place = tl.atomic_add(counters + _TOUCHED, 1, mask=news, sem="relaxed")
    region = tl.load(view + at + _REGION)
    touch = _TOUCH | region | (which << _SET_SHIFT) | (way << _WAY_SHIFT) | tag
    tl.store(touches + (place & touch_mask), touch, mask=news)


@triton.jit
def _put(out, i, units, lanes, first, second, wanted, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Write the units of entry i, where that is wanted."""
    if UNIT == 16:
        both = tl.reshape(tl.join(first, second), (2 * TILE,))
        words = tl.arange(0, 2 * TILE)
        tl.store(out + i * units * 2 + words, both, mask=(words < 2 * units) & wanted)
    else:
        tl.store(out + i * units + lanes, first.to(out.dtype.element_ty), mask=(lanes < units) & wanted)


@triton.jit
def read_records(
    view, keys, out, missing, listed, touches, counters, scratch, units, touch_mask,
    ORDERS: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, KEEP_MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Copy a part of each record found; list the others. The grid is one program an entry.

    view     int64 [VIEW_WORDS] (engram_client/arena/shared_read.py) with addresses as the device has them;
             zeros where there is no arena
    keys     int64 [n], entry i of order i % ORDERS; -1 gets zeros, or with KEEP_MASKED nothing
    out      [n, units] of UNIT bytes, as int64, int32, int16 or uint8; for 16 bytes int64 [n, 2 * units]
    missing  bool [n]: neither found nor -1; their rows are zeros
    listed   int64 [n, 2] of position and key of each missing entry, in no order
    touches  int64 [touch_mask + 1], a ring
    counters int64: adds missing, masked and touches ever
    scratch  int64 [n, SCRATCH_WORDS]
    """
    i = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + i)
    owner = tl.load(view + _OWNER) + i % ORDERS
    lanes = tl.arange(0, TILE).to(tl.int64)
    scratch += i * _SCRATCH_WORDS
    looking = (tl.load(view + _NEW + _INDEX) != 0) & (key >= 0)
    if looking:  # else there may be no control word
        served = acquire_at(tl.load(view + _CONTROL), INTERPRETED) == tl.load(view + _SERVING)
        looking = _agree(scratch + _VERDICT, served.to(tl.int64)) != 0
        tl.debug_barrier()
    at = _NEW
    found = looking & False
    first = lanes * 0
    second = lanes * 0
    way = key * 0
    tag = key * 0
    which = key * 0
    tries = 0
    while looking:
        verdict, way, tag, which, first, second = _try_region(
            view, at, scratch, key, owner, units, lanes, UNIT, INTERPRETED
        )
        tries += 1
        found = verdict == _WHOLE
        over = found | (verdict == _ABSENT) | (tries == _TRIES)
        if over & (found == 0) & (at == _NEW):
            at = _OLD
            tries = 0
            over = tl.load(view + _OLD + _INDEX) == 0
        looking = over == 0
    masked = key == -1
    absent = (found == 0) & (masked == 0)
    _note_touch(view, at, which, way, tag, found, touches, touch_mask, counters, INTERPRETED)
    if KEEP_MASKED:
        _put(out, i, units, lanes, first, second, masked == 0, UNIT, TILE)
    else:
        _put(out, i, units, lanes, first, second, key == key, UNIT, TILE)
    tl.store(missing + i, absent)
    tl.atomic_add(counters + _MASKED, 1, mask=masked, sem="relaxed")
    place = tl.atomic_add(counters + _MISSED, 1, mask=absent, sem="relaxed")
    tl.store(listed + place * _LISTED, i, mask=absent)
    tl.store(listed + place * _LISTED + 1, key, mask=absent)
