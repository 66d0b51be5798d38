"""Every kernel compiles with no GPU, and its code is what a fast kernel's is.

The tests compile a covering set; `pytest -m exhaustive` the whole product.
"""

import itertools
import re

import numpy as np
import pytest
from numba import njit
from sweeps import apart, some, sweep

import numbaloss as nl
from numbaloss import testing
from numbaloss.families import measured
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.kernels import math as nm
from numbaloss.kernels.cuda import arithmetic, copy, elementwise, reduce
from numbaloss.kernels.cuda.target import also_for_cuda, compile, cuda, storage, types
from numbaloss.kernels.spec import BFLOAT16, CODES, FLOAT16, FLOAT32, FLOAT64, Request
from numbaloss.loss import registry

ELEMENTWISE = [name for name, loss in registry.items() if issubclass(loss.Class, ElementwiseLoss)]
KEPT = [name for name in ELEMENTWISE if not apart(registry[name])]
AMPERE, HOPPER = (8, 0), (9, 0)
ALL = (0, 1, 2)

# What a call asks for: the request, whether the terms are summed, and whether the divisor is on the device.
REQUESTS = {
    "value": (Request(), True, False),
    "gradient": (Request(wrt=(0,)), False, False),
    "value and gradient": (Request(wrt=(0,)), True, False),
    "all gradients": (Request(wrt=ALL), True, False),
    "weighted": (Request(weighted=True, wrt=(0,)), True, True),
    "none": (Request(weighted=True, upstream=True, terms=True, wrt=(0,)), False, False),
    "curvature": (Request(wrt=(0,), curvature=True), True, False),
}

# For each loss: what is asked, storage, compute capability, vectors.
COVERING = [
    ("value", FLOAT32, AMPERE, True),
    ("value and gradient", FLOAT32, HOPPER, True),
    ("value and gradient", BFLOAT16, AMPERE, False),
    ("gradient", FLOAT16, HOPPER, True),
    ("all gradients", FLOAT64, AMPERE, True),
    ("weighted", BFLOAT16, HOPPER, True),
    ("none", FLOAT32, AMPERE, True),
    ("curvature", BFLOAT16, HOPPER, True),
]
PRODUCT = list(itertools.product(REQUESTS, CODES.values(), (AMPERE, HOPPER), (True, False)))


def statics(loss):
    """The combinations of options that are compiled in."""
    names = loss.Class._option_names
    found = [
        tuple(o[n] if isinstance(o[n], bool) else None for n in names) for o in testing.combinations(loss)
    ]
    return list(dict.fromkeys(found))


def instructions(binary):
    body = binary.ptx[binary.ptx.index("{") :]
    return re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", body, re.M)


def compiled(name, k, what, code, cc, vectors):
    loss = registry[name]
    request, summed, divided = REQUESTS[what]
    combinations = statics(loss)
    arity = len(loss.Class._arrays)
    scalars = loss.Class._scalars(combinations[k % len(combinations)], arity)
    request = request._replace(wrt=request.wrt[:arity])
    binary = elementwise.compile_kernel(scalars, request, code, cc, summed, divided, vectors)
    return binary, scalars, request


def check(binary, scalars, request, code, vectors):
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF" and f".entry {binary.name}(" in binary.ptx
    # Ten arrays, their size, factor, divisor, options, partial sums, faults.
    number = "f64" if code == FLOAT64 else "f32"
    numbers = (number,) * scalars.options.count(None)
    assert binary.parameters == (*["u64"] * 11, number, "u64", *numbers, "u64", "u64")
    # Nothing in local memory: no array, no stack, no spilled register.
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    if code != FLOAT64:
        assert not [i for i in used if ".f64" in i]
    loads = [i for i in used if i.startswith("ld.global.v")]
    stores = [i for i in used if i.startswith("st.global.v")]
    if vectors:
        in_flight = 8 * reduce.IN_FLIGHT // storage(code).arithmetic.bitwidth // storage(code).width
        arrays = scalars.arity + request.weighted + request.upstream
        outputs = request.terms + len(request.wrt) + request.curvature
        # A gradient may need no more than one operand; a short loop may be unrolled.
        assert len(loads) >= in_flight * (1 if request.wrt and not request.terms else arrays)
        assert len(stores) % (in_flight * max(outputs, 1)) == 0 and bool(stores) == bool(outputs)
        width = ".v2." if code == FLOAT64 else ".v4."
        assert all(width in i for i in loads + stores)
    else:
        assert not loads and not stores
    # Products of indices are 64 bits wide.
    assert not [i for i in used if re.match(r"(mul|mad)\.lo\.[su]32", i)]
    assert binary.registers <= budget(scalars, request, code, vectors)


LOGARITHMS = (
    "arctan_loss",
    "binary_cross_entropy",
    "fair_loss",
    "gaussian_nll_loss",
    "general_robust_loss",
    "log_cosh_loss",
    "poisson_nll_loss",
)


def budget(scalars, request, code, vectors):
    """Registers a thread: 64 keep half of a multiprocessor's threads at work, 96 a third, 128 a quarter.

    What takes more than 64: single elements, with an address each; more arrays than two in and one out;
    logarithms, whose branches keep all lanes' numbers alive; float64, with two registers for each number.
    """
    if scalars.name == "sigmoid_focal_loss":  # three of them
        return 192
    if code == FLOAT64 or scalars.name in LOGARITHMS:
        return 128
    arrays = scalars.arity + request.weighted + request.upstream + len(request.wrt) + request.curvature
    return 96 if arrays > 3 else 64 if vectors else 80


@pytest.mark.parametrize("name", sweep(ELEMENTWISE, *KEPT))
@pytest.mark.parametrize(
    "k", sweep(range(len(COVERING)), 0), ids=lambda k: "-".join(map(str, COVERING[k][:2]))
)
@pytest.mark.thin(6)
def test_covering(name, k):
    what, code, cc, vectors = COVERING[k]
    check(*compiled(name, k, what, code, cc, vectors), code, vectors)


OWN = [
    (elementwise.RATIO, "none"),
    (elementwise.EXCESS, "weighted"),
    (arithmetic.MASKED, "none"),
    (elementwise.SUM, "none"),
    (measured.HINGES[True], "none"),
    (measured.HINGES[True], "all gradients"),
    (measured.HINGES[False], "all gradients"),
]


@pytest.mark.parametrize("code, cc", some([(FLOAT32, HOPPER), (FLOAT32, AMPERE), (FLOAT64, HOPPER)]))
@pytest.mark.parametrize("scalars, what", OWN, ids=lambda x: getattr(x, "name", x))
@pytest.mark.thin(7)
def test_arithmetic_that_losses_are_made_of(scalars, what, code, cc):
    request, summed, divided = REQUESTS[what]
    request = request._replace(wrt=request.wrt[: scalars.arity])
    binary = elementwise.compile_kernel(scalars, request, code, cc, summed, divided, True)
    check(binary, scalars, request, code, True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what, code, cc, vectors", PRODUCT)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_exhaustive(name, what, code, cc, vectors):
    for k in range(len(statics(registry[name]))):
        check(*compiled(name, k, what, code, cc, vectors), code, vectors)


@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.thin(8)
def test_sums(code, cc):
    for vectors in (True, False):
        binary = reduce.compile_sums(code, cc, vectors)
        used = instructions(binary)
        assert binary.local_bytes == 0 and binary.registers <= 64
        assert code == FLOAT64 or not [i for i in used if ".f64" in i]
        assert any(i.startswith("ld.global.v") for i in used) == vectors
    for divided in (True, False):
        binary = reduce.compile_finish(code, cc, divided)
        assert binary.local_bytes == 0
        assert binary.registers <= 65536 // reduce.FINISH_THREADS  # or it could not be launched


@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize(
    "dtype, to, axes",
    [("float32", "bfloat16", 3), ("float64", "float32", 1), ("bool", "float16", 2), ("int32", "int64", 2)],
)
@pytest.mark.thin(8)
def test_copies(dtype, to, axes, cc, bfloat16):
    to = bfloat16 if to == "bfloat16" else np.dtype(to)
    for wide in (False, True):
        binary = copy.compile_copy(np.dtype(dtype), to, axes, wide, cc)
        assert binary.local_bytes == 0 and binary.registers <= 40
        divisions = [i for i in instructions(binary) if re.match(r"(div|rem)\.u64", i)]
        assert wide or len(divisions) <= 1  # the loop's own count


UNARY = (
    nm.exp,
    nm.expm1,
    nm.log,
    nm.log1p,
    nm.sigmoid,
    nm.softplus,
    nm.log_sigmoid,
    nm.tanh,
    nm.sqrt,
    nm.sin,
)
UNARY += (nm.cos, nm.arctan, nm.erf, nm.sign, nm.square, nm.isnan)
UNARY += (nm.erfc, nm.log_ndtr, nm.log1mexp, nm.sinh, nm.cosh, nm.floor, nm.stop_gradient, nm.tan)
UNARY += (nm.arcsin, nm.arccos, nm.arcsinh, nm.arccosh, nm.arctanh)
BINARY = (nm.power, nm.xlogy, nm.maximum, nm.minimum, nm.logaddexp, nm.arctan2)


@pytest.mark.parametrize("f", [*UNARY, *BINARY, nm.where], ids=lambda f: f.__name__)
@pytest.mark.thin(4)
def test_math_in_float32(f):
    def unary(x, y):
        y[0] = f(x[0]) * x[1]

    def binary(x, y):
        y[0] = f(x[0], x[1])

    def where(x, y):
        y[0] = f(x[0] < x[1], x[2], 0)

    kernel = unary if f in UNARY else binary if f in BINARY else where
    pointer = types.CPointer(types.float32)
    used = instructions(compile(kernel, (pointer, pointer), HOPPER, 32))
    # The argument of a large angle is reduced through integers and one float64.
    assert f in (nm.sin, nm.cos, nm.tan) or not [i for i in used if ".f64" in i]


@pytest.mark.parametrize("name", sweep(ELEMENTWISE, *KEPT))
def test_scalar_in_a_kernel_and_in_njit(name):
    loss = registry[name]
    cls = loss.Class
    scalars = cls._scalars((None,) * len(cls._option_names), len(cls._required))
    names = (*cls._required, *cls._option_names)
    defaults = tuple(cls.fields[n].default for n in cls._option_names)
    scalar = also_for_cuda(loss.scalar, elementwise.compile_scalar(scalars, names, defaults))

    def two(x, y):
        y[0] = scalar(x[0], x[1])

    def three(x, y):
        y[0] = scalar(x[0], x[1], x[2])

    pointer = types.CPointer(types.float32)
    kernel = two if len(cls._required) == 2 else three
    binary = compile(kernel, (pointer, pointer), HOPPER, 32)
    assert binary.local_bytes == 0 and not [i for i in instructions(binary) if ".f64" in i]


def test_one_scalar_with_options_serves_both_devices():
    cls = registry["huber_loss"].Class
    scalars = cls._scalars((None,), 2)
    gpu = elementwise.compile_scalar(scalars, ("input", "target", "delta"), (1.0,))
    scalar = also_for_cuda(registry["huber_loss"].scalar, gpu)

    def kernel(x, y):
        i = cuda.threadIdx.x
        y[i] = scalar(x[i], 0, delta=2) + scalar(x[i], x[0], x[1])

    pointer = types.CPointer(types.float32)
    assert compile(kernel, (pointer, pointer), HOPPER, 32).registers

    @njit
    def on_cpu(x):
        return scalar(x, 0.0, delta=2.0)

    assert on_cpu(5.0) == 8.0


def test_a_sum_of_losses_is_one_kernel():
    """Its parts are compiled functions, that the device's compiler takes by what they are of."""
    cls = type(0.5 * nl.MSELoss() + nl.HuberLoss())
    scalars = cls._scalars((None,) * len(cls._option_names), 2)
    request = Request(wrt=(0,))
    binary = elementwise.compile_kernel(scalars, request, FLOAT32, HOPPER, True, False, True)
    check(binary, scalars, request, FLOAT32, True)
    assert "call" not in instructions(binary)


def test_compiling_needs_no_driver_and_leaves_numba_cuda_as_it_was():
    from numba.cuda import dispatcher

    reduce.compile_finish(FLOAT32, HOPPER, False)
    with pytest.raises(Exception, match=r"CUDA|driver|cuda"):
        if not cuda.is_available():
            dispatcher.get_current_device()
        else:
            raise RuntimeError("CUDA is there")
