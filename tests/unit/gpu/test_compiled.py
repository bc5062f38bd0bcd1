"""The HBM tier's kernels compiled for an H200: how wide they read, what they wait for, what they need."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from engram_client.hbm import operations
from engram_client.hbm.operations import NOT_DECODED, Copying, decoding_of
from engram_client.spec import Field, RowLayout

pytest.importorskip("triton")

from tests.support.compiled import Compiled, compiled

V41 = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)), None)
INDEX = {
    "index_keys": "*i64", "index_owners": "*i16", "touched": "*u8", "sequences": "*i32", "records": "*i64",
    "counters": "*i64", "sets": "i32",
}  # fmt: skip
IDS = {"tokens": "*i64", "dead": "*u8", "history": "*i64", "fold": "*i64", "rules": "*i64", "length": "i32"}


def look_up(record_bytes: int, **choices: Any) -> Compiled:
    from engram_client.hbm.kernels import look_up as kernel

    plain = {
        **INDEX, **IDS, "keys": "*i64", "records_as_bytes": "*u8", "out": "*i64", "found": "*i64",
        "global_scale": "fp32", "first_owner": "i32", "n": "i32", "WIDTH": 3, "CHECKED": True,
        "HASHED": False, "HAS_DEAD": False, "SPAN": 0, "HAS_FOLD": True,
        **NOT_DECODED, **Copying(record_bytes).constants,
    }  # fmt: skip
    return compiled(kernel, **{**plain, **choices})


def test_records_are_copied_sixteen_bytes_at_a_time() -> None:
    made = look_up(2112)
    # 4 records of 256 words and 8 by 128 lanes: four times 16 bytes, and the rest.
    assert Counter(made.widths("st"))[16] == 4 and Counter(made.widths("ld"))[16] >= 4
    assert all(".cg" in line for line in made.lines("ld.global") if ".v2.b64" in line)
    assert not made.lines("volatile")
    assert made.registers <= 64 and made.spilled_bytes == 0  # eight programs of four warps a processor


def test_the_sequence_is_looked_at_before_and_behind_the_record() -> None:
    made = look_up(2112).ptx
    first = made.index("ld.global.cg.b32")
    loads = [at for at in range(len(made)) if made.startswith("ld.global.cg.v2.b64", at)]
    check = made.index("atom.global.gpu.acq_rel.add.u32")
    barrier = made.rindex("bar.sync", 0, check)
    store = made.index("st.global.v2.b64")
    assert first < min(loads) <= max(loads) < barrier < check < store
    assert "acq_rel" not in look_up(2112, CHECKED=False).ptx


def test_single_rows_and_hashing() -> None:
    rows = look_up(264, WIDTH=1)
    assert set(rows.widths("st")) <= {1, 8, 16} and rows.spilled_bytes == 0
    hashed = look_up(2112, HASHED=True, HAS_DEAD=True, SPAN=3)
    assert Counter(hashed.widths("st"))[16] == 4
    assert hashed.registers <= 64 and hashed.spilled_bytes == 0  # each key is hashed once, not once a layout


def test_numbers_are_stored_sixteen_bytes_at_a_time() -> None:
    decoding = decoding_of(V41, 8)
    assert decoding is not None
    made = look_up(2112, **{**decoding.constants, "out": "*bf16", "RECORDS": 2})
    # 2 records of 8 rows of 256 numbers of 2 bytes by 128 lanes
    assert Counter(made.widths("st"))[16] == 4
    assert Counter(made.widths("ld"))[8] >= 4  # rows of 264 bytes lie on eight
    assert ".ftz" not in made.ptx  # scales and numbers below 2^-126 count
    assert made.spilled_bytes == 0


def test_admission() -> None:
    from engram_client.hbm.admission import admit

    copying = {name: Copying(2112).constants[name] for name in ("WORDS", "HEAD", "TAIL")}
    made = compiled(
        admit, **INDEX, **copying, lines="*i64", order="*i64", keys="*i64", owners="*i16", newcomers="*i64",
        states="*u8", ghosts_at="*i16", hands="*i8", n="i32", PER_SET=8, PINS=False,
    )  # fmt: skip
    opened, closed = made.ptx.index("gpu.acq_rel.add.u32"), made.ptx.index("gpu.release.add.u32")
    stores = [at for at in range(len(made.ptx)) if made.ptx.startswith("st.global", at)]
    assert opened < made.ptx.index("bar.sync", opened) < min(stores)
    assert max(stores) < made.ptx.rindex("bar.sync", 0, closed) < closed
    assert made.spilled_bytes == 0


def test_scattering_and_hashing_alone() -> None:
    from engram_client.hashing.device_kernels import hash_all
    from engram_client.hbm.kernels import scatter

    plain = {"source": "*i64", "source_as_bytes": "*u8", "lines": "*i64", "out": "*i64", "places": "*i64"}
    made = compiled(
        scatter, **plain, global_scale="fp32", n="i32", **NOT_DECODED, **Copying(2112).constants
    )  # fmt: skip
    assert Counter(made.widths("st"))[16] == 4
    ids = {**IDS, "tokens": "*i32"}
    made = compiled(
        hash_all, **ids, keys="*i64", positions="i32", HAS_DEAD=True, SPAN=3, HAS_FOLD=True, NGRAM=4,
        BLOCK=256,
    )  # fmt: skip
    assert made.registers <= 64 and made.spilled_bytes == 0


def test_how_records_are_divided() -> None:
    for record_bytes in (1, 6, 84, 160, 264, 640, 1280, 2112, 10_000):
        found = Copying(record_bytes).constants
        words = record_bytes // Copying(record_bytes).unit.itemsize
        assert found["WORDS"] == words <= found["HEAD"] + found["TAIL"]
        assert found["HEAD"] <= words < 2 * found["HEAD"]
        for size in (found["HEAD"], found["TAIL"] or 1, found["RECORDS"]):
            assert operations.power_of_two(size) == size
    assert Copying(2112).unit == torch.int64 and Copying(2112).constants["HEAD"] == 256
