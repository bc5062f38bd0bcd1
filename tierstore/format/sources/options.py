"""What a user may say about a checkpoint besides where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import BadRequest
from tierstore.format.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class Options:
    """`tokenizer`: a tokenizer.json, else the one beside the checkpoint; `layers`: only these layers."""

    layout_file: Path | None = None
    tokenizer: Path | None = None
    layers: tuple[int, ...] | None = None


def choose_layers(found: Sequence[int], options: Options, checkpoint: Checkpoint) -> list[int]:
    """The layers to read, ascending. Raises BadRequest for one the checkpoint does not hold."""
    wanted = sorted(set(found)) if options.layers is None else sorted(set(options.layers))
    missing = [layer for layer in wanted if layer not in found]
    if missing or not wanted:
        raise BadRequest(
            f"{checkpoint.path}: no table in layer {missing or 'list that is empty'}; "
            f"it has tables in layers {sorted(found)}"
        )
    return wanted
