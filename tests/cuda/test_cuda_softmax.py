"""The softmax kernels, interpreted against the reference, and compiled."""

import itertools
import re

import numpy as np
import pytest
from interpreter import ORDERS, Fault, launch

from numbaloss import reference
from numbaloss.kernels.cuda import reduce, rows, softmax
from numbaloss.kernels.cuda.rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, Plan
from numbaloss.kernels.cuda.softmax import Request
from numbaloss.kernels.cuda.target import recorded, storage
from numbaloss.kernels.spec import CODES, FLOAT64, ScoreFunctions
from numbaloss.losses.multiclass import CrossEntropyLoss

CROSS_ENTROPY = ScoreFunctions("cross_entropy", CrossEntropyLoss.value, ("cross_entropy",))

# A small launch of each variant, with the classes that it takes: (plan, rows' least and most classes).
SMALL = {
    TEAM: lambda n, deal=3: Plan(TEAM, 2, 64, deal, 2),
    BLOCK: lambda n: Plan(BLOCK, 2, 64, 0, 2),
    STREAM: lambda n: Plan(STREAM, 2, 64, 0, 2),
    SPLIT: lambda n: Plan(SPLIT, 3 * n, 32, 3, n),
    COLUMNS: lambda n, deal=0: Plan(COLUMNS, 2, 32, deal, 2),
}


def aligned(a, offset=0):
    """A copy of an array, flat, that starts at a multiple of 16 bytes, or `offset` elements further."""
    a = np.asarray(a).reshape(-1)
    room = np.empty(a.size + offset + 16, a.dtype)
    start = -(room.ctypes.data // a.itemsize) % (16 // a.itemsize) + offset
    room[start : start + a.size] = a
    return room[start : start + a.size]


class Call:
    """A call with its arrays as (batch, classes, inner), to be run as kernels and by the reference."""

    def __init__(self, batch, classes, inner=1, dtype=np.float32, seed=0, smoothing=0.0, ignore=-100):
        self.shape, self.dtype = (batch, classes, inner), np.dtype(dtype)
        self.code = CODES[self.dtype.name]
        self.T = storage(self.code).T
        self.rng = rng = np.random.default_rng(seed)
        self.x = (3 * rng.standard_normal(self.shape)).astype(dtype)
        self.labels = rng.integers(0, classes, (batch, inner))
        self.smoothing, self.ignore = smoothing, ignore
        self.q = self.weight = self.sample_weight = self.upstream = None

    def probabilities(self):
        q = self.rng.random(self.shape) ** 4
        self.q = (q / q.sum(axis=1, keepdims=True)).astype(self.dtype)
        return self

    def weigh(self, classes=True, rows=True, upstream=True):
        batch, count, inner = self.shape
        if classes:
            self.weight = self.rng.uniform(0.5, 2, count).astype(self.T)
        if rows:
            self.sample_weight = self.rng.integers(0, 3, (batch, inner)).astype(self.T)
        if upstream:
            self.upstream = self.rng.uniform(-1, 1, (batch, inner)).astype(self.T)
        return self

    def exact(self):
        """Terms, gradients by scores and probabilities, curvature in float64."""
        wide = [None if a is None else a.astype(np.float64) for a in (self.x, self.q, self.weight)]
        x, q, weight = wide
        batch, classes, inner = self.shape
        target = self.labels if q is None else q
        options = dict(
            weight=weight, ignore_index=self.ignore, label_smoothing=self.smoothing, reduction="none"
        )
        terms = reference.cross_entropy(x, target, **options, sample_weight=self.sample_weight)
        share = np.ones((batch, inner)) if self.sample_weight is None else self.sample_weight.astype(float)
        w = np.ones((1, classes, 1)) if weight is None else weight[:, np.newaxis]
        if q is None:
            share = np.where(self.labels != self.ignore, share, 0)
            label = np.where(self.labels != self.ignore, self.labels, 0)
            q = np.moveaxis(np.eye(classes)[label], -1, 1)
        shares = share[:, np.newaxis]
        t = w * ((1 - self.smoothing) * q + self.smoothing / classes)
        with np.errstate(all="ignore"):
            e = np.exp(x - x.max(axis=1, keepdims=True))
            p = e / e.sum(axis=1, keepdims=True)
            rest = np.where(p > 0.5, (e.sum(axis=1, keepdims=True) - e) / e.sum(axis=1, keepdims=True), 1 - p)
            far = x.max(axis=1, keepdims=True) - x + np.log(e.sum(axis=1, keepdims=True))
        total = t.sum(axis=1, keepdims=True)
        up = 1.0 if self.upstream is None else self.upstream.astype(float)[:, np.newaxis]
        with np.errstate(all="ignore"):
            outputs = total * p - t, (1 - self.smoothing) * w * far, total * p * rest
        return terms, *(np.where(shares == 0, 0, shares * up * o) for o in outputs)

    def run(
        self, plan=None, grad=True, terms=True, target_grad=False, curvature=False, in_place=False,
        summed=True, vectors=None, order="forward", seed=0, divisor=None, factor=1.0, smoothed=None,
    ):  # fmt: skip
        """The outputs by name; `value` is that of `finish`."""
        batch, classes, inner = self.shape
        n = batch * inner
        if vectors is None:
            vectors = (inner if inner > 1 else classes) % storage(self.code).width == 0
        plan = plan or rows.plan(batch, classes, inner, self.code, vectors)
        request = Request(
            has_probabilities=self.q is not None,
            smoothed=self.smoothing > 0 if smoothed is None else smoothed,
            weighted=self.weight is not None,
            sample_weighted=self.sample_weight is not None,
            upstream=self.upstream is not None,
            terms=terms,
            grad=grad,
            target_grad=target_grad,
            curvature=curvature,
        )
        shift = 0 if vectors else 1
        x, q, weight, sample_weight, upstream = (
            None if a is None else aligned(a, shift)
            for a in (self.x, self.q, self.weight, self.sample_weight, self.upstream)
        )

        def blank(wanted, size):
            return aligned(np.full(size, np.nan, self.dtype), shift) if wanted else None

        made = dict(
            terms=blank(terms, n),
            grad=x if in_place and grad else blank(grad, x.size),
            target_grad=q if in_place and target_grad else blank(target_grad, x.size),
            curvature=blank(curvature, x.size),
        )
        T = self.T
        partials = np.full(2 * plan.partials, np.nan, T) if summed else None
        faults = None if request.has_probabilities else np.zeros(1, np.int64)
        scratch = np.full(plan.blocks * softmax.STATE, np.nan, T) if plan.variant == SPLIT else None
        arguments = (
            x, q, self.labels.reshape(-1) if q is None else None, weight, sample_weight, upstream,
            *made.values(), batch, classes, inner, plan.deal, self.ignore, T(1 - self.smoothing),
            T(self.smoothing / classes) if request.has_probabilities or request.smoothed else None,
            None, None, (), T(factor), divisor, partials, faults, scratch,
        )  # fmt: skip
        for kernel in softmax.kernels(CROSS_ENTROPY, request, self.code, plan, vectors):
            launch(kernel, plan.blocks, plan.threads, *arguments, order=order, seed=seed)
        results = {k: a.astype(np.float64) for k, a in made.items() if a is not None}
        for name in results:
            results[name] = results[name].reshape((batch, inner) if name == "terms" else self.shape)
        if summed:
            value = np.full(1, np.nan, T)
            finish = reduce.finish_kernel(FLOAT64 if T is np.float64 else CODES["float32"])
            launch(finish, 1, 64, partials, plan.partials, 1.0, None, value)
            results["value"] = float(value[0])
        if faults is not None:
            results["fault"] = recorded(int(faults[0]))
        return results


def close(got, wanted, dtype, scale=1.0):
    """Within some roundings of the arithmetic, relative to `scale` or the number, and one of the storage."""
    arithmetic = np.float64 if dtype == np.float64 else np.float32
    eps = {"bfloat16": 2**-8, "float16": 2**-11}.get(np.dtype(dtype).name, 0)
    tiny = 2.0**-24 if eps == 2**-11 else 1e-38
    error = 32 * np.finfo(arithmetic).eps * (scale + np.abs(wanted)) + eps * np.abs(wanted) + tiny
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_less(np.where(same, 0, np.abs(got - wanted)), error)


def check(call, result):
    terms, slope, target_slope, curvature = call.exact()
    for name, wanted in (("terms", terms), ("grad", slope), ("target_grad", target_slope)):
        if name in result:
            close(result[name], wanted, call.dtype)
    if "curvature" in result:
        assert (result["curvature"] >= 0).all() or call.upstream is not None
        close(result["curvature"], curvature, call.dtype)
    if "value" in result:
        close(result["value"], terms.sum(), np.float64 if call.T is np.float64 else np.float32, terms.size)
    assert result.get("fault") is None


# For each variant a shape with which its small launch has full and empty lanes, and several rounds of rows.
SHAPES = {
    TEAM: (21, 24, 1),
    BLOCK: (3, 136, 1),
    STREAM: (3, 1112, 1),
    SPLIT: (2, 1544, 1),
    COLUMNS: (3, 7, 104),
}
# With half as many lanes and single elements.
ODD = {TEAM: (21, 13, 1), BLOCK: (3, 67, 1), STREAM: (3, 555, 1), SPLIT: (2, 777, 1), COLUMNS: (3, 5, 33)}


def small(variant, shape, deal=None):
    plan = SMALL[variant](shape[0])
    return plan if deal is None else plan._replace(deal=deal)


def some_call(variant, probable=False, smoothing=0.0, weights="", dtype=np.float32, seed=0, shape=None):
    """A call; of `weights` "c" gives classes weights, "r" rows, and "u" there is an upstream gradient."""
    call = Call(*(shape or SHAPES[variant]), dtype=dtype, smoothing=smoothing, seed=seed)
    call.weigh("c" in weights, "r" in weights, "u" in weights)
    return call.probabilities() if probable else call


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("weights", ["", "c", "ru", "cru"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_indices(variant, smoothing, weights):
    call = some_call(variant, False, smoothing, weights)
    check(call, call.run(small(variant, call.shape), curvature=True, order="random"))


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("weights", ["", "c", "ru", "cru"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities(variant, smoothing, weights):
    call = some_call(variant, True, smoothing, weights)
    check(call, call.run(small(variant, call.shape), curvature=True, target_grad=True, order="random"))


OUTPUTS = ("terms", "summed", "grad", "target_grad", "curvature")


PAIRS = list(itertools.combinations(OUTPUTS, 2))


@pytest.mark.parametrize(
    "variant, wanted",
    [(v, pair) for n, v in enumerate(SHAPES) for k, pair in enumerate(PAIRS) if (k + n) % 3],
)
def test_outputs_in_pairs(variant, wanted):
    given = {name: name in wanted for name in OUTPUTS}
    for probable in {True, "target_grad" in wanted}:
        call = some_call(variant, probable, 0.05, "ru", seed=2)
        check(call, call.run(small(variant, call.shape), **given))


@pytest.mark.parametrize("deal", range(6))
def test_teams_and_slices(deal):
    for smoothing in (0.0, 0.1):
        call = Call(9, (4 << deal) - 1, smoothing=smoothing)
        check(call, call.run(small(TEAM, call.shape, deal), vectors=False))
    call = Call(2, 11, 40, smoothing=0.1)
    check(call, call.run(Plan(COLUMNS, 2, 64, deal, 2), curvature=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", SHAPES)
def test_storages_vectors_and_orders(variant, dtype, request):
    dtype = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    for vectors in (True, False):
        results = []
        for order in ORDERS:
            shape = SHAPES[variant] if vectors else ODD[variant]
            call = some_call(variant, False, 0.1, "cru", dtype=dtype, seed=4, shape=shape)
            results.append(call.run(small(variant, shape), vectors=vectors, order=order, seed=5))
            check(call, results[-1])
        for other in results[1:]:  # the same bits
            for name, array in results[0].items():
                np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("probable", [False, True])
@pytest.mark.parametrize("variant", SHAPES)
def test_in_place(variant, probable):
    def result(**how):
        call = some_call(variant, probable, 0.1, "cru", seed=6)
        return call.run(small(variant, call.shape), target_grad=probable, order="reverse", **how)

    apart, over = result(), result(in_place=True)
    for name, array in apart.items():
        np.testing.assert_array_equal(over[name], array)


@pytest.mark.parametrize("variant", SHAPES)
def test_what_does_not_count_is_zero_whatever_it_holds(variant):
    batch, classes, inner = SHAPES[variant]
    call = some_call(variant, False, 0.1, "cru", seed=7, shape=(max(batch, 6), classes, inner))
    plain = call.exact()
    dead = call.sample_weight == 0
    ignored = np.zeros_like(dead)
    ignored.reshape(-1)[::5] = True
    call.labels = np.where(ignored, -100, call.labels)
    dead |= ignored
    assert dead.any() and not dead.all()
    hidden = np.broadcast_to(dead[:, np.newaxis], call.shape)
    call.x = np.where(hidden, np.where(np.arange(call.shape[1])[:, np.newaxis] % 2, np.nan, np.inf), call.x)
    call.x = call.x.astype(np.float32)
    result = call.run(small(variant, call.shape), curvature=True)
    for name, wanted in zip(("terms", "grad", "curvature"), (plain[0], plain[1], plain[3]), strict=True):
        where = dead if name == "terms" else hidden
        assert not result[name][where].any()
        close(result[name], np.where(where, 0, wanted), np.float32)
    assert result["fault"] is None and np.isfinite(result["value"])


@pytest.mark.parametrize("variant", SHAPES)
def test_an_ignored_class_stays_in_the_softmax(variant):
    call = some_call(variant, seed=8)
    call.ignore = 3
    call.labels.reshape(-1)[:1] = 3
    check(call, call.run(small(variant, call.shape)))


@pytest.mark.parametrize("variant", SHAPES)
def test_a_zero_class_weight(variant):
    for smoothing in (0.0, 0.2):
        call = some_call(variant, False, smoothing, "c", seed=9)
        call.weight[call.labels.reshape(-1)[0]] = 0
        # Of a class of no weight -inf costs nothing.
        if smoothing:
            call.x[:, call.weight == 0] = -np.inf
        check(call, call.run(small(variant, call.shape)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("variant", SHAPES)
def test_huge_logits_lose_nothing(variant, smoothing):
    call = some_call(variant, False, smoothing, seed=10)
    steps = call.rng.integers(0, 3, call.shape)
    call.x = (1e8 + 8.0 * steps).astype(np.float32)
    low = Call(*call.shape, smoothing=smoothing)
    low.x, low.labels = (8.0 * steps).astype(np.float32), call.labels
    a, b = (c.run(small(variant, c.shape)) for c in (call, low))
    check(low, b)
    for name in ("terms", "grad", "value"):
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("probable", [False, True])
@pytest.mark.parametrize("variant", SHAPES)
def test_infinite_logits(variant, probable):
    call = some_call(variant, probable, seed=11)
    x = np.moveaxis(call.x, 1, -1).reshape(-1, call.shape[1])
    labels = call.labels.reshape(-1)
    x[0, :] = -np.inf
    x[1, ::2] = -np.inf
    labels[1] = 1
    if probable:
        np.moveaxis(call.q, 1, -1).reshape(-1, call.shape[1])[1, ::2] = 0
    if variant != SPLIT:
        x[2, 4] = np.inf
    call.x = np.ascontiguousarray(np.moveaxis(x.reshape(call.shape[0], call.shape[2], -1), -1, 1))
    if probable:
        q = np.moveaxis(call.q, 1, -1).reshape(-1, call.shape[1]).copy()
        q[1, ::2] = 0
        call.q = np.ascontiguousarray(np.moveaxis(q.reshape(call.shape[0], call.shape[2], -1), -1, 1))
    result = call.run(small(variant, call.shape), curvature=True)
    terms = result["terms"].reshape(-1)
    grad = np.moveaxis(result["grad"], 1, -1).reshape(-1, call.shape[1])
    assert np.isnan(terms[0]) and np.isnan(grad[0]).all()
    with np.errstate(invalid="ignore"):
        wanted = call.exact()
    close(terms[1], wanted[0].reshape(-1)[1], np.float32)
    close(grad[1], np.moveaxis(wanted[1], 1, -1).reshape(-1, call.shape[1])[1], np.float32)
    assert not grad[1, ::2].any()
    if variant != SPLIT:
        assert np.isnan(terms[2]) and np.isnan(grad[2]).all()
        close(terms[3:], wanted[0].reshape(-1)[3:], np.float32)
    assert np.isnan(result["value"])


@pytest.mark.parametrize("variant", SHAPES)
def test_the_own_class_at_minus_infinity(variant):
    call = some_call(variant, seed=12)
    np.moveaxis(call.x, 1, -1)[0, 0, call.labels[0, 0]] = -np.inf
    result = call.run(small(variant, call.shape))
    assert result["terms"][0, 0] == np.inf == result["value"]
    np.testing.assert_allclose(result["grad"][0, call.labels[0, 0], 0], -1, rtol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 80.0])
@pytest.mark.parametrize("variant", SHAPES)
def test_small_losses_do_not_cancel(variant, gap):
    call = some_call(variant, seed=13)
    call.x[...] = 0
    np.put_along_axis(call.x, call.labels[:, np.newaxis], gap, axis=1)
    result = call.run(small(variant, call.shape))
    others = (call.shape[1] - 1) * np.exp(-gap)
    np.testing.assert_allclose(result["terms"], others, rtol=1e-5)
    own = np.take_along_axis(result["grad"], call.labels[:, np.newaxis], axis=1)
    np.testing.assert_allclose(own, -others, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, "classes", 2**62, -(2**63)])
@pytest.mark.parametrize("variant", SHAPES)
def test_a_class_out_of_range_is_nan_and_recorded(variant, bad):
    call = some_call(variant, weights="r", seed=14)
    bad = call.shape[1] if bad == "classes" else bad
    rows_ = call.labels.size
    at = [rows_ - 1, rows_ // 2]
    good = call.run(small(variant, call.shape))
    call.labels.reshape(-1)[at] = bad
    call.sample_weight.reshape(-1)[at[0]] = 0  # checked all the same
    result = call.run(small(variant, call.shape), order="random", curvature=True)
    position, what = result["fault"]
    assert position == at[1] and (what == bad or abs(bad) > 2**20)
    assert np.isnan(result["value"])
    wrong = np.zeros(rows_, bool)
    wrong[at] = True
    wrong = wrong.reshape(call.labels.shape)
    for name in ("terms", "grad", "curvature"):
        where = wrong if name == "terms" else np.broadcast_to(wrong[:, np.newaxis], call.shape)
        np.testing.assert_array_equal(np.isnan(result[name]), where)
        if name in good:
            np.testing.assert_array_equal(result[name][~where], good[name][~where])


def counted(call):
    """The mean's divisor, as kernels make it."""
    n = call.labels.size
    grid = rows.counts_launch(n)
    partials, divisor = np.full(2 * grid.blocks, np.nan, call.T), np.zeros(1, call.T)
    flat = None if call.sample_weight is None else call.sample_weight.reshape(-1)
    launch(
        rows.counts_kernel(call.code), *grid, call.labels.reshape(-1), call.weight, flat, n, call.shape[1],
        call.ignore, partials,
    )  # fmt: skip
    finish = reduce.finish_kernel(FLOAT64 if call.T is np.float64 else CODES["float32"])
    launch(finish, 1, 64, partials, grid.blocks, 1.0, None, divisor)
    return divisor


@pytest.mark.parametrize("weights", ["", "c", "r", "cr"])
def test_the_mean_divides_by_what_counts(weights):
    call = some_call(TEAM, False, 0.1, weights, shape=(700, 8, 1))
    call.labels[::3] = -100
    live = call.labels != call.ignore
    w = np.ones(8) if call.weight is None else call.weight.astype(float)
    share = 1.0 if call.sample_weight is None else call.sample_weight
    wanted = np.where(live, w[np.where(live, call.labels, 0)] * share, 0).sum()
    divisor = counted(call)
    np.testing.assert_allclose(divisor[0], wanted, rtol=1e-7)
    result = call.run(small(TEAM, call.shape), divisor=divisor, factor=2.0)
    close(result["grad"] * divisor[0] / 2, call.exact()[1], np.float32)


@pytest.mark.parametrize("variant", SHAPES)
def test_a_mean_over_nothing_has_a_zero_gradient(variant):
    call = some_call(variant)
    call.labels[:] = call.ignore
    divisor = counted(call)
    assert divisor[0] == 0
    result = call.run(small(variant, call.shape), divisor=divisor)
    assert not result["grad"].any() and not result["terms"].any()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (40, 1, 1), (3, 2, 1), (0, 5, 1), (3, 10, 1), (5, 3, 2), (1, 2, 5), (2, 300, 1)]
)
def test_the_plans_own_launch(shape):
    call = Call(*shape, smoothing=0.1)
    check(call, call.run(curvature=True))


def test_plans():
    """The variant follows from the shape, and every thread has its share."""
    for code, vectors in itertools.product(CODES.values(), (True, False)):
        width = storage(code, vectors).width
        for batch, classes, inner in itertools.product(
            (0, 1, 64, 10**6), (8, 64, 1000, 32000, 131072), (1, 64)
        ):
            plan = rows.plan(batch, classes, inner, code, vectors)
            held = rows.repeat(code, vectors, plan.variant) * width
            assert 1 <= plan.blocks <= max(reduce.MOST_BLOCKS, 2 * rows.ENOUGH_BLOCKS)
            assert plan.threads % 32 == 0 and plan.threads <= 512
            assert (plan.variant == COLUMNS) == (inner > 1)
            if plan.variant == TEAM:
                assert held << plan.deal >= classes and plan.deal <= 5
            if plan.variant == BLOCK:
                assert held * plan.threads >= classes
            if plan.variant == SPLIT:
                assert plan.blocks == batch * plan.deal and classes // plan.deal >= rows.PART
    assert rows.plan(64, 131072, 1, CODES["float32"], True).variant == SPLIT
    assert rows.plan(4096, 131072, 1, CODES["float32"], True).variant == STREAM
    assert rows.plan(64, 131072, 1, CODES["float32"], True, split=False).variant == STREAM


def test_unaligned_arrays_are_refused_by_vectors():
    call = Call(3, 9)
    with pytest.raises(Fault, match="not aligned"):
        call.run(small(TEAM, call.shape), vectors=True)


# ---- compiled -----------------------------------------------------------------------------------------

REQUESTS = {
    "value": Request(),
    "gradient": Request(grad=True),
    "smoothed": Request(smoothed=True, grad=True),
    "weighted": Request(
        smoothed=True, weighted=True, sample_weighted=True, grad=True, terms=True, upstream=True
    ),
    "curvature": Request(grad=True, curvature=True),
    "probabilities": Request(has_probabilities=True, weighted=True, grad=True),
    "both": Request(has_probabilities=True, grad=True, target_grad=True),
}
PLANS = {
    TEAM: Plan(TEAM, 1, 256, 3, 1),
    BLOCK: Plan(BLOCK, 1, 512, 0, 1),
    STREAM: Plan(STREAM, 1, 256, 0, 1),
    SPLIT: Plan(SPLIT, 1, 256, 2, 1),
    COLUMNS: Plan(COLUMNS, 1, 256, 0, 1),
    "slices": Plan(COLUMNS, 1, 256, 2, 1),
}
AMPERE, HOPPER = (8, 0), (9, 0)


def instructions(binary):
    body = binary.ptx[binary.ptx.index("{") :]
    return re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", body, re.M)


def inspect(binary, code, vectors, writes, most):
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF"
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    assert binary.registers <= most
    assert binary.shared_bytes <= 48 * 1024
    if code != FLOAT64:
        assert not [i for i in used if ".f64" in i]
    loads = any(i.startswith("ld.global.v") for i in used)
    stores = any(i.startswith("st.global.v") for i in used)
    assert loads == vectors and stores == (vectors and writes)


def budget(name, what, code, cc):
    """Registers a thread. 64 keep half of a multiprocessor's threads at work, 128 a quarter."""
    if name in (COLUMNS, "slices"):  # a state for each lane, eight of them with halves
        return 192
    fast = what in ("value", "gradient") and code == CODES["float32"]
    return 160 if code == FLOAT64 else 136 if not fast else 64 if cc == HOPPER else 112


def compiled(name, what, code, cc, vectors):
    r = REQUESTS[what]
    plan = PLANS[name]
    binaries = softmax.compile_kernels(
        CROSS_ENTROPY, r, code, cc, plan, divided=what == "weighted", vectors=vectors
    )
    assert len(binaries) == (2 if name == SPLIT else 1)
    for k, binary in enumerate(binaries):
        writes = (r.grad or r.target_grad or r.curvature) and not (name == SPLIT and k == 0)
        if writes or not (name == SPLIT and k == 1):  # the value alone reads no scores again
            terms = r.terms and name in (COLUMNS, "slices")
            inspect(binary, code, vectors, writes or terms, budget(name, what, code, cc))


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


@pytest.mark.parametrize("name, what, dtype, cc, vectors", SELECTED)
def test_compiled(name, what, dtype, cc, vectors):
    compiled(name, what, CODES[dtype], cc, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("name", PLANS)
def test_compiled_exhaustive(name, what, dtype, cc, vectors):
    compiled(name, what, CODES[dtype], cc, vectors)


@pytest.mark.parametrize("dtype, cc", [("float32", HOPPER), ("float64", AMPERE)])
@pytest.mark.parametrize("weighted", [True, False])
def test_counts_compiled(dtype, cc, weighted):
    binary = rows.compile_counts(CODES[dtype], cc, weighted, not weighted)
    assert binary.local_bytes == 0 and binary.registers <= 64
    assert dtype == "float64" or not [i for i in instructions(binary) if ".f64" in i]
