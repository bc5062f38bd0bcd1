"""Pages that lie in device memory: their checksums, and the rows in them put where they are wanted.

The twins in torch operations of the kernels in hbm_pages_kernels.py, for CPU tensors and for devices where
those do not serve. XXH64 is arithmetic of unsigned 64-bit numbers; torch has signed ones only, whose sums and
products have the same bits, and a right shift without the sign is a shift and a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_client.gpu import KernelGroup
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.checksum import PAYLOAD_WORDS, PRIME1, PRIME2, PRIME3, PRIME4, PRIME5

PAGE_WORDS = PAGE_BYTES // 8
UNITS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
)  # rows are copied in the widest that divides them


def bad_pages(pages: Tensor, slots: Tensor, numbers: Tensor, uuid: Tensor) -> Tensor:
    """Which pages are damaged or misplaced, bool [n]; all on one device, which is not waited for.

    pages int64 [m, 512]; page i lies in slot `slots[i]` and is meant to be page `numbers[i]` of its file,
    both int64 [n]; uuid int64 [2], the words of the file's uuid.
    """
    if not len(slots):
        return torch.zeros(0, dtype=torch.bool, device=pages.device)
    if PAGES.serves(pages.device):
        from tierstore.tiers.hbm_pages_kernels import launch_bad_pages

        return launch_bad_pages(pages, slots, numbers, uuid)
    return twin_bad_pages(pages, slots, numbers, uuid)


def gather_rows(
    pages: Tensor, slots: Tensor, offsets: Tensor, targets: Tensor, out: Tensor, row_bytes: int
) -> None:
    """Copy rows out of pages: row i, at byte `offsets[i]` of page `slots[i]`, goes to row `targets[i]`.

    pages int64 [n, 512]; slots, offsets and targets int64 [rows]; out uint8 [k, row_bytes], contiguous, k
    above any target. Offsets are multiples of row_bytes. All on one device, which is not waited for.
    """
    if not len(slots):
        return
    unit = next(unit for unit in UNITS if row_bytes % unit.itemsize == 0)
    words, rows = pages.view(-1).view(unit), out.view(unit)
    starts = (slots * PAGE_BYTES + offsets) // unit.itemsize
    if PAGES.serves(pages.device):
        from tierstore.tiers.hbm_pages_kernels import launch_gather_rows

        launch_gather_rows(words, starts, targets, rows)
    else:
        twin_gather_rows(words, starts, targets, rows)


def twin_bad_pages(pages: Tensor, slots: Tensor, numbers: Tensor, uuid: Tensor) -> Tensor:
    """See `bad_pages`."""
    pages = pages.index_select(0, slots)
    return page_checksums(pages, numbers, uuid) != pages[:, PAYLOAD_WORDS]


def page_checksums(pages: Tensor, numbers: Tensor, uuid: Tensor) -> Tensor:
    """What `tierstore.kernels.checksum.page_checksum` says of each page, as int64 [n]."""
    seeds = _page_seeds(numbers, uuid)
    lanes = torch.stack((seeds + P1 + P2, seeds + P2, seeds, seeds - P1), dim=1)
    for start in range(0, PAYLOAD_WORDS // 4 * 4, 4):
        lanes = _lane(lanes, pages[:, start : start + 4])
    hashed = sum(_rotate(lanes[:, i], bits) for i, bits in enumerate((1, 7, 12, 18)))
    assert isinstance(hashed, Tensor)
    for i in range(4):
        hashed = (hashed ^ _lane(torch.zeros_like(hashed), lanes[:, i])) * P1 + P4
    hashed = hashed + PAYLOAD_WORDS * 8
    for i in range(PAYLOAD_WORDS // 4 * 4, PAYLOAD_WORDS):
        hashed = _absorb(hashed, pages[:, i])
    return _avalanche(hashed)


def twin_gather_rows(words: Tensor, starts: Tensor, targets: Tensor, rows: Tensor) -> None:
    """words [m] and rows [k, w] of one dtype; row targets[i] becomes words[starts[i] : starts[i] + w]."""
    inside = torch.arange(rows.shape[1], device=words.device)
    rows.index_copy_(0, targets, words[starts.unsqueeze(1) + inside])


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


P1, P2, P3, P4, P5 = (_signed(int(prime)) for prime in (PRIME1, PRIME2, PRIME3, PRIME4, PRIME5))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right, without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _rotate(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shifted(x, 64 - bits)


def _lane(accumulator: Tensor, word: Tensor) -> Tensor:
    return _rotate(accumulator + word * P2, 31) * P1


def _absorb(hashed: Tensor, word: Tensor) -> Tensor:
    return _rotate(hashed ^ _lane(torch.zeros_like(word), word), 27) * P1 + P4


def _avalanche(hashed: Tensor) -> Tensor:
    hashed = (hashed ^ _shifted(hashed, 33)) * P2
    hashed = (hashed ^ _shifted(hashed, 29)) * P3
    return hashed ^ _shifted(hashed, 32)


def _page_seeds(numbers: Tensor, uuid: Tensor) -> Tensor:
    hashed = torch.full_like(numbers, _signed((int(PRIME5) + 24) % (1 << 64)))
    for word in (uuid[0], uuid[1], numbers):
        hashed = _absorb(hashed, word.expand(len(numbers)))
    return _avalanche(hashed)


def _trial(device: torch.device) -> None:
    """Kernels and twins on pages of which one is right."""
    from tierstore.tiers.hbm_pages_kernels import launch_bad_pages, launch_gather_rows

    pages = torch.arange(3 * PAGE_WORDS, device=device).view(3, PAGE_WORDS) * P3
    numbers, uuid = torch.tensor([7, 8, 9], device=device), torch.tensor([P1, 5], device=device)
    slots = torch.tensor([2, 0, 1], device=device)
    pages[0, PAYLOAD_WORDS] = page_checksums(pages[0:1], numbers[1:2], uuid)[0]
    found = launch_bad_pages(pages, slots, numbers, uuid)
    assert torch.equal(found, twin_bad_pages(pages, slots, numbers, uuid)), "page checksums differ"
    assert found.tolist() == [True, False, True], "page checksums are wrong"
    words, rows = pages.view(-1), torch.zeros((4, 33), dtype=torch.int64, device=device)
    expected = torch.zeros_like(rows)
    places = (torch.tensor([33, 512 + 66, 5], device=device), torch.tensor([2, 0, 3], device=device))
    launch_gather_rows(words, *places, rows)
    twin_gather_rows(words, *places, expected)
    assert torch.equal(rows, expected), "rows differ"


PAGES = KernelGroup(
    "checking pages in device memory", "a thousand small operations for each batch of pages", _trial
)
