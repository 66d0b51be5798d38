"""`jit` of the losses with a term a row: the library's calls, inside the caller's own compiled code."""

import inspect

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError
from sweeps import some, sweep

import numbaloss as nl
from numbaloss import testing
from numbaloss.call import RowLoss
from numbaloss.loss import COMMON

LOSSES = {n: f for n, f in nl.registry.items() if issubclass(f.Class, RowLoss)}

# What stands for None, so that a function is compiled once for all options.
GIVEN = {"ignore_index": -100, "distance_function": "euclidean"}
CLASSES = {"linear_cross_entropy": 6}

each_loss = pytest.mark.parametrize("name", LOSSES)


def samples(loss, rng, dtype):
    """The arrays by position; labels differ in number, so that integers have all their dtypes' shapes."""
    shape = (12, 3, 7) if loss is nl.ctc_loss else testing.SHAPE
    return tuple(np.ascontiguousarray(a) for a in testing.samples(loss, rng, shape, dtype).values())


def options(loss, **given):
    """All options by name, in order."""
    fields = loss.Class.fields
    usual = {n: GIVEN.get(n) if f.default is None and not f.array else f.default for n, f in fields.items()}
    return {**usual, **given}


def in_turn(loss, **given):
    """The options' samples, one option at a time, and both reductions."""
    yield options(loss, **given)
    for n, field in loss.Class.fields.items():
        for value in field.samples:
            if n != "options" and value not in (None, "none", field.default):
                yield options(loss, **{**given, n: value})


def weights(loss, rng, dtype):
    """Each array among the options: a number for each class."""
    fields = loss.Class.fields
    classes = CLASSES.get(loss.__name__, testing.SHAPE[1])
    return {n: rng.uniform(0, 2, classes).astype(dtype) for n, f in fields.items() if f.array}


def differentiated(loss):
    """Positions of the arguments that `out` is for."""
    wrt = loss.Class._default_wrt()
    return [loss.Class._required.index(n) for n in ((wrt,) if isinstance(wrt, str) else wrt)]


def outputs(loss, arrays):
    """What `out` takes: an array, or a tuple; and its arrays."""
    made = tuple(np.full_like(arrays[k], np.nan) for k in differentiated(loss))
    return (made if len(made) > 1 else made[0]), made


def check(loss, value, gradients, arrays, chosen):
    """Value and gradients are those of the library's own call."""
    expected, by = loss.value_and_grad(*arrays, **chosen)
    assert type(value) is float
    pairs = [(value, expected), *zip(gradients, by if isinstance(by, tuple) else (by,), strict=True)]
    for got, wanted in pairs:
        if loss is nl.linear_cross_entropy:
            # Another BLAS: what the scores are rounded by, the sums over 19 features and 7 rows.
            eps = np.finfo(wanted.dtype).eps
            np.testing.assert_allclose(got, wanted, rtol=32 * eps, atol=32 * eps, err_msg=str(chosen))
        else:
            np.testing.assert_array_equal(got, wanted, str(chosen))


@each_loss
def test_parameters_are_those_of_the_loss_and_out(name):
    jit = inspect.signature(LOSSES[name].jit.py_func).parameters
    own = inspect.signature(LOSSES[name]).parameters
    wanted = [(n, p.default) for n, p in own.items() if n not in COMMON]
    assert [(p.name, p.default) for p in jit.values()] == [*wanted, ("out", None)]


@pytest.mark.parametrize("name", sweep(LOSSES, "multi_margin_loss"))
@pytest.mark.more
def test_in_a_prange(name):
    """With the defaults; the other options are tried below."""
    loss, problems = LOSSES[name], 5
    rng = np.random.default_rng(1)
    drawn = [samples(loss, rng, np.float32) for _ in range(problems)]
    stacked = [np.stack(a) for a in zip(*drawn, strict=True)]
    gradients = [np.full_like(stacked[k], np.nan) for k in differentiated(loss)]
    values = np.empty(problems)
    jit = loss.jit
    if name == "ctc_loss":

        @njit(parallel=True)
        def run(a, b, c, d, values, out):
            for k in prange(values.size):
                values[k] = jit(a[k], b[k], c[k], d[k], out=out[0][k])

    elif len(gradients) == 1:

        @njit(parallel=True)
        def run(a, b, values, out):
            for k in prange(values.size):
                values[k] = jit(a[k], b[k], out=out[0][k])

    elif len(gradients) == 2:

        @njit(parallel=True)
        def run(a, b, c, values, out):
            for k in prange(values.size):
                values[k] = jit(a[k], b[k], c[k], out=(out[0][k], out[1][k]))

    else:

        @njit(parallel=True)
        def run(a, b, c, values, out):
            for k in prange(values.size):
                values[k] = jit(a[k], b[k], c[k], out=(out[0][k], out[1][k], out[2][k]))

    run(*stacked, values, tuple(gradients))
    for k in range(problems):
        check(loss, float(values[k]), [g[k] for g in gradients], drawn[k], {})


@pytest.mark.parametrize("name", sweep(LOSSES, "nll_loss"))
@pytest.mark.more
def test_in_float64_with_weights_and_in_place(name):
    loss = LOSSES[name]
    rng = np.random.default_rng(2)
    arrays, given = samples(loss, rng, np.float64), weights(loss, rng, np.float64)
    for chosen in in_turn(loss, **given):
        out, gradients = outputs(loss, arrays)
        check(loss, loss.jit(*arrays, *chosen.values(), out), gradients, arrays, chosen)
    overwritten = tuple(a.copy() for a in arrays)
    gradients = tuple(overwritten[k] for k in differentiated(loss))
    chosen = options(loss, **given)
    out = gradients if len(gradients) > 1 else gradients[0]
    check(loss, loss.jit(*overwritten, *chosen.values(), out), gradients, arrays, chosen)
    check_errors(loss, arrays, chosen)


def check_errors(loss, arrays, chosen):
    """What is wrong raises, and then nothing has been written."""
    name = loss.__name__
    kept = [a.copy() for a in arrays]

    def refused(error, message, arrays=arrays, out=None, **wrong):
        new, gradients = outputs(loss, kept)
        with pytest.raises(error, match=message):
            loss.jit(*arrays, *{**chosen, **wrong}.values(), new if out is None else out)
        assert all(np.isnan(g).all() for g in gradients)

    refused(ValueError, "reduction must be 'mean' or 'sum'", reduction="none")
    for n, field in loss.Class.fields.items():
        for value, error, _ in field.bad:
            if error is ValueError and type(value) is type(chosen[n]) and value != 2**63:
                refused(ValueError, f"^{name}: {n}" if n != "reduction" else "reduction", **{n: value})
        if field.array:
            refused(ValueError, f"^{name}: {n}", **{n: chosen[n][1:]})
    # Too few rows of the last operand; outputs too small, or over another's memory.
    refused(ValueError, f"^{name}: ", (*arrays[:-1], arrays[-1][1:]))
    _, gradients = outputs(loss, arrays)
    short = tuple(g[1:] for g in gradients)
    refused(ValueError, f"^{name}: out must have", out=short if len(short) > 1 else short[0])
    k = differentiated(loss)[-1]
    memory = np.empty(arrays[k].size + 1)
    inside, over = memory[:-1].reshape(arrays[k].shape), memory[1:].reshape(arrays[k].shape)
    inside[:] = arrays[k]
    moved = (*arrays[:k], inside, *arrays[k + 1 :])
    out = (*gradients[:-1], over) if len(gradients) > 1 else over
    refused(ValueError, f"^{name}: out overlaps", moved, out)
    labels = [k for k, a in enumerate(arrays) if a.dtype.kind == "i"]
    if labels:
        k = labels[0]
        for bad in (np.iinfo(np.int64).min, np.iinfo(np.int64).max, -2, 19):
            wrong = arrays[k].copy()
            wrong.flat[0] = bad
            if loss is nl.ctc_loss:
                wrong[:, 0] = bad
            refused(IndexError, f"^{name}: target", (*arrays[:k], wrong, *arrays[k + 1 :]))
    for a, b in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(a, b)


def cases():
    """Calls with other layouts, dtypes and kinds of arguments: arrays by position, options by name."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 5)).astype("f4")
    y = rng.integers(0, 5, 6)
    images, pixels = rng.normal(size=(2, 5, 3, 4)), rng.integers(0, 5, (2, 3, 4))
    probabilities = rng.dirichlet(np.ones(5), 6).astype("f4")
    weight = rng.uniform(1, 2, 5).astype("f4")
    lists = np.where(rng.random((6, 5)) < 0.5, rng.integers(0, 5, (6, 5)), -1)
    a, b, c = (rng.normal(size=(4, 3, 6)) for _ in range(3))
    log_probs = np.log(rng.dirichlet(np.ones(4), (9, 2)))
    w = rng.normal(size=(5, 5)).astype("f4")
    # Scores of three chunks.
    many, wide = rng.normal(size=(3000, 3)).astype("f4"), rng.normal(size=(6000, 3)).astype("f4")
    chosen = rng.integers(0, 7, 3000)
    every_third = np.ascontiguousarray(np.repeat(x, 3, axis=1))[:, ::3]
    read_only = x.copy()
    read_only.flags.writeable = False
    return [
        (nl.cross_entropy, (np.asfortranarray(x), y.astype("u1")), {}),
        (nl.cross_entropy, (every_third, y.astype("u8")), {"weight": weight}),
        (nl.cross_entropy, (read_only, y[::-1]), {"ignore_index": int(y[0])}),
        (nl.cross_entropy, (x[0], y[0]), {"label_smoothing": 0.1}),
        (nl.cross_entropy, (x, probabilities), {"weight": weight, "label_smoothing": 0.2}),
        (nl.cross_entropy, (images, pixels), {"reduction": "sum"}),
        (nl.cross_entropy, (x[:0], y[:0]), {}),
        (nl.nll_loss, (images[..., ::2], pixels[..., ::2]), {}),
        (nl.nll_loss, (x[0], y[0]), {"weight": weight}),
        (nl.multi_margin_loss, (x[0], y[0]), {}),
        (nl.multilabel_margin_loss, (x[:, ::-1], lists.astype("i2")), {}),
        (nl.multilabel_soft_margin_loss, (x, (lists > 0).astype("u1")), {"weight": weight}),
        (nl.cosine_embedding_loss, (a[0], b[0], np.array([1, -1, 1, -1][:3], "i1")), {"margin": 0.1}),
        (nl.triplet_margin_loss, (a, b[:, :, ::-1], c), {"p": 3.0, "swap": True}),
        (nl.triplet_margin_with_distance_loss, (a, b, c), {"distance_function": "cosine"}),
        (nl.ctc_loss, (log_probs, np.array([1, 2, 3]), np.array([9, 8]), np.array([2, 1])), {}),
        (nl.ctc_loss, (log_probs[:, 0], np.array([1, 2, 3]), np.array(9), np.array(2)), {}),
        (nl.linear_cross_entropy, (x[:, ::-1], w.T, y), {"weight": weight}),
        (nl.linear_cross_entropy, (x[0], w, y[0]), {}),
        (nl.linear_cross_entropy, (many, wide, chosen), {"ignore_index": 0}),
    ]


@pytest.mark.parametrize(
    ("loss", "arrays", "given"), [pytest.param(*c, id=f"{c[0].__name__}-{k}") for k, c in enumerate(cases())]
)
@pytest.mark.sweep
def test_other_arguments(loss, arrays, given):
    kept = [np.copy(a) for a in arrays]
    gradients = tuple(np.full(arrays[k].shape, np.nan, arrays[k].dtype) for k in differentiated(loss))
    value = loss.jit(*arrays, **given, out=gradients if len(gradients) > 1 else gradients[0])
    check(loss, value, gradients, arrays, given)
    assert np.isclose(loss.jit(*arrays, **given), value, equal_nan=True)  # without the gradient
    for a, b in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(a, b)


X, Y = np.ones((3, 4), "f4"), np.zeros(3, "i8")


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    some(
        [
            (nl.cross_entropy, (X.astype("i4"), Y), "input must be an array of float32 or float64"),
            (nl.cross_entropy, (X, Y.astype("c8")), "target must hold integers"),
            (nl.cross_entropy, (X, Y, X), "weight must be an array with one axis"),
            (nl.triplet_margin_loss, (X, X.astype("f8"), X), "vectors must be arrays of one dtype"),
            (nl.nll_loss, (X, Y, None, -100, "mean", X.T), "out must be a C-contiguous array"),
            (
                nl.nll_loss,
                (X, Y, None, -100, "mean", X.astype("f8")),
                "out must be a C-contiguous array of float32",
            ),
            (nl.cosine_embedding_loss, (X, X, Y, 0.0, "mean", X), "out must be None or a tuple of 2"),
            (nl.linear_cross_entropy, (X, X, X), "target must hold class indices"),
            (nl.ctc_loss, (X, Y, 3.0, 3), "lengths must be integers"),
        ]
    ),
)
@pytest.mark.thin(3)
def test_what_cannot_be_is_an_error_of_types(loss, arguments, message):
    with pytest.raises(TypingError, match=message):
        loss.jit(*arguments)


@pytest.mark.more
def test_a_distance_of_ones_own_is_an_error_of_types():
    distance = njit(lambda x, y: 0.0)

    @njit
    def call(x):
        return nl_triplet(x, x, x, distance)

    nl_triplet = nl.triplet_margin_with_distance_loss.jit
    with pytest.raises(TypingError, match="distance_function must be None or a name in compiled code"):
        call(X)


KEPT = """
import os
import numpy as np
import numbaloss as nl
from numba import njit

jit = nl.cross_entropy.jit


@njit(cache=True)
def inner(x, y):
    return jit(x, y)


@njit(cache=True)
def outer(x, y):
    return 2 * inner(x, y)


x, y = np.eye(4, 3, dtype="f4"), np.arange(4) % 3
value = nl.cross_entropy(x, y)
if "CALLS_OUTER" in os.environ:
    assert outer(x, y) == 2 * value
else:
    assert inner(x, y) == value
print(sum(inner.stats.cache_hits.values()), sum(outer.stats.cache_hits.values()))
"""


@pytest.mark.sweep
def test_kept_on_disk(python, tmp_path):
    """Code that others keep on disk finds its kernels again, and those of code that it calls."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(KEPT, **cache) == ["0 0"]
    assert python(KEPT, **cache) == ["1 0"]
    assert python(KEPT, CALLS_OUTER="1", **cache) == ["1 0"]  # compiled around what was kept
    assert python(KEPT, CALLS_OUTER="1", **cache) == ["0 1"]
