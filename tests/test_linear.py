"""Fused linear cross entropy: against PyTorch, the reference, and cross entropy of all scores at once."""

import copy
import inspect
import itertools
import math
import pickle
import tracemalloc

import numba
import numpy as np
import pytest
from sweeps import some, sweep

from numbaloss import reference
from numbaloss.loss import registry
from numbaloss.losses.linear import LinearCrossEntropyLoss, LinearCrossEntropyOptions
from numbaloss.losses.multiclass import CrossEntropyLoss

linear_cross_entropy, cross_entropy = LinearCrossEntropyLoss.function, CrossEntropyLoss.function

# Rows (none: no batch) and positions: of each, scores of 7 classes from 5 features.
SHAPES = [((), ()), ((13,), ()), ((13,), (3,)), ((4,), (2, 3))]
CLASSES, FEATURES = 7, 5
CHUNKS = [None, LinearCrossEntropyOptions(batch_chunk_size=3), LinearCrossEntropyOptions(memory_budget=1)]

# Rounding errors of float32 arithmetic: a few ulps of the largest of the terms that are added up.
TOLERANCE = {np.float64: 1e-12, np.float32: 5e-6}


def sample(batch, inner=(), kind="indices", dtype=np.float64, classes=CLASSES, features=FEATURES, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "indices":
        target = rng.integers(0, classes, batch + inner)
    else:
        target = rng.random((*batch, classes, *inner)).astype(dtype)
    return {
        "input": rng.normal(size=(*batch, features)).astype(dtype),
        "linear_weight": rng.normal(size=(classes, *inner, features)).astype(dtype),
        "target": target,
    }


def more(arrays, seed=1):
    """A bias, and weights of the classes."""
    rng = np.random.default_rng(seed)
    w = arrays["linear_weight"]
    return {
        "linear_bias": rng.normal(size=w.shape[:-1]).astype(w.dtype),
        "weight": rng.uniform(0.2, 2, len(w)).astype(w.dtype),
    }


def ignoring(target, index=-100):
    """The target with every third term ignored, so that some positions of a row are and some are not."""
    target = np.array(target)
    if target.ndim:
        target.reshape(-1)[::3] = index
    return target


def names(arrays, kind):
    """All that can be differentiated."""
    allowed = ("input", "linear_weight", "linear_bias", *(("target", "weight") * (kind != "indices")))
    return tuple(n for n in allowed if arrays.get(n) is not None)


def close(got, expected, dtype, message=""):
    tolerance = TOLERANCE[dtype]
    scale = np.max(np.abs(expected), initial=1.0)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale, err_msg=message)


@pytest.mark.parametrize(
    ("batch", "inner", "kind", "dtype"),
    some([(*s, k, d) for d in TOLERANCE for s in SHAPES for k in ("indices", "probabilities")], 9),
)
@pytest.mark.thin(2)
def test_torch_and_reference(batch, inner, kind, dtype, torch):
    """Values, and gradients by every argument, in one chunk and in many."""
    import torch.nn.functional as F

    arrays = sample(batch, inner, kind, dtype)
    extra = more(arrays)
    if kind == "indices":
        arrays["target"] = ignoring(arrays["target"])
    for smoothing, reduction, given in itertools.product(
        (0.0, 0.1), ("none", "mean", "sum"), ((), ("linear_bias",), ("linear_bias", "weight"))
    ):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        call = arrays | {n: extra[n] for n in given}
        wrt = names(call, kind)
        rng = np.random.default_rng(2)
        up = rng.normal(size=batch + inner).astype(dtype) if reduction == "none" else dtype(1.5)

        tensors = {n: torch.tensor(a) for n, a in call.items()}
        for n in wrt:
            tensors[n].requires_grad_()
        expected = F.linear_cross_entropy(**tensors, **options)
        expected.backward(torch.tensor(up).expand(expected.shape))
        close(reference.linear_cross_entropy(**call, **options), expected.detach().numpy(), dtype)

        for chunking in CHUNKS:
            options["options"] = chunking
            value, gradients = linear_cross_entropy.value_and_grad(**call, wrt=wrt, grad_output=up, **options)
            assert np.asarray(value).dtype == dtype and np.shape(value) == tuple(expected.shape)
            close(value, expected.detach().numpy(), dtype)
            np.testing.assert_array_equal(linear_cross_entropy(**call, **options), value)
            for n, g in zip(wrt, gradients, strict=True):
                assert g.dtype == dtype and g.shape == call[n].shape
                close(g, tensors[n].grad.numpy(), dtype, n)
                alone = linear_cross_entropy.grad(**call, wrt=n, grad_output=up, **options)
                np.testing.assert_array_equal(alone, g)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_cross_entropy_of_all_scores(inner, kind, reduction):
    """With all options at once, and the chain rule by hand."""
    arrays = sample((13,), inner, kind)
    extra = more(arrays)
    if kind == "indices":
        arrays["target"] = ignoring(arrays["target"], 2)
    w, x = arrays["linear_weight"], arrays["input"]
    logits = np.moveaxis(np.tensordot(w, x, axes=(-1, -1)), -1, 0) + extra["linear_bias"]
    rng = np.random.default_rng(3)
    options = {
        "reduction": reduction, "label_smoothing": 0.1, "weight": extra["weight"], "normalizer": 9.5,
        "sample_weight": rng.integers(0, 3, (13, *inner)).astype(float),
        "grad_output": rng.normal(size=(13, *inner)) if reduction == "none" else 0.7,
    } | ({"ignore_index": 2} if kind == "indices" else {})  # fmt: skip
    wrt = ("input", "target") if kind == "probabilities" else ("input",)
    value, (g, *rest) = cross_entropy.value_and_grad(logits, arrays["target"], wrt=wrt, **options)
    axes = tuple(range(1, g.ndim))
    expected = {
        "input": np.tensordot(g, w, axes=(axes, tuple(range(w.ndim - 1)))),
        "linear_weight": np.tensordot(g, x, axes=(0, 0)),
        "linear_bias": g.sum(axis=0),
        "target": rest[0] if rest else None,
    }
    wrt = ("linear_bias", *wrt[1:], "linear_weight", "input")
    for chunking in CHUNKS:
        got, gradients = linear_cross_entropy.value_and_grad(
            **arrays, linear_bias=extra["linear_bias"], wrt=wrt, options=chunking, **options
        )
        close(got, value, np.float64)
        for n, found in zip(wrt, gradients, strict=True):
            close(found, expected[n], np.float64, n)


@pytest.mark.more
def test_gradients_by_differences():
    arrays = sample((4,), (2,), "probabilities")
    arrays |= more(arrays)
    options = {"label_smoothing": 0.2, "sample_weight": np.array([[1.0], [0.5], [2.0], [0.0]])}
    for n in names(arrays, "probabilities"):
        g = linear_cross_entropy.grad(**arrays, wrt=n, **options)
        x = arrays[n]
        expected = np.empty_like(x)
        for k in range(x.size):
            low, high = x.copy(), x.copy()
            low.flat[k] -= 1e-5
            high.flat[k] += 1e-5
            values = [linear_cross_entropy(**arrays | {n: moved}, **options) for moved in (low, high)]
            expected.flat[k] = (values[1] - values[0]) / 2e-5
        np.testing.assert_allclose(g, expected, rtol=1e-6, atol=1e-9, err_msg=n)


def test_default_wrt_and_modes():
    arrays = sample((6,))
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**arrays)
    assert value == linear_cross_entropy(*arrays.values())
    for got, expected in zip(linear_cross_entropy.grad(**arrays), (by_x, by_w), strict=True):
        np.testing.assert_array_equal(got, expected)
    (alone,) = linear_cross_entropy.grad(**arrays, wrt=("input",))
    np.testing.assert_array_equal(alone, by_x)
    with pytest.raises(ValueError, match="^linear_cross_entropy: has no value_grad_hess$"):
        linear_cross_entropy.value_grad_hess(**arrays)


def test_micro_batches_add_up():
    arrays = sample((10,))
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**arrays)
    parts = [
        linear_cross_entropy.value_and_grad(
            arrays["input"][k], arrays["linear_weight"], arrays["target"][k], normalizer=10
        )
        for k in (slice(0, 4), slice(4, 10))
    ]
    close(sum(v for v, _ in parts), value, np.float64)
    close(np.concatenate([x for _, (x, _) in parts]), by_x, np.float64)
    close(sum(w for _, (_, w) in parts), by_w, np.float64)


# ---- memory ----------------------------------------------------------------------------------------


def peak(**call):
    """Bytes that a call takes beyond its arguments and gradients."""
    wrt = call.setdefault("wrt", ("input", "linear_weight"))
    call["out"] = tuple(np.empty_like(call[n]) for n in wrt)
    linear_cross_entropy.grad(**call)  # kernels are loaded
    tracemalloc.start()
    try:
        linear_cross_entropy.value_and_grad(**call)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_tenth_of_the_scores_by_default():
    arrays = sample((2048,), dtype=np.float32, classes=32000, features=16)
    assert peak(**arrays) < 2048 * 32000 * 4 / 10


@pytest.mark.parametrize("budget", sweep([600_000, 1_500_000], 600_000))
@pytest.mark.parametrize(
    ("inner", "kind"), some(itertools.product([(), (4,)], ["probabilities", "indices"]), 3)
)
@pytest.mark.thin(2)
def test_budget(inner, kind, budget):
    arrays = sample((200,), inner, kind, np.float32, classes=4000 // math.prod(inner))
    arrays |= more(arrays)
    # On top come vectors of the classes, most of them float64, what is per row, and the buffers that NumPy
    # casts in: 8192 elements an operand.
    slack = 400_000 + 3 * 8192 * 8
    call = arrays | {"options": LinearCrossEntropyOptions(memory_budget=budget)}
    for wrt in (("input", "linear_weight", "linear_bias"), names(arrays, kind)):
        assert peak(**call, wrt=wrt) < budget + slack


def test_halves_take_a_copy_of_the_weight_and_its_gradient():
    arrays = sample((64,), dtype=np.float16, classes=1000, features=500)
    copies = 2 * 4 * arrays["linear_weight"].size
    call = arrays | {"options": LinearCrossEntropyOptions(memory_budget=100_000)}
    assert copies < peak(**call) < copies + 100_000 + 300_000


def test_ignored_rows_are_not_multiplied(monkeypatch):
    arrays = sample((90,))
    arrays["target"] = ignoring(arrays["target"])
    done = []
    product = np.matmul
    monkeypatch.setattr(np, "matmul", lambda *a, **k: done.append(a[0].shape) or product(*a, **k))
    linear_cross_entropy(**arrays)
    assert done == [(60, FEATURES)]


# ---- in place, layouts, dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize("chunking", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
@pytest.mark.thin(12)
def test_in_place(inner, kind, chunking):
    """Each gradient over its own argument, and all of them at once."""
    arrays = sample((13,), inner, kind)
    arrays |= more(arrays)
    if kind == "indices":
        arrays["target"] = ignoring(arrays["target"])
    wrt = names(arrays, kind)
    options = {"options": chunking, "label_smoothing": 0.1}
    value, expected = linear_cross_entropy.value_and_grad(**arrays, wrt=wrt, **options)
    for chosen in (*((n,) for n in wrt), wrt):
        call = {n: a.copy() for n, a in arrays.items()}
        out = tuple(call[n] for n in chosen)
        got, gradients = linear_cross_entropy.value_and_grad(**call, wrt=chosen, out=out, **options)
        assert got == value
        for n, g in zip(chosen, gradients, strict=True):
            assert g is call[n]
            np.testing.assert_array_equal(g, expected[wrt.index(n)], err_msg=n)
        for n in arrays.keys() - set(chosen):
            np.testing.assert_array_equal(call[n], arrays[n])


def layouts(array):
    """The same array, otherwise in memory."""
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    half = (slice(None, None, 2),) * array.ndim
    wide[half] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    reverse = (slice(None, None, -1),) * array.ndim
    offset = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    offset[...] = array
    return {
        "fortran": np.asarray(array, order="F"),
        "strided": wide[half],
        "negative": array[reverse].copy()[reverse],
        "read-only": read_only,
        "swapped": array.astype(array.dtype.newbyteorder()),
        "unaligned": offset,
    }


@pytest.mark.parametrize("layout", ["fortran", "strided", "negative", "read-only", "swapped", "unaligned"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("batch", "inner"), SHAPES, ids=str)
def test_layouts(batch, inner, kind, layout):
    arrays = sample(batch, inner, kind)
    arrays |= more(arrays)
    wrt = names(arrays, kind)
    for chunking in CHUNKS[:2]:
        value, expected = linear_cross_entropy.value_and_grad(**arrays, wrt=wrt, options=chunking)
        call = {n: layouts(a)[layout] for n, a in arrays.items()}
        before = copy.deepcopy(call)
        got, gradients = linear_cross_entropy.value_and_grad(**call, wrt=wrt, options=chunking)
        close(got, value, np.float64)
        for n, g, e in zip(wrt, gradients, expected, strict=True):
            close(g, e, np.float64, n)
            np.testing.assert_array_equal(call[n], before[n])
        if layout in ("fortran", "strided", "negative"):
            out = tuple(layouts(np.zeros_like(arrays[n]))[layout] for n in wrt)
            linear_cross_entropy.grad(**call, wrt=wrt, out=out, options=chunking)
            for n, g, e in zip(wrt, out, expected, strict=True):
                close(g, e, np.float64, n)


def test_broadcast_arrays():
    arrays = sample((6,))
    arrays["input"] = np.broadcast_to(arrays["input"][:1], (6, FEATURES))
    arrays["linear_weight"] = np.broadcast_to(arrays["linear_weight"][:, :1], (CLASSES, FEATURES))
    dense = {n: a.copy() for n, a in arrays.items()}
    got, expected = linear_cross_entropy.grad(**arrays), linear_cross_entropy.grad(**dense)
    for g, e in zip(got, expected, strict=True):
        close(g, e, np.float64)


def test_transposed_weight_is_not_copied():
    """A layer's kernel (F, C), as Keras has it: its transpose, and the gradient's, serve as they lie."""
    arrays = sample((64,), dtype=np.float32, classes=1000, features=500)
    arrays["linear_weight"] = arrays["linear_weight"].copy(order="F")
    call = arrays | {"options": LinearCrossEntropyOptions(memory_budget=100_000)}
    assert peak(**call) < 400_000 < arrays["linear_weight"].nbytes


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
@pytest.mark.thin(4)
def test_halves(half, inner, kind, request):
    """Arithmetic in float32: off by the rounding of the result, half a unit, and little else."""
    half = np.float16 if half == "float16" else request.getfixturevalue("bfloat16")
    arrays = sample((40,), inner, kind)
    arrays = arrays | more(arrays)
    arrays = {n: a if a.dtype.kind == "i" else a.astype(half) for n, a in arrays.items()}
    wide = {n: a if a.dtype.kind == "i" else a.astype(np.float64) for n, a in arrays.items()}
    rounding = 2.0 ** -(11 if half == np.float16 else 8) * 1.01
    wrt = names(arrays, kind)
    for chunking in CHUNKS[:2]:
        options = {"wrt": wrt, "options": chunking}
        value, gradients = linear_cross_entropy.value_and_grad(**arrays, **options)
        expected, wanted = linear_cross_entropy.value_and_grad(**wide, **options)
        assert value.dtype == half
        np.testing.assert_allclose(float(value), reference.linear_cross_entropy(**wide), rtol=rounding)
        np.testing.assert_allclose(float(value), expected, rtol=rounding)
        for n, g, e in zip(wrt, gradients, wanted, strict=True):
            assert g.dtype == half
            # Below 2^-14 a float16's unit is 2^-24.
            np.testing.assert_allclose(g.astype(np.float64), e, rtol=rounding, atol=2e-7, err_msg=n)


def test_dtypes_promote():
    arrays = sample((6,), dtype=np.float32)
    mixed = arrays | {"linear_weight": arrays["linear_weight"].astype(np.float64)}
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**mixed)
    assert (value.dtype, by_x.dtype, by_w.dtype) == (np.float64, np.float32, np.float64)
    close(value, linear_cross_entropy(**arrays), np.float32)
    assert linear_cross_entropy(**arrays, weight=np.arange(1, 8), sample_weight=2.0).dtype == np.float32
    bias = np.arange(7)
    assert linear_cross_entropy(**arrays, linear_bias=bias).dtype == np.float32


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u1", "u8", ">i4"])
def test_index_dtypes(dtype):
    arrays = sample((9,))
    narrow = arrays | {"target": arrays["target"].astype(dtype)}
    assert linear_cross_entropy(**narrow) == linear_cross_entropy(**arrays)
    narrow["target"][3] = np.iinfo(narrow["target"].dtype).max - 99  # in uint64, -100 as its bits
    message = rf"target\[3\] is {narrow['target'][3]}, but linear_weight has 7 classes"
    with pytest.raises(IndexError, match=message):
        linear_cross_entropy(**narrow)


# ---- what counts nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunking", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
@pytest.mark.thin(4)
def test_terms_of_zero_weight_are_zero(inner, kind, chunking):
    """Whatever their rows of the input hold: exact zeros, and nothing of it in the other gradients."""
    arrays = sample((13,), inner, kind)
    arrays |= more(arrays)
    weight = np.ones((13, *inner))
    weight[::2] = 0
    if inner:
        weight[1, 0] = weight[:, 2] = 0
    wrt = names(arrays, kind)
    options = {"wrt": wrt, "sample_weight": weight, "label_smoothing": 0.1, "options": chunking}
    value, expected = linear_cross_entropy.value_and_grad(**arrays, **options)
    for junk in (np.nan, np.inf):
        x, w = arrays["input"].copy(), arrays["linear_weight"].copy()
        x[::2] = junk
        if inner:
            w[:, 2] = junk  # no term of this position counts
        got, gradients = linear_cross_entropy.value_and_grad(
            **arrays | {"input": x, "linear_weight": w}, **options
        )
        assert got == value
        for n, g, e in zip(wrt, gradients, expected, strict=True):
            np.testing.assert_array_equal(g, e, err_msg=n)
        terms = linear_cross_entropy(
            x, w, arrays["target"], sample_weight=weight, reduction="none", options=chunking
        )
        assert np.isfinite(terms).all() and not terms[::2].any()
    assert not expected[0][::2].any()
    close(
        value, reference.linear_cross_entropy(**arrays, sample_weight=weight, label_smoothing=0.1), np.float64
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_ignored_terms_are_not_read(inner, smoothing):
    arrays = sample((12,), inner)
    arrays["target"][::3] = -100
    options = {"label_smoothing": smoothing}
    expected = linear_cross_entropy.value_and_grad(**arrays, **options)
    arrays["input"][::3] = np.nan
    value, gradients = linear_cross_entropy.value_and_grad(**arrays, **options)
    assert value == expected[0]
    for g, e in zip(gradients, expected[1], strict=True):
        np.testing.assert_array_equal(g, e)
    assert not gradients[0][::3].any()


def test_class_of_zero_weight_is_not_read():
    arrays = sample((12,))
    weight = np.arange(7.0)
    x = arrays["input"].copy()
    x[arrays["target"] == 0] = np.nan
    expected = linear_cross_entropy.value_and_grad(**arrays, weight=weight)
    value, gradients = linear_cross_entropy.value_and_grad(**arrays | {"input": x}, weight=weight)
    assert value == expected[0]
    for g, e in zip(gradients, expected[1], strict=True):
        np.testing.assert_array_equal(g, e)
    assert math.isnan(linear_cross_entropy(**arrays | {"input": x}, weight=weight, label_smoothing=0.1))


def test_bias_of_minus_infinity_masks_a_class():
    arrays = sample((12,))
    arrays["target"] = np.minimum(arrays["target"], 5)
    bias = np.zeros(7)
    bias[6] = -np.inf
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**arrays, linear_bias=bias)
    kept = arrays | {"linear_weight": arrays["linear_weight"][:6]}
    expected, (want_x, want_w) = linear_cross_entropy.value_and_grad(**kept)
    close(value, expected, np.float64)
    close(by_x, want_x, np.float64)
    close(by_w[:6], want_w, np.float64)
    assert not by_w[6].any()


def test_input_that_is_not_finite_gives_nan():
    """Without NumPy's warnings."""
    arrays = sample((5,))
    arrays["input"][2] = np.inf
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**arrays)
    assert math.isnan(value) and np.isnan(by_x[2]).all() and np.isnan(by_w).all()
    assert np.isfinite(by_x[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_all_ignored(inner):
    arrays = sample((4,), inner)
    arrays["target"][...] = -100
    arrays["input"][...] = np.nan
    arrays |= {"linear_bias": more(arrays)["linear_bias"]}
    wrt = ("input", "linear_weight", "linear_bias")
    value, gradients = linear_cross_entropy.value_and_grad(**arrays, wrt=wrt)
    assert math.isnan(value) and not any(g.any() for g in gradients)
    assert linear_cross_entropy(**arrays, reduction="sum") == 0
    assert linear_cross_entropy(**arrays, normalizer=3.0) == 0
    assert not linear_cross_entropy(**arrays, reduction="none").any()


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("batch", "inner"), [((0,), ()), ((0,), (3,)), ((4,), (2, 0))], ids=str)
def test_empty(batch, inner, kind):
    arrays = sample(batch, inner, kind, np.float32)
    arrays |= more(arrays)
    wrt = names(arrays, kind)
    value, gradients = linear_cross_entropy.value_and_grad(**arrays, wrt=wrt)
    assert math.isnan(value) and value.dtype == np.float32
    for n, g in zip(wrt, gradients, strict=True):
        assert g.shape == arrays[n].shape and not g.any()
    assert linear_cross_entropy(**arrays, reduction="sum") == 0
    assert linear_cross_entropy(**arrays, reduction="none").shape == batch + inner


def test_no_features():
    """Then all classes are as likely."""
    arrays = sample((6,), features=0)
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**arrays, options=CHUNKS[1])
    np.testing.assert_allclose(value, math.log(7))
    assert by_x.shape == (6, 0) and by_w.shape == (7, 0)


def test_bits_do_not_depend_on_numba_threads():
    arrays = sample((600,), dtype=np.float32, classes=300)
    value, gradients = linear_cross_entropy.value_and_grad(**arrays)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone, alone_gradients = linear_cross_entropy.value_and_grad(**arrays)
    finally:
        numba.set_num_threads(before)
    assert alone == value
    for g, e in zip(alone_gradients, gradients, strict=True):
        np.testing.assert_array_equal(g, e)


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "inner"), SHAPES, ids=str)
def test_bad_index_is_found_first(batch, inner):
    """The message has its place, and nothing has been written."""
    arrays = sample(batch, inner)
    place = tuple(n - 1 for n in arrays["target"].shape)
    arrays["target"] = np.array(arrays["target"])
    for wrong in (7, -1):
        arrays["target"][place] = wrong
        before = {n: a.copy() for n, a in arrays.items()}
        at = rf"\[{', '.join(map(str, place))}\]" if place else ""
        message = rf"^linear_cross_entropy: target{at} is {wrong}, but linear_weight has 7 classes$"
        with pytest.raises(IndexError, match=message):
            linear_cross_entropy.grad(**arrays, out=(arrays["input"], arrays["linear_weight"]))
        for n, a in arrays.items():
            np.testing.assert_array_equal(a, before[n])


X, W, Y, Q = np.zeros((4, 5)), np.zeros((7, 5)), np.zeros(4, int), np.full((4, 7), 0.25)

ERRORS = [
    ({"input": np.zeros(())}, ValueError, r"input must have shape \(F\) or \(N, F\), got \(\)"),
    ({"input": np.zeros((2, 2, 5))}, ValueError, r"input must have shape \(F\) or \(N, F\), got \(2, 2, 5\)"),
    ({"linear_weight": np.zeros(5)}, ValueError, r"linear_weight must have shape \(C, F\) or .* got \(5,\)"),
    ({"linear_weight": np.zeros((0, 5))}, ValueError, "linear_weight must have .* C at least 1, got"),
    (
        {"linear_weight": np.zeros((7, 6))},
        ValueError,
        r"input must have shape \(6\) or \(N, 6\) with a linear_weight of \(7, 6\), got \(4, 5\)",
    ),
    (
        {"input": np.zeros(5), "linear_weight": np.zeros((7, 3, 5))},
        ValueError,
        r"input must have shape \(N, 5\) with a linear_weight of \(7, 3, 5\), got \(5,\)",
    ),
    ({"linear_bias": np.zeros(5)}, ValueError, r"linear_bias must have shape \(7,\), got \(5,\)"),
    ({"weight": np.zeros(5)}, ValueError, r"weight must have shape \(7,\), one per class, got \(5,\)"),
    ({"target": np.zeros(3, int)}, ValueError, r"target must have shape \(4,\), one class .* got \(3,\)"),
    ({"target": np.zeros((4, 1), int)}, ValueError, r"target must have shape \(4,\)"),
    ({"target": np.zeros((4, 7), int)}, TypeError, "target has the scores' shape .* floating, got int64"),
    ({"target": np.zeros(4)}, TypeError, "target must hold integers, got float64"),
    ({"target": Q, "ignore_index": -100}, ValueError, "ignore_index must not be given .* got -100"),
    ({"input": X.astype(int)}, TypeError, "input must be float64, float32, float16 or bfloat16, got int64"),
    ({"linear_weight": W.astype(int)}, TypeError, "linear_weight must be float64"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    ({"options": 1 << 20}, TypeError, "options must be None or LinearCrossEntropyOptions, got 1048576"),
    ({"sample_weight": np.ones(3)}, ValueError, r"sample_weight of shape \(3,\) does not broadcast"),
    ({"normalizer": 0.0}, ValueError, "normalizer must be > 0"),
    ({"wrt": "target"}, ValueError, "'target' only where target holds class probabilities"),
    ({"wrt": "nothing"}, ValueError, "wrt must be among 'input', 'linear_weight', 'linear_bias'"),
    ({"wrt": "linear_bias"}, ValueError, "wrt names 'linear_bias', which is not given"),
    ({"target": Q, "wrt": "weight"}, ValueError, "wrt names 'weight', which is not given"),
    ({"linear_bias": [0] * 7, "wrt": "linear_bias"}, TypeError, "linear_bias must be float64"),
    ({"grad_output": np.ones(4)}, ValueError, "grad_output must be a number"),
    ({"out": np.zeros((4, 5))}, TypeError, "out must be a tuple of 2 arrays"),
    ({"out": (np.zeros((4, 6)), W.copy())}, ValueError, r"out for input must have shape \(4, 5\)"),
    ({"out": (X.copy(), W.astype("i4"))}, TypeError, "out for linear_weight must be float64"),
    ({"out": (W[:4], W.copy())}, ValueError, "out for input overlaps linear_weight"),
    ({"out": (X[::-1], W.copy())}, ValueError, "out for input overlaps input"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy.value_and_grad(**{"input": X, "linear_weight": W, "target": Y} | arguments)


def test_options_go_by_keyword():
    with pytest.raises(TypeError, match="takes at most 3 positional arguments but 4 were given"):
        linear_cross_entropy(X, W, Y, np.zeros(7))
    assert registry["linear_cross_entropy"].Class is LinearCrossEntropyLoss


def test_signature_is_torchs(torch):
    theirs = inspect.signature(torch.nn.functional.linear_cross_entropy).parameters.values()
    ours = list(inspect.signature(linear_cross_entropy).parameters.values())[: len(theirs)]
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    theirs = inspect.signature(torch.nn.LinearCrossEntropyLoss).parameters.values()
    ours = inspect.signature(LinearCrossEntropyLoss).parameters
    assert [(p.name, p.kind, p.default) for p in theirs] == [
        (n, ours[n].kind, ours[n].default) for n in list(ours)[: len(theirs)]
    ]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"memory_budget": 0}, ValueError, "memory_budget must be > 0, got 0"),
        ({"batch_chunk_size": -3}, ValueError, "batch_chunk_size must be > 0, got -3"),
        ({"memory_budget": 1e6}, TypeError, "memory_budget must be an integer, got 1000000.0"),
        ({"memory_budget": 9, "batch_chunk_size": 9}, ValueError, "give batch_chunk_size or memory_budget"),
    ],
)
def test_options_are_checked(arguments, kind, message):
    with pytest.raises(kind, match=f"^LinearCrossEntropyOptions: {message}"):
        LinearCrossEntropyOptions(**arguments)


# ---- the class -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_features", [(), (3,), [2, 3]], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_class_is_the_function_of_its_own_arrays(bias, out_features):
    inner = tuple(out_features)
    arrays = sample((6,), inner, dtype=np.float32)
    weight = more(arrays)["weight"]
    options = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "sum"}
    criterion = LinearCrossEntropyLoss(5, 7, out_features=out_features, bias=bias, rng=1, **options)
    assert criterion.linear_weight.shape == (7, *inner, 5)
    assert (criterion.linear_bias is not None) == bias
    x, y = arrays["input"], arrays["target"]
    own = {"linear_weight": criterion.linear_weight, "linear_bias": criterion.linear_bias}
    wrt = ("input", "linear_weight", "linear_bias")[: 2 + bias]
    value, gradients = criterion.value_and_grad(x, target=y, wrt=wrt)
    expected, wanted = linear_cross_entropy.value_and_grad(x, target=y, wrt=wrt, **own, **options)
    assert value == expected == criterion(x, y) == criterion(input=x, target=y)
    for g, e in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(g, e)
    _, by_w = criterion.grad(x, y)
    np.testing.assert_array_equal(by_w, wanted[1])
    assert criterion.num_classes == 7 and criterion.label_smoothing == 0.1


def test_class_learns_in_place():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(5, 7)), axis=1)
    criterion = LinearCrossEntropyLoss(5, 7, bias=True, rng=0)
    first = criterion(x, y)
    for _ in range(200):
        by_w, by_b = criterion.grad(x, y, wrt=("linear_weight", "linear_bias"))
        criterion.linear_weight -= 2 * by_w
        criterion.linear_bias -= 2 * by_b
    assert criterion(x, y) < 0.3 * first
    criterion.linear_weight = np.zeros((7, 5), np.float32)
    criterion.linear_bias = None
    np.testing.assert_allclose(criterion(x, y), math.log(7), rtol=1e-6)
    criterion.grad(x, y, wrt="linear_weight", out=criterion.linear_weight)
    assert criterion.linear_weight.any()


def test_class_draws_as_torch_does(torch):
    theirs = torch.nn.LinearCrossEntropyLoss(400, 300, bias=True)
    ours = LinearCrossEntropyLoss(400, 300, bias=True, rng=0)
    for a, b in (
        (ours.linear_weight, theirs.linear.weight.detach().numpy()),
        (ours.linear_bias, theirs.linear.bias.detach().numpy()),
    ):
        assert a.shape == b.shape and a.dtype == b.dtype
        bound = 400**-0.5
        assert abs(a).max() <= bound and abs(a).max() > 0.97 * bound
        np.testing.assert_allclose(a.std(), b.std(), rtol=0.15)
    again = LinearCrossEntropyLoss(400, 300, bias=True, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again.linear_weight, ours.linear_weight)
    assert (LinearCrossEntropyLoss(4, 3).linear_weight != LinearCrossEntropyLoss(4, 3).linear_weight).any()


def test_class_dtype(bfloat16):
    for dtype in (np.float64, np.float16, bfloat16, "float32"):
        criterion = LinearCrossEntropyLoss(5, 7, dtype=dtype, device="cpu", bias=True)
        assert criterion.linear_weight.dtype == criterion.linear_bias.dtype == np.dtype(dtype)


def test_class_pickles_and_copies():
    options = LinearCrossEntropyOptions(batch_chunk_size=4)
    criterion = LinearCrossEntropyLoss(5, 7, bias=True, weight=np.arange(7.0), options=options)
    arrays = sample((6,), dtype=np.float32)
    value = criterion(arrays["input"], arrays["target"])
    for again in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert again(arrays["input"], arrays["target"]) == value
        again.linear_weight += 1
        assert again.options == options and repr(again) == repr(criterion)
    assert criterion(arrays["input"], arrays["target"]) == value
    assert repr(LinearCrossEntropyLoss(5, 7, out_features=(2,))) == (
        "LinearCrossEntropyLoss(in_features=5, num_classes=7, out_features=(2,), bias=False, weight=None, "
        "reduction='mean', ignore_index=None, label_smoothing=0.0, options=None, softcap=None, "
        "lse_square_scale=0.0)"
    )


@pytest.mark.more
def test_rows_of_a_class_without_weight_keep_their_squared_logsumexp():
    arrays = sample((6,), seed=3)
    arrays["target"][:3] = 2
    weight = np.linspace(0.5, 2, CLASSES)
    weight[2] = 0
    for options in (dict(lse_square_scale=0.1), dict(lse_square_scale=0.1, softcap=2.0)):
        call = {**arrays, "weight": weight, **options}
        value, gradient = registry["linear_cross_entropy"].value_and_grad(**call, wrt="input")
        loss = reference.linear_cross_entropy
        np.testing.assert_allclose(value, loss(**call), rtol=1e-12)
        np.testing.assert_allclose(gradient, reference.gradient(loss, call, "input"), rtol=1e-6, atol=1e-9)
        assert gradient[:3].all()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"device": "cuda"}, ValueError, "device must be None or 'cpu', got 'cuda'"),
        ({"dtype": int}, TypeError, "dtype must be float64, float32, float16 or bfloat16, got int64"),
        ({"in_features": 0}, ValueError, "in_features must be > 0, got 0"),
        ({"num_classes": 2.5}, TypeError, "num_classes must be an integer, got 2.5"),
        ({"out_features": (3, -1)}, ValueError, "out_features must be > 0, got -1"),
        ({"bias": "yes"}, TypeError, "bias must be True or False"),
        ({"weight": np.ones(6)}, ValueError, r"weight must have shape \(7,\), got \(6,\)"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"options": "auto"}, TypeError, "options must be None or LinearCrossEntropyOptions, got 'auto'"),
    ],
)
def test_class_errors(arguments, kind, message):
    with pytest.raises(kind, match=f"^LinearCrossEntropyLoss: {message}"):
        LinearCrossEntropyLoss(**{"in_features": 5, "num_classes": 7} | arguments)


def test_class_call_errors():
    criterion = LinearCrossEntropyLoss(5, 7)
    with pytest.raises(
        TypeError, match="^LinearCrossEntropyLoss: takes 2 arrays by position but 3 were given"
    ):
        criterion(X, W, Y)
    with pytest.raises(TypeError, match="multiple values for argument 'input'"):
        criterion(X, Y, input=X)
    with pytest.raises(TypeError, match="missing required argument: target"):
        criterion(X)
    with pytest.raises(ValueError, match="wrt names 'linear_bias', which is not given"):
        criterion.grad(X, Y, wrt="linear_bias")
    with pytest.raises(TypeError, match="unexpected keyword argument 'linear_bais'"):
        criterion(X, Y, linear_bais=None)


def test_small_calls_leave_what_is_not_plain_to_the_general_one(rng):
    x, w, y = rng.normal(size=(6, 5)), rng.normal(size=(4, 5)), np.array([0, 1, 2, 3, 0, 1])
    class_weight = np.array([1.0, 2.0, 0.5, 3.0])
    function = linear_cross_entropy.value_and_grad
    for _ in range(3):  # the second call is prepared
        value, (by_x, by_w) = function(x, w, y)
        scores = x @ w.T
        expected, slope = cross_entropy.value_and_grad(scores, y)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(by_x, slope @ w, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(by_w, slope.T @ x, rtol=1e-12, atol=1e-15)
        function(x, w, y, weight=class_weight)
    some, dirty = y.copy(), x.copy()
    some[2], dirty[2] = -100, np.nan
    _, (by_x, by_w) = function(dirty, w, some)
    assert not by_x[2].any() and np.isfinite(by_w).all()
    none = class_weight * (np.arange(4) != 3)
    dirty[2], dirty[3] = x[2], np.nan
    assert np.isfinite(function(dirty, w, y, weight=none)[0])
    with pytest.raises(IndexError, match=r"target\[4\] is 9"):
        function(x, w, np.array([0, 1, 2, 3, 9, 1]))
    with pytest.raises(ValueError, match="linear_cross_entropy"):
        function(x, w[:, :4].copy(), y)
    for _ in range(2):
        given = x.copy(), w.copy()
        function(*given, y, out=given)
        _, expected = function(x, w, y)
        for g, e in zip(given, expected, strict=True):
            np.testing.assert_array_equal(g, e)
