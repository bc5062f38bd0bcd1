"""The catalog: what is published is what is read, in this process, in a child, and next to a writer."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from engram_client.errors import FormatError, UnknownTable
from engram_client.spec import Field, HashScheme, RowLayout, TableSpec
from tierstore.catalog import Catalog


def make_spec(name: str = "t", generation: int = 1, sizes: int = 2) -> TableSpec:
    heads = tuple(range(5, 5 + sizes))
    scheme = HashScheme(
        "engram", 1, (3, 5), (heads,), (tuple(range(sizes)),), 100, pad_id=2,
        vocabulary_digest="ab" * 32, parameters={"seed": 0, "layer_ids": [1]},
    )  # fmt: skip
    layout = RowLayout((Field("weight", "bfloat16", 4),), global_scale=0.1)
    return TableSpec(
        name, f"{generation:032x}", uuid.UUID(int=generation).hex, 99, layout, "record", scheme, 1, "m"
    )


def test_published_table_is_read_back_with_every_parameter(tmp_path: Path) -> None:
    spec = make_spec()
    with Catalog.open(tmp_path, create=True) as catalog:
        assert catalog.publish(spec, "tables/t/1.rows") is None
        entry = catalog.tables()["t"]
    assert entry.spec == spec
    assert entry.spec.scheme is not None and entry.spec.scheme.parameters == {"seed": 0, "layer_ids": [1]}
    assert entry.path == tmp_path / "tables/t/1.rows"
    assert entry.state == "current"


def test_a_new_generation_retires_the_old_one_until_it_is_forgotten(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        catalog.publish(make_spec(generation=1), "tables/t/1.rows")
        replaced = catalog.publish(make_spec(generation=2), "tables/t/2.rows")
        assert replaced is not None and replaced.spec.generation == f"{1:032x}"
        assert catalog.entry("t").spec.generation == f"{2:032x}"
        (retired,) = catalog.retired
        assert retired.spec == make_spec(generation=1)
        assert retired.state == "retired" and retired.retired_unix_s is not None
        catalog.forget(retired)
        assert catalog.retired == []


def test_publishing_the_same_generation_again_retires_nothing(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        catalog.publish(make_spec(), "tables/t/1.rows")
        assert catalog.publish(make_spec(), "tables/t/1.rows") is None
        assert catalog.retired == []


def test_a_directory_without_a_catalog_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a store directory"):
        Catalog.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_table_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        catalog.publish(make_spec("known"), "x")
        with pytest.raises(UnknownTable, match=r"'other'.*known"):
            catalog.entry("other")


def test_two_opens_in_one_process_share_and_outlive_each_other(tmp_path: Path) -> None:
    first = Catalog.open(tmp_path, create=True)
    second = Catalog.open(tmp_path / "." / "")
    first.publish(make_spec(), "x")
    first.close()
    first.close()
    assert set(second.tables()) == {"t"}
    second.close()
    with Catalog.open(tmp_path) as third:
        assert set(third.tables()) == {"t"}


def test_the_map_grows_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.catalog.FIRST_MAP_BYTES", 2**16)
    with Catalog.open(tmp_path, create=True) as catalog:
        for i in range(20):
            catalog.publish(make_spec(f"t{i}", sizes=2000), "x")
        assert len(catalog.tables()) == 20
        assert catalog.tables()["t7"].spec == make_spec("t7", sizes=2000)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.unit.test_catalog import make_spec
from tierstore.catalog import Catalog
with Catalog.open(sys.argv[1]) as catalog:
    for i in range(20):
        catalog.publish(make_spec(f"t{i}", sizes=20000), "x")
"""


def test_a_reader_follows_a_writer_in_another_process_that_grows_the_map(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        assert catalog.tables() == {}
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parents[2])]
        subprocess.run(command, check=True)
        assert len(catalog.tables()) == 20


def test_a_forked_child_opens_anew_and_the_parent_goes_on(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        catalog.publish(make_spec("before"), "x")
        child = os.fork()
        if child == 0:
            ok = False
            try:
                with Catalog.open(tmp_path) as opened_anew:
                    ok = set(catalog.tables()) == set(opened_anew.tables()) == {"before"}
                catalog.publish(make_spec("child"), "x")
            finally:
                os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        catalog.publish(make_spec("after"), "x")
        assert set(catalog.tables()) == {"before", "child", "after"}


def test_a_read_only_directory_can_be_read(tmp_path: Path) -> None:
    with Catalog.open(tmp_path, create=True) as catalog:
        catalog.publish(make_spec(), "x")
    if os.access(tmp_path, os.W_OK) and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    os.chmod(tmp_path / "catalog", 0o500)
    with Catalog.open(tmp_path) as catalog:
        assert set(catalog.tables()) == {"t"}
