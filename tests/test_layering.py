"""Imports point down only, and each third-party package stays behind its wall."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.source_tree import Import, imports, modules, relative

# The lowest first: a module imports its own layer and lower ones.
PACKAGES = ("engram_client", "tierstore", "tierbench")
SERVICE_LAYERS = (
    "kernels",
    "config",
    "format",
    "catalog",
    "devices",
    "packing",
    "tiers",
    "store",
    "updates",
    "snapshots",
    "training",
    "shm",
    "rpc",
    "daemon",
    "testing",
    "commands",
    "cli",
)

# Third-party package -> the only places that may import it, a file or a folder; lazily counts too.
COMMAND_LINES = ("tierstore/cli.py", "tierstore/commands/", "bench/")
TORCH = (
    "engram_client/arrays.py",  # the client's callers hand it tensors
    "engram_client/dequantize.py",
    "engram_client/hashing/device",
    "engram_client/gpu/",
    "engram_client/hashing/mapping.py",  # within `on_device`
    "engram_client/hbm/",
    "engram_client/modules/",
    "engram_client/training/",
    "tierstore/devices/gds",
    "tierstore/tiers/hbm",
    "bench/",
)
NUMBA = (
    "engram_client/jit.py",
    "engram_client/arena/",
    "engram_client/hashing/",
    "engram_client/kernels/",
    "tierstore/kernels/",
)
GRPC = ("tierstore/rpc/", "engram_client/transport/", "bench/")
# 2026-11-22: replays of millions of accesses need compiled loops; the simulators are no part of the product.
SIMULATORS = "bench/tierbench/policy/"
# Kernels for devices; imported within the trial of their group (engram_client/gpu/probe.py), nowhere else.
TRITON = (
    "engram_client/gpu/",
    "engram_client/hashing/device",
    "engram_client/hbm/",
    "tierstore/tiers/hbm",
    "bench/",
)
WALLS: dict[str, tuple[str, ...]] = {
    "numba": (*NUMBA, SIMULATORS),
    "llvmlite": NUMBA,
    "torch": TORCH,
    "triton": TRITON,
    "kvikio": ("tierstore/devices/gds",),
    "cupy": ("tierstore/devices/gds",),
    "grpc": GRPC,
    "grpc_health": GRPC,
    "grpc_reflection": GRPC,
    "lmdb": ("tierstore/catalog", "tierstore/updates/step_index", "bench/"),
    "rich": COMMAND_LINES,
    "matplotlib": COMMAND_LINES,
}


def product_imports() -> Iterator[tuple[str, str, Import]]:
    """(module, "file:line", import) of everything but the tests."""
    for name, path in modules().items():
        if name.split(".")[0] in PACKAGES:
            for found in imports(path):
                yield name, f"{relative(path)}:{found.line}", found


def test_packages_import_downwards() -> None:
    problems = []
    for name, where, found in product_imports():
        own, other = name.split(".")[0], found.name.split(".")[0]
        if other in PACKAGES and PACKAGES.index(other) > PACKAGES.index(own):
            problems.append(f"{where}: {own} imports {found.name}, which lies above it; move the code down")
        if other == "tests":
            problems.append(f"{where}: the product imports its tests ({found.name})")
    assert not problems, "\n".join(problems)


def test_every_part_of_the_service_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in modules() if name.startswith("tierstore.")}
    unknown = sorted(parts - set(SERVICE_LAYERS))
    assert not unknown, f"tierstore/{unknown}: give each a place in SERVICE_LAYERS of {__name__}"


def test_the_service_imports_downwards() -> None:
    problems = []
    for name, where, found in product_imports():
        own, other = name.split("."), found.name.split(".")
        if own[0] != "tierstore" or other[0] != "tierstore" or len(own) == 1 or len(other) == 1:
            continue
        if other[1] not in SERVICE_LAYERS:
            continue  # a name that tierstore/__init__.py exports
        if SERVICE_LAYERS.index(other[1]) > SERVICE_LAYERS.index(own[1]):
            problems.append(f"{where}: layer {own[1]} imports {found.name}, which lies above it")
    assert not problems, "\n".join(problems)


def test_third_party_packages_stay_behind_their_walls() -> None:
    problems = []
    for _, where, found in product_imports():
        package = found.name.split(".")[0]
        allowed = WALLS.get(package)
        if allowed is None or found.for_types_only or where.startswith(allowed):
            continue
        problems.append(f"{where}: {package} may be imported only in {', '.join(allowed)}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("engram_client", ("torch", "triton", "rich", "matplotlib", "tierstore")),
        ("tierstore.cli", ("torch", "rich", "matplotlib", "lmdb")),
        ("tierstore.store", ("torch", "grpc", "rich", "matplotlib")),
        ("tierstore.daemon", ("torch", "rich", "matplotlib")),
    ],
)
def test_what_an_import_really_loads(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print(*(m for m in {unwanted!r} if m in sys.modules))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [], (
        f"import {module} loads {child.stdout.strip()}: import it where it is used"
    )
