"""Machine instructions that numba does not offer: unaligned loads, zeros counted, bytes by dozens.

Text is read 8, 32 or 64 bytes at a time, wherever it starts. What is spelled here in LLVM's terms
becomes a handful of vector instructions where the processor has them, and stays correct where not.
Byte order is little-endian throughout, as on every machine that numba compiles for.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
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
def leading_zeros(typing: Any, value: Any) -> Any:
    """Zero bits above the highest set bit of a uint64; 64 for zero."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


@intrinsic
def high32(typing: Any, data: Any, at: Any) -> Any:
    """The high bits of data[at : at + 32] of a uint8 array, byte 0 lowest; a uint64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 32)
        high = builder.icmp_signed("<", value, _all(32, 0))
        return builder.zext(builder.bitcast(high, ir.IntType(32)), ir.IntType(64))

    return types.uint64(data, types.int64), build


@intrinsic
def lower32(typing: Any, data: Any, at: Any, out: Any, to: Any) -> Any:
    """Writes data[at : at + 32], ASCII, to out[to : to + 32], capital letters as small ones."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 32)
        capital = _between(builder, value, "A", "Z", 32)
        low = builder.select(capital, builder.or_(value, _all(32, 0x20)), value)
        place = _place(context, builder, signature.args[2], args[2], args[3], 32)
        builder.store(low, place).align = 1
        return context.get_dummy_value()

    return types.void(data, types.int64, out, types.int64), build


def _class64(
    ranges: str, chars: str, *, far: bool = False, but: tuple[str, str] | None = None
) -> Any:
    """An intrinsic of an array and a place: one bit a byte of data[at : at + 64], uint8.

    Args:
        ranges: First and last of ranges of characters whose bytes count.
        chars: More of them.
        far: What is not ASCII counts, too.
        but: Ranges and characters that do not count.
    """

    def bits64(typing: Any, data: Any, at: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = _loaded(context, builder, signature.args[0], args[0], args[1], 64)
            found = _one_of(builder, value, ranges, chars, 64)
            if but is not None:
                found = builder.and_(found, builder.not_(_one_of(builder, value, *but, 64)))
            if far:
                found = builder.or_(found, builder.icmp_signed("<", value, _all(64, 0)))
            return _bits64(builder, found)

        return types.uint64(data, types.int64), build

    return intrinsic(bits64)


known64 = _class64("az09", "", far=True)
joints64 = _class64(":;", ".,'")
rare64 = _class64("!\x7f", "", but=("az09:;", ".,'\"?"))
letters64 = _class64("az", "")
digits64 = _class64("09", "")
spaces64 = _class64("\1 ", "")
zeros64 = _class64("", "\0")
dots64 = _class64("", ".")
quotes64 = _class64("", "'")
separators64 = _class64("", ",;")
colons64 = _class64("", ":")
underscores64 = _class64("", "_")
hyphens64 = _class64("", "-")
bangs64 = _class64("", "!")
backslashes64 = _class64("", "\\")
opening64 = _class64("", "([{")
closing64 = _class64("", ")]}")
round_opening64 = _class64("", "(")
round_closing64 = _class64("", ")")
square_opening64 = _class64("", "[")
square_closing64 = _class64("", "]")
beside64 = _class64("", "!$),.:;=?")
signs64 = _class64("#&*+<>", "/@\\^|~")
operators64 = _class64("%&*+<>", "/^|~")


@intrinsic
def same64(typing: Any, data: Any, at: Any) -> Any:
    """One bit a byte of data[at : at + 64], uint8: equal to the byte before it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _loaded(context, builder, signature.args[0], args[0], args[1], 64)
        before = builder.sub(args[1], ir.Constant(args[1].type, 1))
        last = _loaded(context, builder, signature.args[0], args[0], before, 64)
        return _bits64(builder, builder.icmp_unsigned("==", value, last))

    return types.uint64(data, types.int64), build


def _lowest(lanes: int) -> Any:
    """An intrinsic of hashes, count, a, b, out and a place, arrays of uint32.

    It writes out[k] = min(a[k] * h + b[k] mod 2^32 for h in hashes[:count]) for `lanes` numbers k
    from the place on. These stay in registers while the hashes go by; a compiler left to choose
    keeps the hashes there, and loads and stores the numbers.
    """
    shape = ir.VectorType(ir.IntType(32), lanes)
    none, everywhere = ir.Constant(shape, ir.Undefined), ir.Constant(shape, [0] * lanes)

    def lowest(typing: Any, hashes: Any, count: Any, a: Any, b: Any, out: Any, at: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def pointer(k: int) -> Any:
                return context.make_array(signature.args[k])(context, builder, args[k]).data

            data = pointer(0)
            factors, terms, to = (
                builder.bitcast(builder.gep(pointer(k), [args[5]]), shape.as_pointer())
                for k in (2, 3, 4)
            )
            factor, term = builder.load(factors, align=4), builder.load(terms, align=4)
            least = cgutils.alloca_once_value(builder, ir.Constant(shape, [0xFFFFFFFF] * lanes))
            with cgutils.for_range(builder, args[1]) as loop:
                one = builder.load(builder.gep(data, [loop.index]))
                value = builder.insert_element(none, one, ir.Constant(ir.IntType(32), 0))
                value = builder.shuffle_vector(value, none, everywhere)
                value = builder.add(builder.mul(factor, value), term)
                held = builder.load(least)
                lower = builder.icmp_unsigned("<", value, held)
                builder.store(builder.select(lower, value, held), least)
            builder.store(builder.load(least), to, align=4)
            return context.get_dummy_value()

        return types.void(hashes, types.int64, a, b, out, types.int64), build

    return intrinsic(lowest)


lowest32 = _lowest(32)
lowest8 = _lowest(8)


def _bits64(builder: Any, lanes: Any) -> Any:
    """64 truth values as bits of a number; joined with others in vectors they compile badly."""
    word = ir.IntType(64)
    number = builder.bitcast(lanes, word)
    return builder.asm(ir.FunctionType(word, [word]), "", "=r,0", [number], False)


def _one_of(builder: Any, value: Any, ranges: str, chars: str, lanes: int) -> Any:
    """Whether each byte is in one of some ranges, given by their ends, or some character."""
    found = [
        _between(builder, value, ranges[k], ranges[k + 1], lanes) for k in range(0, len(ranges), 2)
    ]
    found += [builder.icmp_unsigned("==", value, _all(lanes, ord(char))) for char in chars]
    whole = found[0]
    for part in found[1:]:
        whole = builder.or_(whole, part)
    return whole


def _between(builder: Any, value: Any, low: str, high: str, lanes: int) -> Any:
    """Whether each byte is one of a range of characters: one addition, one signed comparison."""
    top = builder.add(value, _all(lanes, 0x7F - ord(high)))
    return builder.icmp_signed(">", top, _all(lanes, 0x7F - (ord(high) - ord(low) + 1)))


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
