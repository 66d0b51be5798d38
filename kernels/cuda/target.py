"""numba-cuda for this package: what a kernel is written with, and how it becomes a binary.

No other module touches what numba-cuda does not promise. `compile` needs neither a GPU nor a driver.

A kernel is a plain function at module level. Its arrays are raw pointers, whose elements only a
:class:`Storage` reads and writes: always as numbers of the arithmetic type, float32 for all but float64. What
varies from loss to loss is a global that :func:`as_kernel` binds; what the kernel calls is bound along with
it, and inlined. What a call does not ask for is an argument of type ``none``, and gone when compiled::

    def twice(x):
        return (x + x,)

    def double(x, y, n):
        i = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * array.width
        if i < n:
            doubled = each(twice, (array.load_vectors(x, (i,)),), ())
            array.store_vectors(y, (i,), (True,), doubled[0])

    array = storage(BFLOAT16)
    kernel = as_kernel(double, dict(array=array), "double", BFLOAT16)
    compile(kernel, (array.pointer, array.pointer, types.int64), (9, 0), threads=256).image

Indices are 64-bit: Numba's integer arithmetic is. A literal takes float32 to float64, so a float constant is
``T(0.5)`` with a bound ``T``, or meets only Jets and Consts. Multiply and add contract to one instruction;
nothing else is relaxed but float32 division, which may err by 2 ulp and costs no branch.
"""

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numba_cuda  # noqa: F401  without it `numba.cuda` is another, older one
import numpy as np
from cuda.core import Linker, LinkerOptions, ObjectCode
from llvmlite import ir
from numba import cuda, types
from numba.cuda import cgutils, compiler, dispatcher, models
from numba.cuda import libdevice as libdevice  # for `math`
from numba.cuda.core.errors import RequireLiteralValue, TypingError
from numba.cuda.extending import intrinsic, lower_cast, register_model
from numba.cuda.extending import overload as _overload
from numba.cuda.typing import templates

from .. import jets, math
from ..bind import Helpers, bind, undisturbed
from ..spec import BFLOAT16, FLOAT16, FLOAT64

WARP = 32
EVERY_LANE = 0xFFFFFFFF

I16, I32, I64 = (ir.IntType(n) for n in (16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
SHARED = 3  # NVVM's address space


# ---- compilation --------------------------------------------------------------------------------------

# A device function becomes NVVM IR of no particular capability before its kernel is compiled for one, but
# numba-cuda asks the current device for it.
_offline = threading.local()
_current_device = dispatcher.get_current_device


def _device_or_none() -> Any:
    return getattr(_offline, "device", None) or _current_device()


dispatcher.get_current_device = _device_or_none


@contextmanager
def _without_device():
    _offline.device = SimpleNamespace(compute_capability=(8, 0))
    try:
        yield
    finally:
        _offline.device = None


class Binary(NamedTuple):
    """A compiled kernel."""

    name: str  # of its entry point
    parameters: tuple[str, ...]  # PTX's types of what it is launched with: u64 (a pointer too), f32, f64
    image: bytes  # a cubin
    ptx: str
    registers: int  # a thread
    local_bytes: int  # a thread: its stack, what does not fit into registers included
    shared_bytes: int  # a block


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call, compiled into them."""
    return cuda.jit(device=True, forceinline=True)(function)


def as_kernel(template: Any, scope: Mapping[str, Any], name: str, identity: object) -> Any:
    """A template bound to what varies, in plain Python; what it calls is compiled into it. See `bind`."""
    return as_kernels((template,), scope, name, identity)[0]


def as_kernels(templates: Any, scope: Mapping[str, Any], name: str, identity: object) -> tuple[Any, ...]:
    """Several templates bound to the same."""
    helpers = Helpers(device)
    return tuple(bind(t, scope, name, identity, lambda f: f, helpers) for t in templates)


def compile(
    function: Callable[..., Any],
    signature: tuple[Any, ...],
    cc: tuple[int, int],
    threads: int,
    registers: int | None = None,
) -> Binary:
    """Compile a kernel for a compute capability.

    Parameters
    ----------
    function : function
        Plain Python, as `as_kernel` gives it.
    signature : tuple of Numba types
        Of its arguments. One of type ``none`` is a pointer too, to be passed as null; a tuple is passed as so
        many scalars.
    cc : tuple
        For instance ``(9, 0)``.
    threads : int
        The most threads a block that it is launched with.
    registers : int, optional
        How many a thread may have, if all that it holds fits into them.
    """
    with _without_device(), undisturbed():
        library, _ = compiler._compile_pyfunc_with_fixup(
            function, signature, device=False, abi="numba", cc=cc, launch_bounds=threads
        )
        library._nvvm_options = {**library._nvvm_options, "prec-div": 0}
        ptx = library.get_asm_str(cc=cc)
    # The name without the parts that number the compilations of this process; and not the variables that only
    # Python functions have, one for each function that was inlined.
    name = re.sub(r"\W", "_", function.__qualname__)
    ptx = re.sub(r"^\.common .*\n", "", ptx.replace(library._entry_name, name), flags=re.MULTILINE)
    image, numbers = _link(ptx, cc)
    if registers is not None and numbers["registers"] > registers:
        limited = re.sub(r"^(\.maxntid .*)", rf"\1\n.maxnreg {registers}", ptx, count=1, flags=re.MULTILINE)
        fewer = _link(limited, cc)
        if not fewer[1]["local_bytes"]:
            ptx, (image, numbers) = limited, fewer
    # Functions that were not inlined, such as the power of float64, have parameters too.
    entry = ptx[ptx.index(f".entry {name}(") :]
    parameters = tuple(re.findall(r"^\t\.param \.(\w+)", entry[: entry.index(")")], re.MULTILINE))
    return Binary(name, parameters, image, ptx, **numbers)


def _link(ptx: str, cc: tuple[int, int]) -> tuple[bytes, dict[str, int]]:
    """A cubin, and what ptxas says of it."""
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    image = linker.link("cubin").code
    return image, _numbers(linker.get_info_log())


def _numbers(log: str) -> dict[str, int]:
    """What ptxas says of a kernel."""
    patterns = dict(
        registers=r"Used (\d+) registers",
        local_bytes=r"(\d+) bytes stack frame",
        shared_bytes=r"(\d+) bytes smem",
    )
    found = {name: re.search(pattern, log) for name, pattern in patterns.items()}
    return {name: int(match[1]) if match else 0 for name, match in found.items()}


def also_for_cuda(dispatcher: Any, function: Any) -> Any:
    """A CPU function of which CUDA kernels call another: where numba-cuda keeps its own version of one."""
    dispatcher._CUDATypingContext__dispatcher = function
    return dispatcher


# Teaches kernels a function, by the types of its arguments.
overload = partial(_overload, jit_options={"forceinline": True})


@cache
def derivatives(mixed: bool = False) -> Any:
    """The jets, installed for CUDA when first asked for; those of mixed second derivatives are others."""
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
            function=lambda kind, name: vars(math).get(name) if name != "powers" else None,
            jit=device,
        ),
        mixed,
    )


def floor_of(floored: bool) -> Any:
    """A device function: the last of some numbers, which the curvature is not below; or None."""
    return device(lambda numbers: numbers[-1]) if floored else device(lambda numbers: None)


def options(values: tuple[bool | None, ...]) -> Any:
    """An intrinsic: a tuple of numbers of the arithmetic type as a definition's options.

    An entry of `values` that is None takes the next number; any other is a bool known when the kernel is
    compiled, so that its branches cost nothing.
    """
    const = derivatives().Const

    @intrinsic
    def unpack(typingctx, numbers, like):
        result = types.Tuple([types.boolean if v is not None else const(like) for v in values])

        def codegen(context, builder, sig, args):
            given = iter(cgutils.unpack_tuple(builder, args[0]))
            return context.make_tuple(
                builder,
                sig.return_type,
                [
                    context.get_constant(types.boolean, value)
                    if value is not None
                    else context.cast(builder, next(given), like, const(like))
                    for value in values
                ],
            )

        return result(numbers, like), codegen

    return unpack


# ---- memory -------------------------------------------------------------------------------------------


def numba_type(dtype: np.dtype) -> Any:
    """Numba's type of an integer dtype's numbers in memory; a boolean is a byte there."""
    return types.uint8 if dtype == np.bool_ else getattr(types, dtype.name)


class Storage(ModuleType):
    """How a kernel reads and writes the elements of an array.

    A module, because Numba resolves the attributes of a global one when it compiles: ``array.load(x, i)``.
    A vector starts at an index that is a multiple of the width; the vectors that a thread has in flight are
    loaded by one call. Through a pointer that is None nothing is read, which gives None, or written.
    """

    code: int  # of kernels.spec
    arithmetic: Any  # Numba's type of the numbers
    T: Any  # and NumPy's
    pointer: Any  # Numba's type of the array: a kernel's argument
    width: int  # elements of a vector
    load: Any  # (pointer, index) -> number
    store: Any  # (pointer, index, number)
    load_vectors: Any  # (pointer, indices) -> the numbers of the vectors that start there, in one tuple
    store_vectors: Any  # (pointer, indices, wanted, numbers): each vector if its entry of `wanted` holds

    def __init__(self, **fields: Any) -> None:
        super().__init__("storage")
        self.__dict__.update(fields)


def _pack_halves(instruction: str) -> Any:
    """Two float32 as two halves in 32 bits, the first one lower; PTX names the upper one first."""
    return ir.InlineAsm(ir.FunctionType(I32, [F32, F32]), f"{instruction} $0, $2, $1;", "=r,f,f")


def _from_float16(builder, word, upper):
    bits = builder.trunc(builder.lshr(word, I32(16)) if upper else word, I16)
    return builder.fpext(builder.bitcast(bits, F16), F32)


def _from_bfloat16(builder, word, upper):
    bits = builder.and_(word, I32(0xFFFF0000)) if upper else builder.shl(word, I32(16))
    return builder.bitcast(bits, F32)


# By storage: how the number in the lower or upper half of a word is read, and how two are packed.
_HALVES = {
    FLOAT16: (_from_float16, _pack_halves("cvt.rn.f16x2.f32")),
    BFLOAT16: (_from_bfloat16, _pack_halves("cvt.rn.bf16x2.f32")),
}


@cache
def storage(code: int, vectors: bool = True) -> Storage:
    """The access to arrays of one dtype.

    Without `vectors` the width is 1 and any address will do; with them, an array starts at a multiple of 16
    bytes and a vector is 16 bytes.
    """
    arithmetic = types.float64 if code == FLOAT64 else types.float32
    number = F64 if code == FLOAT64 else F32
    pointer = types.CPointer(types.uint16 if code in _HALVES else arithmetic)
    width = (16 // (arithmetic.bitwidth // 8) if code not in _HALVES else 8) if vectors else 1

    def address(context, builder, sig, args, kind):
        index = context.cast(builder, args[1], sig.args[1], types.int64)
        return builder.bitcast(builder.gep(args[0], [index]), kind.as_pointer())

    def read(context, builder, sig, args):
        """One number."""
        if code not in _HALVES:
            return builder.load(address(context, builder, sig, args, number))
        bits = builder.load(address(context, builder, sig, args, I16))
        return _HALVES[code][0](builder, builder.zext(bits, I32), False)

    def write(context, builder, sig, args):
        if code not in _HALVES:
            return builder.store(args[2], address(context, builder, sig, args, number))
        word = builder.call(_HALVES[code][1], [args[2], F32(0)])
        return builder.store(builder.trunc(word, I16), address(context, builder, sig, args, I16))

    # A vector of halves is read as words: as so many halves it would be read one by one.
    words = ir.VectorType(I32, 4) if code in _HALVES else ir.VectorType(number, width)

    def read_vector(context, builder, sig, args):
        """A list of numbers."""
        if width == 1:
            return [read(context, builder, sig, args)]
        vector = builder.load(address(context, builder, sig, args, words), align=16)
        values = [builder.extract_element(vector, I32(k)) for k in range(words.count)]
        if code in _HALVES:
            half = _HALVES[code][0]
            values = [half(builder, word, upper) for word in values for upper in (False, True)]
        return values

    def write_vector(context, builder, sig, args):
        values = args[2]
        if width == 1:
            return write(context, builder, sig, [*args[:2], values[0]])
        if code in _HALVES:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [builder.call(_HALVES[code][1], two) for two in pairs]
        vector = ir.Constant(words, ir.Undefined)
        for k, x in enumerate(values):
            vector = builder.insert_element(vector, x, I32(k))
        return builder.store(vector, address(context, builder, sig, args, words), align=16)

    absent = types.NoneType
    numbers = partial(types.UniTuple, arithmetic)

    def dummy(context, builder, sig, args):
        return context.get_dummy_value()

    def wants(p, x=None, kind=None):
        if not isinstance(p, absent) and (p != pointer or x != kind):
            raise TypingError(f"storage {code}: {kind or arithmetic} at {pointer}, got {x} at {p}")

    @intrinsic
    def load(typingctx, p, i):
        wants(p)
        return (types.none(p, i), dummy) if isinstance(p, absent) else (arithmetic(p, i), read)

    @intrinsic
    def store(typingctx, p, i, x):
        wants(p, x, arithmetic)

        def codegen(context, builder, sig, args):
            write(context, builder, sig, args)
            return context.get_dummy_value()

        return types.void(p, i, x), dummy if isinstance(p, absent) else codegen

    @intrinsic
    def load_vectors(typingctx, p, indices):
        def codegen(context, builder, sig, args):
            values = []
            for k, i in enumerate(cgutils.unpack_tuple(builder, args[1])):
                values += read_vector(context, builder, types.void(p, indices[k]), [args[0], i])
            return context.make_tuple(builder, sig.return_type, values)

        wants(p)
        if isinstance(p, absent):
            return types.none(p, indices), dummy
        return numbers(width * len(indices))(p, indices), codegen

    @intrinsic
    def store_vectors(typingctx, p, indices, wanted, xs):
        wants(p, xs, numbers(width * len(indices)))

        def codegen(context, builder, sig, args):
            values = cgutils.unpack_tuple(builder, args[3])
            conditions = cgutils.unpack_tuple(builder, args[2])
            for k, i in enumerate(cgutils.unpack_tuple(builder, args[1])):
                with builder.if_then(context.cast(builder, conditions[k], wanted[k], types.boolean)):
                    vector = values[k * width : (k + 1) * width]
                    write_vector(context, builder, types.void(p, indices[k]), [args[0], i, vector])
            return context.get_dummy_value()

        return types.void(p, indices, wanted, xs), dummy if isinstance(p, absent) else codegen

    return Storage(
        code=code,
        arithmetic=arithmetic,
        T=np.float64 if code == FLOAT64 else np.float32,
        pointer=pointer,
        width=width,
        load=load,
        store=store,
        load_vectors=load_vectors,
        store_vectors=store_vectors,
    )


@intrinsic
def shared(typingctx, count, like):
    """A pointer to memory of the block's own for `count` (a literal) numbers of the type of `like`.

    Every call of the function that says so gets the same memory, uninitialised.
    """

    def codegen(context, builder, sig, args):
        kind = ir.ArrayType(context.get_data_type(like), count.literal_value)
        memory = cgutils.add_global_variable(builder.module, kind, "shared", addrspace=SHARED)
        memory.linkage = "internal"
        memory.align = 16
        memory.initializer = ir.Constant(kind, ir.Undefined)
        return builder.addrspacecast(builder.gep(memory, [I32(0), I32(0)]), kind.element.as_pointer())

    if not isinstance(count, types.IntegerLiteral):
        raise RequireLiteralValue("shared: count must be a literal")
    # The literal stays in the signature: by that numba-cuda remembers what it has generated.
    return types.CPointer(like)(count, like), codegen


@intrinsic
def atomic_max(typingctx, p, i, x):
    """Raise an int64 in memory to `x`, whichever thread comes first."""

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[2], sig.args[2], types.int64)
        index = context.cast(builder, args[1], sig.args[1], types.int64)
        builder.atomic_rmw("max", builder.gep(args[0], [index]), value, "monotonic")
        return context.get_dummy_value()

    return types.void(p, i, x), codegen


# A fault is one int64, so that an atomic maximum keeps the one at the smallest position, whichever thread
# comes first; 0 is none. What was wrong there has 21 bits, and saturates.
FAULT_BITS = 21
FAULT_MOST = (1 << (FAULT_BITS - 1)) - 1
FAULT_POSITIONS = 1 << (62 - FAULT_BITS)


@device
def record(faults, position, what):
    """Keep in ``faults[0]`` that at a position something was wrong: a class index, say."""
    what = min(max(what, -FAULT_MOST), FAULT_MOST) + FAULT_MOST + 1
    atomic_max(faults, 0, ((FAULT_POSITIONS - position) << FAULT_BITS) | what)


def recorded(fault: int) -> tuple[int, int] | None:
    """The position and the number given to :func:`record`, from what ``faults[0]`` holds."""
    if not fault:
        return None
    return FAULT_POSITIONS - (fault >> FAULT_BITS), (fault & (1 << FAULT_BITS) - 1) - FAULT_MOST - 1


# ---- vectors in registers -----------------------------------------------------------------------------


@intrinsic
def each(typingctx, function, vectors, common):
    """Call `function` on each lane of some vectors.

    Parameters
    ----------
    function : device function
        ``function(*one number of each vector, *common)`` gives a tuple.
    vectors : tuple
        Of tuples of one length; an entry may be None, and then is for every lane.
    common : tuple

    Returns
    -------
    tuple
        For each entry of the function's result the tuple of all lanes' (None where it is None). The calls are
        unrolled: all stays in registers.
    """
    given = [None if isinstance(v, types.NoneType) else v for v in vectors]
    width = next(v.count for v in given if v is not None)
    arguments = [types.none if v is None else v.dtype for v in given]
    called = function.get_call_type(typingctx, (*arguments, *common), {})
    outputs = [types.none if isinstance(t, types.NoneType) else t for t in called.return_type]
    result = types.Tuple([t if t == types.none else types.UniTuple(t, width) for t in outputs])

    def codegen(context, builder, sig, args):
        call = context.get_function(function, called)
        context.add_linking_libs(getattr(call, "libs", ()))
        packed = cgutils.unpack_tuple(builder, args[1])
        shared = cgutils.unpack_tuple(builder, args[2])
        lanes = []
        for k in range(width):
            lane = [
                context.get_dummy_value() if v is None else builder.extract_value(x, k)
                for v, x in zip(given, packed, strict=True)
            ]
            lanes.append(cgutils.unpack_tuple(builder, call(builder, [*lane, *shared])))
        return context.make_tuple(
            builder,
            sig.return_type,
            [
                context.get_dummy_value()
                if t == types.none
                else context.make_tuple(builder, types.UniTuple(t, width), [lane[j] for lane in lanes])
                for j, t in enumerate(outputs)
            ],
        )

    return result(function, vectors, common), codegen


@intrinsic
def tree_sum(typingctx, xs):
    """The sum of a tuple's numbers, by halves: ((a + b) + (c + d))."""

    def codegen(context, builder, sig, args):
        values = cgutils.unpack_tuple(builder, args[0])
        while len(values) > 1:
            odd = values[len(values) & ~1 :]
            values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + odd
        return values[0]

    return xs.dtype(xs), codegen


@intrinsic
def select(typingctx, condition, a, b):
    """`a` where the condition holds, else `b`, without a branch."""
    return a(types.boolean, a, a), lambda c, builder, s, args: builder.select(*args)


@intrinsic
def polynomial(typingctx, x, coefficients):
    """Horner's scheme, lowest coefficient first."""

    def codegen(context, builder, sig, args):
        terms = cgutils.unpack_tuple(builder, args[1])
        y = terms.pop()
        for c in reversed(terms):
            y = builder.fadd(builder.fmul(y, args[0]), c)
        return y

    return x(x, coefficients), codegen


@intrinsic
def reciprocal(typingctx, x):
    """1 / x for an x of ordinary size; in float32 one instruction, within 1 ulp."""

    def codegen(context, builder, sig, args):
        if x == types.float64:
            return builder.fdiv(F64(1), args[0])
        approximate = ir.InlineAsm(ir.FunctionType(F32, [F32]), "rcp.approx.ftz.f32 $0, $1;", "=f,f")
        return builder.call(approximate, args)

    return x(x), codegen


@intrinsic
def power_of_two(typingctx, x):
    """A power of two that scales a magnitude to about 1; 1 for infinity and NaN."""
    mantissa, top = (23, 255) if x == types.float32 else (52, 2047)

    def codegen(context, builder, sig, args):
        kind = I32 if x == types.float32 else I64
        field = builder.lshr(builder.bitcast(args[0], kind), kind(mantissa))
        field = builder.select(builder.icmp_signed("<", field, kind(1)), kind(1), field)
        e = builder.sub(kind(top - 1), field)
        e = builder.select(builder.icmp_signed("<", e, kind(1)), kind(1), e)
        e = builder.select(builder.icmp_signed("==", field, kind(top)), kind(top // 2), e)
        return builder.bitcast(builder.shl(e, kind(mantissa)), context.get_value_type(x))

    return x(x), codegen


# ---- places in an array -------------------------------------------------------------------------------


@intrinsic
def unravel(typingctx, i, shape):
    """The coordinates of the `i`-th element, in C order, of an array of a shape (a tuple).

    An int32 `i` is divided as such, which takes a fifth of the time.
    """

    def codegen(context, builder, sig, args):
        kind = context.get_value_type(i)
        rest, coordinates = args[0], []
        for extent in reversed(cgutils.unpack_tuple(builder, args[1])[1:]):
            extent = builder.trunc(extent, kind) if kind != I64 else extent
            coordinates.append(builder.urem(rest, extent))
            rest = builder.udiv(rest, extent)
        coordinates = [builder.zext(c, I64) if kind != I64 else c for c in (*coordinates, rest)]
        return context.make_tuple(builder, sig.return_type, coordinates[::-1])

    return types.UniTuple(types.int64, len(shape))(i, shape), codegen


@intrinsic
def dot(typingctx, xs, ys):
    """The sum of the products of two tuples of integers."""

    def codegen(context, builder, sig, args):
        pairs = zip(*(cgutils.unpack_tuple(builder, a) for a in args), strict=True)
        total = I64(0)
        for x, y in pairs:
            total = builder.add(total, builder.mul(x, y))
        return total

    return types.int64(xs, ys), codegen
