"""Calls on a device that are repeated as they were recorded: the same bits, and no array kept alive."""

import gc
import weakref

import numpy as np
import pytest
from ptx import device
from ptx.device import CuPyArray, Plain, Tensor, host, put
from sweeps import sweep

import numbaloss as nl
from numbaloss.kernels.cuda import backend
from numbaloss.kernels.spec import Memo

N, C = 6, 8


def scores(rng, shape=(N, C), dtype="f4"):
    return rng.normal(size=shape).astype(dtype)


def labels(rng):
    return rng.integers(0, C, N)


def rows(rng):
    return rng.uniform(0.5, 2, N).astype("f4")


def positive(rng, shape=(N, C)):
    return rng.uniform(0.1, 0.9, shape).astype("f4")


def pair(rng):
    return dict(input=scores(rng), target=scores(rng))


def labelled(rng):
    return dict(input=scores(rng), target=labels(rng))


def triplet(rng):
    return {n: scores(rng) for n in ("anchor", "positive", "negative")}


def sliced(a):
    wide = np.zeros((a.shape[0], 2 * a.shape[1]), a.dtype)
    wide[:, ::2] = a
    return wide[:, ::2]


# A loss, what makes a call's arrays, and its options.
CALLS = {
    "plain": (nl.mse_loss, pair, {}),
    "sum": (nl.mse_loss, pair, dict(reduction="sum", grad_output=0.5)),
    "weight": (nl.mse_loss, lambda g: {**pair(g), "weight": positive(g)}, {}),
    "sample_weight": (nl.huber_loss, lambda g: {**pair(g), "sample_weight": positive(g)}, dict(delta=0.7)),
    "none": (nl.mse_loss, lambda g: {**pair(g), "grad_output": scores(g)}, dict(reduction="none")),
    "upstream": (
        nl.mse_loss,
        lambda g: {**pair(g), "grad_output": scores(g, ())},
        dict(wrt=("target", "input")),
    ),
    "pos_weight": (
        nl.binary_cross_entropy_with_logits,
        lambda g: dict(input=scores(g), target=positive(g), pos_weight=positive(g, C)),
        {},
    ),
    "half": (nl.mse_loss, lambda g: dict(input=scores(g, dtype="f2"), target=scores(g, dtype="f2")), {}),
    "mixed": (nl.mse_loss, lambda g: dict(input=scores(g, dtype="f2"), target=scores(g)), {}),
    "fortran": (nl.mse_loss, lambda g: {n: np.asfortranarray(a) for n, a in pair(g).items()}, {}),
    "sliced": (nl.mse_loss, lambda g: {**pair(g), "input": sliced(scores(g))}, {}),
    "reversed": (nl.mse_loss, lambda g: {**pair(g), "input": scores(g)[::-1]}, {}),
    "labels": (nl.cross_entropy, labelled, {}),
    "smoothed": (nl.cross_entropy, labelled, dict(label_smoothing=0.1, reduction="none")),
    "class_weights": (nl.cross_entropy, lambda g: {**labelled(g), "weight": positive(g, C)}, {}),
    "rows": (
        nl.cross_entropy,
        lambda g: {**labelled(g), "sample_weight": rows(g), "grad_output": rows(g)},
        dict(reduction="none"),
    ),
    "probabilities": (nl.cross_entropy, lambda g: dict(input=scores(g), target=positive(g)), {}),
    "by_class_weights": (
        nl.cross_entropy,
        lambda g: dict(input=scores(g), target=positive(g), weight=positive(g, C)),
        dict(wrt=("input", "weight")),
    ),
    "float64": (nl.cross_entropy, lambda g: dict(input=scores(g, dtype="f8"), target=labels(g)), {}),
    "columns": (
        nl.cross_entropy,
        lambda g: dict(input=scores(g, (N, C, 4)), target=g.integers(0, C, (N, 4))),
        {},
    ),
    "nll": (nl.nll_loss, lambda g: {**labelled(g), "weight": positive(g, C)}, {}),
    "margins": (nl.multi_margin_loss, labelled, dict(p=2)),
    "soft_margins": (
        nl.multilabel_soft_margin_loss,
        lambda g: dict(input=scores(g), target=positive(g)),
        dict(reduction="none"),
    ),
    "triplet": (nl.triplet_margin_loss, triplet, dict(margin=2.0, swap=True)),
    "contrastive": (
        nl.contrastive_loss,
        lambda g: dict(input1=scores(g), input2=scores(g), target=g.integers(0, 2, N).astype("f4")),
        {},
    ),
}


def evaluated(loss, mode, arrays, options, kind=CuPyArray):
    found = getattr(loss, mode)(**{n: put(kind, a) for n, a in arrays.items()}, **options)
    flat = []
    for x in found if isinstance(found, tuple) else (found,):
        flat += x if isinstance(x, tuple) else (x,)
    assert all(type(x) is kind for x in flat)
    return [host(x) for x in flat]


def forgotten():
    for loss in device.losses():
        loss._bindings.clear()


@pytest.fixture
def worked_out(monkeypatch):
    """The number of calls that were worked out."""
    calls = []
    describe = backend.describe
    monkeypatch.setattr(backend, "describe", lambda *a: calls.append(a[0]) or describe(*a))
    return calls


@pytest.mark.parametrize("name", sweep(CALLS, "plain", "labels"))
@pytest.mark.thin(2)
def test_repeated_calls_give_the_same_bits(gpu, worked_out, name):
    loss, make, options = CALLS[name]
    kind = Tensor if name in ("plain", "labels", "fortran") else CuPyArray
    for mode in ("value_and_grad", "grad", "__call__"):
        given = {k: v for k, v in options.items() if mode != "__call__" or k not in ("wrt", "grad_output")}
        first, other = (make(np.random.default_rng(seed)) for seed in (1, 2))
        if mode == "__call__":
            first.pop("grad_output", None), other.pop("grad_output", None)
        forgotten()
        wanted = evaluated(loss, mode, other, given, kind)
        forgotten()
        evaluated(loss, mode, first, given, kind)
        before, launched = len(worked_out), len(gpu.launched)
        found = evaluated(loss, mode, other, given, kind)
        assert len(worked_out) == before and len(gpu.launched) > launched
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and a.strides == b.strides
            np.testing.assert_array_equal(a, b)
    nl.synchronize()


@pytest.mark.more
def test_gradients_alone_store_no_value(gpu):
    for loss, make in ((nl.cross_entropy, labelled), (nl.mse_loss, pair)):
        for reduction, launches in (("mean", ["finish"]), ("none", [])):
            arrays = make(np.random.default_rng(1))
            for mode in ("value_and_grad", "grad"):
                evaluated(loss, mode, arrays, dict(reduction=reduction))
                known = len(gpu.launched)
                evaluated(loss, mode, arrays, dict(reduction=reduction))
                if mode == "value_and_grad":
                    whole = gpu.launched[known:]
            fewer = gpu.launched[known:]
            kinds, less = ([name.partition("_")[0] for name in names] for names in (whole, fewer))
            assert kinds == [*less, *launches]


def test_curvature_is_repeated(gpu, worked_out):
    g = np.random.default_rng(1)
    for loss, make in ((nl.cross_entropy, labelled), (nl.huber_loss, pair)):
        for expected in (True, False):
            arrays, before = make(g), len(worked_out)
            found = evaluated(loss, "value_grad_hess", arrays, {})
            assert (len(worked_out) > before) == expected
        forgotten()
        for a, b in zip(found, evaluated(loss, "value_grad_hess", arrays, {}), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("loss,make", [(nl.mse_loss, pair), (nl.cross_entropy, labelled)])
def test_outputs_of_repeated_calls(gpu, worked_out, loss, make):
    for place in ("input", "own"):
        for repeated in (False, True):
            arrays = make(np.random.default_rng(repeated))
            forgotten_calls = len(worked_out)
            given = {n: put(CuPyArray, a) for n, a in arrays.items()}
            own = put(CuPyArray, np.zeros((N, C), "f4"))
            out = given["input"] if place == "input" else own
            value, gradient = loss.value_and_grad(**given, out=out)
            assert gradient is out and (len(worked_out) == forgotten_calls) == repeated
            again, wanted = loss.value_and_grad(**{n: put(CuPyArray, a) for n, a in arrays.items()})
            assert host(value) == host(again)
            np.testing.assert_array_equal(host(out), host(wanted))
            if place == "own":
                np.testing.assert_array_equal(host(given["input"]), arrays["input"])


def test_outputs_that_overlap_are_still_refused(gpu):
    room = put(CuPyArray, np.zeros((2 * N, C), "f4"))
    x, y = room[:N], put(CuPyArray, np.ones((N, C), "f4"))
    apart, half = room[N:], room[N // 2 : N + N // 2]
    nl.mse_loss.value_and_grad(x, y, out=apart)
    known = len(device.prepared_calls())
    nl.mse_loss.value_and_grad(x, y, out=apart)
    with pytest.raises(ValueError, match="overlap|share"):
        nl.mse_loss.value_and_grad(x, y, out=half)
    two = put(CuPyArray, np.zeros((N, C), "f4")), put(CuPyArray, np.zeros((N, C), "f4"))
    nl.mse_loss.grad(x, y, wrt=("input", "target"), out=two)
    with pytest.raises(ValueError, match="overlap"):
        nl.mse_loss.grad(x, y, wrt=("input", "target"), out=(apart, half))
    assert len(device.prepared_calls()) == known + 1


def test_interleaved_outputs_are_worked_out(gpu, worked_out):
    """Arrays whose bytes interleave share none: whether they do is left to the general call."""
    room = put(CuPyArray, np.zeros((N, 2 * C), "f4"))
    x = put(CuPyArray, np.ones((N, C), "f4"))
    for _ in range(2):
        assert nl.mse_loss.grad(room[:, ::2], x, out=room[:, 1::2]) is not None
    assert len(worked_out) == 2 and host(room)[:, 1::2].all() and not host(room)[:, ::2].any()


def test_an_array_given_twice_is_not_taken_for_two(gpu):
    x, y = (put(CuPyArray, np.full((N, C), v, "f4")) for v in (1, 3))
    assert host(nl.mse_loss(x, x)) == 0
    assert host(nl.mse_loss(x, y)) == 4 and host(nl.mse_loss(x, y)) == 4
    assert host(nl.mse_loss(x, x)) == 0


def test_alignment_is_in_the_signature(gpu, worked_out):
    g = np.random.default_rng(1)
    for offset in (0, 1, 0, 1, 4):
        arrays = {
            n: put(CuPyArray, np.concatenate([a.ravel()[:offset], a.ravel()])) for n, a in pair(g).items()
        }
        x, y = (a[offset:] for a in arrays.values())
        wanted = np.mean((host(x).astype(float) - host(y)) ** 2)
        np.testing.assert_allclose(host(nl.mse_loss(x, y)), wanted, rtol=1e-6)
    assert len(worked_out) == 2


@pytest.mark.parametrize("kind", [CuPyArray, Tensor])
def test_the_layout_and_the_dtype_are_in_the_signature(gpu, worked_out, kind):
    ways = {
        "C": np.ascontiguousarray,
        "F": np.asfortranarray,
        "sliced": sliced,
        "half": lambda a: a.astype("f2"),
        "flat": np.ravel,
    }
    for way in (*ways, *ways):
        x, y = (ways[way](a) for a in pair(np.random.default_rng(1)).values())
        gradient = nl.mse_loss.grad(put(kind, x), put(kind, y))
        wanted = (x.astype(float) - y.astype(float)) / (x.size / 2)
        np.testing.assert_allclose(host(gradient), wanted, rtol=1e-5 if x.itemsize > 2 else 4e-3, atol=1e-7)
    assert len(worked_out) == len(ways)


def test_faults_of_repeated_calls(gpu, worked_out):
    x, bad = put(CuPyArray, np.zeros((N, C), "f4")), np.zeros(N, "i8")
    nl.cross_entropy(x, put(CuPyArray, bad))
    bad[2] = C
    assert np.isnan(host(nl.cross_entropy(x, put(CuPyArray, bad))))
    assert len(worked_out) == 1
    with pytest.raises(IndexError, match=r"cross_entropy: target\[2\] is 8, but input has 8 classes"):
        nl.synchronize()


def test_each_device_and_the_current_stream(gpu, worked_out):
    g = np.random.default_rng(1)
    for on, stream in ((0, 7), (1, 8), (0, 9), (1, 10)):
        gpu.current.stream = stream
        arrays = pair(g)
        value = nl.mse_loss(*(put(CuPyArray, a, on) for a in arrays.values()))
        np.testing.assert_allclose(host(value), np.mean((arrays["input"] - arrays["target"]) ** 2), rtol=1e-5)
        assert value.on == on and set(gpu.used[-2:]) == {stream} and gpu.current.device == 0
    assert len(worked_out) == 2


def test_options_of_another_type_are_another_signature(gpu):
    x, y = (put(CuPyArray, a) for a in pair(np.random.default_rng(1)).values())
    nl.smooth_l1_loss(x, y, beta=1)
    nl.smooth_l1_loss(x, y, beta=1.0)
    with pytest.raises(TypeError, match="beta must be a number"):
        nl.smooth_l1_loss(x, y, beta=True)


def test_calls_that_are_not_repeated(gpu, worked_out):
    g = np.random.default_rng(1)
    x, y = pair(g).values()
    sequences = g.normal(size=(5, 2, 4)).astype("f4"), np.array([[1, 2], [3, 1]])
    for _ in range(2):
        nl.mse_loss(put(Plain, x), put(Plain, y))  # nothing tells quickly where these lie
        nl.mse_loss(put(CuPyArray, x), put(Tensor, y))
        nl.ctc_loss(*(put(CuPyArray, a) for a in sequences), (5, 4), (2, 1))
        nl.triplet_margin_with_distance_loss(
            *(put(CuPyArray, a) for a in triplet(g).values()),
            distance_function=lambda a, b: put(CuPyArray, np.ones(N, "f4")),
        )
    assert len(worked_out) == 8 and not device.prepared_calls()


def test_numbers_that_can_change_are_read_in_each_call(gpu):
    """A 0-d array or tensor of the host is a number, and the caller may write to it."""
    number = np.array(2.0)
    tensor = Tensor(number, -1)  # of the same class as those on a device
    tensor.is_cuda, tensor.item = False, number.item
    for kind, up in ((CuPyArray, number), (CuPyArray, tensor), (Tensor, number), (Tensor, tensor)):
        x, y = (put(kind, a) for a in pair(np.random.default_rng(1)).values())
        number[...] = 2.0
        first = host(nl.mse_loss.grad(x, y, grad_output=up))
        number[...] = 6.0
        np.testing.assert_allclose(host(nl.mse_loss.grad(x, y, grad_output=up)), 3 * first, rtol=1e-6)


def test_refused_arrays_stay_refused(gpu):
    x, y = (put(Tensor, a) for a in pair(np.random.default_rng(1)).values())
    nl.mse_loss(x, y)
    x.requires_grad = True
    with pytest.raises(TypeError, match="requires grad"):
        nl.mse_loss(x, y)


@pytest.mark.parametrize("loss,make", [(nl.mse_loss, pair), (nl.cross_entropy, labelled)])
@pytest.mark.thin(2)
def test_no_array_is_kept_alive(gpu, loss, make):
    """Neither the caller's, nor what was made for the recorded call."""
    before = arrays_alive()
    for kind in (CuPyArray, Tensor):
        for out in (False, True):
            arrays = {n: put(kind, a) for n, a in make(np.random.default_rng(1)).items()}
            more = dict(out=put(kind, np.zeros((N, C), "f4"))) if out else {}
            value, gradient = loss.value_and_grad(**arrays, **more)
            seen = [weakref.ref(a) for a in (*arrays.values(), value, gradient)]
            del arrays, more, value, gradient
            gc.collect()
            assert not any(r() is not None for r in seen)
    assert len(device.prepared_calls()) == 4
    assert arrays_alive() == before


def arrays_alive():
    gc.collect()
    return len(device.ALIVE)


def test_what_is_kept_is_bounded(gpu, monkeypatch):
    monkeypatch.setattr(Memo, "MOST", 4)
    for n in range(1, 10):
        x, y = (put(CuPyArray, np.ones(n, "f4")) for _ in range(2))
        assert host(nl.mse_loss(x, y)) == 0
        assert len(device.prepared_calls()) <= 4
