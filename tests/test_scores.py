"""Losses of rows of class scores, each a function of the row's statistics: against float64 by formulas."""

from itertools import product

import numpy as np
import pytest

from numbaloss import math as nlmath
from numbaloss.kernels.cpu import launch, scores
from numbaloss.kernels.lift import is_linear
from numbaloss.kernels.spec import ScoreFunctions, Scores, Weighting

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def cross_entropy(cross_entropy):
    return cross_entropy


def focal(log_prob, rest, class_weight, gamma):
    return -class_weight * rest**gamma * log_prob


def focal_of_entropy(rest, cross_entropy, gamma):
    return rest**gamma * cross_entropy


def z_loss(cross_entropy, logsumexp, scale):
    return cross_entropy + scale * logsumexp * logsumexp


def poly_1(cross_entropy, rest, epsilon):
    return cross_entropy + epsilon * rest


def generalised(log_prob, q):
    return -nlmath.expm1(q * log_prob) / q


def everything(log_prob, rest, class_weight, cross_entropy, logsumexp, squared, a):
    v = cross_entropy * logsumexp + a * class_weight * rest * cross_entropy - log_prob * logsumexp
    return v * v if squared else v


DEFINITIONS = {
    "cross_entropy": (ScoreFunctions("ce", cross_entropy, ("cross_entropy",)), ()),
    "focal": (ScoreFunctions("focal", focal, ("log_prob", "rest", "class_weight"), (None,)), (2.0,)),
    "focal_of_entropy": (
        ScoreFunctions("of_entropy", focal_of_entropy, ("rest", "cross_entropy"), (None,)),
        (1.5,),
    ),
    "z_loss": (ScoreFunctions("z", z_loss, ("cross_entropy", "logsumexp"), (None,)), (0.01,)),
    "poly_1": (ScoreFunctions("poly", poly_1, ("cross_entropy", "rest"), (None,)), (0.7,)),
    "generalised": (ScoreFunctions("gce", generalised, ("log_prob",), (None,)), (0.7,)),
    "everything": (
        ScoreFunctions(
            "everything",
            everything,
            ("log_prob", "rest", "class_weight", "cross_entropy", "logsumexp"),
            (True, None),
        ),
        (0.3,),
    ),
}  # fmt: skip


def reference(problem):
    """The rows' values, by NumPy in float64; class axis 1."""
    p = problem
    x = np.asarray(p.input, np.float64)
    if p.softcap is not None:
        x = p.softcap * np.tanh(x / p.softcap)
    classes = x.shape[1]
    x = np.moveaxis(x, 1, -1)
    m = x.max(-1, keepdims=True)
    lse = np.log(np.exp(x - m).sum(-1)) + m[..., 0]
    log_p = x - lse[..., None]
    w = np.ones(classes) if p.weight is None else np.asarray(p.weight, np.float64)
    eps = p.label_smoothing
    if p.has_probabilities:
        q, live = np.moveaxis(np.asarray(p.target, np.float64), 1, -1), True
        own = {}
    else:
        live = p.target != p.ignore_index
        y = np.where(live, p.target, 0).astype(int)
        q = np.eye(classes)[y]
        log_y = np.take_along_axis(log_p, y[..., None], -1)[..., 0]
        own = {"log_prob": log_y, "rest": -np.expm1(log_y), "class_weight": w[y]}
    t = w * ((1 - eps) * q + eps / classes)
    statistics = own | {"cross_entropy": -np.where(t == 0, 0, t * log_p).sum(-1), "logsumexp": lse}
    options, numbers = [], list(p.numbers)
    for o in p.functions.options:
        options.append(numbers.pop(0) if o is None else o)
    v = p.functions.value(*(statistics[n] for n in p.functions.statistics), *options)
    v = v + p.lse_square_scale * lse**2
    return np.where(live, v, 0.0)


def weights_of_rows(problem, shape):
    w = problem.weighting
    s = np.ones(shape) if w.sample_weight is None else np.broadcast_to(w.sample_weight, shape)
    u = np.ones(shape) if w.upstream is None else np.broadcast_to(w.upstream, shape)
    return np.asarray(s, np.float64), np.asarray(u, np.float64) * w.factor


def run(problem, outputs):
    """The value in float64, and the driver's status."""
    return launch.run(scores.pack(problem, outputs, ()))


def weighted(problem, **changes):
    return problem._replace(weighting=problem.weighting._replace(**changes))


def numeric(f, x, step=1e-5):
    """The gradient of a scalar function of an array, by central differences."""
    g = np.empty(x.shape)
    for k in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[k] += step
        low[k] -= step
        g[k] = (f(high) - f(low)) / (2 * step)
    return g


def data(shape, probabilities, rng):
    x = 2 * rng.standard_normal(shape)
    rows = shape[:1] + shape[2:]
    if probabilities:
        return x, rng.random(shape)
    y = rng.integers(0, shape[1], rows)
    y.flat[1] = -100
    return x, y


SETTINGS = {
    "plain": {},
    "weighted": {"weight": True},
    "smoothed": {"weight": True, "label_smoothing": 0.2},
    "rows": {"rows": True},
    "capped": {"softcap": 3.0, "lse_square_scale": 0.05},
}


CASES = [
    *product(["everything", "cross_entropy"], [False], SETTINGS),
    *product(["focal", "focal_of_entropy", "z_loss", "poly_1", "generalised"], [False], ["plain"]),
    *product(["z_loss"], [True], SETTINGS),
    *product(["cross_entropy"], [True], ["plain", "smoothed"]),
]


def problem_of(name, shape, setting, probabilities, rng, dtype=F64):
    functions, numbers = DEFINITIONS[name]
    x, target = data(shape, probabilities, rng)
    rows = shape[:1] + shape[2:]
    given = {"weight": None, "label_smoothing": 0.0, "softcap": None, "lse_square_scale": 0.0}
    given |= SETTINGS[setting]
    if given["weight"]:
        given["weight"] = rng.random(shape[1]).astype(dtype)
    weighting = Weighting(divisor=3.0)
    if given.pop("rows", False):
        sample_weight = rng.random(rows).astype(dtype)
        sample_weight.flat[0] = 0
        weighting = Weighting("sum", sample_weight, rng.random(rows).astype(dtype), 1.5, 3.0)
    if probabilities:
        target = target.astype(dtype)
    return Scores(
        name=name,
        functions=functions,
        numbers=numbers,
        input=x.astype(dtype),
        target=target,
        has_probabilities=probabilities,
        ignore_index=-100,
        weighting=weighting,
        dtype=dtype,
        arithmetic=dtype,
        **given,
    )


def outputs_of(p, curvature=True):
    outs = {
        "input": np.empty_like(p.input),
        "terms": np.empty(p.input.shape[:1] + p.input.shape[2:], p.input.dtype),
    }
    if curvature:
        outs["curvature"] = np.empty_like(p.input)
    return outs


@pytest.mark.parametrize("shape", [(6, 5), (3, 70), (2, 4, 3)], ids=["turned", "rows", "columns"])
@pytest.mark.parametrize("name, probabilities, setting", CASES)
@pytest.mark.sweep
def test_value_gradient_and_curvature(name, probabilities, setting, shape, rng):
    p = problem_of(name, shape, setting, probabilities, rng)
    outs = outputs_of(p)
    value, status = run(p, outs)
    assert status == launch.OK
    terms = reference(p)
    s, u = weights_of_rows(p, terms.shape)
    np.testing.assert_allclose(outs["terms"], terms * s, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(value, (terms * s).sum() / 3, rtol=1e-11)

    def total(x):
        return (reference(p._replace(input=x)) * s * u).sum() / 3

    np.testing.assert_allclose(outs["input"], numeric(total, p.input), rtol=2e-6, atol=2e-8)

    def gradient(x):
        g = {"input": np.empty_like(x)}
        run(p._replace(input=x), g)
        return g["input"]

    h, step = np.empty(shape), 1e-5
    for k in np.ndindex(shape):
        high, low = p.input.copy(), p.input.copy()
        high[k] += step
        low[k] -= step
        h[k] = (gradient(high)[k] - gradient(low)[k]) / (2 * step)
    np.testing.assert_allclose(outs["curvature"], h, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("shape", [(6, 5), (3, 70), (2, 4, 3)], ids=["turned", "rows", "columns"])
@pytest.mark.parametrize("name", ["cross_entropy", "z_loss"])
@pytest.mark.more
def test_gradients_by_probabilities_and_class_weights(name, shape, rng):
    p = problem_of(name, shape, "smoothed", True, rng)
    outs = {"input": np.empty(shape), "target": np.empty(shape)}
    run(p, outs)
    alone = {"target": np.empty(shape)}
    run(p, alone)
    np.testing.assert_array_equal(outs["target"], alone["target"])
    by_target = numeric(lambda q: reference(p._replace(target=q)).sum() / 3, p.target)
    np.testing.assert_allclose(outs["target"], by_target, rtol=1e-6, atol=1e-8)
    by_input = numeric(lambda x: reference(p._replace(input=x)).sum() / 3, p.input)
    np.testing.assert_allclose(outs["input"], by_input, rtol=1e-6, atol=1e-8)
    by_weight = numeric(lambda w: reference(p._replace(weight=w)).sum() / 3, p.weight)
    np.testing.assert_allclose(scores.weight_gradient(p), by_weight, rtol=1e-6, atol=1e-8)


@pytest.mark.more
def test_any_layout_and_dtype_gives_the_bits_of_the_plain_call(rng, bfloat16):
    for shape, dtype in product([(40, 5), (9, 130), (3, 7, 20)], [F32, np.dtype(np.float16), bfloat16]):
        p = problem_of("z_loss", shape, "rows", False, rng, F32)
        x = p.input.astype(dtype).astype(F32)
        p = p._replace(input=x)
        plain = outputs_of(p, curvature=False)
        value, _ = run(p, plain)
        big = np.zeros(tuple(2 * n for n in shape), dtype)
        other = big[tuple(slice(None, None, 2) for _ in shape)]
        other[...] = x
        for given in (other, np.asfortranarray(other), other[::-1].copy()[::-1]):
            small = p.target.astype(np.int16)
            weights = p.weighting.sample_weight.astype(F32)[..., None][..., 0]
            outs = {"input": np.zeros_like(big)[tuple(slice(None, None, 2) for _ in shape)]}
            outs["terms"] = np.empty(plain["terms"].shape[::-1], F32).T
            again, status = run(weighted(p, sample_weight=weights)._replace(input=given, target=small), outs)
            assert status == launch.OK
            np.testing.assert_array_equal(outs["terms"], plain["terms"])
            np.testing.assert_array_equal(outs["input"], plain["input"].astype(dtype))
            np.testing.assert_allclose(again, value, rtol=1e-14)


@pytest.mark.parametrize("shape", [(3000, 5), (300, 70), (3, 4, 3000)], ids=["turned", "rows", "columns"])
def test_threads_and_place_do_not_change_bits(shape, rng):
    import numba

    p = weighted(problem_of("focal", shape, "plain", False, rng, F32), divisor=None)
    outs = {"input": np.empty(shape, F32)}
    together = run(p, outs)[0]
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        own = p.input.copy()
        alone = run(p._replace(input=own), {"input": own})[0]
    finally:
        numba.set_num_threads(before)
    assert alone == together
    np.testing.assert_array_equal(own, outs["input"])


@pytest.mark.parametrize("shape", [(6, 5), (4, 70), (2, 4, 3)], ids=["turned", "rows", "columns"])
@pytest.mark.more
def test_rows_that_count_nothing_are_not_read(shape, rng):
    for name, bad in product(["cross_entropy", "focal", "z_loss"], [np.nan, np.inf, -np.inf]):
        p = weighted(problem_of(name, shape, "rows", False, rng), divisor=None)
        clean = outputs_of(p)
        value = run(p, clean)[0]
        x = np.moveaxis(p.input.copy(), 1, -1)
        rows = p.target == -100
        rows |= p.weighting.sample_weight == 0
        x[rows] = bad
        dirty = outputs_of(p)
        again = run(p._replace(input=np.ascontiguousarray(np.moveaxis(x, -1, 1))), dirty)[0]
        assert again == value
        for n in clean:
            np.testing.assert_array_equal(dirty[n], clean[n])
        assert (np.moveaxis(dirty["input"], 1, -1)[rows] == 0).all()


def test_wrong_labels_are_found_and_nothing_is_written(rng):
    p = problem_of("cross_entropy", (700, 5), "plain", False, rng)
    for wrong, dtype in ((5, np.int8), (-1, np.int64), (2**63 + 5, np.uint64)):
        y = np.where(p.target == -100, 0, p.target).astype(dtype)
        y[650] = np.array(wrong).astype(dtype)
        outs = {"input": np.full((700, 5), 7.0)}
        q = p._replace(target=y)
        assert run(q, outs)[1] == scores.WRONG_LABEL
        with pytest.raises(IndexError, match=r"target\[650\] is "):
            scores.compute(q, outs)
        assert (outs["input"] == 7).all()


def test_arrays_that_do_not_fit_are_refused(rng):
    p = problem_of("cross_entropy", (6, 5), "rows", False, rng)
    for q in (
        p._replace(target=p.target[:5]),
        weighted(p, sample_weight=np.ones(5)),
        p._replace(weight=np.ones(4)),
        p._replace(input=np.ones((6, 5, 2))),
    ):
        assert run(q, {})[1] == launch.UNFIT
    assert run(p, {"input": np.ones((5, 6))})[1] == launch.UNFIT


def test_divisor(rng):
    p = problem_of("cross_entropy", (50, 5), "weighted", False, rng)
    sample_weight = rng.random(50)
    terms = reference(p)
    live = p.target != -100
    p = weighted(p, divisor=None, sample_weight=sample_weight)
    by = (p.weight[np.where(live, p.target, 0)] * sample_weight)[live].sum()
    np.testing.assert_allclose(run(p, {})[0], (terms * sample_weight).sum() / by, rtol=1e-12)
    empty = weighted(p, sample_weight=None)._replace(input=np.ones((0, 5)), target=np.ones(0, int))
    assert np.isnan(run(empty, {})[0])
    assert run(weighted(empty, divisor=1.0), {}) == (0.0, launch.OK)
    ignored = p._replace(target=np.full(50, -100))
    outs = {"input": np.ones((50, 5))}
    assert np.isnan(run(ignored, outs)[0])
    assert (outs["input"] == 0).all()


def test_linear_definitions_are_recognised():
    found = {name: is_linear(functions) for name, (functions, _) in DEFINITIONS.items()}
    assert found.pop("cross_entropy") == (True, True)
    assert set(found.values()) == {(False, False)}

    def shifted(cross_entropy, logsumexp, scale):
        return (2 * cross_entropy - logsumexp) / scale + 1

    def branches(cross_entropy, scale):
        return cross_entropy if scale > 0 else scale

    def weighed(cross_entropy, class_weight, scale):
        return -scale * class_weight * cross_entropy

    linear = ScoreFunctions("a", shifted, ("cross_entropy", "logsumexp"), (None,))
    assert is_linear(linear) == (True, False)
    assert is_linear(ScoreFunctions("b", branches, ("cross_entropy",), (None,))) == (False, False)
    assert is_linear(ScoreFunctions("c", weighed, ("cross_entropy", "class_weight"), (None,))) == (True, True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transposes_tiles_of_all_sizes(dtype):
    """Squares overlap at the edges; nothing beside the columns is written."""
    from ctypes import CFUNCTYPE, c_int64

    from numbaloss.kernels.cpu.transpose import transposer

    transpose = CFUNCTYPE(*[c_int64] * 7)(transposer(np.dtype(dtype)))
    rng = np.random.default_rng(0)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 33):
        for columns in (1, 2, 3, 4, 5, 7, 8, 9, 31):
            a, pitch = rng.random((rows, columns)).astype(dtype), rows + 3
            into = np.full((columns, pitch), -1, dtype)
            transpose(a.ctypes.data, a.strides[0], into.ctypes.data, into.strides[0], rows, columns)
            np.testing.assert_array_equal(into[:, :rows], a.T)
            assert (into[:, rows:] == -1).all()
