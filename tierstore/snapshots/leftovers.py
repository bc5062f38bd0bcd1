"""What a publication leaves in a store directory while it works, and clearing away what was killed.

DIR/packing/.publish-NAME holds, while its process lives, a lock, and

    rows.partial, journal   the row file that is being written
    placed                  the file below DIR that it is about to become, written down before it does

So a row file that was moved to its place, and never became a generation because its process was killed before
the other tables were there, is told from those that were packed or adopted.
"""

from __future__ import annotations

import os
from pathlib import Path

from engram_client.errors import StoreLocked
from tierstore.catalog import Catalog
from tierstore.format.direct import sync_folder
from tierstore.packing.claim import claim

PREFIX = ".publish-"


def scratch_folder(folder: Path, name: str) -> Path:
    """Where table `name` is written for store directory `folder`."""
    return folder / "packing" / f"{PREFIX}{name}"


def note_placed(scratch: Path, path: Path, folder: Path) -> None:
    """`path` is about to appear in `folder`. Durable when this returns; raises OSError."""
    with (scratch / "placed").open("w") as file:
        file.write(str(path.relative_to(folder)))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(scratch)


def clear(scratch: Path, folder: Path, catalog: Catalog) -> None:
    """Remove what was written for a table, unless it became a generation; its claim is held."""
    noted = scratch / "placed"
    if noted.exists():
        placed = folder / noted.read_text()
        known = {entry.path for entry in (*catalog.tables().values(), *catalog.retired)}
        if placed.suffix == ".rows" and placed not in known:
            placed.unlink(missing_ok=True)
    for name in ("rows.partial", "journal", "placed"):  # the note last: it may be all that knows of a file
        (scratch / name).unlink(missing_ok=True)


def clear_killed(folder: Path, catalog: Catalog) -> None:
    """The same for every table whose process is gone."""
    for scratch in (folder / "packing").glob(f"{PREFIX}*"):
        try:
            with claim(scratch, f"table {scratch.name.removeprefix(PREFIX)!r}"):
                clear(scratch, folder, catalog)
        except StoreLocked:
            continue  # somebody publishes it just now
