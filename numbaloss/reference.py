"""Every loss as on paper: a slow float64 NumPy oracle, to read and to test against.

One function a loss, under its public name and with its public signature (``options`` of
`linear_cross_entropy` is accepted and means nothing here). Arrays are converted to float64 first, labels
stay integers, and no argument is checked: that is the library's work. Speed is no aim.

Two rules hold for all of them, and are stated once, in `weighted` and `reduce`:

* what has a weight of exactly zero contributes exactly zero, even where it is NaN or infinite;
* ``'mean'`` divides by ``normalizer`` or by what the terms count for, and 0 / 0 is NaN.

An elementwise loss is stated by its terms alone; `elementwise` adds the rest:

>>> @elementwise
... def log_cosh(input, target, scale=1.0):
...     return np.log(np.cosh((input - target) / scale))
>>> float(log_cosh([0.0, 1.0], [0.0, 1.0], reduction="sum"))
0.0
"""

import functools
import inspect

import numpy as np

LARGEST_BCE_LOG = 100.0  # PyTorch clamps the logarithms of binary_cross_entropy at minus this
COSINE_EPS = 1e-12  # added to each squared norm
DISTANCE_EPS = 1e-6  # added to each coordinate's difference by PyTorch's PairwiseDistance


def as_float(value):
    """Return the argument as a float64 array."""
    return np.asarray(value, dtype=np.float64)


def as_option(value):
    """Return a number of NumPy's, which may be of few digits, as a float of Python's; all else as it is."""
    return float(value) if isinstance(value, np.floating) else value


def as_index(value):
    """Return class labels or lengths as an int64 array."""
    return np.asarray(value).astype(np.int64)


def weighted(weight, value):
    """Return ``weight * value``, exactly zero where the weight is, whatever the value."""
    return np.where(np.equal(weight, 0.0), 0.0, np.multiply(weight, value))


def reduce(terms, reduction, sample_weight=None, normalizer=None, counts=1.0):
    """Weight and reduce the terms of a loss.

    ``counts`` is what each term counts for in the divisor of ``'mean'``, before its sample weight: one,
    or its class weight, or zero where it is ignored. ``'batchmean'`` takes the terms of one row together
    as one; a 0-d input has no rows, and is not divided.
    """
    given = np.asarray(1.0 if sample_weight is None else as_float(sample_weight))
    ignored = np.equal(counts, 0.0) & np.equal(terms, 0.0)  # whatever their weight
    sample_weight = np.where(ignored, 0.0, np.broadcast_to(given, np.shape(terms)))
    terms = weighted(sample_weight, terms)
    if reduction == "none":
        return terms
    total = np.sum(terms)
    if reduction == "sum":
        return total
    assert reduction in ("mean", "batchmean"), reduction
    if normalizer is not None:
        return np.divide(total, normalizer)
    count = np.sum(weighted(sample_weight, np.broadcast_to(counts, terms.shape)))
    if reduction == "batchmean":
        count = np.sum(given) * len(terms) / max(1, given.size) if terms.ndim else 1.0
    return np.divide(total, count)


def elementwise(terms=None, *, options=None, mean_divides_by_weight=False):
    """Make a loss of a function that gives the loss of each element.

    The loss takes the function's own arguments, then ``reduction``. Where PyTorch has another order, or
    a ``weight``, ``options`` names all that follows the arrays, in its order. ``'mean'`` divides by the
    number of elements, or by the sum of ``weight`` where ``mean_divides_by_weight``.
    """
    if terms is None:
        return functools.partial(elementwise, options=options, mean_divides_by_weight=mean_divides_by_weight)
    own = inspect.signature(terms).parameters
    arrays = [name for name, parameter in own.items() if parameter.default is inspect.Parameter.empty]
    if options is None:
        options = [*(name for name in own if name not in arrays), "reduction"]
    else:
        options = options.split()
    defaults = {name: own[name].default for name in own} | {"reduction": "mean", "weight": None}
    keyword_only = dict.fromkeys(("sample_weight", "normalizer"))
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in arrays]
        + [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=defaults[name])
            for name in options
        ]
        + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in keyword_only.items()
        ]
    )

    @functools.wraps(terms)
    def loss(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        own_values = {
            name: as_float(given[name]) if name in arrays else as_option(given[name]) for name in own
        }
        weight = given.get("weight")
        weight = 1.0 if weight is None else as_float(weight)
        with np.errstate(all="ignore"):
            return reduce(
                weighted(weight, terms(**own_values)),
                given["reduction"],
                given["sample_weight"],
                given["normalizer"],
                counts=weight if mean_divides_by_weight else 1.0,
            )

    loss.__signature__ = signature
    return loss


# Elementwise


@elementwise(options="reduction weight", mean_divides_by_weight=True)
def l1_loss(input, target):
    """Absolute error; ``'mean'`` divides by the sum of ``weight``."""
    return abs(input - target)


@elementwise(options="reduction weight", mean_divides_by_weight=True)
def mse_loss(input, target):
    """Squared error; ``'mean'`` divides by the sum of ``weight``."""
    return (input - target) ** 2


@elementwise(options="reduction beta")
def smooth_l1_loss(input, target, beta=1.0):
    """Absolute error, quadratic below ``beta``; with ``beta`` 0 the absolute error."""
    r = abs(input - target)
    return np.where(r < beta, 0.5 * r * r / beta, r - 0.5 * beta)


@elementwise(options="reduction delta weight")
def huber_loss(input, target, delta=1.0):
    """Quadratic within ``delta`` of the target, linear beyond; ``'mean'`` divides by the count."""
    r = abs(input - target)
    return np.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta))


@elementwise(options="weight reduction")
def binary_cross_entropy(input, target):
    """Cross entropy of probabilities, each logarithm at least -100."""
    log_p = np.maximum(np.log(input), -LARGEST_BCE_LOG)
    log_q = np.maximum(np.log1p(-input), -LARGEST_BCE_LOG)
    return -(target * log_p + (1 - target) * log_q)


@elementwise(options="weight reduction pos_weight")
def binary_cross_entropy_with_logits(input, target, pos_weight=None):
    """Cross entropy of logits; ``pos_weight`` multiplies what a positive target contributes.

    ``-(pos_weight y log s(x) + (1 - y) log(1 - s(x)))``, both logarithms in their stable form.
    """
    pos_weight = 1.0 if pos_weight is None else as_float(pos_weight)
    rest = np.log1p(np.exp(-abs(input)))
    minus_log_p, minus_log_q = np.maximum(-input, 0) + rest, np.maximum(input, 0) + rest
    return pos_weight * target * minus_log_p + (1 - target) * minus_log_q


@elementwise(options="reduction log_target")
def kl_div(input, target, log_target=False):
    """``p (log p - input)``, where 0 times an infinity is 0 (PyTorch: NaN, but for ``0 log 0``)."""
    p, log_p = (np.exp(target), target) if log_target else (target, np.log(target))
    return np.where((p == 0) & ~np.isnan(input), 0.0, p * (log_p - input))


@elementwise(options="log_input full eps reduction")
def poisson_nll_loss(input, target, log_input=True, full=False, eps=1e-8):
    """Poisson's negative log likelihood; ``full`` adds Stirling's term where the target exceeds 1."""
    loss = np.exp(input) - target * input if log_input else input - target * np.log(input + eps)
    stirling = target * np.log(target) - target + 0.5 * np.log(2 * np.pi * target)
    return loss + np.where(full & (target > 1), stirling, 0.0)


@elementwise
def gaussian_nll_loss(input, target, var, full=False, eps=1e-6):
    """Gaussian negative log likelihood with the variance at least ``eps``.

    ``var`` is a number, has the input's shape, lacks its last axis, or has 1 on one of its axes.
    """
    if var.ndim and var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var[..., np.newaxis]
    var = np.maximum(var, eps)
    return 0.5 * (np.log(var) + (input - target) ** 2 / var) + full * 0.5 * np.log(2 * np.pi)


@elementwise
def soft_margin_loss(input, target):
    """``log(1 + exp(-target input))``, finite for every finite input (PyTorch overflows)."""
    return np.logaddexp(0, -target * input)


@elementwise
def hinge_embedding_loss(input, target, margin=1.0):
    """The input where the target is 1, its hinge where -1, and both added for any other target."""
    return np.where(target != -1, input, 0) + np.where(target != 1, np.maximum(0, margin - input), 0)


@elementwise
def margin_ranking_loss(input1, input2, target, margin=0.0):
    """The amount by which the pair misses the order that ``target`` asks for, with a margin."""
    return np.maximum(0, -target * (input1 - input2) + margin)


@elementwise
def quantile_loss(input, target, quantile=0.5, quantiles=None):
    """Pinball loss; ``quantiles`` are an array of them, in place of the one."""
    q = quantile if quantiles is None else as_float(quantiles)
    return np.where(input < target, q, 1 - q) * abs(input - target)


@elementwise
def expectile_loss(input, target, expectile=0.5):
    """Squared error, times ``expectile`` below the target and the rest of 1 above."""
    return np.where(input < target, expectile, 1 - expectile) * (input - target) ** 2


@elementwise
def pseudo_huber_loss(input, target, delta=1.0):
    """``delta**2 (sqrt(1 + (r / delta)**2) - 1)``."""
    if np.isinf(delta):
        return (input - target) ** 2 / 2
    z = ((input - target) / delta) ** 2
    root = np.sqrt(1 + z)
    return delta**2 * np.where(z < 1, z / (1 + root), root - 1)


@elementwise
def log_cosh_loss(input, target):
    """Logarithm of the hyperbolic cosine of the error."""
    return np.logaddexp(input - target, target - input) - np.log(2)


@elementwise
def cauchy_loss(input, target, c=1.0):
    """``c**2 / 2 log(1 + (r / c)**2)``."""
    return c**2 / 2 * np.log1p(((input - target) / c) ** 2)


@elementwise
def arctan_loss(input, target, c=1.0):
    """``c**2 / 2 arctan((r / c)**2)``."""
    return c**2 / 2 * np.arctan(((input - target) / c) ** 2)


@elementwise
def geman_mcclure_loss(input, target, c=1.0):
    """``c**2 / 2 r**2 / (c**2 + r**2)``."""
    squares = (input - target) ** 2
    with np.errstate(divide="ignore"):
        return c**2 / 2 / (1 + c**2 / squares)


@elementwise
def welsch_loss(input, target, c=2.985):
    """``c**2 / 2 (1 - exp(-(r / c)**2))``."""
    return -(c**2) / 2 * np.expm1(-(((input - target) / c) ** 2))


@elementwise
def tukey_biweight_loss(input, target, c=4.685):
    """``c**2 / 6 (1 - (1 - (r / c)**2)**3)`` up to an error of ``c``, constant from there on."""
    z = np.minimum(((input - target) / c) ** 2, 1)
    return c**2 / 6 * (z * (3 - z * (3 - z)))


@elementwise
def fair_loss(input, target, c=1.0):
    """``c**2 (a - log(1 + a))`` of ``a = abs(r) / c``."""
    if np.isinf(c):
        return (input - target) ** 2 / 2
    a = abs(input - target) / c
    return c**2 * (a - np.minimum(np.log1p(a), 1000))  # no logarithm is, but an infinite one


@elementwise
def general_robust_loss(input, target, alpha=1.0, c=1.0):
    """Barron's loss, each of its limits by itself."""
    z, alpha = ((input - target) / c) ** 2, float(alpha)
    if alpha == 2:
        return z / 2
    if alpha == 0:
        return np.log1p(z / 2)
    if np.isinf(alpha):
        return np.sign(alpha) * np.expm1(np.sign(alpha) * z / 2)
    b = abs(alpha - 2)
    return b / alpha * np.expm1(alpha / 2 * np.log1p(z / b))


@elementwise
def gamma_nll_loss(input, target):
    """``x + y exp(-x)``, the last 0 where y is."""
    return input + weighted(target, np.exp(-input))


@elementwise
def tweedie_nll_loss(input, target, power=1.5):
    """``exp((2 - p) x) / (2 - p) - y exp((1 - p) x) / (1 - p)``, the last 0 where y is."""
    p, q = 2 - power, 1 - power
    return np.exp(p * input) / p - weighted(target, np.exp(q * input)) / q


@elementwise
def mape_loss(input, target, eps=2.0**-52):
    """Error relative to the target, whose size is at least ``eps``."""
    return abs(input - target) / np.maximum(abs(target), eps)


@elementwise
def msle_loss(input, target):
    """Squared difference of ``log(1 + x)`` and ``log(1 + y)``."""
    return (np.log1p(input) - np.log1p(target)) ** 2


@elementwise
def squared_hinge_loss(input, target):
    """Square of the amount by which ``target input`` is below 1."""
    return np.maximum(0, 1 - target * input) ** 2


@elementwise
def exponential_loss(input, target):
    """``exp(-target input)``."""
    return np.exp(-target * input)


@elementwise
def sigmoid_focal_loss(input, target, alpha=0.25, gamma=2.0):
    """Cross entropy of logits, times ``(1 - p_t)**gamma`` and, unless ``alpha`` is negative, ``alpha_t``."""
    p = 1 / (1 + np.exp(-input))
    rest = 1 - (p * target + (1 - p) * (1 - target))
    entropy = target * np.logaddexp(0, -input) + (1 - target) * np.logaddexp(0, input)
    balance = alpha * target + (1 - alpha) * (1 - target) if alpha >= 0 else 1.0
    return balance * rest**gamma * entropy


# Scores of classes


def classes_last(scores):
    """Move the class axis of (C), (N, C) or (N, C, d1, ...) to the end."""
    return np.moveaxis(scores, min(1, scores.ndim - 1), -1)


def minus_log_softmax(scores):
    """``(m - x) + log sum exp(x - m)``: the difference first, so that large scores lose nothing."""
    largest = scores.max(axis=-1, keepdims=True)
    return (largest - scores) + np.log(np.exp(scores - largest).sum(axis=-1, keepdims=True))


def class_weights(weight, classes):
    """Return the class weights, ones by default."""
    return np.ones(classes) if weight is None else as_float(weight)


def read_labels(target, ignore_index, classes):
    """Return which labels count, and the labels with 0 in place of those that do not."""
    label = as_index(target)
    counted = label != ignore_index
    label = np.where(counted, label, 0)
    assert np.all((label >= 0) & (label < classes)), "class index out of range"
    return counted, label


def score_loss(value):
    """Make a loss of rows of class scores of a function of a row's statistics and options, by name.

    The statistics are ``log_prob`` and ``rest`` (1 - probability) of the target class, ``class_weight``,
    ``logsumexp``, and ``cross_entropy``: ``-sum_c w_c q_c log softmax(input)_c``, q the target distribution
    smoothed towards 1 / C. A target of the input's shape is q itself, and each row counts 1; else it is class
    indices, and a row counts w of its class. Ignored rows are not read, and 0 times an infinity is 0
    (PyTorch: NaN).
    """
    P = inspect.Parameter
    own = inspect.signature(value).parameters.values()
    options = {p.name: p.default for p in own if p.default is not P.empty}
    defaults = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, **options}
    more = {"softcap": None, "lse_square_scale": 0.0, "sample_weight": None, "normalizer": None}
    signature = inspect.Signature(
        [P(n, P.POSITIONAL_OR_KEYWORD) for n in ("input", "target")]
        + [P(n, P.POSITIONAL_OR_KEYWORD, default=default) for n, default in defaults.items()]
        + [P(n, P.KEYWORD_ONLY, default=default) for n, default in more.items()]
    )

    @functools.wraps(value)
    @np.errstate(all="ignore")
    def loss(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        input, target, smoothing = given["input"], given["target"], given["label_smoothing"]
        scores = classes_last(as_float(input))
        if given["softcap"] is not None:
            scores = given["softcap"] * np.tanh(scores / given["softcap"])
        classes = scores.shape[-1]
        w = class_weights(given["weight"], classes)
        minus_log_p = minus_log_softmax(scores)
        largest = scores.max(axis=-1, keepdims=True)
        row = {"logsumexp": largest[..., 0] + np.log(np.exp(scores - largest).sum(axis=-1))}
        if np.shape(target) == np.shape(input):
            q = classes_last(as_float(target))
            counted, counts = True, 1.0
        else:
            counted, label = read_labels(target, given["ignore_index"], classes)
            q = 1.0 * (np.arange(classes) == label[..., np.newaxis])
            row["class_weight"] = w[label]
            counts = np.where(counted, w[label], 0.0)
            own_class = label[..., np.newaxis]
            row["log_prob"] = -np.take_along_axis(minus_log_p, own_class, -1)[..., 0]
            others = np.where(np.arange(classes) == own_class, 0.0, np.exp(-minus_log_p))
            row["rest"] = others.sum(axis=-1)
        q = (1 - smoothing) * q + smoothing / classes
        row["cross_entropy"] = weighted(w * q, minus_log_p).sum(axis=-1)
        terms = value(**{p.name: {**row, **given}[p.name] for p in own})
        if given["lse_square_scale"]:
            terms = terms + given["lse_square_scale"] * row["logsumexp"] ** 2
        terms = np.where(counted, terms, 0.0)
        return reduce(terms, given["reduction"], given["sample_weight"], given["normalizer"], counts)

    loss.__signature__ = signature
    return loss


@score_loss
def cross_entropy(cross_entropy):
    """The cross entropy of the target's distribution and the softmax of the scores."""
    return cross_entropy


@score_loss
def focal_cross_entropy(rest, cross_entropy, gamma=2.0):
    """Cross entropy times ``(1 - p_y) ** gamma``."""
    return rest**gamma * cross_entropy


@score_loss
def poly1_cross_entropy(cross_entropy, rest, class_weight, epsilon=1.0):
    """Cross entropy plus ``epsilon * w_y * (1 - p_y)``."""
    return cross_entropy + epsilon * class_weight * rest


@score_loss
def generalized_cross_entropy(log_prob, class_weight, q=0.7):
    """``w_y * (1 - p_y**q) / q``."""
    return -class_weight * np.expm1(q * log_prob) / q


@np.errstate(all="ignore")
def nll_loss(
    input, target, weight=None, ignore_index=-100, reduction="mean", *, sample_weight=None, normalizer=None
):
    """Minus the input of the target class, times the class's weight."""
    log_p = classes_last(as_float(input))
    counted, label = read_labels(target, ignore_index, log_p.shape[-1])
    counts = np.where(counted, class_weights(weight, log_p.shape[-1])[label], 0.0)
    loss = -np.take_along_axis(log_p, label[..., np.newaxis], axis=-1)[..., 0]
    return reduce(weighted(counts, loss), reduction, sample_weight, normalizer, counts)


@np.errstate(all="ignore")
def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
    softcap=None,
    lse_square_scale=0.0,
    sample_weight=None,
    normalizer=None,
):
    """Cross entropy of the scores ``input @ linear_weight.T + linear_bias``.

    Shapes: input (F) or (N, F), linear_weight (C, F) or (C, d1, ..., F), linear_bias that without F.
    """
    scores = np.tensordot(as_float(input), as_float(linear_weight), axes=(-1, -1))
    if linear_bias is not None:
        scores = scores + as_float(linear_bias)
    return cross_entropy(
        scores,
        target,
        weight,
        -100 if ignore_index is None else ignore_index,
        reduction,
        label_smoothing,
        softcap=softcap,
        lse_square_scale=lse_square_scale,
        sample_weight=sample_weight,
        normalizer=normalizer,
    )


@np.errstate(all="ignore")
def multi_margin_loss(
    input, target, p=1, margin=1.0, weight=None, reduction="mean", *, sample_weight=None, normalizer=None
):
    """``w_y / C sum_{c != y} max(0, margin - x_y + x_c) ** p``; ``'mean'`` divides by the rows.

    A NaN score makes its row NaN (PyTorch: its hinge 0).
    """
    scores = np.atleast_2d(as_float(input))
    classes = scores.shape[-1]
    w = class_weights(weight, classes)
    terms = []
    for x, y in zip(scores, np.atleast_1d(as_index(target)), strict=True):
        others = np.arange(classes) != y
        hinge = np.maximum(0, margin - x[y] + x[others])
        terms.append(weighted(w[y], np.sum(hinge**p) / classes))
    return reduce(as_float(terms).reshape(np.shape(target)), reduction, sample_weight, normalizer)


@np.errstate(all="ignore")
def multilabel_margin_loss(input, target, reduction="mean", *, sample_weight=None, normalizer=None):
    """``1 / C sum_{y in Y} sum_{c not in Y} max(0, 1 - x_y + x_c)``, Y the labels before the first -1.

    A label that is given twice counts twice. A NaN score in a hinge makes its row NaN (PyTorch: 0).
    """
    scores = np.atleast_2d(as_float(input))
    classes = scores.shape[-1]
    terms = []
    for x, labels in zip(scores, np.atleast_2d(as_index(target)), strict=True):
        end = np.append(labels, -1).tolist().index(-1)
        labels = labels[:end]
        others = np.setdiff1d(np.arange(classes), labels)
        terms.append(np.maximum(0, 1 - x[labels][:, np.newaxis] + x[others]).sum() / classes)
    return reduce(as_float(terms).reshape(np.shape(input)[:-1]), reduction, sample_weight, normalizer)


@np.errstate(all="ignore")
def multilabel_soft_margin_loss(
    input, target, weight=None, reduction="mean", *, sample_weight=None, normalizer=None
):
    """``-1 / C sum_c w_c (y_c log s(x_c) + (1 - y_c) log s(-x_c))``, s the sigmoid."""
    x, y = as_float(input), as_float(target)
    loss = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    weight = 1.0 if weight is None else as_float(weight)
    return reduce(weighted(weight, loss).sum(axis=-1) / x.shape[-1], reduction, sample_weight, normalizer)


# Vectors


def cosine(x1, x2):
    """``x1 . x2 / sqrt((|x1|^2 + eps) (|x2|^2 + eps))``, scaled so that no square overflows."""

    def unit(x):
        scale = np.maximum(1.0, abs(x).max(axis=-1, keepdims=True, initial=0.0))
        x = x / scale
        return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + COSINE_EPS / scale / scale)

    return (unit(x1) * unit(x2)).sum(axis=-1)


@np.errstate(all="ignore")
def cosine_embedding_loss(
    input1, input2, target, margin=0.0, reduction="mean", *, sample_weight=None, normalizer=None
):
    """``1 - cos`` where the target is 1, ``max(0, cos - margin)`` where -1, and 0 for any other."""
    cos = cosine(as_float(input1), as_float(input2))
    target = as_float(target)
    loss = np.where(target == 1, 1 - cos, np.where(target == -1, np.maximum(0, cos - margin), 0.0))
    return reduce(loss, reduction, sample_weight, normalizer)


@np.errstate(all="ignore")
def contrastive_loss(
    input1, input2, target, margin=1.0, reduction="mean", *, sample_weight=None, normalizer=None
):
    """``(y d^2 + (1 - y) max(0, margin - d)^2) / 2``, d the length of the difference (Hadsell 2006)."""
    d = np.linalg.norm(as_float(input1) - as_float(input2), axis=-1)
    target = as_float(target)
    together = np.where(target == 0, 0, target * d**2)  # whatever is infinite
    loss = (together + (1 - target) * np.maximum(0, margin - d) ** 2) / 2
    return reduce(loss, reduction, sample_weight, normalizer)


def euclidean(x1, x2):
    """As PyTorch's ``PairwiseDistance()``: the length of the difference, eps added to each coordinate."""
    return np.linalg.norm(x1 - x2 + DISTANCE_EPS, axis=-1)


DISTANCES = {
    "euclidean": euclidean,
    "sqeuclidean": lambda x1, x2: ((x1 - x2) ** 2).sum(axis=-1),
    "cosine": lambda x1, x2: 1 - cosine(x1, x2),
    "manhattan": lambda x1, x2: abs(x1 - x2).sum(axis=-1),
}


@np.errstate(all="ignore")
def triplet_margin_with_distance_loss(
    anchor,
    positive,
    negative,
    *,
    distance_function=None,
    margin=1.0,
    swap=False,
    reduction="mean",
    sample_weight=None,
    normalizer=None,
):
    """``max(0, margin + d(anchor, positive) - d(anchor, negative))``.

    With ``swap`` the negative's distance is the smaller of those to the anchor and to the positive.
    ``distance_function`` is a name in `DISTANCES`, or takes two arrays (N, D) and returns (N).
    """
    distance = DISTANCES.get(distance_function or "euclidean", distance_function)
    anchor, positive, negative = as_float(anchor), as_float(positive), as_float(negative)
    to_negative = distance(anchor, negative)
    if swap:
        to_negative = np.minimum(to_negative, distance(positive, negative))
    loss = np.maximum(0, margin + distance(anchor, positive) - to_negative)
    return reduce(loss, reduction, sample_weight, normalizer)


def p_norm(d, p):
    """The p-norm of the last axis; relative to the largest coordinate, whose power may overflow."""
    if not 0 < p < np.inf:
        return np.linalg.norm(d, ord=p, axis=-1)
    size = abs(d).max(axis=-1, keepdims=True, initial=0)
    size = np.where((size == 0) | ~np.isfinite(size), 1, size)
    return size[..., 0] * np.linalg.norm(d / size, ord=p, axis=-1)


@np.errstate(all="ignore")
def triplet_margin_loss(
    anchor,
    positive,
    negative,
    margin=1.0,
    p=2,
    eps=DISTANCE_EPS,
    swap=False,
    reduction="mean",
    *,
    sample_weight=None,
    normalizer=None,
):
    """The triplet loss of the p-norm, ``eps`` added to each coordinate's difference."""
    return triplet_margin_with_distance_loss(
        anchor,
        positive,
        negative,
        distance_function=lambda x1, x2: p_norm(x1 - x2 + eps, p),
        margin=margin,
        swap=swap,
        reduction=reduction,
        sample_weight=sample_weight,
        normalizer=normalizer,
    )


# Sequences


def ctc_of_sequence(log_p, labels, blank):
    """Minus the log probability of all alignments of ``labels`` with the frames ``log_p`` (T, C).

    ``alpha[s]`` is the log probability of the frames so far, ending at symbol s of the labels with a
    blank before, between and after them (Graves et al. 2006).
    """
    symbols = [blank]
    for label in labels:
        symbols += [label, blank]
    if len(log_p) == 0:
        return np.inf if len(labels) else 0.0
    alpha = np.full(len(symbols), -np.inf)
    alpha[:2] = log_p[0, symbols[:2]]
    for frame in log_p[1:]:
        before = alpha.copy()
        for s, symbol in enumerate(symbols):
            paths = [before[s]]
            if s >= 1:
                paths.append(before[s - 1])
            if s >= 2 and symbol != symbols[s - 2]:
                paths.append(before[s - 2])
            alpha[s] = np.logaddexp.reduce(paths) + frame[symbol]
    return -np.logaddexp.reduce(alpha[-2:])


@np.errstate(all="ignore")
def ctc_loss(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank=0,
    reduction="mean",
    zero_infinity=False,
    *,
    sample_weight=None,
    normalizer=None,
):
    """Connectionist temporal classification; ``'mean'`` first divides each sample by its target length.

    Shapes: log_probs (T, N, C) or (T, C); targets (N, S), or all samples' joined end to end.
    """
    log_probs, targets = as_float(log_probs), as_index(targets)
    unbatched = log_probs.ndim == 2
    if unbatched:
        log_probs = log_probs[:, np.newaxis]
    input_lengths = np.atleast_1d(as_index(input_lengths))
    target_lengths = np.atleast_1d(as_index(target_lengths))
    starts = np.cumsum(target_lengths) - target_lengths
    terms = np.zeros(len(input_lengths))
    for n, (frames, length) in enumerate(zip(input_lengths, target_lengths, strict=True)):
        labels = targets[n, :length] if targets.ndim == 2 else targets[starts[n] : starts[n] + length]
        terms[n] = ctc_of_sequence(log_probs[:frames, n], labels.tolist(), blank)
    if zero_infinity:
        terms[np.isposinf(terms)] = 0.0
    if reduction == "mean":
        terms = terms / np.maximum(target_lengths, 1)
    return reduce(terms[0] if unbatched else terms, reduction, sample_weight, normalizer)


# Gradients


def gradient(loss_function, arguments, wrt, grad_output=None, step=1e-6):
    """Differentiate ``sum(loss * grad_output)`` with respect to one argument, by central differences.

    ``arguments`` maps every argument of the loss to its value, and ``wrt`` names one of them. The step
    is relative above 1. The result has the argument's shape; away from kinks of the loss it is good to
    about nine digits.
    """
    at = np.array(arguments[wrt], dtype=np.float64)
    grad_output = 1.0 if grad_output is None else as_float(grad_output)

    def value_with(index, x):
        moved = at.copy()
        moved[index] = x
        return loss_function(**{**arguments, wrt: moved})

    slopes = np.zeros(at.shape)
    with np.errstate(all="ignore"):
        for index in np.ndindex(at.shape):
            width = step * max(1.0, abs(at[index])) if np.isfinite(at[index]) else step
            difference = value_with(index, at[index] + width) - value_with(index, at[index] - width)
            slopes[index] = np.sum(difference * grad_output) / (2 * width)
    return slopes
