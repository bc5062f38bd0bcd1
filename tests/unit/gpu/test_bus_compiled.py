"""The bus reader's and the modules' kernels compiled for an H200: how they load, and in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

from engram_client.gpu.bus_launch import warps_for
from tests.support.compiled import Compiled, compiled

OUT = {16: "*i64", 8: "*i64", 4: "*i32", 2: "*i16", 1: "*u8"}


def bus(unit: int, units: int) -> Compiled:
    from engram_client.gpu.bus_kernels import read_records

    tile = 1 << (units - 1).bit_length()
    return compiled(
        read_records, warps_for(tile), view="*i64", keys="*i64", out=OUT[unit], missing="*i1", listed="*i64",
        touches="*i64", counters="*i64", scratch="*i64", units="i32", touch_mask="i32",
        ORDERS=3, UNIT=unit, TILE=tile, KEEP_MASKED=False, INTERPRETED=False,
    )  # fmt: skip


def test_a_record_is_asked_for_in_sixteens_and_each_sector_once() -> None:
    made = bus(16, 132)
    loads = made.lines("ld.relaxed.sys.global.v2.b64")
    assert len(loads) == 8  # 256 places of 16 bytes for 32 threads; an instruction covers 512 bytes in a row
    assert Counter(made.widths("st"))[16] == 8
    assert made.spilled_bytes == 0 and made.registers <= 128
    # all else that the writer may be changing is loaded at system scope, too
    assert len(made.lines("ld.relaxed.sys.global.u16")) == 1 and len(made.lines("ld.acquire.sys")) == 2


def test_the_sequence_comes_first_and_last_with_barriers_between() -> None:
    """Acquire, agree, tags, keys, agree, rows, fence, barrier, again, agree: in this order in the loop."""
    ptx = bus(16, 132).ptx
    loop = ptx[ptx.index("ld.acquire.sys", ptx.index("ld.acquire.sys") + 1) :]
    order = [
        "ld.acquire.sys.global.b64", "st.global.b64", "bar.sync", "ld.volatile.global.b64",
        "ld.relaxed.sys.global.u16", "ld.relaxed.sys.global.b64", "st.global.b64", "bar.sync",
        "ld.volatile.global.b64", "ld.relaxed.sys.global.v2.b64", "fence.acq_rel.sys", "bar.sync",
        "ld.relaxed.sys.global.b64", "st.global.b64", "bar.sync", "ld.volatile.global.b64",
    ]  # fmt: skip
    at = 0
    for word in order:
        at = loop.index(word, at) + len(word)
    fence = loop.index("fence.acq_rel.sys")
    assert loop.rindex("ld.relaxed.sys.global.v2.b64") < fence  # nothing of the record behind it


@pytest.mark.parametrize(("unit", "units", "load"), [(8, 33, "b64"), (2, 45, "u16"), (1, 7, "u8")])
def test_records_of_any_alignment_compile(unit: int, units: int, load: str) -> None:
    assert bus(unit, units).lines(f"ld.relaxed.sys.global.{load}")


def test_waiting_for_a_word() -> None:
    from engram_client.gpu.late_kernels import await_word, confirm_word

    wait = compiled(await_word, 1, word="*i64", expected="*i64", found="*i64", polls="i32", INTERPRETED=False)
    assert len(wait.lines("ld.acquire.sys")) >= 2
    confirm = compiled(confirm_word, 1, word="*i64", found="*i64", late="*i1", INTERPRETED=False).ptx
    assert confirm.index("fence.acq_rel.sys") < confirm.index("ld.relaxed.sys.global.b64")


def test_modules_read_and_write_widely() -> None:
    from engram_client.gpu.fused_kernels import decode_rows, gate

    plain: dict[str, Any] = {"index": "*i64", "count": "i32", "global_scale": "fp32", "rows": "*u8"}
    rows = compiled(
        decode_rows, 4, **plain, out="*bf16", ROW_BYTES=264, WEIGHT_AT=0, SCALE_AT=256, WEIGHTS=256,
        SCALE_BLOCK=32, GROUP=24, INDEXED=True, TILE=256, ROWS=8,
    )  # fmt: skip
    assert 8 in rows.widths("ld") and set(rows.widths("st")) == {16}  # the index may be read in sixteens
    assert rows.spilled_bytes == 0
    streams = compiled(
        gate, 16, x="*bf16", projected="*bf16", query_weight="*bf16", key_weight="*bf16", dead="*i1",
        out="*bf16", root_of_width="fp32", eps="fp32", STREAMS=4, WIDTH=5120, TILE=8192, HAS_DEAD=True,
    )  # fmt: skip
    assert set(streams.widths("st")) == {16} and set(streams.widths("ld")) == {1, 16}
    assert streams.spilled_bytes == 0
