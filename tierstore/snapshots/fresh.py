"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram_client.errors import BadRequest, StorageError
from tierstore.format.direct import OUT_OF_SPACE, sync_folder
from tierstore.packing.claim import claim


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, and is gone where that fails.

    What is written there must be synced. Raises BadRequest where `out` exists, StoreLocked where another
    process makes it, StorageError.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise BadRequest(f"{out} exists already; give a folder that does not, or remove it first")
    partial = out.parent / f".{out.name}.partial"
    with claim(partial, str(out)):
        _empty(partial)  # one that was killed has left it
        yield from _filled(partial, out)


def _filled(partial: Path, out: Path) -> Iterator[Path]:
    try:
        yield partial
        sync_folder(partial)
        if out.exists():
            raise BadRequest(f"{out} was made by somebody else meanwhile; give another folder")
        os.rename(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{out} cannot be written: {error.strerror}; nothing was left there") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def no_room(out: Path, error: OSError, wanted_bytes: int) -> StorageError:
    """What to tell when writing what is to become `out` failed."""
    if error.errno not in OUT_OF_SPACE:
        return StorageError(
            f"{out}: writing failed: {error.strerror}; nothing was left there, check the disk"
        )
    free_bytes = shutil.disk_usage(out.absolute().parent).free
    return StorageError(
        f"{out}: there is too little room ({error.strerror}): {wanted_bytes} bytes are wanted, {free_bytes} "
        "are free now; what had been written was removed: make room, or write to another disk"
    )
