"""Triton kernels compiled for an H100 or H200 on a machine without a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = GPUTarget("cuda", 90, 32)
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel. spills_bytes: of a thread, for want of registers."""

    ptx: str
    cubin: bytes

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
    return Compiled(made.asm["ptx"], made.asm["cubin"])
