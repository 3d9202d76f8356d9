"""Machine instructions that numba does not offer: unaligned loads, zeros counted, bytes by dozens.

Text is read 8, 32 or 64 bytes at a time, wherever it starts. What is spelled here in LLVM's terms
becomes a handful of vector instructions where the processor has them, and stays correct where not.
Byte order is little-endian throughout, as on every machine that numba compiles for.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

assert sys.byteorder == "little", "the kernels read eight bytes of text as one little-endian number"


@intrinsic
def load64(typing: Any, data: Any, at: Any) -> Any:
    """data[at : at + 8] of a uint8 array as one uint64; the caller holds the bounds."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [args[1]])
        value = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        value.align = 1
        return value

    return types.uint64(data, types.int64), build


@intrinsic
def store64(typing: Any, data: Any, at: Any, value: Any) -> Any:
    """Writes a uint64 to data[at : at + 8] of a uint8 array; the caller holds the bounds."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [args[1]])
        builder.store(args[2], builder.bitcast(place, ir.IntType(64).as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), build


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:
    """Zero bits below the lowest set bit of a uint64; 64 for zero."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


@intrinsic
def high32(typing: Any, data: Any, at: Any) -> Any:
    """The high bits of data[at : at + 32] of a uint8 array, byte 0 lowest; a uint64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 32)
        high = builder.icmp_signed("<", value, _all(32, 0))
        return builder.zext(builder.bitcast(high, ir.IntType(32)), ir.IntType(64))

    return types.uint64(data, types.int64), build


@intrinsic
def fold32(typing: Any, data: Any, at: Any, out: Any, to: Any) -> Any:
    """Writes data[at : at + 32], ASCII, to out[to : to + 32]: small letters, digits, else zeros."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 32)
        low = builder.or_(value, _all(32, 0x20))
        letter = builder.icmp_unsigned("<", builder.sub(low, _all(32, ord("a"))), _all(32, 26))
        digit = builder.icmp_unsigned("<", builder.sub(value, _all(32, ord("0"))), _all(32, 10))
        folded = builder.select(builder.or_(letter, digit), low, _all(32, 0))
        place = _place(context, builder, signature.args[2], args[2], args[3], 32)
        builder.store(folded, place).align = 1
        return context.get_dummy_value()

    return types.void(data, types.int64, out, types.int64), build


@intrinsic
def filled64(typing: Any, data: Any, at: Any) -> Any:
    """One bit for each of data[at : at + 64] of a uint8 array, byte 0 lowest, set if not zero."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 64)
        return builder.bitcast(builder.icmp_unsigned("!=", value, _all(64, 0)), ir.IntType(64))

    return types.uint64(data, types.int64), build


def _all(lanes: int, value: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(8), lanes), [value] * lanes)


def _place(context: Any, builder: Any, kind: Any, data: Any, at: Any, lanes: int) -> Any:
    array = context.make_array(kind)(context, builder, data)
    vector = ir.VectorType(ir.IntType(8), lanes)
    return builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())


def _loaded(context: Any, builder: Any, kind: Any, data: Any, at: Any, lanes: int) -> Any:
    value = builder.load(_place(context, builder, kind, data, at, lanes))
    value.align = 1
    return value
