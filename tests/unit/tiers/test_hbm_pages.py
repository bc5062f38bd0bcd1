"""Pages checked and rows gathered on a device: against xxhash, against our compiled kernels, bit for bit."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash

from tierstore.format.header import uuid_words
from tierstore.kernels.checksum import bad_pages as compiled_bad_pages
from tierstore.kernels.checksum import seal_pages
from tierstore.tiers import hbm_pages

UUID = bytes(range(200, 216))  # both words above 2^63


def as_tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int64))


def sealed(random: np.random.Generator, count: int, first: int) -> np.ndarray:
    pages = random.integers(0, 2**64, (count, 512), np.uint64)
    seal_pages(pages, first, *uuid_words(UUID), 0, count)
    return pages


def test_checksums_are_those_of_xxhash() -> None:
    random = np.random.default_rng(1)
    pages, numbers = random.integers(0, 2**64, (5, 512), np.uint64), np.array([0, 1, 9, 2**31, 2**40])
    pages[0], pages[1] = 0, 2**64 - 1
    found = hbm_pages.page_checksums(as_tensor(pages), torch.from_numpy(numbers), uuid_tensor())
    for page, number, checksum in zip(pages, numbers, found.numpy().view(np.uint64), strict=True):
        seed = xxhash.xxh64_intdigest(UUID + struct.pack("<Q", int(number)), 0)
        assert checksum == xxhash.xxh64_intdigest(page[:511].tobytes(), seed)


def uuid_tensor() -> torch.Tensor:
    return torch.from_numpy(np.array(uuid_words(UUID), np.uint64).view(np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_and_any_wrong_place_is_found_as_the_compiled_kernel_finds_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    pages = sealed(random, 40, first=100)
    for page in random.permutation(40)[:9]:
        pages[page, random.integers(512)] ^= np.uint64(1 << int(random.integers(64)))
    pages[[3, 4]] = pages[[4, 3]]
    expected = np.zeros(40, np.int64)
    count = compiled_bad_pages(pages, 100, *uuid_words(UUID), 0, 40, expected)
    slots = torch.from_numpy(random.permutation(40))
    found = hbm_pages.bad_pages(as_tensor(pages), slots, slots + 100, uuid_tensor())
    assert sorted(slots[found].tolist()) == expected[:count].tolist()
    assert count >= 9
    none = torch.empty(0, dtype=torch.int64)
    assert hbm_pages.bad_pages(as_tensor(pages), none, none, uuid_tensor()).shape == (0,)


@pytest.mark.parametrize("row_bytes", [264, 84, 10, 21, 4088])
def test_rows_are_gathered(row_bytes: int) -> None:
    random = np.random.default_rng(row_bytes)
    pages = random.integers(0, 256, (6, 4096), np.uint8)
    per_page = 4088 // row_bytes
    slots, inside = random.integers(0, 6, 30), random.integers(0, per_page, 30)
    targets, out = random.permutation(40)[:30], torch.zeros((40, row_bytes), dtype=torch.uint8)
    expected = np.zeros((40, row_bytes), np.uint8)
    for slot, place, target in zip(slots, inside, targets, strict=True):
        expected[target] = pages[slot, place * row_bytes : (place + 1) * row_bytes]
    tensors = (torch.from_numpy(each) for each in (slots, inside * row_bytes, targets))
    hbm_pages.gather_rows(torch.from_numpy(pages).view(torch.int64), *tensors, out, row_bytes)
    assert np.array_equal(out.numpy(), expected)


INTERPRETED = """
import torch
from tierstore.tiers import hbm_pages
assert hbm_pages.PAGES.serves(torch.device("cpu")), "the kernels fail their trial"
from tests.unit.tiers import test_hbm_pages as tests
tests.test_rows_are_gathered(21)
"""


def test_the_kernels_interpreted() -> None:
    """Triton chooses when it is imported, so this takes a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([".", "bench"])}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernels_compile_for_a_gpu() -> None:
    """To machine code of sm_90; that it runs there is for a machine that has one."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tierstore.tiers import hbm_pages_kernels as kernels

    numbers = "*i64"
    for kernel, signature, constants in (
        (
            kernels.bad_pages_kernel,
            {**dict.fromkeys(("pages", "slots", "numbers", "uuid"), numbers), "bad": "*i8", "count": "i32"},
            {"BLOCK": kernels.PAGES_A_PROGRAM},
        ),
        (
            kernels.gather_rows_kernel,
            {
                "words": "*i32",
                "starts": numbers,
                "targets": numbers,
                "rows": "*i32",
                "count": "i32",
                "width": "i32",
            },
            {"ROWS": kernels.ROWS_A_PROGRAM, "WIDTH": 128},
        ),
    ):
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
