"""Nanoseconds an element of each loss, beside the least that its own mathematics and its memory take.

    python -m numbaloss.bench.roofline [LOSS ...] [--markdown FILE]

Measures the primitives (exponential, logarithm, division, square root, matrix product, copy) on one thread,
compiled as the kernels are, in cache; then ``value_and_grad`` of about 40,000 elements, which stay in cache.
A loss cannot be faster than the primitives that its value and gradient need (`WORK`), nor than a copy of as
many bytes; the larger of the two is its roofline. The fixed cost of a call, that of one row, is taken off.
PyTorch's forward and backward pass is measured beside, on one thread and on all.
"""

import statistics
import warnings
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import binding as llvm
from numba import njit

import numbaloss as nl
from numbaloss.kernels import math
from numbaloss.kernels.cpu.target import LOOP, prefer_widest_vectors
from numbaloss.kernels.cpu.target import interleave as interleave_vectors

from . import machine
from .cases import Case, Shape, dimensions, family_of
from .devices import HOST
from .measure import COPY, OURS, Side, interleave, plan
from .peers import PEERS
from .report import markdown, tables_of_losses
from .session import using

ELEMENTS = 8192  # of a primitive: two arrays of them stay in cache
SHAPES: dict[str, tuple[Shape, ...]] = {
    "elementwise": ((40_000,),),
    "classes": ((4000, 10), (400, 100), (40, 1000)),
    "margins": ((4000, 10), (400, 100), (40, 1000)),
    "vectors": ((2500, 16), (312, 128)),
    "sequence": ((50, 25, 32, 10),),
    "linear": ((200, 64, 200),),
}
# Scores of few classes, of middle ones, of many, and of images.
SCORES: tuple[Shape, ...] = ((2000, 10), (400, 100), (6000, 14), (40, 1000), (4, 19, 200, 200))
RUNS = 25  # samples of a side, at most
OVER = 1.5  # times its roofline, from which a loss is explained
WANTED, WANTED_OF_SCORES = 4.0, 3.0  # PyTorch's time over ours


class Work(NamedTuple):
    """Primitives of a value and its gradient: of each element, and of each row."""

    element: Mapping[str, float] = {}
    row: Mapping[str, float] = {}


SOFTPLUS = Work({"exp": 1, "log1p": 1, "divide": 1})  # and its slope, the sigmoid, of one exponential
SOFTMAX = {"exp": 1, "log1p": 1, "divide": 1}  # of a row, beside an exponential of each score

WORK = {
    "binary_cross_entropy": Work({"log": 1, "log1p": 1, "divide": 1}),
    "binary_cross_entropy_with_logits": SOFTPLUS,
    "soft_margin_loss": SOFTPLUS,
    "multilabel_soft_margin_loss": SOFTPLUS,
    "kl_div": Work({"log": 1}),
    "poisson_nll_loss": Work({"exp": 1}),
    "gaussian_nll_loss": Work({"log": 1, "divide": 1}),
    "smooth_l1_loss": Work({"divide": 1}),
    "cross_entropy": Work({"exp": 1}, SOFTMAX),
    "poly1_cross_entropy": Work({"exp": 1}, SOFTMAX),
    "focal_cross_entropy": Work({"exp": 1}, {"exp": 2, "log1p": 1, "log": 1, "divide": 1}),
    "generalized_cross_entropy": Work({"exp": 1}, {"exp": 2, "log1p": 1, "divide": 2}),
    "linear_cross_entropy": Work({"exp": 1, "product": 3}, SOFTMAX),
    "cosine_embedding_loss": Work({}, {"sqrt": 1, "divide": 2}),
    "contrastive_loss": Work({}, {"sqrt": 1, "divide": 1}),
    "triplet_margin_loss": Work({}, {"sqrt": 2, "divide": 2}),
    "triplet_margin_with_distance_loss": Work({}, {"sqrt": 2, "divide": 2}),
    # Of each class a frame: into the product of likelihoods, and back.
    "ctc_loss": Work({"exp": 1}),
}

# Why a loss takes longer than its roofline, as its assembly for AVX2 and its definition show.
SIMPLE = "no primitive: its sums, products, comparisons and weights, which a copy has not, fill the core"
REGISTERS = (
    "constants, partial sums and results in between exceed AVX2's sixteen registers: a quarter to a third of "
    "the loop's instructions go to the stack and back"
)
PASSES = (
    "a row is read for its maximum, copied, exponentiated, summed and scaled: five passes in cache for one "
    "exponential; one of few classes is transposed too, and has its own label, logarithm and division"
)
TWICE = (
    "each vector is read again for its gradient, which waits for the row's sums, square roots and divisions"
)
WHY = {
    **dict.fromkeys(("l1_loss", "mse_loss", "huber_loss", "smooth_l1_loss"), SIMPLE),
    **dict.fromkeys(("hinge_embedding_loss", "margin_ranking_loss"), SIMPLE),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"), REGISTERS),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss"), REGISTERS),
    **dict.fromkeys(("poisson_nll_loss", "gaussian_nll_loss"), REGISTERS),
    **dict.fromkeys(("cross_entropy", "focal_cross_entropy", "poly1_cross_entropy"), PASSES),
    **dict.fromkeys(("generalized_cross_entropy", "linear_cross_entropy"), PASSES),
    **dict.fromkeys(("cosine_embedding_loss", "contrastive_loss", "triplet_margin_loss"), TWICE),
    "triplet_margin_with_distance_loss": TWICE,
    "nll_loss": "a number a row: labels are checked, scores read and slopes put in their place one by one",
    "multi_margin_loss": "a hinge an element; a row's end, which is all of few classes, one number at a time",
    "multilabel_margin_loss": "a hinge for each pair of a label and a class of a row, not for each element",
    "ctc_loss": "two states a label and frame, forward and back, each with an exponential and a division",
}


def loop_over(function: Any) -> Any:
    """A loop that applies a function to each number, compiled as the kernels' are."""

    @njit(forceinline=True, **LOOP)
    def one(i, x, out):
        out[i] = function(x[i])

    @njit(**LOOP)
    def loop(x, out):
        prefer_widest_vectors()
        interleave_vectors(one, x.size, (x, out))

    return loop


PRIMITIVES = {
    "exp": math.exp,
    "log": math.log,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "divide": njit(**LOOP)(lambda x: 1 / x),
    "copy": njit(**LOOP)(lambda x: x),
}


@cache
def primitives(dtype: str) -> dict[str, float]:
    """Nanoseconds of each primitive beyond a copy's, of a number; and of a multiply and add in a product."""
    x = np.random.default_rng(0).uniform(0.1, 2, ELEMENTS).astype(dtype)
    out, side = np.empty_like(x), 256
    a = np.ones((side, side), dtype)
    into = np.empty_like(a)
    calls: dict[str, Any] = {n: partial(loop_over(f), x, out) for n, f in PRIMITIVES.items()}
    with using(1):
        calls["product"] = partial(np.matmul, a, a, out=into)
        for call in calls.values():
            call()
        times = interleave({n: Side(call, 31, 20) for n, call in calls.items()})
    ns = {n: statistics.median(t) * 1e9 / ELEMENTS for n, t in times.items()}
    net = {n: max(ns[n] - ns["copy"], 0.0) for n in PRIMITIVES}
    return net | {"copy": ns["copy"], "product": ns["product"] * ELEMENTS / side**3}


def medians(threads: int, calls: dict[str, Any], case: Case) -> dict[str, float]:
    """Seconds of each side, PyTorch's beside them where it has the loss, on so many threads."""
    with using(threads):
        peer = PEERS["torch"]
        torch = None if peer.missing() else peer.build(case, case.arrays())
        if torch is not None:
            calls["torch"] = torch
        sides = {n: s._replace(runs=min(s.runs, RUNS)) for n, s in plan(calls, {}, HOST, 1.0).items()}
        return {n: statistics.median(t) for n, t in interleave(sides).items()}


class Row(NamedTuple):
    """What was measured of a case: nanoseconds an element on one thread, and ratios."""

    case: Case
    ours: float
    mathematics: float
    memory: float
    torch: float | None  # over ours, on one thread
    torch_together: float | None  # the same on all

    @property
    def over(self) -> float:
        """Times its roofline."""
        return self.ours / max(self.mathematics, self.memory)


def mathematics(case: Case) -> float:
    """Nanoseconds an element of the primitives that a case needs."""
    work, cost = WORK.get(case.loss, Work()), primitives(case.dtype)
    elements = case.family.elements(case.shape)
    rows, of_each = case.shape[0], 1.0
    if case.family.name == "linear":  # of its scores, each of which is a product of features
        scores = rows * case.shape[2]
        of_each = scores / elements
        product = work.element["product"] * case.shape[1] * of_each * cost["product"]
        return (
            product + of_each * cost["exp"] + sum(n * cost[p] for p, n in work.row.items()) * rows / elements
        )
    return sum(n * cost[p] for p, n in work.element.items()) + (
        sum(n * cost[p] for p, n in work.row.items()) * rows / elements
    )


def measure(case: Case) -> Row:
    arrays = case.arrays()
    one = Case(case.loss, (1, *case.shape[1:]) if len(case.shape) > 1 else (1,), case.dtype)
    alone, together = (
        medians(count, {
            OURS: case.call(arrays),
            COPY: HOST.copier(case.traffic(arrays)),
            "one row": one.call(one.arrays()),
        }, case)
        for count in (1, numba.get_num_threads())
    )  # fmt: skip
    per = 1e9 / case.family.elements(case.shape)
    return Row(
        case,
        max(alone[OURS] - alone["one row"], 0.0) * per,
        mathematics(case),
        alone[COPY] * per,
        *(times["torch"] / times[OURS] if "torch" in times else None for times in (alone, together)),
    )


def ratio(value: float | None, wanted: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" + (f" ({wanted:g})" if wanted else "")


def table(rows: list[Row], wanted: float | None = None) -> str:
    return markdown(
        [
            "loss",
            "shape",
            "dtype",
            "ns",
            "mathematics",
            "memory",
            f"/ roofline ({OVER})",
            "torch, one",
            "torch",
        ],
        [
            [
                row.case.loss,
                dimensions(row.case.shape),
                row.case.dtype,
                f"{row.ours:.2f}",
                f"{row.mathematics:.2f}",
                f"{row.memory:.2f}",
                f"{row.over:.1f}",
                ratio(row.torch),
                ratio(row.torch_together, wanted),
            ]
            for row in rows
        ],
    )


def cpu_name() -> str:
    """What kernels are compiled for."""
    return numba.config.CPU_NAME or llvm.get_host_cpu_name()


def report(losses: list[str]) -> str:
    """The primitives and the losses, in Markdown."""
    warnings.simplefilter("ignore")  # PyTorch's, of kl_div's 'mean'
    costs = {d: primitives(d) for d in ("float32", "float64")}
    rows = [
        measure(Case(name, shape, dtype))
        for dtype in ("float32", "float64")
        for name in losses
        for shape in SHAPES[family_of(nl.registry[name]).name]
    ]
    parts = [
        machine.heading("torch"),
        f"Compiled for {cpu_name()}. PyTorch's time over ours: on one thread, and on all.\n",
        "### Primitives, nanoseconds a number beyond a copy's\n",
        markdown(
            ["dtype", *costs["float32"]], [[d, *(f"{c:.3f}" for c in costs[d].values())] for d in costs]
        ),
        "### Losses, nanoseconds an element\n",
        table(rows, WANTED),
    ]
    if "cross_entropy" in losses:
        scores = [measure(Case("cross_entropy", shape)) for shape in SCORES]
        parts += ["### Cross entropy, a fresh gradient\n", table(scores, WANTED_OF_SCORES)]
    explained = {r.case.loss: WHY.get(r.case.loss, "") for r in rows if r.over > OVER}
    parts += ["\n".join(f"- `{n}`: {why}." for n, why in explained.items())]
    return "\n".join(parts)


if __name__ == "__main__":
    tables_of_losses(__doc__, report, nl.registry)
