"""The kernels of the margin losses and of `nll_loss`, interpreted against the reference, and compiled."""

import itertools
import re

import numpy as np
import pytest
from interpreter import ORDERS, launch

from numbaloss import reference
from numbaloss.kernels.cuda import margins, nll, reduce, rows
from numbaloss.kernels.cuda.margins import MANY, ONE, SOFT, Request
from numbaloss.kernels.cuda.rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, Plan
from numbaloss.kernels.cuda.target import recorded, storage
from numbaloss.kernels.spec import CODES, FLOAT64


def aligned(a, offset=0):
    """A copy of an array, flat, that starts at a multiple of 16 bytes, or `offset` elements further."""
    a = np.asarray(a).reshape(-1)
    room = np.empty(a.size + offset + 16, a.dtype)
    start = -(room.ctypes.data // a.itemsize) % (16 // a.itemsize) + offset
    room[start : start + a.size] = a
    return room[start : start + a.size]


def close(got, wanted, dtype, scale=1.0):
    """Within some roundings of the arithmetic, relative to `scale` or the number, and one of the storage."""
    arithmetic = np.float64 if dtype == np.float64 else np.float32
    eps = {"bfloat16": 2**-8, "float16": 2**-11}.get(np.dtype(dtype).name, 0)
    tiny = 2.0**-24 if eps == 2**-11 else 1e-38
    error = 32 * np.finfo(arithmetic).eps * (scale + np.abs(wanted)) + eps * np.abs(wanted) + tiny
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_less(np.where(same, 0, np.abs(got - wanted)), error)


def finished(partials, count, T):
    value = np.full(1, np.nan, T)
    finish = reduce.finish_kernel(FLOAT64 if T is np.float64 else CODES["float32"])
    launch(finish, 1, 64, partials, count, 1.0, None, value)
    return float(value[0])


class Call:
    """A call of a margin loss, to be run as a kernel and by the reference."""

    def __init__(self, loss, batch, classes, dtype=np.float32, seed=0, p=1, margin=1.0):
        self.loss, self.shape, self.dtype = loss, (batch, classes), np.dtype(dtype)
        self.code = CODES[self.dtype.name]
        self.T = storage(self.code).T
        self.rng = rng = np.random.default_rng(seed)
        self.x = rng.standard_normal(self.shape).astype(dtype)
        self.p, self.margin = p, margin
        self.weight = self.sample_weight = self.upstream = None
        if loss == ONE:
            self.labels = rng.integers(0, classes, batch)
        elif loss == SOFT:
            self.labels = rng.random(self.shape).astype(dtype)
        else:
            order = rng.random(self.shape).argsort(axis=-1)
            counts = rng.integers(0, min(classes, 6) + 1, (batch, 1))
            self.labels = np.where(np.arange(classes) < counts, order, -1)

    def weigh(self, classes=True, rows=True, upstream=True, each=False):
        batch, count = self.shape
        if classes:
            self.weight = self.rng.integers(0, 4, (batch, count) if each else count).astype(self.T)
        if rows:
            self.sample_weight = self.rng.integers(0, 3, batch).astype(self.T)
        if upstream:
            self.upstream = self.rng.uniform(-1, 1, batch).astype(self.T)
        return self

    def terms(self, x):
        options = dict(reduction="none", sample_weight=self.sample_weight)
        if self.loss == ONE:
            options |= dict(p=self.p, margin=self.margin, weight=self.weight)
            return reference.multi_margin_loss(x, self.labels, **options)
        if self.loss == SOFT:
            labels = self.labels.astype(float)
            return reference.multilabel_soft_margin_loss(x, labels, self.weight, **options)
        return reference.multilabel_margin_loss(x, self.labels, **options)

    def exact(self):
        """Terms, gradient and curvature in float64; the latter two by differences, all classes at once."""
        x = self.x.astype(float)
        terms, step = self.terms(x), 1e-5
        up = 1.0 if self.upstream is None else self.upstream.astype(float)
        slope, curvature = np.zeros(x.shape), np.zeros(x.shape)
        for c in range(x.shape[1]):
            d = np.zeros(x.shape)
            d[:, c] = step
            low, high = self.terms(x - d), self.terms(x + d)
            slope[:, c] = (high - low) / (2 * step) * up
            d *= 100
            curvature[:, c] = (self.terms(x - d) + self.terms(x + d) - 2 * terms) / (100 * step) ** 2 * up
        return terms, slope, curvature

    def run(
        self, plan=None, grad=True, target_grad=False, curvature=False, terms=True, summed=True,
        in_place=False, vectors=None, order="forward", seed=0, divisor=None, factor=1.0,
    ):  # fmt: skip
        batch, classes = self.shape
        T, loss = self.T, self.loss
        if vectors is None:
            vectors = classes % storage(self.code).width == 0
        plan = plan or margins.plan(loss, batch, classes, self.code, vectors)
        request = Request(
            loss,
            squared=loss == ONE and self.p == 2,
            weighted=self.weight is not None,
            sample_weighted=self.sample_weight is not None,
            upstream=self.upstream is not None,
            terms=terms,
            grad=grad,
            target_grad=target_grad,
            curvature=curvature,
        )
        shift = 0 if vectors else 1
        x, weight, sample_weight, upstream = (
            None if a is None else aligned(a, shift)
            for a in (self.x, self.weight, self.sample_weight, self.upstream)
        )
        labels = aligned(self.labels, shift if loss == SOFT else 0)

        def blank(wanted, size):
            return aligned(np.full(size, np.nan, self.dtype), shift) if wanted else None

        made = dict(
            terms=blank(terms, batch),
            grad=x if in_place else blank(grad, x.size),
            target_grad=blank(target_grad, x.size),
            curvature=blank(curvature, x.size),
        )
        partials = np.full(2 * plan.partials, np.nan, T) if summed else None
        faults = np.zeros(1, np.int64)
        ends = T(factor), divisor, partials
        if loss == ONE:
            arguments = (
                x, labels, weight, sample_weight, upstream, made["terms"], made["grad"], made["curvature"],
                batch, classes, plan.deal, T(self.margin), *ends, faults,
            )  # fmt: skip
        elif loss == SOFT:
            pitch = 0 if weight is None or weight.size == classes else classes
            arguments = (
                x, labels, weight, sample_weight, upstream, *made.values(), batch, classes, pitch,
                plan.deal, *ends,
            )  # fmt: skip
        else:
            scratch = aligned(np.full(margins.SCRATCH * classes * plan.blocks, np.nan, T), shift)
            arguments = (
                x, labels, sample_weight, upstream, made["terms"], made["grad"], batch, classes, *ends,
                faults, scratch,
            )  # fmt: skip
        kernel = margins.kernel(request, self.code, plan.variant, vectors)
        launch(kernel, plan.blocks, plan.threads, *arguments, order=order, seed=seed)
        results = {k: a.astype(float) for k, a in made.items() if a is not None}
        for name in results:
            results[name] = results[name].reshape((batch,) if name == "terms" else self.shape)
        if summed:
            results["value"] = finished(partials, plan.partials, T)
        results["fault"] = recorded(int(faults[0]))
        return results


def check(call, result):
    terms, slope, curvature = call.exact()
    wide = np.float64 if call.T is np.float64 else np.float32
    if "terms" in result:
        close(result["terms"], terms, call.dtype)
    if "value" in result:
        close(result["value"], terms.sum(), wide, terms.size)
    # Differences are good to some digits, and wrong where they step over a clamp, which few do.
    for name, wanted, error in (("grad", slope, 1e-4), ("curvature", curvature, 1e-2)):
        if name in result:
            if call.dtype.itemsize == 2:
                error += 2.0**-8
            wrong = np.abs(result[name] - wanted) > error * (1 + np.abs(wanted))
            assert wrong.mean() < 0.02, (name, np.argwhere(wrong))
    if "target_grad" in result:
        x = call.x.astype(float) / call.shape[1]
        for a in (call.sample_weight, call.upstream):
            x = x if a is None else x * a[:, np.newaxis]
        close(result["target_grad"], -x * (1.0 if call.weight is None else call.weight), call.dtype)
    assert result["fault"] is None


SMALL = {
    TEAM: Plan(TEAM, 2, 64, 3, 2),
    BLOCK: Plan(BLOCK, 2, 64, 0, 2),
    "many": Plan(STREAM, 2, 64, 0, 2),
}
CASES = [
    (ONE, TEAM, (21, 24)),
    (ONE, BLOCK, (3, 568)),
    (SOFT, TEAM, (21, 24)),
    (SOFT, BLOCK, (3, 568)),
    (MANY, "many", (7, 40)),
]


@pytest.mark.parametrize("loss, variant, shape", CASES)
@pytest.mark.parametrize("weights", ["", "c", "e", "ru", "cru"])
def test_value_and_gradient(loss, variant, shape, weights):
    for p in (1, 2) if loss == ONE else (1,):
        call = Call(loss, *shape, p=p, margin=0.5 if p == 2 else 1.0)
        each = "e" in weights and loss == SOFT
        call.weigh(loss != MANY and ("c" in weights or each), "r" in weights, "u" in weights, each)
        more = dict(curvature=loss == SOFT or p == 2, target_grad=loss == SOFT)
        check(call, call.run(SMALL[variant], order="random", **more))


@pytest.mark.parametrize("loss, variant, shape", CASES)
def test_outputs(loss, variant, shape):
    for grad, terms, summed in itertools.product((True, False), repeat=3):
        call = Call(loss, *shape, seed=1)
        result = call.run(SMALL[variant], grad=grad, terms=terms, summed=summed)
        assert {"grad": grad, "terms": terms, "value": summed} == {
            k: k in result for k in ("grad", "terms", "value")
        }
        check(call, result)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("loss, variant, shape", CASES)
def test_storages_vectors_and_orders(loss, variant, shape, dtype, request):
    dtype = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    for vectors in (True, False):
        results = []
        for order in ORDERS:
            batch, classes = shape
            call = Call(loss, batch, classes if vectors else classes - 3, dtype, seed=2)
            call.weigh(classes=loss != MANY)
            results.append(call.run(SMALL[variant], vectors=vectors, order=order, seed=3))
        check(call, results[0])
        for other in results[1:]:  # the same bits
            for name, array in results[0].items():
                np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("loss, variant, shape", CASES)
def test_in_place(loss, variant, shape):
    def result(**how):
        return Call(loss, *shape, seed=4, p=2).weigh(loss != MANY).run(SMALL[variant], order="reverse", **how)

    apart, over = result(), result(in_place=True)
    for name, array in apart.items():
        np.testing.assert_array_equal(over[name], array)


@pytest.mark.parametrize("loss, variant, shape", CASES)
def test_what_does_not_count_is_zero_whatever_it_holds(loss, variant, shape):
    call = Call(loss, *shape, seed=5).weigh(classes=False)
    dead = call.sample_weight == 0
    assert dead.any() and not dead.all()
    plain = call.run(SMALL[variant])
    call.x[dead, ::2], call.x[dead, 1::2] = np.nan, np.inf
    result = call.run(SMALL[variant])
    for name in ("terms", "grad", "value"):
        np.testing.assert_array_equal(result[name], plain[name])
    assert not result["terms"][dead].any() and not result["grad"][dead].any()
    assert np.isfinite(result["value"])


@pytest.mark.parametrize("loss, variant, shape", CASES)
def test_a_nan_makes_its_row_nan(loss, variant, shape):
    for own in (False, True):
        call = Call(loss, *shape, seed=6)
        if loss == MANY:
            call.labels[2, :3] = 5, 6, -1
        at = 0
        if loss == ONE:
            at = call.labels[2] if own else (call.labels[2] + 1) % shape[1]
        elif loss == MANY and own:
            at = 6
        call.x[2, at] = np.nan
        result = call.run(SMALL[variant])
        assert np.isnan(result["terms"][2]) and np.isnan(result["grad"][2, at]) and np.isnan(result["value"])
        rest = np.arange(shape[0]) != 2
        assert np.isfinite(result["terms"][rest]).all() and np.isfinite(result["grad"][rest]).all()


@pytest.mark.parametrize("bad", [-1, "classes", 2**62, -(2**63)])
@pytest.mark.parametrize("loss, variant, shape", [c for c in CASES if c[0] != SOFT])
def test_a_class_out_of_range_is_nan_and_recorded(loss, variant, shape, bad):
    bad = shape[1] if bad == "classes" else -2 if bad == -1 and loss == MANY else bad
    call = Call(loss, *shape, seed=7)
    good = call.run(SMALL[variant])
    wrong = np.zeros(shape[0], bool)
    wrong[[2, -1]] = True
    if loss == ONE:
        call.labels[wrong], place = bad, 2
    else:
        call.labels[wrong, 9], place = bad, 2 * shape[1] + 9  # after the list's end, too
        call.labels[2, 3] = -1
    result = call.run(SMALL[variant], order="random")
    assert result["fault"][0] == place and (result["fault"][1] == bad or abs(bad) > 2**20)
    assert np.isnan(result["value"])
    np.testing.assert_array_equal(np.isnan(result["terms"]), wrong)
    assert np.isnan(result["grad"][wrong]).all()
    np.testing.assert_array_equal(result["grad"][~wrong], good["grad"][~wrong])


def test_label_lists():
    """Full and empty lists, one class twice, and what stands after the end."""
    call = Call(MANY, 5, 40, seed=8)
    call.labels[0] = call.rng.permutation(40)
    call.labels[1] = -1
    call.labels[2, :4], call.labels[2, 4:] = (3, 1, 2, -1), 7
    call.labels[3] = -1
    call.labels[3, :33] = np.r_[5, np.arange(6, 37), 5]  # by the same thread, for the interpreter's sake
    plan = Plan(STREAM, 2, 32, 0, 2)
    check(call, call.run(plan))
    assert not call.run(plan)["grad"][:2].any()


def test_ties_have_no_slope():
    for loss, labels in ((ONE, np.zeros(3, int)), (MANY, np.array([[0] + [-1] * 7] * 3))):
        call = Call(loss, 3, 8)
        call.x[...], call.labels = 0, labels
        call.x[:, 0] = 1
        result = call.run()
        assert not result["terms"].any() and not result["grad"].any()


def test_soft_labels_neither_overflow_nor_cancel():
    call = Call(SOFT, 2, 8)
    call.x[0], call.x[1] = 1000, -1000
    call.labels[0], call.labels[1] = 1, 0
    result = call.run()
    assert not result["terms"].any() and not result["grad"].any()
    call.x[0] = 20
    np.testing.assert_allclose(call.run()["grad"][0] * 8, -np.exp(-20.0), rtol=1e-5)
    call.labels[0] = 0
    call.x[0] = 1000
    assert call.run()["terms"][0] == 1000


@pytest.mark.parametrize("loss", [ONE, SOFT, MANY])
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (3, 2), (5, 10), (2, 300)])
def test_the_plans_own_launch(loss, shape):
    call = Call(loss, *shape)
    check(call, call.run()) if shape[0] else call.run()


def test_scratch_is_bounded():
    for classes in (1, 1000, 10**6, 10**8):
        for code in CODES.values():
            plan = margins.plan(MANY, 10**6, classes, code, False)
            size = plan.blocks * classes * margins.SCRATCH * np.dtype(storage(code).T).itemsize
            assert plan.blocks == 1 or size <= margins.MOST_SCRATCH


def test_divisor_on_the_device():
    call = Call(ONE, 9, 16)
    for divisor, wanted in ((np.full(1, 4, np.float32), 0.5), (np.zeros(1, np.float32), np.nan)):
        got = call.run(divisor=divisor, factor=2.0)["grad"]
        np.testing.assert_allclose(got[call.x > 1], (call.run()["grad"] * wanted)[call.x > 1], rtol=1e-6)


# ---- the negative log-likelihood ----------------------------------------------------------------------

LAYOUTS = {
    TEAM: ((21, 24, 1), Plan(TEAM, 2, 64, 2, 2)),
    BLOCK: ((5, 136, 1), Plan(BLOCK, 2, 32, 0, 2)),
    STREAM: ((5, 136, 1), Plan(STREAM, 3, 32, 0, 3)),
    SPLIT: ((3, 264, 1), Plan(SPLIT, 6, 32, 2, 3)),
    COLUMNS: ((3, 7, 104), Plan(COLUMNS, 2, 32, 0, 2)),
    "slices": ((3, 7, 104), Plan(COLUMNS, 2, 32, 2, 2)),
}


class Pick:
    """A call of `nll_loss`, with its arrays as (batch, classes, inner)."""

    def __init__(self, shape, dtype=np.float32, weights="cru", seed=0):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.code = CODES[self.dtype.name]
        self.T = storage(self.code).T
        rng = np.random.default_rng(seed)
        batch, classes, inner = shape
        self.x = rng.standard_normal(shape).astype(dtype)
        self.labels = rng.integers(0, classes, (batch, inner))
        self.labels.reshape(-1)[::7] = -100
        self.weight = rng.integers(0, 4, classes).astype(self.T) if "c" in weights else None
        self.sample_weight = rng.integers(0, 3, (batch, inner)).astype(self.T) if "r" in weights else None
        self.upstream = rng.uniform(-1, 1, (batch, inner)).astype(self.T) if "u" in weights else None

    def exact(self):
        x = self.x.astype(float)
        terms = reference.nll_loss(
            x, self.labels, self.weight, reduction="none", sample_weight=self.sample_weight
        )
        live = self.labels != -100
        label = np.where(live, self.labels, 0)
        w = 1.0 if self.weight is None else self.weight[label]
        for a in (self.sample_weight, self.upstream):
            w = w if a is None else w * a.astype(float)
        slope = np.zeros(self.shape)
        np.put_along_axis(slope, label[:, np.newaxis], np.where(live, -w, 0)[:, np.newaxis], axis=1)
        return terms, slope

    def run(self, plan=None, vectors=None, order="forward", divisor=None):
        batch, classes, inner = self.shape
        n = batch * inner
        if vectors is None:
            vectors = (inner if inner > 1 else classes) % storage(self.code).width == 0
        plan = plan or rows.plan(batch, classes, inner, self.code, vectors)
        flat = [None if a is None else aligned(a) for a in (self.weight, self.sample_weight, self.upstream)]
        x, labels = aligned(self.x), aligned(self.labels)
        terms, g = aligned(np.full(n, np.nan, self.dtype)), aligned(np.full(x.size, np.nan, self.dtype))
        grid = nll.terms_launch(n)
        partials = np.full(2 * grid.blocks, np.nan, self.T)
        faults, again = np.zeros(1, np.int64), np.zeros(1, np.int64)
        launch(
            nll.terms_kernel(self.code), *grid, x, labels, *flat[:2], terms, n, classes, inner, -100,
            partials, faults, order=order,
        )  # fmt: skip
        put = nll.gradient_kernel(self.code, plan.variant, vectors)
        launch(
            put, plan.blocks, plan.threads, labels, *flat, g, batch, classes, inner, plan.deal, -100,
            self.T(1), divisor, again, order=order,
        )  # fmt: skip
        assert faults[0] == again[0]
        value = finished(partials, grid.blocks, self.T)
        shaped = terms.reshape(batch, inner).astype(float), g.reshape(self.shape).astype(float)
        return *shaped, value, recorded(int(faults[0]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nll(layout, vectors, dtype, request):
    dtype = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    shape, plan = LAYOUTS[layout]
    for order, weights in zip(ORDERS, ("", "c", "cru"), strict=True):
        call = Pick(shape if vectors else tuple(n - 1 if n > 1 else n for n in shape), dtype, weights)
        terms, slope = call.exact()
        got, g, value, fault = call.run(
            plan._replace(blocks=call.shape[0] * plan.deal) if layout == SPLIT else plan, vectors, order
        )
        close(got, terms, dtype)
        close(g, slope, dtype)
        assert fault is None and np.array_equal(g != 0, slope != 0)
        close(value, terms.sum(), np.float64 if call.T is np.float64 else np.float32, terms.size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nll_reads_nothing_else_and_refuses_bad_classes(layout):
    shape, plan = LAYOUTS[layout]
    call = Pick(shape, weights="r")
    call.labels.reshape(-1)[1] = 1
    call.sample_weight.reshape(-1)[:3] = 1
    terms, _ = call.exact()
    x = np.full(shape, np.nan, np.float32)
    keep = np.take_along_axis(call.x, np.where(call.labels < 0, 0, call.labels)[:, np.newaxis], 1)
    np.put_along_axis(x, np.where(call.labels < 0, 0, call.labels)[:, np.newaxis], keep, 1)
    dead = (call.labels < 0) | (call.sample_weight == 0)
    x[np.broadcast_to(dead[:, np.newaxis], shape)] = np.nan
    call.x = x
    got, g, value, _ = call.run(plan)
    close(got, terms, np.float32)
    assert np.isfinite(value)
    for bad in (-1, shape[1]):
        call.labels.reshape(-1)[1] = bad
        got, g, value, fault = call.run(plan)
        assert fault == (1, bad) and np.isnan(value)
        at = np.unravel_index(1, call.labels.shape)
        assert np.isnan(got[at]) and np.isnan(g[at[0], :, at[1]]).all()
        assert np.isnan(got).sum() == 1 and np.isnan(g).sum() == shape[1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 10, 1), (5, 3, 2), (2, 300, 1), (2, 6, 8), (0, 4, 1)])
def test_nll_in_the_plans_own_launch(shape):
    call = Pick(shape)
    terms, slope = call.exact()
    got, g, _, _ = call.run()
    close(got, terms, np.float32)
    close(g, slope, np.float32)


def test_nll_with_a_divisor_on_the_device():
    call = Pick((4, 8, 1), weights="")
    halved = call.run(divisor=np.full(1, 2, np.float32))[1]
    np.testing.assert_array_equal(halved * 2, call.run()[1])
    call.labels[...] = -100
    assert not call.run(divisor=np.zeros(1, np.float32))[1].any()


# ---- compiled -----------------------------------------------------------------------------------------

AMPERE, HOPPER = (8, 0), (9, 0)
REQUESTS = {
    "value": dict(),
    "gradient": dict(grad=True),
    "all": dict(sample_weighted=True, upstream=True, terms=True, grad=True),
}
PLANS = {
    TEAM: Plan(TEAM, 1, 256, 3, 1),
    BLOCK: Plan(BLOCK, 1, 512, 0, 1),
    STREAM: Plan(STREAM, 1, 256, 0, 1),
}
COMPILED = [
    *itertools.product((ONE, "squared", SOFT), (TEAM, BLOCK, STREAM)),
    (MANY, STREAM),
]


def instructions(binary):
    body = binary.ptx[binary.ptx.index("{") :]
    return re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", body, re.M)


def inspect(binary, code, loads, stores, most):
    used = instructions(binary)
    assert binary.image[:4] == b"\x7fELF"
    assert binary.local_bytes == 0 and not any(re.match(r"(ld|st)\.local", i) for i in used)
    assert binary.registers <= most
    if code != FLOAT64:
        assert not [i for i in used if ".f64" in i]
    assert any(i.startswith("ld.global.v") for i in used) == loads
    assert any(i.startswith("st.global.v") for i in used) == stores


def compiled(loss, variant, what, code, cc, vectors):
    more = dict(REQUESTS[what])
    if what == "all" and loss != MANY:
        more |= dict(weighted=True, curvature=loss != ONE, target_grad=loss == SOFT)
    request = Request(ONE if loss == "squared" else loss, squared=loss == "squared", **more)
    binary = margins.compile_kernel(request, code, cc, PLANS[variant], True, what == "all", vectors)
    fast = vectors and what == "gradient" and code == CODES["float32"] and cc == HOPPER and loss != MANY
    inspect(binary, code, vectors, vectors and what != "value", 64 if fast else 144)


COVERING = [
    ("gradient", "float32", HOPPER, True),
    ("all", "bfloat16", HOPPER, True),
    ("all", "float32", AMPERE, False),
    ("value", "float16", AMPERE, True),
    ("gradient", "float64", HOPPER, True),
]


SELECTED = [
    (*which, *covering)
    for n, which in enumerate(COMPILED)
    for k, covering in enumerate(COVERING)
    if (k == 0 or (k + n) % 4 == 0) and (which[1] != STREAM or which[0] == MANY)
]


@pytest.mark.parametrize("loss, variant, what, dtype, cc, vectors", SELECTED)
def test_compiled(loss, variant, what, dtype, cc, vectors):
    compiled(loss, variant, what, CODES[dtype], cc, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("cc", [AMPERE, HOPPER])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("loss, variant", COMPILED)
def test_compiled_exhaustive(loss, variant, what, dtype, cc, vectors):
    compiled(loss, variant, what, CODES[dtype], cc, vectors)


NLL_LAYOUTS = list(itertools.product((TEAM, BLOCK, SPLIT, COLUMNS), (True, False)))
NLL = list(itertools.product((nll.Request(), nll.Request(True, True, True, True)), CODES, (AMPERE, HOPPER)))


def nll_compiled(given, dtype, cc, variant, vectors):
    code = CODES[dtype]
    inspect(nll.compile_terms(given, code, cc), code, False, False, 64)
    plan = Plan(variant, 1, 256, 2, 1)
    inspect(nll.compile_gradient(given, code, cc, plan, True, vectors), code, False, vectors, 96)


@pytest.mark.parametrize("variant, vectors", NLL_LAYOUTS)
def test_nll_compiled(variant, vectors):
    k = 3 * [TEAM, BLOCK, SPLIT, COLUMNS].index(variant) + 5 * vectors
    nll_compiled(*NLL[k % len(NLL)], variant, vectors)


@pytest.mark.exhaustive
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("variant", [TEAM, BLOCK, SPLIT, COLUMNS])
@pytest.mark.parametrize("given, dtype, cc", NLL)
def test_nll_compiled_exhaustive(given, dtype, cc, variant, vectors):
    nll_compiled(given, dtype, cc, variant, vectors)
