"""Real text that is on every machine: the sources of Python's own standard library, and token traces.

A token trace is an .npz with `ids` (uint32, all documents one after another) and `off` (int64, where
each document starts, with the total as last entry).
"""

from __future__ import annotations

import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, FormatError, StorageError

# Not part of the library proper, and present on some machines only.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BATCH_DOCUMENTS = 64
Ids = np.ndarray[Any, np.dtype[np.uint32]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]


def stdlib_text(min_bytes: int | None = None) -> list[str]:
    """Source files of the standard library in a fixed order; the first ones that hold `min_bytes`.

    Without `min_bytes` all of them. Raises BadRequest where there are fewer bytes than asked for.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, total = [], 0
    for path in _sources(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            documents.append(text)
            total += len(text.encode())
        if min_bytes is not None and total >= min_bytes:
            break
    if total < (min_bytes or 1):
        raise BadRequest(f"{root}: holds {total} bytes of Python sources, {min_bytes or 1} were asked for")
    return documents


def _sources(folder: Path) -> Iterator[Path]:
    """Python files in `folder` and below, always in the same order."""
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    yield from (path for path in entries if path.suffix == ".py" and path.is_file())
    for path in entries:
        if path.name not in LEFT_OUT and path.is_dir():
            yield from _sources(path)


def tokenize_corpus(
    tokenizer_path: Path, documents: Iterable[str], progress: Callable[[int], None] = lambda count: None
) -> tuple[Ids, Offsets]:
    """A trace (ids, off) of `documents`: one document after another, no special tokens around them.

    `progress` is told of further bytes of text that are tokens now.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # the library raises plain Exception
        raise FormatError(f"{tokenizer_path}: not a tokenizer.json: {error}") from error
    parts: list[Ids] = []
    waiting = iter(documents)
    while batch := list(islice(waiting, BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        parts += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        progress(sum(len(document.encode()) for document in batch))
    off = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=off[1:])
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32), off


def save_trace(path: Path, ids: Ids, off: Offsets) -> None:
    """Write a trace. Raises StorageError."""
    try:
        with open(path, "wb") as file:  # given a name, numpy would add an ending of its own
            np.savez(file, ids=ids.astype(np.uint32), off=off.astype(np.int64))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def load_trace(path: Path) -> tuple[Ids, Offsets]:
    """Read a trace and check that it is one. Raises FormatError, StorageError."""
    try:
        with np.load(path, allow_pickle=False) as found:
            ids, off = found["ids"], found["off"]
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise FormatError(f"{path}: not a token trace, nor an .npz of numpy's: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError, EOFError) as error:
        if not zipfile.is_zipfile(path):
            raise FormatError(
                f"{path}: not a token trace; expected an .npz of numpy's with 'ids' and 'off'"
            ) from error
        raise FormatError(f"{path}: not a token trace with 'ids' and 'off': {error}") from error
    right = ids.dtype == np.uint32 and off.dtype == np.int64 and ids.ndim == off.ndim == 1 and len(off) > 0
    if right and np.any(np.diff(off) < 0):
        at = int(np.flatnonzero(np.diff(off) < 0)[0])
        raise FormatError(
            f"{path}: off must not fall, but document {at} starts at {off[at]} and the next at {off[at + 1]}"
        )
    if not right or off[0] != 0 or off[-1] != len(ids):
        raise FormatError(
            f"{path}: expected ids uint32 and off int64 rising from 0 to len(ids); got {ids.dtype} "
            f"{ids.shape} and {off.dtype} {off.shape}"
        )
    return ids, off
