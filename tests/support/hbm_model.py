"""The HBM arena in plain Python: sets of ways, walked by a clock's hand record by record."""

from __future__ import annotations

from dataclasses import dataclass, field

WAYS = 16
Name = tuple[int, int]  # key, owner


def set_of(name: Name, sets: int) -> int:
    """Written from the essay's formula, in numbers that cannot overflow."""
    key, owner = name
    mixed = key ^ (owner * 0x2545F491)
    for low, high in ((0x5851F42D, 0x14057B7F), (0x6C078965, 0x3C6EF35F)):
        mixed = (mixed % 2**32 * low) ^ (mixed // 2**32 * high)
        assert mixed < 2**63
        mixed ^= mixed // 2**29
    return mixed // 2**31 % 2**31 * sets // 2**31


@dataclass
class Way:
    name: Name
    record: bytes
    count: int = 0
    pinned: bool = False
    fresh: bool = True


@dataclass
class Set:
    ways: list[Way | None] = field(default_factory=lambda: [None] * WAYS)
    hand: int = 0

    def victim(self) -> int | None:
        """Walk to the way that a newcomer takes."""
        for step in range(WAYS):
            if self.ways[(self.hand + step) % WAYS] is None:
                return (self.hand + step) % WAYS
        others = [way for way in self.ways if way and not way.pinned and not way.fresh]
        while others:
            for step in range(WAYS):
                at = (self.hand + step) % WAYS
                way = self.ways[at]
                if way and way.count == 0 and not way.pinned and not way.fresh:
                    self.hand = (at + 1) % WAYS
                    return at
            for way in others:
                way.count -= 1
        return None


class Model:
    """`HbmArena` of so many sets."""

    def __init__(self, sets: int) -> None:
        self.sets = [Set() for _ in range(sets)]
        self.counters = dict.fromkeys(("hits", "misses", "masked", "admitted", "evicted", "left_out"), 0)

    def find(self, name: Name) -> Way | None:
        ways = self.sets[set_of(name, len(self.sets))].ways if name[0] >= 0 else []
        return next((way for way in ways if way and way.name == name), None)

    def lookup(self, names: list[Name]) -> list[bytes | None]:
        found = [self.find(name) for name in names]
        for way in {id(way): way for way in found if way}.values():
            way.count = min(3, way.count + 1)
        for name, way in zip(names, found, strict=True):
            self.counters["hits" if way else "masked" if name[0] == -1 else "misses"] += 1
        return [way.record if way else None for way in found]

    def admit(self, records: dict[Name, bytes], pinned: bool) -> None:
        taken = [0] * len(self.sets)
        present = {name: self.find(name) for name in records if name[0] >= 0}
        for name in sorted(present, key=lambda name: (name[1], name[0])):
            if (way := present[name]) is not None:
                way.pinned |= pinned
                continue
            number = set_of(name, len(self.sets))
            taken[number] += 1
            at = self.sets[number].victim() if taken[number] <= (WAYS if pinned else 4) else None
            if at is None:
                self.counters["left_out"] += 1
                continue
            self.counters["admitted"] += 1
            self.counters["evicted"] += self.sets[number].ways[at] is not None
            self.sets[number].ways[at] = Way(name, records[name], pinned=pinned)
        for each in self.held():
            each.fresh = False

    def held(self) -> list[Way]:
        return [way for each in self.sets for way in each.ways if way]
