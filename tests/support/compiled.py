"""Triton kernels compiled for an H100 or H200 on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = GPUTarget("cuda", 90, 32)
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What a compiler and an assembler made of a kernel.

    registers, spilled_bytes: of a thread
    """

    ptx: str
    registers: int
    spilled_bytes: int

    def widths(self, operation: str) -> list[int]:
        """Bytes of each global access of a kind, "ld" or "st", in the order of the code."""
        found = []
        for line in self.ptx.splitlines():
            if f"{operation}.global" in line:
                vector = re.search(r"\.v(\d)\.", line)
                bits = re.search(r"\.[bsuf](\d+)\b", line)
                assert bits, line
                found.append(int(bits[1]) // 8 * (int(vector[1]) if vector else 1))
        return found

    def lines(self, word: str) -> list[str]:
        return [line.strip() for line in self.ptx.splitlines() if word in line]


def compiled(kernel: Any, warps: int = 4, **arguments: Any) -> Compiled:
    """Arguments by name: a type such as "*i64" (aligned to 16 bytes), "i32", or the value of a constant."""
    names = kernel.arg_names
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=SM_90, options={"num_warps": warps})
    told = _resources(made.asm["cubin"])
    return Compiled(made.asm["ptx"], told["REG"], told["STACK"] + told["LOCAL"])


def _resources(cubin: bytes) -> dict[str, int]:
    """What the assembler says of a kernel: REG, STACK, LOCAL and others."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", told.stdout + told.stderr)}
