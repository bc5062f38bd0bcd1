"""Row ids back to the n-gram keys they were hashed from, by the Chinese remainder theorem.

The rows of one record are one number modulo several primes. As many of them as make a product
above 2^63 determine that number, the n-gram key (three heads for V4.1 and PLE); the others must
agree with it. Engines that hand over row ids so lose nothing against engines that hand over
keys, and ids that are not of one n-gram are noticed: for V4.1 five heads of 16 million rows each
are left to object. What is not promised: ids made up so that all heads agree on some key pass.

Not every table allows it. Its heads must have coprime sizes below 2^31 with a product above
2^63; otherwise several keys share all their rows, and the rows are looked up one by one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from engram_client.errors import BadRequest, ForeignIds, IdOutOfRange
from engram_client.hashing import inputs, kernels
from engram_client.hashing.inputs import Int64Array
from engram_client.hashing.rows import head_arrays
from engram_client.spec import HashScheme

KEY_BOUND = 2**63
SIZE_BOUND = 2**31  # so that twice a rest times an inverse stays inside 64 bits

Plan = tuple[npt.NDArray[Any], ...]  # as `kernels.keys_of_rows` describes it


def recover_keys(scheme: HashScheme, row_ids: Any) -> Int64Array:
    """N-gram keys int64 [..., orders] of whole records' row ids, int64 or int32 [..., H].

    All heads of an order -1 ("no row here") gives a key of -1.

    Raises IdOutOfRange for ids outside the table; ForeignIds, naming position and head, for ids
    that are not one n-gram's; BadRequest for another dtype or shape, or where the table's heads
    do not determine keys.
    """
    plan = _plan(scheme)
    rows = inputs.as_records(row_ids, "row_ids", scheme.orders * scheme.heads, "all heads of all orders")
    keys = np.empty((*rows.shape[:-1], scheme.orders), dtype=np.int64)
    shape = (keys.size // scheme.orders, scheme.orders)
    records = rows.reshape(*shape, scheme.heads)
    refused = kernels.keys_of_rows(records, plan, keys.reshape(shape))
    if refused >= 0:
        record = records.reshape(-1, scheme.heads)[refused].tolist()
        place = [int(i) for i in np.unravel_index(refused, keys.shape)]
        _refuse(scheme, record, place[:-1], place[-1])
    return keys


@lru_cache(maxsize=256)
def _plan(scheme: HashScheme) -> Plan:
    sizes, offsets = head_arrays(scheme)
    ranked = np.zeros(sizes.shape, dtype=np.int64)
    counts = np.zeros(scheme.orders, dtype=np.int64)
    inverses, digit_max = np.zeros_like(sizes), np.zeros_like(sizes)
    for order in range(scheme.orders):
        heads = _determining_heads(scheme, order)
        ranked[order] = heads + [head for head in range(scheme.heads) if head not in heads]
        counts[order] = len(heads)
        product = 1
        for i, head in enumerate(heads):
            size = scheme.head_sizes[order][head]
            inverses[order, i] = pow(product, -1, size)
            digit_max[order, i] = (KEY_BOUND - 1) // product
            product *= size
    ordered = [np.take_along_axis(array, ranked, axis=1) for array in (sizes, offsets)]
    return (*ordered, ranked, counts, inverses, digit_max)


def _determining_heads(scheme: HashScheme, order: int) -> list[int]:
    """The first heads of an order that are coprime and whose sizes multiply above 2^63."""
    product, heads = 1, []
    for head, size in enumerate(scheme.head_sizes[order]):
        if product <= KEY_BOUND and size < SIZE_BOUND and math.gcd(product, size) == 1:
            product *= size
            heads.append(head)
    if product <= KEY_BOUND:
        raise BadRequest(
            f"layer {scheme.layer_id}, order {order + 2}: the sizes of {scheme.heads} heads "
            f"multiply to {product}, which does not determine 63-bit n-gram keys; look the rows up "
            "with lookup(row_ids), or pack the table with row addressing"
        )
    return heads


def _refuse(scheme: HashScheme, record: list[int], place: list[int], order: int) -> NoReturn:
    """Raise what is wrong with one record's row ids; `record` is known to be refused."""
    sizes, offsets = scheme.head_sizes[order], scheme.head_offsets[order]
    first = order * scheme.heads
    for head, row in enumerate(record):
        if row < -1 or row >= scheme.rows:
            raise IdOutOfRange(
                f"row_ids{[*place, first + head]} is {row}; the table's hashed rows are "
                f"0..{scheme.rows - 1}, or -1 for no row"
            )
    where = f"row_ids{place or ''} are not one n-gram's: order {order + 2}, "
    remedy = "; look rows of no n-gram up with lookup(row_ids)"
    if -1 in record:
        raise ForeignIds(f"{where}head {record.index(-1)} is -1 where other heads hold rows{remedy}")
    for head, (row, size, offset) in enumerate(zip(record, sizes, offsets, strict=True)):
        if not offset <= row < offset + size:
            expected = f"expected {offset}..{offset + size - 1}"
            raise ForeignIds(f"{where}head {head} got row {row}, {expected}, the rows of that head{remedy}")
    heads = _determining_heads(scheme, order)
    key = _join(heads, [row - offset for row, offset in zip(record, offsets, strict=True)], sizes)
    if key >= KEY_BOUND:
        raise ForeignIds(
            f"{where}head {heads[-1]} got row {record[heads[-1]]}, expected one that makes a 63-bit key "
            f"with heads {heads[:-1]}{remedy}"
        )
    wrong = next(h for h, row in enumerate(record) if key % sizes[h] + offsets[h] != row)
    raise ForeignIds(
        f"{where}head {wrong} got row {record[wrong]}, expected {key % sizes[wrong] + offsets[wrong]} "
        f"by key {key} of heads {heads}{remedy}"
    )


def _join(heads: list[int], rests: list[int], sizes: tuple[int, ...]) -> int:
    """The number that leaves `rests` in `heads`, in exact arithmetic."""
    value, product = 0, 1
    for head in heads:
        value += (rests[head] - value) * pow(product, -1, sizes[head]) % sizes[head] * product
        product *= sizes[head]
    return value
