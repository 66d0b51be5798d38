"""Losses of vectors: every distance, layout and edge against the reference and PyTorch."""

import gc
import itertools
import math
import pickle
import weakref

import numba
import numpy as np
import pytest
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference

NAMES = {
    "cosine_embedding_loss": ("input1", "input2"),
    "triplet_margin_loss": ("anchor", "positive", "negative"),
    "triplet_margin_with_distance_loss": ("anchor", "positive", "negative"),
}
ALL = pytest.mark.parametrize("name", NAMES)

# Of one vector, of short ones, not whole vectors of the processor, of more than a run, of leading axes.
SHAPES = [(3,), (37, 5), (9, 130), (1, 9000), (2, 3, 4)]


def sample(name, shape, dtype=np.float64, seed=0):
    """Vectors, and labels where the loss takes them."""
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=shape).astype(dtype) for _ in NAMES[name]]
    if name == "cosine_embedding_loss":
        return [*vectors, np.sign(rng.normal(size=shape[:-1])).astype(dtype)]
    return vectors


def options_of(name):
    if name == "cosine_embedding_loss":
        return [{}, {"margin": 0.3}]
    if name == "triplet_margin_loss":
        norms = itertools.product([1, 1.5, 2, 3, math.inf], [False, True])
        return [{"p": p, "swap": swap, "margin": 1.5} for p, swap in norms]
    distances = itertools.product([None, "sqeuclidean", "cosine", "manhattan"], [False, True])
    return [{"distance_function": d, "swap": swap} for d, swap in distances]


def gradients_of(name, arrays, step=1e-6, **options):
    """By differences of the reference's terms: each depends on its own row."""
    oracle = getattr(reference, name)
    found = []
    for k in range(len(NAMES[name])):
        x = arrays[k]
        g = np.empty(x.shape)
        for c in range(x.shape[-1]):
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[k][..., c] += sign * step
                ends.append(oracle(*moved, reduction="none", **options))
            g[..., c] = (ends[0] - ends[1]) / (2 * step)
        found.append(g)
    return found


def torch_options(name, options):
    """PyTorch has no names of distances, and its cosine_similarity another eps."""
    import torch.nn.functional as F

    named = {
        "sqeuclidean": lambda x, y: ((x - y) ** 2).sum(dim=-1),
        "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1),
        "manhattan": lambda x, y: (x - y).abs().sum(dim=-1),
    }
    given = options.get("distance_function")
    return {**options, "distance_function": named[given]} if given in named else options


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
@pytest.mark.thin(8)
def test_torch(name, shape, dtype, torch):
    import torch.nn.functional as F

    if name == "cosine_embedding_loss" and len(shape) > 2:
        pytest.skip("PyTorch takes (N, D) and (D)")
    arrays = sample(name, shape, dtype)
    loss = getattr(nl, name)
    # PyTorch rounds too, and a sum over a row in float32 more than the result.
    size = 1e-6 * (1 + shape[-1])
    value_close = {"rtol": 1e-10, "atol": 1e-11} if dtype == np.float64 else {"rtol": 1e-5, "atol": size}
    grad_close = {"rtol": 1e-9, "atol": 1e-11} if dtype == np.float64 else {"rtol": 1e-3, "atol": 1e-5}
    for options, reduction in itertools.product(options_of(name), ("none", "mean", "sum")):
        tensors = [torch.tensor(a, requires_grad=k < len(NAMES[name])) for k, a in enumerate(arrays)]
        expected = getattr(F, name)(*tensors, reduction=reduction, **torch_options(name, options))
        up = np.random.default_rng(1).normal(size=expected.shape) if reduction == "none" else 1.5
        expected.backward(torch.as_tensor(np.asarray(up, dtype)).expand(expected.shape))
        value, gradients = loss.value_and_grad(*arrays, reduction=reduction, grad_output=up, **options)
        np.testing.assert_allclose(value, expected.detach().numpy(), **value_close, err_msg=str(options))
        for t, g in zip(tensors, gradients, strict=False):
            np.testing.assert_allclose(g, t.grad.numpy(), **grad_close, err_msg=str(options))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", sweep(SHAPES, *SHAPES[::2]), ids=str)
@ALL
@pytest.mark.thin(18)
def test_reference(name, shape, dtype):
    if name == "cosine_embedding_loss" and len(shape) > 2:
        shape = (6, 4)
    arrays = sample(name, shape, dtype)
    exact = [a.astype(np.float64) for a in arrays]
    loss, oracle = getattr(nl, name), getattr(reference, name)
    # A distance's rounding errors are of its own size, and a difference of distances has them whole.
    size = 3.0 * shape[-1] if dtype == np.float32 else 1.0
    tight = {"rtol": 1e-5, "atol": 1e-6 * size} if dtype == np.float32 else {"rtol": 1e-11, "atol": 1e-10}
    for options, reduction in itertools.product(options_of(name), ("none", "mean", "sum")):
        value = loss(*arrays, reduction=reduction, **options)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, oracle(*exact, reduction=reduction, **options), **tight)
    if shape[-1] < 200:
        for options in options_of(name):
            found = loss.grad(*arrays, reduction="sum", **options)
            for g, e in zip(found, gradients_of(name, exact, **options), strict=True):
                assert g.dtype == dtype
                np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-5, err_msg=str(options))


@ALL
def test_weights_and_normalizer(name):
    arrays = sample(name, (6, 4))
    loss, oracle = getattr(nl, name), getattr(reference, name)
    weight = np.random.default_rng(2).random(6)
    for w, normalizer, reduction in itertools.product(
        (None, weight, np.float64(0.5), 2), (None, 12.5), ("none", "mean", "sum")
    ):
        options = {"sample_weight": w, "normalizer": normalizer, "reduction": reduction}
        np.testing.assert_allclose(loss(*arrays, **options), oracle(*arrays, **options), rtol=1e-12)
    divisor = weight.sum()
    found = loss.grad(*arrays, sample_weight=weight)
    for g, e in zip(found, gradients_of(name, arrays), strict=True):
        np.testing.assert_allclose(g, e * weight[:, None] / divisor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@ALL
def test_zero_weight_is_zero(name, bad):
    arrays = sample(name, (6, 4), np.float32)
    weight = np.ones(6)
    weight[2] = 0
    expected = getattr(nl, name).value_and_grad(*arrays, sample_weight=weight)
    for a in arrays[: len(NAMES[name])]:
        a[2] = bad
    value, gradients = getattr(nl, name).value_and_grad(*arrays, sample_weight=weight)
    assert value == expected[0]
    for g, e in zip(gradients, expected[1], strict=True):
        assert not g[2].any()
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.thin(3)
def test_identical_points_are_eps_apart(p, dtype):
    """Also where eps is below the rounding of a coordinate: it is added to the difference."""
    x = 20 * sample("triplet_margin_loss", (6, 70), dtype)[0]
    value, gradients = nl.triplet_margin_loss.value_and_grad(x, x, x, p=p, reduction="none")
    np.testing.assert_allclose(value, 1)
    size = 1.0 if p == 1 else 70.0 ** (1 / p - 1)
    np.testing.assert_allclose(gradients[1], np.full(x.shape, -size), rtol=1e-5)
    np.testing.assert_allclose(gradients[2], np.full(x.shape, size), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_a_tie_of_the_swap_is_halved(p, torch):
    import torch.nn.functional as F

    # The negative is as far from the anchor as from the positive, for any p.
    anchor, positive, negative = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]])[:, None]
    options = {"p": p, "swap": True, "eps": 0.0}
    tensors = [torch.tensor(a, requires_grad=True) for a in (anchor, positive, negative)]
    F.triplet_margin_loss(*tensors, **options).backward()
    found = nl.triplet_margin_loss.grad(anchor, positive, negative, **options)
    for g, t in zip(found, tensors, strict=True):
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("label", [1.0, -1.0, 0.0, 0.5, np.nan])
def test_zero_vectors_and_labels(label, dtype, torch):
    import torch.nn.functional as F

    x1 = np.array([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype)
    x2 = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype)
    y = np.full(3, label, dtype)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x1, x2)]
    F.cosine_embedding_loss(*tensors, torch.tensor(y), margin=-0.5).backward()
    found = nl.cosine_embedding_loss.grad(x1, x2, y, margin=-0.5)
    for g, t in zip(found, tensors, strict=True):
        # PyTorch rounds 1e-12 to float32 first.
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-22, 1e20, 1e37])
@pytest.mark.thin(5)
def test_huge_and_tiny_vectors(size):
    """A float32 square overflows or vanishes; the distance and the angle do not."""
    arrays = sample("triplet_margin_loss", (5, 6))
    small = [(a * size).astype(np.float32) for a in arrays]
    exact = [a.astype(np.float64) for a in small]
    for p, swap in itertools.product((1.5, 2, 3), (False, True)):
        options = {"p": p, "eps": 0.0, "margin": 2 * size, "swap": swap, "reduction": "sum"}
        value, gradients = nl.triplet_margin_loss.value_and_grad(*small, **options)
        expected = nl.triplet_margin_loss.value_and_grad(*exact, **options)
        # The smallest are multiples of the smallest number, as the margin and each distance are.
        np.testing.assert_allclose(value, expected[0], rtol=1e-4, atol=2e-44)
        for g, e in zip(gradients, expected[1], strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, sizes", [
    (np.float32, (1e-42, 1e-20, 1.0, 1e12, 1e20, 1e37)),
    (np.float64, (1e-310, 1e-100, 1.0, 1e100, 1e160, 1e300)),
])  # fmt: skip
def test_angles_of_huge_and_tiny_vectors(dtype, sizes):
    """An angle does not depend on the lengths, and gradients are as long as the vectors are short."""
    x, y, _ = sample("cosine_embedding_loss", (5, 6))
    labels = np.array([1, -1, 1, -1, -1])
    unit, by = nl.cosine_embedding_loss.value_and_grad(x, y, labels, reduction="sum")
    for a, b in itertools.product(sizes, sizes):
        value, gradients = nl.cosine_embedding_loss.value_and_grad(
            (x * a).astype(dtype), (y * b).astype(dtype), labels, reduction="sum"
        )
        if min(a, b) >= 1:
            assert value == pytest.approx(float(unit), rel=1e-5)
            for g, e, size in zip(gradients, by, (a, b), strict=True):
                # At the largest sizes gradients are subnormal.
                atol = 1e-5 / size + 4 * float(np.finfo(dtype).smallest_subnormal)
                np.testing.assert_allclose(g, e / size, rtol=1e-5, atol=atol)
        else:
            assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [30.0, 200.0, 1e4, 1e8, 1e20])
def test_a_large_p(p, dtype):
    """No power underflows: with p the norm goes to the largest difference, and to its gradient."""
    arrays = sample("triplet_margin_loss", (6, 5), dtype)
    value, gradients = nl.triplet_margin_loss.value_and_grad(*arrays, p=p, margin=4.0, reduction="none")
    limit = nl.triplet_margin_loss.value_and_grad(*arrays, p=math.inf, margin=4.0, reduction="none")
    # D differences of one size are at most D ** (1 / p) of it; of others only a nearly equal one counts.
    np.testing.assert_allclose(value, limit[0], atol=3 * (5 ** (1 / p) - 1) + 1e-5)
    if p >= 200:
        np.testing.assert_allclose(gradients, limit[1], atol=0.01)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@ALL
def test_halves(name, half, request):
    """Arithmetic in float32: off by the rounding to the input's dtype alone, half a unit of it."""
    half = np.dtype(np.float16) if half == "float16" else request.getfixturevalue("bfloat16")
    arrays = [a.astype(half) for a in sample(name, (9, 20))]
    unit = 2.0**-11 if half == np.float16 else 2.0**-8
    exact = [a.astype(np.float64) for a in arrays]
    value, gradients = getattr(nl, name).value_and_grad(*arrays, reduction="none")
    assert value.dtype == half and gradients[0].dtype == half
    expected = getattr(nl, name).value_and_grad(*exact, reduction="none")
    np.testing.assert_allclose(value.astype(float), expected[0], rtol=unit * 1.01, atol=1e-5)
    for g, e in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(g.astype(float), e, rtol=unit * 1.01, atol=1e-6)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_layouts(name, layout):
    arrays = sample(name, (70, 300), np.float32)
    count = len(NAMES[name])
    value, gradients = getattr(nl, name).value_and_grad(*arrays)
    odd = [LAYOUTS[layout](a) for a in arrays[:count]] + arrays[count:]
    found = getattr(nl, name).value_and_grad(*odd)
    assert found[0] == value
    for g, e in zip(found[1], gradients, strict=True):
        np.testing.assert_array_equal(g, e)
    outs = tuple(LAYOUTS["strided"](np.empty_like(a)) for a in arrays[:count])
    got = getattr(nl, name).grad(*odd, out=outs)
    for g, o, e in zip(got, outs, gradients, strict=True):
        assert g is o
        np.testing.assert_array_equal(g, e)


@ALL
def test_broadcast_views_and_dtypes(name):
    arrays = sample(name, (6, 4))
    repeated = [np.broadcast_to(arrays[0][:1], (6, 4)), *arrays[1:]]
    plain = [np.ascontiguousarray(a) for a in repeated]
    g, e = getattr(nl, name).grad(*repeated), getattr(nl, name).grad(*plain)
    np.testing.assert_array_equal(g[0], e[0])
    mixed = [arrays[0].astype("f4"), *arrays[1:]]
    value, gradients = getattr(nl, name).value_and_grad(*mixed)
    assert value.dtype == np.float64 and gradients[0].dtype == np.float32


@ALL
def test_in_place(name):
    arrays = sample(name, (300, 40), np.float32)
    names, loss = NAMES[name], getattr(nl, name)
    expected = dict(zip(names, loss.grad(*arrays), strict=True))
    for wrt in [*[(n,) for n in names], names]:
        for layout in (np.array, LAYOUTS["strided"]):
            moved = [layout(a) for a in arrays[: len(names)]] + arrays[len(names) :]
            outs = tuple(moved[names.index(n)] for n in wrt)
            found = loss.grad(*moved, wrt=wrt, out=outs)
            for n, g, o in zip(wrt, found, outs, strict=True):
                assert g is o
                np.testing.assert_array_equal(g, expected[n])
    single = loss.grad(*arrays, wrt=names[1])
    np.testing.assert_array_equal(single, expected[names[1]])
    for o in (arrays[1], arrays[1][::-1][::-1]):
        with pytest.raises(ValueError, match=f"out for {names[0]} overlaps {names[1]}"):
            loss.grad(*arrays, wrt=names[0], out=o)
    buffer = np.empty_like(arrays[0])
    with pytest.raises(ValueError, match="two arrays in out overlap"):
        loss.grad(*arrays, wrt=names[:2], out=(buffer, buffer))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_bits_do_not_depend_on_threads(name, reduction):
    arrays = sample(name, (4000, 10), np.float32)
    value, gradients = getattr(nl, name).value_and_grad(*arrays, reduction=reduction)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone, alone_gradients = getattr(nl, name).value_and_grad(*arrays, reduction=reduction)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(value, alone)
    for g, a in zip(gradients, alone_gradients, strict=True):
        np.testing.assert_array_equal(g, a)


@ALL
def test_empty_batch(name):
    arrays = [a[:0] for a in sample(name, (2, 3))]
    value, gradients = getattr(nl, name).value_and_grad(*arrays)
    assert math.isnan(value) and gradients[0].shape == (0, 3)
    assert getattr(nl, name)(*arrays, reduction="sum") == 0
    assert getattr(nl, name)(*arrays, reduction="none").shape == (0,)


@ALL
def test_errors(name):
    arrays, loss, names = sample(name, (6, 4)), getattr(nl, name), NAMES[name]
    for k in range(1, len(names)):
        wrong = [*arrays]
        wrong[k] = wrong[k][:1]
        with pytest.raises(ValueError, match=f"{name}: {names[k]} must have {names[0]}'s shape"):
            loss(*wrong)
    with pytest.raises(ValueError, match="at least 1"):
        loss(*(np.zeros((3, 0)) for _ in names), *[np.ones(3)][: len(arrays) - len(names)])
    with pytest.raises(TypeError, match=f"{name}: {names[0]} must be"):
        loss(np.zeros((6, 4), complex), *arrays[1:])
    with pytest.raises(ValueError, match="wrt must be among"):
        loss.grad(*arrays, wrt="margin")
    with pytest.raises(ValueError, match="has no value_grad_hess"):
        loss.value_grad_hess(*arrays, wrt=names[0])
    for n, field in loss.Class.fields.items():
        for bad, error, message in field.bad:
            with pytest.raises(error, match=f"{name}: {n} .*{message}"):
                loss(*arrays, **{n: bad})


def test_labels_are_checked():
    x = np.ones((3, 2))
    with pytest.raises(ValueError, match="target must have shape"):
        nl.cosine_embedding_loss(x, x, np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"must have shape \(N, D\) or \(D\)"):
        nl.cosine_embedding_loss(x[None], x[None], np.ones((1, 3)))
    for dtype in ("i1", "u2", "i8", "f4"):
        assert nl.cosine_embedding_loss(x, -x, np.ones(3, dtype)) == pytest.approx(2)


def test_out_over_labels_is_refused():
    labels = np.ones(3, np.int32)
    x = np.ones((3, 1), np.float32)
    with pytest.raises(ValueError, match="out for input1 overlaps target"):
        nl.cosine_embedding_loss.grad(x, -x, labels, wrt="input1", out=labels.view(np.float32)[:, None])
    assert (labels == 1).all()


class Scaled:
    """A distance of one's own: the squared length of the difference, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, y):
        return self.factor * ((x - y) ** 2).sum(axis=-1)

    def value_and_grad(self, x, y):
        return self(x, y), (2 * self.factor * (x - y), 2 * self.factor * (y - x))


@pytest.mark.parametrize("swap", sweep([False, True], True))
@pytest.mark.more
def test_a_distance_of_ones_own(swap):
    arrays = sample("triplet_margin_loss", (8, 5))
    weight = np.random.default_rng(3).random(8)
    weight[1] = 0
    for reduction, w in itertools.product(("none", "mean", "sum"), (None, weight)):
        up = np.arange(8.0) if reduction == "none" else 0.7
        options = {"swap": swap, "reduction": reduction, "sample_weight": w, "grad_output": up}
        loss = nl.triplet_margin_with_distance_loss.value_and_grad
        value, gradients = loss(*arrays, distance_function=Scaled(1.0), **options)
        expected = loss(*arrays, distance_function="sqeuclidean", **options)
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        for g, e in zip(gradients, expected[1], strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-12, atol=1e-15)


def test_a_distance_of_ones_own_is_checked():
    arrays = sample("triplet_margin_loss", (8, 5))
    loss = nl.triplet_margin_with_distance_loss

    def manhattan(x, y):
        return abs(x - y).sum(axis=-1)

    value = loss(*arrays, distance_function=manhattan)
    assert value == pytest.approx(float(loss(*arrays, distance_function="manhattan")))
    with pytest.raises(TypeError, match="value_and_grad for gradients"):
        loss.grad(*arrays, distance_function=manhattan)
    with pytest.raises(ValueError, match=r"distances of shape \(8,\), got \(8, 5\)"):
        loss(*arrays, distance_function=lambda x, y: abs(x - y))
    manhattan.value_and_grad = lambda x, y: (abs(x - y).sum(axis=-1), (np.sign(x - y), 1.0))
    with pytest.raises(ValueError, match=r"by_y of shape \(8, 5\), got \(\)"):
        loss.grad(*arrays, distance_function=manhattan)
    for wrong in (manhattan, lambda x, y: (manhattan(x, y), 3), lambda x, y: None):
        manhattan.value_and_grad = wrong
        with pytest.raises(TypeError, match="must give"):
            loss.grad(*arrays, distance_function=manhattan)
    for dtype in (complex, object, "U1"):
        with pytest.raises(TypeError, match="distances of distance_function must be float64"):
            loss(*arrays, distance_function=lambda x, y, dtype=dtype: np.zeros(8).astype(dtype))
    # A count is a distance, too.
    differ = loss(*arrays, distance_function=lambda x, y: (x != y).sum(axis=-1), margin=0.5)
    assert differ == 0.5


class Product:
    """The inner product: its derivatives are the vectors themselves."""

    def __call__(self, x, y):
        return (x * y).sum(axis=-1)

    def value_and_grad(self, x, y):
        return self(x, y), (y, x)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_distance_of_ones_own_in_place(dtype, swap):
    arrays = sample("triplet_margin_loss", (8, 5), dtype)
    options = {"distance_function": Product(), "margin": 10.0, "swap": swap}
    expected = nl.triplet_margin_with_distance_loss.grad(*arrays, **options)
    found = nl.triplet_margin_with_distance_loss.grad(*arrays, **options, out=tuple(arrays))
    for g, e, a in zip(found, expected, arrays, strict=True):
        assert g is a and g.dtype == dtype
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_zero_weight_is_zero_for_a_distance_of_ones_own(bad):
    arrays = sample("triplet_margin_loss", (6, 4))
    weight = np.array([1, 0, 2, 1, 0, 1.0])
    loss, options = nl.triplet_margin_with_distance_loss, {"sample_weight": weight, "margin": 30.0}
    expected = loss.value_and_grad(*arrays, distance_function=Product(), **options)
    arrays[2][weight == 0] = bad
    value, gradients = loss.value_and_grad(*arrays, distance_function=Quiet(), **options)
    assert value == expected[0]
    for g, e in zip(gradients, expected[1], strict=True):
        np.testing.assert_array_equal(g, e)


class Quiet(Product):
    def __call__(self, x, y):
        with np.errstate(invalid="ignore"):
            return super().__call__(x, y)


def test_functions_are_not_kept():
    arrays, loss = sample("triplet_margin_loss", (8, 5)), nl.triplet_margin_with_distance_loss

    def once():
        def distance(x, y):
            return abs(x - y).sum(axis=-1)

        loss(*arrays, distance_function=distance)
        return weakref.ref(distance)

    reference_to = once()
    gc.collect()
    assert reference_to() is None


@ALL
def test_class_is_function(name):
    arrays, loss = sample(name, (6, 4)), getattr(nl, name)
    criterion = loss.Class(margin=0.5)
    value, gradients = criterion.value_and_grad(*arrays)
    assert value == loss(*arrays, margin=0.5)
    again = pickle.loads(pickle.dumps(criterion))
    np.testing.assert_array_equal(again.grad(*arrays)[0], gradients[0])
    assert pickle.loads(pickle.dumps(loss)) is loss
