"""A checkpoint on disk: its tensors over all files, its configuration, and small tensors read whole."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from engram_client.errors import FormatError, StorageError
from tierstore.format.source import Extent
from tierstore.format.sources.safetensors import Tensor, read_header

INDEX_NAME = "model.safetensors.index.json"
SMALL_TENSOR_BYTES_MAX = 1 << 20
FIELD_DTYPES = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8",
    "U8": "uint8",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a checkpoint by name; `config` is its config.json, {} where there is none."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def setting(self, key: str, default: Any = None) -> Any:
        """A configuration value, at the top or under `text_config`, where multimodal models keep it."""
        nested = self.config.get("text_config")
        found = self.config.get(key, nested.get(key) if isinstance(nested, dict) else None)
        return default if found is None else found

    def require(self, key: str, kind: type = int, default: Any = None) -> Any:
        """`setting(key)` of the given type. Raises FormatError where it is missing or another type."""
        value = self.setting(key, default)
        if value is None:
            raise FormatError(
                f"{self.folder / 'config.json'}: {key!r} is missing; this table's hash needs it"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(
                f"{self.folder / 'config.json'}: {key!r} must be of type {kind.__name__}, got {value!r}"
            )
        return value

    def require_ints(self, key: str) -> list[int]:
        """`require` for a list of integers."""
        values: list[int] = self.require(key, list)
        if any(type(v) is not int for v in values):
            raise FormatError(f"{self.folder / 'config.json'}: {key!r} must hold integers, got {values!r}")
        return values

    def names(self, limit: int = 8) -> str:
        """Some tensor names, for messages."""
        names = sorted(self.tensors)
        rest = f" and {len(names) - limit} more" if len(names) > limit else ""
        return (", ".join(names[:limit]) + rest) if names else "no tensors at all"


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a .safetensors file, or a folder of them with or without an index.

    Raises FormatError for a path that holds no checkpoint, or one whose files contradict each other.
    """
    if path.is_dir():
        tensors = _indexed(path) if (path / INDEX_NAME).exists() else _globbed(path)
    elif path.exists():
        _refuse_pickle(path)
        tensors = read_header(path)
    else:
        raise FormatError(f"{path}: no such file or folder; give a .safetensors file or a folder of them")
    folder = path if path.is_dir() else path.parent
    return Checkpoint(path, tensors, _read_json(folder / "config.json"))


def _refuse_pickle(path: Path) -> None:
    if path.suffix in (".pt", ".pth", ".bin"):
        raise FormatError(
            f"{path}: a pickled state dict can run code when it is read; convert it first: python -c "
            '"import sys, torch; from safetensors.torch import save_file; '
            'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            f"{path.name} {path.stem}.safetensors"
        )


def _globbed(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        for path in sorted(folder.iterdir()):
            _refuse_pickle(path)
        raise FormatError(f"{folder}: holds no *.safetensors files; give the folder of a checkpoint")
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise FormatError(f"{path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    return tensors


def _indexed(folder: Path) -> dict[str, Tensor]:
    """The tensors the index names, each looked up in the file the index gives for it."""
    weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise FormatError(f"{folder / INDEX_NAME}: expected a 'weight_map' from tensor names to file names")
    headers = {name: _indexed_file(folder, name) for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise FormatError(f"{folder / file}: holds no tensor {name!r}, which {INDEX_NAME} says is there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _indexed_file(folder: Path, name: str) -> dict[str, Tensor]:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise FormatError(f"{folder / INDEX_NAME}: {name!r} lies outside the checkpoint's folder")
    if not (folder / name).exists():
        raise FormatError(f"{folder / name}: missing, but {INDEX_NAME} names it; get the whole checkpoint")
    return read_header(folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no such file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def table_shape(tensor: Tensor) -> tuple[int, int]:
    """(rows, elements of a row). Raises FormatError where the tensor is not [N, D] of a dtype we serve."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise FormatError(f"{tensor.path}: {tensor.name!r} must be [rows, dim], got {list(tensor.shape)}")
    field_dtype(tensor)
    return tensor.shape[0], tensor.shape[1]


def field_dtype(tensor: Tensor) -> str:
    if tensor.dtype not in FIELD_DTYPES:
        known = ", ".join(FIELD_DTYPES)
        raise FormatError(f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}; rows may be {known}")
    return FIELD_DTYPES[tensor.dtype]


def stack_extents(tensors: list[Tensor]) -> tuple[Extent, ...]:
    """Tensors [N_i, D] one after another as one run of rows."""
    extents: list[Extent] = []
    for tensor in tensors:
        first = extents[-1].first_row + extents[-1].rows if extents else 0
        extents.append(Extent(tensor.path, tensor.offset, first, tensor.shape[0]))
    return tuple(extents)


def read_int64s(tensor: Tensor) -> list[int]:
    """The elements of a small I64 tensor, flat."""
    if tensor.dtype != "I64":
        raise FormatError(f"{tensor.path}: tensor {tensor.name!r} must be I64, got {tensor.dtype}")
    return [int(v) for v in np.frombuffer(_read_small(tensor), dtype="<i8")]


def read_scalar(tensor: Tensor) -> float:
    """The one element of a BF16, F16 or F32 tensor."""
    raw = _read_small(tensor)
    formats = {"F32": "<f", "F16": "<e", "BF16": "<f"}
    if tensor.dtype not in formats or len(raw) != (4 if tensor.dtype == "F32" else 2):
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name!r} must be one BF16, F16 or F32 number, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.dtype == "BF16":  # the upper half of a float32
        raw = b"\0\0" + raw
    return float(struct.unpack(formats[tensor.dtype], raw)[0])


def _read_small(tensor: Tensor) -> bytes:
    if tensor.bytes > SMALL_TENSOR_BYTES_MAX:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name!r} has {tensor.bytes} bytes; expected a small buffer"
        )
    try:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.bytes)
    except OSError as error:
        raise StorageError(f"{tensor.path}: cannot be read: {error.strerror or error}") from error
