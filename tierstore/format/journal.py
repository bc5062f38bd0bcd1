"""What of a row file being packed is safe on disk: one line of JSON for each batch of leaves.

    <16 hex digits of a digest of the rest> {"uuid": ..., "leaf_pages": ..., "description": ...}
    <digest> {"leaves": [first, [leaf digest, ...]]}
    ...

A line is written only after the pages it names were forced to disk, so everything a whole line
says is true; a line that a crash has torn fails its digest and ends the journal.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from engram_client.errors import FormatError
from tierstore.format.direct import sync_folder, write_error


@dataclass
class Journal:
    """The journal of one packing, open for appending."""

    path: Path
    identity: dict[str, Any]
    leaves: list[bytes] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Journal:
        """Continue the journal at `path`, or begin it.

        Raises FormatError where the journal there is of another table than `identity` says.
        """
        lines = _whole_lines(path)
        journal = cls(path, identity)
        if not lines:
            journal._append(identity, fresh=True)
            return journal
        if lines[0] != identity:
            raise FormatError(
                f"{path} belongs to another packing: expected {identity}, got {lines[0]}; "
                "use --restart to begin again"
            )
        for line in lines[1:]:
            first, digests = line["leaves"]
            if first != len(journal.leaves):
                raise FormatError(
                    f"{path}: leaf {len(journal.leaves)} is missing; use --restart to begin again"
                )
            journal.leaves += [bytes.fromhex(digest) for digest in digests]
        return journal

    def append(self, leaves: list[bytes]) -> None:
        """Note that the next leaves' pages are safe."""
        self._append({"leaves": [len(self.leaves), [leaf.hex() for leaf in leaves]]})
        self.leaves += leaves

    def _append(self, line: dict[str, Any], fresh: bool = False) -> None:
        text = json.dumps(line, sort_keys=True)
        data = f"{_line_digest(text)} {text}\n".encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
        try:
            fd = os.open(self.path, flags, 0o644)
            try:
                if os.write(fd, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise write_error(self.path, error, len(data)) from error
        if fresh:
            sync_folder(self.path.parent)


def _line_digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written completely; what follows them is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines: list[dict[str, Any]] = []
    good_bytes = 0
    for raw in data.splitlines(keepends=True):
        digest, _, text = raw.decode(errors="replace").rstrip("\n").partition(" ")
        if not raw.endswith(b"\n") or digest != _line_digest(text):
            break
        lines.append(json.loads(text))
        good_bytes += len(raw)
    if good_bytes < len(data):
        os.truncate(path, good_bytes)
    return lines
