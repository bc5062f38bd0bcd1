"""Row files that a catalog does not know: lost catalogs, copied files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
from tests.support.stores import ALL_TABLES, PLAIN, V41, PackedStore, row_file
from tierstore.catalog import Catalog
from tierstore.cli import main
from tierstore.packing.adopt import adopt


def names(folder: Path) -> set[str]:
    with Catalog.open(folder) as catalog:
        return set(catalog.tables())


def damaged_copy(path: Path, name: str) -> Path:
    """A second row file beside `path` that is cut short."""
    copy = path.with_name(name)
    copy.write_bytes(path.read_bytes()[:-4096])
    return copy


def test_a_lost_catalog_is_made_again(
    packed: PackedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed.copy_to(tmp_path)
    shutil.rmtree(folder / "catalog")
    assert main(["adopt", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {entry["spec"]["name"] for entry in told["adopted"]} == set(ALL_TABLES)
    with connect(f"local:{folder}") as client:
        assert set(client.tables()) == set(ALL_TABLES)
        for name, oracle in packed.oracles.items():
            assert np.array_equal(client.table(name).lookup(np.arange(9)), oracle.rows[:9])
    assert main(["adopt", str(folder)]) == 0
    assert "in the catalog already" in capsys.readouterr().out


def test_a_file_from_another_machine_is_taken_in(packed: PackedStore, tmp_path: Path) -> None:
    source = row_file(packed.directory, PLAIN)
    place = tmp_path / "store" / "tables" / PLAIN
    place.mkdir(parents=True)
    shutil.copyfile(source, place / source.name)
    report = adopt(tmp_path / "store")
    assert [file.spec.name for file in report.adopted] == [PLAIN]
    with connect(f"local:{tmp_path / 'store'}") as client:
        assert np.array_equal(client.table(PLAIN).lookup(np.arange(5)), packed.oracles[PLAIN].rows[:5])


def test_a_current_generation_is_replaced_only_by_name(
    packed: PackedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = packed.copy_to(tmp_path / "a"), packed.copy_to(tmp_path / "b")
    current = row_file(folder, V41)
    # the same rows under another name of file: what matters is that the catalog does not name it
    stray = current.with_name("0" * 32 + ".rows")
    shutil.copyfile(row_file(other, V41), stray)
    assert main(["adopt", str(folder)]) == 0
    assert f"{stray} was left: the catalog has generation" in capsys.readouterr().out
    assert row_file(folder, V41) == current
    assert main(["adopt", str(folder), str(stray)]) == 0
    assert row_file(folder, V41) == stray


def test_two_files_of_one_table_need_a_choice(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    path = row_file(folder, PLAIN)
    shutil.rmtree(folder / "catalog")
    second = path.with_name("1" * 32 + ".rows")
    shutil.copyfile(path, second)
    with pytest.raises(errors.BadRequest, match="generations of one table"):
        adopt(folder)
    assert names(folder) == set()
    assert [file.path for file in adopt(folder, [second]).adopted] == [second]


def test_a_damaged_file_changes_nothing(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    shutil.rmtree(folder / "catalog")
    damaged_copy(row_file(packed.copy_to(tmp_path / "other"), PLAIN), "2.rows").rename(
        folder / "tables" / PLAIN / "2.rows"
    )
    with pytest.raises(errors.FormatError, match="is truncated"):
        adopt(folder)
    assert names(folder) == set()


@pytest.mark.parametrize(
    ("folder", "files", "says"),
    [
        ("missing", [], "is not a directory"),
        ("empty", [], "there are no row files"),
        ("empty", ["elsewhere.rows"], "does not lie in the store directory"),
        ("empty", ["empty/nothing.rows"], "cannot be read"),
    ],
)
def test_bad_input(tmp_path: Path, folder: str, files: list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.TierstoreError, match=says):
        adopt(tmp_path / folder, [tmp_path / name for name in files])
    assert list((tmp_path / "empty").iterdir()) == []
