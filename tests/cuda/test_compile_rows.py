"""The kernels over rows compile with no GPU, within their registers; and how they are launched.

The tests compile a covering set; `pytest -m exhaustive` the whole product.
"""

import itertools
import re

import numpy as np
import pytest
from ptx.cases import SCORE_LOSSES, Cauchy, Scaled, Six, SumTriplet, contrastive
from sweeps import some, sweep
from test_compile import AMPERE, HOPPER, instructions

import numbaloss as nl
from numbaloss.kernels.cuda import binaries, copy, ctc, margins, nll, reduce, rows, softmax, vectors
from numbaloss.kernels.cuda.margins import MANY, ONE, SOFT
from numbaloss.kernels.cuda.rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, Plan
from numbaloss.kernels.cuda.target import storage
from numbaloss.kernels.spec import (
    CODES,
    COSINE,
    FLOAT64,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SUM,
    Distance,
    ScoreFunctions,
)
from numbaloss.losses.embedding import CosineEmbeddingLoss, TripletMarginLoss
from numbaloss.losses.multiclass import CrossEntropyLoss

PLANS = {
    TEAM: Plan(TEAM, 1, 256, 3, 1),
    BLOCK: Plan(BLOCK, 1, 512, 0, 1),
    STREAM: Plan(STREAM, 1, 256, 0, 1),
    SPLIT: Plan(SPLIT, 1, 256, 2, 1),
    COLUMNS: Plan(COLUMNS, 1, 256, 0, 1),
    "slices": Plan(COLUMNS, 1, 256, 2, 1),
}
BOTH = (AMPERE, HOPPER)
ALL = (0, 1, 2)


def inspect(binary, code, most, loads=None, stores=None):
    """Nothing in local memory, nothing in float64 that is not asked for, vectors where they may be."""
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF" and binary.shared_bytes <= 48 * 1024
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    assert binary.registers <= most
    assert code == FLOAT64 or not [i for i in used if ".f64" in i]
    for wanted, start in ((loads, "ld.global.v"), (stores, "st.global.v")):
        assert wanted is None or any(i.startswith(start) for i in used) == wanted
    return binary


# ---- softmax ------------------------------------------------------------------------------------------

CROSS_ENTROPY = ScoreFunctions("cross_entropy", CrossEntropyLoss.value, ("cross_entropy",))
R = softmax.Request
SOFTMAX = {
    "value": R(),
    "gradient": R(grad=True),
    "smoothed": R(smoothed=True, grad=True),
    "weighted": R(smoothed=True, weighted=True, sample_weighted=True, grad=True, terms=True, upstream=True),
    "curvature": R(grad=True, curvature=True),
    "probabilities": R(has_probabilities=True, weighted=True, grad=True),
    "both": R(has_probabilities=True, grad=True, target_grad=True),
    "capped": R(grad=True, softcap=True, lse_square=True),
    "of probabilities": R(has_probabilities=True, weighted=True, grad=True, target_grad=True),
}


def budget(name, what, code, cc):
    """Registers a thread. 64 keep half of a multiprocessor's threads at work, 128 a quarter."""
    if name in (COLUMNS, "slices"):  # a state for each lane, eight of them with halves
        return 192
    fast = what in ("value", "gradient") and code == CODES["float32"]
    return 160 if code == FLOAT64 else 136 if not fast else 64 if cc == HOPPER else 112


def softmax_compiled(name, what, dtype, cc, vectors, functions=CROSS_ENTROPY):
    r, code = SOFTMAX[what], CODES[dtype]
    made = softmax.compile_kernels(
        functions, r, code, cc, PLANS[name], divided=what == "weighted", vectors=vectors
    )
    assert len(made) == (2 if name == SPLIT else 1)
    for k, binary in enumerate(made):
        writes = (r.grad or r.target_grad or r.curvature) and not (name == SPLIT and k == 0)
        if writes or not (name == SPLIT and k == 1):  # the value alone reads no scores again
            terms = r.terms and name in (COLUMNS, "slices")
            inspect(binary, code, budget(name, what, code, cc), vectors, vectors and (writes or terms))


COVERING = [
    ("value", "float32", AMPERE, True),
    ("gradient", "float32", HOPPER, True),
    ("gradient", "bfloat16", AMPERE, True),
    ("smoothed", "float16", HOPPER, True),
    ("weighted", "float32", AMPERE, False),
    ("curvature", "bfloat16", HOPPER, True),
    ("probabilities", "float64", AMPERE, True),
    ("both", "bfloat16", HOPPER, True),
]
SELECTED = [
    (name, *covering)
    for n, name in enumerate(PLANS)
    for k, covering in enumerate(COVERING)
    if k == 1 or (k + n) % 4 == 0
]


@pytest.mark.parametrize("name, what, dtype, cc, vectors", some(SELECTED))
@pytest.mark.thin(5)
def test_softmax(name, what, dtype, cc, vectors):
    softmax_compiled(name, what, dtype, cc, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, what", list(itertools.product(PLANS, list(SOFTMAX)[:7])))
def test_softmax_exhaustive(name, what):
    for dtype, cc, aligned in itertools.product(CODES, BOTH, (True, False)):
        softmax_compiled(name, what, dtype, cc, aligned)


@pytest.mark.parametrize("dtype, cc", [("float32", HOPPER), ("float64", AMPERE)])
@pytest.mark.parametrize("weighted", [True, False])
def test_counts(dtype, cc, weighted):
    inspect(rows.compile_counts(CODES[dtype], cc, weighted, not weighted), CODES[dtype], 64)


def functions_of(name):
    """A definition as kernels take it."""
    loss = SCORE_LOSSES[name].Class
    return loss._functions({n: loss.fields[n].default for n in loss._option_names})[0]


OF_DEFINITIONS = [
    ("gradient", "float32", HOPPER, True),
    ("gradient", "bfloat16", AMPERE, True),
    ("weighted", "float32", AMPERE, False),
    ("curvature", "float32", HOPPER, True),
    ("capped", "bfloat16", HOPPER, True),
    ("of probabilities", "float32", AMPERE, True),
]
OF_REQUEST = {"of probabilities": ("z_loss",), "capped": ("cross_entropy",)}
DEFINED = [
    (name, *covering, definition)
    for n, name in enumerate(PLANS)
    for covering in OF_DEFINITIONS
    for k, definition in enumerate(OF_REQUEST.get(covering[0], ("focal", "z_loss", "poly_1", "generalised")))
    if (covering[:2] == ("gradient", "float32") and k == 0)
    or ((k + n) % 4 == 0 and (n + len(covering[0])) % 2)
]


@pytest.mark.parametrize("name, what, dtype, cc, vectors, definition", some(DEFINED))
@pytest.mark.thin(5)
def test_definitions_of_scores(name, what, dtype, cc, vectors, definition):
    softmax_compiled(name, what, dtype, cc, vectors, functions_of(definition))


def test_an_edit_of_a_definition_of_scores_makes_another_kernel():
    def identity(value, options=(None,), statistics=("log_prob",)):
        functions = ScoreFunctions("edited", value, statistics, options)
        made = softmax.kernels(functions, R(grad=True), CODES["float32"], PLANS[TEAM])
        return made[0].__qualname__, binaries._identity(softmax.compile_kernels, {"functions": functions})

    def first(log_prob, q):
        return -q * log_prob

    def same(log_prob, q):
        return -q * log_prob

    def edited(log_prob, q):
        return -2 * q * log_prob

    before = identity(first)
    assert identity(same) == before
    for other in (identity(edited), identity(first, (True,)), identity(first, statistics=("rest",))):
        assert all(a != b for a, b in zip(other, before, strict=True))


# ---- margins ------------------------------------------------------------------------------------------

MARGINS = {
    "value": dict(),
    "gradient": dict(grad=True),
    "all": dict(sample_weighted=True, upstream=True, terms=True, grad=True),
}
OF_MARGINS = [*itertools.product((ONE, "squared", SOFT), (TEAM, BLOCK, STREAM)), (MANY, STREAM)]


def margins_compiled(loss, variant, what, dtype, cc, vectors):
    more, code = dict(MARGINS[what]), CODES[dtype]
    if what == "all" and loss != MANY:
        more |= dict(weighted=True, curvature=loss != ONE, target_grad=loss == SOFT)
    request = margins.Request(ONE if loss == "squared" else loss, squared=loss == "squared", **more)
    binary = margins.compile_kernel(request, code, cc, PLANS[variant], True, what == "all", vectors)
    fast = vectors and what == "gradient" and dtype == "float32" and cc == HOPPER and loss != MANY
    inspect(binary, code, 64 if fast else 144, vectors, vectors and what != "value")


COVERING_MARGINS = [
    ("gradient", "float32", HOPPER, True),
    ("all", "bfloat16", HOPPER, True),
    ("all", "float32", AMPERE, False),
    ("value", "float16", AMPERE, True),
    ("gradient", "float64", HOPPER, True),
]
SELECTED_MARGINS = [
    (*which, *covering)
    for n, which in enumerate(OF_MARGINS)
    for k, covering in enumerate(COVERING_MARGINS)
    if (k == 0 or (k + n) % 4 == 0) and (which[1] != STREAM or which[0] == MANY)
]


@pytest.mark.parametrize("loss, variant, what, dtype, cc, vectors", some(SELECTED_MARGINS))
@pytest.mark.thin(4)
def test_margins(loss, variant, what, dtype, cc, vectors):
    margins_compiled(loss, variant, what, dtype, cc, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss, variant", OF_MARGINS)
@pytest.mark.parametrize("what", MARGINS)
def test_margins_exhaustive(loss, variant, what):
    for dtype, cc, aligned in itertools.product(CODES, BOTH, (True, False)):
        margins_compiled(loss, variant, what, dtype, cc, aligned)


NLL_LAYOUTS = list(itertools.product((TEAM, BLOCK, SPLIT, COLUMNS), (True, False)))
NLL = list(itertools.product((nll.Request(), nll.Request(True, True, True, True)), CODES, BOTH))


def nll_compiled(given, dtype, cc, variant, vectors):
    code = CODES[dtype]
    inspect(nll.compile_terms(given, code, cc), code, 64, False, False)
    plan = Plan(variant, 1, 256, 2, 1)
    inspect(nll.compile_gradient(given, code, cc, plan, True, vectors), code, 96, False, vectors)


@pytest.mark.parametrize("variant, vectors", NLL_LAYOUTS)
@pytest.mark.thin(8)
def test_nll(variant, vectors):
    k = 3 * [TEAM, BLOCK, SPLIT, COLUMNS].index(variant) + 5 * vectors
    nll_compiled(*NLL[k % len(NLL)], variant, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant, vectors", NLL_LAYOUTS)
def test_nll_exhaustive(variant, vectors):
    for given, dtype, cc in NLL:
        nll_compiled(given, dtype, cc, variant, vectors)


# ---- vectors ------------------------------------------------------------------------------------------


class Drawn(nl.VectorLoss):
    """A distance in place of terms, and a row array that is differentiated."""

    vectors = "x", "y"
    distance = Distance(ROOT_OF_SQUARES)

    def finish(distance, strength):
        return strength * strength * distance


V = vectors.Request
VECTORS = {
    "cosine": V(COSINE, wrt=(0, 1)),  # of pairs
    "triplet": V(ROOT_OF_SQUARES, wrt=ALL),
    "value": V(ROOT_OF_SQUARES),
    "swap": V(ROOT_OF_SQUARES, swap=True, weighted=True, upstream=True, terms=True, wrt=ALL),
    "cosines": V(COSINE, swap=True, wrt=ALL),
    "power": V(POWER, swap=True, wrt=ALL),
    "largest": V(LARGEST, wrt=ALL),
    "sum": V(SUM, wrt=(0,)),
}


def vectors_compiled(cls, request, variant, dtype, cc, vectors_, summed=True):
    f, code, plan = cls._functions, CODES[dtype], PLANS[variant]
    flags = tuple(v if isinstance(v, bool) else None for v in (cls.fields[n].default for n in f.options))
    if plan.threads > vectors.MOST_HOLDING >> (code == FLOAT64):
        plan = plan._replace(threads=vectors.MOST_HOLDING // 2)
    return vectors.compile_kernel(
        f._replace(flags=flags), request, code, cc, plan, summed, request.weighted, vectors_
    )


def triplets_compiled(what, variant, dtype, cc, vectors_):
    """Within the registers of a half of a multiprocessor's threads where it is usual, else of a sixth.

    ptxas spends more of them for the older capability, where it has no reason to save.
    """
    cls, request, code = (
        CosineEmbeddingLoss if what == "cosine" else TripletMarginLoss,
        VECTORS[what],
        CODES[dtype],
    )
    fast = cc == HOPPER and dtype == "float32" and vectors_ and what in ("cosine", "triplet", "value", "sum")
    binary = vectors_compiled(cls, request, variant, dtype, cc, vectors_, summed=not request.terms)
    inspect(binary, code, 64 if fast else 168, vectors_, vectors_ and bool(request.wrt))
    # At least what joins a block's sums, and what joins its partial sums.
    assert (32 * 6 if variant != TEAM else 64 * (not request.terms)) * 4 <= binary.shared_bytes <= 4096
    assert len(binary.parameters) == 20 + len(cls._functions.row_arrays)


@pytest.mark.parametrize(
    "what, variant, dtype, cc, vectors_",
    some(
        [
            ("cosine", TEAM, "float32", HOPPER, True),
            ("cosine", BLOCK, "float16", AMPERE, True),
            ("triplet", TEAM, "float32", HOPPER, True),
            ("triplet", BLOCK, "float32", HOPPER, True),
            ("triplet", STREAM, "bfloat16", HOPPER, True),
            ("value", STREAM, "float32", HOPPER, True),
            ("swap", TEAM, "bfloat16", AMPERE, False),
            ("cosines", BLOCK, "float64", AMPERE, True),
            ("power", TEAM, "float32", AMPERE, True),
            ("largest", BLOCK, "float16", HOPPER, False),
            ("sum", STREAM, "float32", AMPERE, True),
        ]
    ),
)
@pytest.mark.thin(3)
def test_vectors(what, variant, dtype, cc, vectors_):
    triplets_compiled(what, variant, dtype, cc, vectors_)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", VECTORS)
@pytest.mark.parametrize("variant", (TEAM, BLOCK, STREAM))
def test_vectors_exhaustive(variant, what):
    for dtype, cc, vectors_ in itertools.product(CODES, BOTH, (True, False)):
        triplets_compiled(what, variant, dtype, cc, vectors_)


OF_VECTORS = [
    (SumTriplet, V(None, wrt=ALL), TEAM, "float32", HOPPER, True),
    (SumTriplet, V(None, weighted=True, terms=True, wrt=ALL), STREAM, "bfloat16", HOPPER, True),
    (SumTriplet, V(None), BLOCK, "float32", AMPERE, True),
    (contrastive.Class, V(None, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (contrastive.Class, V(None, wrt=(0, 1), row_wrt=(0,)), BLOCK, "float32", AMPERE, False),
    (contrastive.Class, V(None, wrt=(0,), curvature=True), BLOCK, "float32", HOPPER, True),
    (Scaled, V(None, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (Scaled, V(None, wrt=(0, 1)), STREAM, "float64", AMPERE, True),
    (Cauchy, V(None, row_wrt=(1,), curvature=True), TEAM, "float16", HOPPER, True),
    (Six, V(None, wrt=ALL), TEAM, "float32", AMPERE, True),
    (nl.contrastive_loss.Class, V(ROOT_OF_SQUARES, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (Drawn, V(ROOT_OF_SQUARES, wrt=(0,), row_wrt=(0,)), TEAM, "float32", HOPPER, True),
    (Drawn, V(COSINE, row_wrt=(0,)), BLOCK, "float32", AMPERE, True),
]


@pytest.mark.parametrize(
    "case",
    sweep(OF_VECTORS, *OF_VECTORS[::4]),
    ids=lambda c: f"{c[0].__name__}-{c[2]}-{c[3]}",
)
@pytest.mark.thin(4)
def test_definitions_of_vectors(case):
    _, request, _, dtype, cc, vectors_ = case
    fast = cc == HOPPER and dtype == "float32" and not request.curvature
    inspect(vectors_compiled(*case), CODES[dtype], 64 if fast else 168, vectors_)


def test_an_edit_of_a_definition_of_vectors_makes_another_kernel():
    def identity(**change):
        f = Cauchy._functions._replace(**change)
        made = vectors.kernel(f, V(None, wrt=(0,)), CODES["float32"], TEAM)
        return made.__qualname__, binaries._identity(vectors.compile_kernel, {"functions": f})

    def edited(total, weight, shift, width, squared):
        return 2 * weight * total

    before, squares = identity(), contrastive.Class._functions.terms
    assert identity() == before
    for change in (dict(finish=edited), dict(terms=squares), dict(flags=(None, True)), dict(homogeneous=1)):
        assert all(a != b for a, b in zip(identity(**change), before, strict=True))


# ---- sequences ----------------------------------------------------------------------------------------

CTC = {
    "value": ctc.Request(),
    "gradient": ctc.Request(mean=True, grad=True),
    "all": ctc.Request(True, True, True, True, True, True),
}


def ctc_compiled(what, dtype, cc, spills):
    code, room = CODES[dtype], 256
    binary = ctc.compile_align(CTC[what], code, cc, room, spills, 512, divided=what == "all")
    inspect(binary, code, 112 if code != FLOAT64 else 128)
    lines = 2 * room * storage(code).arithmetic.bitwidth // 8
    assert lines < binary.shared_bytes < lines + 2048 and len(binary.parameters) == 22
    vectors = not spills
    inspect(ctc.compile_put(code, cc, vectors), code, 80 if code != FLOAT64 else 128, vectors, vectors)


@pytest.mark.parametrize(
    "what, dtype, cc, spills",
    some(
        [
            ("value", "float32", AMPERE, False),
            ("gradient", "float32", HOPPER, False),
            ("all", "bfloat16", AMPERE, True),
            ("all", "float64", HOPPER, True),
        ]
    ),
)
@pytest.mark.more
def test_ctc(what, dtype, cc, spills):
    ctc_compiled(what, dtype, cc, spills)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", CTC)
def test_ctc_exhaustive(what):
    for dtype, cc, spills in itertools.product(CODES, BOTH, (True, False)):
        ctc_compiled(what, dtype, cc, spills)


def test_starts():
    inspect(ctc.compile_starts(HOPPER), CODES["float32"], 64)


# ---- how they are launched: from the shape alone, with a share for every thread -----------------------

STORAGES = list(itertools.product(CODES.values(), (True, False)))


@pytest.mark.parametrize("code, vectors_", STORAGES)
def test_plans(code, vectors_):
    width = storage(code, vectors_).width
    shapes = itertools.product((0, 1, 64, 10**6), (8, 64, 1000, 32000, 131072), (1, 64))
    for batch, classes, inner in shapes:
        plan = rows.plan(batch, classes, inner, code, vectors_)
        held = rows.repeat(code, vectors_, plan.variant) * width
        assert 1 <= plan.blocks <= max(reduce.SUMMING_BLOCKS, 2 * rows.ENOUGH_BLOCKS)
        assert plan.threads % 32 == 0 and plan.threads <= 512
        assert (plan.variant == COLUMNS) == (inner > 1)
        assert plan.variant != TEAM or (held << plan.deal >= classes and plan.deal <= 5)
        assert plan.variant != BLOCK or held * plan.threads >= classes
        split = plan.blocks == batch * plan.deal and plan.deal and classes // plan.deal >= rows.PART
        assert plan.variant != SPLIT or split
    held = vectors.repeat(code, vectors_) * width
    for count, size in itertools.product((0, 1, 64, 10**7), (1, 8, 128, 1000, 10**5)):
        plan = vectors.plan(count, size, code, vectors_)
        assert 1 <= plan.blocks <= reduce.SUMMING_BLOCKS and plan.partials == plan.blocks
        assert plan.threads % 32 == 0 and plan.threads <= vectors.MOST_HOLDING
        assert plan.variant != TEAM or (held << plan.deal >= size and plan.deal <= 5)
        most = vectors.MOST_HOLDING >> (code == FLOAT64)
        assert plan.variant != BLOCK or (held * plan.threads >= size > held * 32 and plan.threads <= most)
        assert plan.variant != STREAM or held * most < size
    for shape, labels in itertools.product(
        ((0, 1, 1), (100, 32, 28), (1000, 64, 5000)), ((0, 0), (32 * 20, 20), (9000, 9000))
    ):
        plan = ctc.plan(*shape, *labels, code, vectors_)
        assert plan.spills == (2 * labels[1] + 1 > plan.room)
        assert 2 * plan.room * storage(code).arithmetic.bitwidth // 8 <= 48 * 1024
        assert plan.align.threads % 32 == 0 and plan.align.threads <= 512 and plan.deal <= 5
        assert 1 <= plan.align.blocks <= reduce.MOST_BLOCKS and 1 <= plan.put.blocks <= reduce.MOST_BLOCKS
    for classes in (1, 1000, 10**6, 10**8):
        plan = margins.plan(MANY, 10**6, classes, code, False)
        size = plan.blocks * classes * margins.SCRATCH * np.dtype(storage(code).T).itemsize
        assert plan.blocks == 1 or size <= margins.MOST_SCRATCH


def test_variants_and_launches():
    code = CODES["float32"]
    assert rows.plan(64, 131072, 1, code, True).variant == SPLIT
    assert rows.plan(4096, 131072, 1, code, True).variant == STREAM
    assert rows.plan(64, 131072, 1, code, True, split=False).variant == STREAM
    assert vectors.plan(10**5, 128, code, True).variant == TEAM
    assert copy.launch(0).blocks == copy.launch(1024).blocks == 1 and copy.launch(1025).blocks == 2
    assert reduce.launch(0, np.float32).blocks == 1
    assert reduce.launch(2**40, np.float32).blocks == reduce.SUMMING_BLOCKS
