"""From a checkpoint's tensors to a module's: names checked, shapes checked, FP8 made whole.

A module here holds everything of its layer but the table, which the service has. The table's
tensors may still lie in the state dict under their published names: they are checked for the
shape they must have and then passed over, by name. Any other surplus or missing name is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engram_client.dequantize import e8m0_to_float32
from engram_client.errors import FormatError

StateDict = Mapping[str, Tensor]


class TableBeside(nn.Module):
    """Base of modules whose table is served: `load_state_dict` passes the table's tensors over.

    `table_names` are prefixes of those names inside the module; `embedding_dim` counts the numbers
    of all heads of one token, which the width of a table must divide.
    """

    table_names: tuple[str, ...] = ()
    embedding_dim: int

    def prepare_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rewrite tensors of the checkpoint, in this copy of the dict, into the module's own."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.prepare_state(state_dict, prefix)
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        for key in [k for k in unexpected_keys if k.startswith(tuple(prefix + n for n in self.table_names))]:
            unexpected_keys.remove(key)
            error_msgs.extend(self._table_errors(key, state_dict[key]))

    def _table_errors(self, key: str, table: Tensor) -> list[str]:
        width = table.shape[1] if table.ndim == 2 else 0
        if not key.endswith("weight") or (width and self.embedding_dim % width == 0):
            return []
        need = f"[rows, dim] with dim a divisor of embedding_dim = {self.embedding_dim}"
        return [f"table tensor {key} must be {need}, got {list(table.shape)}"]


def under_prefix(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it. FormatError where there are none."""
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        some = ", ".join(list(state_dict)[:3]) or "nothing"
        raise FormatError(
            f"state dict: no tensor is named {prefix!r}...; it holds {some}, ...; check prefix="
        )
    return found


def tensor_of(state_dict: StateDict, name: str, ndim: int) -> Tensor:
    """One tensor, with its number of dimensions checked."""
    if name not in state_dict:
        some = ", ".join(sorted(state_dict)[:8])
        raise FormatError(f"state dict: tensor {name!r} is missing; it holds {some}; check prefix=")
    tensor = state_dict[name]
    if tensor.ndim != ndim:
        raise FormatError(f"state dict: {name} must have {ndim} dimensions, got shape {list(tensor.shape)}")
    return tensor


Module = TypeVar("Module", bound=nn.Module)


def filled(
    make: Callable[[], Module], state_dict: StateDict, like: Tensor, dtype: torch.dtype | None
) -> Module:
    """The module that `make` describes, filled with the state dict, on the device of `like`.

    Its parameters take `dtype`, or that of `like` (bfloat16 for one-byte weights). They are made
    without memory first, since filling 150 M of them with random numbers takes longer than loading.
    """
    if not like.is_floating_point():
        raise FormatError(
            f"state dict: weights must be floating, got {like.dtype}; view FP8 codes as FP8 first"
        )
    if dtype is None:
        dtype = torch.bfloat16 if like.element_size() == 1 else like.dtype
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=like.device)
    load_strictly(module, state_dict)
    return module


def load_strictly(module: nn.Module, state_dict: StateDict) -> None:
    """`load_state_dict` with every disagreement raised as one FormatError."""
    try:
        module.load_state_dict(dict(state_dict), strict=True)
    except RuntimeError as error:
        raise FormatError(f"state dict does not fit: {error}") from error


def unscale(weight: Tensor, scale: Tensor) -> Tensor:
    """A block-scaled matrix to float32: weight [R, C], scale [r, c], one scale a block of R/r x C/c.

    Scales are E8M0 (its torch dtype, or uint8 codes) or floating. A block's sides must be powers
    of two or the whole matrix': where the last block is cut short, as 480 rows cut by 128, the
    block cannot be told from the shapes, and a guess would give wrong weights.
    """
    if scale.ndim != 2 or weight.ndim != 2:
        raise FormatError(
            f"block-scaled weight: both must be matrices, got {list(weight.shape)} and {list(scale.shape)}"
        )
    widths = [size // max(blocks, 1) for size, blocks in zip(weight.shape, scale.shape, strict=True)]
    for dim, (width, blocks) in enumerate(zip(widths, scale.shape, strict=True)):
        if width * blocks != weight.shape[dim] or (blocks > 1 and width & (width - 1)):
            raise FormatError(
                f"block-scaled weight: scales {list(scale.shape)} do not cut weights {list(weight.shape)} "
                f"into blocks of a power of two along dimension {dim}; multiply them yourself and pass the "
                "whole weight, without its scale"
            )
    whole = weight.to(torch.float32, copy=True)
    blocked = whole.view(scale.shape[0], widths[0], scale.shape[1], widths[1])
    blocked *= _scale_factors(scale)[:, None, :, None]  # in place: a real wkv is 600 MB in float32
    return whole


def _scale_factors(scale: Tensor) -> Tensor:
    if scale.element_size() > 1:
        return scale.float()
    # By name: the torch dtype is missing from older releases, which hold the codes as uint8.
    if str(scale.dtype) not in ("torch.uint8", "torch.float8_e8m0fnu"):
        raise FormatError(
            f"block-scaled weight: scales must be E8M0, uint8 codes or floating, got {scale.dtype}"
        )
    return e8m0_to_float32(scale.view(torch.uint8))
