"""The model's side of the demo: V4.1's gate on the rows that came back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from engram_client import Table
from engram_client.modules import DeepseekV41Engram


class Gate:
    """`layers.{L}.engram` of the checkpoint, without its table, and made-up hidden states."""

    def __init__(self, checkpoint: Path, layer: int) -> None:
        prefix = f"layers.{layer}.engram."
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                names = [n for n in file.keys() if n.startswith(prefix) and ".embed." not in n]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name) for name in names}
        self._module = DeepseekV41Engram.from_state_dict(tensors, prefix=prefix)
        self._shape = tensors[prefix + "q_weight"].shape  # [hc_mult, hidden size]
        self._random = torch.Generator().manual_seed(layer)

    def run(self, table: Table, rows: np.ndarray) -> float:
        """Dequantize rows [n, H, 264], run the gate; how far the hidden states moved, root mean square.

        Raises AssertionError where a result is not finite.
        """
        with torch.no_grad():
            embeddings = table.dequantize(rows).flatten(1)
            hidden = torch.randn(len(rows), *self._shape, generator=self._random).to(torch.bfloat16)
            out = self._module(hidden, embeddings)
            assert bool(torch.isfinite(out).all()), "the gate gave a result that is not finite"
            return float((out - hidden).float().square().mean().sqrt())
