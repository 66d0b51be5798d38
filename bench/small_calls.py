"""Microseconds of mini-batch calls, plain and with each option, against PyTorch's.

    python -m numbaloss.bench.small_calls [LOSS ...] [--markdown FILE]

Each option's call of ``value_and_grad`` is timed beside the plain call of the same loss and, where PyTorch
is installed and has the option, beside its forward and backward pass, warm, all in turn in one process.
Wanted: at most twice the plain call, and PyTorch's time at least four times ours (geometric mean: eight).
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import numbaloss as nl

from . import machine
from .cases import Case, family_of
from .measure import Side, interleave
from .report import markdown, tables_of_losses

# About a thousand elements.
SHAPES = {
    "elementwise": (64, 20),
    "classes": (64, 20),
    "margins": (64, 20),
    "vectors": (32, 32),
    "sequence": (20, 4, 12, 5),
    "linear": (16, 16, 40),
}
RUNS, CALLS = 21, 200

Arguments = dict[str, Any]


def strided(a: np.ndarray) -> np.ndarray:
    """A slice with the same elements."""
    return np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a


def floats(arguments: Arguments, change: Callable[[np.ndarray], np.ndarray]) -> Arguments:
    """The arguments, their floating arrays changed."""
    return {n: change(a) if a.dtype.kind == "f" else a for n, a in arguments.items()}


def variants(loss: Any, arguments: Arguments) -> Iterator[tuple[str, Arguments, Arguments]]:
    """Names of options, with the arrays and the keywords of a call that has them."""
    fields, rng = loss.Class.fields, np.random.default_rng(1)
    first = next(iter(arguments.values()))
    terms = np.shape(loss(*arguments.values(), reduction="none"))
    yield "plain", arguments, {}
    yield "reduction='none'", arguments, {"reduction": "none"}
    yield "reduction='sum'", arguments, {"reduction": "sum"}
    yield "float16", floats(arguments, lambda a: a.astype(np.float16)), {}
    if first.ndim > 1:
        yield "Fortran order", {n: np.asfortranarray(a) for n, a in arguments.items()}, {}
    yield "slices", {n: strided(a) for n, a in arguments.items()}, {}
    yield "sample_weight", arguments, {"sample_weight": rng.random(terms, np.float32)}
    yield "grad_output", arguments, {"grad_output": 0.5}
    yield "out", arguments, {"out": out_of(loss, arguments)}
    for name in ("weight", "pos_weight"):
        if name in fields:
            classes = name == "pos_weight" or family_of(loss).name in ("classes", "margins", "linear")
            size = arguments["linear_weight"].shape[0] if "linear_weight" in arguments else first.shape[-1]
            shape = (size,) if classes else first.shape
            yield name, arguments, {name: rng.random(shape, np.float32)}
    if "label_smoothing" in fields:
        yield "label_smoothing", arguments, {"label_smoothing": 0.1}
        if "linear_weight" not in arguments and takes_probabilities(loss):
            q = rng.dirichlet(np.ones(first.shape[1]), first.shape[0]).astype(np.float32)
            yield "probabilities", {**arguments, "target": q}, {}
    if "var" in arguments:
        yield "var broadcast", {**arguments, "var": arguments["var"][:, :1].copy()}, {}


def takes_probabilities(loss: Any) -> bool:
    """Whether a loss of class scores is one of probabilities, too, not of a single class alone."""
    try:
        loss(np.zeros((1, 2)), np.full((1, 2), 0.5))
    except TypeError:
        return False
    return True


def out_of(loss: Any, arguments: Arguments) -> Any:
    """What `out` takes."""
    wrt = loss.Class._default_wrt()
    return (
        np.empty_like(arguments[wrt])
        if isinstance(wrt, str)
        else tuple(np.empty_like(arguments[n]) for n in wrt)
    )


def eager(loss: Any, arguments: Arguments, keywords: Arguments) -> Callable[[], Any] | None:
    """PyTorch's forward and backward pass of the same call; None where it has not the option."""
    try:
        import torch
    except ImportError:
        return None
    own = {"sample_weight", "out", "grad_output"}
    if own & keywords.keys():
        return None
    names = loss.Class._default_wrt()
    wrt = (names,) if isinstance(names, str) else names
    function = getattr(torch.nn.functional, loss.__name__, None)
    if function is None:
        return None

    def tensor(name: str, a: Any) -> Any:
        if not isinstance(a, np.ndarray):
            return a
        made = torch.from_numpy(a) if a.dtype.kind != "i" else torch.from_numpy(a).long()
        return made.requires_grad_() if name in wrt else made

    tensors = {n: tensor(n, a) for n, a in arguments.items()}
    options = {n: tensor(n, a) for n, a in keywords.items()}
    leaves = [tensors[n] for n in wrt]

    def call() -> Any:
        value = function(*tensors.values(), **options)
        return torch.autograd.grad(value.sum() if value.ndim else value, leaves)

    warnings.filterwarnings("ignore", "reduction: 'mean' divides", UserWarning)  # of kl_div
    try:
        call()
    except (RuntimeError, TypeError, ValueError):
        return None
    return call


def rows(name: str) -> list[tuple[str, str, float, float, float | None]]:
    """Of each option: seconds of a call, that over the plain call's, and PyTorch's over it."""
    loss = nl.registry[name]
    case = Case(name, SHAPES[family_of(loss).name])
    made = []
    plain = None
    for option, arguments, keywords in variants(loss, case.arrays()):
        operands = tuple(arguments.values())
        call = lambda operands=operands, keywords=keywords: loss.value_and_grad(*operands, **keywords)
        plain = plain or call
        sides = {"ours": Side(call, RUNS, CALLS), "plain": Side(plain, RUNS, CALLS)}
        peer = eager(loss, arguments, keywords)
        if peer is not None:
            sides["torch"] = Side(peer, RUNS, CALLS // 4)
        for side in sides.values():
            side.call()
            side.call()
        m = {n: statistics.median(t) for n, t in interleave(sides).items()}
        ratio = m["torch"] / m["ours"] if "torch" in m else None
        made.append((name, option, m["ours"], m["ours"] / m["plain"], ratio))
    return made


def report(losses: list[str]) -> str:
    """The table, in Markdown, and the geometric mean of PyTorch's ratios."""
    measured = [row for name in losses for row in rows(name)]
    ratios = [r for *_, r in measured if r is not None]
    text = machine.heading("torch") + "\n"
    text += markdown(
        ["loss", "option", "us", "/ plain (2)", "torch / ours (4)"],
        [
            [n, o, f"{s * 1e6:.2f}", f"{p:.2f}", "-" if r is None else f"{r:.1f}"]
            for n, o, s, p, r in measured
        ],
    )
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        text += f"\nGeometric mean of torch / ours: {mean:.1f} (8).\n"
    return text


if __name__ == "__main__":
    tables_of_losses(__doc__, report, nl.registry)
