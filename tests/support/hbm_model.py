"""The HBM arena in plain Python: sets of two queues that are walked record by record, with ghosts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WAYS = 16
TRIAL, READS_MAX, PER_SET = 3, 4, 8
Name = tuple[int, int]  # key, owner


def mixed(name: Name) -> int:
    """Written from the essay's formula, in numbers that cannot overflow."""
    key, owner = name
    number = key ^ (owner * 0x2545F491)
    for low, high in ((0x5851F42D, 0x14057B7F), (0x6C078965, 0x3C6EF35F)):
        number = (number % 2**32 * low) ^ (number // 2**32 * high)
        assert number < 2**63
        number ^= number // 2**29
    return number


def set_of(name: Name, sets: int) -> int:
    return mixed(name) // 2**31 % 2**31 * sets // 2**31


def fingerprint(name: Name) -> int:
    return max(1, mixed(name) % 2**15)


@dataclass
class Held:
    name: Name
    record: bytes
    reads: int = 0
    seen: bool = False  # by a look-up since the set last took one in


@dataclass
class Set:
    """small, main: the oldest first. The pinned are in neither."""

    small: list[Held] = field(default_factory=list)
    main: list[Held] = field(default_factory=list)
    pinned: list[Held] = field(default_factory=list)
    ghosts: deque[int] = field(default_factory=lambda: deque([0] * WAYS, maxlen=WAYS))

    def held(self) -> list[Held]:
        return [*self.small, *self.main, *self.pinned]

    def count_reads(self) -> None:
        for each in self.small:
            each.reads = max(each.reads, int(each.seen))
        for each in self.main:
            each.reads = min(READS_MAX, each.reads + each.seen)
        for each in self.held():
            each.seen = False

    def make_room(self) -> bool | None:
        """Let one go where the set is full: whether one went, None where none can."""
        if len(self.held()) < WAYS:
            return False
        while self.small or self.main:
            if len(self.small) >= TRIAL or not self.main:
                first = self.small.pop(0)
                if not first.reads:
                    break
                first.reads = 0
            else:
                first = self.main.pop(0)
                if not first.reads:
                    break
                first.reads -= 1
            self.main.append(first)
        else:
            return None
        self.ghosts.append(fingerprint(first.name))
        return True


class Model:
    """`HbmArena` of so many sets."""

    def __init__(self, sets: int) -> None:
        self.sets = [Set() for _ in range(sets)]
        self.counters = dict.fromkeys(("hits", "misses", "masked", "admitted", "evicted", "left_out"), 0)

    def set_of(self, name: Name) -> Set:
        return self.sets[set_of(name, len(self.sets))]

    def find(self, name: Name) -> Held | None:
        held = self.set_of(name).held() if name[0] >= 0 else []
        return next((each for each in held if each.name == name), None)

    def lookup(self, names: list[Name]) -> list[bytes | None]:
        found = [self.find(name) for name in names]
        for name, each in zip(names, found, strict=True):
            self.counters["hits" if each else "masked" if name[0] == -1 else "misses"] += 1
            if each:
                each.seen = True
        return [each.record if each else None for each in found]

    def admit(self, names: list[Name], records: dict[Name, bytes], pinned: bool) -> None:
        asked: dict[int, list[Name]] = {}
        for name in names:
            if name[0] >= 0:
                asked.setdefault(set_of(name, len(self.sets)), []).append(name)
        per_set = WAYS if pinned else PER_SET
        for number, wanted in asked.items():
            self.sets[number].count_reads()
            for name in wanted[:per_set]:
                self.admit_one(self.sets[number], name, records[name], pinned)
            self.counters["left_out"] += len(wanted[per_set:])

    def admit_one(self, here: Set, name: Name, record: bytes, pinned: bool) -> None:
        present = self.find(name)
        if present is not None:
            if pinned and present not in here.pinned:
                (here.small if present in here.small else here.main).remove(present)
                here.pinned.append(present)
            return
        known = fingerprint(name) in here.ghosts
        here.ghosts = deque((0 if g == fingerprint(name) else g for g in here.ghosts), maxlen=WAYS)
        went = here.make_room()
        if went is None:
            self.counters["left_out"] += 1
            return
        self.counters["admitted"] += 1
        self.counters["evicted"] += went
        (here.pinned if pinned else here.main if known else here.small).append(Held(name, record))

    def held(self) -> list[Held]:
        return [each for here in self.sets for each in here.held()]
