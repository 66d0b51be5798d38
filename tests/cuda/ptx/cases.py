"""Calls on the machine, and what is asked of their results.

Values are those of `numbaloss.reference` in float64, gradients its differences. A call that is repeated as it
was recorded gives the bits of one that is worked out, whatever the order of warps is, and whatever the memory
and the registers hold that nothing has written.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from definitions import Cauchy, Scaled, SumTriplet, contrastive

import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.families.scores import ScoreLoss
from numbaloss.families.vectors import VectorLoss
from numbaloss.kernels.cuda import driver, faults
from numbaloss.kernels.cuda.ctc import Plan as Alignment
from numbaloss.kernels.cuda.reduce import Launch
from numbaloss.kernels.cuda.rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, Plan
from numbaloss.loss import registry

from . import device
from .device import MACHINE, CuPyArray, Plain, Tensor, host, put

Arrays = dict[str, Any]
ELEMENTWISE = [name for name, loss in registry.items() if issubclass(loss.Class, ElementwiseLoss)]
# Those that run in every kind of call; of the others, whose kernels are the same, each runs with its options.
MOST = [n for n in ELEMENTWISE if registry[n].__module__.endswith((".regression", ".binary"))]
DTYPES = {n: np.dtype(n) for n in ("float32", "float64", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
NARROWER = {"float64": np.float32, "float32": np.float16}
POISONS = 0x7FF4DEADFFC0BEEF, 0x3F9D70A43F1D70A4


@dataclass(frozen=True)
class Case:
    """A call. Gradients are by all that can be differentiated, or by `wrt`."""

    label: str
    loss: Any
    arrays: Arrays  # weights of samples and the upstream gradient among them
    options: Arrays = field(default_factory=dict)
    level: int = 0  # 0 runs always, 1 in a sweep, 2 with all
    wrt: tuple[str, ...] = ()
    mode: str = "value_and_grad"
    out: str = ""  # "over" the arguments; "strided"; "narrow", of a narrower dtype; "added" to
    kind: type = CuPyArray
    offset: int = 0  # elements before an array that begins at a multiple of 256 bytes
    # Constants and functions of templates, by module and name, in place of theirs: the plan of a launch, say.
    patches: Mapping[str, Any] = field(default_factory=dict)
    # A second call, with some arrays in place of these: the bits are the same, but for the rows of `nan`.
    spoiled: Arrays = field(default_factory=dict)
    nan: Any = None
    raises: tuple[type[Exception], str] | None = None
    error: float = 1.0  # how many times the usual error there may be
    reference: Any = None
    slope: Any = None  # the gradient by the input, of all arguments, where differences would take hours

    def __str__(self) -> str:
        return f"{self.loss.__name__} {self.label}"

    @property
    def names(self) -> tuple[str, ...]:
        if self.wrt or self.mode == "__call__":
            return self.wrt
        able = [n for n in self.loss.Class._differentiable() if n in self.arrays]
        floats = [n for n in able if self.arrays[n].dtype.kind not in "biu"]
        if "target" in able and "target" not in floats:
            floats = [n for n in floats if n != "weight" or issubclass(self.loss.Class, ElementwiseLoss)]
        return tuple(floats[:1] if self.mode == "value_grad_hess" else floats)


def call(c: Case, arrays: Arrays) -> dict[str, np.ndarray]:
    """The results on the host: the value, gradients by name, the curvature."""
    over = c.names if c.out == "over" else ()
    given = {
        n: put(c.kind, a, writable=n in over, offset=c.offset if a.dtype.kind not in "biu" else 0, name=n)
        if isinstance(a, np.ndarray)
        else a
        for n, a in {**arrays, **c.options}.items()
    }
    one = len(c.names) == 1
    if c.names and list(c.names) != np.atleast_1d(c.loss.Class._default_wrt()).tolist():
        given["wrt"] = c.names[0] if one else c.names
    if c.mode == "__call__":
        given.pop("grad_output", None)
    if c.out:
        rooms = [given[n] if c.out == "over" else put(c.kind, _strided(arrays[n], c.out)) for n in c.names]
        if c.out == "added":
            given["accumulate"] = True
        given["out"] = rooms[0] if one else tuple(rooms)
    required = [given.pop(n) for n in c.loss.Class._required if n in given]
    made = getattr(c.loss, c.mode)(*required, **given)
    flat: list[Any] = []
    for x in made if isinstance(made, tuple) else (made,):
        flat += x if isinstance(x, tuple) else (x,)
    value = [] if c.mode == "grad" else ["value"]
    curvature = ["curvature"] if c.mode == "value_grad_hess" else []
    if c.out:
        assert all(g is o for g, o in zip(flat[len(value) :], rooms, strict=False))
    assert all(type(x) is c.kind for x in flat)
    found = {n: host(x) for n, x in zip([*value, *c.names, *curvature], flat, strict=True)}
    if c.out == "added":
        found.update({n: found[n] - THERE for n in c.names})
    return found


THERE = 0.25  # in an output that is added to


def _strided(a: np.ndarray, out: str) -> np.ndarray:
    dtype = NARROWER[a.dtype.name] if out == "narrow" else a.dtype
    there = np.full((*a.shape, 2), THERE if out == "added" else 0, dtype)
    return there[..., 1].transpose()[::-1].transpose()


def check(c: Case, cpu: bool = False, wanted: "Expected | None" = None) -> list[str]:
    """Make the calls of a case; an error if anything is wrong. Returns the kernels that they launched.

    With `cpu`, they are held against the CPU's results too. `wanted` is what `expected` says, if it is known.
    """
    driver_ = driver.driver()
    driver_.launched.clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in c.patches.items():
            module, _, attribute = name.partition(".")
            patch.setattr(import_module(f"numbaloss.kernels.cuda.{module}"), attribute, value)
        MACHINE.clear()
        faults._faults.clear()
        device.forget_calls()

        def run(arrays: Arrays, units: int = 1, poison: int = POISONS[0]) -> dict[str, np.ndarray]:
            MACHINE.units, MACHINE.poison, MACHINE.rng = units, poison, np.random.default_rng(units)
            return call(c, arrays)

        run(
            {
                n: np.where(a == a, a.dtype.type(a.flat[0] if a.size else 0), a)
                if a.dtype.kind not in "biu"
                else a
                for n, a in c.arrays.items()
            }
        )
        faults._faults.clear()
        found = run(c.arrays)
        device.forget_calls()
        same(run(c.arrays, 3, POISONS[1]), found)
        nl.synchronize()
        if c.spoiled:
            spoiled = run({**c.arrays, **c.spoiled})
            same(spoiled, found, c.nan)
            if c.raises is None:
                nl.synchronize()
            else:
                with pytest.raises(c.raises[0], match=c.raises[1]):
                    nl.synchronize()
    if wanted is None:
        key = id(c.arrays), id(c.options), c.names, c.mode, c.reference
        if key not in KNOWN:
            KNOWN[key] = expected(c), c
        wanted, _ = KNOWN[key]
    for n, x in wanted.results.items():
        close(found[n], x, c, n, wanted.noise)
    if cpu:
        for n, x in on_cpu(c).items():
            close(found[n], x, c, n)
    return list(dict.fromkeys(driver_.launched))


# What is expected of arrays that several cases have, which it keeps alive.
KNOWN: dict[Any, "tuple[Expected, Case]"] = {}


def same(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], nan: Any = None) -> None:
    """The same bits; but NaN in the rows of a mask, and in what is made of all rows."""
    for n, x in got.items():
        hidden = np.zeros(x.shape, bool)
        if nan is not None:
            rows = nan if nan.ndim == x.ndim else np.expand_dims(nan, 1) if nan.ndim else nan
            hidden = np.broadcast_to(True if n == "value" and not x.ndim else rows, x.shape)
        assert np.isnan(x[hidden]).all(), n
        # As float64: in bfloat16 NumPy takes no NaN for equal.
        shown = (a[~hidden].astype(np.float64) for a in (x, wanted[n]))
        np.testing.assert_array_equal(*shown, err_msg=n)


# ---- what is expected ---------------------------------------------------------------------------------


def wide(arrays: Arrays) -> Arrays:
    floats = {n for n, a in arrays.items() if isinstance(a, np.ndarray) and a.dtype.kind not in "biu"}
    return {n: a.astype(np.float64) if n in floats else a for n, a in arrays.items()}


STEP = 1e-6


class Expected(NamedTuple):
    """The value, gradients and curvature, and how far off differences of rounded numbers may be as slopes."""

    results: dict[str, Any]
    noise: float


def expected(c: Case) -> Expected:
    """What the reference gives."""
    function = c.reference or getattr(reference, c.loss.__name__)
    given = {**wide(c.arrays), **c.options}
    up = given.pop("grad_output", None)
    with np.errstate(all="ignore"):
        value = function(**given)
        made = {} if c.mode == "grad" else {"value": value}
        terms = _terms(function, given)
        # What a term's derivative counts for: sums of terms are divided by a number.
        factor: Any = np.asarray(1.0 if up is None else up, np.float64)
        if c.options.get("reduction", "mean") != "none":
            factor = factor * (np.divide(value, terms().sum()) if value else 0.0)
        for n in c.names:
            made[n] = c.slope(**given) if c.slope else _slope(c, terms, given, n, factor)
            if made[n] is None:
                made[n] = reference.gradient(function, given, n, up)
        if c.mode == "value_grad_hess":
            made["curvature"] = _slope(c, terms, given, c.names[0], factor, 1e-4, bend=True)
        sizes = np.nan_to_num(np.abs(terms()), posinf=0)
        if issubclass(c.loss.Class, VectorLoss):  # differences, of lengths say
            sizes = 2 * np.square(given[c.names[0]]).sum(axis=-1) if c.names else sizes
        largest, most = sizes.max(initial=0), np.nan_to_num(np.abs(factor)).max(initial=0)
    return Expected(made, float(2 * np.finfo(np.float64).eps * largest / STEP * most))


def _terms(function: Any, given: Arrays) -> Callable[..., np.ndarray]:
    fixed = {n: v for n, v in given.items() if n not in ("reduction", "normalizer")}
    return lambda **moved: np.asarray(function(**{**fixed, **moved}, reduction="none"))


def _slope(
    c: Case, terms: Any, given: Arrays, name: str, factor: Any, step: float = STEP, bend: bool = False
) -> np.ndarray | None:
    """The terms' derivatives by an argument: all rows at once, one of their coordinates at a time.

    None of an argument that is not of one number for each score.
    """
    x, cls = given[name], c.loss.Class
    middle = terms()
    if issubclass(cls, ElementwiseLoss):
        if name == "weight" or x.shape != middle.shape:
            return None
        places: Any = [...]
    elif name in ("weight", *getattr(cls, "_rows", ())) or name in ("linear_weight", "linear_bias"):
        return None
    elif cls is nl.CTCLoss:
        if c.options.get("reduction", "mean") == "mean":
            return None
        places = [(t, ..., k) for t in range(x.shape[0]) for k in range(x.shape[-1])]
    else:
        first = x.ndim > 1 and cls not in MARGINS and not issubclass(cls, VectorLoss)
        places = [(slice(None), k) if first else (..., k) for k in range(x.shape[1 if first else -1])]
    made = np.zeros(x.shape)
    for at in places:
        h = step * np.maximum(1, np.where(np.isfinite(x[at]), abs(x[at]), 1))

        def moved(steps: float, at: Any = at, h: Any = h) -> np.ndarray:
            y = x.copy()
            y[at] += steps * h
            # CTC's are of what log_softmax makes of scores.
            return terms(**{name: log_softmax(y) if cls is nl.CTCLoss else y})

        # Scores' losses are smooth: a longer step shows beside a long row's sum.
        n = 10 if issubclass(cls, ScoreLoss) else 1
        if bend:
            made[at] = ((moved(n) - middle) - (middle - moved(-n))) / (n * h) ** 2
        elif issubclass(cls, ElementwiseLoss):  # whose derivatives of higher order may be large
            made[at] = (8 * (moved(10) - moved(-10)) - (moved(20) - moved(-20))) / (120 * h)
        else:
            made[at] = (moved(n) - moved(-n)) / (2 * n * h)
        made[at] *= factor
    return made


MARGINS = (nl.MultiMarginLoss, nl.MultiLabelMarginLoss, nl.MultiLabelSoftMarginLoss)


def log_softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def on_cpu(c: Case) -> dict[str, Any]:
    """The CPU's results in float64."""
    given = {**wide(c.arrays), **c.options}
    if c.mode == "__call__":
        given.pop("grad_output", None)
    with np.errstate(all="ignore"):
        made = getattr(c.loss, c.mode)(
            **given, **({"wrt": c.names if c.names[1:] else c.names[0]} if c.names else {})
        )
    flat: list[Any] = []
    for x in made if isinstance(made, tuple) else (made,):
        flat += x if isinstance(x, tuple) else (x,)
    names = [*([] if c.mode == "grad" else ["value"]), *c.names, "curvature"]
    return dict(zip(names, flat, strict=False))


def close(got: np.ndarray, wanted: Any, c: Case, name: str, noise: float = 0.0) -> None:
    """As near as roundings of the arithmetic leave it, one of the storage, and the differences' own error."""
    wanted = np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, name
    if not got.size:
        return
    wider = got.dtype == np.float64
    size = np.where(np.isfinite(wanted), np.abs(wanted), 0)
    typical = float(np.median(size[size > 0])) if size.any() else 0.0
    eps = 1e-11 if wider else 48 * float(np.finfo(np.float32).eps)
    bound = c.error * eps * (size + typical) + c.error * (
        3e-9 if name != "curvature" else 1e-4 * (size + typical) + 1e-6
    )
    if name not in ("value", "curvature"):
        bound += noise
    if got.dtype.itemsize == 2:
        with np.errstate(over="ignore"):  # a slope beyond float16's numbers
            beyond = np.isinf(wanted.astype(got.dtype).astype(np.float64))
        wanted = np.where(beyond, np.copysign(np.inf, wanted), wanted)
        bound += float(testing.finfo(got.dtype).eps) * size + float(
            testing.finfo(got.dtype).smallest_subnormal
        )
    if hasattr(c.loss.Class, f"slope_{name}"):  # it may pass a clamp, where the value is constant
        wanted = np.where(wanted == 0, got, wanted)
    with np.errstate(invalid="ignore"):
        off = np.abs(got.astype(np.float64) - wanted)
    right = (off <= bound) | (got == wanted) | (np.isnan(got.astype(np.float64)) & np.isnan(wanted))
    k = np.argmax(np.where(right, -1, np.nan_to_num(off, nan=np.inf)))
    assert right.all(), (
        f"{name}: {got.flat[k]} at {k}, not {wanted.flat[k]}; {(~right).sum()} of {right.size}"
    )


# ---- arrays -------------------------------------------------------------------------------------------


def rng_of(*what: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def drawn(loss: Any, shape: tuple[int, ...] = (3, 7), dtype: Any = "float32", *seed: Any) -> Arrays:
    """Samples away from the points where a derivative is one-sided."""
    rng = rng_of(loss.__name__, shape, *seed)
    arrays = testing.samples(loss, rng, shape)
    for n, a in arrays.items():
        operand = loss.Class.operands[n]
        if a.dtype.kind not in "iu":
            x = np.clip(a + rng.uniform(1e-3, 1e-2, a.shape), operand.low + 1e-2, operand.high - 1e-2)
            arrays[n] = np.asarray(x).astype(DTYPES.get(dtype, dtype))
    return arrays


def row_numbers(rows: tuple[int, ...], T: Any = "float32", *seed: Any) -> Arrays:
    """Weights of samples, some of them zero, and an upstream gradient."""
    rng = rng_of(rows, *seed)
    weights = np.asarray(rng.integers(0, 3, rows)).astype(T)
    if rows:
        weights.flat[:2] = 1, 0
    return {"sample_weight": weights, "grad_output": np.asarray(rng.uniform(-1, 1, rows)).astype(T)}


def arithmetic(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def where(rows: np.ndarray, a: np.ndarray, x: float, axis: int = 1) -> np.ndarray:
    """An array with a number in some rows."""
    return np.where(np.expand_dims(rows, axis) if a.ndim > rows.ndim else rows, a.dtype.type(x), a)


# ---- elements -----------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "reversed": lambda a: a[::-1, ::-1],
    "skipping": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "unaligned": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}
TILE = 2048  # float32 elements of a block
QUICK = [("float16", 0)]  # of halves and float64 what runs always


def elementwise() -> Iterator[Case]:
    for name in ELEMENTWISE:
        loss = registry[name]
        seen: set[Any] = set()
        for options in testing.combinations(loss):
            flags = tuple(v for v in options.values() if isinstance(v, bool))
            plain = not seen
            level = int(bool(seen) or name not in MOST)
            seen.add(flags)
            yield Case(f"{options}", loss, drawn(loss, (7, 19), "float32", options), options, level=level)
            if plain and name in MOST:
                yield from general(loss, options)
    huber, bce = registry["huber_loss"], registry["binary_cross_entropy"]
    for dtype in DTYPES:
        for offset in (0, 1):
            for n in (0, 1, 7, 8, 9, TILE - 1, TILE, TILE + 1, 2 * TILE + 5):
                level = 0 if dtype == "float32" or ((dtype, offset) in QUICK and n in (9, TILE + 1)) else 1
                arrays = drawn(huber, (n,), dtype)
                yield Case(f"{dtype} {n} offset {offset}", huber, arrays, level=level, offset=offset, error=2)
    few = {"reduce.SUMMING_BLOCKS": 2}
    yield Case("more tiles than blocks", huber, drawn(huber, (5 * TILE + 3,)), patches=few, error=4)
    for k, (a, b) in enumerate((a, b) for a in LAYOUTS for b in LAYOUTS):
        arrays = drawn(huber, (6, 20))
        laid = {n: LAYOUTS[w](x) for (n, x), w in zip(arrays.items(), (a, b), strict=True)}
        level = 0 if k in (15, 29) or a == b == "F" else 1
        yield Case(f"{a}-{b}", huber, laid, level=level, out="strided" if k % 2 else "")
    for offset in (0, 1):
        arrays = drawn(bce, (TILE + 3,))
        bad = np.isin(np.arange(TILE + 3), (5, 900, TILE + 2))
        for x, level in ((1.5, 0), (-0.5, 1), (np.nan, 1)):
            yield Case(
                f"out of its domain, {x}, offset {offset}", bce, arrays, {"reduction": "none"}, level=level,
                offset=offset, spoiled={"target": where(bad, arrays["target"], x)}, nan=bad,
                raises=(ValueError, r"target must be in \[0, 1\], but target\[5\] is not"),
            )  # fmt: skip
    weights = np.arange(40).astype("f4") % 3
    arrays = {**drawn(bce, (40,)), "sample_weight": weights}
    spoiled = {"input": where(weights == 0, arrays["input"], 7)}
    yield Case("out of its domain without weight", bce, arrays, spoiled=spoiled)
    for name, level in (("mse_loss", 0), ("l1_loss", 1), ("huber_loss", 1), ("binary_cross_entropy", 1)):
        for shape in ((19,), (7, 19), (7, 1), ()):
            arrays = drawn(registry[name], (7, 19))
            arrays["weight"] = np.asarray(rng_of(shape).uniform(0.5, 2, shape).astype("f4"))
            arrays["sample_weight"] = rng_of(shape).integers(0, 3, (7, 19)).astype("f4")
            for reduction in ("mean", "none"):
                options = {"reduction": reduction}
                # Of one weight that the mean divides by, what is computed is a difference of equal numbers.
                level = max(level, int(shape != (19,) or reduction != "mean"))
                yield Case(
                    f"weight {shape} {reduction}",
                    registry[name],
                    arrays,
                    options,
                    level=level,
                    error=60 if shape else 400,
                )
    for name, definition in OWN.items():
        loss = nl.elementwise_loss(definition)
        arrays = {n: a * np.float32(1.5) for n, a in drawn(loss, (5, 13)).items()}
        by = reference.elementwise(np_vectorized(definition))
        for k, options in enumerate(OWN_OPTIONS[name]):
            yield Case(
                f"{options}",
                loss,
                arrays,
                options,
                level=int(k > 0 or name != "branching"),
                reference=by,
                error=4,
            )
        yield Case("hess", loss, arrays, level=1, mode="value_grad_hess", reference=by, error=4)
        for dtype in ("float64", "bfloat16"):
            narrow = {n: a.astype(DTYPES[dtype]) for n, a in arrays.items()}
            yield Case(dtype, loss, narrow, level=2, reference=by, error=4)


def general(loss: Any, options: Arrays) -> Iterator[Case]:
    """An elementwise loss's terms, weights and upstream gradients, in place, of all dtypes."""
    name, shape = loss.__name__, (7, 19)
    some = name == "huber_loss"
    for k, dtype in enumerate(DTYPES):
        arrays = {**drawn(loss, shape, dtype, "w"), **row_numbers(shape, arithmetic(dtype))}
        hidden = arrays["sample_weight"] == 0
        first, second = loss.Class._arrays[:2]
        spoiled = {first: where(hidden, arrays[first], np.nan), second: where(hidden, arrays[second], np.inf)}
        yield Case(
            f"{dtype} terms",
            loss,
            arrays,
            {**options, "reduction": "none"},
            level=k or not some,
            spoiled=spoiled,
            error=2 if dtype == "float64" else 1,  # where slopes are steep, that of the differences
        )
        if dtype != "float32":
            yield Case(dtype, loss, drawn(loss, shape, dtype), options, level=1 + (k > 1))
            continue
        del arrays["grad_output"]
        level = int(name != "huber_loss")
        yield Case("mean of weights", loss, arrays, options, level=1, spoiled=spoiled, error=4)
        yield Case("hess", loss, arrays, {**options, "grad_output": 1.5}, mode="value_grad_hess", level=level)
        yield Case("value", loss, arrays, options, mode="__call__", level=1)
        yield Case("grad", loss, arrays, {**options, "reduction": "sum"}, mode="grad", level=1)
        plain = drawn(loss, shape)
        yield Case("in place", loss, plain, options, level=int(not some), out="over")
        yield Case("strided", loss, plain, {**options, "grad_output": -2.0}, level=1, out="strided")
        yield Case("narrow", loss, plain, options, level=level, out="narrow")
        yield Case("added", loss, plain, options, level=level, out="added", error=8)
        for kind in (Tensor, Plain):
            yield Case(kind.__name__, loss, plain, options, level=level, kind=kind)
    for offset, n in ((1, 1301), (0, 4097), (1, 4099)):
        yield Case(f"{n} offset {offset}", loss, drawn(loss, (n,)), options, level=2, offset=offset, error=4)


def branching(input, target, low=0.5, high=2.0):
    d = abs(input - target)
    if d < low:
        return d * d
    if d < high:
        return low * d
    return nl.math.log1p(d) + min(d, 3.0) ** 1.5


def many_functions(input, target, third, flag=False):
    a = nl.math.tanh(input) * nl.math.sin(target) + nl.math.sqrt(third * third + 1)
    if flag:
        a = a + nl.math.exp(-third * third) * nl.math.cos(target) + nl.math.arctan(third)
        a = a + nl.math.lgamma(third * third + 0.5) + nl.math.digamma(abs(target) + 0.5)
    return nl.math.expm1(a * 0.1) + nl.math.where(input > target, a, 2.0 * a)


def powers(input, target, p=2.5):
    d = abs(input - target) + 0.1
    return d**p + d * nl.math.log(d) + max(input, target) ** 3


OWN = {f.__name__: f for f in (branching, many_functions, powers)}
OWN_OPTIONS: dict[str, list[Arrays]] = {
    "branching": [{}, {"low": 0.25, "high": 1.5}],
    "many_functions": [{"flag": True}, {}],
    "powers": [{}, {"p": 1.5}],
}


def by_numpy(f: Callable[..., Any]) -> Any:
    """A definition, with NumPy's functions in place of the library's."""
    math = SimpleNamespace(**vars(np), lgamma=nl.math.lgamma, digamma=nl.math.digamma)
    scope = {**f.__globals__, "nl": SimpleNamespace(math=math)}
    return FunctionType(f.__code__, scope, f.__name__, f.__defaults__)


def np_vectorized(f: Callable[..., Any]) -> Any:
    """A definition with branches, of arrays."""
    import functools

    each = np.vectorize(by_numpy(f), otypes=[float])
    return functools.wraps(f)(lambda *args, **options: each(*args, **options) if args else each(**options))


# ---- class scores -------------------------------------------------------------------------------------

# A small launch of each variant, with a shape with which it has full and empty lanes and several rounds of
# rows, and one without vectors.
ROWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Plan]] = {
    TEAM: ((21, 48), (21, 13), Plan(TEAM, 2, 32, 3, 2)),
    BLOCK: ((3, 392), (3, 195), Plan(BLOCK, 2, 64, 0, 2)),
    STREAM: ((3, 648), (3, 301), Plan(STREAM, 2, 64, 0, 2)),
    SPLIT: ((2, 776), (2, 389), Plan(SPLIT, 6, 32, 3, 2)),
    COLUMNS: ((3, 7, 104), (3, 5, 33), Plan(COLUMNS, 2, 32, 0, 2)),
    "slices": ((3, 7, 104), (3, 5, 33), Plan(COLUMNS, 2, 32, 2, 2)),
}
BIG = 2**62


def scored(shape: tuple[int, ...], dtype: str = "float32", probable: bool = False, *seed: Any) -> Arrays:
    rng = rng_of(shape, *seed)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = (2 * rng.standard_normal(shape)).astype(DTYPES[dtype])
    if probable:
        q = rng.random(shape) ** 4
        q.flat[::4] = 0
        return {"input": x, "target": q.astype(DTYPES[dtype])}
    return {"input": x, "target": np.asarray(rng.integers(0, shape[min(1, len(shape) - 1)], rows))}


def class_weights(shape: tuple[int, ...], T: str = "float32") -> np.ndarray:
    return rng_of(shape, "c").uniform(0.5, 2, shape[min(1, len(shape) - 1)]).astype(T)


def scores() -> Iterator[Case]:
    loss = nl.cross_entropy
    some = (TEAM, COLUMNS)
    for variant, (shape, odd, plan) in ROWS.items():
        how: Any = dict(patches={"rows.plan": lambda *a, plan=plan, **k: plan})
        for k, dtype in enumerate(DTYPES):
            for offset, of in ((0, shape), (1, odd)):
                if dtype == "float64":  # of which a thread holds half as many
                    of = of[0], of[1] // 2, *of[2:]
                arrays = {**scored(of, dtype), "weight": class_weights(of, arithmetic(dtype))}
                rows = of[:1] + of[2:]
                arrays |= row_numbers(rows, arithmetic(dtype))
                options: Arrays = {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 3}
                level = 0 if variant == TEAM and offset and not k else 1 if not k or variant in some else 2
                given: Any = dict(level=level, offset=offset, error=4, **how)
                yield Case(f"{variant} {dtype} all {of}", loss, arrays, options, **given)
                plain = {**scored(of, dtype), "sample_weight": arrays["sample_weight"]}
                level = 0 if not k and not offset else 1 if not k or (not offset and variant in some) else 2
                if variant == TEAM and dtype == "float16" and not offset:
                    level = 0
                more: Arrays = {"reduction": "sum"}
                yield Case(
                    f"{variant} {dtype} sum {of}", loss, plain, more, level=level, offset=offset, **how
                )
                if level == 0 and dtype == "float32":
                    yield Case(f"{variant} in place", loss, plain, more, out="over", **how)
                    yield Case(f"{variant} narrow", loss, plain, more, level=1, out="narrow", **how)
                    yield Case(f"{variant} added", loss, plain, more, level=1, out="added", error=8, **how)
                    if variant != "slices":
                        yield from strange(variant, plain, more, how)
        for setting, options in SETTINGS.items():
            weighted = {**row_numbers(shape[:1] + shape[2:])}
            options = {**options, "reduction": "none"}
            level = int((variant, setting) != (COLUMNS, "all"))
            arrays = {**scored(shape, "float32", True), "weight": class_weights(shape), **weighted}
            both = ("input", "target")
            yield Case(
                f"{variant} probabilities {setting}", loss, arrays, options, level, both, error=4, **how
            )
            wrt = ("input",)
            yield Case(
                f"{variant} probabilities {setting} hess", loss, arrays, options, level + 1, wrt,
                mode="value_grad_hess", error=4, **how,
            )  # fmt: skip
            for k, (name, own) in enumerate(SCORE_LOSSES.items()):
                if name != "cross_entropy" and "softcap" in options:
                    continue
                definition = DEFINITIONS.get(name)
                by = reference.score_loss(by_numpy(definition)) if definition else None
                level = (
                    0
                    if (variant, setting, name) in CHOSEN
                    else 1 + ((k + len(variant) + len(setting)) % 9 > 0)
                )
                arrays = {**scored(shape), **weighted}
                if setting != "plain":
                    arrays["weight"] = class_weights(shape)
                given: Any = dict(level=level, reference=by, error=8, **how)
                yield Case(f"{variant} {setting}", own, arrays, options, **given)
                if variant in some:
                    given["level"] = max(1, level)
                    yield Case(
                        f"{variant} {setting} hess", own, arrays, options, mode="value_grad_hess", **given
                    )
        arrays = {**scored(shape), "weight": class_weights(shape), **row_numbers(shape[:1] + shape[2:])}
        del arrays["grad_output"]
        arrays["target"].flat[1::3] = -100
        level = 1
        yield Case(f"{variant} mean", loss, arrays, {"label_smoothing": 0.1}, level=level, **how)
        yield Case(f"{variant} hess", loss, arrays, mode="value_grad_hess", level=1, **how)
        if len(shape) > 2 or shape[0] > 2:  # where another row counts
            arrays = {**arrays, "weight": arrays["weight"].copy()}
            arrays["weight"][arrays["target"].flat[0]] = 0
            yield Case(f"{variant} a class without weight", loss, arrays, level=1, **how)
    for shape in ((1, 1), (5,), (40, 1), (3, 2), (3, 10), (5, 3, 2), (1, 2, 5), (2, 300), (2, 5, 2, 3)):
        for dtype in DTYPES:
            level = 1 if dtype == "float32" else 2
            yield Case(f"{dtype} {shape}", loss, scored(shape, dtype), level=level, error=2)
            arrays = {**scored(shape, dtype), "weight": class_weights(shape)}
            yield Case(f"{dtype} {shape} nll", nl.nll_loss, arrays, level=level, error=2)
    for deal in range(6):
        arrays = scored((9, (4 << deal) - 1))
        for name, one in (("team", Plan(TEAM, 1, 32, deal, 1)), ("slices", Plan(COLUMNS, 2, 64, deal, 2))):
            arrays = scored((9, (4 << deal) - 1) if name == "team" else (2, 11, 40))
            patches = {"rows.plan": lambda *a, plan=one, **k: plan}
            yield Case(f"{name} of {1 << deal}", loss, arrays, level=1, offset=1, patches=patches)
    for labels in ("uint8", "int8", "int16", "int32", "uint64"):
        arrays = scored((6, 8), "float16")
        arrays["target"] = arrays["target"].astype(labels)
        yield Case(f"labels {labels}", loss, arrays, level=1)
    for shape in ((3, 1000), (3, 5000), (2, 20000), (1, 40000), (3001, 10), (2, 10, 2050), (1, 33, 129)):
        yield Case(
            f"long {shape}", loss, scored(shape), {"reduction": "sum"}, level=2, error=8, slope=softmax_slope
        )


def softmax_slope(input: np.ndarray, target: np.ndarray, **options: Any) -> np.ndarray:
    """The gradient of cross entropy, summed: the softmax, less one at the label."""
    own = np.arange(input.shape[1]).reshape((-1,) + (1,) * (input.ndim - 2)) == np.expand_dims(target, 1)
    return np.asarray(np.exp(log_softmax(input, axis=1)) - own)


def strange(variant: str, arrays: Arrays, options: Arrays, how: Any) -> Iterator[Case]:
    """Rows that do not count, or are not numbers; class indices out of range."""
    loss, x, labels = nl.cross_entropy, arrays["input"], arrays["target"]
    dead = arrays["sample_weight"] == 0
    hidden = np.where(np.arange(x.shape[1]).reshape((-1,) + (1,) * (x.ndim - 2)) % 2, np.nan, np.inf)
    spoiled = np.where(np.expand_dims(dead, 1), hidden, x).astype(x.dtype)
    yield Case(f"{variant} without weight", loss, arrays, options, spoiled={"input": spoiled}, **how)
    ignored = {**arrays, "target": np.where(np.arange(labels.size).reshape(labels.shape) % 5, labels, -100)}
    spoiled = where(ignored["target"] == -100, x, np.nan)
    yield Case(f"{variant} ignored", loss, ignored, options, spoiled={"input": spoiled}, **how)
    at = np.zeros(labels.shape, bool)
    at.flat[[1, labels.size - 1]] = True  # the first of no weight: checked all the same
    for bad in (-1, x.shape[1], BIG, -(2**63)):
        said = str(bad) if abs(bad) < BIG else "-1048575 or below" if bad < 0 else "1048575 or above"
        where_ = ", ".join(map(str, np.unravel_index(1, labels.shape)))
        yield Case(
            f"{variant} labels of {bad}", loss, arrays, options,
            spoiled={"target": np.where(at, bad, labels)},
            nan=at, raises=(IndexError, rf"target\[{where_}\] is {said}, but input has {x.shape[1]}"), **how,
        )  # fmt: skip
    steps = rng_of(x.shape).integers(0, 3, x.shape)
    low = {**arrays, "input": (8.0 * steps).astype("f4")}
    high = (1e8 + 8.0 * steps).astype("f4")
    yield Case(f"{variant} huge scores", loss, low, options, spoiled={"input": high}, **how)
    masked = np.moveaxis(x.copy(), 1, -1)
    masked[0, ..., ::2] = -np.inf
    odd = np.where(np.arange(len(labels)).reshape((-1,) + (1,) * (labels.ndim - 1)) == 0, 1, labels)
    base = {**arrays, "input": np.ascontiguousarray(np.moveaxis(masked, -1, 1)), "target": odd}
    base["sample_weight"] = np.ones_like(arrays["sample_weight"])
    lost = np.moveaxis(masked.copy(), -1, 1)
    nan = np.zeros(labels.shape, bool)
    nan[1] = True
    for bad, only in ((-np.inf, slice(None)), (np.inf, slice(4, 5)), (np.nan, slice(4, 5))):
        lost[1] = base["input"][1]
        lost[1, only] = bad
        yield Case(
            f"{variant} {bad} scores", loss, base, options,
            spoiled={"input": np.ascontiguousarray(lost)}, nan=nan, **how,
        )  # fmt: skip


SETTINGS: dict[str, Arrays] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0, "lse_square_scale": 0.05},
    "all": {"softcap": 2.0, "lse_square_scale": 0.05, "label_smoothing": 0.1},
}


def focal(log_prob, rest, class_weight, gamma=2.0):
    return -class_weight * rest**gamma * log_prob


def focal_of_entropy(rest, cross_entropy, gamma=1.5):
    return rest**gamma * cross_entropy


def z_loss(cross_entropy, logsumexp, scale=0.05):
    return cross_entropy + scale * logsumexp * logsumexp


def poly_1(cross_entropy, rest, epsilon=0.7):
    return cross_entropy + epsilon * rest


def generalised(log_prob, q=0.7):
    return (1 - nl.math.exp(q * log_prob)) / q


def everything(log_prob, rest, class_weight, cross_entropy, logsumexp, squared=True, a=0.3):
    v = cross_entropy * logsumexp + a * class_weight * rest * cross_entropy - log_prob * logsumexp
    return v * v if squared else v


DEFINITIONS: dict[str, Any] = {
    f.__name__: f for f in (focal, focal_of_entropy, z_loss, poly_1, generalised, everything)
}
BUILT_IN = ("focal_cross_entropy", "poly1_cross_entropy", "generalized_cross_entropy", "cross_entropy")
SCORE_LOSSES: dict[str, Any] = {
    **{name: nl.score_loss(f) for name, f in DEFINITIONS.items()},
    **{name: registry[name] for name in BUILT_IN},
}
# What runs always: each definition by a variant, and each of the library's own.
CHOSEN = [
    (STREAM, "capped", "cross_entropy"),
    (TEAM, "plain", "focal_cross_entropy"), (BLOCK, "plain", "poly1_cross_entropy"),
    (COLUMNS, "smoothed", "generalized_cross_entropy"),
]  # fmt: skip


def picks() -> Iterator[Case]:
    """The negative log-likelihood."""
    loss = nl.nll_loss
    for variant, (shape, odd, plan) in ROWS.items():
        plan = plan._replace(blocks=2 * plan.deal) if variant == SPLIT else plan
        how: Any = dict(patches={"rows.plan": lambda *a, plan=plan, **k: plan})
        for k, dtype in enumerate(DTYPES):
            for offset, of in ((0, shape), (1, odd)):
                rows = of[:1] + of[2:]
                arrays = {**scored(of, dtype), "weight": class_weights(of, arithmetic(dtype))}
                arrays |= row_numbers(rows, arithmetic(dtype))
                arrays["target"].flat[::7] = -100
                dead = (arrays["target"] == -100) | (arrays["sample_weight"] == 0)
                x = arrays["input"]
                own = np.expand_dims(np.where(dead, -1, arrays["target"]), 1)
                unread = np.arange(of[1]).reshape((-1,) + (1,) * (len(of) - 2)) != own
                more: Arrays = {"reduction": "none"}
                level = 0 if not k and (offset or variant in (TEAM, COLUMNS)) else 1 + (k > 1)
                spoiled = {"input": np.where(unread, x.dtype.type(np.nan), x)}
                yield Case(
                    f"{variant} {dtype} {of}",
                    loss,
                    arrays,
                    more,
                    level=level,
                    offset=offset,
                    spoiled=spoiled,
                    **how,
                )
                if dtype != "float32":
                    continue
                for bad in (-1, of[1], BIG):
                    at = np.zeros(rows, bool)
                    at.flat[1] = True
                    labels = np.where(at, bad, arrays["target"])
                    yield Case(
                        f"{variant} {of} labels of {bad}", loss, arrays, more, level=level, offset=offset,
                        spoiled={"target": labels}, nan=at, raises=(IndexError, r"target\[.*\] is"), **how,
                    )  # fmt: skip
    arrays = scored((6, 8))
    yield Case("mean", loss, {**arrays, "sample_weight": np.arange(6).astype("f4")}, error=64)


# ---- margins ------------------------------------------------------------------------------------------


def margin_arrays(loss: Any, shape: tuple[int, ...], dtype: str = "float32") -> Arrays:
    rng = rng_of(loss.__name__, shape)
    x = rng.standard_normal(shape).astype(DTYPES[dtype])
    if loss is nl.multi_margin_loss:
        return {"input": x, "target": np.asarray(rng.integers(0, shape[-1], shape[:-1]))}
    if loss is nl.multilabel_soft_margin_loss:
        return {"input": x, "target": rng.random(shape).astype(DTYPES[dtype])}
    order, counts = (
        rng.random(shape).argsort(axis=-1),
        rng.integers(0, min(shape[-1], 6) + 1, (*shape[:-1], 1)),
    )
    return {"input": x, "target": np.where(np.arange(shape[-1]) < counts, order, -1)}


def margins() -> Iterator[Case]:
    one, soft, many = nl.multi_margin_loss, nl.multilabel_soft_margin_loss, nl.multilabel_margin_loss
    team, block, stream = Plan(TEAM, 2, 64, 3, 2), Plan(BLOCK, 2, 64, 0, 2), Plan(STREAM, 2, 64, 0, 2)
    for loss, plan, shape in (
        (one, team, (21, 80)), (one, block, (3, 568)), (one, stream, (2, 1112)), (soft, team, (21, 80)),
        (soft, block, (3, 568)), (soft, stream, (2, 1112)), (many, stream, (7, 40)),
    ):  # fmt: skip
        how: Any = dict(patches={"margins.plan": lambda *a, plan=plan, **k: plan}, error=2)
        for k, dtype in enumerate(DTYPES):
            for offset, of in ((0, shape), (1, (shape[0], shape[1] - 3))):
                arrays = {**margin_arrays(loss, of, dtype), **row_numbers(of[:1], arithmetic(dtype))}
                if loss is not many:
                    arrays["weight"] = class_weights(of, arithmetic(dtype))
                # Margins that no difference of bfloat16 numbers comes near.
                of_one = [{"p": 2, "margin": 0.505}, {"p": 1, "margin": 1.005}]
                options = of_one if loss is one else [{}]
                for j, o in enumerate(options):
                    chosen = (
                        (one, team, 0, 0),
                        (one, block, 1, 1),
                        (soft, block, 0, 0),
                        (many, stream, 0, 0),
                        (many, stream, 1, 0),
                    )
                    level = 1 + (k > 1) if k or (loss, plan, offset, j) not in chosen else 0
                    label = f"{plan.variant} {dtype} {of} {o}"
                    none = {**o, "reduction": "none"}
                    dead = arrays["sample_weight"] == 0
                    x = where(dead, arrays["input"], np.nan)
                    wrt = ("input", "target") if loss is soft else ("input",)
                    given: Any = dict(level=level, offset=offset, **how)
                    yield Case(label, loss, arrays, none, wrt=wrt, spoiled={"input": x}, **given)
                    if loss is soft or o.get("p") == 2:
                        given["level"] = max(1, level)
                        yield Case(label + " hess", loss, arrays, none, mode="value_grad_hess", **given)
                if k or loss is soft:
                    continue
                at = np.zeros(of[0], bool)
                at[[1, -1]] = True
                for bad in (-2, of[1], BIG, -(2**63)):
                    labels = arrays["target"].copy()
                    if loss is one:
                        labels[at] = bad
                    else:
                        labels[at, 9] = bad  # after the list's end, too
                        labels[at, 8] = -1
                    yield Case(
                        f"{plan.variant} {of} labels of {bad}", loss, arrays, none, wrt=wrt, level=level,
                        offset=offset, spoiled={"target": labels}, nan=at,
                        raises=(IndexError, r"target\[1"), **how,
                    )  # fmt: skip
        plain = margin_arrays(loss, shape)
        level = int(plan is not team)
        yield Case(f"{plan.variant} mean", loss, plain, level=level, **how)
        yield Case(f"{plan.variant} in place", loss, plain, level=level, wrt=("input",), out="over", **how)
        yield Case(f"{plan.variant} narrow", loss, plain, level=level, wrt=("input",), out="narrow", **how)
        yield Case(f"{plan.variant} value", loss, plain, mode="__call__", level=1, **how)
        yield Case(f"{plan.variant} grad", loss, plain, mode="grad", level=1, wrt=("input",), **how)
    labels = np.full((5, 40), -1)
    labels[0] = rng_of("labels").permutation(40)  # a full list, an empty one, what stands after the end
    labels[2] = 7
    labels[2, :4] = 3, 1, 2, -1
    labels[3, :33] = [5, *range(6, 37), 5]  # and a class twice
    arrays = {"input": margin_arrays(many, (5, 40))["input"], "target": labels}
    # By the same thread: two that mark a class at once write the same bits, which is a race all the same.
    yield Case("lists", many, arrays, patches={"margins.plan": lambda *a: stream._replace(threads=32)})
    for loss in (one, soft, many):
        for shape in ((1, 1), (3, 2), (5,), (5, 10), (2, 300), (2, 5000)):
            level = 1 if shape[-1] < 1000 else 2
            yield Case(
                f"{shape}", loss, margin_arrays(loss, shape), {"reduction": "sum"}, level=level, error=2
            )
    for weight in (2.0, np.ones(1, "f4"), np.linspace(1, 2, 12, dtype="f4").reshape(3, 4)):
        arrays = {**margin_arrays(soft, (3, 4)), "weight": np.asarray(weight, "f4")}
        yield Case(f"weight {np.shape(weight)}", soft, arrays, {"reduction": "sum"}, level=1, error=2)
    tied = np.zeros((3, 8), "f4")
    tied[:, 0] = 1
    for loss, target in ((one, np.zeros(3, int)), (many, np.array([[0] + [-1] * 7] * 3))):
        # At the kink there is no slope; the reference's differences halve it.
        yield Case("ties", loss, {"input": tied, "target": target}, mode="__call__")


# ---- vectors ------------------------------------------------------------------------------------------


class Six(nl.VectorLoss):
    """As many sums as can be, of three vectors."""

    def terms(a, b, c):
        return a * b, b * c, c * a, a * a, b * b, nl.math.exp(-c * c)

    def finish(ab, bc, ca, aa, bb, cc):
        return (ab + 2 * bc - ca) / nl.math.sqrt(1 + aa + bb) + nl.math.log1p(cc)


def by_definition(cls: Any) -> Any:
    """The reference of a loss of vectors: its definition, by NumPy."""
    terms, finish = by_numpy(cls._functions.terms), by_numpy(cls._functions.finish)
    names = {f: f.__code__.co_varnames[: f.__code__.co_argcount] for f in (terms, finish)}

    def loss(reduction="mean", sample_weight=None, normalizer=None, **given):
        given = {n: f.default for n, f in cls.fields.items()} | given
        sums = terms(*(given[n] for n in names[terms]))
        sums = [s.sum(axis=-1) for s in (sums if isinstance(sums, tuple) else (sums,))]
        found = finish(*sums, *(given[n] for n in names[finish][len(sums) :]))
        return reference.reduce(found, reduction, sample_weight, normalizer)

    return loss


VECTORS: list[tuple[Any, Arrays]] = [
    (nl.cosine_embedding_loss, {"margin": 0.05}),
    (nl.triplet_margin_loss, {"swap": True}),
    *((nl.triplet_margin_loss, {"p": p, "swap": swap}) for p in (1.0, 3.0, np.inf) for swap in (False, True)),
    (nl.triplet_margin_loss, {"p": 1.5, "eps": 0.25}),
    (nl.triplet_margin_loss, {}),
    *(
        (nl.triplet_margin_with_distance_loss, {"distance_function": d, "swap": swap})
        for d in ("sqeuclidean", "cosine", "manhattan", "euclidean")
        for swap in (False, True)
    ),
    (nl.contrastive_loss, {}),
    *((loss, {}) for loss in (SumTriplet.function, contrastive, Scaled.function, Six.function)),
    *((Cauchy.function, {"squared": flag}) for flag in (True, False)),
]
VECTOR_PLANS = {
    TEAM: ((19, 24), (19, 21), Plan(TEAM, 2, 64, 4, 2)),
    BLOCK: ((4, 120), (4, 115), Plan(BLOCK, 2, 64, 0, 2)),
    STREAM: ((4, 296), (4, 281), Plan(STREAM, 2, 64, 0, 2)),
}
# What runs always: of each variant some kinds of distances, so that all are there.
CHOSEN_VECTORS = {TEAM: (0, 13), BLOCK: (4, 18), STREAM: (1,)}


def vector_arrays(loss: Any, shape: tuple[int, ...], dtype: str = "float32") -> Arrays:
    rng = rng_of(loss.__name__, shape)
    T = DTYPES[dtype]
    arrays = {n: rng.standard_normal(shape).astype(T) for n in loss.Class.vectors}
    for n in loss.Class._rows:
        labels = [-1, 1] if loss is nl.cosine_embedding_loss else [0, 1]
        label = n in loss.Class.labels or n == "label"
        arrays[n] = np.asarray(rng.choice(labels, shape[:-1]) if label else rng.random(shape[:-1])).astype(T)
    return arrays


def vectors() -> Iterator[Case]:
    for variant, (shape, odd, plan) in VECTOR_PLANS.items():
        how: Any = dict(patches={"vectors.plan": lambda *a, plan=plan: plan})
        for j, (loss, options) in enumerate(VECTORS):
            defined = loss.Class.terms is not None and loss.__name__ not in registry
            error = 24 if "cosine" in f"{loss.__name__} {options}" else 8
            given: Any = dict(reference=by_definition(loss.Class) if defined else None, error=error, **how)
            for k, dtype in enumerate(DTYPES):
                for offset, of in ((0, shape), (1, odd)):
                    arrays = {**vector_arrays(loss, of, dtype), **row_numbers(of[:1], arithmetic(dtype))}
                    chosen = j in CHOSEN_VECTORS[variant]
                    level = int(not chosen) + (1 if k else 0) + (offset == j % 2)
                    none = {**options, "reduction": "none"}
                    first = loss.Class.vectors[0]
                    dead = arrays["sample_weight"] == 0
                    spoiled = {first: where(dead, arrays[first], np.nan)}
                    label = f"{variant} {dtype} {of} {options}"
                    yield Case(
                        label, loss, arrays, none, min(2, level), offset=offset, spoiled=spoiled, **given
                    )
            arrays = vector_arrays(loss, shape)
            level = 0 if variant != BLOCK and j == CHOSEN_VECTORS[variant][0] else 2 if variant != TEAM else 1
            yield Case(f"{variant} mean {options}", loss, arrays, options, level, **given)
            yield Case(f"{variant} in place {options}", loss, arrays, options, level, out="over", **given)
            one = loss.Class.vectors[-1:]
            yield Case(f"{variant} of one {options}", loss, arrays, options, 2, one, **given)
            if loss.Class._curved:
                more = {**options, "reduction": "sum"}
                arrays["sample_weight"] = row_numbers(shape[:1])["sample_weight"]
                level = 1 if variant == TEAM else 2
                yield Case(
                    f"{variant} hess {options}", loss, arrays, more, level, mode="value_grad_hess", **given
                )
            nan, row = {loss.Class.vectors[1]: vector_arrays(loss, shape)[loss.Class.vectors[1]].copy()}, 1
            nan[loss.Class.vectors[1]][row, 5] = np.nan
            # A NaN stays in its row.
            yield Case(
                f"{variant} NaN {options}", loss, vector_arrays(loss, shape),
                {**options, "reduction": "none"}, 1 if variant == TEAM else 2, mode="__call__",
                spoiled=nan, nan=np.arange(shape[0]) == row, **given,
            )  # fmt: skip
    for deal in range(6):
        arrays = vector_arrays(nl.triplet_margin_loss, (70, min(4 << deal, 40)))
        patches = {"vectors.plan": lambda *a, deal=deal: Plan(TEAM, 1, 32, deal, 1)}
        yield Case(f"teams of {1 << deal}", nl.triplet_margin_loss, arrays, {}, 1, patches=patches, error=8)
    for shape in ((1, 1), (5,), (70, 1), (3, 2), (3, 31), (33, 128), (2, 700), (1, 2500), (2, 5000)):
        for loss in (nl.cosine_embedding_loss, nl.triplet_margin_loss):
            # Of one coordinate a cosine is 1, and its gradient what rounding leaves.
            how = dict(level=1 if shape[-1] < 99 else 2, error=24 if shape[-1] > 1 else 999)
            yield Case(f"{shape}", loss, vector_arrays(loss, shape), **how)


# ---- sequences ----------------------------------------------------------------------------------------

# A thread has one state, or several; a sequence's lines are in shared memory, or in scratch if they are long.
ALIGNMENTS = {
    "one": Alignment(Launch(2, 64), 64, False, Launch(3, 64), 2),
    "several": Alignment(Launch(2, 32), 64, False, Launch(3, 64), 5),
    "memory": Alignment(Launch(2, 32), 16, True, Launch(2, 32), 0),
}
# Lengths of sequences and of their labels: none, one, tight, repeated, more frames than needed.
LENGTHS, COUNTS = [9, 1, 5, 7, 0, 12, 3], [3, 1, 0, 2, 0, 9, 1]


def sequence_arrays(
    lengths: list[int], counts: list[int], classes: int = 8, dtype: str = "float32", joined: bool = False,
    labels: Any = None, blank: int = 0,
) -> Arrays:  # fmt: skip
    rng = rng_of(lengths, counts, classes)
    frames = max(lengths, default=0) + 1
    x = log_softmax(2 * rng.standard_normal((frames, len(lengths), classes))).astype(DTYPES[dtype])
    others = [c for c in range(classes) if c != blank]
    labels = labels or [rng.choice(others, n) for n in counts]
    targets = np.concatenate([*labels, np.zeros(0, int)]).astype(np.int64)
    if not joined:
        targets = np.full((len(counts), max(counts, default=0) + 1), -7)  # what is after a list is not read
        for row, own in zip(targets, labels, strict=True):
            row[: len(own)] = own
    of: Arrays = {"input_lengths": np.array(lengths, np.int64), "target_lengths": np.array(counts, np.int64)}
    return {"log_probs": x, "targets": targets, **of}


def sequences() -> Iterator[Case]:
    loss = nl.ctc_loss
    tight = ([*LENGTHS, 2, 3, 0, 2, 0, 0], [*COUNTS, 3, 2, 2, 5, 0, 1])
    for name, plan in ALIGNMENTS.items():
        how: Any = dict(patches={"ctc.plan": lambda *a, plan=plan: plan}, error=16)
        for joined in (False, True):
            for blank in (0, 5):
                arrays = sequence_arrays(LENGTHS, COUNTS, joined=joined, blank=blank)
                options: Arrays = {"blank": blank, "reduction": "sum"}
                yield Case(f"{name} joined {joined} blank {blank}", loss, arrays, options, **how)
        yield Case(f"{name} in place", loss, arrays, options, out="over", **how)
        yield Case(f"{name} narrow", loss, arrays, options, level=1, out="narrow", **how)
        yield Case(f"{name} added", loss, arrays, options, level=1, out="added", **how)
        for zero in (True, False):
            arrays = {**sequence_arrays(*tight), **row_numbers((13,))}
            arrays["targets"][8, :2] = 4  # what separates equal labels
            spoiled = arrays["log_probs"].copy()
            for n, length in enumerate(arrays["input_lengths"]):
                spoiled[length:, n] = np.nan
            spoiled[:, arrays["sample_weight"] == 0] = np.nan
            options = {"zero_infinity": zero, "reduction": "none"}
            mode = "value_and_grad" if zero else "__call__"
            yield Case(
                f"{name} infeasible, zero_infinity {zero}", loss, arrays, options,
                level=int(not zero or name != "memory"), mode=mode, spoiled={"log_probs": spoiled}, **how,
            )  # fmt: skip
        for labels in ([1, 1], [1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 1], [3, 3, 1, 1, 3, 3], [2, 1, 2, 1, 2]):
            own = [np.array(labels), np.array(labels[::-1])]
            arrays = sequence_arrays([12, 2 * len(labels)], [len(labels)] * 2, 4, labels=own)
            level = int(len(labels) < 6)
            yield Case(f"{name} {labels}", loss, arrays, {"reduction": "sum"}, level=level, **how)
        for k, dtype in enumerate(DTYPES):
            for classes, offset in ((16, 0), (7, 1)):
                arrays = {**sequence_arrays([9, 11, 4], [3, 5, 1], classes, dtype), **row_numbers((3,))}
                arrays = {
                    n: a.astype(arithmetic(dtype)) if n in ROW_NUMBERS else a for n, a in arrays.items()
                }
                level = int(k > 0 or name != "memory")
                yield Case(
                    f"{name} {dtype} {classes}", loss, arrays,
                    {"reduction": "none", "zero_infinity": True}, level=level, offset=offset,
                    patches=how["patches"], error=32 if k < 2 else 2e4 if k == 2 else 2e5,
                )  # fmt: skip
        arrays = sequence_arrays([5, 3, 4], [2, 1, 2], 4)
        yield Case(f"{name} mean", loss, arrays, level=1, reference=through_softmax, **how)
        yield Case(f"{name} value", loss, arrays, mode="__call__", level=1, **how)
        yield from wrong_sequences(name, how)
    arrays = sequence_arrays([9, 9], [3, 4])
    arrays["targets"][1, 2] = 0
    patches = {"ctc.plan": lambda *a: ALIGNMENTS["one"]}
    yield Case("a label that is the blank", loss, arrays, {"reduction": "sum"}, error=16, patches=patches)
    for lengths, counts in (([40], [17]), ([3] * 20, [1] * 20), ([90, 80], [33, 40]), ([6], [2])):
        for joined in (False, True):
            arrays = sequence_arrays(lengths, counts, 5, joined=joined)
            level = 1
            yield Case(
                f"{lengths} joined {joined}", loss, arrays, {"reduction": "sum"}, level=level, error=64
            )
    yield Case("a long sequence", loss, sequence_arrays([300], [40], 6), {"reduction": "sum"}, 2, error=1e3)


ROW_NUMBERS = "sample_weight", "grad_output"


def through_softmax(log_probs: np.ndarray, **given: Any) -> Any:
    """The reference of what `log_softmax` makes of scores, whose derivative a gradient is."""
    return reference.ctc_loss(log_softmax(log_probs), **given)


def wrong_sequences(name: str, how: Any) -> Iterator[Case]:
    """Lengths and labels out of range: the sequence is NaN, and the others are as they were."""
    arrays = {
        **sequence_arrays([9, 8, 7, 10], [3, 4, 2, 1]),
        **row_numbers((4,)),
        "sample_weight": np.ones(4, "f4"),
    }
    at = np.arange(4) == 2
    for what, worst in (
        ("input_lengths", (-1, 12, BIG)), ("target_lengths", (-1, 6, BIG)), ("targets", (-1, 8, 2**60)),
    ):  # fmt: skip
        for bad in worst:
            spoiled = arrays[what].copy()
            spoiled[(2, 1) if what == "targets" else 2] = bad
            raised: Any = (
                (IndexError, "for sequence 2") if what == "targets" else (ValueError, rf"{what}\[2\] must")
            )
            yield Case(
                f"{name} {what} of {bad}", nl.ctc_loss, arrays, {"reduction": "none"},
                spoiled={what: spoiled}, nan=at, mode="__call__",
                level=int(bad == -1 or name != "memory"), raises=raised, **how,
            )  # fmt: skip


FAMILIES = elementwise, scores, picks, margins, vectors, sequences


def cases(*families: Any) -> Iterator[Case]:
    """All cases of families, or of all; of what a sweep could run it does some, picked by their names."""
    for family in families or FAMILIES:
        for c in family():
            rare = c.level == 1 and zlib.crc32(str(c).encode()) % 12
            yield replace(c, level=2) if rare or c.level > 2 else c
