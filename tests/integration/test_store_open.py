"""Opening a store: who may, what is shared, and what happens to tables that are damaged."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import Client, connect, errors
from tests.support.daemon import environment
from tests.support.stores import (
    ALL_TABLES,
    LARGE,
    PLAIN,
    PLE,
    V41,
    Device,
    PackedStore,
    opened,
    random_keys,
    row_file,
    small_config,
)
from tierstore.catalog import Catalog
from tierstore.store import Store, open_store


def works(client: Client, packed: PackedStore) -> bool:
    return np.array_equal(client.table(PLAIN).lookup(np.arange(5)), packed.oracles[PLAIN].rows[:5])


def test_two_opens_share_one_store_until_the_last_is_closed(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    first, second = connect(f"local:{folder}"), connect(f"local:{folder}/../{folder.name}/")
    first.table(PLAIN).lookup(np.arange(5))
    assert second.stats()["nvme_pages"] == 1
    first.close()
    first.close()
    assert works(second, packed)
    table = second.table(PLAIN)
    second.close()
    for client in (first, second):
        for call in (client.tables, client.stats, lambda client=client: client.table(PLAIN)):
            with pytest.raises(errors.Cancelled, match="closed"):
                call()
    for ask in (table.lookup, table.prefetch):
        with pytest.raises(errors.Cancelled, match="closed"):
            ask(np.arange(5))
    with connect(f"local:{folder}") as third:
        assert works(third, packed)


def test_a_second_open_with_another_configuration_is_refused(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    store, release = open_store(folder, small_config())
    same, release_same = open_store(folder, small_config())
    assert same is store
    with pytest.raises(errors.ConfigError, match="another configuration"):
        open_store(folder, small_config(8 << 20))
    release_same()
    release()
    _, release = open_store(folder, small_config(8 << 20))
    release()


OPEN_AND_SAY = """
import sys
import threading
from engram_client import connect, errors
try:
    connect("local:" + sys.argv[1])
except errors.StoreLocked as error:
    print("locked", error)
"""


def test_another_process_is_told_who_holds_the_store(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    command = [sys.executable, "-c", OPEN_AND_SAY, str(folder)]
    with connect(f"local:{folder}"):
        told = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
        assert told.stdout.startswith("locked")
        assert f"pid {os.getpid()}" in told.stdout
    told = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert told.stdout == ""


def in_child(check: Callable[[], bool]) -> bool:
    """What `check` says in a forked child; False where it raises or hangs."""
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(20)
        ok = False
        try:
            ok = check()
        finally:
            os._exit(0 if ok else 1)
    return os.waitpid(child, 0)[1] == 0


def raises(kind: type[Exception], what: str, call: Callable[[], Any]) -> bool:
    try:
        call()
    except kind as error:
        return what in str(error)
    return False


def test_a_forked_child_is_told_what_to_do(packed: PackedStore, tmp_path: Path) -> None:
    folder, other = packed.copy_to(tmp_path), packed.copy_to(tmp_path / "other")
    keys = random_keys(packed.oracles[V41], 100)
    with connect(f"local:{folder}") as client:
        table = client.table(V41)
        table.lookup_ngrams(keys)  # threads are running, records are cached
        for call in (
            lambda: table.lookup_ngrams(keys),
            lambda: table.prefetch_ngrams(keys).wait(10),
            lambda: table.warm_ngrams(keys),
            client.stats,
        ):
            assert in_child(lambda call=call: raises(errors.Unavailable, "is a fork", call))
        own_pid = f"pid {os.getpid()}"
        assert in_child(lambda: raises(errors.StoreLocked, own_pid, lambda: connect(client.target)))
        assert in_child(lambda: works(connect(f"local:{other}"), packed))
        assert in_child(lambda: client.close() is None)
        assert works(client, packed)


def test_the_lock_does_not_live_on_in_a_child(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    client = connect(f"local:{folder}")
    go, wait = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait)
        os.read(go, 1)  # lives until the parent lets go
        os._exit(0)
    client.close()
    with connect(f"local:{folder}") as again:
        assert works(again, packed)
    os.close(wait)
    assert os.waitpid(child, 0)[1] == 0
    os.close(go)


def test_what_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError, match="tierstore pack"):
        connect(f"local:{tmp_path}/nosuch")
    with pytest.raises(errors.FormatError, match="not a store directory"):
        connect(f"local:{tmp_path}")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(errors.StorageError, match="no store directory"):
        connect(f"local:{tmp_path}/file")


def test_an_empty_store_serves_nothing(tmp_path: Path) -> None:
    Catalog.open(tmp_path, create=True).close()
    with connect(f"local:{tmp_path}") as client:
        assert client.tables() == {}
        with pytest.raises(errors.UnknownTable, match="served: none"):
            client.table(PLAIN)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_header(path: Path) -> None:
    os.truncate(path, 4096 + 100)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def flip_header_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(16)
        byte = file.read(1)[0]
        file.seek(16)
        file.write(bytes([byte ^ 4]))


def flip_description_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 + 50)
        file.write(b"\x00")


def make_foreign(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + bytes(8192))


def make_newer(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x02")


def swap_with_another(path: Path) -> None:
    """Whole and valid, but not what the catalog published under this name."""
    path.write_bytes(row_file(path.parents[2], PLE).read_bytes())


@pytest.mark.parametrize(("damage", "kind", "what"), [
    (cut, errors.FormatError, "is truncated: expected"),
    (cut_to_header, errors.FormatError, "is truncated"),
    (cut_to_nothing, errors.FormatError, "not a row file"),
    (grow, errors.FormatError, "has bytes after its last page"),
    (flip_header_bit, errors.FormatError, "damaged: checksum"),
    (flip_description_bit, errors.FormatError, "damaged: checksum"),
    (make_foreign, errors.FormatError, "not a row file"),
    (make_newer, errors.FormatError, "version 2"),
    (swap_with_another, errors.FormatError, "the catalog expects"),
    (Path.unlink, errors.StorageError, "cannot be read: No such file"),
])  # fmt: skip
def test_a_damaged_table_is_named_and_the_others_are_served(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None],
    kind: type[Exception], what: str,
) -> None:  # fmt: skip
    folder = packed.copy_to(tmp_path, own=(V41,))
    damage(row_file(folder, V41))
    with caplog.at_level(logging.ERROR), connect(f"local:{folder}") as client:
        assert set(client.tables()) == set(ALL_TABLES) - {V41}
        with pytest.raises(kind, match=f"table 'v41' is not served: .*{what}") as caught:
            client.table(V41)
        assert type(caught.value) is kind
        for name in (PLAIN, LARGE, PLE):
            assert np.array_equal(client.table(name).lookup([0, 1]), packed.oracles[name].rows[:2])
        assert (client.stats()["tables_served"], client.stats()["tables_damaged"]) == (6, 1)
    (record,) = caplog.records
    assert "'v41' is not served" in record.getMessage()
    assert what in record.getMessage()


def test_a_store_with_nothing_left_to_serve_does_not_open(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=ALL_TABLES)
    for name in ALL_TABLES:
        cut(row_file(folder, name))
    with pytest.raises(errors.FormatError, match="is truncated"):
        connect(f"local:{folder}")
    with pytest.raises(errors.FormatError, match="is truncated"):  # and not: it is locked
        connect(f"local:{folder}")


def test_a_generation_published_later_is_served_from_the_next_start(
    packed: PackedStore, tmp_path: Path
) -> None:
    folder = packed.copy_to(tmp_path, own=(PLAIN,))
    layout = packed.directory.parent / "plain" / "layout.toml"
    with opened(folder) as made, connect(f"local:{folder}") as client:
        before = client.table(PLAIN)
        _pack_again(layout, folder)
        assert works(client, packed)
        assert before.spec.generation == client.table(PLAIN).spec.generation
        assert isinstance(made, Device)
    with connect(f"local:{folder}") as client:
        after = client.table(PLAIN)
        assert after.spec.generation != before.spec.generation
        assert works(client, packed)


def _pack_again(layout: Path, folder: Path) -> None:
    from tierstore.packing import PackOptions, pack

    options = PackOptions(layout_file=layout, replace=True, prune=True)
    pack(layout.parent, folder, options, notify=lambda text: None, on_progress=lambda progress: None)


def test_an_interrupted_open_leaves_nothing_behind(
    packed: PackedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels are compiled opening takes long enough to be interrupted."""
    folder = packed.copy_to(tmp_path)

    def interrupted(store: Store) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_warm_kernels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_store(folder, small_config())
    assert set(threading.enumerate()) <= before
    with connect(f"local:{folder}") as client:
        assert works(client, packed)
