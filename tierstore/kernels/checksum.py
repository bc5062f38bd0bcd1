"""Page checksums: XXH64 as published, over 4088 bytes, seeded with the table and the page number.

    checksum(page p of file U) = XXH64(page[0:4088], seed = XXH64(U || p as uint64, seed 0))

U is the file's 16-byte uuid; everything is little-endian, and the checksum fills the last 8 bytes
of the page. The seed makes a page that was written to the wrong place, or that belongs to another
file, as wrong as one with a flipped bit. Any xxhash library computes the same.

A page is 512 uint64 words here: 127 stripes of four words, three words more, and the checksum.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import load_byte, load_int, load_word
from engram_client.jit import inline_kernel, kernel

U64 = np.uint64
PRIME1 = U64(0x9E3779B185EBCA87)
PRIME2 = U64(0xC2B2AE3D27D4EB4F)
PRIME3 = U64(0x165667B19E3779F9)
PRIME4 = U64(0x85EBCA77C2B2AE63)
PRIME5 = U64(0x27D4EB2F165667C5)

PAYLOAD_WORDS = 511  # word 511 is the checksum


@inline_kernel
def _rotate(x, bits):
    return (x << U64(bits)) | (x >> U64(64 - bits))


@inline_kernel
def _lane(accumulator, word):
    return _rotate(accumulator + word * PRIME2, 31) * PRIME1


@inline_kernel
def _merge(hashed, lane):
    return (hashed ^ _lane(U64(0), lane)) * PRIME1 + PRIME4


@inline_kernel
def _absorb(hashed, word):
    return _rotate(hashed ^ _lane(U64(0), word), 27) * PRIME1 + PRIME4


@inline_kernel
def _avalanche(hashed):
    hashed = (hashed ^ (hashed >> U64(33))) * PRIME2
    hashed = (hashed ^ (hashed >> U64(29))) * PRIME3
    return hashed ^ (hashed >> U64(32))


@inline_kernel
def page_seed(page_number, uuid_lo, uuid_hi):
    """XXH64 of the uuid and the page number, 24 bytes, seed 0."""
    hashed = _absorb(PRIME5 + U64(24), U64(uuid_lo))
    hashed = _absorb(hashed, U64(uuid_hi))
    return _avalanche(_absorb(hashed, U64(page_number)))


@inline_kernel
def _hash_words(words, count, seed):
    """XXH64 of the first `count` words, which are at least four."""
    a = seed + PRIME1 + PRIME2
    b = seed + PRIME2
    c = seed
    d = seed - PRIME1
    striped = count // 4 * 4
    for i in range(0, striped, 4):
        a = _lane(a, words[i])
        b = _lane(b, words[i + 1])
        c = _lane(c, words[i + 2])
        d = _lane(d, words[i + 3])
    hashed = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
    hashed = _merge(_merge(_merge(_merge(hashed, a), b), c), d)
    hashed += U64(count * 8)
    for i in range(striped, count):
        hashed = _absorb(hashed, words[i])
    return _avalanche(hashed)


@inline_kernel
def hash_bytes(address, count, seed):
    """XXH64 of `count` bytes at `address`, however many."""
    at, end = address, address + count
    hashed = seed + PRIME5
    if count >= 32:
        a, b, c, d = seed + PRIME1 + PRIME2, seed + PRIME2, seed, seed - PRIME1
        while at + 32 <= end:
            a = _lane(a, U64(load_word(at)))
            b = _lane(b, U64(load_word(at + 8)))
            c = _lane(c, U64(load_word(at + 16)))
            d = _lane(d, U64(load_word(at + 24)))
            at += 32
        hashed = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        hashed = _merge(_merge(_merge(_merge(hashed, a), b), c), d)
    hashed += U64(count)
    while at + 8 <= end:
        hashed = _absorb(hashed, U64(load_word(at)))
        at += 8
    if at + 4 <= end:
        hashed = _rotate(hashed ^ (U64(load_int(at)) * PRIME1), 23) * PRIME2 + PRIME3
        at += 4
    while at < end:
        hashed = _rotate(hashed ^ (U64(load_byte(at)) * PRIME5), 11) * PRIME1
        at += 1
    return _avalanche(hashed)


@kernel
def bytes_checksum(data, seed):
    """XXH64 of uint8 [n], contiguous, with a seed."""
    hashed = hash_bytes(np.int64(data.ctypes.data), data.size, U64(seed))
    return hashed if data.size >= 0 else U64(0)  # the array is alive until here


@kernel
def words_checksum(words, seed):
    """XXH64 of uint64 [n >= 4] with a seed."""
    return _hash_words(words, words.size, U64(seed))


@kernel
def page_checksum(words, page_number, uuid_lo, uuid_hi):
    """Checksum of one page, uint64; `words` is uint64[512], of which the last is not read."""
    return _hash_words(words, PAYLOAD_WORDS, page_seed(page_number, uuid_lo, uuid_hi))


@kernel
def first_bad_page(pages, page_numbers, uuid_lo, uuid_hi, start, stop):
    """First i in [start, stop) whose page is damaged or misplaced, or -1.

    pages: uint64[n, 512]; page_numbers: int64[n], the number in the file each is meant to have.
    """
    for i in range(start, stop):
        if page_checksum(pages[i], page_numbers[i], uuid_lo, uuid_hi) != pages[i, PAYLOAD_WORDS]:
            return i
    return -1


@kernel
def seal_pages(pages, first_page_number, uuid_lo, uuid_hi, start, stop):
    """Write the checksum of pages[start:stop]; pages[i] is page `first_page_number + i` of its file."""
    for i in range(start, stop):
        pages[i, PAYLOAD_WORDS] = page_checksum(pages[i], first_page_number + i, uuid_lo, uuid_hi)


@kernel
def bad_pages(pages, first_page_number, uuid_lo, uuid_hi, start, stop, damaged):
    """Put every i in [start, stop) whose page is wrong into `damaged` (int64[stop - start]); how many.

    pages[i] is meant to be page `first_page_number + i` of its file.
    """
    found = 0
    for i in range(start, stop):
        if page_checksum(pages[i], first_page_number + i, uuid_lo, uuid_hi) != pages[i, PAYLOAD_WORDS]:
            damaged[found] = i
            found += 1
    return found
