"""Raw memory operations for kernels: acquire, release, fences, prefetch and copies by address.

Addresses are plain int64, so a kernel has one specialisation whether its arrays are writable or
not; whoever calls it keeps the memory alive. LLVM lowers each operation to what the processor
needs (nothing more than a plain load or store on x86-64; ldar, stlr and dmb on arm64).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _numba_intrinsic

intrinsic: Any = _numba_intrinsic  # what it returns is called by kernels, with their arguments
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALVES = 16  # that `equal_halves` compares
MOVE_BYTES = 32  # of `move_bytes`


def _pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(address, pointee.as_pointer())


@intrinsic
def word_pointer(typingctx: Any, address: Any) -> Any:
    """An 8-byte aligned address as a pointer to int64, as numba.carray takes it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pointer(builder, args[0], _I64)

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def float_pointer(typingctx: Any, address: Any) -> Any:
    """A 4-byte aligned address as a pointer to float32, as numba.carray takes it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pointer(builder, args[0], ir.FloatType())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def half_pointer(typingctx: Any, address: Any) -> Any:
    """A 2-byte aligned address as a pointer to uint16, as numba.carray takes it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pointer(builder, args[0], _I16)

    return types.CPointer(types.uint16)(types.int64), codegen


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """int64 at an 8-byte aligned address; nothing later is read before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def load_acquire_int(typingctx: Any, address: Any) -> Any:
    """uint32 at a 4-byte aligned address; nothing later is read before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load_atomic(_pointer(builder, args[0], _I32), "acquire", 4), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_release_int(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a uint32; nothing earlier is written after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = builder.trunc(args[1], _I32)
        builder.store_atomic(narrow, _pointer(builder, args[0], _I32), "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_relaxed(typingctx: Any, address: Any) -> Any:
    """int64 at an 8-byte aligned address, whole, in no particular order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "monotonic", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64; nothing earlier is written after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fence_acquire(typingctx: Any) -> Any:
    """Nothing after this is read before what was read before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fence_release(typingctx: Any) -> Any:
    """Nothing after this is written before what was written before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetch(closeness: int) -> Any:
    @intrinsic
    def prefetch(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function_type = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
            read, data = _I32(0), _I32(1)
            builder.call(function, [_pointer(builder, args[0], _I8), read, _I32(closeness), data])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


# Ask for the cache line at an address; any address is safe. The second cache can wait for more lines at a
# time than the first.
prefetch_line, prefetch_line_to_second_cache = _prefetch(3), _prefetch(2)


@intrinsic
def equal_halves(typingctx: Any, address: Any, value: Any) -> Any:
    """Which of the 16 uint16 at a 2-byte aligned address are `value`: bit i for number i.

    They are read in no particular order, so with a writer about this is a guess.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I16, HALVES)
        halves = builder.load(_pointer(builder, args[0], vector), align=2)
        undefined, everywhere = (
            ir.Constant(vector, ir.Undefined),
            ir.Constant(ir.VectorType(_I32, HALVES), None),
        )
        first = builder.insert_element(undefined, builder.trunc(args[1], _I16), _I32(0))
        wanted = builder.shuffle_vector(first, undefined, everywhere)
        return builder.zext(builder.bitcast(builder.icmp_unsigned("==", halves, wanted), _I16), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """Number of the lowest bit that is set; `bits` must not be 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], _I1(1))

    return types.int64(types.int64), codegen


@intrinsic
def move_bytes(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy 32 bytes from `source` to `target`, through registers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target_, source_ = (_pointer(builder, a, ir.VectorType(_I8, MOVE_BYTES)) for a in args)
        builder.store(builder.load(source_, align=1), target_, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """memcpy: `count` bytes from `source` to `target`, which do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target_, source_ = (_pointer(builder, a, _I8) for a in args[:2])
        cgutils.raw_memcpy(builder, target_, source_, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero_bytes(typingctx: Any, target: Any, count: Any) -> Any:
    """memset to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, _pointer(builder, args[0], _I8), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _load(bits: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            narrow = builder.load(_pointer(builder, args[0], ir.IntType(bits)), align=bits // 8)
            return builder.zext(narrow, _I64) if bits < 64 else narrow

        return types.int64(types.int64), codegen

    return load


def _store(bits: int) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            narrow = builder.trunc(args[1], ir.IntType(bits)) if bits < 64 else args[1]
            builder.store(narrow, _pointer(builder, args[0], ir.IntType(bits)), align=bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


load_byte, load_half, load_int, load_word = _load(8), _load(16), _load(32), _load(64)
store_byte, store_half, store_int, store_word = _store(8), _store(16), _store(32), _store(64)


def _fetch(operation: str) -> Any:
    @intrinsic
    def fetch(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _pointer(builder, args[0], _I64), args[1], "acq_rel")

        return types.int64(types.int64, types.int64), codegen

    return fetch


# Change an int64 in memory, whole; what was there before comes back. Acquire and release.
fetch_add, fetch_and, fetch_or = _fetch("add"), _fetch("and"), _fetch("or")


@intrinsic
def compare_and_swap(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write `value` if the int64 in memory is `expected`; True where it was. Acquire and release."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], _I64)
        pair = builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen
