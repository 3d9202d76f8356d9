"""Two machine instructions that numba does not offer: an unaligned load and a count of zeros.

Text is read eight bytes at a time, wherever it starts. Both are single instructions on every
processor; here they are spelled in LLVM's terms. Byte order is little-endian throughout, as on
every machine that numba compiles for.
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
