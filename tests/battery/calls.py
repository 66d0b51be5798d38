"""Calls drawn at random, good and malformed, of every loss in every declared way.

A call ends in a right result or in a declared error that names the loss. No input is written but one that was
given as `out`, and that one only by a call that succeeds; an `out` that is no input may be written by a call
that finds an element out of its domain. Right is what the float64 reference says of the value, and of the
gradient what the library says of the same numbers as plain float64 arrays: those are compared with
differences elsewhere.

    python -m tests.battery.calls [--seed 0] [--first 0] [--count 1000] [LOSS ...]

The arrays of many calls end at a page that may not be touched. Call k of a seed is always the same, so one
that went wrong can be repeated alone: ``--first k --count 1``.
"""

import argparse
import faulthandler
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.bench.cases import casted, family_of
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.families.scores import ScoreLoss
from numbaloss.families.vectors import VectorLoss
from numbaloss.kernels.layout import class_axis
from numbaloss.kernels.spec import common_dtype

from . import Tally, Trial
from .guard import guarded

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

DTYPES = [np.dtype(d) for d in (np.float32, np.float64, np.float16)] + BFLOAT16
ROOT = Path(__file__).parents[2]
ROWS = (7, 19), (33, 4), (2, 70), (1, 1), (6, 2, 5), (3, 0)
SHAPES = {
    "sequence": [(8, 3, 5, 3), (4, 1, 3, 1), (1, 2, 4, 1), (30, 2, 6, 9), (3, 2, 4, 0)],
    "linear": [(5, 4, 7), (1, 1, 1), (40, 3, 30), (3, 20, 2), (0, 4, 3)],
}
DECLARED = TypeError, ValueError, IndexError
OUT_OF_DOMAIN = re.compile(r"must be (in|>=) .*, got \w+(\[.*\])? = ")
FLOAT32_MAX = float(np.finfo(np.float32).max)
SAME = 25  # calls of one form, for each is compiled
MODES = "value", "grad", "value_and_grad", "value_grad_hess"


@dataclass
class Call:
    """A call that is drawn: a loss, a mode, its arguments by name, and in what it was spoiled."""

    loss: Any
    mode: str
    by_class: bool
    arguments: dict[str, Any]
    spoiled: dict[str, str] = field(default_factory=dict)  # what is odd, by the argument's name
    refused: set[str] = field(default_factory=set)  # those that no call may take
    ranks: dict[str, Any] = field(default_factory=dict)  # `comm` and `classes`

    def __str__(self) -> str:
        def said(value: Any) -> str:
            if isinstance(value, np.ndarray):
                return f"{value.dtype}{list(value.shape)}"
            return f"({', '.join(map(said, value))})" if isinstance(value, tuple) else repr(value)[:60]

        given = ", ".join(f"{n}={said(v)}" for n, v in self.arguments.items())
        form = "class " * self.by_class
        odd = ", ".join(f"{n} {how}" for n, how in self.spoiled.items()) or "not spoiled"
        ranks = "".join(f", {n}={v if n == 'classes' else 'two'}" for n, v in self.ranks.items())
        return f"{form}{self.loss.__name__}.{self.mode}({given}{ranks}); {odd}"

    def run(self) -> tuple[Any, ...]:
        """Make the call; the value and what else it gives, None where the mode gives none."""
        given = dict(self.arguments)
        made = self.loss
        if self.by_class:
            fields = self.loss.Class.fields
            options = [n for n in given if n in fields and not fields[n].call_only]
            made = self.loss.Class(**{n: given.pop(n) for n in options})
        function = made if self.mode == "value" else getattr(made, self.mode)
        found = function(**given, **self.ranks)
        if self.mode == "value":
            return found, None
        return (None, found) if self.mode == "grad" else found


# ---- good calls -------------------------------------------------------------------------------------------


def draw(form: random.Random, k: random.Random, losses: list[str] | None = None, spoils: int = 2) -> Call:
    """Draw a call, and spoil it in up to so many ways; by `form` all of which kernels depend.

    Calls of one form differ in numbers, extents, layouts, and in how they are spoiled.
    """
    loss = nl.registry[form.choice(losses or sorted(nl.registry))]
    cls = loss.Class
    rng = np.random.default_rng(k.getrandbits(32))
    dtype = form.choice(DTYPES)
    arrays = casted(family_of(loss).draw(loss, rng, k.choice(shapes_of(loss))), dtype)
    fields = dict(cls.fields)
    if loss is nl.cross_entropy and form.random() < 0.4:  # alone can be had of probabilities
        arrays["target"] = rng.uniform(0, 1, arrays["input"].shape).astype(dtype)
        del fields["ignore_index"]
    given: dict[str, Any] = dict(arrays)
    for name, f in fields.items():
        if f.array:
            if form.random() < 0.3:
                given[name] = array_option(loss, name, arrays, rng).astype(dtype)
        elif f.samples and form.random() < 0.4:
            given[name] = form.choice(f.samples)
    try:
        cls._check_options({n: given.get(n, f.default) for n, f in cls.fields.items()})
    except ValueError:  # two options that don't go together
        given = {n: v for n, v in given.items() if n not in cls.fields or cls.fields[n].array}
    by_class = k.random() < 0.3 and loss is not nl.linear_cross_entropy  # whose class holds its weight
    call = Call(loss, form.choice(MODES[: 4 if cls._curved else 3]), by_class, given)
    terms = np.shape(reference_of(call)(reduction="none"))
    if form.random() < 0.3:
        of = k.choice([terms, terms[-1:], (1,) * len(terms)])
        given["sample_weight"] = np.where(rng.random(of) < 0.2, 0, rng.uniform(0.5, 2, of)).astype(dtype)
    if k.random() < 0.2 and given.get("reduction", "mean") in ("mean", "batchmean"):
        given["normalizer"] = k.choice([3, 0.5, np.float32(2)])
    if call.mode != "value":
        gradients(call, terms, form, rng, dtype)
    for name in [n for n, v in given.items() if isinstance(v, np.ndarray) and n != "out"]:
        if k.random() < 0.5:
            given[name] = k.choice(LAYOUTS)(given[name])
    if call.mode != "value" and k.random() < 0.4:
        call.arguments["out"] = out = out_for(call, k)
        new = [
            o for o in (out if isinstance(out, tuple) else (out,)) if not any(o is v for v in given.values())
        ]
        if len(new) == (len(out) if isinstance(out, tuple) else 1) and k.random() < 0.2:
            given["accumulate"] = True  # zeros are added to
    if form.random() < 0.15:
        call.ranks = {"comm": Beside()}
        labels = "target" in given and given["target"].dtype.kind in "iu"
        shares = labels and cls._shares_classes and issubclass(cls, ScoreLoss) and given["input"].ndim
        if shares and call.mode != "value_grad_hess" and wrt_of(call) == ("input",) and form.random() < 0.7:
            call.ranks["classes"] = 0, given["input"].shape[class_axis(given["input"].shape)]
    for _ in range(k.randint(0, spoils)):
        k.choice(SPOILS)(call, k, rng)
    return call


class Beside:
    """The first of two ranks, of which the other has no rows, or no classes: results are its own."""

    rank, size = 0, 2

    def all_reduce(self, buffer: np.ndarray, op: str = "sum", stream: Any = None) -> None:
        buffer[1:3] *= 2  # it says the same of its options

    def all_gather(self, buffer: np.ndarray, out: np.ndarray, stream: Any = None) -> None:
        out[0], out[1] = buffer, (-np.inf, 0, 0, 0)
        out[1, 0, :2] = buffer[0, 1]


def shapes_of(loss: Any) -> list[tuple[int, ...]]:
    """Shapes to draw the arrays of a loss for, as its family in `bench.cases` takes them."""
    family = family_of(loss).name
    if family in SHAPES:
        return SHAPES[family]
    own = [s for s in loss.Class._shapes if s or family == "elementwise"]
    return own + [s for s in ROWS if family == "elementwise" or (len(s) == 2 and all(s))]


def array_option(loss: Any, name: str, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw an option that is an array: of elements, or of classes."""
    if name == "linear_bias":
        shape = arrays["linear_weight"].shape[:-1]
    elif issubclass(loss.Class, ElementwiseLoss):
        if name in loss.Class.operands:
            return loss.Class.operands[name].draw(rng, arrays["input"].shape)
        shape = arrays["input"].shape
    elif loss is nl.linear_cross_entropy:
        shape = arrays["linear_weight"].shape[:1]
    else:
        x = arrays["input"]
        shape = x.shape if loss is nl.multilabel_soft_margin_loss else x.shape[class_axis(x.shape) :][:1]
    return rng.uniform(0.25, 2, shape)


def gradients(call: Call, terms: tuple[int, ...], form: random.Random, rng: Any, dtype: np.dtype) -> None:
    """Draw what only calls for a gradient take."""
    given, cls = call.arguments, call.loss.Class
    names = [n for n in cls._differentiable() if isinstance(given.get(n), np.ndarray)]
    names = [n for n in names if given[n].dtype.kind not in "iu"]
    if "ignore_index" in cls.fields and given["target"].dtype.kind in "iu" and "weight" in names:
        names.remove("weight")  # differentiated where the target holds probabilities
    if call.mode == "value_grad_hess":
        given["wrt"] = form.choice(cls._default_wrt() if isinstance(cls._default_wrt(), tuple) else ["input"])
    elif form.random() < 0.4:  # few of all subsets: each is compiled
        some = form.choice([[form.choice(names)], names])
        given["wrt"] = some[0] if len(some) == 1 and form.random() < 0.5 else tuple(some)
    if call.mode == "value_grad_hess" and issubclass(cls, ElementwiseLoss | ScoreLoss):
        if form.random() < 0.3:
            given["curvature"] = form.choice(["absolute", "gradient"])
        if form.random() < 0.2:
            given["floor"] = form.choice([0, 0.25, np.float32(2)])
    if form.random() < 0.3:
        each = given.get("reduction") == "none" and form.random() < 0.7
        given["grad_output"] = (
            rng.normal(size=terms).astype(dtype) if each else form.choice([2.5, -1, np.float32(0.5)])
        )


def wrt_of(call: Call) -> tuple[str, ...]:
    wrt = call.arguments.get("wrt")
    wrt = call.loss.Class._default_wrt() if wrt is None else wrt
    return (wrt,) if isinstance(wrt, str) else tuple(wrt) if isinstance(wrt, list | tuple) else ()


def own(array: np.ndarray) -> np.dtype:
    return array.dtype.newbyteorder("=")


def narrower(dtype: np.dtype) -> list[np.dtype]:
    """The dtypes that a gradient may have."""
    floats = [np.dtype(d) for d in (np.float64, np.float32, np.float16)]
    return [dtype.newbyteorder("="), *(d for d in floats if d.itemsize < dtype.itemsize)]


def out_for(call: Call, k: random.Random) -> Any:
    """Arrays for the gradients: new ones in some layout, or the arguments themselves."""

    def one(name: str) -> np.ndarray:
        like = call.arguments[name]
        writable = (
            like.flags.writeable and like.flags.aligned and 0 not in like.strides and like.dtype.isnative
        )
        if writable and k.random() < 0.5:
            return like
        return k.choice([plain, fortran, every_second, at_the_end])(
            np.zeros(like.shape, k.choice(narrower(like.dtype)) if k.random() < 0.3 else own(like))
        )

    made = tuple(one(n) for n in wrt_of(call))
    if call.mode == "value_grad_hess":
        like = call.arguments[wrt_of(call)[0]]
        return (*made, np.zeros(like.shape, own(like)))
    wrt = call.arguments.get("wrt", call.loss.Class._default_wrt())
    return made[0] if isinstance(wrt, str) else made


# ---- layouts ----------------------------------------------------------------------------------------------


def plain(a: np.ndarray) -> np.ndarray:
    return a.copy()


def fortran(a: np.ndarray) -> np.ndarray:
    return a.copy(order="F")


def every_second(a: np.ndarray) -> np.ndarray:
    wide = np.zeros((*a.shape, 2), a.dtype)
    wide[..., 1] = a
    return wide[..., 1]


def backwards(a: np.ndarray) -> np.ndarray:
    return a[::-1].copy()[::-1] if a.ndim else a


def turned(a: np.ndarray) -> np.ndarray:
    """Axes in another order in memory."""
    axes = tuple(range(a.ndim))[::-1]
    axes = axes[1:] + axes[:1]
    return np.ascontiguousarray(a.transpose(axes)).transpose(np.argsort(axes)) if a.ndim else a


def repeated(a: np.ndarray) -> np.ndarray:
    """One element that stands for all: strides of zero."""
    return np.broadcast_to(a.reshape(-1)[0], a.shape) if a.size else a


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
    raw = raw[: a.nbytes].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


def at_the_end(a: np.ndarray) -> np.ndarray:
    return guarded(a)


def at_the_start(a: np.ndarray) -> np.ndarray:
    return guarded(a, before=True)


def turned_at_the_end(a: np.ndarray) -> np.ndarray:
    return guarded(a.T.copy()).T


LAYOUTS: list[Callable[[np.ndarray], np.ndarray]] = [
    *(fortran, every_second, backwards, turned, repeated, read_only, unaligned),
    *(at_the_end, at_the_end, at_the_start, turned_at_the_end),
]


# ---- spoiled calls ----------------------------------------------------------------------------------------


def some_array(call: Call, k: random.Random, kinds: str = "iuf") -> str | None:
    """Pick the name of an array argument, not of `out`."""
    found = [
        n
        for n, v in call.arguments.items()
        if isinstance(v, np.ndarray)
        and n != "out"
        and ("f" if v.dtype.kind in "fV" else v.dtype.kind) in kinds
    ]
    return k.choice(found) if found else None


FURTHER = "an element further than its argument"


def put(call: Call, name: str, value: Any, how: str, must_fail: bool = False) -> None:
    call.arguments[name] = value
    call.spoiled[name] = how
    if call.spoiled.get("out") == FURTHER and name != "out":
        call.refused.discard("out")  # it may overlap nothing now
    (call.refused.add if must_fail else call.refused.discard)(name)


def bad_option(call: Call, k: random.Random, rng: Any) -> None:
    bad = [(n, b[0]) for n, f in call.loss.Class.fields.items() for b in f.bad]
    if bad:
        name, value = k.choice(bad)
        put(call, name, value, "out of its domain", must_fail=True)


def odd_option(call: Call, k: random.Random, rng: Any) -> None:
    """Numbers of another kind, or infinite: some are taken."""
    names = [n for n, f in call.loss.Class.fields.items() if not f.array]
    odd: list[Any] = [None, True, "mean", b"mean", 1j, 10**400, -(2**70), 2**12, np.inf, np.nan, [1.0]]
    odd += [np.ones(2), np.float16(0.5), np.int8(1), np.array(1.5), object(), {}, lambda: 1, 1e-30, -0.0]
    put(call, k.choice(names), k.choice(odd), "of an odd kind")


def unknown(call: Call, k: random.Random, rng: Any) -> None:
    put(call, k.choice(["size_average", "inputs", "axis", "wrt_"]), 1, "is no argument", must_fail=True)


def missing(call: Call, k: random.Random, rng: Any) -> None:
    name = k.choice(call.loss.Class._required)
    call.arguments.pop(name, None)
    call.spoiled[name] = "left out"
    call.refused.add(name)


def other_shape(call: Call, k: random.Random, rng: Any) -> None:
    name = some_array(call, k)
    if name:
        a = call.arguments[name]
        flat = a.reshape(-1)
        shapes = [a[None], a[..., None], flat, a.T, flat[:1], np.concatenate([flat, flat])]
        shapes += [a[:-1], a[..., :-1], a[:0]] if a.ndim else []
        put(call, name, k.choice(shapes), "of another shape")


KINDS = (
    *("bool", "int8", "uint8", "int64", "uint64", ">i4", "float16", "float32", "float64", "longdouble"),
    *(">f4", ">f8", "complex", "object", "U8", "S3", "M8[s]"),
)


def other_dtype(call: Call, k: random.Random, rng: Any) -> None:
    name = some_array(call, k)
    if name:
        a = call.arguments[name]
        kind = np.dtype(k.choice(KINDS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NaN as an integer
            wide = a.astype(np.int64) if kind.kind == "M" else a.astype(float) if a.dtype.kind == "V" else a
            put(call, name, wide.astype(kind), f"as {kind}")


class Subclass(np.ndarray):
    """An array of another class, as `np.memmap` is one."""


def other_kind(call: Call, k: random.Random, rng: Any) -> None:
    name = some_array(call, k)
    if name:
        a = call.arguments[name]
        kinds = [a.tolist(), None, "array", 3, 0.5, np.ma.masked_array(a), a.view(Subclass)]
        kinds += [memoryview(b"abc"), {1: 2}, range(3), a[()] if a.ndim == 0 else [a], object(), iter([1.0])]
        put(call, name, k.choice(kinds), "of another kind")


def bad_label(call: Call, k: random.Random, rng: Any) -> None:
    """One index out of range, or a length: an error, or a row that does not count."""
    name = some_array(call, k, "iu")
    if name and call.arguments[name].size:
        a = call.arguments[name].copy()
        low, high = (np.iinfo(a.dtype).min, np.iinfo(a.dtype).max)
        label = k.choice([-1, -7, -100, 1_000_000, low, high, int(a.max()) + 20, 70, 19, 4])
        a.flat[k.randrange(a.size)] = label if low <= label <= high else high
        put(call, name, a, "with a label out of range")


def hard_number(call: Call, k: random.Random, rng: Any) -> None:
    name = some_array(call, k, "f")
    if name == "weight" and is_labels(call):
        return  # of classes: one that is not finite is in the mean's divisor, whatever it multiplies
    if name and call.arguments[name].size:
        a = call.arguments[name].copy()
        number = k.choice([float("nan"), float("inf"), -float("inf"), -0.0, 1e4, -1e4, 1e-7, 1.5, -0.5])
        if name == "log_probs" and not number <= 0:
            number = -1e4  # the logarithm of no probability
        a.flat[k.randrange(a.size)] = number
        put(call, name, a, f"with {number}")


def bad_out(call: Call, k: random.Random, rng: Any) -> None:
    """Give an `out` that cannot take the gradient."""
    name = next(iter(wrt_of(call)), "input") if call.mode != "value" else ""
    like = call.arguments.get(name) if isinstance(name, str) else None
    if not isinstance(like, np.ndarray):
        return put(call, "out", np.zeros(3), "for no gradient", must_fail=True)
    shape, dtype = like.shape, like.dtype.newbyteorder("=")
    fine = np.zeros(shape, dtype)
    bad: list[Any] = [np.zeros((*shape, 1), dtype), np.zeros(shape, np.int32), np.zeros(shape, complex)]
    bad += [read_only(fine), np.ma.masked_array(fine), fine.tolist(), "out", 7, [], (), (None,) * 5]
    if like.size > 1 and like.dtype.isnative and like.dtype.kind != "O":
        bad += [repeated(fine), unaligned(fine)]
        if k.random() < 0.2:  # an element further than the argument
            both = np.concatenate([like.reshape(-1), like.reshape(-1)[:1]])
            call.arguments[name] = both[:-1].reshape(shape)
            return put(call, "out", both[1:].reshape(shape), FURTHER, must_fail=True)
    put(call, "out", k.choice(bad), "that cannot take the gradient", must_fail=True)


def bad_wrt(call: Call, k: random.Random, rng: Any) -> None:
    if call.mode != "value":
        first = call.loss.Class._required[0]
        odd: list[Any] = ["reduction", "nonsense", (), (first, first), 3, ("nonsense", first), b"input", [[]]]
        put(call, "wrt", k.choice(odd), "that names no argument", must_fail=True)


def bad_weight(call: Call, k: random.Random, rng: Any) -> None:
    """Weights and upstream gradients of odd kinds: some are taken."""
    name = k.choice(["sample_weight", "grad_output", "normalizer"])
    if name == "grad_output" and call.mode == "value":
        return
    odd: list[Any] = ["1", np.nan, np.inf, 0, -2, True, None, 2.5, [1.0], np.ones(()), np.ones(3)]
    odd += [1j, object(), 10**400, np.float64(1e300)]
    odd += [np.ones(0), np.ones((7, 1)), np.zeros(19), np.ones((2, 3, 4, 5))]
    put(call, name, k.choice(odd), "of an odd kind")


SPOILS: list[Callable[..., None]] = [
    *(bad_option, odd_option, unknown, missing, other_shape, other_dtype, other_kind),
    *(bad_label, bad_label, hard_number, hard_number, bad_out, bad_wrt, bad_weight),
]


# ---- what is right ----------------------------------------------------------------------------------------


OF_GRADIENTS = "wrt", "out", "accumulate", "grad_output", "curvature", "floor"


def reference_of(call: Call) -> Callable[..., Any]:
    given = {n: v for n, v in call.arguments.items() if n not in OF_GRADIENTS}
    function = getattr(reference, call.loss.__name__)
    return lambda **instead: function(**{**given, **instead})


def kept(value: Any) -> Any:
    """Bytes of an argument, to see whether it was written."""
    return value.tobytes() if isinstance(value, np.ndarray) and value.dtype != object else None


def canonical(call: Call) -> Call:
    """The same numbers in plain float64 arrays, with no `out`; infinite where they are so in float32."""
    arguments = {}
    for name, value in call.arguments.items():
        if name in UNPROMOTED and isinstance(value, float) and abs(value) > FLOAT32_MAX:
            value = value if result_dtype(call) == np.float64 else np.copysign(np.inf, value)
        labels = name == "targets" and type(value) is list  # an empty one is of integers, too
        if isinstance(value, np.ndarray | list | np.generic) and name not in ("out", "wrt") and not labels:
            value = np.asarray(value)
            if name in call.loss.Class.fields and not call.loss.Class.fields[name].array:
                value = call.arguments[name]  # the reference would compute in a half's precision
                value = value.item() if isinstance(value, np.floating) else value
            elif value.dtype.kind in "fV" or name in ("sample_weight", "grad_output", "weight", "pos_weight"):
                value = value if value.dtype.kind in "OUSMc" else np.array(value, np.float64)
            elif value.dtype.kind in "iub" and name in ("target", "targets") and not is_labels(call):
                value = np.array(value, np.float64)
            else:
                value = np.array(value)
        if name not in ("out", "accumulate"):
            arguments[name] = value
    return Call(call.loss, "value_and_grad" if call.mode == "grad" else call.mode, False, arguments)


def is_labels(call: Call) -> bool:
    return not issubclass(call.loss.Class, ElementwiseLoss | VectorLoss)


def near(got: Any, wanted: Any, dtype: Any, size: float) -> bool:
    """Whether a result is right to its dtype, beside terms of a size."""
    got, wanted = np.asarray(got).astype(np.float64), np.asarray(wanted).astype(np.float64)
    if got.shape != wanted.shape:
        return False
    narrow = testing.finfo(dtype) if dtype != np.float64 else np.finfo(np.float64)
    arithmetic = np.finfo(np.float64 if dtype == np.float64 else np.float32)
    with np.errstate(all="ignore"):
        bound = 4096 * float(arithmetic.eps) * (np.abs(wanted) + size) + 2 * float(narrow.eps) * np.abs(
            wanted
        )
        bound = bound + 2 * float(narrow.smallest_subnormal)
        beyond = np.abs(wanted) + bound > float(narrow.max)  # infinite there, or not quite
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted)) | (np.abs(got - wanted) <= bound) | beyond
    return bool(same.all())


def judge(call: Call) -> str | None:
    """Make a call; None where it ended as it should, else what was lost."""
    arrays = {n: v for n, v in call.arguments.items() if isinstance(v, np.ndarray)}
    outs = call.arguments.get("out")
    outs = outs if isinstance(outs, tuple | list) else (outs,)
    outs = [o for o in outs if isinstance(o, np.ndarray)]
    before = {n: kept(v) for n, v in arrays.items()}
    plain_call = canonical(call)  # before an input is overwritten
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = call.run()
            error = None
        except DECLARED as e:
            found, error = (), e
        except Exception as e:
            return f"undeclared {type(e).__name__}: {e}"
    inputs = [v for n, v in arrays.items() if n != "out"]
    for n, v in arrays.items():
        may_write = any(v is o or np.may_share_memory(v, o) for o in outs)
        if error is not None:  # an element out of its domain is found in the pass that writes
            apart = not any(np.may_share_memory(v, i) for i in inputs)
            may_write = n == "out" and apart and OUT_OF_DOMAIN.search(str(error)) is not None
        if kept(v) != before[n] and not may_write:
            return f"{n} was written" + (" by a call that failed" if error else "")
    if error is not None:
        if not call.spoiled:
            return f"refused: {error}"
        names = call.loss.__name__, call.loss.Class.__name__
        return None if any(n in str(error) for n in names) else f"an error that names no loss: {error!r}"
    if call.refused:
        return "taken, which must be refused"
    return compare(call, plain_call, found)


def compare(call: Call, plain_call: Call, found: tuple[Any, ...]) -> str | None:
    """Compare a result with the reference, and with the library's own of plain float64 arrays."""
    reduction = call.arguments.get("reduction", "mean")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            terms = reference_of(plain_call)(reduction="none")
            wanted = reference_of(plain_call)()
    except Exception as e:
        return f"taken, which the reference can't do: {e!r}"
    finite = np.abs(terms)[np.isfinite(terms)]
    size = float(finite.max(initial=1.0)) * (max(finite.size, 1) if reduction == "sum" else 1)
    dtype = result_dtype(call)
    if found[0] is not None:
        if np.asarray(found[0]).dtype != dtype:
            return f"value of {np.asarray(found[0]).dtype} in place of {dtype}"
        if not near(found[0], wanted, dtype, size):
            return f"value {found[0]!r} in place of {wanted!r}"
    if call.mode == "value":
        return None
    try:
        expected = plain_call.run()
    except DECLARED as e:
        return f"taken, but refused as plain float64: {e}"
    for got, want in zip(found[1:], expected[1:], strict=True):
        several = isinstance(got, tuple)
        for g, w in zip(got if several else (got,), want if several else (want,), strict=True):
            slope = np.abs(w)[np.isfinite(w)].max(initial=1.0)
            if not near(g, w, g.dtype, float(slope)):
                return f"gradient {g!r} in place of {w!r}"
    return None


UNPROMOTED = "out", "wrt", "grad_output", "normalizer", "floor", "targets"


def result_dtype(call: Call) -> np.dtype:
    """The dtype of the value: that of the floating arrays' promotion."""
    fields = call.loss.Class.fields
    unpromoted = *UNPROMOTED, *getattr(call.loss.Class, "labels", ())
    names = [n for n in call.arguments if n not in unpromoted and (n not in fields or fields[n].array)]
    wrt = () if call.mode == "value" else wrt_of(call)
    strong = call.loss.Class._required[0], *wrt  # what is differentiated is an array, a number too
    kinds = [call.arguments[n] for n in names if n in strong or type(call.arguments[n]) is not float]
    kinds = [v for v in kinds if isinstance(v, np.ndarray | float | np.floating | list)]
    floats = [np.asarray(a).dtype for a in kinds if np.asarray(a).dtype.kind in "fV"]
    return common_dtype([d.newbyteorder("=") for d in floats])


def tried_apart(share: float, count: int, checked: bool) -> Tally:
    """Make calls in processes of their own, one for each core: one that dies says at which call."""
    count, cores = max(1, round(count * share)), min(4, os.cpu_count() or 1)
    tally = Tally()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(cores) as pool:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if checked:
            environment |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": f"{place}/cache"}

        def run(seed: int) -> None:
            at = Path(place, str(seed))
            command = [sys.executable, "-m", f"{__package__}.calls", "--seed", str(seed), "--at", str(at)]
            command += ["--count", str(-(-count // cores))]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            *lines, last = done.stdout.splitlines() or [""]
            tally.tried += int(at.read_bytes() or 0) + 1 if at.exists() else 0
            tally.lost += [f"seed {seed}, {line}" for line in lines]
            if done.returncode not in (0, 1) or not last.endswith("lost"):
                reached = at.read_text() if at.exists() else "none"
                tally.lost.append(
                    f"seed {seed} ended at call {reached}: {done.returncode}: {done.stderr[-1000:]}"
                )

        list(pool.map(run, range(cores)))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.battery.calls", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("losses", nargs="*", choices=[*nl.registry, []])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at", type=Path, help="a file to keep the number of the current call in")
    options = parser.parse_args()
    faulthandler.enable()
    lost = 0
    with (options.at or Path(os.devnull)).open("wb", buffering=0) as at:
        for k in range(options.first, options.first + options.count):
            os.pwrite(at.fileno(), b"%d" % k, 0)
            form = random.Random(f"{options.seed}, form {k // SAME}")
            call = draw(form, random.Random(f"{options.seed}-{k}"), options.losses)
            wrong = judge(call)
            lost += wrong is not None
            if wrong or options.count == 1:
                print(" ".join(f"{k}: {wrong}: {call}".split()), flush=True)
    print(f"{options.count} calls, {lost} lost")
    return int(lost > 0)


TRIALS = [
    Trial("calls, good and malformed", partial(tried_apart, count=100_000, checked=False)),
    Trial("the same, every index checked", partial(tried_apart, count=20_000, checked=True)),
]

if __name__ == "__main__":
    sys.exit(main())
