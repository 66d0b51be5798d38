"""Fused linear cross entropy of arrays on a device, whose PTX is executed, against the reference.

NumPy's matrix product takes the place of CuPy's; what CuPy would be given is looked at apart.
"""

import itertools
import math
import re
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from ptx import device
from ptx.device import CuPyArray, Plain, Tensor, host, put
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.kernels.cuda import arrays as device_arrays
from numbaloss.kernels.cuda import copy, faults, libraries, linear, rows
from numbaloss.kernels.spec import CODES

linear_cross_entropy = nl.linear_cross_entropy
CLASSES, FEATURES = 7, 5
CHUNKS = [None, nl.LinearCrossEntropyOptions(batch_chunk_size=3)]
SHAPES = [((), ()), ((8,), ()), ((7,), (3,)), ((4,), (2, 2))]


def sample(batch=(8,), inner=(), kind="indices", dtype=np.float32, classes=CLASSES):
    rng = np.random.default_rng(0)
    target = rng.integers(0, classes, batch + inner)
    if kind != "indices":
        target = rng.random((*batch, classes, *inner)).astype(dtype)
        target.reshape(-1)[::4] = 0
    return {
        "input": rng.normal(size=(*batch, FEATURES)).astype(dtype),
        "linear_weight": rng.normal(size=(classes, *inner, FEATURES)).astype(dtype),
        "target": target,
        "linear_bias": rng.normal(size=(classes, *inner)).astype(dtype),
        "weight": rng.uniform(0.2, 2, classes).astype(dtype),
    }


def ignoring(target, index=-100):
    """The target with some terms ignored: of a row all, some or none."""
    target = np.array(target)
    if target.ndim:
        target.reshape(-1)[::3] = index
        target[0] = index
    return target


def names(arrays, kind):
    """All that can be differentiated."""
    able = ("linear_bias", "input", "linear_weight", *(("weight", "target") * (kind != "indices")))
    return tuple(n for n in able if n in arrays)


def moved(arrays, kind=CuPyArray):
    """A call's arrays on the device; numbers and options as they are."""
    return {n: put(kind, a) if isinstance(a, np.ndarray) else a for n, a in arrays.items()}


def expected(call, wrt):
    """The reference's value and gradients, in float64."""
    wide = {
        n: a.astype(np.float64) if isinstance(a, np.ndarray) and a.dtype.kind not in "iu" else a
        for n, a in call.items()
    }
    up, loss = wide.pop("grad_output", None), reference.linear_cross_entropy
    with np.errstate(all="ignore"):
        return loss(**wide), [reference.gradient(loss, wide, n, up) for n in wrt]


def close(got, wanted, dtype=np.float32):
    """Apart by rounding: a few units of the largest of the terms added up; of a half, the result's own.

    The reference's differences are good to about nine digits.
    """
    assert got.dtype == dtype and got.shape == np.shape(wanted)
    roundings = {8: 0, 4: 40, 2: 1}[np.dtype(dtype).itemsize]
    rtol = roundings * float(testing.finfo(dtype).eps) + 1e-8
    size = max(1.0, float(np.nanmax(np.abs(wanted), initial=0, where=np.isfinite(wanted))))
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=rtol, atol=min(rtol, 2e-5) * size)


def check(call, wrt, kind=CuPyArray, dtype=np.float32, alone=False):
    """Value and gradients together; if asked for, value and a gradient `alone` too, which have their bits."""
    value, gradients = expected(call, wrt)
    given = moved(call, kind)
    got, made = linear_cross_entropy.value_and_grad(**given, wrt=wrt)
    assert type(got) is kind
    close(host(got), value, dtype)
    for n, g, e in zip(wrt, made, gradients, strict=True):
        assert type(g) is kind
        close(host(g), e, call[n].dtype)
    if alone:
        np.testing.assert_array_equal(host(linear_cross_entropy(**given)), host(got))
        by_first = linear_cross_entropy.grad(**given, wrt=wrt[0])
        np.testing.assert_array_equal(host(by_first), host(made[0]))
    return made


# ---- options ---------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reductions_and_arguments(gpu, shape, kind):
    batch, inner = shape
    arrays = sample(batch, inner, kind)
    if kind == "indices":
        arrays["target"] = ignoring(arrays["target"])
    calls = [
        ({"linear_bias", "weight"}, dict(reduction="mean", options=CHUNKS[1])),
        ({"linear_bias"}, dict(reduction="sum", label_smoothing=0.1)),
        (set(), dict(reduction="none", options=CHUNKS[1])),
        ({"weight"}, dict(reduction="none", label_smoothing=1)),
    ]
    for given, options in calls:
        call = {n: a for n, a in arrays.items() if n not in ("linear_bias", "weight") or n in given}
        check({**call, **options}, names(call, kind), alone=options["reduction"] != "sum")
    nl.synchronize()
    assert set(gpu.used) == {7}


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_terms_and_upstream(gpu, shape, kind):
    batch, inner = shape
    arrays, rng = sample(batch, inner, kind), np.random.default_rng(3)
    if kind == "indices":
        arrays |= dict(target=ignoring(arrays["target"], 2), ignore_index=2)
    shape = batch + inner
    weights = np.asarray(rng.integers(0 if shape else 1, 3, shape).astype("f4"))
    up = np.asarray(rng.normal(size=shape).astype("f4"))
    for options in (
        dict(sample_weight=weights, grad_output=-2.0),
        dict(sample_weight=weights, normalizer=9.5, grad_output=np.array(3, "f4"), label_smoothing=0.2),
        dict(sample_weight=weights, reduction="none", grad_output=up, options=CHUNKS[1]),
        dict(sample_weight=2, reduction="sum", grad_output=np.array(0.5, "f4")),
    ):
        call = {**arrays, **options}
        wrt = names(arrays, kind)
        value, gradients = expected(call, wrt)
        got, made = linear_cross_entropy.value_and_grad(**moved(call), wrt=wrt)
        close(host(got), value)
        for g, e in zip(made, gradients, strict=True):
            close(host(g), e)


@pytest.mark.parametrize("axes", [(3,), (7, 1)], ids=str)
@pytest.mark.more
def test_sample_weights_that_broadcast(gpu, axes):
    arrays = sample((7,), (3,))
    weights = np.arange(math.prod(axes), dtype="f4").reshape(axes)
    check({**arrays, "sample_weight": weights, "options": CHUNKS[1]}, ("input", "linear_weight"))


@pytest.mark.more
def test_memory_budget_and_modes(gpu):
    arrays = sample((20,))
    budget = nl.LinearCrossEntropyOptions(memory_budget=4 * CLASSES * 6)
    before = sum(name.startswith("one_pass") for name in gpu.launched)
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(**moved(arrays), options=budget)
    assert sum(name.startswith("one_pass") for name in gpu.launched) - before == 4
    wanted, gradients = expected(arrays, ("input", "linear_weight"))
    for got, e in zip((value, by_x, by_w), (wanted, *gradients), strict=True):
        close(host(got), e)
    (alone,) = linear_cross_entropy.grad(**moved(arrays), wrt=("input",), options=budget)
    np.testing.assert_array_equal(host(alone), host(by_x))
    with pytest.raises(ValueError, match="^linear_cross_entropy: has no value_grad_hess$"):
        linear_cross_entropy.value_grad_hess(**moved(arrays))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("classes", [1, 8, 400])
def test_numbers_of_classes(gpu, classes, kind):
    """One; and rows of whole vectors, held by a part of a warp and by a block."""
    arrays = sample((5,), (), kind, classes=classes)
    check({**arrays, "options": CHUNKS[1]}, ("input", *names(arrays, kind)[3:]))


@pytest.mark.sweep
def test_rows_that_blocks_share(gpu, monkeypatch):
    for name, small in (("MOST_HOLDING", 0), ("PART", 100)):
        monkeypatch.setattr(rows, name, small)
    check(sample((2,), classes=400), ("input",))
    assert {"part", "rest"} <= {name.partition("_")[0] for name in gpu.launched}


@pytest.mark.parametrize("kind", [CuPyArray, Tensor, Plain])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.thin(3)
def test_libraries(gpu, kind, reduction):
    check({**sample((5,), (2,)), "reduction": reduction}, ("input", "linear_weight"), kind)
    assert set(gpu.used) == {0 if kind is Plain else 7}


def test_class(gpu):
    arrays = sample()
    y, x = arrays.pop("target"), arrays.pop("input")
    weight = put(CuPyArray, arrays.pop("weight"))
    criterion = nl.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, weight=weight, options=CHUNKS[1])
    with pytest.raises(TypeError, match="linear_cross_entropy: all arrays must be on one device"):
        criterion(put(CuPyArray, x), put(CuPyArray, y))
    criterion.linear_weight, criterion.linear_bias = moved(arrays).values()
    wrt = ("linear_weight", "linear_bias", "input")
    value, gradients = criterion.value_and_grad(put(CuPyArray, x), put(CuPyArray, y), wrt=wrt)
    wanted, slopes = expected({**arrays, "input": x, "target": y, "weight": host(weight)}, wrt)
    close(host(value), wanted)
    for g, e in zip(gradients, slopes, strict=True):
        close(host(g), e)


# ---- dtypes and layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sweep(["indices", "probabilities"], "indices"))
@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16", "float64"], "bfloat16"))
def test_dtypes(gpu, dtype, kind, bfloat16):
    dtype = bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    for inner, reduction in (((), "mean"), ((2,), "none")):
        arrays = sample((6,), inner, kind, dtype)
        check({**arrays, "reduction": reduction, "options": CHUNKS[1]}, names(arrays, kind), Tensor, dtype)


@pytest.mark.sweep
def test_dtypes_promote(gpu):
    arrays = sample()
    for n, common in (("linear_weight", "f8"), ("linear_bias", "f8"), ("weight", "f2"), ("input", "f2")):
        call = {**arrays, n: arrays[n].astype(common)}
        made = check(call, ("input", "linear_weight"), dtype=np.dtype(max(common, "f4")))
        assert [host(g).dtype for g in made] == [call[k].dtype for k in ("input", "linear_weight")]
    integers = dict(linear_bias=np.arange(CLASSES), weight=np.arange(CLASSES, dtype="u1"))
    check({**arrays, **integers}, ("input", "linear_weight"))


@pytest.mark.parametrize("dtype", sweep(["i1", "u1", "i2", "i4", "u4", "u8"], "u1"))
def test_index_dtypes(gpu, dtype):
    arrays = sample()
    check({**arrays, "target": arrays["target"].astype(dtype)}, ("input",))
    nl.synchronize()


LAYOUTS = {
    "F": np.asfortranarray,
    "reversed": lambda a: a[(slice(None, None, -1),) * a.ndim],
    "skipping": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape) if a.ndim else a,
    "unaligned": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "inner", "kind"), [((6,), (), "indices"), ((4,), (2,), "probabilities")])
def test_layouts(gpu, batch, inner, kind, layout):
    arrays = {n: LAYOUTS[layout](a) for n, a in sample(batch, inner, kind).items()}
    wrt = names(arrays, kind)
    before = moved(arrays)
    check({**arrays, "options": CHUNKS[1]}, wrt)
    if layout != "broadcast":
        _, gradients = expected(arrays, wrt)
        out = tuple(put(CuPyArray, LAYOUTS[layout](np.zeros_like(arrays[n]))) for n in wrt)
        made = linear_cross_entropy.grad(**before, wrt=wrt, out=out, options=CHUNKS[1])
        for g, o, e in zip(made, out, gradients, strict=True):
            assert g is o
            close(host(o), e)
    for n, a in before.items():
        np.testing.assert_array_equal(host(a), arrays[n])


def test_transposed_weight_and_gradient_are_not_copied(gpu, monkeypatch):
    """A layer's kernel (F, C), as Keras has it."""
    arrays = sample()
    arrays["linear_weight"] = np.asfortranarray(arrays["linear_weight"])
    given, seen = moved(arrays), set()

    def looking(a, b, out, more):
        seen.update(x.address for x in (a, b, out))
        device.multiply(a, b, out, more)

    monkeypatch.setattr(linear, "multiply", looking)
    by_w = linear_cross_entropy.grad(**given, wrt="linear_weight")
    assert by_w.view.flags.f_contiguous and {given["linear_weight"].address, by_w.address} <= seen


@pytest.mark.parametrize("chunking", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", sweep(["indices", "probabilities"], "indices"))
@pytest.mark.parametrize("inner", [(), (2,)], ids=str)
@pytest.mark.thin(4)
def test_in_place(gpu, inner, kind, chunking):
    """Each gradient over its own argument, and all of them at once."""
    arrays = sample((7,), inner, kind)
    wrt = names(arrays, kind)
    options = dict(options=chunking, label_smoothing=0.1)
    value, wanted = linear_cross_entropy.value_and_grad(**moved(arrays), wrt=wrt, **options)
    for chosen in (*((n,) for n in wrt), wrt):
        call = moved(arrays)
        out = tuple(call[n] for n in chosen)
        got, made = linear_cross_entropy.value_and_grad(**call, wrt=chosen, out=out, **options)
        assert host(got) == host(value)
        for n, g in zip(chosen, made, strict=True):
            assert g is call[n]
            np.testing.assert_array_equal(host(g), host(wanted[wrt.index(n)]), err_msg=n)
        for n in arrays.keys() - set(chosen):
            np.testing.assert_array_equal(host(call[n]), arrays[n])


def test_in_place_of_halves(gpu):
    arrays = sample(dtype=np.float16)
    wrt = ("input", "linear_weight")
    wanted = linear_cross_entropy.grad(**moved(arrays), wrt=wrt, options=CHUNKS[1])
    call = moved(arrays)
    linear_cross_entropy.grad(**call, wrt=wrt, out=tuple(call[n] for n in wrt), options=CHUNKS[1])
    for n, g in zip(wrt, wanted, strict=True):
        np.testing.assert_array_equal(host(call[n]), host(g))


# ---- what counts nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sweep(["indices", "probabilities"], "indices"))
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_terms_of_zero_weight_are_zero(gpu, inner, kind):
    """Whatever their rows of the input hold, and the weights of their position."""
    arrays = sample((7,), inner, kind)
    weight = np.ones((7, *inner), "f4")
    weight[::2] = 0
    if inner:
        weight[1, 0] = weight[:, 2] = 0
    wrt = names(arrays, kind)
    options = dict(wrt=wrt, label_smoothing=0.1, options=CHUNKS[1])
    given = moved({**arrays, "sample_weight": weight})
    value, wanted = linear_cross_entropy.value_and_grad(**given, **options)
    close(host(value), expected({**arrays, "sample_weight": weight, "label_smoothing": 0.1}, ())[0])
    assert not host(wanted[wrt.index("input")])[::2].any()
    for junk in (np.nan, np.inf):
        x, w = arrays["input"].copy(), arrays["linear_weight"].copy()
        x[::2] = junk
        if inner:
            w[:, 2] = junk
        given |= moved({"input": x, "linear_weight": w})
        got, made = linear_cross_entropy.value_and_grad(**given, **options)
        assert host(got) == host(value)
        for n, g, e in zip(wrt, made, wanted, strict=True):
            np.testing.assert_array_equal(host(g), host(e), err_msg=n)
    terms = host(linear_cross_entropy(**given, reduction="none"))
    assert np.isfinite(terms).all() and not terms[weight == 0].any()


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_ignored_terms_are_not_read(gpu, inner, junk):
    """Nor are those of a class without weight; a row that is dead at one position stays out of that one."""
    arrays = sample((8,), inner)
    arrays["target"] = ignoring(arrays["target"])
    arrays["weight"][3] = 0
    dead = (arrays["target"] == -100) | (arrays["target"] == 3)
    wrt = names(arrays, "indices")
    value, wanted = linear_cross_entropy.value_and_grad(**moved(arrays), wrt=wrt, options=CHUNKS[1])
    spoiled = {**arrays, "input": arrays["input"].copy()}
    spoiled["input"][dead.reshape(8, -1).all(axis=1)] = junk
    got, made = linear_cross_entropy.value_and_grad(**moved(spoiled), wrt=wrt, options=CHUNKS[1])
    assert host(got) == host(value)
    for g, e in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(host(g), host(e))
    if inner:
        row = int(np.flatnonzero(dead.any(axis=1) & ~dead.all(axis=1))[0])
        spoiled["input"][row] = junk
        by_w = host(linear_cross_entropy.grad(**moved(spoiled), wrt="linear_weight"))
        assert np.isnan(by_w[:, ~dead[row]]).all() and np.isfinite(by_w[:, dead[row]]).all()


def test_weights_that_are_not_finite(gpu):
    """What no term needs of them is not multiplied by zero; what a term needs is NaN on the CPU too."""
    arrays = sample()
    arrays["target"] = np.full(8, -100)
    arrays["linear_weight"][2] = np.inf
    gradients = linear_cross_entropy.grad(**moved(arrays), reduction="sum")
    assert not any(host(g).any() for g in gradients)
    arrays["target"][3] = 1
    by_x, _ = linear_cross_entropy.grad(**moved(arrays), reduction="sum")
    assert np.isnan(host(by_x)[3]).all() and not np.delete(host(by_x), 3, axis=0).any()


def test_bias_of_minus_infinity_masks_a_class(gpu):
    arrays = sample()
    arrays["target"] = np.minimum(arrays["target"], 5)
    arrays["linear_bias"] = np.where(np.arange(CLASSES) == 6, -np.inf, arrays["linear_bias"]).astype("f4")
    made = check({**arrays, "options": CHUNKS[1]}, ("linear_weight", "input"))
    assert not host(made[0])[6].any()


@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_all_ignored(gpu, inner):
    arrays = sample((4,), inner)
    arrays["target"][...] = -100
    arrays["input"][...] = np.nan
    given = moved(arrays)
    value, gradients = linear_cross_entropy.value_and_grad(**given, wrt=names(arrays, "indices"))
    assert math.isnan(host(value)) and not any(host(g).any() for g in gradients)
    assert host(linear_cross_entropy(**given, reduction="sum")) == 0
    assert host(linear_cross_entropy(**given, normalizer=3.0)) == 0
    assert not host(linear_cross_entropy(**given, reduction="none")).any()


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("batch", "inner"), [((0,), ()), ((0,), (3,)), ((4,), (2, 0))], ids=str)
def test_empty(gpu, monkeypatch, batch, inner, kind):
    """Without CuPy too."""
    monkeypatch.setattr(linear, "multiply", None)
    arrays = sample(batch, inner, kind)
    wrt = names(arrays, kind)
    value, gradients = linear_cross_entropy.value_and_grad(**moved(arrays), wrt=wrt)
    assert math.isnan(host(value)) and value.dtype == np.float32
    for n, g in zip(wrt, gradients, strict=True):
        assert g.shape == arrays[n].shape and not host(g).any()
    assert host(linear_cross_entropy(**moved(arrays), reduction="sum")) == 0
    assert linear_cross_entropy(**moved(arrays), reduction="none").shape == batch + inner


def test_no_features(gpu):
    """Then all classes are as likely."""
    x, w, y = np.zeros((6, 0), "f4"), np.zeros((7, 0), "f4"), np.arange(6)
    given = [put(CuPyArray, a) for a in (x, w, y)]
    value, (by_x, by_w) = linear_cross_entropy.value_and_grad(*given, options=CHUNKS[1])
    close(host(value), math.log(7))
    assert by_x.shape == (6, 0) and by_w.shape == (7, 0)


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "inner", "wrong"), [*((*s, 7) for s in SHAPES), ((8,), (), -1), ((8,), (), 2**40)], ids=str
)
def test_bad_index(gpu, batch, inner, wrong):
    """The last one; and with it the first."""
    arrays = sample(batch, inner)
    arrays["target"] = np.array(arrays["target"])
    shape = arrays["target"].shape
    last, first = tuple(n - 1 for n in shape), (0,) * len(shape)
    said = "1048575 or above" if wrong == 2**40 else str(wrong)
    for place in (last, first):
        arrays["target"][place] = wrong
        options = dict(options=CHUNKS[1], reduction="none")
        terms, (by_x, by_w) = linear_cross_entropy.value_and_grad(**moved(arrays), **options)
        bad = arrays["target"] == wrong
        rows = bad.reshape(*batch, -1).any(axis=-1)
        np.testing.assert_array_equal(np.isnan(host(terms)), bad)
        np.testing.assert_array_equal(np.isnan(host(by_x)).all(axis=-1), rows)
        np.testing.assert_array_equal(np.isnan(host(by_x)).any(axis=-1), rows)
        assert np.isnan(host(by_w)[:, *place[len(batch) :]]).all()
        at = f"[{', '.join(map(str, place))}]" if place else ""
        message = f"linear_cross_entropy: target{at} is {said}, but linear_weight has 7 classes"
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            nl.synchronize()
        nl.synchronize()


def test_bad_indices_of_two_positions(gpu):
    """The first in the target is not the first that is computed."""
    arrays = sample((7,), (3,))
    arrays["target"][1, 0] = arrays["target"][0, 2] = 70
    linear_cross_entropy(**moved(arrays))
    with pytest.raises(IndexError, match=r"target\[0, 2\] is 70, but"):
        nl.synchronize()


def test_rows_beside_a_bad_index(gpu):
    """The mean is NaN; as far as the gradient's other rows go, it is of those that count."""
    arrays = sample()
    arrays["target"][5] = 9
    value, by_x = map(host, linear_cross_entropy.value_and_grad(**moved(arrays), wrt="input"))
    assert np.isnan(value)
    others = np.arange(8) != 5
    close(
        by_x[others],
        expected({**arrays, "target": np.where(others, arrays["target"], -100)}, ("input",))[1][0][others],
    )
    with pytest.raises(IndexError, match=r"target\[5\] is 9"):
        nl.synchronize()


@pytest.mark.parametrize("bits", [-100, -1])
def test_uint64_that_no_int64_holds(gpu, bits):
    """Neither ignored nor negative, though it has the bits of what is."""
    arrays = sample()
    arrays["target"] = arrays["target"].astype("u8")
    arrays["target"][3] = 2**64 + bits
    assert np.isnan(host(linear_cross_entropy(**moved(arrays))))
    with pytest.raises(IndexError, match=r"target\[3\] is 1048575 or above, but linear_weight has 7"):
        nl.synchronize()


def test_bad_index_of_zero_weight(gpu):
    arrays = {**sample(), "sample_weight": np.zeros(8, "f4")}
    arrays["target"][2] = -7
    linear_cross_entropy(**moved(arrays))
    with pytest.raises(IndexError, match=r"target\[2\] is -7"):
        nl.synchronize()


def test_at_once_if_asked(gpu, monkeypatch):
    """As on the CPU, before anything is written."""
    monkeypatch.setattr(faults, "SYNCHRONOUS", True)
    arrays = sample()
    arrays["target"][7] = 8
    given = moved(arrays)
    with pytest.raises(IndexError, match=r"target\[7\] is 8, but linear_weight has 7 classes"):
        linear_cross_entropy.grad(**given, out=(given["input"], given["linear_weight"]))
    for n, a in given.items():
        np.testing.assert_array_equal(host(a), arrays[n])


X, W, Y = np.zeros((4, 5), "f4"), np.zeros((7, 5), "f4"), np.zeros(4, int)
ERRORS = [
    (dict(input=np.zeros((4, 6), "f4")), ValueError, r"input must have shape \(5\) or \(N, 5\) with"),
    (dict(linear_weight=np.zeros(5, "f4")), ValueError, "linear_weight must have shape"),
    (dict(linear_bias=np.zeros(5, "f4")), ValueError, r"linear_bias must have shape \(7,\), got \(5,\)"),
    (dict(weight=np.zeros(5, "f4")), ValueError, r"weight must have shape \(7,\), one per class, got"),
    (dict(target=np.zeros(3, int)), ValueError, r"target must have shape \(4,\), one class"),
    (dict(target=np.zeros((4, 7), int)), TypeError, "target has the scores' shape .* floating, got int64"),
    (dict(target=np.zeros(4, "f4")), TypeError, "target must hold integers, got float32"),
    (dict(input=np.zeros((4, 5), int)), TypeError, "input must be float64, float32, .* got int64"),
    (dict(sample_weight=np.zeros(3, "f4")), ValueError, r"sample_weight of shape \(3,\) does not broadcast"),
    (dict(grad_output=np.zeros(4, "f4")), ValueError, "grad_output must be a number with reduction='mean'"),
    (dict(out=np.zeros((4, 5), "f4")), TypeError, "out must be a tuple of 2 arrays"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS)
def test_errors(gpu, wrong, kind, message):
    call = {"input": X, "linear_weight": W, "target": Y, **wrong}
    with pytest.raises(kind, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy.grad(**moved(call))
    assert not gpu.launched


def test_out_that_is_wrong(gpu):
    given = moved({"input": X, "linear_weight": W, "target": Y})
    for out, kind, message in (
        (given["linear_weight"][:4], ValueError, "out for input overlaps linear_weight"),
        (CuPyArray(given["input"].view[::-1], 0), ValueError, "out for input overlaps input"),
        (put(CuPyArray, np.zeros((5, 4), "f4")), ValueError, r"out for input must have shape \(4, 5\)"),
        (
            put(CuPyArray, np.zeros((4, 5))),
            TypeError,
            "out for input must be float32 or a narrower float, got float64",
        ),
        (put(CuPyArray, np.broadcast_to(X[:1], (4, 5))), ValueError, "elements that share memory"),
        (np.zeros((4, 5), "f4"), TypeError, "all arrays must be on one device"),
    ):
        with pytest.raises(kind, match=f"^linear_cross_entropy: .*{message}"):
            linear_cross_entropy.grad(**given, wrt="input", out=out)
    with pytest.raises(TypeError, match="all arrays must be on one device"):
        linear_cross_entropy(given["input"], W, given["target"])
    with pytest.raises(TypeError, match="and target on CUDA device 1"):
        linear_cross_entropy(given["input"], given["linear_weight"], put(CuPyArray, Y, 1))
    assert not gpu.launched


# ---- memory and the host ---------------------------------------------------------------------------


class Room:
    """An array of addresses without memory."""

    __module__ = "cupy"
    taken = most = 0
    end = 1 << 20

    def __init__(self, shape, dtype):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.strides, self.size = None, math.prod(self.shape)
        self.data = SimpleNamespace(ptr=Room.end, device_id=0)
        size = self.size * self.dtype.itemsize
        Room.end += -(-size // 512) * 512
        self.count(size)
        weakref.finalize(self, self.count, -size)

    @staticmethod
    def count(size):
        Room.taken += size
        Room.most = max(Room.most, Room.taken)


@pytest.fixture
def peak(gpu, monkeypatch):
    """Bytes that a call takes beyond its arguments and gradients; nothing is computed."""
    for n in ("launch", "fill"):
        monkeypatch.setattr(gpu, n, lambda *_: None)
    monkeypatch.setattr(linear, "multiply", lambda *_: None)
    monkeypatch.setattr(sys.modules["cupy"], "empty", Room)

    def measured(wrt, **call):
        out = tuple(Room(call[n].shape, call[n].dtype) for n in wrt)
        before = Room.most = Room.taken
        linear_cross_entropy.value_and_grad(**call, wrt=wrt, out=out)
        return Room.most - before

    return measured


@pytest.mark.parametrize("wrt", [("input", "linear_weight"), ("linear_bias", "input", "linear_weight")])
def test_a_tenth_of_the_scores_by_default(peak, wrt):
    batch, classes, features = 2048, 32000, 512
    shapes = dict(input=(batch, features), linear_weight=(classes, features), linear_bias=(classes,))
    call = {n: Room(shape, "f4") for n, shape in shapes.items()}
    scores = batch * classes * 4
    assert scores / 20 < peak(wrt, **call, target=Room((batch,), "i8")) < scores / 10


@pytest.mark.parametrize("budget", [1_000_000, 5_000_000])
@pytest.mark.parametrize("inner", [(), (4,)], ids=str)
@pytest.mark.parametrize("kind", sweep(["indices", "probabilities"], "indices"))
def test_budget(peak, kind, inner, budget):
    batch, classes, features = 400, 4000, 8
    shapes = dict(input=(batch, features), linear_weight=(classes, *inner, features), weight=(classes,))
    call = {n: Room(shape, "f4") for n, shape in shapes.items()}
    call["target"] = Room((batch, *inner), "i8")
    if kind != "indices":
        call["target"] = Room((batch, classes, *inner), "f4")
    options = nl.LinearCrossEntropyOptions(memory_budget=budget)
    # On top come what goes with terms, rows and classes, and of several positions one's weight and gradient.
    slack = 4 * (8 * batch * 4 + 3 * batch * features + 8 * classes + 2 * classes * features)
    assert budget / 2 < peak(names(call, kind), **call, options=options) < budget + slack


def test_the_host_waits_for_nothing(gpu, monkeypatch):
    """Nor does it read: the emulated memory would end the process."""
    arrays = sample((8,), (2,))
    given = moved(arrays)
    monkeypatch.setattr(gpu, "read", None)
    monkeypatch.setattr(gpu, "store", None)  # which may wait, from memory that is not pinned
    linear_cross_entropy.value_and_grad(**given, wrt=names(arrays, "indices"), options=CHUNKS[1])


def test_what_cupy_is_given(monkeypatch):
    """Arrays over the caller's memory, on the call's stream; nothing of CuPy's that needs a device."""
    cupy = pytest.importorskip("cupy")
    made, streams = [], []

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            streams.append(self.stream)

        def __exit__(self, *_):
            streams.append(None)

    def gemm(transa, transb, a, b, out=None, alpha=1.0, beta=0.0):
        assert (transa, transb, alpha) == ("N", "N", 1.0) and streams[-1] == 9
        made.append((a, b, out, beta))

    cublas = SimpleNamespace(gemm=gemm)  # which, without a device, may not be there to import
    monkeypatch.setitem(sys.modules, "cupy.cublas", cublas)
    monkeypatch.setattr(cupy, "cublas", cublas, raising=False)
    if hasattr(cupy.cuda.Stream, "from_external"):
        ways = SimpleNamespace(from_external=lambda external: Stream(external.__cuda_stream__()[1]))
        monkeypatch.setattr(cupy.cuda, "Stream", ways)
    monkeypatch.setattr(cupy.cuda, "ExternalStream", Stream)
    queue = device_arrays.Queue(0, 9, libraries.library(""))
    location = libraries.Location(4096, np.dtype("f4"), (6, 4), None, True, 0, None)
    owner = object()
    a = device_arrays.DeviceArray(location, owner, queue.library, queue)
    b = device_arrays.DeviceArray(location._replace(address=8192, shape=(3, 4)), owner, queue.library, queue)
    out = device_arrays.DeviceArray(
        location._replace(address=12288, shape=(6, 3)), owner, queue.library, queue
    )
    linear.multiply(a, b.transpose(1, 0), out, False)
    linear.multiply(a[2:5].transpose(1, 0), out[2:5], b.transpose(1, 0), True)
    assert streams == [9, None] * 2
    (x, y, z, beta), (x2, y2, z2, beta2) = made
    assert all(type(m) is cupy.ndarray for m in (x, y, z, x2, y2, z2)) and (beta, beta2) == (0.0, 1.0)
    for got, address, shape, strides in (
        (x, 4096, (6, 4), (16, 4)),
        (y, 8192, (4, 3), (4, 16)),
        (z, 12288, (6, 3), (12, 4)),
        (x2, 4096 + 32, (4, 3), (4, 16)),
        (y2, 12288 + 24, (3, 3), (12, 4)),
        (z2, 8192, (4, 3), (4, 16)),
    ):
        assert (got.data.ptr, got.shape, got.strides, got.dtype) == (address, shape, strides, np.float32)
        assert got.flags.c_contiguous != got.flags.f_contiguous and got.data.device_id == 0
        assert got.data.mem.ptr == address and got.data.mem.size == 4 * got.size


def test_without_cupy(gpu, monkeypatch):
    monkeypatch.undo()
    driver = device.install(monkeypatch, product=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    arrays = sample()
    given = moved(arrays, Tensor)
    with pytest.raises(
        TypeError, match="linear_cross_entropy: .*need CuPy and cuBLAS: pip install 'cupy-cuda12x"
    ):
        linear_cross_entropy.grad(**given, out=(given["input"], given["linear_weight"]))
    assert driver.launched
    for n, a in given.items():
        np.testing.assert_array_equal(host(a), arrays[n])


# ---- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
@pytest.mark.more
def test_kernels_compile(cc):
    code, f4, f8 = CODES["float32"], np.dtype("f4"), np.dtype("f8")
    made = [
        copy.compile_copy(np.dtype("f2"), f4, 2, False, cc, shares=code),
        copy.compile_copy(f4, f4, 1, True, cc, shares=code),
        copy.compile_copy(f8, f4, 2, False, cc, shares=CODES["float64"]),
        copy.compile_copy(np.dtype("u8"), copy.LABELS, 1, False, cc),
    ]
    for own_only, weighted, sampled in itertools.product((True, False), repeat=3):
        made.append(linear.compile_settle(code, cc, own_only, weighted, sampled))
    made.append(linear.compile_settle(CODES["float64"], cc, True, True, True))
    for k, binary in enumerate(made):
        assert binary.image[:4] == b"\x7fELF" and binary.local_bytes == 0 and binary.registers <= 64
        assert (".f64" in binary.ptx) == (k in (2, len(made) - 1))
