"""Numbers at the edges, by kernels whose PTX is executed: what no difference of the reference tells."""

import numpy as np
import pytest
from ptx import cases
from ptx.cases import (
    ALIGNMENTS,
    ROWS,
    SCORE_LOSSES,
    VECTOR_PLANS,
    contrastive,
    drawn,
    sequence_arrays,
    vector_arrays,
    wide,
)
from ptx.device import CuPyArray, host, put
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference
from numbaloss.kernels.cuda import backend, binaries, copy, ctc, rows, vectors


def moved(arrays, **more):
    given = {**arrays, **more}
    return {n: put(CuPyArray, a) if isinstance(a, np.ndarray) else a for n, a in given.items()}


def results(loss, arrays, mode="value_and_grad", **options):
    """Value and gradients on the host."""
    made = getattr(loss, mode)(**moved(arrays, **options))
    flat = []
    for x in made if isinstance(made, tuple) else (made,):
        flat += x if isinstance(x, tuple) else (x,)
    return [host(x) for x in flat]


# ---- elements -----------------------------------------------------------------------------------------


def test_a_mean_over_no_weight_is_nan_and_its_gradient_zero(gpu):
    arrays = {**drawn(nl.mse_loss, (20,)), "sample_weight": np.zeros(20, "f4")}
    value, gradient = results(nl.mse_loss, arrays)
    assert np.isnan(value) and not gradient.any()
    arrays["sample_weight"][:2] = 1, -1
    value, gradient = results(nl.mse_loss, arrays)
    assert np.isnan(value) and np.isnan(gradient[:2]).all() and not gradient[2:].any()


def test_bounds_of_binary_cross_entropy(gpu):
    arrays = dict(input=np.array([0, 0, 1, 1], "f4"), target=np.array([0, 1, 0, 1], "f4"))
    terms, gradient = results(nl.binary_cross_entropy, arrays, reduction="none")
    np.testing.assert_array_equal(terms, [0, 100, 100, 0])
    np.testing.assert_allclose(gradient, [0, -1e12, 1e12, 0], rtol=1e-6)
    nl.synchronize()


def test_a_third_operand_may_be_absent(gpu):
    arrays = drawn(nl.binary_cross_entropy_with_logits, (33,))
    del arrays["pos_weight"]
    value, gradient = results(nl.binary_cross_entropy_with_logits, arrays)
    np.testing.assert_allclose(value, reference.binary_cross_entropy_with_logits(**arrays), rtol=1e-6)
    assert gradient.shape == (33,)


def test_infinite_terms_give_an_infinite_mean(gpu):
    arrays = drawn(nl.mse_loss, (50,))
    arrays["input"][17] = np.inf
    assert results(nl.mse_loss, arrays, "__call__") == [np.inf]
    arrays["target"][18] = np.nan
    assert np.isnan(results(nl.mse_loss, arrays, "__call__"))


def test_a_sum_keeps_what_float32_would_lose(gpu):
    x = np.full(40000, 0.1, "f4")
    x[0] = 1e7
    (value,) = results(nl.l1_loss, dict(input=x, target=np.zeros_like(x)), "__call__", reduction="sum")
    np.testing.assert_allclose(value, 1e7 + 39999 * float(np.float32(0.1)), rtol=1e-7)


@pytest.mark.parametrize(
    "name, options",
    [
        ("huber_loss", dict(delta=1e39)),
        ("mse_loss", dict(normalizer=1e-40)),
        ("mse_loss", dict(grad_output=-1e300, reduction="none")),
    ],
)
def test_numbers_beyond_float32_are_infinite(gpu, name, options):
    arrays = drawn(getattr(nl, name), (70,))
    with np.errstate(over="ignore"):
        wanted = getattr(nl, name).value_and_grad(**arrays, **options)
    for x, w in zip(results(getattr(nl, name), arrays, **options), wanted, strict=True):
        np.testing.assert_allclose(x, w, rtol=1e-6)


# ---- rows of scores -----------------------------------------------------------------------------------


@pytest.fixture(params=sweep(ROWS, *list(ROWS)[::2]))
def row_plan(request, monkeypatch):
    """A shape, and the plan that its rows have."""
    shape, _, plan = ROWS[request.param]
    monkeypatch.setattr(rows, "plan", lambda *a, **k: plan)
    return shape


def plain(shape):
    """A call of the kernel that the cases have, too."""
    arrays = cases.scored(shape)
    return {**arrays, "sample_weight": np.ones(arrays["target"].shape, "f4"), "reduction": "sum"}


@pytest.mark.thin(3)
def test_the_own_class_at_minus_infinity(gpu, row_plan):
    arrays = plain(row_plan)
    first = (0,) * arrays["target"].ndim
    at = (0, arrays["target"][first], *first[1:])
    arrays["input"][at] = -np.inf
    value, gradient = results(nl.cross_entropy, arrays)
    assert value == np.inf
    np.testing.assert_allclose(gradient[at], -1, rtol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 80.0])
@pytest.mark.thin(3)
def test_small_losses_do_not_cancel(gpu, row_plan, gap):
    arrays = plain(row_plan)
    arrays["input"] = np.zeros(row_plan, "f4")
    own = np.expand_dims(arrays["target"], 1)
    np.put_along_axis(arrays["input"], own, gap, axis=1)
    value, gradient = results(nl.cross_entropy, arrays)
    others = (row_plan[1] - 1) * np.exp(-gap)
    np.testing.assert_allclose(value, others * own.size, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(gradient, own, axis=1), -others, rtol=1e-5)


def test_the_mean_divides_by_what_counts(gpu):
    arrays = {**cases.scored((700, 8)), "weight": cases.class_weights((700, 8))}
    arrays["target"][::3] = -100
    value, gradient = results(nl.cross_entropy, arrays, label_smoothing=0.1)
    np.testing.assert_allclose(value, reference.cross_entropy(**arrays, label_smoothing=0.1), rtol=1e-6)
    assert not gradient[::3].any()


def test_an_option_changes_numbers_and_not_the_kernel(gpu):
    arrays = cases.scored((6, 8))
    loss, by = SCORE_LOSSES["focal"], reference.score_loss(cases.focal)
    results(loss, arrays)
    known = len(binaries._kernels)
    for gamma in (0.5, 3.0):
        np.testing.assert_allclose(
            results(loss, arrays, gamma=gamma)[0], by(**arrays, gamma=gamma), rtol=1e-5
        )
    assert len(binaries._kernels) == known


@nl.score_loss
def squared_entropy(cross_entropy, scale=0.5):
    return scale * cross_entropy * cross_entropy


@pytest.mark.sweep
@pytest.mark.parametrize("loss", [nl.cross_entropy, SCORE_LOSSES["z_loss"], squared_entropy])
def test_gradients_by_class_weights(gpu, loss):
    """With probabilities they can be differentiated; of a square a row's slope is its own."""
    by = {
        nl.cross_entropy: reference.cross_entropy,
        squared_entropy: reference.score_loss(lambda cross_entropy, scale=0.5: scale * cross_entropy**2),
    }.get(loss) or reference.score_loss(cases.z_loss)
    for shape, reduction in (((5, 6), "mean"), ((2, 6, 3), "none")):
        arrays = {**cases.scored(shape, "float32", True), "weight": cases.class_weights(shape)}
        rows_ = shape[:1] + shape[2:]
        arrays["sample_weight"] = np.linspace(0.5, 2, int(np.prod(rows_)), dtype="f4").reshape(rows_)
        call = {**arrays, "label_smoothing": 0.1, "reduction": reduction}
        if loss is nl.cross_entropy:
            call |= dict(softcap=1.5, lse_square_scale=0.1)
        up = (
            np.linspace(-1, 1, int(np.prod(rows_)), dtype="f4").reshape(rows_)
            if reduction == "none"
            else None
        )
        wrt = ("weight", "input", "target")
        more = {} if up is None else {"grad_output": up}
        found = results(
            loss, {**arrays, **more}, **{k: v for k, v in call.items() if k not in arrays}, wrt=wrt
        )
        np.testing.assert_allclose(found[0], by(**wide(call)), rtol=2e-5, atol=1e-6)
        for n, g in zip(wrt, found[1:], strict=True):
            np.testing.assert_allclose(g, reference.gradient(by, wide(call), n, up), rtol=2e-5, atol=2e-5)


# ---- margins ------------------------------------------------------------------------------------------


def test_ties_have_no_slope(gpu):
    x = np.zeros((3, 8), "f4")
    x[:, 0] = 1
    for loss, labels in (
        (nl.multi_margin_loss, np.zeros(3, int)),
        (nl.multilabel_margin_loss, np.array([[0] + [-1] * 7] * 3)),
    ):
        value, gradient = results(loss, dict(input=x, target=labels))
        assert not value and not gradient.any()


def test_soft_labels_neither_overflow_nor_cancel(gpu):
    x, labels = np.full((2, 8), 1000, "f4"), np.zeros((2, 8), "f4")
    x[1], labels[0] = -1000, 1
    loss, arrays = nl.multilabel_soft_margin_loss, dict(input=x, target=labels)
    terms, gradient = results(loss, arrays, reduction="none")
    assert not terms.any() and not gradient.any()
    x[0] = 20
    gradient = results(loss, arrays, reduction="none")[1]
    np.testing.assert_allclose(gradient[0] * 8, -np.exp(-20.0), rtol=1e-5)
    x[0], labels[0] = 1000, 0
    assert results(loss, arrays, reduction="none")[0][0] == 1000


# ---- vectors ------------------------------------------------------------------------------------------

PAIRS, TRIPLETS = nl.cosine_embedding_loss, nl.triplet_margin_loss
SIZES = {"float32": (1e-30, 1e25, 3e37), "float64": (1e-290, 1e200, 1e307)}


@pytest.mark.parametrize("variant", sweep(VECTOR_PLANS, "team"))
@pytest.mark.parametrize("dtype", sweep(SIZES, "float32"))
@pytest.mark.parametrize("loss, p", [(PAIRS, None), (TRIPLETS, 2.0), (TRIPLETS, 3.0)], ids=str)
@pytest.mark.thin(3)
def test_huge_and_tiny_vectors(gpu, monkeypatch, loss, p, dtype, variant):
    """Rows of ordinary, huge and tiny numbers: neither powers nor their sums leave the range."""
    shape, _, plan = VECTOR_PLANS[variant]
    monkeypatch.setattr(vectors, "plan", lambda *a: plan)
    for size in SIZES[dtype]:
        if loss is PAIRS and size < 1:
            continue  # the eps under its squares hides them
        scale = np.where(np.arange(shape[0]) % 3, size / 8, 1).reshape(-1, 1)
        arrays = vector_arrays(loss, shape, dtype)
        for n in loss.Class.vectors:
            arrays[n] = (arrays[n] * scale).astype(dtype)
        options = dict(margin=0.5) if loss is PAIRS else dict(margin=size / 4, eps=0.0, p=p)
        terms, *gradients = results(loss, arrays, reduction="none", **options)
        far, unit = 1.0, np.ones_like(scale)
        exact = {n: a.astype(np.longdouble) for n, a in arrays.items()}
        if loss is PAIRS:
            unit = scale  # a cosine's gradient is of one over the length
            x, y, label = (exact[n] for n in ("input1", "input2", "target"))
            lengths = [np.sqrt((v * v).sum(-1, keepdims=True)) for v in (x, y)]
            cosine = (x / lengths[0] * (y / lengths[1])).sum(-1)
            wanted = np.where(label == 1, 1 - cosine, np.maximum(cosine - 0.5, 0))
        else:
            far = np.abs(arrays["anchor"]).max() * np.sqrt(shape[1])
            d = [
                ((np.abs(exact["anchor"] - exact[n]) / size) ** p).sum(-1) ** (1 / np.longdouble(p)) * size
                for n in ("positive", "negative")
            ]
            wanted = np.maximum(options["margin"] + d[0] - d[1], 0)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(terms / far, (wanted / far).astype(float), rtol=1e-5, atol=64 * eps)
        # The slopes of distances, which are homogeneous, are those of vectors of ordinary size.
        small = {n: (a / scale).astype(dtype) if a.ndim > 1 else a for n, a in arrays.items()}
        for j, g in enumerate(gradients):
            assert np.isfinite(g).all()
            if loss is PAIRS:
                like = results(loss, small, reduction="none", **options)[1 + j]
                np.testing.assert_allclose(g * unit, like, rtol=1e-4, atol=256 * eps)


@pytest.mark.sweep
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize(
    "loss, options", [(PAIRS, {}), (TRIPLETS, {"p": 2.0}), (TRIPLETS, {"p": np.inf})], ids=str
)
def test_equal_vectors_and_zeros(gpu, loss, options, eps):
    """A distance of 0 has no gradient; with eps the difference is eps. A zero vector's cosine has a slope."""
    options = dict(options) if loss is PAIRS else {**options, "eps": eps}
    arrays = vector_arrays(loss, (5, 24))
    first, second, *third = loss.Class.vectors
    arrays[second][0] = arrays[first][0]
    for n in loss.Class.vectors:
        arrays[n][2] = 0
    arrays[first][3] = 0
    if loss is PAIRS:
        arrays["target"][:4] = 1
    terms, *gradients = results(loss, arrays, reduction="none", **options)
    expected, wanted = loss.value_and_grad(**wide(arrays), **options, reduction="none")
    np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-5)
    for g, w in zip(gradients, wanted, strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    assert third or terms[0] == 0


def test_the_gradient_passes_at_the_clamp_and_a_tie_is_halved(gpu):
    x = np.zeros((3, 2, 4), "f4")
    x[2, :, 0] = 1
    x[1, 1, 0] = 2  # as far from the negative as the anchor is
    arrays = dict(zip(("anchor", "positive", "negative"), x, strict=True))
    terms, by_anchor, _, by_negative = results(
        TRIPLETS, arrays, reduction="none", p=1.0, eps=0.0, margin=1.0, swap=True
    )
    np.testing.assert_array_equal(terms, [0, 2])
    # Both rows tie; the first is at the clamp.
    np.testing.assert_array_equal(by_negative[:, 0], [-1, 0])
    np.testing.assert_array_equal(by_anchor[:, 0], [0.5, -1 + 0.5])


@pytest.mark.sweep
@pytest.mark.parametrize("p", [1.5, 7.0, 100.0, 1e10])
def test_any_norm(gpu, p):
    arrays = vector_arrays(TRIPLETS, (6, 24))
    expected, wanted = TRIPLETS.value_and_grad(**wide(arrays), p=p)
    value, *gradients = results(TRIPLETS, arrays, p=p)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for g, w in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8", "u8", "f2", "f8"])
@pytest.mark.parametrize("loss", [nl.contrastive_loss, contrastive])
def test_row_arrays_of_any_dtype(gpu, loss, dtype):
    x, y = (np.random.default_rng(k).normal(size=(6, 5)).astype("f4") for k in range(2))
    arrays = [x, y, np.array([0, 1, 1, 0, 0, 1]).astype(dtype)]
    value, gradients = loss.value_and_grad(*(put(CuPyArray, a) for a in arrays), wrt=loss.Class.vectors)
    expected, by = loss.value_and_grad(x.astype(float), y.astype(float), arrays[2], wrt=loss.Class.vectors)
    np.testing.assert_allclose(host(value), expected, rtol=2e-5)
    assert host(value).dtype == loss(*arrays).dtype
    for g, e in zip(gradients, by, strict=True):
        np.testing.assert_allclose(host(g), e, rtol=2e-5, atol=1e-6)


@pytest.mark.sweep
def test_mixed_dtypes_and_layouts(gpu):
    arrays = vector_arrays(contrastive, (6, 8))
    arrays["y"] = arrays["y"].astype("f2")
    arrays["label"] = np.repeat(arrays["label"].astype("f8"), 2)[::2]
    arrays["x"] = np.asfortranarray(arrays["x"])
    wrt = ("x", "y", "label")
    expected, wanted = contrastive.value_and_grad(**wide(arrays), wrt=wrt)
    value, *gradients = results(contrastive, arrays, wrt=wrt)
    for g, w in zip([value, *gradients], [expected, *wanted], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3)


Scaled = cases.Scaled.function


@pytest.mark.sweep
@pytest.mark.parametrize("size", [1e-22, 1e-15, 1.0, 1e17])
def test_rows_are_scaled(gpu, size):
    """Squares of float32 overflow or vanish; the gradients and the curvature do not."""
    arrays = {
        n: (size * a).astype("f4") if n != "label" else a for n, a in vector_arrays(Scaled, (5, 6)).items()
    }
    for n in ("x", "label"):
        options = dict(margin=3 * size, reduction="none", wrt=n)
        found = results(Scaled, arrays, "value_grad_hess", **options)[1:]
        wanted = contrastive.value_grad_hess(**wide(arrays), **options)[1:]
        for g, e in zip(found, wanted, strict=True):
            e = np.asarray(e).astype("f4")
            np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-45 + 1e-5 * abs(e).max())


@pytest.mark.sweep
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_options_much_longer_than_vectors_stay_finite(gpu, size):
    """Scaled as far as tiny vectors would want it, the square of a margin of 5 would be infinite."""
    x = np.full((2, 4), size, "f4")
    arrays = dict(x=x, y=0 * x, label=np.array([0, 1], "f4"))
    options = dict(margin=5.0, reduction="none", wrt="x")
    terms, gradient = results(Scaled, arrays, **options)
    expected, slope = contrastive.value_and_grad(**wide(arrays), **options)
    np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-4)
    if size:  # the root's slope at 0 is infinite
        np.testing.assert_allclose(gradient, slope, rtol=1e-4)


class Rooted(nl.VectorLoss):
    """Slopes of a term are infinite where a coordinate's difference is 0."""

    bound: float = 1.0

    def terms(x, y):
        return nl.math.sqrt(abs(x - y))

    def finish(total, bound):
        return nl.math.maximum(total - bound, 0.0)


@pytest.mark.sweep
def test_infinite_slopes(gpu):
    """As on the CPU: 0 where the difference is 0, and in rows of no slope or of no upstream gradient."""
    x = np.array([[1, 2, 3, 4], [1, 2, 0.5, 1], [1, 2, 3, 4]], "f4")
    y = np.array([[0, 2, 0, 0], [1, 2, 0.6, 1], [0, 2, 0, 0]], "f4")
    up = np.array([1, 1, 0], "f4")
    for loss, arrays in (
        (Rooted.function, dict(x=x, y=y)),
        (contrastive, dict(x=x, y=np.array([x[0], y[1], x[2]]), label=np.array([0, 1, 0], "f4"))),
    ):
        given = {**arrays, "grad_output": up}
        wanted = loss.grad(**wide(given), reduction="none")
        for g, e in zip(results(loss, given, "grad", reduction="none"), wanted, strict=True):
            assert e[0, 1] == 0 and not g[2].any()
            np.testing.assert_allclose(g, e, rtol=1e-5)


# ---- sequences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sweep(ALIGNMENTS, "memory"))
@pytest.mark.more
def test_nan_and_infinity_stay_in_their_sequence(gpu, monkeypatch, name):
    monkeypatch.setattr(ctc, "plan", lambda *a: ALIGNMENTS[name])
    arrays = sequence_arrays([9, 8, 7, 6], [3, 2, 2, 0])
    good = results(nl.ctc_loss, arrays, reduction="none")
    x = arrays["log_probs"]
    x[3, 1, 0] = np.nan
    x[2, 2] = -np.inf
    x[1, 3, 4] = -np.inf  # not among its labels
    terms, gradient = results(nl.ctc_loss, arrays, reduction="none")
    assert np.isnan(terms[1]) and np.isnan(gradient[:8, 1]).all()
    assert terms[2] == np.inf and np.isnan(gradient[:7, 2]).all()
    assert not gradient[8:, 1].any() and not gradient[7:, 2].any() and gradient[1, 3, 4] == 0
    np.testing.assert_array_equal(terms[[0, 3]], good[0][[0, 3]])
    np.testing.assert_array_equal(gradient[:, 0], good[1][:, 0])


@pytest.mark.parametrize("bad", [-3, 100, 2**62])
def test_a_bad_length_among_joined_labels_harms_none_before(gpu, monkeypatch, bad):
    monkeypatch.setattr(ctc, "plan", lambda *a: ALIGNMENTS["memory"])
    arrays = {**sequence_arrays([9, 8, 7, 10], [3, 4, 2, 1], joined=True), "sample_weight": np.ones(4, "f4")}
    options = dict(reduction="none", zero_infinity=True, grad_output=np.ones(4, "f4"))
    good = results(nl.ctc_loss, arrays, **options)
    arrays["target_lengths"][1:3] = bad, 2**62 if bad == 2**62 else 2
    terms, gradient = results(nl.ctc_loss, arrays, **options)
    assert np.isnan(terms[1]) and terms[0] == good[0][0]
    np.testing.assert_array_equal(gradient[:, 0], good[1][:, 0])
    with pytest.raises(ValueError, match=r"target_lengths\[1\]"):
        nl.synchronize()


@pytest.mark.sweep
def test_long_sequences_keep_their_digits(gpu):
    """Logarithms grow to a thousand, whose float32 are 6e-5 apart."""
    arrays = sequence_arrays([300], [40], 28)
    for x, w in zip(
        results(nl.ctc_loss, arrays, reduction="sum"),
        nl.ctc_loss.value_and_grad(**wide(arrays), reduction="sum"),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(x, w, rtol=1e-6, atol=2e-5)


# ---- copies -------------------------------------------------------------------------------------------

VIEWS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "reversed": lambda a: a[:, ::-1],
    "skipping": lambda a: a[::2, 1:, ::3],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "one element": lambda a: a[1:2, 2:3, 3:4],
    "scalar": lambda a: a[1, 1, 1, ...],
}


def copied(a, b):
    """Copy one array to another on the device; the latter on the host."""
    given = {"a": put(CuPyArray, a, writable=False), "b": put(CuPyArray, b)}
    described, queue = backend.describe_call("copy", given)
    with queue.current():
        described["b"].assign(described["a"])
    return host(given["b"])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_copies_of_layouts(gpu, monkeypatch, view, wide):
    monkeypatch.setattr(copy, "WIDE", 0 if wide else copy.WIDE)
    a = VIEWS[view](np.random.default_rng(0).normal(size=(5, 7, 40)).astype("f4"))
    np.testing.assert_array_equal(copied(a, np.full(a.shape, np.nan, "f4")), a)
    room = np.full((*a.shape[::-1], 2), np.nan, "f4")
    np.testing.assert_array_equal(copied(a, room[..., 1].transpose()), a)


FLOATS = "float64", "float32", "float16", "bfloat16"
COPIES = [(a, b) for b in FLOATS for a in (*FLOATS, "int8", "uint16", "int32", "uint64", "bool")]
COPIES += [(a, "int64") for a in ("int8", "uint16", "int32", "uint64", "bool")]


@pytest.mark.parametrize(
    "pair", sweep(COPIES, ("float64", "float16"), ("bfloat16", "float32"), ("bool", "bfloat16")), ids="-".join
)
def test_copies_of_dtypes(gpu, pair):
    dtype, to = (cases.DTYPES.get(t) or np.dtype(t) for t in pair)
    a = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 100, 70).astype(dtype)
    np.testing.assert_array_equal(copied(a, np.zeros(70, to)), a.astype(to))


def test_more_elements_than_threads(gpu, monkeypatch):
    monkeypatch.setattr(copy, "MOST_BLOCKS", 2)
    a = np.random.default_rng(0).normal(size=7001).astype("f4")
    np.testing.assert_array_equal(copied(a[::-1], np.zeros_like(a)), a[::-1])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cross_entropy", (1500, 16)),
        ("cross_entropy", (7, 700)),
        ("cross_entropy", (2, 5, 3001)),
        ("triplet_margin_loss", (1500, 8)),
        ("triplet_margin_loss", (7, 900)),
    ],
    ids=str,
)
@pytest.mark.thin(6)
def test_more_rows_than_blocks_have(gpu, rng, monkeypatch, name, shape):
    for module in (rows, vectors):
        monkeypatch.setattr(module, "SUMMING_BLOCKS", 2)
    loss = nl.registry[name]
    arrays = [rng.normal(size=shape).astype("f4") for _ in range(3)]
    if name == "cross_entropy":
        labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
        labels.flat[::5] = -100
        arrays[1:] = [labels]
    value, gradients = loss.value_and_grad(*(put(CuPyArray, a) for a in arrays))
    wanted, slopes = loss.value_and_grad(*arrays)
    np.testing.assert_allclose(host(value), wanted, rtol=2e-6)
    pairs = zip(gradients, slopes, strict=True) if isinstance(gradients, tuple) else [(gradients, slopes)]
    for found, slope in pairs:
        np.testing.assert_allclose(host(found), slope, rtol=1e-5, atol=1e-6 * abs(slope).max())
