"""How long a newcomer is on trial: two extremes duel in a few sets, the others follow what they show.

No trial suits every load. Text brings n-grams that come back soon or never: a *patient* set, with
four ways on trial and two reads to pass, throws the most of them out. Independent draws from a fixed
distribution reward what has come at all: an *eager* set, with one way and one read, keeps nearly
all its room for the main queue and lets the ghosts tell who comes again. Between them lies a
*neutral* set, with three ways and one read.

One set in every 16, or 32 in larger arenas, plays eager whatever comes and another patient, so both
are measured on the load of the moment. Writers count what these sets evict: an eviction is a miss,
so the fewer the better, and look-ups pay nothing. Every eight evictions a set there is a verdict on
the decayed counts; if one side evicts 0.75 % less, all other sets take its stance; below 0.25 % they
are neutral again. Early verdicts want three times that: nothing has passed a trial yet, and patience
looks worse than it is.

The sides are samples, and some sets simply hold what is asked for more. In a small arena that weighs
as much as the stance. So every 32 verdicts other sets take the sides, without a say in the first
four, and counts decay slowly: about 65,536 evictions of each side are remembered. In a large arena
this is what led to the last four verdicts, and it is no more than that early on.

The duel is int64 [WORDS], written under the arena's lock. Its counts are of one arena, its rates
are evictions a set and survive a change of size. Nothing depends on the clock or on chance.
"""

from __future__ import annotations

import numpy as np

from engram_client.jit import inline_kernel

NEUTRAL, EAGER, PATIENT = 0, 1, 2  # stances
TRIAL_WAYS, PASSING_READS = (3, 1, 4), (1, 1, 2)  # of each stance

WORDS = 9
STANCE, SPACING_BITS, SIDE_SETS, VERDICTS = range(4)
EVICTIONS, EAGER_EVICTIONS, PATIENT_EVICTIONS, EAGER_RATE, PATIENT_RATE = range(4, 9)

SETS_MIN = 64  # fewer sets have no duel and stay neutral
SIDE_SETS_WANTED = 192
SPACING_BITS_MIN, SPACING_BITS_MAX = 4, 5
VERDICT_EVERY = 8  # evictions a set, on average
VERDICTS_EARLY = 12
TURN_BITS, VERDICTS_MUTE = 5, 4  # a turn is 32 verdicts
EVIDENCE = 65_536  # evictions of one side that are remembered
UNIT = 1 << 20  # of a rate: one eviction a set between two verdicts
EARLY_CLEAR, CLEAR, NONE = 22_500, 7_500, 2_500  # differences in millionths


def new_duel(sets: int) -> np.ndarray:
    """A duel that has seen nothing, for an arena of so many sets."""
    duel = np.zeros(WORDS, np.int64)
    fit_duel(duel, sets)
    return duel


def fit_duel(duel: np.ndarray, sets: int) -> None:
    """Go on in an arena of another size; stance and rates stay."""
    bits = SPACING_BITS_MIN
    while bits < SPACING_BITS_MAX and SIDE_SETS_WANTED << bits + 1 <= sets:
        bits += 1
    duel[SPACING_BITS] = bits
    duel[SIDE_SETS] = sets >> bits if sets >= SETS_MIN else 0
    duel[EVICTIONS] = duel[EAGER_EVICTIONS] = duel[PATIENT_EVICTIONS] = 0
    if sets < SETS_MIN:
        duel[STANCE] = NEUTRAL


@inline_kernel
def side_of(duel, which):
    """EAGER or PATIENT for a set that always is; NEUTRAL for those that follow."""
    bits = duel[SPACING_BITS]
    if which >> bits >= duel[SIDE_SETS]:  # both sides have as many
        return NEUTRAL
    place = which + (duel[VERDICTS] >> TURN_BITS) & (1 << bits) - 1
    return EAGER if place == 0 else PATIENT if place == 1 << bits - 1 else NEUTRAL


@inline_kernel
def stance_of(duel, which):
    """How set `which` treats newcomers."""
    side = side_of(duel, which)
    return side if side != NEUTRAL else duel[STANCE]


@inline_kernel
def note_eviction(duel, which, sets):
    """Set `which` of `sets` had to give up a record for one that was asked for."""
    if duel[SIDE_SETS] == 0:
        return
    side = side_of(duel, which)
    if side == EAGER:
        duel[EAGER_EVICTIONS] += 1
    elif side == PATIENT:
        duel[PATIENT_EVICTIONS] += 1
    duel[EVICTIONS] += 1
    if duel[EVICTIONS] >= VERDICT_EVERY * sets:
        judge(duel)


@inline_kernel
def judge(duel):
    """Add the counts to the rates, decide, and begin to count anew."""
    early = duel[VERDICTS] < VERDICTS_EARLY
    turn, since = duel[VERDICTS] >> TURN_BITS, duel[VERDICTS] & (1 << TURN_BITS) - 1
    if turn == 0 or since >= VERDICTS_MUTE:
        forgotten = UNIT // 4
        if not early:
            forgotten = min(forgotten, UNIT * VERDICT_EVERY * duel[SIDE_SETS] // EVIDENCE)
        add_evictions(duel, EAGER_RATE, EAGER_EVICTIONS, forgotten)
        add_evictions(duel, PATIENT_RATE, PATIENT_EVICTIONS, forgotten)
        clear = EARLY_CLEAR if early else CLEAR
        duel[STANCE] = verdict(duel[EAGER_RATE], duel[PATIENT_RATE], duel[STANCE], clear)
    duel[VERDICTS] += 1
    duel[EVICTIONS] = duel[EAGER_EVICTIONS] = duel[PATIENT_EVICTIONS] = 0


@inline_kernel
def add_evictions(duel, rate, evictions, forgotten):
    """Let one side's rate forget so many parts of UNIT, and take in what it has evicted since."""
    duel[rate] += UNIT * duel[evictions] // duel[SIDE_SETS] - duel[rate] * forgotten // UNIT


@inline_kernel
def verdict(eager, patient, before, clear):
    """The followers' stance from both rates and the stance they had; `clear` in millionths."""
    better = EAGER if eager < patient else PATIENT
    difference = abs(eager - patient) * 2_000_000
    if difference > clear * (eager + patient):
        return better
    if difference < NONE * (eager + patient) or before != better:
        return NEUTRAL
    return before
