"""A large table made where there is no room for it twice: written in shards, packed with --consume.

What packing took is kept beside the store, so that a later run which finds the table there can still
say how it was made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_client.errors import StorageError
from tierbench.prepared import PreparedTable, packed_tables
from tierbench.progress import byte_progress, stage
from tierbench.sharded import LAYOUT_NAME, ShardedTable

NOTE_NAME = "packed.json"
LOOK_S = 0.2  # between two looks at the disk


def consumed_table(folder: Path, table: ShardedTable) -> tuple[PreparedTable, dict[str, Any]]:
    """The packed table, made where it is not there yet, and the figures of its making.

    Raises StorageError where the disk has too little room, or `tierstore pack` fails.
    """
    home = folder / f"v41-{table.rows_per_head}-in-{table.shards}"
    store, note = home / "store", home / NOTE_NAME
    if not note.exists():
        checkpoint = home / "checkpoint"
        layout = checkpoint / LAYOUT_NAME
        if not (home / "store" / "packing").exists():  # else shards may be gone already
            with byte_progress("making the checkpoint", table.planned_bytes()) as progress:
                layout = table.write(checkpoint, progress)
        with stage("packing, and removing what is packed"):
            figures = _pack(checkpoint, store, layout)
        note.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(checkpoint)  # what is left: a tokenizer, and notes about files that are gone
    ((spec, row_file),) = packed_tables(store)
    return PreparedTable(store, spec, row_file), json.loads(note.read_text(encoding="utf-8"))


def _pack(checkpoint: Path, store: Path, layout: Path) -> dict[str, Any]:
    source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    free_before = shutil.disk_usage(checkpoint).free
    started = time.perf_counter()
    with _least_free(checkpoint) as least:
        command = [sys.executable, "-m", "tierstore.cli", "pack", str(checkpoint), str(store)]
        done = subprocess.run(
            [*command, "--layout", str(layout), "--consume", "--json", "--quiet"],
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise StorageError(f"{checkpoint}: `tierstore pack` failed with exit code {done.returncode}")
    told = json.loads(done.stdout)
    (table,) = told["tables"]
    return {
        "rows": table["rows"],
        "source_bytes": source_bytes,
        "row_file_bytes": table["file_bytes"],
        "source_files_removed": len(told["removed"]),
        "duration_s": time.perf_counter() - started,
        "disk_bytes_taken_beyond_source_max": free_before - least[0],
    }


@contextmanager
def _least_free(folder: Path) -> Iterator[list[int]]:
    """One number that falls to the fewest bytes that were free on the disk meanwhile."""
    least, done = [shutil.disk_usage(folder).free], threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            least[0] = min(least[0], shutil.disk_usage(folder).free)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield least
    finally:
        done.set()
        thread.join()
