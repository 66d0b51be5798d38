"""The losses in plain array code, as one would write them without a library of losses.

One text for NumPy, CuPy and JAX: each function takes the array module first. JAX differentiates the terms;
the others use the gradients that stand beside them, by the arguments that a model produces. Two losses are
left out, which take more than a few lines of array code: `multilabel_margin_loss` and `ctc_loss`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Formula(NamedTuple):
    """A loss with its default options."""

    terms: Callable[..., Any]
    value_and_grad: Callable[..., Any]  # of the mean


def _elementwise(terms: Callable[..., Any], slope: Callable[..., Any]) -> Formula:
    def value_and_grad(xp: Any, *arrays: Any) -> Any:
        return terms(xp, *arrays).mean(), slope(xp, *arrays) / arrays[0].size

    return Formula(terms, value_and_grad)


def sigmoid(xp: Any, x: Any) -> Any:
    return 1 / (1 + xp.exp(-x))


def softplus(xp: Any, x: Any) -> Any:
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-abs(x)))


def _huber(xp: Any, x: Any, y: Any) -> Any:
    r = abs(x - y)
    return xp.where(r <= 1, 0.5 * r * r, r - 0.5)


def _binary_cross_entropy(xp: Any, x: Any, y: Any) -> Any:
    return -(y * xp.maximum(xp.log(x), -100) + (1 - y) * xp.maximum(xp.log1p(-x), -100))


def _kl_div(xp: Any, x: Any, y: Any) -> Any:
    return xp.where(y > 0, y * (xp.log(xp.where(y > 0, y, 1)) - x), 0)


def _gaussian_nll(xp: Any, x: Any, y: Any, var: Any) -> Any:
    var = xp.maximum(var, 1e-6)
    return 0.5 * (xp.log(var) + (x - y) ** 2 / var)


_HUBER = _elementwise(_huber, lambda xp, x, y: xp.clip(x - y, -1, 1))
_LOGITS = _elementwise(
    lambda xp, x, y: softplus(xp, x) - x * y,
    lambda xp, x, y: sigmoid(xp, x) - y,
)


def _margin_ranking(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    return xp.maximum(0, -y * (x1 - x2))


def _margin_ranking_grad(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    miss = -y * (x1 - x2)
    slope = xp.where(miss >= 0, -y / y.size, 0)
    return xp.maximum(0, miss).mean(), (slope, -slope)


# Scores of classes: the class axis is the second


def _picked(xp: Any, x: Any, y: Any) -> Any:
    return xp.take_along_axis(x, xp.expand_dims(y, 1), axis=1)


def _add_at(xp: Any, x: Any, y: Any, number: Any) -> None:
    xp.put_along_axis(x, xp.expand_dims(y, 1), _picked(xp, x, y) + number, axis=1)


def _cross_entropy(xp: Any, x: Any, y: Any) -> Any:
    x = x - x.max(axis=1, keepdims=True)
    return xp.log(xp.exp(x).sum(axis=1)) - _picked(xp, x, y)[:, 0]


def _cross_entropy_grad(xp: Any, x: Any, y: Any) -> Any:
    x = x - x.max(axis=1, keepdims=True)
    p = xp.exp(x)
    total = p.sum(axis=1, keepdims=True)
    value = (xp.log(total) - _picked(xp, x, y)).mean()
    p /= total
    _add_at(xp, p, y, -1)
    p /= y.size
    return value, p


def _softmax(xp: Any, x: Any, y: Any) -> Any:
    """Of each row the probabilities, and that of its class."""
    e = xp.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    return p, _picked(xp, p, y)[:, 0]


def _of_probability(value: Callable[..., Any], slope: Callable[..., Any]) -> Formula:
    """A function of the class's probability; `slope` is that by its logarithm."""

    def terms(xp: Any, x: Any, y: Any) -> Any:
        return value(xp, _softmax(xp, x, y)[1])

    def value_and_grad(xp: Any, x: Any, y: Any) -> Any:
        p, own = _softmax(xp, x, y)
        by_log = slope(xp, own) / y.size
        g = -p * by_log[:, None]
        _add_at(xp, g, y, by_log[:, None])
        return value(xp, own).mean(), g

    return Formula(terms, value_and_grad)


def _nll(xp: Any, x: Any, y: Any) -> Any:
    return -_picked(xp, x, y)


def _nll_grad(xp: Any, x: Any, y: Any) -> Any:
    g = xp.zeros_like(x)
    _add_at(xp, g, y, -1 / y.size)
    return _nll(xp, x, y).mean(), g


def _multi_margin(xp: Any, x: Any, y: Any) -> Any:
    # The row's own class adds the margin itself, one.
    return (xp.maximum(0, 1 - _picked(xp, x, y) + x).sum(axis=1) - 1) / x.shape[1]


def _multi_margin_grad(xp: Any, x: Any, y: Any) -> Any:
    hinge = xp.maximum(0, 1 - _picked(xp, x, y) + x)
    g = (hinge > 0).astype(x.dtype)
    _add_at(xp, g, y, -g.sum(axis=1, keepdims=True))
    g /= x.size
    return ((hinge.sum(axis=1) - 1) / x.shape[1]).mean(), g


def _linear_cross_entropy(xp: Any, x: Any, w: Any, y: Any) -> Any:
    return _cross_entropy(xp, x @ w.T, y)


def _linear_cross_entropy_grad(xp: Any, x: Any, w: Any, y: Any) -> Any:
    value, g = _cross_entropy_grad(xp, x @ w.T, y)
    return value, (g @ w, g.T @ x)


# Vectors


def _length(xp: Any, x: Any) -> Any:
    return xp.sqrt((x * x).sum(axis=-1))


def _cosine_embedding(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    cos = (x1 * x2).sum(axis=-1) / (_length(xp, x1) * _length(xp, x2))
    return xp.where(y == 1, 1 - cos, xp.maximum(0, cos))


def _cosine_embedding_grad(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    length1, length2 = _length(xp, x1)[:, None], _length(xp, x2)[:, None]
    unit1, unit2 = x1 / length1, x2 / length2
    cos = (unit1 * unit2).sum(axis=-1)
    slope = (xp.where(y == 1, -1, cos >= 0) / y.size).astype(x1.dtype)[:, None]
    by1 = slope * (unit2 - cos[:, None] * unit1) / length1
    by2 = slope * (unit1 - cos[:, None] * unit2) / length2
    return xp.where(y == 1, 1 - cos, xp.maximum(0, cos)).mean(), (by1, by2)


def _contrastive(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    d = _length(xp, x1 - x2)
    return 0.5 * (y * d**2 + (1 - y) * xp.maximum(0, 1 - d) ** 2)


def _contrastive_grad(xp: Any, x1: Any, x2: Any, y: Any) -> Any:
    difference = x1 - x2
    d = _length(xp, difference)
    near = xp.maximum(0, 1 - d)
    slope = (y - (1 - y) * near / d) / y.size
    by1 = slope[:, None] * difference
    return (0.5 * (y * d**2 + (1 - y) * near**2)).mean(), (by1, -by1)


def _triplet_margin(xp: Any, a: Any, p: Any, n: Any) -> Any:
    return xp.maximum(0, 1 + _length(xp, a - p + 1e-6) - _length(xp, a - n + 1e-6))


def _triplet_margin_grad(xp: Any, a: Any, p: Any, n: Any) -> Any:
    near, far = a - p + 1e-6, a - n + 1e-6
    to_p, to_n = _length(xp, near), _length(xp, far)
    terms = xp.maximum(0, 1 + to_p - to_n)
    weight = (terms > 0).astype(a.dtype) / len(a)
    near *= (weight / to_p)[:, None]
    far *= (weight / to_n)[:, None]
    return terms.mean(), (near - far, -near, far)


_TRIPLET = Formula(_triplet_margin, _triplet_margin_grad)

FORMULAS: dict[str, Formula] = {
    "l1_loss": _elementwise(lambda xp, x, y: abs(x - y), lambda xp, x, y: xp.sign(x - y)),
    "mse_loss": _elementwise(lambda xp, x, y: (x - y) ** 2, lambda xp, x, y: 2 * (x - y)),
    "smooth_l1_loss": _HUBER,
    "huber_loss": _HUBER,
    "binary_cross_entropy": _elementwise(
        _binary_cross_entropy, lambda xp, x, y: (x - y) / xp.maximum(x * (1 - x), 1e-12)
    ),
    "binary_cross_entropy_with_logits": _LOGITS,
    "multilabel_soft_margin_loss": _LOGITS,
    "kl_div": _elementwise(_kl_div, lambda xp, x, y: -y),
    "poisson_nll_loss": _elementwise(
        lambda xp, x, y: xp.exp(x) - x * y, lambda xp, x, y: xp.exp(x) - y
    ),
    "gaussian_nll_loss": _elementwise(
        _gaussian_nll, lambda xp, x, y, var: (x - y) / xp.maximum(var, 1e-6)
    ),
    "soft_margin_loss": _elementwise(
        lambda xp, x, y: softplus(xp, -x * y), lambda xp, x, y: -y * sigmoid(xp, -x * y)
    ),
    "hinge_embedding_loss": _elementwise(
        lambda xp, x, y: xp.where(y == 1, x, xp.maximum(0, 1 - x)),
        lambda xp, x, y: xp.where((y == 1) | (x < 1), y, 0),
    ),
    "margin_ranking_loss": Formula(_margin_ranking, _margin_ranking_grad),
    "cross_entropy": Formula(_cross_entropy, _cross_entropy_grad),
    "focal_cross_entropy": _of_probability(
        lambda xp, p: -((1 - p) ** 2) * xp.log(p),
        lambda xp, p: (1 - p) * (2 * p * xp.log(p) - (1 - p)),
    ),
    "poly1_cross_entropy": _of_probability(lambda xp, p: 1 - p - xp.log(p), lambda xp, p: -1 - p),
    "generalized_cross_entropy": _of_probability(
        lambda xp, p: (1 - p**0.7) / 0.7, lambda xp, p: -(p**0.7)
    ),
    "nll_loss": Formula(_nll, _nll_grad),
    "multi_margin_loss": Formula(_multi_margin, _multi_margin_grad),
    "linear_cross_entropy": Formula(_linear_cross_entropy, _linear_cross_entropy_grad),
    "cosine_embedding_loss": Formula(_cosine_embedding, _cosine_embedding_grad),
    "contrastive_loss": Formula(_contrastive, _contrastive_grad),
    "triplet_margin_loss": _TRIPLET,
    "triplet_margin_with_distance_loss": _TRIPLET,
}  # fmt: skip
