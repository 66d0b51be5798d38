"""Each loss as on paper, of one term, in mpmath's arithmetic: what `accuracy` compares with.

One function a loss, under its public name, of the arguments and options that one term has: numbers, or NumPy
arrays of mpmath's numbers along the classes, coordinates or frames; labels are integers. Exponents have no
bounds there, so nothing is scaled, and digits are as many as the caller asks for. Nothing is shared with
`numbaloss.reference`.
"""

from functools import lru_cache
from typing import Any

import mpmath
from mpmath import mp

LOWEST_BCE_LOG = -100  # as PyTorch clamps
LOWEST_BCE_DENOMINATOR = mpmath.mpf(1e-12)  # below it the slope of binary_cross_entropy is a convention
COSINE_EPS = mpmath.mpf(1e-12)
DISTANCE_EPS = mpmath.mpf(1e-6)


@lru_cache(200_000)
def _exp(x: Any, precision: int) -> Any:
    return mp.exp(x)


def exp(x: Any) -> Any:
    """e**x, remembered: a difference quotient moves one number of many."""
    return _exp(x, mp.prec)


log, sqrt = mp.log, mp.sqrt


def softplus(x: Any) -> Any:
    """log(1 + e**x)."""
    return log(1 + exp(x))


def xlogy(x: Any, y: Any) -> Any:
    """x * log(y), and 0 where x is 0."""
    return x * log(y) if x else mp.zero


# Elements


def l1_loss(input: Any, target: Any) -> Any:
    return abs(input - target)


def mse_loss(input: Any, target: Any) -> Any:
    return (input - target) ** 2


def smooth_l1_loss(input: Any, target: Any, beta: Any = 1) -> Any:
    r = abs(input - target)
    return r**2 / (2 * beta) if r < beta else r - beta / 2


def huber_loss(input: Any, target: Any, delta: Any = 1) -> Any:
    r = abs(input - target)
    return r**2 / 2 if r <= delta else delta * (r - delta / 2)


def poisson_nll_loss(
    input: Any, target: Any, log_input: bool = True, full: bool = False, eps: Any = 1e-8
) -> Any:
    value = exp(input) - target * input if log_input else input - target * log(input + eps)
    if full and target > 1:
        value += target * log(target) - target + log(2 * mp.pi * target) / 2
    return value


def gaussian_nll_loss(input: Any, target: Any, var: Any, full: bool = False, eps: Any = 1e-6) -> Any:
    var = max(var, eps)
    return (log(var) + (input - target) ** 2 / var + full * log(2 * mp.pi)) / 2


def margin_ranking_loss(input1: Any, input2: Any, target: Any, margin: Any = 0) -> Any:
    return max(mp.zero, margin - target * (input1 - input2))


def binary_cross_entropy(input: Any, target: Any) -> Any:
    log_p, log_q = (max(log(p), LOWEST_BCE_LOG) for p in (input, 1 - input))
    return -(target * log_p + (1 - target) * log_q)


def binary_cross_entropy_with_logits(input: Any, target: Any, pos_weight: Any = 1) -> Any:
    return pos_weight * target * softplus(-input) + (1 - target) * softplus(input)


def kl_div(input: Any, target: Any, log_target: bool = False) -> Any:
    return exp(target) * (target - input) if log_target else xlogy(target, target) - target * input


def soft_margin_loss(input: Any, target: Any) -> Any:
    return softplus(-target * input)


def hinge_embedding_loss(input: Any, target: Any, margin: Any = 1) -> Any:
    return (input if target != -1 else 0) + (max(mp.zero, margin - input) if target != 1 else 0)


# Elements: robust, one-sided, relative


def quantile_loss(input: Any, target: Any, quantiles: Any = None, quantile: Any = 0.5) -> Any:
    q = quantile if quantiles is None else quantiles
    return q * (target - input) if target > input else (1 - q) * (input - target)


def expectile_loss(input: Any, target: Any, expectile: Any = 0.5) -> Any:
    return (expectile if target > input else 1 - expectile) * (input - target) ** 2


def pseudo_huber_loss(input: Any, target: Any, delta: Any = 1) -> Any:
    return delta * (sqrt(delta**2 + (input - target) ** 2) - delta)


def log_cosh_loss(input: Any, target: Any) -> Any:
    return softplus(2 * (input - target)) - (input - target) - log(2)


def cauchy_loss(input: Any, target: Any, c: Any = 1) -> Any:
    return c**2 * log(1 + ((input - target) / c) ** 2) / 2


def arctan_loss(input: Any, target: Any, c: Any = 1) -> Any:
    return c**2 * mp.atan(((input - target) / c) ** 2) / 2


def geman_mcclure_loss(input: Any, target: Any, c: Any = 1) -> Any:
    return c**2 * (input - target) ** 2 / (c**2 + (input - target) ** 2) / 2


def welsch_loss(input: Any, target: Any, c: Any = 2.985) -> Any:
    return c**2 * (1 - exp(-(((input - target) / c) ** 2))) / 2


def tukey_biweight_loss(input: Any, target: Any, c: Any = 4.685) -> Any:
    return c**2 * (1 - max(mp.zero, 1 - ((input - target) / c) ** 2) ** 3) / 6


def fair_loss(input: Any, target: Any, c: Any = 1) -> Any:
    return c**2 * (abs(input - target) / c - log(1 + abs(input - target) / c))


def general_robust_loss(input: Any, target: Any, alpha: Any = 1, c: Any = 1) -> Any:
    z = ((input - target) / c) ** 2
    if alpha == 2:
        return z / 2
    if alpha == 0:
        return log(1 + z / 2)
    if mp.isinf(alpha):
        return 1 - exp(-z / 2) if alpha < 0 else exp(z / 2) - 1
    b = abs(alpha - 2)
    return b / alpha * ((z / b + 1) ** (alpha / 2) - 1)


def gamma_nll_loss(input: Any, target: Any) -> Any:
    return input + target * exp(-input)


def tweedie_nll_loss(input: Any, target: Any, power: Any = 1.5) -> Any:
    return exp((2 - power) * input) / (2 - power) - target * exp((1 - power) * input) / (1 - power)


def mape_loss(input: Any, target: Any, eps: Any = 2.0**-52) -> Any:
    return abs(input - target) / max(abs(target), mp.mpf(eps))


def msle_loss(input: Any, target: Any) -> Any:
    return log((1 + input) / (1 + target)) ** 2


def squared_hinge_loss(input: Any, target: Any) -> Any:
    return max(mp.zero, 1 - target * input) ** 2


def exponential_loss(input: Any, target: Any) -> Any:
    return exp(-target * input)


def sigmoid_focal_loss(input: Any, target: Any, alpha: Any = 0.25, gamma: Any = 2) -> Any:
    rest = (target + (1 - target) * exp(input)) / (1 + exp(input))
    balance = alpha * target + (1 - alpha) * (1 - target) if alpha >= 0 else 1
    entropy = target * softplus(-input) + (1 - target) * softplus(input)
    return balance * entropy * (rest**gamma if gamma else 1)


# Scores of classes


def log_sum_exp(scores: Any) -> Any:
    return log(sum(exp(x) for x in scores))


def rest(scores: Any, target: Any) -> Any:
    """The probability of all classes but one."""
    terms = [exp(x) for x in scores]
    return sum(t for k, t in enumerate(terms) if k != target) / sum(terms)


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    label_smoothing: Any = 0,
    softcap: Any = None,
    lse_square_scale: Any = 0,
) -> Any:
    scores = input if softcap is None else [softcap * mp.tanh(x / softcap) for x in input]
    total, classes = log_sum_exp(scores), range(len(scores))
    q = target if hasattr(target, "__len__") else [int(c == target) for c in classes]
    q = [(1 - label_smoothing) * q[c] + label_smoothing / len(scores) for c in classes]
    w = [1] * len(scores) if weight is None else weight
    value = sum(w[c] * q[c] * (total - scores[c]) for c in classes)
    return value + lse_square_scale * total**2


def focal_cross_entropy(input: Any, target: Any, gamma: Any = 2, **more: Any) -> Any:
    return rest(input, target) ** gamma * cross_entropy(input, target, **more)


def poly1_cross_entropy(input: Any, target: Any, epsilon: Any = 1, weight: Any = None, **more: Any) -> Any:
    w = 1 if weight is None else weight[target]
    return cross_entropy(input, target, weight, **more) + epsilon * w * rest(input, target)


def generalized_cross_entropy(input: Any, target: Any, q: Any = 0.7, weight: Any = None) -> Any:
    w = 1 if weight is None else weight[target]
    return w * (1 - exp(q * (input[target] - log_sum_exp(input)))) / q


def nll_loss(input: Any, target: Any, weight: Any = None) -> Any:
    return -input[target] * (1 if weight is None else weight[target])


def linear_cross_entropy(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, **more: Any
) -> Any:
    scores = linear_weight @ input
    return cross_entropy(scores if linear_bias is None else scores + linear_bias, target, **more)


def multi_margin_loss(input: Any, target: Any, p: int = 1, margin: Any = 1, weight: Any = None) -> Any:
    hinges = [max(mp.zero, margin - input[target] + x) ** p for c, x in enumerate(input) if c != target]
    return (1 if weight is None else weight[target]) * sum(hinges) / len(input)


def multilabel_margin_loss(input: Any, target: Any) -> Any:
    labels = [*target, -1]
    labels = labels[: labels.index(-1)]
    others = [x for c, x in enumerate(input) if c not in labels]
    return sum((max(mp.zero, 1 - input[y] + x) for y in labels for x in others), mp.zero) / len(input)


def multilabel_soft_margin_loss(input: Any, target: Any, weight: Any = None) -> Any:
    w = [1] * len(input) if weight is None else weight
    terms = (binary_cross_entropy_with_logits(x, y) for x, y in zip(input, target, strict=True))
    return sum(w * term for w, term in zip(w, terms, strict=True)) / len(input)


# Vectors


def norm(x: Any, p: Any = 2) -> Any:
    if mp.isinf(p):
        return max(abs(x))
    return sqrt(x @ x) if p == 2 else sum(abs(x) ** p) ** (1 / mp.mpf(p))


def cosine(x: Any, y: Any) -> Any:
    return (x @ y) / sqrt((x @ x + COSINE_EPS) * (y @ y + COSINE_EPS))


def cosine_embedding_loss(input1: Any, input2: Any, target: Any, margin: Any = 0) -> Any:
    cos = cosine(input1, input2)
    return 1 - cos if target == 1 else max(mp.zero, cos - margin)


def contrastive_loss(input1: Any, input2: Any, target: Any, margin: Any = 1) -> Any:
    d = norm(input1 - input2)
    return (target * d**2 + (1 - target) * max(mp.zero, margin - d) ** 2) / 2


DISTANCES = {
    None: lambda x, y: norm(x - y + DISTANCE_EPS),
    "sqeuclidean": lambda x, y: (x - y) @ (x - y),
    "cosine": lambda x, y: 1 - cosine(x, y),
    "manhattan": lambda x, y: norm(x - y, 1),
}


def triplet_margin_with_distance_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    distance_function: Any = None,
    margin: Any = 1,
    swap: bool = False,
) -> Any:
    d = distance_function if callable(distance_function) else DISTANCES[distance_function]
    far = min(d(anchor, negative), d(positive, negative)) if swap else d(anchor, negative)
    return max(mp.zero, margin + d(anchor, positive) - far)


def triplet_margin_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    margin: Any = 1,
    p: Any = 2,
    eps: Any = DISTANCE_EPS,
    swap: bool = False,
) -> Any:
    return triplet_margin_with_distance_loss(
        anchor, positive, negative, lambda x, y: norm(x - y + eps, p), margin, swap
    )


# Sequences


def ctc_loss(log_probs: Any, targets: Any, blank: int = 0) -> Any:
    """The probability of each beginning of the labels, with blanks between them, frame after frame."""
    symbols = [blank, *(s for label in targets for s in (label, blank))]
    reached = [mp.one] + [mp.zero] * len(symbols)  # before the first frame, when nothing was said
    for frame in log_probs:
        before, reached = reached, [mp.zero]
        for s, symbol in enumerate(symbols, start=1):
            paths = [before[s], before[s - 1]]
            if s > 1 and symbol not in (blank, symbols[s - 3]):  # another label may come without a blank
                paths.append(before[s - 2])
            reached.append(exp(frame[symbol]) * sum(paths))
    return -log(sum(reached[-2:]))


# A function whose derivatives are the gradient, where that is not the loss's: by convention ctc_loss has the
# gradient by the scores whose log-softmax its argument is.
ANTIDERIVATIVES = {
    "ctc_loss": lambda log_probs, *args, **options: (
        ctc_loss(log_probs, *args, **options) + sum(exp(x) for x in log_probs.flat)
    ),
}

# What results are differences of, by loss and argument, where arguments do not tell: an ulp of it is no
# fault. The gradient of ctc_loss is a class's probability less that of the alignments that have the class
# there; by a target it is softplus(-x) - softplus(x).
SIZES = {
    ("ctc_loss", "log_probs"): mp.one,
    ("binary_cross_entropy_with_logits", "target"): mp.one,
    ("multilabel_soft_margin_loss", "target"): mp.one,
}

# Where a gradient is a convention and no derivative, by loss and argument.
CONVENTIONS = {
    ("binary_cross_entropy", "input"): lambda input, **more: input * (1 - input) < LOWEST_BCE_DENOMINATOR,
    ("binary_cross_entropy", "target"): lambda input, **more: (
        input in (0, 1) or min(log(input), log(1 - input)) < LOWEST_BCE_LOG
    ),
    ("gaussian_nll_loss", "var"): lambda var, eps=1e-6, **more: var <= eps,
}
