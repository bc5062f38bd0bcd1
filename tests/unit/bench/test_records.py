"""Reading records: committed ones stay readable, and what is wrong with one is told by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tierbench.record import RESULTS, SCHEMA_VERSION, write_record
from tierbench.records import RECORD_BYTES_MAX, Node, find_records, load_all, load_record

from engram_client.errors import FormatError, StorageError
from tests.support.records import record_of, written


def test_every_committed_record_is_readable() -> None:
    records, refused = load_all(find_records([RESULTS]))
    assert refused == []
    assert len(records) == len(list(RESULTS.glob("*.json"))) > 0
    assert [r.date_utc for r in records] == sorted(r.date_utc for r in records)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_record("cold", {"rate_per_s": 1.5}, tmp_path, seed=3, parameters={"windows": 2})
    record = load_record(path)
    assert (record.name, record.version, record.seed) == ("cold", SCHEMA_VERSION, 3)
    assert record.parameters == {"windows": 2}
    assert record.node.number("rate_per_s") == 1.5
    assert f"{record.machine.cores_usable} cores" in record.machine.told() or record.machine.cores_quota


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 99}, r"\$\.schema\.version: this tierbench reads 1 to 2, got 99"),
        ({"schema": {"name": "tierbench.record", "version": 99}}, r"got 99; .*update"),
        ({"schema": {"name": "another", "version": 2}}, r"expected 'tierbench.record', got 'another'"),
        ({"schema": True}, r"Expected `int \| object`, got `bool`"),
        ({"name": "../../etc"}, r"\$\.name"),
        ({"name": None}, r"Expected `str`, got `null` - at `\$\.name`"),
        ({"date_utc": "yesterday"}, r"\$\.date_utc: expected a time .* got 'yesterday'"),
        ({"commit": "<script>"}, r"\$\.commit"),
        ({"dirty": "no"}, r"\$\.dirty"),
        ({"machine": {"cpu": "x"}}, r"missing required field `cores_usable` - at `\$\.machine`"),
        ({"machine": []}, r"\$\.machine"),
        ({"packages": {"numpy": 2}}, r"\$\.packages"),
        ({"seed": "0"}, r"\$\.seed"),
        ({"results": []}, r"Expected `object`, got `array` - at `\$\.results`"),
        ({"results": {"a": {"b": [1, 10**400]}}}, r"(?i)number out of range|\$\.results\.a\.b\[1\]"),
        ({"results": {"n" * 300: 1}}, r"a name of 300 characters, at most 200"),
        ({"results": {"a": "x" * 20_000}}, r"\$\.results\.a: a text of 20,000 characters"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_by_its_place(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = written(tmp_path, record_of("cold", {}) | change)
    with pytest.raises(FormatError, match=told) as error:
        load_record(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("missing", ["schema", "name", "date_utc", "machine", "packages", "seed", "results"])
def test_a_missing_member_is_named(tmp_path: Path, missing: str) -> None:
    found = record_of("cold", {})
    del found[missing]
    with pytest.raises(FormatError, match=missing):
        load_record(written(tmp_path, found))


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"schema":1,"results":' + b'{"a":' * 100_000,
     json.dumps(record_of("cold", {"a": float("nan")})).encode(),
     json.dumps(record_of("cold", {"a": 1})).replace('"a": 1', '"a": 1e999').encode()],
)  # fmt: skip
def test_what_is_no_record_at_all_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"not a record of tierbench.*docs/RECORDS\.md"):
        load_record(path)


def test_nesting_is_bounded(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"a": deep}
    with pytest.raises(FormatError, match="nested deeper than 32"):
        load_record(written(tmp_path, record_of("cold", {"deep": deep})))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.truncate(RECORD_BYTES_MAX + 1)
    with pytest.raises(FormatError, match="a record has at most"):
        load_record(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        load_record(Path("/dev/zero"))
    with pytest.raises(StorageError, match="no such record or folder"):
        find_records([tmp_path / "absent"])


def test_load_all_keeps_the_good_ones(tmp_path: Path) -> None:
    written(tmp_path, record_of("cold", {}), "a.json")
    (tmp_path / "b.json").write_text("{")
    records, refused = load_all(find_records([tmp_path]))
    assert [r.file for r in records] == ["a.json"]
    assert len(refused) == 1 and "b.json" in refused[0]


def test_a_node_names_what_it_found_wanting() -> None:
    node = Node({"a": {"b": [1, "x"]}, "c": True}, "r.json", "$.results")
    assert node.number("absent", "deeper") is None
    assert node.numbers("absent") == []
    with pytest.raises(FormatError, match=r'r\.json: \$\.results\.a\.b\[1\]: expected a number, got str "x"'):
        node.numbers("a", "b")
    with pytest.raises(FormatError, match=r"\$\.results\.c: expected a number, got bool true"):
        node.number("c")
    with pytest.raises(FormatError, match=r"\$\.results\.c: expected an object"):
        node.number("c", "d")
    with pytest.raises(FormatError, match=r"\$\.results\.a: expected a list"):
        node.items("a")
    with pytest.raises(FormatError, match=r"\$\.results\.a: expected a text"):
        node.text("a")
