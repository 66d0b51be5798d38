"""The CPU kernels of margin losses and of nll_loss, by definitions: against formulas, in any layout."""

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import call as calls
from numbaloss import testing
from numbaloss.kernels import math as nm
from numbaloss.kernels.cpu import launch as launches
from numbaloss.kernels.cpu import margins, nll
from numbaloss.kernels.cpu.launch import UNFIT
from numbaloss.kernels.spec import MANY, ONE, MarginFunctions, Margins, NllFunctions, Picks, Weighting


def terms(score, own, p, margin):
    h = nm.maximum(0, margin - own + score)
    return h if p == 1 else nm.square(h)


def finish(total, classes, weight):
    return weight / classes * total


def terms_of_many(score, own):
    return nm.maximum(0, 1 - own + score)


def value(score, weight):
    return -weight * score


LINEAR, SQUARED = (MarginFunctions(f"multi_margin_{p}", terms, finish, (p, None)) for p in (1, 2))
LISTS = MarginFunctions("multilabel_margin", terms_of_many, finish, many=True)
NLL = NllFunctions("nll", value)


def expected_margins(functions, x, y, margin, weight):
    """Terms and gradients in float64, without derivatives by jets."""
    out, gradient = np.zeros(len(x)), np.zeros(x.shape)
    p = 2 if functions is SQUARED else 1
    for r, (row, labels) in enumerate(zip(np.asarray(x, float), y, strict=True)):
        if functions is LISTS:
            end = np.flatnonzero(labels < 0)
            labels = labels[: end[0]] if end.size else labels
        else:
            labels = [labels]
        for own in labels:
            h = np.maximum(0, margin - row[own] + row)
            h[labels] = 0
            d = (h > 0) * 1.0 if p == 1 else 2 * h
            out[r] += weight[r] / row.size * (h**p).sum()
            gradient[r] += weight[r] / row.size * d
            gradient[r, own] -= weight[r] / row.size * d.sum()
    return out, gradient


def draw(functions, shape, rng):
    x = rng.normal(size=shape)
    if functions is not LISTS:
        return x, rng.integers(0, shape[1], shape[0])
    order = rng.random(shape).argsort(axis=1)
    return x, np.where(np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1)), order, -1)


def family(functions):
    return nll if functions is NLL else margins


def problem(functions, x, y, mean=True, margin=0.75, class_weight=None, sample_weight=None, upstream=None):
    dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    reduction, divisor = ("mean", None) if mean else ("sum", 1.0)
    weighting = Weighting(reduction, sample_weight, upstream, divisor=divisor)
    if functions is NLL:
        return Picks("nll", NLL, x, y, class_weight, -100, weighting, x.dtype, dtype)
    kind, numbers = (MANY, ()) if functions is LISTS else (ONE, (margin,))
    p = functions.options[0] if functions.options else 1
    return Margins(
        "margins", kind, functions, numbers, x, y, class_weight, p, margin, weighting, x.dtype, dtype
    )


def outputs_of(gradient=None, terms=None, curvature=None):
    found = {"terms": terms, "input": gradient, "curvature": curvature}
    return {n: o for n, o in found.items() if o is not None}


def call(functions, x, y, gradient=None, mean=True, margin=0.75, terms=None, curvature=None, **weights):
    """The value, of float64."""
    p, module = problem(functions, x, y, mean, margin, **weights), family(functions)
    value, status = launches.run(module.pack(p, outputs_of(gradient, terms, curvature), ()))
    if status != launches.OK:
        raise module.refuse(p, status)
    return value


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
}


@pytest.mark.parametrize("functions", (LINEAR, SQUARED, LISTS), ids=("p=1", "p=2", "many"))
@pytest.mark.parametrize("shape", ((1, 1), (5, 1), (64, 10), (6, 5000)), ids=str)
@pytest.mark.thin(6)
def test_margins(functions, shape, rng):
    x, y = draw(functions, shape, rng)
    margin = 1.0 if functions is LISTS else 0.75
    classes = None if functions is LISTS else rng.random(shape[1])
    rows, upstream = rng.random(shape[0]), rng.normal(size=shape[0])
    weight = rows if classes is None else rows * classes[y]
    wanted, slopes = expected_margins(functions, x, y, margin, weight)
    for dtype, error in ((np.float64, 1e-13), (np.float32, 2e-5), (np.float16, 2e-2)):
        for layout, labels in zip(LAYOUTS.values(), (np.int64, np.int32, np.int16, np.int64), strict=True):
            scores = layout(x.astype(dtype))
            got, into = np.empty(shape[0], dtype), np.empty_like(scores)
            weights = dict(class_weight=classes, sample_weight=rows, upstream=upstream)
            weights = {n: a if a is None else a.astype(dtype) for n, a in weights.items()}
            call(functions, scores, y.astype(labels), into, False, terms=got, **weights)
            np.testing.assert_allclose(got, wanted, rtol=error, atol=error)
            np.testing.assert_allclose(into, slopes * upstream[:, np.newaxis], rtol=error, atol=error)
            mean = call(functions, scores, y.astype(labels), scores, **weights | dict(upstream=None))
            np.testing.assert_allclose(mean, wanted.sum() / rows.sum(), rtol=error)
            np.testing.assert_allclose(scores, slopes / rows.sum(), rtol=error, atol=error)


def test_curvature_is_that_of_squared_hinges(rng):
    x, y = draw(SQUARED, (20, 7), rng)
    gradient, curvature = np.empty_like(x), np.empty_like(x, order="F")
    call(SQUARED, x, y, gradient, False, curvature=curvature)
    for i in range(7):
        up, down = x.copy(), x.copy()
        up[:, i] += 1e-4
        down[:, i] -= 1e-4
        above, below = (np.empty_like(x) for _ in range(2))
        call(SQUARED, up, y, above, False)
        call(SQUARED, down, y, below, False)
        np.testing.assert_allclose(curvature[:, i], (above - below)[:, i] / 2e-4, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("functions", (LINEAR, SQUARED, LISTS))
def test_not_a_number_and_the_clamp(functions):
    x = np.array([[np.nan, 0, 1], [0, np.nan, 0], [1, 0.25, 0]])
    y = np.array([1, 1, 0])
    lists = np.full((3, 3), -1)
    lists[:, 0] = y
    gradient, terms = np.empty_like(x), np.empty(3)
    margin = 1.0 if functions is LISTS else 0.75
    x[2, 1] = 1 - margin  # exactly at the clamp
    call(functions, x, lists if functions is LISTS else y, gradient, terms=terms, margin=margin)
    np.testing.assert_array_equal(np.isnan(terms), (True, True, False))
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), (True, True, False))
    assert not gradient[2].any()
    weight = np.array([0.0, 0, 1])
    call(functions, x, lists if functions is LISTS else y, gradient, terms=terms, sample_weight=weight)
    assert not terms[:2].any() and not gradient[:2].any()


def test_scalars_and_lists_of_one():
    row = np.array([0.5, 0.0, 1.0])
    one, terms = np.empty(()), np.empty(1)
    call(LINEAR, row, np.array(0), terms=one)
    call(LINEAR, row, np.array([0]), terms=terms)  # a loss of the target's shape, as in PyTorch
    assert one == terms[0] == (0.25 + 1.25) / 3
    for x, y in (
        (np.array(2.0), np.array(0)),
        (np.array(2.0), np.array([0])),
        (np.array([2.0]), np.array(0)),
    ):
        for functions in (LINEAR, LISTS):
            gradient = np.empty_like(x)
            assert call(functions, x, y, gradient) == 0 and not gradient.any()


def expected_nll(x, y, weight, sample_weight):
    w = np.where(y == -100, 0, weight[np.where(y == -100, 0, y)] * sample_weight)
    picked = np.take_along_axis(x, np.where(y == -100, 0, y)[:, np.newaxis], 1)[:, 0]
    gradient = np.zeros(x.shape)
    np.put_along_axis(gradient, np.where(y == -100, 0, y)[:, np.newaxis], -w[:, np.newaxis], 1)
    return np.where(w == 0, 0, -w * picked), gradient, w


@pytest.mark.parametrize("shape", ((1, 1), (64, 10), (4, 3, 5), (2, 3, 4, 5)), ids=str)
@pytest.mark.more
def test_nll(shape, rng):
    rows = shape[:1] + shape[2:]
    x, y = rng.normal(size=shape), rng.integers(0, shape[1], rows)
    y[rng.random(rows) < 0.2] = -100
    classes, weights, upstream = rng.random(shape[1]), rng.random(rows), rng.normal(size=rows)
    if len(rows) > 1:
        weights = weights[..., :1]
    wanted, slopes, w = expected_nll(x, y, classes, weights)
    hidden = np.moveaxis(x, 1, -1)
    hidden[y == -100] = np.nan  # never read
    for dtype, error in ((np.float64, 1e-13), (np.float32, 1e-5), (np.float16, 1e-2)):
        for layout, labels in zip(LAYOUTS.values(), (np.int64, np.int32, np.int16, np.int64), strict=True):
            scores = layout(x.astype(dtype))
            got, into = np.empty(rows, dtype), np.empty_like(scores)
            given = dict(class_weight=classes, sample_weight=weights, upstream=upstream)
            given = {n: a.astype(dtype) for n, a in given.items()}
            curvature = np.full_like(into, 3)
            call(NLL, scores, y.astype(labels), into, False, terms=got, curvature=curvature, **given)
            np.testing.assert_allclose(got, wanted, rtol=error, atol=error)
            np.testing.assert_allclose(into, slopes * upstream[:, np.newaxis], rtol=error, atol=error)
            assert not curvature.any()
            mean = call(NLL, scores, y.astype(labels), scores, **given | dict(upstream=None))
            np.testing.assert_allclose(mean, wanted.sum() / w.sum(), rtol=error, atol=error)
            np.testing.assert_allclose(scores, slopes / w.sum(), rtol=error, atol=error)


@pytest.mark.parametrize("functions", (LINEAR, LISTS, NLL))
@pytest.mark.parametrize("bad", (3, -2, 2**62, -(2**63)))
def test_wrong_labels_write_nothing(functions, bad):
    x = np.zeros((4, 3), order="F")
    gradient = np.ones_like(x)
    y = np.zeros((4, 3) if functions is LISTS else 4, int)
    y[(2, 1) if functions is LISTS else 2] = bad
    at = "2, 1" if functions is LISTS else "2"
    with pytest.raises(IndexError, match=rf"target\[{at}\] is {bad}, but input has 3 classes"):
        call(functions, x, y, gradient)
    assert (gradient == 1).all()


@pytest.mark.parametrize("functions", (LINEAR, LISTS, NLL))
def test_shapes_that_do_not_fit(functions):
    x, y = np.zeros((4, 3)), np.zeros((4, 3) if functions is LISTS else 4, int)
    broken = [
        dict(target=y[:-1]),
        dict(target=y[..., np.newaxis]),
        dict(target=np.zeros((3, 4), int)),
        dict(target=np.zeros((), int)),
        dict(input=x[:, :0]),
        dict(input=x[np.newaxis, np.newaxis]),
        dict(class_weight=np.zeros(4)),
        dict(class_weight=np.zeros((1, 3))),
        dict(sample_weight=np.zeros(3)),
        dict(sample_weight=np.zeros((4, 3))),
        dict(upstream=np.zeros(1)),
        dict(gradient=np.zeros((4, 4))),
        dict(gradient=np.zeros(4)),
        dict(terms=np.zeros(3)),
        dict(terms=np.zeros((4, 1))),
    ]
    for one in broken:
        arguments = dict(input=x, target=y) | one
        with pytest.raises(ValueError, match="do not fit together"):
            call(functions, arguments.pop("input"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("functions", (LINEAR, LISTS, NLL))
def test_a_launch_serves_other_extents(functions, rng):
    """A recipe depends on no extent: sample weights may turn out to be broadcast."""
    launch = None
    for shape in ((1, 3), (40, 7), (0, 3), (200, 300)):
        x, y = draw(functions, shape, rng)
        weight, gradient = np.array([2.0]), np.full(shape, np.nan)
        p = problem(functions, x, y, sample_weight=weight)
        fresh = family(functions).pack(p, {"input": gradient}, ())
        launch = launch or fresh
        got, status = launches.run(fresh._replace(recipe=launch.recipe, numbers=launch.numbers))
        assert status == -1
        again = np.full(shape, np.nan)
        value = call(functions, x, y, again)
        np.testing.assert_allclose(got, value, rtol=1e-12)
        np.testing.assert_allclose(gradient, again, rtol=1e-12)


def prepared_calls(loss, rng):
    """Calls of a loss of any kind of arrays and options, each with other extents the second time."""
    options = [{}, {"reduction": "sum"}, {"reduction": "none"}, {"grad_output": 2.0, "normalizer": 3}]
    for k, dtype in enumerate(("f8", "f4", "f2")):
        for j, layout in enumerate(LAYOUTS.values()):
            given = options[(k + j) % 4]

            def call(shape, dtype=dtype, layout=layout, given=given, kind="qhBi"[j]):
                y = testing.samples(loss, rng, shape)["target"] % shape[1]
                x, up = layout(rng.normal(size=shape).astype(dtype)), rng.random(y.shape[:1], "f4")
                more = {"sample_weight": up[:1]} if kind != "q" else {}
                if given.get("reduction") == "none":
                    more["grad_output"] = up
                if "weight" in loss.Class.fields and kind != "h":
                    more["weight"] = rng.random(shape[1])
                if kind == "i":
                    more["out"] = x
                return (x, y.astype(kind)), given | more

            yield call


@pytest.mark.parametrize("loss", (nl.multi_margin_loss, nl.multilabel_margin_loss, nl.nll_loss))
@pytest.mark.thin(3)
def test_calls_seen_before_go_straight_to_the_driver(loss, rng, monkeypatch):
    for call in prepared_calls(loss, rng):
        arrays, options = call((5, 4))
        loss.value_and_grad(*arrays, **options)
        for shape in ((3, 6), (400, 100)):
            arrays, options = call(shape)
            kept = [a.copy() for a in arrays]
            with monkeypatch.context() as patched:
                patched.setattr(calls, "Evaluation", None)
                value, gradient = loss.value_and_grad(*arrays, **options)
            options.pop("out", None)
            wanted, slopes = loss.value_and_grad(*[np.array(a) for a in kept], **options)
            np.testing.assert_array_equal(value, wanted)
            np.testing.assert_array_equal(gradient, slopes)


def test_bits_do_not_depend_on_threads(rng):
    for functions, shape in ((LINEAR, (300, 130)), (SQUARED, (3, 20_000)), (LISTS, (300, 130))):
        x, y = draw(functions, shape, rng)
        x = x.astype(np.float32)
        results = []
        for parallel_from in (x.size + 1, 0, 0):
            gradient = np.empty_like(x)
            launch = margins.pack(problem(functions, x, y), {"input": gradient}, ())
            results.append((launches.run(launch._replace(parallel_from=parallel_from)), gradient))
        for result, gradient in results[1:]:
            assert result == results[0][0] and result[1] != UNFIT
            np.testing.assert_array_equal(gradient, results[0][1])
