"""What a module does with rows on a device, without a pass over memory more than the arithmetic needs.

    bytes of rows, wherever they lie --decode--> the projection's input --wkv--> keys and value
    streams, keys, value --gate--> streams with the memory added

In plain torch operations a row is gathered, its weights and scales are copied out, cast to float32,
multiplied and rounded, each into memory of its own: some 4 KB are written and read for 264 bytes of row; the
kernel reads these and writes 512 bytes of BF16. V4.1's gate makes eight tensors of the streams' size in
float32; the kernel reads streams, keys and value once and writes the streams.

The plain forms (`engram_client.dequantize`, `engram_client.modules.norms`) are what the kernels are tried
against, serve where they do not, and where gradients are wanted. The decoded numbers are the same bit for
bit; the gate differs by the order of its sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_client.gpu.probe import KernelGroup, made_current
from engram_client.spec import RowLayout

WIDTH_MAX = 1 << 14  # of a stream that a program holds in registers
ROWS_A_PROGRAM = 8
WEIGHTS_MAX = 4096


def decodes(layout: RowLayout, result: torch.dtype, device: torch.device) -> bool:
    """Whether `decode` does rows of this layout on this device."""
    weight = layout.field("weight")
    scale = next((f for f in layout.fields if f.name == "scale"), None)
    known = weight.dtype == "float8_e4m3fn" and weight.count <= WEIGHTS_MAX and result != torch.float64
    known = known and (scale is None or scale.dtype == "float8_e8m0fnu")
    return known and DECODE.serves(device)


def decode(layout: RowLayout, rows: Tensor, result: torch.dtype, index: Tensor | None = None) -> Tensor:
    """Rows uint8 [..., row_bytes] to [..., embedding_dim] of dtype `result`, for which `decodes` said yes.

    With `index` int64 [...] rows are lines [m, H, row_bytes], and the result is that of `rows[index]`.
    """
    weight = layout.field("weight")
    rows = rows.contiguous()
    lines = rows.shape[:-1] if index is None else (*index.shape, rows.shape[1])
    out = torch.empty((*lines, weight.count), dtype=result, device=rows.device)
    _launch_decode(layout, rows, out, index, 1 if index is None else rows.shape[1])
    return out


def _launch_decode(layout: RowLayout, rows: Tensor, out: Tensor, index: Tensor | None, group: int) -> None:
    from engram_client.gpu.fused_kernels import decode_rows

    weight, count = layout.field("weight"), out.numel() // layout.field("weight").count
    scale = next((f for f in layout.fields if f.name == "scale"), None)
    if not count:
        return
    with made_current(rows.device):
        decode_rows[(-(-count // ROWS_A_PROGRAM),)](
            rows, rows if index is None else index.contiguous(), out, count,
            1.0 if layout.global_scale is None else float(layout.global_scale),
            ROW_BYTES=layout.row_bytes, WEIGHT_AT=layout.offset_bytes("weight"),
            SCALE_AT=0 if scale is None else layout.offset_bytes("scale"),
            WEIGHTS=weight.count, GROUP=group,
            SCALE_BLOCK=0 if scale is None else weight.count // scale.count,
            INDEXED=index is not None, TILE=1 << (weight.count - 1).bit_length(), ROWS=ROWS_A_PROGRAM,
        )  # fmt: skip


def gates(hidden_states: Tensor, projected: Tensor, *weights: Tensor) -> bool:
    """Whether `gate` does these on their device: no gradients are wanted, nothing is wider than float32."""
    tensors = (hidden_states, projected, *weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if any(t.dtype == torch.float64 or t.device != hidden_states.device for t in tensors):
        return False
    return hidden_states.shape[-1] <= WIDTH_MAX and GATE.serves(hidden_states.device)


def gate(
    hidden_states: Tensor,
    projected: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float | None,
    dead: Tensor | None = None,
) -> Tensor:
    """hidden_states [..., streams, D] with the memory of projected [..., (streams + 1) * D] let in.

    Weights [streams, D]; `dead` bool [...]. `gates` must have said yes. As
    `engram_client.modules.DeepseekV41Engram` behind its projection.
    """
    from engram_client.gpu.fused_kernels import gate as kernel

    streams, width = hidden_states.shape[-2:]
    x = hidden_states.contiguous()
    out = torch.empty_like(x)
    positions = x.numel() // (streams * width)
    if not positions:
        return out
    tile = 1 << max(4, (width - 1).bit_length())
    with made_current(x.device):
        kernel[(positions, streams)](
            x, projected.contiguous(), query_weight.contiguous(), key_weight.contiguous(),
            x if dead is None else dead.contiguous(), out, float(width) ** 0.5,
            torch.finfo(torch.float32).eps if eps is None else float(eps),
            STREAMS=streams, WIDTH=width, TILE=tile, HAS_DEAD=dead is not None,
            num_warps=max(1, min(16, tile // 512)),
        )  # fmt: skip
    return out


def _try_decode(device: torch.device) -> None:
    """Every code under every scale, in lines that are picked, bit for bit as torch has it."""
    from engram_client.dequantize import by_arithmetic
    from engram_client.spec import Field

    layout = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)))
    rows = torch.empty((256, 264), dtype=torch.uint8)
    rows[:, :256] = torch.arange(256, dtype=torch.uint8)
    rows[:, 256:] = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    lines = rows.reshape(128, 2, 264).to(device)
    index = torch.arange(127, -1, -1, device=device)
    for result, first in ((torch.float32, 0), (torch.bfloat16, 16)):  # Triton interprets small BF16 wrongly
        picks = index[: 128 - first // 2]
        found, wanted = decode(layout, lines, result, picks), by_arithmetic(layout, lines[picks], result)
        if not ((found == wanted) | (found.isnan() & wanted.isnan())).all():
            raise RuntimeError("rows were not decoded as torch decodes them")


def _try_gate(device: torch.device) -> None:
    from engram_client.modules.norms import context_gate

    generator = torch.Generator().manual_seed(3)
    x, projected = torch.randn(2, 4, 48, generator=generator), torch.randn(2, 5, 48, generator=generator)
    weights = torch.randn(2, 4, 48, generator=generator)
    dead = torch.tensor([False, True])
    let_in = context_gate(x, projected[:, :-1], weights[0], weights[1], 1e-20)
    let_in = let_in.masked_fill(dead.unsqueeze(-1), 0.0)
    wanted = x + let_in.unsqueeze(-1) * projected[:, -1:]
    there = [each.to(device) for each in (x, projected.flatten(1), weights[0], weights[1])]
    found = gate(there[0], there[1], there[2], there[3], 1e-20, dead.to(device))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


DECODE = KernelGroup("decoding of FP8 rows", "some ten operations over four times the memory", _try_decode)
GATE = KernelGroup("V4.1's gate", "some fifteen operations, eight of them over all streams", _try_gate)
