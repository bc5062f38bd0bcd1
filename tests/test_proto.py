"""The checked-in protobuf stub is what the pinned compiler makes of proto/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engram_client.wire import memory_pb2
from tests.source_tree import ROOT

PROTO = "tierstore/v1/memory.proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stub")
    flags = [f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *flags, str(ROOT / "proto" / PROTO)], check=True
    )
    return out / Path(PROTO).parent


@pytest.mark.parametrize("name", ["memory_pb2.py", "memory_pb2.pyi"])
def test_the_stub_is_fresh(generated: Path, name: str) -> None:
    checked_in = (ROOT / "engram_client" / "wire" / name).read_bytes()
    same = checked_in == (generated / name).read_bytes()
    assert same, f"engram_client/wire/{name} is not what proto/{PROTO} compiles to; run: make proto"


def test_the_package_says_its_version() -> None:
    assert memory_pb2.DESCRIPTOR.package == "tierstore.v1"
