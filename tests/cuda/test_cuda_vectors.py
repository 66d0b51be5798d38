"""The vectors' kernel, its own Python in the block interpreter, against the reference; and compiled."""

import itertools
import math
import re

import numpy as np
import pytest
from interpreter import ORDERS, Fault, launch

from numbaloss import reference
from numbaloss.kernels.cuda import reduce, vectors
from numbaloss.kernels.cuda.rows import BLOCK, STREAM, TEAM, Plan
from numbaloss.kernels.cuda.target import storage
from numbaloss.kernels.cuda.vectors import Request
from numbaloss.kernels.spec import (
    CODES,
    COSINE,
    FLOAT16,
    FLOAT64,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SQUARES,
    SUM,
)
from numbaloss.losses.embedding import CosineEmbeddingLoss, TripletMarginLoss

AMPERE, HOPPER = (8, 0), (9, 0)
NAMES = {kind: name for name, kind in vectors.DISTANCES.items()}
KINDS = {**NAMES, POWER: "power", LARGEST: "largest"}
FUNCTIONS = {False: CosineEmbeddingLoss._functions, True: TripletMarginLoss._functions}  # whether of triplets

# A small launch of each variant, and sizes of vectors: with empty lanes, and without 16-byte loads.
PLANS = {TEAM: Plan(TEAM, 2, 64, 4, 2), BLOCK: Plan(BLOCK, 2, 64, 0, 2), STREAM: Plan(STREAM, 2, 64, 0, 2)}
SIZES = {TEAM: 24, BLOCK: 120, STREAM: 296}
ODD = {TEAM: 21, BLOCK: 115, STREAM: 281}


def aligned(a, offset=0):
    """A copy of an array, flat, that starts at a multiple of 16 bytes, or `offset` elements further."""
    a = np.asarray(a).reshape(-1)
    room = np.empty(a.size + offset + 16, a.dtype)
    start = -(room.ctypes.data // a.itemsize) % (16 // a.itemsize) + offset
    room[start : start + a.size] = a
    return room[start : start + a.size]


def distance(kind, x, y, p, eps):
    """The distances of rows, and their gradients by both."""
    if kind == COSINE:
        (rx, ry) = (np.maximum(1, abs(v).max(axis=1, keepdims=True)) for v in (x, y))
        x, y, ex, ey = x / rx, y / ry, eps / rx / rx, eps / ry / ry
        xx, yy, xy = ((a * b).sum(axis=1, keepdims=True) for a, b in ((x, x), (y, y), (x, y)))
        xx, yy = xx + ex, yy + ey
        n = np.sqrt(xx * yy)
        return 1 - (xy / n)[:, 0], (xy / n / xx * x - y / n) / rx, (xy / n / yy * y - x / n) / ry
    u = x - y + eps
    size, sign = abs(u), np.sign(u)
    top = size.max(axis=1, keepdims=True)
    if kind == SUM:
        return size.sum(axis=1), sign, -sign
    if kind == SQUARES:
        return (u * u).sum(axis=1), 2 * u, -2 * u
    if kind == LARGEST:
        slope = (size == top) * sign / (size == top).sum(axis=1, keepdims=True)
        return top[:, 0], slope, -slope
    p = 2 if kind == ROOT_OF_SQUARES else p
    r = np.where(top > 0, top, 1)
    s = ((size / r) ** p).sum(axis=1, keepdims=True)
    slope = np.where(top > 0, sign * (size / r) ** (p - 1) / np.where(s > 0, s, 1) ** (1 - 1 / p), 0)
    return (r * s ** (1 / p))[:, 0], slope, -slope


class Call:
    """Rows of vectors, to be run by the kernel and by the reference."""

    def __init__(
        self, kind, count, size, dtype=np.float32, seed=0, three=True, swap=False, p=3.0, eps=None, margin=0.7
    ):
        self.kind, self.three, self.swap, self.p, self.margin = kind, three, swap, p, margin
        self.shape, self.dtype = (count, size), np.dtype(dtype)
        self.code = CODES[self.dtype.name]
        self.T = storage(self.code).T
        self.eps = (
            eps if eps is not None else 1e-12 if kind == COSINE else 0 if kind in (SUM, SQUARES) else 1e-6
        )
        self.rng = rng = np.random.default_rng(seed)
        self.vectors = [rng.standard_normal(self.shape).astype(dtype) for _ in range(2 + three)]
        if three:  # some rows that count, some that do not
            near = rng.random((count, 1)) < 0.3
            self.vectors[1] = np.where(near, self.vectors[0] + self.vectors[1] / 8, self.vectors[1]).astype(
                dtype
            )
        self.labels = None if three else rng.choice([1, -1, 0.5], count, p=[0.45, 0.45, 0.1]).astype(self.T)
        self.weights = self.upstream = None

    def weigh(self, weights=True, upstream=True):
        if weights:
            self.weights = self.rng.integers(0, 3, self.shape[0]).astype(self.T)
        if upstream:
            self.upstream = self.rng.uniform(-1, 1, self.shape[0]).astype(self.T)
        return self

    def terms(self):
        """By the reference."""
        wide = [v.astype(np.float64) for v in self.vectors]
        options = dict(reduction="none", margin=self.margin, sample_weight=self.weights)
        if not self.three:
            return reference.cosine_embedding_loss(*wide, self.labels, **options)
        if self.kind in NAMES and self.kind != ROOT_OF_SQUARES:
            options["distance_function"] = NAMES[self.kind]
            return reference.triplet_margin_with_distance_loss(*wide, **options, swap=self.swap)
        p = math.inf if self.kind == LARGEST else 2 if self.kind == ROOT_OF_SQUARES else self.p
        return reference.triplet_margin_loss(*wide, **options, swap=self.swap, p=p, eps=self.eps)

    def exact(self):
        """Terms and gradients, of numbers that no square overflows."""
        vs = [v.astype(np.longdouble) for v in self.vectors]
        pairs = [(0, 1), (0, 2), (1, 2)][: (2 + self.swap) if self.three else 1]
        with np.errstate(all="ignore"):
            found = [distance(self.kind, vs[a], vs[b], self.p, self.eps) for a, b in pairs]
            share = np.ones(self.shape[0]) if self.weights is None else self.weights.astype(float)
            up = share if self.upstream is None else share * self.upstream
            if self.three:
                far = found[1][0]
                least = np.minimum(far, found[2][0]) if self.swap else far
                kept = np.where(far == least, 1.0, 0.0)
                if self.swap:
                    kept = np.where(far == found[2][0], 0.5, kept)
                term = self.margin + found[0][0] - least
                factors = [up, -up * kept, -up * (1 - kept)]
                counts = ~(term < 0)
            else:
                term = np.where(self.labels == 1, found[0][0], 1 - found[0][0] - self.margin)
                counts = (self.labels == 1) | ((self.labels == -1) & ~(term < 0))
                factors = [up * self.labels]
            counts &= share != 0
            gradients = [np.zeros(self.shape) for _ in vs]
            for f, (_, first, second), (a, b) in zip(factors, found, pairs, strict=False):
                for k, by in ((a, first), (b, second)):
                    live = counts & (f != 0)
                    gradients[k] += np.where(live[:, np.newaxis], f[:, np.newaxis] * by, 0).astype(float)
        return np.where(counts, share * term, 0).astype(float), *gradients

    def run(
        self, plan=None, wrt=(0, 1, 2), terms=True, in_place=False, summed=True, vectors_=None,
        order="forward", seed=0, divisor=None, factor=1.0,
    ):  # fmt: skip
        """The outputs by name; `value` is that of `finish`."""
        count, size = self.shape
        if vectors_ is None:
            vectors_ = size % storage(self.code).width == 0
        plan = plan or vectors.plan(count, size, self.code, vectors_)
        wrt = tuple(k for k in wrt if k < len(self.vectors))
        request = Request(
            kind=vectors.kind_of(self.kind, self.p, self.code),
            swap=self.swap,
            weighted=self.weights is not None,
            upstream=self.upstream is not None,
            terms=terms,
            wrt=wrt,
        )
        shift, T = 0 if vectors_ else 1, self.T
        given = [aligned(v, shift) for v in self.vectors]

        def blank(wanted, n):
            return aligned(np.full(n, np.nan, self.dtype), shift) if wanted else None

        gradients = [
            given[k] if in_place and k in wrt else blank(k in wrt, count * size) for k in range(3)
        ]  # fmt: skip
        made = dict(terms=blank(terms, count), **{f"g{k}": gradients[k] for k in range(3)})
        partials = np.full(2 * plan.partials, np.nan, T) if summed else None
        launch(
            vectors.kernel(FUNCTIONS[self.three], request, self.code, plan.variant, vectors_), plan.blocks,
            plan.threads, *given, *[None] * (3 - len(given)), () if self.three else (self.labels,),
            self.weights, self.upstream, *made.values(), None, (), None, count, size, plan.deal, T(self.p),
            T(self.eps), (T(self.margin),), T(factor), divisor, partials, order=order, seed=seed,
        )  # fmt: skip
        results = {k: a.astype(np.float64) for k, a in made.items() if a is not None}
        for k in wrt:
            results[f"g{k}"] = results[f"g{k}"].reshape(self.shape)
        if summed:
            value = np.full(1, np.nan, T)
            finish = reduce.finish_kernel(FLOAT64 if T is np.float64 else CODES["float32"])
            launch(finish, 1, 64, partials, plan.partials, 1.0, None, value)
            results["value"] = float(value[0])
        return results


def close(got, wanted, call, scale=1.0):
    """Within some roundings of the arithmetic, relative to `scale` or the number, and one of the storage."""
    eps = {"bfloat16": 2**-8, "float16": 2**-11}.get(call.dtype.name, 0)
    tiny = 2.0**-24 if call.code == FLOAT16 else 1e-38
    error = 32 * np.finfo(call.T).eps * (scale + np.abs(wanted)) + eps * np.abs(wanted) + tiny
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_less(np.where(same, 0, np.abs(got - wanted)), error)


def check(call, result):
    """Against both oracles; terms are differences of distances, and that is what they are rounded by."""
    terms, *gradients = call.exact()
    distances = np.sqrt(call.shape[1]) if call.kind not in (SUM, SQUARES) else 2.0 * call.shape[1]
    np.testing.assert_allclose(terms, call.terms(), rtol=1e-9, atol=1e-12 * distances)
    if "terms" in result:
        close(result["terms"], terms, call, distances)
    slope = 1.0
    if call.kind == COSINE:  # that of the unit vector
        slope = max(1 / np.linalg.norm(v.astype(float), axis=1).min(initial=1) for v in call.vectors)
    for k, wanted in enumerate(gradients):
        if f"g{k}" in result:
            close(result[f"g{k}"], wanted, call, slope)
    if "value" in result:
        total = np.asarray(terms.sum())
        narrow = Call(COSINE, 1, 1, np.float64 if call.T is np.float64 else np.float32)
        close(result["value"], total, narrow, distances * len(terms))


LOSSES = [
    dict(kind=COSINE, three=False, margin=0.05),
    *[dict(kind=kind, swap=swap) for kind in KINDS for swap in (False, True)],
]


def label(loss):
    return "pairs" if not loss.get("three", True) else KINDS[loss["kind"]] + "-swap" * loss["swap"]


def rows_of(variant):
    return 19 if variant == TEAM else 4


@pytest.mark.parametrize("variant", PLANS)
@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_losses(loss, variant):
    for seed, (weights, upstream) in enumerate([(False, False), (True, True)]):
        call = Call(count=rows_of(variant), size=SIZES[variant], seed=seed, **loss).weigh(weights, upstream)
        check(call, call.run(PLANS[variant], order="random"))


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_gradients_are_the_references_derivatives(loss):
    call = Call(count=4, size=5, dtype=np.float64, seed=5, **loss).weigh()
    result = call.run()

    def total(x, k):
        moved = Call(count=4, size=5, dtype=np.float64, **loss)
        moved.vectors = [x if j == k else v for j, v in enumerate(call.vectors)]
        moved.labels, moved.weights = call.labels, call.weights
        return moved.terms()

    for k in range(len(call.vectors)):
        wanted = reference.gradient(total, {"x": call.vectors[k], "k": k}, "x", call.upstream)
        np.testing.assert_allclose(result[f"g{k}"], wanted, atol=2e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", PLANS)
def test_storages_vectors_and_orders(variant, dtype, request):
    dtype = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    for vectors_, loss in itertools.product((True, False), (LOSSES[0], LOSSES[2])):
        results = []
        for order in ORDERS:
            size = (SIZES if vectors_ else ODD)[variant]
            call = Call(count=rows_of(variant) // 2 + 1, size=size, dtype=dtype, seed=4, **loss).weigh()
            results.append(call.run(PLANS[variant], vectors_=vectors_, order=order, seed=5))
        check(call, results[0])
        for other in results[1:]:  # the same bits
            for name, array in results[0].items():
                np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=label)
@pytest.mark.parametrize("variant", PLANS)
def test_in_place(variant, loss):
    def result(**how):
        call = Call(count=rows_of(variant), size=SIZES[variant], seed=6, **loss).weigh()
        return call.run(PLANS[variant], order="reverse", **how)

    apart, over = result(), result(in_place=True)
    for name, array in apart.items():
        np.testing.assert_array_equal(over[name], array)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2], LOSSES[5]], ids=label)
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("terms, summed", [(True, False), (False, True), (False, False)])
def test_outputs(loss, wanted, terms, summed):
    call = Call(count=7, size=24, seed=2, **loss)
    check(call, call.run(wrt=wanted, terms=terms, summed=summed))


@pytest.mark.parametrize("loss", LOSSES, ids=label)
@pytest.mark.parametrize("variant", PLANS)
def test_rows_of_no_weight_are_zero_whatever_they_hold(variant, loss):
    call = Call(count=rows_of(variant), size=ODD[variant], seed=7, **loss).weigh()
    call.weights[:] = np.arange(call.shape[0]) % 3
    wanted, dead = call.exact(), call.weights == 0
    for v, bad in zip(call.vectors, (np.nan, np.inf, -np.inf), strict=False):
        v[dead] = bad
    result = call.run(PLANS[variant])
    for name, exact in zip(("terms", "g0", "g1", "g2"), wanted, strict=False):
        assert not result[name][dead].any()
        close(result[name], exact, call, 2.0 * call.shape[1])
    assert np.isfinite(result["value"])


@pytest.mark.parametrize("loss", LOSSES, ids=label)
@pytest.mark.parametrize("variant", PLANS)
def test_nan_and_infinity_stay_in_their_row(variant, loss):
    call = Call(count=rows_of(variant), size=SIZES[variant], seed=8, **loss)
    good = call.run(PLANS[variant])
    if call.labels is not None:
        call.labels[:] = 1
        good = call.run(PLANS[variant])
    call.vectors[0][1, 3] = np.nan
    call.vectors[1][2, 5] = np.inf
    result = call.run(PLANS[variant])
    assert np.isnan(result["terms"][1]) and np.isnan(result["g0"][1, 3])
    assert not np.isfinite(result["terms"][2]) and not np.isfinite(result["value"])
    rest = np.arange(call.shape[0]) > 2
    for name in ("terms", "g0", "g1"):
        np.testing.assert_array_equal(result[name][rest], good[name][rest])


SIZES_OF_NUMBERS = {"float32": (1e-30, 1e25, 3e37), "float64": (1e-290, 1e200, 1e307)}


@pytest.mark.parametrize("dtype", SIZES_OF_NUMBERS)
@pytest.mark.parametrize(
    "loss", [e for e in LOSSES if e["kind"] in (COSINE, POWER, ROOT_OF_SQUARES)], ids=label
)
@pytest.mark.parametrize("variant", PLANS)
def test_huge_and_tiny_vectors(variant, loss, dtype):
    """Rows of ordinary, huge and tiny numbers: neither powers nor their sums leave the range."""
    for k, size in enumerate(SIZES_OF_NUMBERS[dtype]):
        if loss["kind"] == COSINE and size < 1:
            continue  # the eps under its squares hides them
        call = Call(count=rows_of(variant), size=SIZES[variant], dtype=dtype, seed=9 + k, eps=1e-12, **loss)
        call.eps = 1e-12 if loss["kind"] == COSINE else 0.0
        call.margin = call.T(0.5 if loss["kind"] == COSINE else size / 4)
        scale = np.where(np.arange(call.shape[0]) % 3, size / 8, 1).reshape(-1, 1)
        call.vectors = [(v * scale).astype(dtype) for v in call.vectors]
        if not call.three:
            call.labels[:] = np.where(call.labels == 0.5, 1, call.labels)
        terms, *gradients = call.exact()
        result = call.run(PLANS[variant])
        # Terms are differences of distances, each as far off as its own roundings.
        far = 1.0 if loss["kind"] == COSINE else np.abs(call.vectors).max() * np.sqrt(call.shape[1])
        np.testing.assert_allclose(
            result["terms"] / far, terms / far, rtol=1e-5, atol=16 * np.finfo(call.T).eps
        )
        for j, wanted in enumerate(gradients):
            shown = scale if loss["kind"] == COSINE else 1
            np.testing.assert_allclose(
                result[f"g{j}"] * shown, wanted * shown, atol=64 * np.finfo(call.T).eps, rtol=1e-5
            )
        assert all(np.isfinite(a).all() for a in result.values())


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_equal_vectors_and_zeros(loss, eps):
    """A distance of 0 has no gradient; with eps the difference is eps. A zero vector's cosine has a slope."""
    eps = 1e-12 if loss["kind"] == COSINE else eps
    call = Call(count=5, size=24, seed=11, eps=eps, **loss)
    call.vectors[1][0] = call.vectors[0][0]
    call.vectors[-1][1] = call.vectors[0][1]
    for v in call.vectors:
        v[2] = 0
    call.vectors[0][3] = 0
    if not call.three:
        call.labels[:4] = 1
    result = call.run()
    terms, *gradients = call.exact()
    close(result["terms"], terms, call, 2.0 * call.shape[1])
    scale = 1e6 if loss["kind"] == COSINE else 1.0  # 1 / sqrt(eps)
    for k, wanted in enumerate(gradients):
        close(result[f"g{k}"][[0, 1, 2, 4]], wanted[[0, 1, 2, 4]], call)
        close(result[f"g{k}"][3], wanted[3], call, scale)
    if loss["kind"] == COSINE and not call.three:
        assert result["terms"][0] == 0


def test_the_gradient_passes_at_the_clamp_and_a_tie_is_halved():
    call = Call(SUM, 2, 4, swap=True, eps=0.0, margin=1.0)
    call.vectors = [np.zeros((2, 4), np.float32) for _ in range(3)]
    call.vectors[2][:] = [1, 0, 0, 0]
    call.vectors[1][1] = [2, 0, 0, 0]  # as far from the negative as the anchor is
    result = call.run()
    np.testing.assert_array_equal(result["terms"], [0, 2])
    # Both rows tie; the first is at the clamp.
    np.testing.assert_array_equal(result["g2"][:, 0], [-1, 0])
    np.testing.assert_array_equal(result["g0"][:, 0], [0.5, -1 + 0.5])


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 7.0, 100.0, 1e10])
def test_any_norm(p):
    kind = {1.0: SUM, 2.0: ROOT_OF_SQUARES}.get(p, POWER)
    call = Call(kind, 6, 24, p=p, eps=1e-6)
    request = Call(LARGEST, 6, 24, eps=1e-6) if p > 2**30 else call
    result = call.run()
    check_terms = request.exact()[0] if kind != SUM else call.exact()[0]
    close(result["terms"], check_terms, call, 50)
    for k, wanted in enumerate(request.exact()[1:]):
        close(result[f"g{k}"], wanted, call, max(1, p if p < 2**30 else 1))


@pytest.mark.parametrize("shape", [(1, 1), (70, 1), (3, 2), (0, 5), (3, 31), (33, 128), (2, 700), (1, 2500)])
@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=label)
def test_the_plans_own_launch(loss, shape):
    call = Call(count=shape[0], size=shape[1], seed=3, **loss)
    check(call, call.run())


@pytest.mark.parametrize("deal", range(6))
def test_teams(deal):
    call = Call(ROOT_OF_SQUARES, 70, min(4 << deal, 40))
    check(call, call.run(Plan(TEAM, 1, 32, deal, 1)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weighted_mean(dtype):
    call = Call(ROOT_OF_SQUARES, 9, 12, dtype).weigh()
    divisor = np.array([call.weights.sum()], call.T)
    wanted = call.run(factor=2.0 / divisor[0])
    result = call.run(factor=2.0, divisor=divisor)
    for name, array in wanted.items():
        close(result[name], array, call)
    nothing = call.run(divisor=np.zeros(1, call.T))
    assert not nothing["g0"][call.weights == 0].any()


def test_plans():
    for code, vectors_ in itertools.product(CODES.values(), (True, False)):
        held = vectors.repeat(code, vectors_) * storage(code, vectors_).width
        for count, size in itertools.product((0, 1, 64, 10**7), (1, 8, 128, 1000, 10**5)):
            plan = vectors.plan(count, size, code, vectors_)
            assert 1 <= plan.blocks <= reduce.MOST_BLOCKS and plan.partials == plan.blocks
            assert plan.threads % 32 == 0 and plan.threads <= vectors.MOST_HOLDING
            if plan.variant == TEAM:
                assert held << plan.deal >= size and plan.deal <= 5
            if plan.variant == BLOCK:
                assert held * plan.threads >= size > held * 32
            most = vectors.MOST_HOLDING >> (code == FLOAT64)
            assert plan.variant != BLOCK or plan.threads <= most
            assert plan.variant != STREAM or held * most < size
    assert vectors.plan(10**5, 128, CODES["float32"], True).variant == TEAM


def test_unaligned_rows_are_refused_by_vectors():
    call = Call(ROOT_OF_SQUARES, 3, 9)
    with pytest.raises(Fault, match="not aligned"):
        call.run(PLANS[TEAM], vectors_=True)


# ---- compiled -----------------------------------------------------------------------------------------

ALL = (0, 1, 2)
REQUESTS = {
    "cosine": Request(COSINE, wrt=(0, 1)),  # of pairs
    "triplet": Request(ROOT_OF_SQUARES, wrt=ALL),
    "value": Request(ROOT_OF_SQUARES),
    "swap": Request(ROOT_OF_SQUARES, swap=True, weighted=True, upstream=True, terms=True, wrt=ALL),
    "cosines": Request(COSINE, swap=True, wrt=ALL),
    "power": Request(POWER, swap=True, wrt=ALL),
    "largest": Request(LARGEST, wrt=ALL),
    "sum": Request(SUM, wrt=(0,)),
}
COMPILED = {
    TEAM: Plan(TEAM, 1, 256, 3, 1),
    BLOCK: Plan(BLOCK, 1, 512, 0, 1),
    STREAM: Plan(STREAM, 1, 256, 0, 1),
}


def instructions(binary):
    body = binary.ptx[binary.ptx.index("{") :]
    return re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", body, re.M)


def inspect(what, variant, dtype, cc, vectors_):
    request, code = REQUESTS[what], CODES[dtype]
    summed = not request.terms
    plan = COMPILED[variant]
    if plan.threads > vectors.MOST_HOLDING >> (code == FLOAT64):
        plan = plan._replace(threads=vectors.MOST_HOLDING // 2)
    functions = FUNCTIONS[what != "cosine"]
    binary = vectors.compile_kernel(
        functions, request, code, cc, plan, summed=summed, divided=request.weighted, vectors=vectors_
    )
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF"
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    assert code == FLOAT64 or not [i for i in used if ".f64" in i]
    assert any(i.startswith("ld.global.v") for i in used) == vectors_
    assert any(i.startswith("st.global.v") for i in used) == (vectors_ and bool(request.wrt))
    # At least what joins a block's sums, and what joins its partial sums.
    assert (32 * 6 if variant != TEAM else 64 * summed) * 4 <= binary.shared_bytes <= 4096
    assert len(binary.parameters) == 20 + len(functions.row_arrays)
    return binary


def budget(what, dtype, cc, vectors_):
    """Registers a thread. 64 keep half of a multiprocessor's threads at work, 128 a quarter.

    ptxas spends more of them for the older capability, where it has no reason to save.
    """
    if cc == HOPPER and dtype == "float32" and vectors_ and what in ("cosine", "triplet", "value", "sum"):
        return 64
    return 168


COVERING = [
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


@pytest.mark.parametrize("what, variant, dtype, cc, vectors_", COVERING)
def test_compiled(what, variant, dtype, cc, vectors_):
    assert inspect(what, variant, dtype, cc, vectors_).registers <= budget(what, dtype, cc, vectors_)


@pytest.mark.exhaustive
@pytest.mark.parametrize("vectors_", [True, False])
@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_exhaustive(variant, what, dtype, cc, vectors_):
    assert inspect(what, variant, dtype, cc, vectors_).registers <= budget(what, dtype, cc, vectors_)
