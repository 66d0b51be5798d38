"""Losses of vectors as problems: definitions by terms and finish, distances with kernels of their own."""

import math

import numba
import numpy as np
import pytest

from numbaloss import reference
from numbaloss.kernels import math as nm
from numbaloss.kernels import spec
from numbaloss.kernels.cpu import rows_of_vectors
from numbaloss.kernels.spec import Distance, VectorFunctions, VectorOutputs, VectorProblem


def triplet_finish(near, far, margin):
    return nm.maximum(margin + near - far, 0.0)


def cosine_finish(distance, target, margin):
    apart = nm.maximum(1 - distance - margin, 0.0)
    return nm.where(target == 1, distance, nm.where(target == -1, apart, 0.0))


def triplet_terms(anchor, positive, negative, eps):
    return (anchor - positive + eps) ** 2, (anchor - negative + eps) ** 2


def triplet_of_sums(near, far, margin):
    return nm.maximum(margin + nm.sqrt(near) - nm.sqrt(far), 0.0)


def square(x, y):
    return (x - y) ** 2


def contrastive(total, label, margin):
    return label * total + (1 - label) * nm.maximum(margin - nm.sqrt(total), 0.0) ** 2


TRIPLET = VectorFunctions("triplet", 3, None, triplet_finish, 2, (), ("margin",))
COSINE = VectorFunctions("cosine", 2, None, cosine_finish, 1, ("target",), ("margin",))
OF_SUMS = VectorFunctions("of_sums", 3, triplet_terms, triplet_of_sums, 2, (), ("margin", "eps"))
CONTRASTIVE = VectorFunctions("contrastive", 2, square, contrastive, 1, ("label",), ("margin",))
EUCLIDEAN = Distance(spec.ROOT_OF_SQUARES, 2.0, 1e-6)
NORMS = {
    1.0: spec.SUM,
    1.5: spec.POWER,
    2.0: spec.ROOT_OF_SQUARES,
    3.0: spec.POWER,
    math.inf: spec.LARGEST,
}


def sample(shape, count=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(dtype) for _ in range(count))


def problem(functions, vectors, options, rows=(), **more):
    """A checked call; the sum is divided by nothing unless it is said."""
    kinds = [a.dtype for a in vectors]
    arithmetic = np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
    given = dict(sample_weight=None, upstream=None, factor=1.0, divisor=1.0, distance=None) | more
    return VectorProblem(functions, options, vectors, rows, arithmetic=arithmetic, **given)


def solve(p, wrt=None):
    """The value and the gradients of some vectors, or of all."""
    wrt = range(len(p.vectors)) if wrt is None else wrt
    gradients = tuple(np.empty_like(v) if k in wrt else None for k, v in enumerate(p.vectors))
    return rows_of_vectors.run(p, VectorOutputs(gradients)), gradients


def contrastive_terms(x, y, label, margin):
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (37, 5), (9, 130), (1, 9000), (2, 3, 4)], ids=str)
def test_a_definition_and_a_distance_agree(shape, dtype):
    vectors = sample(shape, dtype=dtype)
    value, found = solve(problem(OF_SUMS, vectors, (1.5, 1e-6)))
    expected, gradients = solve(problem(TRIPLET, vectors, (1.5,), distance=EUCLIDEAN))
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype == np.float32 else {"rtol": 1e-13, "atol": 1e-15}
    assert value == pytest.approx(expected, rel=close["rtol"])
    for g, e in zip(found, gradients, strict=True):
        np.testing.assert_allclose(g, e, **close)
    for k in range(3):  # each by itself has the same bits
        for p, all_of in (
            (problem(OF_SUMS, vectors, (1.5, 1e-6)), found),
            (problem(TRIPLET, vectors, (1.5,), distance=EUCLIDEAN), gradients),
        ):
            np.testing.assert_array_equal(solve(p, (k,))[1][k], all_of[k])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_distances(p, swap):
    vectors = sample((11, 7))
    distance = Distance(NORMS[p], p, 1e-6, swap)

    def terms(k, x):
        moved = [*vectors]
        moved[k] = x
        return reference.triplet_margin_loss(*moved, margin=1.5, p=p, swap=swap, reduction="none")

    value, gradients = solve(problem(TRIPLET, vectors, (1.5,), distance=distance))
    assert value == pytest.approx(float(terms(0, vectors[0]).sum()), rel=1e-12)
    for k, g in enumerate(gradients):
        expected = differences(lambda x, k=k: terms(k, x), vectors[k], 1e-6)[0]
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "i8", "u8", "f4", "f8"])
def test_row_arrays_of_any_dtype(dtype):
    x, y = sample((40, 6), 2)
    labels = np.random.default_rng(1).choice([0, 1] if dtype[0] == "u" else [-1, 0, 1], 80).astype(dtype)
    for target in (labels[:40], labels[::2]):
        p = problem(COSINE, (x, y), (0.1,), (target,), distance=Distance(spec.COSINE, eps=1e-12))
        value, gradients = solve(p)
        expected = reference.cosine_embedding_loss(x, y, target, margin=0.1, reduction="sum")
        assert value == pytest.approx(float(expected), rel=1e-12)
        exact = solve(p._replace(row_arrays=(target.astype(np.float64),)))[1]
        for g, e in zip(gradients, exact, strict=True):
            np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("by", [0, 1])
def test_derivatives_of_a_definition(by):
    """Gradient, curvature and the gradient of a row array, times weights and gradients from above."""
    vectors, (label, weight, up) = sample((12, 5), 2), np.random.default_rng(2).random((3, 12))
    p = problem(CONTRASTIVE, vectors, (3.0,), (label,), sample_weight=weight, upstream=up, factor=2.0)
    gradients = [None, None]
    gradients[by] = np.empty((12, 5))
    curvature, terms, row_gradient = np.empty((12, 5)), np.empty(12), np.empty(12)
    value = rows_of_vectors.run(p, VectorOutputs(tuple(gradients), curvature, terms))
    expected = weight * contrastive_terms(*vectors, label, 3.0)
    np.testing.assert_allclose(terms, expected, rtol=1e-12)
    assert value == pytest.approx(expected.sum())

    def moved(x):
        pair = [*vectors]
        pair[by] = x
        return contrastive_terms(*pair, label, 3.0)

    factor = (2 * weight * up)[:, None]
    first, second = differences(moved, vectors[by])
    np.testing.assert_allclose(gradients[by], factor * first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(curvature, factor * second, rtol=1e-4, atol=1e-5)
    rows_of_vectors.run(p, VectorOutputs((), row_gradients=(row_gradient,)))
    ends = [contrastive_terms(*vectors, label + step, 3.0) for step in (0.5, -0.5)]
    np.testing.assert_allclose(row_gradient, factor[:, 0] * (ends[0] - ends[1]), rtol=1e-10)


def test_zero_weight_is_zero():
    vectors, label = sample((6, 4), 2), np.linspace(0, 1, 6)
    weight = np.array([1, 0, 2, 1, 0, 1.0])
    p = problem(CONTRASTIVE, vectors, (3.0,), (label,), sample_weight=weight, divisor=math.nan)
    value, gradients = solve(p)
    for bad in (np.nan, np.inf):
        for v in vectors:
            v[weight == 0] = bad
        again, found = solve(p)
        assert again == value
        for g, e in zip(found, gradients, strict=True):
            np.testing.assert_array_equal(g, e)
            assert not g[weight == 0].any()


@pytest.mark.parametrize("size", [1e-22, 1e-15, 1.0, 1e17])
def test_rows_are_scaled(size):
    """Squares of float32 overflow or vanish; the gradient and the curvature do not."""
    scaled = CONTRASTIVE._replace(homogeneous=2, lengths=("margin",))
    single = tuple((size * v).astype(np.float32) for v in sample((11, 6), 2))
    label = np.linspace(0, 1, 11, dtype=np.float32)
    found = []
    for functions, dtype in ((scaled, np.float32), (CONTRASTIVE, np.float64)):
        pair = tuple(v.astype(dtype) for v in single)
        outputs = VectorOutputs((np.empty((11, 6), dtype),), np.empty((11, 6), dtype), np.empty(11, dtype))
        rows_of_vectors.run(problem(functions, pair, (3 * size,), (label.astype(dtype),)), outputs)
        found.append(outputs)
    close = {"rtol": 1e-5, "atol": 1e-6 * size}
    np.testing.assert_allclose(found[0].gradients[0], found[1].gradients[0], **close)
    np.testing.assert_allclose(found[0].curvature, found[1].curvature, rtol=1e-4)
    np.testing.assert_allclose(found[0].terms, found[1].terms, rtol=1e-5, atol=2e-45)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "half": lambda a: a.astype(np.float16).astype(np.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("functions", [TRIPLET, OF_SUMS], ids=lambda f: f.name)
def test_layouts_and_in_place(functions, layout):
    distance = EUCLIDEAN if functions is TRIPLET else None
    options = (1.5,) if functions is TRIPLET else (1.5, 1e-6)
    vectors = sample((70, 300), dtype=np.float32)
    if layout == "half":
        vectors = tuple(map(LAYOUTS["half"], vectors))
    weight = np.random.default_rng(3).random(70).astype(np.float32)
    more = dict(sample_weight=weight, divisor=math.nan, distance=distance)
    value, gradients = solve(problem(functions, vectors, options, **more))
    kept = LAYOUTS[layout] if layout != "half" else lambda a: a.astype(np.float16)
    odd = tuple(map(kept, vectors))
    more["sample_weight"] = np.repeat(weight, 3)[::3]
    p = problem(functions, odd, options, **more)
    again, found = solve(p)
    assert again == value
    for g, e in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(g, e.astype(g.dtype))
    for vs in (odd, vectors):
        q = p._replace(vectors=tuple(v.copy() if vs is vectors else v for v in vs))
        assert rows_of_vectors.run(q, VectorOutputs(q.vectors)) == value
        for v, e in zip(q.vectors, gradients, strict=True):
            np.testing.assert_array_equal(v, e.astype(v.dtype))


@pytest.mark.parametrize("functions", [TRIPLET, OF_SUMS], ids=lambda f: f.name)
def test_bits_do_not_depend_on_threads(functions):
    distance = EUCLIDEAN if functions is TRIPLET else None
    options = (1.5,) if functions is TRIPLET else (1.5, 1e-6)
    p = problem(functions, sample((4000, 10), dtype=np.float32), options, distance=distance)
    value, gradients = solve(p)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone, found = solve(p)
    finally:
        numba.set_num_threads(before)
    assert alone == value
    for g, e in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(g, e)


def test_a_call_serves_other_batches():
    """Recipe and numbers depend on no extent."""
    vectors, more = sample((50, 6)), dict(distance=EUCLIDEAN, divisor=math.nan)
    launch = rows_of_vectors.launch(problem(TRIPLET, vectors, (1.5,), **more), VectorOutputs())
    for rows, size in ((50, 6), (7, 6), (3000, 4), (1, 1), (0, 6)):
        others = sample((rows, size), seed=1)
        arrays = (*others, *launch.arrays[3:])
        value, status = launch.entry(launch.recipe, launch.numbers, arrays, launch.task, 0)
        expected = solve(problem(TRIPLET, others, (1.5,), **more))[0]
        assert status == -1
        assert value == expected or (rows == 0 and math.isnan(value))


def test_weights_are_broadcast():
    vectors, label = sample((5, 4, 3), 2), np.full((5, 4), 0.3)
    for weight in (np.array(0.5), np.arange(1.0, 5.0), np.arange(1.0, 6.0)[:, None]):
        given = dict(divisor=math.nan, factor=0.5)
        found = solve(problem(CONTRASTIVE, vectors, (3.0,), (label,), sample_weight=weight, **given))
        full = np.ascontiguousarray(np.broadcast_to(weight, (5, 4)))
        expected = solve(problem(CONTRASTIVE, vectors, (3.0,), (label,), sample_weight=full, **given))
        assert found[0] == expected[0]
        for g, e in zip(found[1], expected[1], strict=True):
            np.testing.assert_array_equal(g, e)


def test_shapes_that_do_not_fit():
    x, y = sample((6, 4), 2)
    label = np.ones(6)
    bad = [
        ((x, y[:5]), (label,), {}),
        ((x, y), (label[:5],), {}),
        ((x, y), (label[:, None],), {}),
        ((x, y), (label,), {"sample_weight": np.ones(5)}),
        ((x[:, :0], y[:, :0]), (label,), {}),
        ((np.array(1.0), np.array(1.0)), (np.array(1.0),), {}),
    ]
    for vectors, rows, more in bad:
        with pytest.raises(ValueError, match="contrastive: shapes do not fit"):
            rows_of_vectors.run(problem(CONTRASTIVE, vectors, (3.0,), rows, **more), VectorOutputs())


def test_definitions_are_checked():
    p = problem(CONTRASTIVE, sample((6, 4), 2), (3.0,), (np.ones(6),))
    wrong = {
        "takes unknown": lambda x, y, unknown: x - y,
        "must take 2 numbers": lambda x: x,
        "1 number": lambda x, y: (x, y),
    }
    for message, terms in wrong.items():
        with pytest.raises((TypeError, numba.TypingError), match=message):
            rows_of_vectors.run(p._replace(functions=CONTRASTIVE._replace(terms=terms)), VectorOutputs())


def test_a_tie_of_the_swap_is_halved():
    anchor, positive, negative = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]])[:, None]
    for p, kind in NORMS.items():
        distance = Distance(kind, p, 0.0, True)
        _, gradients = solve(problem(TRIPLET, (anchor, positive, negative), (1.0,), distance=distance))
        plain = distance._replace(swap=False)
        halves = solve(problem(TRIPLET, (anchor, positive, negative), (1.0,), distance=plain))[1]
        swapped = solve(problem(TRIPLET, (positive, anchor, negative), (1.0,), distance=plain))[1]
        np.testing.assert_allclose(gradients[2], (halves[2] + swapped[2]) / 2, rtol=1e-12)
