"""The float64 oracle itself: against PyTorch where they agree, against numbers worked by hand elsewhere."""

import doctest
import inspect
import math
import warnings

import numpy as np
import pytest

from numbaloss import reference

NAN, INF = math.nan, math.inf
ELEMENTWISE = [
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "poisson_nll_loss",
    "gaussian_nll_loss",
    "soft_margin_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
]
ROWS = [
    "cross_entropy",
    "nll_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "ctc_loss",
    "linear_cross_entropy",
]
LOSSES = ELEMENTWISE + ROWS
REDUCTIONS = ("none", "sum", "mean")


def rng():
    return np.random.default_rng(20)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 2


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.02, 0.98, size=shape)


def signs(*shape, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=shape)


def labels(*shape, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, size=shape)


def log_softmax(x, axis=-1):
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def softmax(x, axis=-1):
    return np.exp(log_softmax(x, axis))


def cases():
    """Yield (loss, arguments) over every option and layout that PyTorch computes as we do."""
    for shape in [(), (5,), (3, 4), (2, 3, 2)]:
        x, y = normal(*shape), normal(*shape, seed=1)
        w = uniform(*shape, seed=2)
        pair = {"input": x, "target": y}
        for name in ("l1_loss", "mse_loss", "huber_loss", "smooth_l1_loss"):
            yield name, pair
        for name in ("l1_loss", "mse_loss", "huber_loss"):
            yield name, pair | {"weight": w}
        for knee in (0.3, 2.5):
            yield "smooth_l1_loss", pair | {"beta": knee}
            yield "huber_loss", pair | {"delta": knee, "weight": w}
        yield "smooth_l1_loss", pair | {"beta": 0.0}
        p, q = uniform(*shape), uniform(*shape, seed=1)
        yield "binary_cross_entropy", {"input": p, "target": q}
        yield "binary_cross_entropy", {"input": p, "target": q, "weight": w}
        yield "binary_cross_entropy_with_logits", {"input": x, "target": q}
        yield "binary_cross_entropy_with_logits", {"input": x, "target": q, "weight": w, "pos_weight": 3 * p}
        for log_target in (False, True):
            yield "kl_div", {"input": x, "target": np.log(q) if log_target else q, "log_target": log_target}
        for log_input in (False, True):
            for full in (False, True):
                options = {"log_input": log_input, "full": full}
                rate = x if log_input else abs(x)
                yield "poisson_nll_loss", {"input": rate, "target": 4 * q} | options
                yield "poisson_nll_loss", {"input": rate, "target": 4 * q, "eps": 0.1} | options
        for full in (False, True):
            yield "gaussian_nll_loss", pair | {"var": 2 * p, "full": full, "eps": 0.5}
        yield "soft_margin_loss", {"input": x, "target": signs(*shape)}
        for margin in (0.4, 1.0):
            yield "hinge_embedding_loss", {"input": x, "target": signs(*shape), "margin": margin}
            two = {"input1": x, "input2": y, "target": signs(*shape)}
            yield "margin_ranking_loss", two | {"margin": margin - 0.4}
        yield "hinge_embedding_loss", {"input": x, "target": np.round(x)}

    x, y = normal(3, 4), normal(3, 4, seed=1)
    for shape in [(3, 1), (1, 4), (3,)]:
        yield "gaussian_nll_loss", {"input": x, "target": y, "var": uniform(*shape)}
    yield "gaussian_nll_loss", {"input": x, "target": y, "var": 0.7}
    for shape in [(4,), (3, 1), (1,), ()]:
        w = uniform(*shape, seed=3)
        q = uniform(3, 4)
        yield "binary_cross_entropy", {"input": uniform(3, 4, seed=5), "target": q, "weight": w}
        yield "binary_cross_entropy_with_logits", {"input": x, "target": q, "weight": w, "pos_weight": 2 * w}
    edge = np.array([0.0, 0.0, 1.0, 1.0, 1e-60])
    yield "binary_cross_entropy", {"input": edge, "target": np.array([0.0, 1.0, 0.0, 1.0, 0.5])}
    yield "kl_div", {"input": np.array([-1.0, NAN, 2.0]), "target": np.array([0.0, 0.0, -0.5])}

    w = uniform(5, seed=7)
    for shape in [(5,), (6, 5), (2, 5, 3), (2, 5, 3, 2)]:
        axis = min(1, len(shape) - 1)
        x = normal(*shape)
        index_shape = shape[:axis] + shape[axis + 1 :]
        y = labels(*index_shape, classes=5)
        q = softmax(normal(*shape, seed=1), axis)
        for weight in ({}, {"weight": w}):
            for ignore in ({}, {"ignore_index": int(np.ravel(y)[0])}):
                if index_shape or not ignore:
                    options = {"target": y} | weight | ignore
                    yield "nll_loss", {"input": log_softmax(x, axis)} | options
                    for smoothing in (0.0, 0.3, 1.0):
                        yield "cross_entropy", {"input": x, "label_smoothing": smoothing} | options
            for smoothing in (0.0, 0.3):
                options = weight | {"label_smoothing": smoothing}
                yield "cross_entropy", {"input": x, "target": q} | options
        if index_shape:
            masked = np.where(rng().random(index_shape) < 0.4, -100, y)
            yield "cross_entropy", {"input": x, "target": masked, "weight": w, "label_smoothing": 0.1}
            yield "nll_loss", {"input": x, "target": masked, "weight": w}

    for shape, out in [((7,), ()), ((6, 7), (6,)), ((6, 7), (6, 4)), ((6, 7), (6, 4, 2))]:
        classes = 5
        linear_weight = normal(classes, *out[1:], 7, seed=1)
        base = {"input": normal(*shape), "linear_weight": linear_weight}
        y = labels(*out, classes=classes)
        for bias in ({}, {"linear_bias": normal(classes, *out[1:], seed=2)}):
            for weight in ({}, {"weight": w}):
                options = base | bias | weight
                yield "linear_cross_entropy", options | {"target": y}
                yield "linear_cross_entropy", options | {"target": y, "label_smoothing": 0.2}
                q = softmax(normal(*out[:1], classes, *out[1:], seed=3), axis=min(1, len(out)))
                yield "linear_cross_entropy", options | {"target": q, "label_smoothing": 0.2}
        if out:
            yield "linear_cross_entropy", base | {"target": y, "ignore_index": int(np.ravel(y)[0])}

    for shape, y in [
        ((5,), labels(classes=5)),
        ((6, 5), labels(6, classes=5)),
        ((1, 5), labels(1, classes=5)),
    ]:
        for p in (1, 2):
            for options in ({}, {"margin": 0.3}, {"weight": w, "margin": 2.0}):
                yield "multi_margin_loss", {"input": normal(*shape), "target": y, "p": p} | options
    sets = np.array([[0, 2, -1, 1, 1], [-1, 0, 0, 0, 0], [4, 3, 2, 1, 0], [1, 1, 2, -1, 0]])
    yield "multilabel_margin_loss", {"input": normal(4, 5), "target": sets}
    for row in sets:
        yield "multilabel_margin_loss", {"input": normal(5), "target": row}
    for shape in [(5,), (3, 5), (2, 3, 5)]:
        base = {"input": normal(*shape), "target": uniform(*shape)}
        yield "multilabel_soft_margin_loss", base
        yield "multilabel_soft_margin_loss", base | {"weight": w}
        yield "multilabel_soft_margin_loss", base | {"weight": uniform(*shape, seed=4)}

    for shape in [(4,), (6, 4)]:
        for margin in (0.0, 0.4, -0.5):
            for scale in (1.0, 1e-6, 0.0):
                two = {"input1": normal(*shape), "input2": normal(*shape, seed=1) * scale}
                for y in (np.ones(shape[:-1]), -np.ones(shape[:-1]), np.zeros(shape[:-1])):
                    yield "cosine_embedding_loss", two | {"target": y, "margin": margin}
    for shape in [(4,), (6, 4), (2, 3, 4)]:
        names = ("anchor", "positive", "negative")
        three = {name: normal(*shape, seed=seed) for seed, name in enumerate(names)}
        for swap in (False, True):
            for p in (0.5, 1, 2, 3, INF, -INF, 0, -1):
                options = {"p": p, "swap": swap, "margin": 0.5, "eps": 1e-3}
                yield "triplet_margin_loss", three | options
            yield "triplet_margin_loss", three | {"swap": swap}
            yield "triplet_margin_with_distance_loss", three | {"swap": swap, "margin": 0.7}
    same = dict.fromkeys(names, normal(3, 4))
    yield "triplet_margin_loss", same
    yield "triplet_margin_with_distance_loss", same

    for blank in (0, 2, 4):
        letters = [c for c in range(5) if c != blank]
        sequences = rng().choice(letters, size=(4, 3))
        lengths, frames = np.array([3, 0, 1, 2]), np.array([9, 6, 7, 9])
        log_probs = log_softmax(normal(9, 4, 5))
        base = {"log_probs": log_probs, "input_lengths": frames, "target_lengths": lengths, "blank": blank}
        joined = np.concatenate([row[:n] for row, n in zip(sequences, lengths, strict=True)])
        yield "ctc_loss", base | {"targets": sequences}
        yield "ctc_loss", base | {"targets": joined}
        for zero_infinity in (False, True):
            tight = {"targets": np.full((4, 3), letters[0]), "input_lengths": np.array([4, 0, 0, 3])}
            yield "ctc_loss", base | tight | {"zero_infinity": zero_infinity}
        for n in (0, 2, 3):
            one = {"log_probs": log_probs[:, 0], "targets": sequences[3][:n], "blank": blank}
            yield "ctc_loss", one | {"input_lengths": np.array(9), "target_lengths": np.array(n)}


CASES = [(name, arguments) for name, arguments in cases()]


def from_torch(torch, name, arguments):
    """Call PyTorch's loss in float64 and return a NumPy value."""

    def convert(value):
        if isinstance(value, np.ndarray | np.generic):
            return torch.from_numpy(np.array(value))
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kl_div's 'mean'
        value = getattr(torch.nn.functional, name)(**{k: convert(v) for k, v in arguments.items()})
    return value.numpy()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_torch(torch, name):
    ours = [arguments for loss, arguments in CASES if loss == name]
    assert ours
    reductions = (*REDUCTIONS, "batchmean") if name == "kl_div" else REDUCTIONS
    for arguments in ours:
        for reduction in reductions:
            got = getattr(reference, name)(**arguments, reduction=reduction)
            want = from_torch(torch, name, arguments | {"reduction": reduction})
            said = f"{name} {reduction} {arguments}"
            # PyTorch's eps under the cosine's norms is the float32 next to 1e-12.
            rtol = 1e-8 if name == "cosine_embedding_loss" else 1e-10
            np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-10, err_msg=said)
            assert np.shape(got) == want.shape, said
            assert np.asarray(got).dtype == np.float64, said


@pytest.mark.parametrize("name", LOSSES)
def test_signature_is_torchs(torch, name):
    ours = inspect.signature(getattr(reference, name)).parameters.values()
    theirs = inspect.signature(getattr(torch.nn.functional, name)).parameters.values()
    deprecated = ("size_average", "reduce")
    want = [(p.name, p.kind, p.default) for p in theirs if p.name not in deprecated]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    if name in ("cross_entropy", "linear_cross_entropy"):  # Liger-Kernel's
        want += [("softcap", keyword_only, None), ("lse_square_scale", keyword_only, 0.0)]
    want += [("sample_weight", keyword_only, None), ("normalizer", keyword_only, None)]
    assert [(p.name, p.kind, p.default) for p in ours] == want


@pytest.mark.parametrize(
    "name", [n for n in LOSSES if n not in ("ctc_loss", "multi_margin_loss", "multilabel_margin_loss")]
)
def test_empty_batch_agrees_with_torch(torch, name):
    arguments = EMPTY[name]
    for reduction in REDUCTIONS:
        got = getattr(reference, name)(**arguments, reduction=reduction)
        want = from_torch(torch, name, arguments | {"reduction": reduction})
        np.testing.assert_array_equal(got, want)
        assert np.shape(got) == want.shape


def torch_gradient(torch, name, arguments, wrt, upstream):
    """Differentiate PyTorch's loss in float64."""
    tensors = {
        k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray | np.generic) else v
        for k, v in arguments.items()
    }
    tensors[wrt].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kl_div's 'mean'
        value = getattr(torch.nn.functional, name)(**tensors)
    if value.requires_grad:  # not so for the 0-norm
        value.backward(torch.from_numpy(np.array(upstream)))
    slope = tensors[wrt].grad
    return np.zeros(np.shape(arguments[wrt])) if slope is None else slope.numpy()


def of_scores(log_probs, **arguments):
    """CTC of unnormalised scores: PyTorch's gradient takes log_probs for a log_softmax."""
    return reference.ctc_loss(log_softmax(log_probs), **arguments)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.thin(6)
def test_gradient_agrees_with_torch(torch, name):
    loss = of_scores if name == "ctc_loss" else getattr(reference, name)
    checked = 0
    for arguments in [arguments for case, arguments in CASES if case == name][:12]:
        wrt = next(iter(arguments))
        for reduction in REDUCTIONS:
            arguments = arguments | {"reduction": reduction}
            value = loss(**arguments)
            if np.all(np.isfinite(value)):
                upstream = normal(*value.shape, seed=9)
                got = reference.gradient(loss, arguments, wrt, upstream)
                want = torch_gradient(torch, name, arguments, wrt, upstream)
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=f"{name} {arguments}")
                checked += 1
    assert checked >= 9


@pytest.mark.parametrize("target, reduction, want", [(0.5, "mean", 1.0), (2.0, "sum", 2.0)])
def test_gradient_of_a_number(target, reduction, want):
    arguments = {"input": target + want / 2, "target": target, "reduction": reduction}
    assert reference.gradient(reference.mse_loss, arguments, "input") == pytest.approx(want, rel=1e-9)
    assert reference.gradient(reference.mse_loss, arguments, "target", -2.0) == pytest.approx(2 * want)


def test_doctest():
    assert doctest.testmod(reference).failed == 0


# A zero weight, a normalizer, an empty batch: the same for all


EMPTY = {
    **{
        name: {"input": np.zeros((0, 3)), "target": np.zeros((0, 3))}
        for name in [*ELEMENTWISE, "multilabel_soft_margin_loss"]
    },
    "gaussian_nll_loss": {"input": np.zeros((0, 3)), "target": np.zeros((0, 3)), "var": np.zeros((0, 3))},
    "margin_ranking_loss": {n: np.zeros((0, 3)) for n in ("input1", "input2", "target")},
    "cross_entropy": {"input": np.zeros((0, 3)), "target": np.zeros(0, int)},
    "nll_loss": {"input": np.zeros((0, 3)), "target": np.zeros(0, int)},
    "linear_cross_entropy": {
        "input": np.zeros((0, 3)),
        "linear_weight": np.zeros((4, 3)),
        "target": np.zeros(0, int),
    },
    "multi_margin_loss": {"input": np.zeros((0, 3)), "target": np.zeros(0, int)},
    "multilabel_margin_loss": {"input": np.zeros((0, 3)), "target": np.zeros((0, 3), int)},
    "cosine_embedding_loss": {
        "input1": np.zeros((0, 3)),
        "input2": np.zeros((0, 3)),
        "target": np.zeros(0),
    },
    "triplet_margin_loss": {n: np.zeros((0, 3)) for n in ("anchor", "positive", "negative")},
    "triplet_margin_with_distance_loss": {n: np.zeros((0, 3)) for n in ("anchor", "positive", "negative")},
    "ctc_loss": {
        "log_probs": np.zeros((5, 0, 4)),
        "targets": np.zeros((0, 2), int),
        "input_lengths": np.zeros(0, int),
        "target_lengths": np.zeros(0, int),
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch(name):
    loss, arguments = getattr(reference, name), EMPTY[name]
    assert math.isnan(loss(**arguments))
    assert loss(**arguments, reduction="sum") == 0.0
    assert loss(**arguments, reduction="none").size == 0
    assert loss(**arguments, normalizer=8) == 0.0


def own_divisor(name, arguments, sample_weight, shape):
    """What 'mean' divides by, worked out again from the table in the specification."""
    weight = arguments.get("weight")
    counts = np.ones(shape)
    if name in ("l1_loss", "mse_loss") and weight is not None:
        counts = weight
    if name in ("cross_entropy", "nll_loss", "linear_cross_entropy"):
        target = arguments["target"]
        if target.dtype.kind == "i":
            counted = target != arguments.get("ignore_index", -100)
            counts = counted * (1.0 if weight is None else weight[np.where(counted, target, 0)])
    return np.sum(np.broadcast_to(sample_weight, shape) * counts)


@pytest.mark.parametrize("name", LOSSES)
def test_sample_weight_and_normalizer(name):
    loss = getattr(reference, name)
    for arguments in [arguments for case, arguments in CASES if case == name]:
        if name == "kl_div" and np.isnan(arguments["input"]).any():
            continue
        terms = loss(**arguments, reduction="none")
        weights = [uniform(*terms.shape, seed=11), np.array(0.5)]
        if terms.ndim:
            weights.append(uniform(*terms.shape[:1], *[1] * (terms.ndim - 1), seed=12))
            weights.append(uniform(*terms.shape[-1:], seed=13))
        for weight in weights:
            want = weight * terms
            np.testing.assert_allclose(
                loss(**arguments, sample_weight=weight, reduction="none"), want, rtol=1e-14
            )
            np.testing.assert_allclose(
                loss(**arguments, sample_weight=weight, reduction="sum"), want.sum(), rtol=1e-12, atol=1e-12
            )
            per_sample = np.maximum(arguments["target_lengths"], 1) if name == "ctc_loss" else 1
            with np.errstate(invalid="ignore", divide="ignore"):
                total = (want / per_sample).sum()
                mean = total / own_divisor(name, arguments, weight, terms.shape)
            np.testing.assert_allclose(loss(**arguments, sample_weight=weight), mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(
                loss(**arguments, sample_weight=weight, normalizer=7.0), total / 7.0, rtol=1e-12, atol=1e-12
            )
        assert math.isnan(loss(**arguments, sample_weight=0.0))
        assert loss(**arguments, sample_weight=0.0, reduction="sum") == 0.0


def test_batchmean():
    x, y = normal(3, 4), uniform(3, 4)
    total = reference.kl_div(x, y, "sum")
    assert reference.kl_div(x, y, "batchmean") == pytest.approx(total / 3)
    assert reference.kl_div(x, y, "batchmean", normalizer=6) == pytest.approx(total / 6)
    rows = np.array([[1.0], [0.0], [3.0]])
    weighted = reference.kl_div(x, y, "sum", sample_weight=rows)
    assert reference.kl_div(x, y, "batchmean", sample_weight=rows) == pytest.approx(weighted / 4)
    one = reference.kl_div(-1.0, 0.5, "batchmean", sample_weight=3.0)
    assert one == pytest.approx(3 * reference.kl_div(-1.0, 0.5, "none"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "ctc_loss"])
def test_zero_sample_weight_hides_anything(name, bad):
    clean = next(a for case, a in CASES if case == name and np.ndim(next(iter(a.values()))) == 2)
    first = next(iter(clean))
    spoilt = clean | {first: np.array(clean[first])}
    spoilt[first][1] = bad
    terms = getattr(reference, name)(**clean, reduction="none")
    weight = np.ones_like(terms)
    weight[1] = 0.0
    for reduction in REDUCTIONS:
        got = getattr(reference, name)(**spoilt, reduction=reduction, sample_weight=weight)
        want = getattr(reference, name)(**clean, reduction=reduction, sample_weight=weight)
        np.testing.assert_array_equal(got, want)
        assert np.all(np.isfinite(got))


def test_zero_sample_weight_hides_anything_in_ctc():
    arguments = next(a for case, a in CASES if case == "ctc_loss")
    spoilt = arguments | {"log_probs": arguments["log_probs"].copy()}
    spoilt["log_probs"][:, 2] = NAN
    weight = np.array([1.0, 2.0, 0.0, 3.0])
    got = reference.ctc_loss(**spoilt, sample_weight=weight)
    assert got == reference.ctc_loss(**arguments, sample_weight=weight)
    slope = reference.gradient(reference.ctc_loss, spoilt | {"sample_weight": weight}, "log_probs")
    assert np.all(slope[:, 2] == 0.0)


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "huber_loss", "binary_cross_entropy_with_logits"])
def test_zero_weight_hides_anything(name):
    x, w = np.array([1.0, NAN, INF]), np.array([2.0, 0.0, 0.0])
    loss = getattr(reference, name)
    got = loss(x, np.zeros(3), weight=w, reduction="none")
    assert got[0] > 0 and got[1] == got[2] == 0
    divisor = 2.0 if name in ("l1_loss", "mse_loss") else 3.0
    assert loss(x, np.zeros(3), weight=w) == got[0] / divisor
    assert math.isnan(loss(np.zeros(3), np.ones(3), weight=np.zeros(3))) == (divisor == 2.0)


# What differs from PyTorch, by hand


def test_soft_margin_is_finite():
    got = reference.soft_margin_loss([1000.0, 1000.0], [-1.0, 1.0], reduction="none")
    np.testing.assert_array_equal(got, [1000.0, 0.0])


def test_kl_div_of_zero_probability():
    for x in (-1.0, -INF, INF):
        assert reference.kl_div(x, 0.0) == 0.0
        assert reference.kl_div(x, -INF, log_target=True) == 0.0
    assert reference.kl_div(-INF, 0.5) == INF
    assert math.isnan(reference.kl_div(NAN, 0.0))


def test_cross_entropy_of_large_logits():
    x = [[1e8, 1e8], [1e300, 1e300]]
    np.testing.assert_array_equal(reference.cross_entropy(x, [0, 1], reduction="none"), [math.log(2)] * 2)


def test_cross_entropy_of_infinite_logits():
    x = [[0.0, -INF, 0.0], [-INF, -INF, -INF], [0.0, -INF, 0.0]]
    got = reference.cross_entropy(x, [0, 0, 1], reduction="none")
    np.testing.assert_array_equal(got, [math.log(2), NAN, INF])
    q = [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    got = reference.cross_entropy(x, q, reduction="none")
    np.testing.assert_array_equal(got, [math.log(2), NAN, INF])


def test_ignored_rows_are_not_read():
    x = np.array([[0.0, 0.0], [NAN, INF], [0.0, 0.0]])
    y = np.array([1, -100, 0])
    assert reference.cross_entropy(x, y) == math.log(2)
    assert reference.cross_entropy(x, y, label_smoothing=0.2) == pytest.approx(math.log(2), rel=1e-15)
    assert np.all(reference.gradient(reference.cross_entropy, {"input": x, "target": y}, "input")[1] == 0)
    assert reference.nll_loss(x, y) == 0.0
    for loss in (reference.cross_entropy, reference.nll_loss):
        ignored = np.full(3, -100)
        assert math.isnan(loss(x, ignored)) and loss(x, ignored, reduction="sum") == 0.0
    weight = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert reference.linear_cross_entropy(x, weight, y) == math.log(2)


def test_any_integer_labels():
    x = normal(4, 3)
    want = reference.cross_entropy(x, np.array([0, 2, 1, 1]))
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint64):
        assert reference.cross_entropy(x, np.array([0, 2, 1, 1], dtype)) == want


def test_cosine_does_not_overflow():
    x = np.array([[3e200, 4e200], [3e200, 4e200]])
    got = reference.cosine_embedding_loss(x, x[::-1] * [[1], [-1]], [1, -1], margin=-1.0, reduction="none")
    np.testing.assert_allclose(got, [0.0, 0.0], atol=1e-15)
    assert reference.cosine_embedding_loss([3e200, 4e200], [4.0, 3.0], 1) == pytest.approx(0.04)


def test_contrastive_of_similar_and_other_vectors():
    x, y = np.zeros((4, 2)), np.array([[3.0, 4.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    got = reference.contrastive_loss(x, y, [1, 0, 0.5, 0], margin=2.0, reduction="none")
    np.testing.assert_allclose(got, [12.5, 0.0, 0.25 * (0.25 + 1.5**2), 2.0], rtol=1e-15)
    assert reference.contrastive_loss(x[0], y[0], 1) == 12.5
    assert math.isnan(reference.contrastive_loss(x[:0], y[:0], []))


def test_margins_of_an_empty_batch():
    scores = np.zeros((0, 3))
    assert math.isnan(reference.multi_margin_loss(scores, np.zeros(0, int)))
    assert math.isnan(reference.multilabel_margin_loss(scores, np.zeros((0, 3), int)))


def test_named_distances():
    a, p, n = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]]), np.array([[1.0, 1.0]])
    wants = {
        "euclidean": 5 - math.sqrt(2),
        "sqeuclidean": 25 - 2,
        "manhattan": 7 - 2,
        "cosine": 0.0,  # to a zero vector the cosine is 0
    }
    for name, want in wants.items():
        got = reference.triplet_margin_with_distance_loss(a, p, n, distance_function=name, margin=1.0)
        assert got == pytest.approx(1 + want, rel=1e-6)
    got = reference.triplet_margin_with_distance_loss(
        p, n, p + n, distance_function="cosine", reduction="none"
    )
    both = 7 / (5 * math.sqrt(2))
    other = (3 * 4 + 4 * 5) / (5 * math.sqrt(41))
    np.testing.assert_allclose(got, [1 + (1 - both) - (1 - other)])


def test_distance_of_the_users_own(torch):
    arrays = [normal(5, 3, seed=seed) for seed in range(3)]
    got = reference.triplet_margin_with_distance_loss(
        *arrays, distance_function=lambda a, b: abs(a - b).max(axis=-1), swap=True
    )
    want = torch.nn.functional.triplet_margin_with_distance_loss(
        *map(torch.from_numpy, arrays), distance_function=lambda a, b: abs(a - b).amax(-1), swap=True
    )
    assert got == pytest.approx(float(want))


def test_a_new_elementwise_loss_is_one_function():
    @reference.elementwise
    def pinball(input, target, quantile=0.5):
        r = target - input
        return np.maximum(quantile * r, (quantile - 1) * r)

    names = ["input", "target", "quantile", "reduction", "sample_weight", "normalizer"]
    assert list(inspect.signature(pinball).parameters) == names
    np.testing.assert_allclose(pinball([1, 2], [2, 0], 0.9, "none"), [0.9, 0.2])
    assert pinball([1, 2], [2, NAN], 0.9, sample_weight=[2, 0]) == pytest.approx(0.9)
    with pytest.raises(TypeError, match="beta"):
        pinball([1], [2], beta=1)


def test_nan_scores_are_not_lost_in_a_hinge():
    for x in ([NAN, 0.0, 1.0], [0.0, NAN, 1.0]):
        assert math.isnan(reference.multi_margin_loss(x, 0))
        assert math.isnan(reference.multilabel_margin_loss(x, [0, -1, -1]))


def test_rows_of_many_classes_take_no_matrix_of_all():
    """A class index as a row of zeros and a one, of its own row alone: not of every class."""
    x = np.zeros((2, 300_000), np.float32)
    assert reference.cross_entropy(x, np.array([1, 299_999])) == pytest.approx(np.log(300_000))
