"""Losses of vectors by definitions: terms and finish, of the user's own and beside the built-in ones."""

import pickle
import re

import numba
import numpy as np
import pytest
from definitions import Cauchy, Scaled, SumTriplet, contrastive, pulled, squares
from numba import njit
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference
from numbaloss.families.vectors import VectorLoss
from numbaloss.kernels.cpu import vectors as kernels
from numbaloss.testing import check_loss

LOSSES = [SumTriplet.function, contrastive, Cauchy.function]
BUILT_IN = [f for f in nl.registry.values() if issubclass(f.Class, VectorLoss)]


def sample(shape, count=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(dtype) for _ in range(count))


def labels(rows, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).random(rows).astype(dtype)


def contrastive_terms(x, y, label, margin=3.0):
    total = ((x - y) ** 2).sum(axis=-1)
    return label * total + (1 - label) * np.maximum(margin - np.sqrt(total), 0) ** 2


def differences(function, x, step=1e-4):
    """First and second derivatives of a function of rows by each coordinate."""
    first, second = np.empty_like(x), np.empty_like(x)
    for c in range(x.shape[-1]):
        moved = [x.copy() for _ in range(3)]
        moved[0][..., c] -= step
        moved[2][..., c] += step
        low, middle, high = map(function, moved)
        first[..., c] = (high - low) / (2 * step)
        second[..., c] = (high - 2 * middle + low) / step**2
    return first, second


@pytest.mark.parametrize("loss", sweep([*LOSSES, *BUILT_IN], *BUILT_IN), ids=lambda f: f.__name__)
@pytest.mark.thin(4)
def test_check_loss(loss):
    # A float32 sum over a row rounds each of its terms, a difference of distances has both distances' errors.
    check_loss(loss, roundings=64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (37, 5), (9, 130), (1, 9000), (2, 3, 4)], ids=str)
@pytest.mark.more
def test_a_definition_and_a_distance_agree(shape, dtype, fused):
    vectors = sample(shape, dtype=dtype)
    value, found = SumTriplet(margin=1.5, reduction="sum").value_and_grad(*vectors)
    expected, gradients = nl.triplet_margin_loss.value_and_grad(*vectors, margin=1.5, reduction="sum")
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype == np.float32 else {"rtol": 1e-13, "atol": 1e-15}
    if not fused:  # of two unit vectors, whose difference a gradient is, each is rounded once more
        close["atol"] *= 3
    # A row's value is a difference of two distances, each of which is rounded.
    near, far = (np.linalg.norm(vectors[0] - v, axis=-1).sum() for v in vectors[1:])
    rounding = float(np.finfo(dtype).eps * (near + far))
    assert value == pytest.approx(expected, rel=close["rtol"], abs=rounding)
    for g, e in zip(found, gradients, strict=True):
        np.testing.assert_allclose(g, e, **close)
    for loss in (SumTriplet.function, nl.triplet_margin_loss):
        all_of = loss.grad(*vectors, margin=1.5)
        for n, g in zip(("anchor", "positive", "negative"), all_of, strict=True):  # the same bits alone
            np.testing.assert_array_equal(loss.grad(*vectors, margin=1.5, wrt=n), g)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", ">i4", ">f8"])
def test_row_arrays_of_any_dtype(dtype):
    x, y = sample((40, 6), 2)
    rows = np.random.default_rng(1).choice([0, 1] if dtype[0] in "?u" else [-1, 0, 1], 80).astype(dtype)
    for target in (rows[:40], rows[::2]):
        for _ in range(2):
            value, gradients = nl.cosine_embedding_loss.value_and_grad(x, y, target, margin=0.1)
            expected = reference.cosine_embedding_loss(x, y, target, margin=0.1)
            assert value == pytest.approx(float(expected), rel=1e-12)
            exact = nl.cosine_embedding_loss.grad(x, y, target.astype(np.float64), margin=0.1)
            for g, e in zip(gradients, exact, strict=True):
                np.testing.assert_array_equal(g, e)


def test_dtypes_of_row_arrays_promote_unless_they_are_labels():
    x, y = sample((4, 3), 2, np.float32)
    for target in (np.ones(4), np.ones(4, int), np.ones(4, bool)):
        assert nl.contrastive_loss(x, y, target).dtype == np.float32
    assert contrastive(x, y, np.ones(4, int)).dtype == np.float32
    assert contrastive(x, y, np.ones(4)).dtype == np.float64
    with pytest.raises(TypeError, match="contrastive: label must be float64, float32, .* got int64"):
        contrastive.grad(x, y, np.ones(4, int), wrt="label")
    with pytest.raises(
        ValueError, match="contrastive_loss: wrt must be among 'input1', 'input2', got 'target'"
    ):
        nl.contrastive_loss.grad(x, y, np.ones(4), wrt="target")


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.thin(2)
def test_derivatives_of_a_definition(name):
    """Gradient, curvature and the gradient of a row array, times weights and gradients from above."""
    x, y = sample((12, 5), 2)
    label, weight, up = np.random.default_rng(2).random((3, 12))
    given = dict(sample_weight=weight, grad_output=up, reduction="none")
    for _ in range(2):
        terms, gradient, curvature = contrastive.value_grad_hess(x, y, label, wrt=name, **given)
        np.testing.assert_allclose(terms, weight * contrastive_terms(x, y, label), rtol=1e-12)
        factor = (weight * up)[:, None]

        def moved(v):
            return contrastive_terms(*((v, y) if name == "x" else (x, v)), label)

        first, second = differences(moved, x if name == "x" else y)
        np.testing.assert_allclose(gradient, factor * first, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(curvature, factor * second, rtol=1e-4, atol=1e-5)
        alone = contrastive.grad(x, y, label, wrt=name, **given)
        np.testing.assert_array_equal(alone, gradient)
        by_row = contrastive.grad(x, y, label, wrt="label", **given)
        ends = [contrastive_terms(x, y, label + step) for step in (0.5, -0.5)]
        np.testing.assert_allclose(by_row, factor[:, 0] * (ends[0] - ends[1]), rtol=1e-10)
        both = contrastive.grad(x, y, label, wrt=(name, "label"), **given)
        np.testing.assert_array_equal(both[0], gradient)
        np.testing.assert_array_equal(both[1], by_row)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_curvature_by_a_row_array(dtype):
    x, y = sample((30, 5), 2, dtype)
    weight, shift = labels(30, dtype=dtype), sample((30,), 1, dtype, 3)[0]
    terms, gradient, curvature = Cauchy.function.value_grad_hess(
        x, y, weight, shift, wrt="shift", reduction="none", sample_weight=2.0
    )
    total = (((x - y) / 1.5) ** 2).sum(axis=-1)
    inner = 1 + total + shift**2
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(terms, 2 * (weight * np.log(inner) * 1.5 + 0.5 * shift), **tight)
    np.testing.assert_allclose(gradient, 2 * (weight * 1.5 * 2 * shift / inner + 0.5), **tight)
    second = 2 * weight * 1.5 * (2 / inner - 4 * shift**2 / inner**2)
    np.testing.assert_allclose(curvature, second, **tight)
    outs = np.empty(60, dtype)[::2], np.empty(30, dtype)
    found = Cauchy.function.value_grad_hess(x, y, weight, shift, wrt="shift", out=outs, reduction="none")
    assert found[1] is outs[0] and found[2] is outs[1]
    np.testing.assert_allclose(found[2], curvature / 2, rtol=1e-6)
    kept = shift.copy()
    again = Cauchy.function.value_grad_hess(
        x, y, weight, kept, wrt="shift", out=(kept, outs[1]), reduction="none"
    )
    np.testing.assert_array_equal(again[1], found[1])
    np.testing.assert_array_equal(again[2], found[2])


def test_curvature_is_of_one_argument_and_of_terms():
    x, y = sample((4, 3), 2)
    with pytest.raises(ValueError, match="contrastive: value_grad_hess takes one name in wrt"):
        contrastive.value_grad_hess(x, y, labels(4))
    with pytest.raises(ValueError, match="contrastive_loss: has no value_grad_hess"):
        nl.contrastive_loss.value_grad_hess(x, y, labels(4), wrt="input1")


def test_zero_weight_is_zero():
    x, y = sample((6, 4), 2)
    label, weight = np.linspace(0, 1, 6), np.array([1, 0, 2, 1, 0, 1.0])
    wrt = ("x", "y", "label")
    value, gradients = contrastive.value_and_grad(x, y, label, sample_weight=weight, wrt=wrt)
    for bad in (np.nan, np.inf):
        for a in (x, y, label):
            a[weight == 0] = bad
        again, found = contrastive.value_and_grad(x, y, label, sample_weight=weight, wrt=wrt)
        assert again == value
        for g, e in zip(found, gradients, strict=True):
            np.testing.assert_array_equal(g, e)
            assert not g[weight == 0].any()


@pytest.mark.parametrize("size", [1e-22, 1e-15, 1.0, 1e17])
def test_rows_are_scaled(size):
    """Squares of float32 overflow or vanish; the gradient and the curvature do not."""
    single = tuple((size * v).astype(np.float32) for v in sample((11, 6), 2))
    label = np.linspace(0, 1, 11, dtype=np.float32)
    found = []
    for loss, dtype in ((Scaled.function, np.float32), (contrastive, np.float64)):
        pair = tuple(v.astype(dtype) for v in single)
        given = (*pair, label.astype(dtype))
        options = dict(margin=3 * size, reduction="none")
        found.append(
            (*loss.value_grad_hess(*given, wrt="x", **options), loss.grad(*given, wrt="label", **options))
        )
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-4)
    for k in (0, 3):
        wanted = found[1][k].astype(np.float32)
        np.testing.assert_allclose(found[0][k], wanted, rtol=1e-5, atol=2e-45 + 1e-6 * abs(wanted).max())


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "half": lambda a: a.astype(np.float16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", [nl.triplet_margin_loss, SumTriplet.function], ids=lambda f: f.__name__)
def test_layouts_and_in_place(loss, layout):
    vectors = sample((70, 300), dtype=np.float32)
    if layout == "half":
        vectors = tuple(v.astype(np.float16).astype(np.float32) for v in vectors)
    weight = labels(70, 3, np.float32)
    value, gradients = loss.value_and_grad(*vectors, sample_weight=weight)
    odd = tuple(map(LAYOUTS[layout], vectors))
    for _ in range(2):  # worked out, and prepared
        again, found = loss.value_and_grad(*odd, sample_weight=np.repeat(weight, 3)[::3])
        assert again == value.astype(again.dtype)
        for g, e in zip(found, gradients, strict=True):
            np.testing.assert_array_equal(g, e.astype(g.dtype))
        for vs in (odd, vectors):
            own = tuple(v.copy("K") for v in vs)
            assert loss.value_and_grad(*own, sample_weight=weight, out=own)[0] == value
            for v, e in zip(own, gradients, strict=True):
                np.testing.assert_array_equal(v, e.astype(v.dtype))


def test_bits_do_not_depend_on_threads():
    vectors = sample((4000, 10), dtype=np.float32)
    value, gradients = SumTriplet.function.value_and_grad(*vectors)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone, found = SumTriplet.function.value_and_grad(*vectors)
    finally:
        numba.set_num_threads(before)
    assert alone == value
    for g, e in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [nl.contrastive_loss, contrastive], ids=lambda f: f.__name__)
def test_a_prepared_call_serves_other_batches(loss, reduction, monkeypatch):
    def call(rows, size):
        x, y = sample((rows, size), 2, seed=rows)
        return loss.value_and_grad(x, y, labels(rows), reduction=reduction, sample_weight=labels(rows, 5))

    call(50, 6)
    shapes = [(7, 6), (3000, 4), (2, 3)]
    prepared = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "pack", None)  # nothing is worked out again
        prepared += [call(*shape) for shape in shapes]
    monkeypatch.setattr(loss, "_bindings", {})
    for shape, (value, gradients) in zip(shapes, prepared, strict=True):
        expected, by = call(*shape)
        np.testing.assert_array_equal(value, expected)
        for g, e in zip(gradients, by, strict=True):
            np.testing.assert_array_equal(g, e)


def test_weights_are_broadcast():
    x, y = sample((5, 4, 3), 2)
    label = np.full((5, 4), 0.3)
    for weight in (np.array(0.5), np.arange(1.0, 5.0), np.arange(1.0, 6.0)[:, None], np.arange(1, 5), True):
        found = contrastive.value_and_grad(x, y, label, sample_weight=weight)
        full = np.ascontiguousarray(np.broadcast_to(weight, (5, 4)), float)
        expected = contrastive.value_and_grad(x, y, label, sample_weight=full)
        assert found[0] == expected[0]
        for g, e in zip(found[1], expected[1], strict=True):
            np.testing.assert_array_equal(g, e)


def test_shapes_that_do_not_fit():
    x, y = sample((6, 4), 2)
    label = np.ones(6)
    for _ in range(2):
        bad = [
            ((x, y[:5], label), {}, "contrastive: y must have x's shape"),
            ((x, y, label[:5]), {}, r"contrastive: label must have shape \(6,\)"),
            ((x, y, label[:, None]), {}, "label must have shape"),
            ((x, y, label), {"sample_weight": np.ones(5)}, "does not broadcast"),
            ((x[:, :0], y[:, :0], label), {}, "D at least 1"),
            ((np.array(1.0), np.array(1.0), np.array(1.0)), {}, r"\(..., D\)"),
        ]
        for given, more, message in bad:
            with pytest.raises(ValueError, match=message):
                contrastive(*given, **more)
        contrastive(x, y, label)  # prepared from here on
        contrastive(x, y, label, sample_weight=label)


def test_a_tie_of_the_swap_is_halved():
    anchor, positive, negative = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]])[:, None]
    for p in (1.0, 1.5, 2.0, 3.0, np.inf):
        plain = dict(p=p, eps=0.0, margin=1.0)
        gradients = nl.triplet_margin_loss.grad(anchor, positive, negative, swap=True, **plain)
        halves = nl.triplet_margin_loss.grad(anchor, positive, negative, **plain)
        swapped = nl.triplet_margin_loss.grad(positive, anchor, negative, **plain)
        np.testing.assert_allclose(gradients[2], (halves[2] + swapped[2]) / 2, rtol=1e-12)


# ---- the built-in contrastive loss ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (37, 5), (9, 130), (2, 3, 4)], ids=str)
def test_contrastive_loss(shape, dtype):
    x, y = sample(shape, 2, dtype)
    target = np.asarray(np.random.default_rng(4).integers(0, 2, shape[:-1]))
    margin = 1.5 * float(np.sqrt(shape[-1]))
    for reduction in ("none", "mean", "sum"):
        value = nl.contrastive_loss(x, y, target, margin=margin, reduction=reduction)
        wide = [a.astype(float) for a in (x, y)]
        expected = reference.contrastive_loss(*wide, target, margin=margin, reduction=reduction)
        np.testing.assert_allclose(value, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
        assert value.dtype == dtype
    gradients = nl.contrastive_loss.grad(x, y, target, margin=margin, reduction="sum")
    for k, g in enumerate(gradients):

        def moved(v, k=k):
            pair = (v, wide[1]) if k == 0 else (wide[0], v)
            return reference.contrastive_loss(*pair, target, margin=margin, reduction="none")

        np.testing.assert_allclose(g, differences(moved, wide[k])[0], rtol=1e-3, atol=1e-5)


def test_equal_vectors_have_finite_gradients():
    x = np.ones((2, 3))
    value, gradients = nl.contrastive_loss.value_and_grad(x, x, np.array([1, 0]), reduction="none")
    np.testing.assert_array_equal(value, [0.0, 0.5])
    assert not gradients[0].any() and not gradients[1].any()


@pytest.mark.parametrize("size", [1e-30, 1e18, 1e30])
def test_contrastive_loss_of_huge_and_tiny_vectors(size):
    x, y = (np.float32(size) * v.astype(np.float32) for v in sample((5, 6), 2))
    target = np.array([1, 0, 1, 0, 0])
    # The squares overflow or vanish: the gradients do not.
    found = nl.contrastive_loss.grad(x, y, target, margin=2 * size, reduction="sum")
    wide = nl.contrastive_loss.grad(
        *(v.astype(float) for v in (x, y)), target, margin=2 * size, reduction="sum"
    )
    for g, e in zip(found, wide, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_length_stays_finite_beside_tiny_vectors(size):
    """Scaled as far as tiny vectors would want it, the square of a margin of 5 would be infinite."""
    x = np.full((2, 3), size, np.float32)
    value = Scaled.function(x, -x, np.array([0.0, 1.0], np.float32), margin=5.0, reduction="none")
    np.testing.assert_allclose(value, [25.0, 0.0], rtol=1e-6)


# ---- definitions of the user's own ------------------------------------------------------------------


def test_class_and_function_are_one_loss():
    x, y = sample((6, 4), 2)
    label = labels(6)
    criterion = contrastive.Class(margin=2.0)
    assert repr(criterion) == "Contrastive(margin=2.0, reduction='mean')"
    assert criterion(x, y, label) == contrastive(x, y, label, margin=2.0)
    assert contrastive.__name__ == "contrastive" and "contrastive" not in nl.registry
    assert pickle.loads(pickle.dumps(contrastive)) is contrastive
    again = pickle.loads(pickle.dumps(criterion))
    assert again(x, y, label) == criterion(x, y, label)
    assert pickle.loads(pickle.dumps(SumTriplet(margin=2.0)))(x, y, x) == SumTriplet(margin=2.0)(x, y, x)


def test_flags_and_options_are_those_of_the_call():
    x, y = sample((6, 4), 2)
    weight, shift = labels(6), labels(6, 2)
    for squared in (True, False):
        for width in (0.5, 2.0):
            found = Cauchy.function(x, y, weight, shift, width=width, squared=squared, reduction="none")
            d = (x - y) / width
            total = (d * d if squared else abs(d)).sum(axis=-1)
            expected = weight * np.log1p(total + shift * shift) * width + (0.5 if squared else 0) * shift
            np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=re.escape("cauchy: width must be > 0, got -1.0")):
        Cauchy.function(x, y, weight, shift, width=-1.0)


def test_definitions_are_checked():
    def finish(total):
        return total

    wrong = {
        "two or three vectors": (lambda x: x, finish),
        "terms fails for plain numbers": (lambda x, y: x.nothing, finish),
        "finish must take 2 sum": (lambda x, y: (x, y), finish),
        "finish takes a vector": (lambda x, y: x * y, lambda total, x: total),
        "ordinary parameter": (lambda *x: x, finish),
        "two functions": (3, finish),
        "two defaults": (lambda x, y, c=1.0: x * y * c, lambda total, c=2.0: total * c),
        "at most 6": (lambda x, y: (x,) * 7, lambda *, a=1: 1),
    }
    for message, functions in wrong.items():
        if message == "at most 6":
            functions = functions[0], lambda a, b, c, d, e, f, g: a
        with pytest.raises(TypeError, match=message):
            nl.vector_loss(*functions, name="wrong")
    with pytest.raises(TypeError, match="must be a number or a bool"):

        class Wrong(nl.VectorLoss):
            kind: str = nl.arguments.choice("a", ("a", "b"))

            def terms(x, y, kind):
                return x * y

            def finish(total):
                return total


def broken_terms(x, y):
    d = x - y
    return np.linalg.norm(d)


def broken_finish(total):
    a = np.fft.fft(total)
    return a


def pair_finish(total):
    return total, total


def own_squares(x, y):
    """A definition like another one is compiled as that one, whose line is then named."""
    return (x - y) ** 2 * 0.875


@pytest.mark.parametrize(
    ("terms", "finish", "line", "reason"),
    [
        (broken_terms, pulled, "return np.linalg.norm(d)", "norm"),
        (squares, broken_finish, "a = np.fft.fft(total)", "fft"),
        (own_squares, pair_finish, "def own_squares", "finish must return one number"),
    ],
)
def test_an_error_leads_to_the_users_line(terms, finish, line, reason):
    loss = nl.vector_loss(terms, finish, name="broken")
    x, y = sample((6, 4), 2)
    arrays = (x, y, np.ones(6)) if finish is pulled else (x, y)
    with pytest.raises(TypeError) as caught:
        loss.value_and_grad(*arrays)
    text = str(caught.value)
    # Of what neither function alone does wrong it names the first.
    assert text.startswith("broken: cannot be compiled") and "test_vectors.py" in text
    assert line in text and reason in text


@pytest.mark.sweep
def test_inside_compiled_code():
    x, y, z = sample((6, 4))
    rows = labels(6), labels(6, 2)
    for loss, arrays in ((SumTriplet.function, (x, y, z)), (contrastive, (x, y, rows[0]))):
        jit, vectors = loss.jit, arrays[: 3 if loss is SumTriplet.function else 2]

        @njit
        def call(a, b, c, out, jit=jit):
            return jit(a, b, c, margin=1.5, out=out)

        outs = tuple(np.empty_like(v) for v in vectors)
        value = call(*arrays, outs)
        expected, gradients = loss.value_and_grad(*arrays, margin=1.5)
        assert value == expected == jit(*arrays, margin=1.5)
        for g, e in zip(outs, gradients, strict=True):
            np.testing.assert_array_equal(g, e)
        only = np.empty_like(x)
        jit(*arrays, margin=1.5, out=(None, only, None)[: len(vectors)])
        np.testing.assert_array_equal(only, gradients[1])
    for squared in (True, False):
        value = Cauchy.function.jit(x, y, *rows, squared=squared)
        assert value == pytest.approx(float(Cauchy.function(x, y, *rows, squared=squared)), rel=1e-14)
    with pytest.raises(ValueError, match="cauchy: width must be > 0"):
        Cauchy.function.jit(x, y, *rows, width=-1.0)


def test_a_distance_of_zero_has_a_gradient_of_zero():
    """The square root's slope is infinite where the vectors are equal, and each coordinate's is zero."""

    def squares(x, y):
        return (x - y) ** 2

    def norm(total):
        return nl.math.sqrt(total)

    distance = nl.vector_loss(squares, norm)
    x = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    y = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 1.0]])
    for dtype in (np.float64, np.float32, np.float16):
        a, b = x.astype(dtype), y.astype(dtype)
        value, (by_x, by_y) = distance.value_and_grad(a, b, reduction="sum")
        assert value == 2
        np.testing.assert_array_equal(by_x, [[0, 0, 0], [0, 0, 1]])
        np.testing.assert_array_equal(by_y, -by_x)
