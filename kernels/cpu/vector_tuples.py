"""Tuples of numbers in blocks of vectors: a row's sums, their factors, slopes and row arrays."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..math import fused
from .target import add
from .vector_tiles import ARRAYS, ROW_ARRAYS


def each(emit: Any, result: Any = None) -> Any:
    """An intrinsic: an operation of each item of two tuples, to items of type `result`, or the second's."""

    @intrinsic
    def operate(typingctx, a, b):
        kind = types.UniTuple(result or b[0], len(b))

        def codegen(context, builder, sig, args):
            x, y = (cgutils.unpack_tuple(builder, t, len(b)) for t in args)
            out = [emit(context, builder, sig, *pair) for pair in zip(x, y, strict=True)]
            return context.make_tuple(builder, sig.return_type, out)

        return kind(a, b), codegen

    return operate


def _widen(context, builder, sig, total, part):
    wide = context.cast(builder, part, sig.args[1][0], types.float64)
    return builder.fadd(total, wide)


def _narrow(context, builder, sig, total, like):
    return context.cast(builder, total, types.float64, sig.return_type[0])


plus_each = each(lambda c, builder, s, a, b: add(builder, a, b))
widen_each = each(_widen, types.float64)  # float64 totals, and numbers to add to them
narrow_each = each(_narrow)  # float64 totals in the type of other numbers


def zeros_of(count: int) -> Any:
    """An intrinsic: a tuple of zeros of one type."""

    @intrinsic
    def zeros(typingctx, like):
        def codegen(context, builder, sig, args):
            zero = context.get_constant(like, 0)
            return context.make_tuple(builder, sig.return_type, [zero] * count)

        return types.UniTuple(like, count)(like), codegen

    return zeros


@intrinsic
def weigh(typingctx, factors, slopes):
    """The sum of slopes times their factors; nothing where either is zero, be the other infinite."""

    def codegen(context, builder, sig, args):
        pairs = [cgutils.unpack_tuple(builder, t, len(factors)) for t in args]
        total = None
        for f, d in zip(*pairs, strict=True):
            zero = ir.Constant(f.type, 0)
            before = zero if total is None else total
            if total is None:
                total = builder.fmul(f, d, flags=("nsz",))
            else:
                total = fused(builder, f, d, total)
            none = builder.or_(builder.fcmp_ordered("==", f, zero), builder.fcmp_ordered("==", d, zero))
            total = builder.select(none, before, total)
        return total

    return factors[0](factors, slopes), codegen


def reader(positions: tuple[int, ...]) -> Any:
    """An intrinsic: some numbers of a row's state, as a tuple."""

    @intrinsic
    def read(typingctx, address, pitch, like):
        def codegen(context, builder, sig, args):
            kind = context.get_value_type(like).as_pointer()
            out = []
            for k in positions:
                at = builder.add(args[0], builder.mul(args[1], ir.Constant(args[1].type, k)))
                out.append(builder.load(builder.inttoptr(at, kind)))
            return context.make_tuple(builder, sig.return_type, out)

        return types.UniTuple(like, len(positions))(types.int64, types.int64, like), codegen

    return read


def writer(positions: tuple[int, ...]) -> Any:
    """An intrinsic: store the first numbers of a tuple in a row's state."""

    @intrinsic
    def write(typingctx, address, pitch, values):
        def codegen(context, builder, sig, args):
            for n, k in enumerate(positions):
                at = builder.add(args[0], builder.mul(args[1], ir.Constant(args[1].type, k)))
                x = builder.extract_value(args[2], n)
                builder.store(x, builder.inttoptr(at, x.type.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values), codegen

    return write


def row_reader(integers: tuple[bool, ...], item: int) -> Any:
    """An intrinsic: a row's numbers in the row arrays, of which some are int64."""

    @intrinsic
    def read(typingctx, tile, row, like):
        def codegen(context, builder, sig, args):
            out = []
            for k, integer in enumerate(integers):
                slot = ir.Constant(args[1].type, ARRAYS + ROW_ARRAYS + k)
                base = builder.load(builder.gep(args[0], [slot]))
                offset = builder.mul(args[1], ir.Constant(args[1].type, 8 if integer else item))
                kind = types.int64 if integer else like
                pointer = context.get_value_type(kind).as_pointer()
                x = builder.load(builder.inttoptr(builder.add(base, offset), pointer))
                out.append(context.cast(builder, x, kind, like))
            return context.make_tuple(builder, sig.return_type, out)

        result = types.UniTuple(like, len(integers)) if integers else types.Tuple(())
        return result(tile, types.int64, like), codegen

    return read


def row_writer(chosen: tuple[tuple[int, int], ...], slot: int) -> Any:
    """An intrinsic: store gradients of row arrays; `chosen` has pairs of an array and a place in a tuple."""

    @intrinsic
    def write(typingctx, tile, offset, values):
        def codegen(context, builder, sig, args):
            for k, place in chosen:
                at = builder.gep(args[0], [ir.Constant(args[1].type, slot + k)])
                x = builder.extract_value(args[2], place)
                address = builder.add(builder.load(at), args[1])
                builder.store(x, builder.inttoptr(address, x.type.as_pointer()))
            return context.get_dummy_value()

        return types.void(tile, types.int64, values), codegen

    return write


@intrinsic
def gradients_of(typingctx, slopes, factor):
    """Slopes times a row's factor, and zero where either is, whatever the other."""

    def codegen(context, builder, sig, args):
        zero, out = ir.Constant(args[1].type, 0), []
        none = builder.fcmp_ordered("==", args[1], zero)
        for d in cgutils.unpack_tuple(builder, args[0], len(slopes)):
            flat = builder.or_(none, builder.fcmp_ordered("==", d, zero))
            out.append(builder.select(flat, zero, builder.fmul(d, args[1])))
        return context.make_tuple(builder, sig.return_type, out)

    return slopes(slopes, factor), codegen


@intrinsic
def moderate(typingctx, sums, wide):
    """Whether no sum's size is above `wide`, or below its inverse: then none has lost terms."""

    def codegen(context, builder, sig, args):
        found = ir.Constant(ir.IntType(1), 1)
        for x in cgutils.unpack_tuple(builder, args[0], len(sums)):
            size = builder.select(builder.fcmp_ordered("<", x, ir.Constant(x.type, 0)), builder.fneg(x), x)
            found = builder.and_(found, builder.fcmp_ordered("<=", size, args[1]))
            small = builder.fmul(size, args[1])
            found = builder.and_(found, builder.fcmp_ordered(">=", small, ir.Constant(x.type, 1)))
        return found

    return types.boolean(sums, wide), codegen
