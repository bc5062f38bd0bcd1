"""Opening row files: every bit of the header counts, and each refusal says what and where."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import FormatError, StorageError
from tests.rowfile_reader import RowFileOracle
from tests.table_sources import raw_source, write_row_file
from tierstore.format.header import sealed_pages
from tierstore.format.rowfile import RowFile
from tierstore.format.source import Extent, TableSource
from tierstore.format.verify import VerifyReport, verify


@pytest.fixture
def row_file(tmp_path: Path) -> RowFile:
    source, _ = raw_source(tmp_path, 500, (120, 8), splits=(77,))
    return write_row_file(source, tmp_path)


def checked(path: Path) -> VerifyReport:
    return verify(path, lambda done, total: None)


def test_open_reads_back_what_was_packed(row_file: RowFile) -> None:
    opened = RowFile.open(row_file.path)
    oracle = RowFileOracle(row_file.path)
    assert opened.spec.generation == oracle.generation.hex()
    assert opened.spec.uuid == oracle.uuid.hex()
    assert opened.spec.rows == opened.geometry.rows == 500
    assert struct.pack("<QQ", *(int(w) for w in opened.uuid_words)) == oracle.uuid


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\0" * 4096, b"TIERROW"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.rows"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.rows is not a row file"):
        RowFile.open(path)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.rows"):
        RowFile.open(tmp_path / "none.rows")


@pytest.mark.parametrize("keep", [8, 4095, 4096, 8191])
def test_a_file_cut_within_its_header_is_truncated(row_file: RowFile, keep: int) -> None:
    data = row_file.path.read_bytes()
    row_file.path.write_bytes(data[:keep])
    with pytest.raises(FormatError, match="truncated"):
        RowFile.open(row_file.path)


def test_a_file_cut_within_its_rows_is_truncated_and_verify_names_the_rows(row_file: RowFile) -> None:
    data = row_file.path.read_bytes()
    row_file.path.write_bytes(data[: -4096 - 10])
    with pytest.raises(FormatError, match=rf"truncated: expected {len(data)} bytes, got {len(data) - 4106}"):
        RowFile.open(row_file.path)
    report = checked(row_file.path)
    assert not report.whole
    assert report.missing_bytes == 4106
    assert report.missing_rows == (row_file.geometry.rows_of_page(len(data) // 4096 - 2).start, 499)
    assert report.damaged_pages == 0


def test_trailing_bytes_are_refused_and_named(row_file: RowFile) -> None:
    with row_file.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(FormatError, match="bytes after its last page"):
        RowFile.open(row_file.path)
    report = checked(row_file.path)
    assert report.trailing_bytes == 4
    assert not report.whole


def test_a_newer_version_is_refused_by_its_number(row_file: RowFile) -> None:
    payload = bytearray(row_file.path.read_bytes()[:4088])
    payload[8:12] = struct.pack("<I", 2)
    with row_file.path.open("r+b") as file:
        file.write(sealed_pages(bytes(payload), 0, row_file.header.uuid))
    with pytest.raises(FormatError, match="format version 2, this release reads version 1"):
        RowFile.open(row_file.path)


@pytest.mark.parametrize("offset", [12, 16, 24, 28, 48, 56, 64, 88, 92])
def test_a_header_that_contradicts_itself_is_refused_though_its_checksum_is_good(
    row_file: RowFile, offset: int
) -> None:
    payload = bytearray(row_file.path.read_bytes()[:4088])
    payload[offset + 1] ^= 0x40
    with row_file.path.open("r+b") as file:
        file.write(sealed_pages(bytes(payload), 0, row_file.header.uuid))
    with pytest.raises(FormatError):
        RowFile.open(row_file.path)


def test_a_header_cannot_make_its_reader_take_much_memory_or_time(row_file: RowFile) -> None:
    header = row_file.header
    huge = replace(header.geometry, rows=2**40)
    with row_file.path.open("r+b") as file:
        file.write(replace(header, geometry=huge).page())
    report = checked(row_file.path)
    assert report.missing_bytes == huge.file_bytes - row_file.geometry.file_bytes
    with row_file.path.open("r+b") as file:
        file.write(replace(header, leaf_pages=2**32 - 1).page())
    with pytest.raises(FormatError, match="4294967295 pages under one leaf"):
        checked(row_file.path)


def test_every_flipped_bit_of_the_header_is_found(row_file: RowFile) -> None:
    data = bytearray(row_file.path.read_bytes())
    bits = np.random.default_rng(5).choice(8192 * 8, 300, replace=False)
    for bit in [*range(104 * 8), *(int(b) for b in bits)]:
        data[bit // 8] ^= 1 << bit % 8
        row_file.path.write_bytes(data)
        with pytest.raises(FormatError):
            RowFile.open(row_file.path)
        data[bit // 8] ^= 1 << bit % 8


def test_every_flipped_bit_of_the_rows_is_found_and_named(row_file: RowFile) -> None:
    data = bytearray(row_file.path.read_bytes())
    first_byte = row_file.geometry.first_page * 4096
    for bit in np.random.default_rng(6).choice((len(data) - first_byte) * 8, 100, replace=False):
        byte = first_byte + int(bit) // 8
        data[byte] ^= 1 << int(bit) % 8
        row_file.path.write_bytes(data)
        report = checked(row_file.path)
        rows = row_file.geometry.rows_of_page(byte // 4096)
        assert [(d.page, d.first_row, d.last_row) for d in report.damaged] == [
            (byte // 4096, rows.start, rows.stop - 1)
        ]
        assert not report.whole
        data[byte] ^= 1 << int(bit) % 8
    row_file.path.write_bytes(data)
    assert checked(row_file.path).whole


def test_swapped_pages_and_pages_of_another_file_are_damage(row_file: RowFile, tmp_path: Path) -> None:
    source, _ = raw_source(tmp_path, 500, (120, 8), splits=(77,))
    twin = write_row_file(source, tmp_path / "twin").path.read_bytes()
    data = bytearray(row_file.path.read_bytes())
    data[3 * 4096 : 4 * 4096], data[4 * 4096 : 5 * 4096] = (
        data[4 * 4096 : 5 * 4096],
        data[3 * 4096 : 4 * 4096],
    )
    data[6 * 4096 : 7 * 4096] = twin[6 * 4096 : 7 * 4096]
    row_file.path.write_bytes(data)
    assert [d.page for d in checked(row_file.path).damaged] == [3, 4, 6]


def test_pages_that_were_resealed_change_the_generation(row_file: RowFile) -> None:
    data = bytearray(row_file.path.read_bytes())
    payload = bytearray(data[5 * 4096 : 5 * 4096 + 4088])
    payload[17] ^= 1
    data[5 * 4096 : 6 * 4096] = sealed_pages(bytes(payload), 5, row_file.header.uuid)
    row_file.path.write_bytes(data)
    report = checked(row_file.path)
    assert report.damaged_pages == 0
    assert report.generation != row_file.spec.generation
    assert not report.whole


class TestTableSource:
    """A source that does not cover its rows exactly is refused when it is made."""

    def test_gap_overlap_and_shortfall(self, tmp_path: Path) -> None:
        source, _ = raw_source(tmp_path, 10, (4,))
        path = tmp_path / "x"
        for extents in (
            (Extent(path, 0, 0, 4), Extent(path, 0, 5, 5)),
            (Extent(path, 0, 0, 6), Extent(path, 0, 5, 5)),
            (Extent(path, 0, 0, 9),),
            (Extent(path, -1, 0, 10),),
            (),
        ):
            with pytest.raises(FormatError, match="field 'weight'"):
                TableSource("t", None, None, 10, source.layout, None, (extents,))

    def test_fields_without_tensors(self, tmp_path: Path) -> None:
        source, _ = raw_source(tmp_path, 10, (4, 2))
        with pytest.raises(FormatError, match="2 fields"):
            TableSource("t", None, None, 10, source.layout, None, source.fields[:1])

    def test_files_are_distinct(self, tmp_path: Path) -> None:
        source, _ = raw_source(tmp_path, 10, (4, 2), splits=(5,))
        assert len(source.files) == 4
        assert len(set(source.files)) == 4
