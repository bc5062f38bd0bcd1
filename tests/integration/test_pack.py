"""`tierstore pack | inspect | verify` on small checkpoints: what goes in comes out, or an error says why."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client.errors import BadRequest, FormatError, StorageError, StoreLocked
from tests.rowfile_reader import RowFileOracle
from tests.table_sources import plain_checkpoint, write_safetensors
from tierstore.catalog import Catalog
from tierstore.cli import main
from tierstore.packing import PackOptions, PackReport, pack
from tierstore.packing.claim import claim

ROOT = Path(__file__).parents[2]


class Pack:
    """A checkpoint of two shards, a store directory, and `pack` between them."""

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        self.source, self.store = folder / "checkpoint", folder / "store"
        self.layout, self.rows = plain_checkpoint(self.source, **{"shard_rows": (700, 500), **checkpoint})
        self.said: list[str] = []
        self.progress: list[int] = []

    def __call__(self, **options: Any) -> PackReport:
        return pack(
            self.source,
            self.store,
            PackOptions(layout_file=self.layout, **options),
            notify=self.said.append,
            on_progress=lambda progress: self.progress.append(progress.done_bytes),
            leaf_pages=4,
            sync_bytes=8 * 4096,
        )

    def shards(self) -> list[str]:
        return sorted(p.name for p in self.source.glob("*.safetensors"))

    def leftovers(self) -> list[Path]:
        return [*(self.store / "packing").glob("*")]


@pytest.fixture
def packing(tmp_path: Path) -> Pack:
    return Pack(tmp_path)


def test_every_row_comes_out_as_it_went_in(packing: Pack) -> None:
    report = packing()
    (table,) = report.tables
    assert RowFileOracle(table.path).all_rows() == packing.rows["t"]
    with Catalog.open(packing.store) as catalog:
        entry = catalog.entry("t")
    assert entry.spec == table.spec
    assert entry.path == table.path == packing.store / "tables" / "t" / f"{table.spec.generation}.rows"
    assert packing.leftovers() == []
    assert packing.progress[-1] == table.file_bytes
    assert packing.progress == sorted(packing.progress)


def test_a_checkpoint_of_several_tables_packs_all_of_them(tmp_path: Path) -> None:
    packing = Pack(tmp_path, names=("a", "b"))
    report = packing()
    found = {table.spec.name: RowFileOracle(table.path).all_rows() for table in report.tables}
    assert found == packing.rows
    with pytest.raises(BadRequest, match="--name x names one table"):
        packing(name="x", replace=True)


def test_a_name_is_replaced_only_when_asked_and_the_old_file_stays_until_pruned(packing: Pack) -> None:
    first = packing().tables[0]
    with pytest.raises(BadRequest, match=r"already in .*--replace"):
        packing()
    second = packing(replace=True).tables[0]
    assert second.spec.generation != first.spec.generation
    assert first.path.exists()
    assert any("retired" in sentence for sentence in packing.said)
    third = packing(replace=True, prune=True).tables[0]
    assert [*first.path.parent.iterdir()] == [third.path]
    with Catalog.open(packing.store) as catalog:
        assert catalog.entry("t").spec == third.spec
        assert catalog.retired == []


def test_the_same_checkpoint_under_another_name(packing: Pack) -> None:
    packing()
    packing(name="u")
    with Catalog.open(packing.store) as catalog:
        assert set(catalog.tables()) == {"t", "u"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 129])
def test_names_that_are_no_file_names_are_refused(packing: Pack, name: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a file name"):
        packing(name=name)
    assert packing.leftovers() == []


def test_record_addressing_needs_a_hash_scheme(packing: Pack) -> None:
    with pytest.raises(BadRequest, match="no hash scheme"):
        packing(addressing="record")


def test_a_second_pack_of_the_same_name_is_refused(packing: Pack) -> None:
    with (
        claim(packing.store / "packing" / "t", "test"),
        pytest.raises(StoreLocked, match="'t' is being packed"),
    ):
        packing()
    packing()


def test_a_source_that_does_not_exist_leaves_no_store(packing: Pack) -> None:
    packing.source = packing.source / "nowhere"
    with pytest.raises(FormatError, match="nowhere does not exist"):
        packing()
    assert not packing.store.exists()


def test_a_truncated_shard_is_refused_before_anything_is_written(packing: Pack) -> None:
    os.truncate(packing.source / "t-1.safetensors", 30_000)
    with pytest.raises(FormatError, match=r"t-1\.safetensors"):
        packing()
    assert packing.leftovers() == []


def test_a_shard_that_shrinks_while_it_is_read_is_named(packing: Pack) -> None:
    shrunk = packing.source / "t-1.safetensors"
    seen = []

    def shrink(progress: object) -> None:
        if not seen:
            os.truncate(shrunk, 30_000)
        seen.append(progress)

    with pytest.raises(FormatError, match=r"t-1\.safetensors is truncated"):
        pack(packing.source, packing.store, PackOptions(layout_file=packing.layout), notify=print,
             on_progress=shrink, leaf_pages=1)  # fmt: skip
    assert not (packing.store / "tables").exists()


def test_a_full_disk_is_foreseen(packing: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 12345))
    with pytest.raises(StorageError, match=r"bytes are needed, 12345 are free.*--consume"):
        packing()
    assert not (packing.store / "tables").exists()


def test_a_file_size_limit_stops_a_pack_with_a_clear_error(packing: Pack) -> None:
    """A real refusal by the kernel, in a child so that the limit is not ours to keep."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            packing()
        except StorageError as error:
            code = 0 if "file size limit" in str(error) and "rows.partial" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert RowFileOracle(packing().tables[0].path).all_rows() == packing.rows["t"]


# VmHWM and not ru_maxrss: that one keeps the size of the process that forked, here pytest's.
MEASURE_MEMORY = """
import sys
from pathlib import Path
from tierstore.packing import PackOptions, pack
source, store, layout = map(Path, sys.argv[1:])
pack(source, store, PackOptions(layout_file=layout), notify=print, on_progress=lambda p: None)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(1024 * int(status["VmHWM"].split()[0]))
"""


def test_memory_stays_below_its_bound(tmp_path: Path) -> None:
    rows = 400 * 2**20 // 264
    header = json.dumps(
        {"w": {"dtype": "F8_E4M3", "shape": [rows, 264], "data_offsets": [0, rows * 264]}}
    ).encode()
    source, layout = tmp_path / "x.safetensors", tmp_path / "layout.toml"
    source.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source, 8 + len(header) + rows * 264)  # a hole: as many bytes to read, none on disk
    layout.write_text("[[table]]\nname = 'big'\nweight = 'w'\n")
    command = [sys.executable, "-c", MEASURE_MEMORY, str(source), str(tmp_path / "store"), str(layout)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout.split()[-1]) < 400 * 2**20


class TestCommands:
    """The three commands as a user types them."""

    def test_pack_inspect_verify_as_json(self, packing: Pack, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "pack",
            str(packing.source),
            str(packing.store),
            "--layout",
            str(packing.layout),
            "--json",
        ]
        assert main(arguments) == 0
        (packed,) = json.loads(capsys.readouterr().out)["tables"]
        assert (packed["name"], packed["rows"], packed["row_bytes"]) == ("t", 1200, 84)
        assert main(["inspect", str(packing.store), "t", "--json"]) == 0
        inspected = json.loads(capsys.readouterr().out)
        assert inspected["spec"]["generation"] == packed["generation"]
        assert main(["inspect", str(packing.store), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tables"][0]["path"] == packed["path"]
        assert main(["verify", str(packing.store), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tables"][0]["whole"] is True

    def test_texts_name_the_table(self, packing: Pack, capsys: pytest.CaptureFixture[str]) -> None:
        generation = packing().tables[0].spec.generation
        for command in (["inspect"], ["verify"]):
            assert main([*command, str(packing.store)]) == 0
            assert generation in capsys.readouterr().out
        assert main(["inspect", str(packing.store), "t"]) == 0
        assert "48 rows each" in capsys.readouterr().out

    def test_verify_names_the_damage_and_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        packing = Pack(tmp_path, names=("a", "b", "c"))
        paths = {table.spec.name: table.path for table in packing().tables}
        damaged = np.memmap(paths["a"], dtype=np.uint8, mode="r+")
        damaged[5 * 4096 + 100] ^= 4
        damaged.flush()
        paths["b"].write_bytes(b"not a row file")
        assert main(["verify", str(packing.store)]) == 1
        out = capsys.readouterr().out
        first_page = RowFileOracle(paths["c"]).first_page
        assert (
            f"page 5: wrong checksum; it holds rows {(5 - first_page) * 48} to {(6 - first_page) * 48 - 1}"
            in out
        )
        assert "b.rows is not a row file" in out or "is not a row file" in out
        assert "c: whole" in out
        assert main(["verify", str(packing.store), "c"]) == 0
        assert main(["verify", str(paths["a"])]) == 1

    def test_verify_finds_a_file_of_another_generation(
        self, packing: Pack, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old = packing().tables[0].path.read_bytes()
        packing(replace=True).tables[0].path.write_bytes(old)
        assert main(["verify", str(packing.store)]) == 1
        assert "the catalog expects generation" in capsys.readouterr().out

    def test_errors_have_exit_codes(self, packing: Pack, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(packing.store)]) == 3
        assert main(["inspect", str(packing.source)]) == 3
        assert "is not a store directory" in capsys.readouterr().err
        for command in (
            ["pack", "x" * 300, str(packing.store)],
            ["inspect", "x" * 300],
            ["verify", "x" * 300],
        ):
            assert main(command) == 3
            assert "File name too long" in capsys.readouterr().err

    def test_paths_need_not_be_utf8(self, packing: Pack) -> None:
        store = os.fsencode(packing.store) + b"\xff"
        command = [
            sys.executable,
            "-m",
            "tierstore.cli",
            "pack",
            packing.source,
            store,
            "--layout",
            packing.layout,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        assert store + b"/tables/t/" in done.stdout

    def test_a_store_without_tables_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Catalog.open(tmp_path, create=True).close()
        for command in ("inspect", "verify"):
            assert main([command, str(tmp_path)]) == 0
            assert capsys.readouterr().out == f"{tmp_path} holds no tables\n"


def test_advice_on_small_heads_is_given(tmp_path: Path) -> None:
    packing = Pack(tmp_path, shard_rows=(600, 600))
    sizes = [[101, 103, 107, 109, 113, 127, 131, 137, 139, 133]]
    offsets = [[sum(sizes[0][:h]) for h in range(10)]]
    with packing.layout.open("a") as file:
        file.write(
            "[table.scheme]\nkind = 'ple'\nlayer_id = 0\nmultipliers = [3, 5]\nvocab_size = 100\n"
            f"eos_token_id = 1\nhead_sizes = {sizes}\nhead_offsets = {offsets}\n"
        )
    report = packing()
    assert report.tables[0].spec.addressing == "record"
    assert any("101 rows a head is few" in s and "--addressing row" in s for s in packing.said)
    packing.said.clear()
    assert packing(addressing="row", replace=True).tables[0].spec.addressing == "row"
    assert not any("few" in s for s in packing.said)


def test_other_tensors_in_a_shard_stop_consumption(packing: Pack) -> None:
    path = packing.source / "t-1.safetensors"
    extra = np.zeros(7, dtype=np.float32)
    weight = np.zeros((500, 40), dtype=np.uint16)
    scale = np.zeros((500, 4), dtype=np.uint8)
    tensors = {"t.1.weight": ("BF16", weight), "bias": ("F32", extra), "t.1.scale": ("F8_E8M0", scale)}
    write_safetensors(path, tensors)
    with pytest.raises(BadRequest, match=r"t-1\.safetensors, which also holds bias.*--consume=force"):
        packing(consume="yes")
    assert len(packing.shards()) == 2
    packing(consume="force")
    assert packing.shards() == []


def test_what_cannot_be_packed_leaves_nothing_behind(tmp_path: Path) -> None:
    packing = Pack(tmp_path, shard_rows=(3,), dim=2**19 + 1)
    with pytest.raises(FormatError, match="the limit is 1048576"):
        packing()
    packing.layout.write_text("[[table]]\nname = 't'\nweight = 'nothing'\n")
    with pytest.raises(FormatError, match="has no tensor 'nothing'"):
        packing()
    assert not packing.store.exists()


def test_two_tables_of_one_name_are_refused(packing: Pack) -> None:
    packing.layout.write_text(packing.layout.read_text() * 2)
    with pytest.raises(FormatError, match="two tables are named 't'"):
        packing()
