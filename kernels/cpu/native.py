"""Compiled code that takes Python's arrays as they are, and calls compiled functions by address.

Numba unboxes each array that a compiled function takes, and compiles the function again for each dtype, rank
and layout. The drivers take one tuple of arrays as an object (`held`), read themselves where each lies, and
are compiled once for all losses and dtypes. A loss's block is a C function that they call by its address.

Only the section `objects` knows how CPython's tuples and NumPy's arrays lie in memory: NumPy's ABI.
"""

import uuid
from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.compiler import CompileResult
from numba.core.datamodel import models
from numba.extending import NativeValue, intrinsic, register_model, unbox

from ..bind import bind, sources
from ..compiler import Linked
from .disk import kept, kept_c
from .target import INTERNAL, LOOP, SCALAR

HELPER = SCALAR

I64, F64 = ir.IntType(64), ir.DoubleType()


class Held(types.Type):
    """A Python object that the caller keeps alive, by its address."""

    def __init__(self) -> None:
        super().__init__(name="Held")


held = Held()


@register_model(Held)
class HeldModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I64)


@unbox(Held)
def unbox_held(kind: Any, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.builder.ptrtoint(obj, I64))


# ---- memory ----------------------------------------------------------------------------------------------


@intrinsic
def at_address(typingctx, address, like):
    """A pointer to elements of the type of `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(types.int64, like), codegen


@intrinsic
def store(typingctx, address, x):
    """Store a number at an address. (Numba drops a store through a pointer that a ``prange`` made.)"""

    def codegen(context, builder, sig, args):
        kind = context.get_data_type(sig.args[1]).as_pointer()
        data = context.get_value_as_data(builder, sig.args[1], args[1])
        builder.store(data, builder.inttoptr(args[0], kind))
        return context.get_dummy_value()

    return types.void(types.int64, x), codegen


@intrinsic
def store_all(typingctx, address, numbers):
    """Store a tuple of integers from an address on, as int64: much quicker to compile than one by one."""
    if not isinstance(numbers, types.BaseTuple):
        return None

    def codegen(context, builder, sig, args):
        for k, kind in enumerate(sig.args[1]):
            x = context.cast(builder, builder.extract_value(args[1], k), kind, types.int64)
            at = builder.add(args[0], ir.Constant(I64, 8 * k))
            builder.store(x, builder.inttoptr(at, I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, numbers), codegen


@intrinsic
def fill(typingctx, address, x, count):
    """Store a number `count` times from an address on: a loop that Numba's front end does not see."""

    def codegen(context, builder, sig, args):
        data = context.get_value_as_data(builder, sig.args[1], args[1])
        start = builder.inttoptr(args[0], data.type.as_pointer())
        with cgutils.for_range(builder, args[2]) as loop:
            builder.store(data, builder.gep(start, [loop.index]))
        return context.get_dummy_value()

    return types.void(types.int64, x, types.int64), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx, size):
    """The address of `size` bytes, a literal, that live until the calling function returns."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    words = ir.Constant(I64, (size.literal_value + 7) // 8)

    def codegen(context, builder, sig, args):
        room = cgutils.alloca_once(builder, I64, size=words)
        return builder.ptrtoint(room, I64)

    return types.int64(size), codegen


@intrinsic
def allocate(typingctx, size):
    """The address of at least `size` bytes from malloc; 0 where there is no memory, which callers look at.

    They ask for all that a call takes before it writes anything: one that fails has spoiled no argument.
    """

    def codegen(context, builder, sig, args):
        malloc = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, [I64]), "malloc")
        return builder.call(malloc, [builder.add(args[0], I64(1))])  # of no bytes it may give 0, too

    return types.int64(types.int64), codegen


@intrinsic
def release(typingctx, address):
    """Give memory back to malloc."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "free"), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def smaller(typingctx, a, b):
    """The smaller integer. (Numba compiles a function for ``min``.)"""

    def codegen(context, builder, sig, args):
        return builder.select(builder.icmp_signed("<", *args), *args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger integer."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def quotient(typingctx, a, b):
    """The whole part of a quotient of two integers; neither is negative, and the second is not 0.

    Numba's ``//`` is right for all, in fifty instructions.
    """

    def codegen(context, builder, sig, args):
        return builder.sdiv(*args)

    return types.int64(types.int64, types.int64), codegen


# ---- memory that threads share -----------------------------------------------------------------------------


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def load_atomic(typingctx, address):
    """The int64 at an address, in one order with the operations below, for all threads."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_atomic(typingctx, address, x):
    """Store an int64."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], _word(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add_atomic(typingctx, address, x):
    """Add to an int64; gives what was there."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange_atomic(typingctx, address, x):
    """Store an int64; gives what was there."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("xchg", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Let the core do other work for a moment: for loops that wait."""

    def codegen(context, builder, sig, args):
        machine = llvm.get_process_triple().split("-")[0]
        number = ir.IntType(32)
        if machine in ("x86_64", "i686", "amd64"):
            name, kinds, given = "llvm.x86.sse2.pause", [], []
        elif machine in ("aarch64", "arm64"):
            name, kinds, given = "llvm.aarch64.hint", [number], [number(1)]
        else:
            return context.get_dummy_value()
        kind = ir.FunctionType(ir.VoidType(), kinds)
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), codegen


# ---- objects ---------------------------------------------------------------------------------------------

HEAD = object.__basicsize__
ITEMS = tuple.__basicsize__  # before a tuple's items
# Of NumPy's array object; a base and a dtype lie before the flags.
DATA, RANK, SHAPE, STRIDES, ARRAY_FLAGS = HEAD, HEAD + 8, HEAD + 16, HEAD + 24, HEAD + 48


def _reader(offset: int, bits: int = 64) -> Any:
    """An intrinsic: the integer at an offset of an object's memory."""

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            at = builder.add(args[0], ir.Constant(I64, offset))
            x = builder.load(builder.inttoptr(at, ir.IntType(bits).as_pointer()))
            return x if bits == 64 else builder.sext(x, I64)

        return types.int64(address), codegen

    return read


data_of = _reader(DATA)  # the address of an array's first element
rank_of = _reader(RANK, 32)
shape_of = _reader(SHAPE)  # the address of `rank_of` extents
strides_of = _reader(STRIDES)  # the address of as many strides in bytes
flags_of = _reader(ARRAY_FLAGS, 32)  # bit 0: contiguous in C order


@intrinsic
def items_of(typingctx, objects):
    """The address of a tuple's objects' addresses; the tuple is held, or an address."""

    def codegen(context, builder, sig, args):
        return builder.add(args[0], ir.Constant(I64, ITEMS))

    return types.int64(objects), codegen


@intrinsic
def item(typingctx, objects, k):
    """The address of a tuple's k-th object; the tuple is held, or an address."""

    def codegen(context, builder, sig, args):
        at = builder.add(args[0], ir.Constant(I64, ITEMS))
        at = builder.add(at, builder.mul(args[1], ir.Constant(I64, 8)))
        return builder.load(builder.inttoptr(at, I64.as_pointer()))

    return types.int64(objects, types.int64), codegen


DESCRIPTION = 104  # bytes that `describe` takes


@njit(**HELPER)
def describe(memory, data, shape, itemsize):
    """Lay out what drivers read of a C-contiguous array's object, of at most three axes; its address."""
    store(memory, data)
    store(memory + 8, len(shape))
    store(memory + 16, memory + 56)
    store(memory + 24, memory + 80)
    store(memory + 48, 1)  # flags
    step = itemsize
    for k in range(len(shape) - 1, -1, -1):
        store(memory + 56 + 8 * k, shape[k])
        store(memory + 80 + 8 * k, step)
        step *= shape[k]
    return memory - HEAD


@njit(**HELPER)
def tuple_at(addresses):
    """Addresses of objects in memory, as `item` reads them."""
    return addresses - ITEMS


# ---- calls by address ------------------------------------------------------------------------------------


def caller(result: Any, count: int) -> Any:
    """An intrinsic: call the C function at an address with `count` int64; `result` is its type.

    ``call(function, (a, b, ...))``.
    """

    @intrinsic
    def call(typingctx, function, arguments):
        def codegen(context, builder, sig, args):
            kind = ir.FunctionType(context.get_value_type(result), [I64] * count).as_pointer()
            values = cgutils.unpack_tuple(builder, args[1], count)
            return builder.call(builder.inttoptr(args[0], kind), values)

        return result(types.int64, types.UniTuple(types.int64, count)), codegen

    return call


# What was compiled stays where it is for as long as the process lives: addresses of it are in use.
_kept: list[Any] = []


def compile_function(
    template: Callable[..., Any],
    scope: dict[str, Any],
    name: str,
    identity: object,
    signature: Any,
    **flags: Any,
) -> int:
    """The address of a C function, which is kept on disk."""
    made = bind(template, scope, name, identity, kept_c(signature, **LOOP | flags))
    _kept.append(made)
    return made.address


def compile_entry(
    template: Callable[..., Any],
    scope: dict[str, Any],
    name: str,
    identity: object,
    signature: Any,
    **flags: Any,
) -> Any:
    """A function to call from Python, past Numba's dispatcher; it is kept on disk."""
    made = bind(template, scope, name, identity, kept(signature, no_cfunc_wrapper=True, **LOOP | flags))
    _kept.append(made)
    return made.overloads[signature.args].entry_point


# Of functions that are a part of those that call them.
LINKED: dict[str, Any] = LOOP | INTERNAL | {"pipeline_class": Linked}


# ---- C functions of compiled code that others write --------------------------------------------------------


class Needed:
    """C functions that compiled code calls by the names of symbols; no name for one that is not needed.

    Numba keeps this with the code, on the disk too, and calls it before it links code from there.
    """

    def __init__(self, names: tuple[str, ...], make: Callable[..., tuple[int, ...]], arguments: Any) -> None:
        self.names, self.make, self.arguments = names, make, arguments

    def __call__(self) -> None:
        for name, address in zip(self.names, self.make(*self.arguments), strict=True):
            if name:
                llvm.add_symbol(name, address)

    def __reduce__(self) -> Any:
        return recall, (sources(), self.names, self.make, self.arguments)


def recall(version: str, *needed: Any) -> Needed:
    """Return what code needs that was kept on disk."""
    if version != sources():
        # Numba takes this for a file that is gone, and compiles the code anew.
        raise FileNotFoundError("the code was compiled with other kernels")
    return Needed(*needed)


def keep_needed() -> None:
    """Let Numba keep what code needs also with C functions, and with code that links some from the disk."""
    reduce, rebuild = CompileResult._reduce, CompileResult._rebuild.__func__

    def reduce_with_needed(self):
        needed = dict.fromkeys([*self.reload_init, *self.library._reload_init])
        return reduce(self._replace(reload_init=list(needed)))

    def rebuild_with_needed(cls, *parts):
        result = rebuild(cls, *parts)
        result.library._reload_init.update(result.reload_init)
        return result

    CompileResult._reduce, CompileResult._rebuild = reduce_with_needed, classmethod(rebuild_with_needed)


keep_needed()


def addresses(make: Callable[..., tuple[int, ...]], *arguments: Any) -> Any:
    """An intrinsic ``address(k)``: the k-th of some C functions' addresses, for code that is kept on disk.

    ``make(*arguments)`` gives them, compiled as `compile_function` does, when code that asks for them is; 0
    stands for one that is not needed. All of it can be pickled.
    """
    needed: list[Needed] = []

    @intrinsic
    def address(typingctx, k):
        if not needed:
            key = uuid.uuid4().hex
            names = (f"numbaloss_{key}_{i}" if at else "" for i, at in enumerate(make(*arguments)))
            needed.append(Needed(tuple(names), make, arguments))
            needed[0]()

        def codegen(context, builder, sig, args):
            context.active_code_library._reload_init.add(needed[0])
            found, kind = ir.Constant(I64, 0), ir.FunctionType(ir.VoidType(), ())
            for i, name in enumerate(needed[0].names):
                if not name:
                    continue
                at = builder.ptrtoint(cgutils.get_or_insert_function(builder.module, kind, name), I64)
                found = builder.select(builder.icmp_signed("==", args[0], I64(i)), at, found)
            return found

        return types.int64(types.int64), codegen

    return address


# Bound by `compile_drive`.
drive: Any = None


def drive_inside(recipe, numbers, arrays, task, result):
    """Drive a call on this thread; its value goes into memory."""
    value, status = drive(recipe, numbers, arrays, task, 0)
    at_address(result, 0.0)[0] = value
    return status


def compile_drive(template: Callable[..., Any]) -> int:
    """The address of a driver as compiled code calls it: `drive_inside`."""
    name = template.__name__
    scope = dict(drive=bind(template, {}, name, name, njit(**LINKED)))
    return compile_function(drive_inside, scope, name, template.__module__, types.int64(*[types.int64] * 5))


call_drive = caller(types.int64, 5)

NO_MEMORY = -3  # a driver's status: nothing was written


@njit(**HELPER)
def run_drive(function, recipe, numbers, arrays, task):
    """The value and the status of a call, by the address that `compile_drive` gives."""
    if function == 0:
        raise RuntimeError("kernels of numbaloss that compiled code calls are not in memory")
    result = stack(8)
    store(result, 0.0)
    status = call_drive(function, (recipe, numbers, arrays, task, result))
    if status == NO_MEMORY:
        raise MemoryError("numbaloss: no memory for what a call takes beside its arrays")
    return at_address(result, 0.0)[0], status
