"""A pack killed at any system call leaves no table by half, and the same command finishes it.

A forked child packs with SIGKILL armed for its n-th durable step (a write, a sync, a rename, a
removal), before or after the step is done; n runs over all of them.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engram_client.errors import BadRequest, FormatError, StorageError
from tests.rowfile_reader import RowFileOracle
from tests.table_sources import plain_checkpoint, write_row_file
from tierstore.catalog import Catalog
from tierstore.format.rowfile import RowFile
from tierstore.format.verify import verify
from tierstore.packing import PackOptions, PackReport, pack
from tierstore.packing.plan import PackPlan

STEPS = ("pwrite", "write", "fdatasync", "fsync", "rename", "unlink")


class Pack:
    """Two tables, in three shards each unless told otherwise, and `pack` with small leaves."""

    def __init__(self, folder: Path, shard_rows: Sequence[int] = (500, 400, 300)) -> None:
        self.source, self.store = folder / "checkpoint", folder / "store"
        self.layout, self.rows = plain_checkpoint(self.source, shard_rows, names=("a", "b"))

    def __call__(self, **options: Any) -> PackReport:
        return pack(
            self.source, self.store, PackOptions(layout_file=self.layout, **options),
            notify=lambda sentence: None, on_progress=lambda progress: None, leaf_pages=2,
            sync_bytes=4 * 4096,
        )  # fmt: skip

    def shards(self) -> list[str]:
        return sorted(p.name for p in self.source.glob("*.safetensors"))

    def unfinished(self) -> bool:
        """Whether there is something left to do: a plan, or tables that are not published."""
        if any((self.store / "packing").glob("plan-*/plan.json")):
            return True
        return len([*(self.store / "tables").rglob("*.rows")]) < 2

    def check_complete(self) -> None:
        with Catalog.open(self.store) as catalog:
            paths = {name: entry.path for name, entry in catalog.tables().items()}
        assert {name: RowFileOracle(path).all_rows() for name, path in paths.items()} == self.rows
        assert sorted(self.store.rglob("*.rows")) == sorted(paths.values())
        assert [p for p in (self.store / "packing").rglob("*") if p.is_file()] == []

    def check_nothing_half_done(self) -> None:
        """Whatever looks like a table is one."""
        for path in (self.store / "tables").rglob("*.rows"):
            assert verify(path, lambda done, total: None).whole
        if (self.store / "catalog" / "data.mdb").exists():
            with Catalog.open(self.store) as catalog:
                for entry in catalog.tables().values():
                    assert RowFile.open(entry.path).spec == entry.spec


@pytest.fixture
def packing(tmp_path: Path) -> Pack:
    return Pack(tmp_path)


def arm(step: int, after: bool) -> list[int]:
    """Kill this process at durable step number `step`; the list counts the steps."""
    count = [0]

    def armed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            fatal = count[0] == step
            if fatal and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in STEPS:
        setattr(os, name, armed(getattr(os, name)))
    return count


def pack_until_killed(packing: Pack, step: int, after: bool, **options: Any) -> bool:
    """Pack in a child that dies at `step`; False where it finished before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(step, after)
            packing(**options)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("consume", ["no", "yes"])
def test_killed_at_every_step_and_finished_by_the_same_command(
    tmp_path: Path, after: bool, consume: str
) -> None:
    step = 1
    while True:
        folder = tmp_path / str(step)
        packing = Pack(folder)
        killed = pack_until_killed(packing, step, after, consume=consume)
        packing.check_nothing_half_done()
        if not killed:
            break
        if packing.unfinished():
            packing(consume=consume)
        packing.check_complete()
        assert len(packing.shards()) == (0 if consume == "yes" else 6)
        step += 1 if step < 12 else 5
    assert step > 60


def test_killed_again_and_again(packing: Pack) -> None:
    kills = 0
    while pack_until_killed(packing, 25, after=True, consume="yes"):
        packing.check_nothing_half_done()
        kills += 1
    assert kills >= 3
    packing.check_complete()
    assert packing.shards() == []


def test_a_resumed_file_is_byte_for_byte_an_uninterrupted_one(packing: Pack, tmp_path: Path) -> None:
    assert pack_until_killed(packing, 40, after=False)
    (path,) = (packing.store / "packing").glob("plan-*/plan.json")
    plan = PackPlan.load(path)
    assert plan is not None
    report = packing()
    assert any(0 < table.resumed_rows < table.spec.rows for table in report.tables)
    for table, planned in zip(report.tables[-2:], plan.tables[-len(report.tables) :], strict=True):
        spec = replace(table.spec, generation="0" * 32)
        again = write_row_file(planned.source, tmp_path / spec.name, leaf_pages=2, spec=spec)
        assert again.path.read_bytes() == table.path.read_bytes()


def test_consumption_asked_for_on_resuming_is_checked_like_any_other(packing: Pack) -> None:
    shard = packing.source / "b-1.safetensors"
    with shard.open("r+b") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    header["bias"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data + b"abc")
    assert pack_until_killed(packing, 25, after=True)
    with pytest.raises(BadRequest, match=r"b-1\.safetensors, which also holds bias"):
        packing(consume="yes")
    assert len(packing.shards()) == 6
    packing(consume="force")
    packing.check_complete()
    assert packing.shards() == []


def test_a_changed_source_is_not_mixed_into_an_unfinished_pack(packing: Pack) -> None:
    assert pack_until_killed(packing, 25, after=True)
    os.utime(packing.source / "b-1.safetensors", ns=(1, 1))
    with pytest.raises(FormatError, match=r"b-1\.safetensors was changed since packing began.*--restart"):
        packing()
    packing(restart=True)
    packing.check_complete()


def test_other_options_do_not_go_on_with_an_unfinished_pack(packing: Pack) -> None:
    assert pack_until_killed(packing, 25, after=True)
    with pytest.raises(BadRequest, match="other options"):
        packing(addressing="row")
    packing(addressing="row", restart=True)
    packing.check_complete()


def test_another_checkpoint_does_not_take_over_an_unfinished_name(packing: Pack, tmp_path: Path) -> None:
    assert pack_until_killed(packing, 25, after=True)
    other = Pack(tmp_path / "other")
    other.store = packing.store
    with pytest.raises(BadRequest, match=r"unfinished pack of .*checkpoint writes a table of the same name"):
        other()
    packing()
    packing.check_complete()


def test_restart_does_not_throw_away_rows_whose_shards_are_gone(packing: Pack) -> None:
    step = 25
    while len(packing.shards()) == 6:
        assert pack_until_killed(packing, step, after=True, consume="yes")
    left = packing.shards()
    with pytest.raises(BadRequest, match="only in"):
        packing(consume="yes", restart=True)
    assert packing.shards() == left
    packing(consume="yes")
    packing.check_complete()


def test_a_full_disk_names_path_and_bytes_and_the_pack_goes_on_later(
    packing: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [60_000]

    def full(fd: int, data: bytes, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(data)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        StorageError, match=r"rows\.partial: the disk is full .*bytes were to be written, \d+ are free"
    ):
        packing()
    packing.check_nothing_half_done()
    monkeypatch.undo()
    report = packing()
    assert report.tables[0].resumed_rows > 0
    packing.check_complete()


def test_a_source_that_changes_while_it_is_packed_is_not_published(
    packing: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, real = packing.source / "a-0.safetensors", os.preadv

    def changing(*args: Any) -> int:
        os.utime(shard, ns=(1, 1))
        return real(*args)

    for consume in ("no", "yes"):
        monkeypatch.setattr(os, "preadv", changing)
        with pytest.raises(FormatError, match=r"a-0\.safetensors was changed while it was packed"):
            packing(consume=consume, restart=True)
        monkeypatch.undo()
        os.utime(shard)
        assert not (packing.store / "tables").exists()
        assert len(packing.shards()) == 6
    packing(restart=True)


def test_removed_shards_give_their_space_back_while_packing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing, held, real = Pack(tmp_path, (300,) * 8), [], os.fdatasync

    def look(fd: int) -> None:
        links = set()
        for path in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.add(path.readlink().name)
        held.append([link for link in links if link.endswith(".safetensors (deleted)")])
        real(fd)

    monkeypatch.setattr(os, "fdatasync", look)
    packing(consume="yes")
    assert packing.shards() == []
    assert len(held) > 16
    assert max(map(len, held)) <= 1  # the one that was being read when it became safe


def test_a_shard_that_cannot_be_removed_is_named(packing: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(StorageError, match=r"a-0\.safetensors is packed but cannot be removed"):
            packing(consume="yes")
    packing()
    assert len(packing.shards()) == 6


def test_every_name_on_the_way_to_the_rows_is_on_disk_before_a_shard_goes(
    packing: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = packing.store / "packing" / "a" / "rows.partial"
    synced: set[str] = set()
    before_removal: list[set[str]] = []
    real_fsync, real_unlink = os.fsync, Path.unlink

    def fsync(fd: int) -> None:
        real_fsync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path != str(partial.parent) or partial.exists():  # before, it did not cover that name
            synced.add(path)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            before_removal.append(set(synced))
        real_unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "unlink", unlink)
    packing(consume="yes")
    folders = (packing.store.parent, packing.store, packing.store / "packing", partial.parent)
    assert {str(folder) for folder in folders} <= before_removal[0]
