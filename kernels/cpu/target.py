"""Numba's CPU target: compile flags, and the parts that `kernels.jets` installs its rules with."""

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import TypingError
from numba.core.imputils import lower_cast
from numba.core.typing import templates
from numba.extending import intrinsic, models, register_model

from .. import jets, math
from ..compiler import Brief, Linked, Part

if config.DISABLE_JIT:
    raise RuntimeError(
        "numbaloss computes with compiled functions; NUMBA_DISABLE_JIT=1 lets Numba compile none"
    )

# A child that is forked while a thread compiles would wait forever for that thread, which it does not have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


# Nobody calls a helper from Python: without these two flags Numba compiles two more functions for each.
INTERNAL: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
# Scalars keep IEEE semantics but for the sign of zero, so that a line of source has the same bits in every
# kernel: reassociation would cancel the rounding tricks of `kernels.math`, contraction would fuse a product
# and a sum or not by what else uses the product, and `nnan`/`ninf` would delete the handling of NaN and
# infinity. What is to be fused says `multiply_add`; a sum that may be added in another order says `plus`.
FASTMATH = {"nsz"}
PUBLIC: dict[str, Any] = dict(forceinline=True, fastmath=FASTMATH, error_model="numpy")
SCALAR: dict[str, Any] = PUBLIC | INTERNAL | {"pipeline_class": Linked}
# A function of loops.
LOOP: dict[str, Any] = dict(nogil=True, fastmath=FASTMATH, error_model="numpy", pipeline_class=Brief)


@intrinsic
def prefer_widest_vectors(typingctx):
    """Let LLVM use 512-bit vectors in the function that calls this, where the processor has them.

    Its own choice of 256 bits spares old processors a drop in frequency; the losses that compute most gain a
    quarter.
    """

    def codegen(context, builder, sig, args):
        # llvmlite's `add` knows the plain attributes only.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b, which may be added in another order."""
    return builder.fadd(a, b, flags=("reassoc", "contract", "nsz"))


@intrinsic
def plus(typingctx, a, b):
    """a + b, which may be added in another order: that lets a sum vectorise."""
    return a(a, a), lambda context, builder, sig, args: add(builder, *args)


@intrinsic
def plus_product(typingctx, total, a, b):
    """total + a * b, fused where the processor can, which may be added in another order."""

    def codegen(context, builder, sig, args):
        return add(builder, args[0], builder.fmul(*args[1:], flags=("contract", "nsz")))

    return total(total, a, b), codegen


# Sums in lanes: lane k adds up every so many-th number, from the k-th. So a sum's order, and its bits, do not
# depend on the processor's vectors. A loop ``for k in range(lanes): part[k] += ...`` over `new_lanes`,
# within one over the vectors, is kept in registers by LLVM; the functions below keep the rest in vectors.
WIDTH = 256  # bytes of the lanes of a dtype: four vectors of AVX-512, eight of AVX


def _lanes(builder: Any, pointer: Any, count: int) -> Any:
    """The lanes at a pointer, as one vector."""
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, count).as_pointer())


@intrinsic
def interleave(typingctx, function, count, arguments):
    """Call a function with each number below a count, and more arguments: LLVM interleaves four vectors.

    By itself it interleaves loops of sums, and no others: then each vector waits for its own last operation.
    No call may write what another reads. So LLVM need not check at run time which arrays overlap: two that
    are the same would make it go one number at a time.
    """
    kinds = types.intp, *arguments
    called = typingctx.resolve_function_type(function, kinds, {})

    def codegen(context, builder, sig, args):
        call = context.get_function(function, called)
        given = cgutils.unpack_tuple(builder, args[2])
        with cgutils.for_range(builder, args[1]) as loop:
            first = builder.block
            call(builder, [loop.index, *given])
            body = builder.block
        (called_once,) = (i for i in first.instructions if isinstance(i, ir.CallInstr))
        module = builder.module
        four = module.add_metadata(["llvm.loop.interleave.count", ir.IntType(32)(4)])
        about = module.add_metadata([ir.IntType(64)(len(module.metadata)), four])
        about.operands = (about, four)
        body.terminator.set_metadata("llvm.loop", about)
        called_once.set_metadata("llvm.mem.parallel_loop_access", about)
        return context.get_dummy_value()

    return types.void(function, count, arguments), codegen


@intrinsic(prefer_literal=True)
def new_lanes(typingctx, count, like):
    """A pointer to zeros of a number's type, which live until the calling function returns."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    like = types.unliteral(like)

    def codegen(context, builder, sig, args):
        vector = ir.VectorType(context.get_value_type(like), count.literal_value)
        room = cgutils.alloca_once(builder, vector)
        builder.store(ir.Constant(vector, None), room)
        return builder.bitcast(room, context.get_value_type(sig.return_type))

    return types.CPointer(like)(count, like), codegen


def _update(combine: Any) -> Any:
    """Return the code generation of ``f(lanes, source, count)``: combine lanes with numbers at `source`."""

    def codegen(context, builder, sig, args):
        into, source = (_lanes(builder, a, sig.args[2].literal_value) for a in args[:2])
        x = builder.load(source, align=sig.args[1].dtype.bitwidth // 8)
        if sig.args[0] != sig.args[1]:
            x = builder.fpext(x, into.type.pointee)
        builder.store(combine(builder, builder.load(into, align=8), x), into, align=8)
        return context.get_dummy_value()

    return codegen


def _fold(combine: Any) -> Any:
    """Return the code generation of ``f(lanes, count)``: the upper half with the lower, until one is left."""

    def codegen(context, builder, sig, args):
        count = sig.args[1].literal_value
        x = builder.load(_lanes(builder, args[0], count), align=8)
        while count > 1:
            count //= 2
            places = ir.VectorType(ir.IntType(32), count)
            halves = (ir.Constant(places, list(range(k, k + count))) for k in (0, count))
            x = combine(builder, *(builder.shuffle_vector(x, x, half) for half in halves))
        return builder.extract_element(x, ir.IntType(32)(0))

    return codegen


def _sum(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of two; the first where the second is NaN."""
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


@intrinsic(prefer_literal=True)
def add_lanes(typingctx, total, part, count):
    """Add numbers, as many as a literal says, to lanes, which may be of float64."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    return types.void(total, part, count), _update(_sum)


@intrinsic(prefer_literal=True)
def raise_lanes(typingctx, tops, x, count):
    """Raise lanes, as many as a literal says, to the numbers that are larger."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    return types.void(tops, x, count), _update(_larger)


@intrinsic(prefer_literal=True)
def store_lanes(typingctx, into, lanes, count):
    """Store lanes, as many as a literal says, where numbers of another width are."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context, builder, sig, args):
        size = sig.args[2].literal_value
        x, place = builder.load(_lanes(builder, args[1], size), align=8), _lanes(builder, args[0], size)
        if sig.args[0] != sig.args[1]:
            x = builder.fptrunc(x, place.type.pointee)
        builder.store(x, place, align=sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(into, lanes, count), codegen


@intrinsic(prefer_literal=True)
def sum_of_lanes(typingctx, lanes, count):
    """Add up the lanes."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    return lanes.dtype(lanes, count), _fold(_sum)


@intrinsic(prefer_literal=True)
def max_of_lanes(typingctx, lanes, count):
    """Return the largest of the lanes."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    return lanes.dtype(lanes, count), _fold(_larger)


@cache
def derivatives(mixed: bool = False) -> Any:
    """The jets, installed for the CPU when first asked for; those of mixed second derivatives are others."""
    return jets.install(
        SimpleNamespace(
            types=types,
            TypingError=TypingError,
            cgutils=cgutils,
            intrinsic=intrinsic,
            models=models,
            register_model=register_model,
            lower_cast=lower_cast,
            templates=templates,
            function=lambda kind, name: math.CPU[kind].get(name),
            jit=njit(**SCALAR | {"pipeline_class": Part}),
        ),
        mixed,
    )
