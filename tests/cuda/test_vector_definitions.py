"""Losses of vectors by definition on an emulated device, against the CPU's in float64; and compiled."""

import emulated
import numpy as np
import pytest
from emulated import CuPyArray, Plain, Tensor, host, put
from test_cuda_vectors import AMPERE, COMPILED, HOPPER, instructions

import numbaloss as nl
from numbaloss import testing
from numbaloss.kernels.cuda import binaries, vectors
from numbaloss.kernels.cuda.rows import BLOCK, STREAM, TEAM
from numbaloss.kernels.cuda.vectors import Request
from numbaloss.kernels.spec import CODES, COSINE, FLOAT64, ROOT_OF_SQUARES, Distance


class SumTriplet(nl.VectorLoss):
    margin: float = 1.0
    eps: float = 1e-6

    def terms(anchor, positive, negative, eps):
        return (anchor - positive + eps) ** 2, (anchor - negative + eps) ** 2

    def finish(near, far, margin):
        return nl.math.maximum(margin + nl.math.sqrt(near) - nl.math.sqrt(far), 0.0)


def squares(x, y):
    return (x - y) ** 2


def pulled(total, label, margin=3.0):
    return label * total + (1 - label) * nl.math.maximum(margin - nl.math.sqrt(total), 0.0) ** 2


contrastive = nl.vector_loss(squares, pulled, name="contrastive")


class Scaled(contrastive.Class):
    homogeneous = 2
    lengths = ("margin",)


class Cauchy(nl.VectorLoss):
    """Options in both functions, a flag, two row arrays of which one enters with its square."""

    width: float = 1.5
    squared: bool = True

    def terms(x, y, width, squared):
        d = (x - y) / width
        return d * d if squared else abs(d)

    def finish(total, weight, shift, width, squared):
        return weight * nl.math.log1p(total + shift * shift) * width + (0.5 if squared else 0.0) * shift


class Six(nl.VectorLoss):
    """As many sums as can be, of three vectors."""

    def terms(a, b, c):
        return a * b, b * c, c * a, a * a, b * b, nl.math.exp(-c * c)

    def finish(ab, bc, ca, aa, bb, cc):
        return (ab + 2 * bc - ca) / nl.math.sqrt(1 + aa + bb) + nl.math.log1p(cc)


class Drawn(nl.VectorLoss):
    """A distance in place of terms, and a row array that is differentiated."""

    vectors = "x", "y"
    distance = Distance(ROOT_OF_SQUARES)

    def finish(distance, strength):
        return strength * strength * distance


LOSSES = {
    f.__name__: f
    for f in (
        SumTriplet.function,
        contrastive,
        Scaled.function,
        Cauchy.function,
        Six.function,
        Drawn.function,
        nl.contrastive_loss,
        nl.cosine_embedding_loss,
        nl.triplet_margin_loss,
    )
}
OF_TERMS = [n for n, f in LOSSES.items() if f.Class.terms is not None]
SHAPES = [(5, 6), (3, 7), (6,), (2, 3, 8), (2, 150)]


@pytest.fixture
def gpu(monkeypatch):
    return emulated.install(monkeypatch)


@pytest.fixture(params=[TEAM, BLOCK, STREAM])
def variant(request, monkeypatch):
    """Rows of 140 coordinates are held by a block, or streamed; of fewer by a part of a warp."""
    if request.param == STREAM:
        monkeypatch.setattr(vectors, "MOST_HOLDING", 0)
    return request.param, (9, 24) if request.param == TEAM else (3, 140)


def sample(loss, shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {n: rng.normal(size=shape).astype(dtype) for n in loss.Class.vectors}
    for n in loss.Class._rows:
        labels = rng.integers(0, 2, shape[:-1]) if n in loss.Class.labels else rng.random(shape[:-1])
        arrays[n] = np.asarray(labels).astype(dtype)
    return arrays


def moved(call, kind=CuPyArray):
    return {n: put(kind, a) if isinstance(a, np.ndarray) else a for n, a in call.items()}


def wide(call):
    return {
        n: a.astype(float) if isinstance(a, np.ndarray) and a.dtype.kind not in "biu" else a
        for n, a in call.items()
    }


def near(got, wanted, bound=2e-5):
    got = host(got).astype(float)
    size = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound * size)


def check(loss, call, bound=2e-5, kind=CuPyArray, **more):
    wrt = loss.Class._differentiable()
    value, gradients = loss.value_and_grad(**moved(call, kind), wrt=wrt, **more)
    expected, by = loss.value_and_grad(**wide(call), wrt=wrt, **more)
    near(value, expected, bound)
    for n, g, e in zip(wrt, gradients, by, strict=True):
        assert type(g) is kind and host(g).dtype == call[n].dtype and host(g).shape == np.shape(call[n])
        near(g, e, bound)
    near(loss(**moved(call, kind), **more), expected, bound)
    return gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(gpu, name, shape):
    loss = LOSSES[name]
    if loss.Class.most_axes is not None and len(shape) > loss.Class.most_axes:
        return
    rng, rows = np.random.default_rng(1), shape[:-1]
    call = sample(loss, shape)
    check(loss, call)
    weights = np.asarray(rng.integers(1, 3, rows).astype("f4"))
    up = np.asarray(rng.normal(size=rows).astype("f4"))
    check(loss, {**call, "sample_weight": weights}, normalizer=2.5)
    given = dict(reduction="none", grad_output=up, sample_weight=weights)
    wrt = loss.Class._differentiable()[-1]
    terms, gradient = loss.value_and_grad(**moved({**call, **given}), wrt=wrt)
    expected, by = loss.value_and_grad(**wide({**call, **given}), wrt=wrt)
    near(terms, expected)
    near(gradient, by)


@pytest.mark.parametrize("name", OF_TERMS)
def test_how_threads_are_dealt(gpu, name, variant):
    plan, shape = variant
    loss = LOSSES[name]
    assert vectors.plan(*shape, CODES["float32"], True).variant == plan
    call = sample(loss, shape, seed=2)
    gradients = check(loss, call)
    for n, g in zip(
        loss.Class._differentiable(), gradients, strict=True
    ):  # the same bits alone, and in place
        given = moved(call)
        alone = loss.grad(**given, wrt=n, out=given[n])
        assert alone is given[n]
        np.testing.assert_array_equal(host(alone), host(g))


@pytest.mark.parametrize("name", OF_TERMS)
def test_curvature(gpu, name, variant):
    loss, rng = LOSSES[name], np.random.default_rng(3)
    call = sample(loss, variant[1], seed=3)
    rows = variant[1][:-1]
    call["sample_weight"] = rng.integers(0, 3, rows).astype("f4")
    for n in loss.Class._differentiable():
        value, *found = loss.value_grad_hess(**moved(call), wrt=n, reduction="sum", grad_output=1.5)
        expected, *wanted = loss.value_grad_hess(**wide(call), wrt=n, reduction="sum", grad_output=1.5)
        near(value, expected)
        for g, e in zip(found, wanted, strict=True):
            near(g, e, 1e-4)
        assert not host(found[1])[call["sample_weight"] == 0].any()


@pytest.mark.parametrize("kind", [CuPyArray, Tensor, Plain])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(gpu, dtype, kind, bfloat16):
    if dtype == "bfloat16" and kind is Plain:
        return
    dtype = bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    bound = {"float64": 1e-11, "float16": 3e-3, "bfloat16": 3e-2}[dtype.name]
    for name in ("Cauchy", "SumTriplet", "contrastive_loss"):
        loss = next(f for n, f in LOSSES.items() if f.Class.__name__ == name or n == name)
        check(loss, sample(loss, (4, 8), dtype), bound, kind)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8", "u8", "f2", "f8"])
def test_row_arrays_of_any_dtype(gpu, dtype):
    x, y = (np.random.default_rng(k).normal(size=(6, 5)).astype("f4") for k in range(2))
    target = np.array([0, 1, 1, 0, 0, 1]).astype(dtype)
    for loss in (nl.contrastive_loss, contrastive):
        arrays = [x, y, target]
        value, gradients = loss.value_and_grad(*(put(CuPyArray, a) for a in arrays), wrt=loss.Class.vectors)
        expected, by = loss.value_and_grad(x.astype(float), y.astype(float), target, wrt=loss.Class.vectors)
        near(value, expected)
        assert host(value).dtype == loss(*arrays).dtype
        for g, e in zip(gradients, by, strict=True):
            near(g, e)


def test_mixed_dtypes_and_layouts(gpu):
    call = sample(LOSSES["contrastive"], (6, 8))
    call["y"] = call["y"].astype("f2")
    call["label"] = np.repeat(call["label"].astype("f8"), 2)[::2]
    call["x"] = np.asfortranarray(call["x"])
    check(contrastive, call, 1e-3)


@pytest.mark.parametrize("size", [1e-22, 1e-15, 1.0, 1e17])
def test_rows_are_scaled(gpu, size):
    """Squares of float32 overflow or vanish; the gradients and the curvature do not."""
    call = sample(Scaled.function, (5, 6), seed=4)
    call = {n: (size * a).astype("f4") if n != "label" else a for n, a in call.items()}
    options = dict(margin=3 * size, reduction="none")
    for n in ("x", "label"):
        _, *found = Scaled.function.value_grad_hess(**moved(call), wrt=n, **options)
        _, *wanted = contrastive.value_grad_hess(**wide(call), wrt=n, **options)
        for g, e in zip(found, wanted, strict=True):
            e = np.asarray(e).astype("f4")
            np.testing.assert_allclose(host(g), e, rtol=2e-4, atol=2e-45 + 1e-5 * abs(e).max())


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_options_much_longer_than_vectors_stay_finite(gpu, size):
    """Scaled as far as tiny vectors would want it, the square of a margin of 5 would be infinite."""
    x = np.full((2, 4), size, "f4")
    call = dict(x=x, y=0 * x, label=np.array([0, 1], "f4"), margin=5.0, reduction="none")
    terms, gradient = Scaled.function.value_and_grad(**moved(call), wrt="x")
    expected, slope = contrastive.value_and_grad(**wide(call), wrt="x")
    near(terms, expected)
    if size:  # the root's slope at 0 is infinite
        near(gradient, slope)


def test_rows_of_no_weight_are_zero_whatever_they_hold(gpu):
    for name in ("Cauchy", "Scaled", "SumTriplet"):
        loss = next(f for f in LOSSES.values() if f.Class.__name__ == name)
        call = sample(loss, (6, 8), seed=5)
        call["sample_weight"] = np.array([1, 0, 2, 1, 0, 1], "f4")
        wrt = loss.Class._differentiable()
        value, gradients = loss.value_and_grad(**moved(call), wrt=wrt)
        for bad in (np.nan, np.inf):
            dirty = {n: a.copy() for n, a in call.items()}
            for n in wrt:
                dirty[n][call["sample_weight"] == 0] = bad
            again, found = loss.value_and_grad(**moved(dirty), wrt=wrt)
            assert host(again) == host(value)
            for g, e in zip(found, gradients, strict=True):
                np.testing.assert_array_equal(host(g), host(e))
                assert not host(g)[call["sample_weight"] == 0].any()


def test_equal_vectors_have_finite_gradients(gpu):
    x, label = np.ones((4, 8), "f4"), np.array([0, 1, 0, 1], "f4")
    value, gradients = nl.contrastive_loss.value_and_grad(*(put(CuPyArray, a) for a in (x, x, label)))
    assert host(value) == nl.contrastive_loss(x, x, label)
    assert not any(host(g).any() for g in gradients)


class Rooted(nl.VectorLoss):
    """Slopes of a term are infinite where a coordinate's difference is 0."""

    bound: float = 1.0

    def terms(x, y):
        return nl.math.sqrt(abs(x - y))

    def finish(total, bound):
        return nl.math.maximum(total - bound, 0.0)


def test_infinite_slopes(gpu):
    """As on the CPU: NaN where the difference is 0, but for rows of no slope or of no upstream gradient."""
    x = np.array([[1, 2, 3, 4], [1, 2, 0.5, 1], [1, 2, 3, 4]], "f4")
    y = np.array([[0, 2, 0, 0], [1, 2, 0.6, 1], [0, 2, 0, 0]], "f4")
    up = np.array([1, 1, 0], "f4")
    for loss, call in (
        (Rooted.function, dict(x=x, y=y)),
        (contrastive, dict(x=x, y=np.array([x[0], y[1], x[2]]), label=np.array([0, 1, 0], "f4"))),
    ):
        given = {**call, "grad_output": up, "reduction": "none"}
        got, wanted = (host(g) for g in loss.grad(**moved(given))), loss.grad(**wide(given))
        for g, e in zip(got, wanted, strict=True):
            assert np.isnan(e[0]).any() and not g[2].any() and not np.isnan(g[1]).any()
            np.testing.assert_allclose(g, e, rtol=1e-5)


def test_flags_are_compiled_and_numbers_are_not(gpu):
    loss = Cauchy.function
    call = sample(loss, (4, 8))
    check(loss, {**call, "squared": False})
    known = len(binaries._kernels)
    check(loss, {**call, "squared": False, "width": 0.7})
    assert len(binaries._kernels) == known


def test_an_edit_of_the_definition_makes_another_kernel():
    def identity(**change):
        f = Cauchy._functions._replace(**change)
        made = vectors.kernel(f, Request(None, wrt=(0,)), CODES["float32"], TEAM)
        return made.__qualname__, binaries._identity(vectors.compile_kernel, {"functions": f})

    def edited(total, weight, shift, width, squared):
        return 2 * weight * total

    before = identity()
    assert identity() == before
    for change in (dict(finish=edited), dict(terms=squares), dict(flags=(None, True)), dict(homogeneous=1)):
        assert all(a != b for a, b in zip(identity(**change), before, strict=True))


# ---- compiled ----------------------------------------------------------------------------------------------

ALL = (0, 1, 2)
COVERING = [
    (SumTriplet, Request(None, wrt=ALL), TEAM, "float32", HOPPER, True),
    (SumTriplet, Request(None, weighted=True, terms=True, wrt=ALL), STREAM, "bfloat16", HOPPER, True),
    (SumTriplet, Request(None), BLOCK, "float32", AMPERE, True),
    (contrastive.Class, Request(None, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (contrastive.Class, Request(None, wrt=(0, 1), row_wrt=(0,)), BLOCK, "float32", AMPERE, False),
    (contrastive.Class, Request(None, wrt=(0,), curvature=True), BLOCK, "float32", HOPPER, True),
    (Scaled, Request(None, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (Scaled, Request(None, wrt=(0, 1)), STREAM, "float64", AMPERE, True),
    (Cauchy, Request(None, row_wrt=(1,), curvature=True), TEAM, "float16", HOPPER, True),
    (Six, Request(None, wrt=ALL), TEAM, "float32", AMPERE, True),
    (nl.contrastive_loss.Class, Request(ROOT_OF_SQUARES, wrt=(0, 1)), TEAM, "float32", HOPPER, True),
    (Drawn, Request(ROOT_OF_SQUARES, wrt=(0,), row_wrt=(0,)), TEAM, "float32", HOPPER, True),
    (Drawn, Request(COSINE, row_wrt=(0,)), BLOCK, "float32", AMPERE, True),
]


def compiled(cls, request, variant, dtype, cc, vectors_):
    flags = tuple(f if isinstance(f, bool) else None for f in map(_default(cls), cls._functions.options))
    plan = COMPILED[variant]
    if plan.threads > vectors.MOST_HOLDING >> (CODES[dtype] == FLOAT64):
        plan = plan._replace(threads=vectors.MOST_HOLDING // 2)
    return vectors.compile_kernel(
        cls._functions._replace(flags=flags), request, CODES[dtype], cc, plan, vectors=vectors_
    )


def _default(cls):
    return lambda n: cls.fields[n].default


@pytest.mark.parametrize("case", COVERING, ids=lambda c: f"{c[0].__name__}-{c[2]}-{c[3]}")
def test_compiled(case):
    """With the limits of the built-in losses: half a multiprocessor's threads for what is usual."""
    _, request, _, dtype, cc, vectors_ = case
    binary = compiled(*case)
    used = instructions(binary)
    assert binary.local_bytes == 0
    assert dtype == "float64" or not [i for i in used if ".f64" in i]
    assert any(i.startswith("ld.global.v") for i in used) == vectors_
    fast = cc == HOPPER and dtype == "float32" and not request.curvature
    assert binary.registers <= (64 if fast else 168), binary.registers


def test_check_loss_knows_them():
    for loss in (SumTriplet.function, contrastive):
        testing.check_loss(loss, roundings=64)
