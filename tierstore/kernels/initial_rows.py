"""Normal numbers that depend on nothing but (seed, table, row, element).

A counter is hashed to 64 bits, of which 53 are a uniform number in (0, 1); the inverse of the normal
distribution makes it normal: Wichura's PPND16 (Applied Statistics 37, 1988, AS 241), good to 1e-16, mostly
additions and multiplications, so the same bits come out wherever IEEE arithmetic does (the outer 15 % take
a logarithm).
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import store_half, store_int
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.checksum import page_seed

U64 = np.uint64
FLOAT32, BFLOAT16 = 0, 1


@inline_kernel
def _middle(r):
    p = ((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r
            + 45921.953931549871457) * r + 13731.693765509461125) * r + 1971.5909503065514427) * r
         + 133.14166789178437745) * r + 3.3871328727963666080  # fmt: skip
    q = ((((((5226.4952788528545610 * r + 28729.085735721942674) * r + 39307.895800092710610) * r
            + 21213.794301586595867) * r + 5394.1960214247511077) * r + 687.18700749205790830) * r
         + 42.313330701600911252) * r + 1.0  # fmt: skip
    return p / q


@inline_kernel
def _outer(r):
    p = ((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r
            + 1.27045825245236838258) * r + 3.64784832476320460504) * r + 5.76949722146069140550) * r
         + 4.63033784615654529590) * r + 1.42343711074968357734  # fmt: skip
    q = ((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r
            + 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940) * r
         + 2.05319162663775882187) * r + 1.0  # fmt: skip
    return p / q


@inline_kernel
def _far(r):
    p = ((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r
            + 2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580) * r
         + 5.46378491116411436990) * r + 6.65790464350110377720  # fmt: skip
    q = ((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r
            + 7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r
         + 5.99832206555887937690e-1) * r + 1.0  # fmt: skip
    return p / q


@inline_kernel
def normal_of(uniform):
    """The number that a standard normal one stays below with probability `uniform`, in (0, 1)."""
    q = uniform - 0.5
    if abs(q) <= 0.425:
        return q * _middle(0.180625 - q * q)
    r = np.sqrt(-np.log(min(uniform, 1.0 - uniform)))
    size = _outer(r - 1.6) if r <= 5.0 else _far(r - 5.0)
    return -size if q < 0 else size


@kernel
def normal_quantiles(uniforms, out):
    """`normal_of` each of float64 [n], into `out`."""
    for i in range(uniforms.size):
        out[i] = normal_of(uniforms[i])


@kernel
def fill_normal(ids, targets, out, offset, kind, count, std, seed, low, high):
    """Write `count` numbers of dtype `kind` at byte `offset` of row targets[i] of `out`, for row ids[i].

    ids, targets int64 [n]; out uint8 [m, row_bytes]; low, high: the words of the table's uuid.
    """
    box = np.zeros(1, np.float32)
    bits = box.view(np.uint32)
    for i in range(ids.size):
        row_seed = page_seed(ids[i], low ^ seed, high)
        at = np.int64(out[targets[i]].ctypes.data) + offset
        for element in range(count):
            mixed = page_seed(element, row_seed, high)
            uniform = (np.float64(mixed >> U64(11)) + 0.5) / 9007199254740992.0
            box[0] = np.float32(normal_of(uniform) * std)
            if kind == FLOAT32:
                store_int(at + 4 * element, np.int64(bits[0]))
            else:
                word = np.int64(bits[0])
                store_half(at + 2 * element, (word + 0x7FFF + ((word >> 16) & 1)) >> 16)
    return out.size
