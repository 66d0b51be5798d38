"""Class scores that are a matrix product, inside the caller's own compiled code."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from ..bind import bind
from ..chunks import chunk_rows, product_columns
from ..freeze import fingerprint
from ..spec import ScoreFunctions, ScoreOption
from . import scores
from .disk import kept
from .inside import apart
from .inside_arrays import (
    PART,
    ZERO,
    checks_of,
    divisor_of,
    entry,
    flat,
    gradient,
    is_float,
    is_label,
    link,
    may_write,
    one_a_row,
    outputs_for,
    same_shape,
    weight_fits,
)
from .inside_scores import OF_BLOCKS, given_in
from .labels import first_wrong
from .native import HELPER, addresses, at_address, caller, compile_function, stack, store, store_all

pair = outputs_for(2)


@njit(**PART)
def one():
    """How many share a kernel's work; a literal would have it compiled for that."""
    return np.int64(1)


# Bound by `compile_linear`.
whole: Any = None
add: Any = None
rows_of_chunk: Any = None
columns_of_product: Any = None


def linear_fits(target, x, w, options):
    """Whether there is one label for each row of the input, and the features are as many as the weight's."""


@overload(linear_fits)
def linear_fits_scores(target, x, w, options):
    if find_spec("scipy") is None:
        raise TypingError("matrix products in compiled code need SciPy: pip install scipy")
    for a, name in ((x, "input"), (w, "linear_weight")):
        if not is_float(a) or a.dtype != x.dtype:
            raise TypingError(f"{name} must be an array of float32 or float64, of the input's dtype, got {a}")
    if x.ndim not in (1, 2) or w.ndim != 2:
        raise TypingError(
            f"in compiled code input has shape (F) or (N, F) and linear_weight (C, F), got {x} and {w}"
        )
    if not is_label(target):
        raise TypingError(f"in compiled code target must hold class indices, got {target}")
    if not isinstance(options, types.NoneType):
        raise TypingError(f"options must be None in compiled code, got {options}")
    last = x.ndim - 1
    return lambda target, x, w, options: one_a_row(target, x) and x.shape[last] == w.shape[1]


def ignored(index):
    """The class index that counts nothing."""


@overload(ignored)
def ignored_index(index):
    if isinstance(index, types.NoneType):
        return lambda index: np.int64(-100)
    return lambda index: np.int64(index)


def add_product(g, x, into, pieces, products):
    """Add ``g.T @ x``, made of some columns at a time in memory that stays in cache."""
    rows, features = x.shape
    step = products.size // features
    for start in range(0, into.shape[0], step):
        stop = min(start + step, into.shape[0])
        piece = pieces[: rows * (stop - start)].reshape(rows, stop - start)
        for i in range(rows):  # a slice takes seconds to compile
            for c in range(start, stop):
                piece[i, c - start] = g[i, c]
        product = products[: features * (stop - start)].reshape(stop - start, features)
        np.dot(piece.T, x, product)
        for c in range(start, stop):
            for k in range(features):
                into[c, k] += product[c - start, k]


def linear_rows(x, w, bias, labels, weight, gx, gw, settings):
    """Value and gradients over chunks of the rows that count; of others the input is not read.

    The gradients are empty where they are not wanted. Either may lie over what it is the gradient of.
    """
    ignore, divisor, smoothing, cap, square = settings
    features, classes = x.shape[1], w.shape[0]
    none = np.empty(0, x.dtype)
    wrong = first_wrong(labels.ctypes.data, labels.size, 0, classes, ignore)
    if wrong >= 0:
        return 0.0, wrong
    count, all_count = 0.0, smoothing != 0 or square != 0 or weight.size == 0
    live, dead = np.empty(labels.size, np.int64), np.empty(labels.size, np.int64)
    rows = 0
    for i in range(labels.size):
        label = labels[i]
        own = 0.0
        if label != ignore:
            own = float(weight[label]) if weight.size else 1.0
        count += own
        if label != ignore and (all_count or own != 0):
            live[rows] = i
            rows += 1
        else:
            dead[i - rows] = i
    if divisor != divisor:
        divisor = count
    gathers = rows < labels.size
    height, scratch = rows_of_chunk(rows, classes * x.itemsize)
    scores = np.empty(height * classes, x.dtype)
    chosen = np.empty((height if gathers else 0, features), x.dtype)
    sum_ = gw if apart(gw.reshape(gw.size), w.reshape(w.size)) else np.empty_like(gw)
    step = columns_of_product(classes, features * x.itemsize, scratch)
    adds = gw.size and rows > height
    pieces, products = np.empty(height * step * adds, x.dtype), np.empty(step * features * adds, x.dtype)
    if gathers and gx.size:
        for i in range(labels.size - rows):
            for k in range(features):
                gx[dead[i], k] = 0
    if rows == 0:
        for k in range(sum_.size):
            sum_.reshape(sum_.size)[k] = 0
    total = 0.0
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        part, own = x[start:stop], labels[start:stop]
        if gathers:
            part, own = chosen[: stop - start], np.empty(stop - start, np.int64)
            for i in range(stop - start):
                own[i] = labels[live[start + i]]
            for i in range(stop - start):
                for k in range(features):
                    part[i, k] = x[live[start + i], k]
        flat_scores = scores[: (stop - start) * classes]
        g = flat_scores.reshape(stop - start, classes)
        np.dot(part, w.T, g)
        if bias.size:
            for i in range(stop - start):
                for c in range(classes):
                    g[i, c] += bias[c]
        value, _ = whole(
            flat_scores,
            own,
            flat_scores if gx.size or gw.size else none,
            weight,
            (stop - start, classes, one()),
            (one() - 1, ignore),
            (1.0, 1 / divisor, smoothing, cap, square),
        )
        total += value
        if gw.size and start == 0:
            np.dot(g.T, part, sum_)
        elif gw.size:
            add(g, part, sum_, pieces, products)
        if gx.size and gathers:
            np.dot(g, w, part)
            for i in range(stop - start):
                for k in range(features):
                    gx[live[start + i], k] = part[i, k]
        elif gx.size:
            np.dot(g, w, gx[start:stop])
    for k in range(gw.size):
        gw.reshape(gw.size)[k] = sum_.reshape(gw.size)[k]
    return total / divisor, -1


# Bound by `compile_linear_rows`.
T: Any = np.float32
run: Any = None
function_address: Any = None


def linear_at(call, numbers, result):
    """`linear_rows` as a C function, of what `linear_inside` stores; the value goes into memory."""
    c, n = at_address(call, 0), at_address(numbers, 0.0)
    rows, features, classes, ignore = c[0], c[1], c[2], c[3]
    value, status = run(
        carray(at_address(c[4], T(0)), (rows, features)),
        carray(at_address(c[5], T(0)), (classes, features)),
        carray(at_address(c[6], T(0)), (c[11],)),
        carray(at_address(c[7], 0), (rows,)),
        carray(at_address(c[8], T(0)), (c[12],)),
        carray(at_address(c[9], T(0)), (c[13], features)),
        carray(at_address(c[10], T(0)), (c[14], features)),
        (ignore, n[0], n[1], n[2], n[3]),
    )
    at_address(result, 0.0)[0] = value
    return status


def linear_inside(x, w, bias, labels, weight, gx, gw, settings):
    """The value and the status of contiguous arrays; see `linear_rows`."""
    ignore, divisor, smoothing, cap, square = settings
    call, numbers, result = stack(8 * 15), stack(8 * 4), stack(8)
    store_all(call, (labels.size, x.shape[1], w.shape[0], ignore))
    store_all(call + 32, (x.ctypes.data, w.ctypes.data, bias.ctypes.data, labels.ctypes.data))
    store_all(call + 64, (weight.ctypes.data, gx.ctypes.data, gw.ctypes.data, bias.size, weight.size))
    store_all(call + 104, (gx.shape[0], gw.shape[0]))
    given = divisor, smoothing, cap, square
    for k in range(len(given)):
        store(numbers + 8 * k, given[k])
    store(result, 0.0)
    status = call_linear(function_address(0), (call, numbers, result))
    return at_address(result, 0.0)[0], status


call_linear = caller(types.int64, 3)


def compile_linear(functions: ScoreFunctions, given: scores.Given, dtype: np.dtype) -> tuple[int, ...]:
    """Return the address of `linear_at`."""
    kernels = dict(
        whole=scores.compile_inside((functions,), given, dtype),
        add=njit(**PART)(add_product),
        rows_of_chunk=njit(**HELPER)(chunk_rows),
        columns_of_product=njit(**HELPER)(product_columns),
    )
    name, identity = f"{functions.name}_{dtype.name}", (fingerprint(functions.value), given, dtype.name)
    scope = dict(T=dtype.type, run=bind(linear_rows, kernels, name, identity, njit(**PART)))
    return (compile_function(linear_at, scope, name, identity, types.int64(*[types.int64] * 3)),)


@cache
def compile_linear_rows(functions: ScoreFunctions, given: scores.Given, dtype: np.dtype) -> Any:
    """Return `linear_inside` of a definition."""
    scope = dict(function_address=addresses(compile_linear, functions, given, dtype))
    name, identity = f"{functions.name}_{dtype.name}", (fingerprint(functions.value), given, dtype.name)
    return bind(linear_inside, scope, name, identity, kept(nogil=True, error_model="numpy"))


def number_or(option, absent):
    """An option as a float, or what stands for None."""


@overload(number_or)
def number_or_absent(option, absent):
    if isinstance(option, types.NoneType):
        return lambda option, absent: absent
    return lambda option, absent: float(option)


# Bound by `compile_product`.
linear_of: Any = None
check: Any = None


def linear(
    input,
    linear_weight,
    target,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=ZERO,
    options=None,
    softcap=None,
    lse_square_scale=ZERO,
    out=None,
):
    divisor = divisor_of(reduction)
    by_input, by_weight = pair(out)
    if not linear_fits(target, input, linear_weight, options):
        raise ValueError(
            "{loss}: shapes must be (N, F) or (F) of input, (C, F) of linear_weight and (N) or () of target"
        )
    classes, features = linear_weight.shape
    if classes == 0 or features == 0:
        raise ValueError("{loss}: linear_weight must have at least one class and one feature")
    if not weight_fits(linear_bias, classes):
        raise ValueError("{loss}: linear_bias must have one element per class")
    if not weight_fits(weight, classes):
        raise ValueError("{loss}: weight must have one element per class")
    check((label_smoothing, softcap, lse_square_scale))
    if not (same_shape(by_input, input) and same_shape(by_weight, linear_weight)):
        raise ValueError("{loss}: out must have the shapes of input and linear_weight")
    T = input.dtype.type
    x, w, b, c = flat(input, T), flat(linear_weight, T), flat(linear_bias, T), flat(weight, T)
    gx, gw, labels = gradient(by_input, input), gradient(by_weight, linear_weight), flat(target, np.int64)
    if not (may_write((gx, gw), (x, w, b, c)) and apart(gx, labels) and apart(gw, labels)):
        raise ValueError("{loss}: out overlaps an argument; it may be input and linear_weight themselves")
    settings = (
        ignored(ignore_index),
        divisor,
        number_or(label_smoothing, 0.0),
        number_or(softcap, 1.0),
        number_or(lse_square_scale, 0.0),
    )
    value, wrong = linear_of(
        (weight, softcap, label_smoothing, lse_square_scale),
        x.reshape(labels.size, features),
        (
            w.reshape(classes, features),
            b,
            labels,
            c,
            gx.reshape(gx.size // features, features),
            gw.reshape(gw.size // features, features),
            settings,
        ),
    )
    if wrong >= 0:
        raise IndexError("{loss}: target holds a class index that is out of range")
    return T(value)


@cache
def compile_product(loss: str, functions: ScoreFunctions, options: tuple[ScoreOption, ...]) -> Any:
    """Return a function of a loss's name, its definition, and its options' domains."""
    known = {o.name: o for o in options}
    names = "label_smoothing", "softcap", "lse_square_scale"

    @intrinsic
    def of_dtype(typingctx, options, x, arguments):
        given = given_in(dict(zip(OF_BLOCKS, options, strict=True)))
        kernel = compile_linear_rows(functions, given, np.dtype(x.dtype.name))
        result, codegen = link(typingctx, kernel, (x, *arguments))
        return result(options, x, arguments), codegen

    check = checks_of(loss, names, tuple(known[n] for n in names))
    return entry(linear, loss, fingerprint(functions.value), linear_of=of_dtype, check=check)
