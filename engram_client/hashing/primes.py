"""Prime numbers for head sizes: an exact test and the next unused ones."""

from __future__ import annotations

from collections.abc import Iterator

# With these bases Miller-Rabin is exact below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(number: int) -> bool:
    """Whether `number` is prime; exact for every number below 3.3e24."""
    if number < 2:
        return False
    for small in _WITNESSES:
        if number % small == 0:
            return number == small
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, witness, odd, twos) for witness in _WITNESSES)


def _passes(number: int, witness: int, odd: int, twos: int) -> bool:
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def primes_from(start: int) -> Iterator[int]:
    """Every prime >= `start`, rising, without end."""
    number = start
    while True:
        if is_prime(number):
            yield number
        number += 1
