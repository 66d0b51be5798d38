"""Results of good calls: against PyTorch on random options, and after changes that change nothing."""

import importlib.util
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

import numbaloss as nl
from numbaloss.bench.cases import casted, family_of

from . import Tally, Trial
from .calls import array_option

TORCH = importlib.util.find_spec("torch") is not None
# About a million elements of each family, then fewer.
LARGE = {
    "elementwise": (1000, 1000),
    "classes": (4000, 250),
    "margins": (10_000, 100),
    "vectors": (8000, 128),
    "sequence": (100, 50, 200, 20),
    "linear": (1000, 100, 1000),
}
SMALL = {
    "elementwise": (300, 40),
    "classes": (300, 40),
    "margins": (300, 40),
    "vectors": (300, 40),
    "sequence": (20, 30, 12, 6),
    "linear": (60, 20, 50),
}
# Of terms and slopes of usual size; both sides round, and PyTorch sums in its own order and in float32.
ROUNDINGS = 512


def names(found: str | tuple[str, ...]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else found


def draw(
    k: random.Random, name: str, dtype: Any, shape: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw arrays and options of a loss, those that PyTorch has."""
    loss = nl.registry[name]
    rng = np.random.default_rng(k.getrandbits(32))
    arrays = casted(family_of(loss).draw(loss, rng, shape), np.dtype(dtype))
    options = {n: k.choice(f.samples) for n, f in loss.Class.fields.items() if f.samples and k.random() < 0.6}
    for beyond in ("options", "softcap", "lse_square_scale"):
        options.pop(beyond, None)
    for n, f in loss.Class.fields.items():
        if f.array and k.random() < 0.4:
            arrays[n] = array_option(loss, n, arrays, rng).astype(dtype)
    if name == "cross_entropy" and k.random() < 0.3:
        q = rng.uniform(0, 1, arrays["input"].shape)
        arrays["target"] = (q / q.sum(axis=1, keepdims=True)).astype(dtype)
        options.pop("ignore_index", None)  # which PyTorch refuses beside probabilities
    return arrays, options


def of_torch(name: str, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, list[np.ndarray]]:
    """PyTorch's value, and its gradients by the arguments that a model produces."""
    import torch
    import torch.nn.functional as F

    by_distance = {
        "sqeuclidean": lambda a, b: ((a - b) ** 2).sum(-1),
        "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
        "manhattan": lambda a, b: (a - b).abs().sum(-1),
    }
    options = dict(options)
    if options.get("distance_function") == "euclidean":
        options["distance_function"] = None
    if options.get("distance_function"):
        options["distance_function"] = by_distance[options["distance_function"]]
    if options.get("ignore_index", 0) is None:
        del options["ignore_index"]
    wrt = names(nl.registry[name].Class._default_wrt())
    tensors = {n: torch.tensor(a, requires_grad=n in wrt) for n, a in arrays.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")  # of kl_div
        value = getattr(F, name)(**tensors, **options)
    value.sum().backward()
    return value.detach().numpy(), [tensors[n].grad.numpy() for n in wrt]


def gap(got: Any, wanted: Any, dtype: Any, size: float | None = None) -> float:
    """The largest difference, in roundings of the numbers and of their usual size."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        return np.inf
    if not got.size:
        return 0.0
    with np.errstate(all="ignore"):
        size = float(np.sqrt(np.mean(np.square(wanted)))) if size is None else size
        apart = np.abs(got - wanted) / (float(np.finfo(dtype).eps) * (np.abs(wanted) + size) + 1e-300)
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    return float(np.where(same, 0, np.where(np.isnan(apart), np.inf, apart)).max())


def against_torch(share: float) -> Tally:
    """Every loss with random options and a million elements, in float32 and float64."""
    tally = Tally()
    if not TORCH:
        return tally
    import torch.nn.functional as F

    k = random.Random("PyTorch")
    for name in (n for n in sorted(nl.registry) if hasattr(F, n)):
        loss = nl.registry[name]
        shape = (LARGE if share == 1 else SMALL)[family_of(loss).name]
        for number in range(max(1, round(6 * share))):
            dtype = (np.float64, np.float32)[number % 2]
            arrays, options = draw(k, name, dtype, shape)
            said = f"{name}({', '.join(arrays)}, {options}) {np.dtype(dtype)}"
            value, gradients = of_torch(name, arrays, options)
            got, found = loss.value_and_grad(**arrays, **options, wrt=names(loss.Class._default_wrt()))
            apart = [
                gap(got, value, dtype),
                *(gap(g, w, dtype) for g, w in zip(found, gradients, strict=True)),
            ]
            tally.tried += 1
            allowed = ROUNDINGS
            if name == "ctc_loss":
                # PyTorch adds logarithms as large as a row's loss, and its gradients have their roundings.
                allowed += 32 * float(np.max(loss(**arrays, **{**options, "reduction": "none"})))
            if max(apart) > allowed:
                tally.lost.append(f"{said}: {', '.join(f'{a:.0f}' for a in apart)} roundings from PyTorch")
    return tally


# ---- invariants -------------------------------------------------------------------------------------------


def rows_of(loss: Any, arrays: dict[str, Any]) -> int:
    first = next(iter(arrays.values()))
    return first.shape[family_of(loss).batch.get(next(iter(arrays)), 0) or 0]


def taken(loss: Any, arrays: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The arguments, of some rows in some order."""
    batch = family_of(loss).batch
    axes = {n: batch.get(n, 0) for n in arrays}
    return {n: a if axes[n] is None else np.take(a, rows, axis=axes[n]) for n, a in arrays.items()}


def permuted(loss: Any, arrays: dict[str, Any], k: random.Random) -> Iterator[tuple[str, float]]:
    """Rows in another order have the same terms and slopes, in that order; and the same sum."""
    order = np.random.default_rng(k.getrandbits(32)).permutation(rows_of(loss, arrays))
    there = taken(loss, arrays, order)
    wrt = names(loss.Class._default_wrt())
    terms, gradients = loss.value_and_grad(**arrays, reduction="none", wrt=wrt)
    again, found = loss.value_and_grad(**there, reduction="none", wrt=wrt)
    yield "terms of permuted rows", gap(again, terms[order], terms.dtype)
    wanted = taken(loss, dict(zip(wrt, gradients, strict=True)), order)
    for n, g in zip(wrt, found, strict=True):
        yield f"slopes by {n} of permuted rows", gap(g, wanted[n], terms.dtype)
    yield (
        "sum of permuted rows",
        gap(loss(**there, reduction="sum"), loss(**arrays, reduction="sum"), terms.dtype),
    )


def scaled(loss: Any, arrays: dict[str, Any], k: random.Random) -> Iterator[tuple[str, float]]:
    """Weights four times as large: four times the sum, the same mean; to the last bit."""
    terms = loss(**arrays, reduction="none")
    weights = np.random.default_rng(k.getrandbits(32)).uniform(0.5, 2, terms.shape).astype(terms.dtype)
    for reduction, factor in (("sum", 4), ("mean", 1)):
        value, gradient = loss.value_and_grad(**arrays, reduction=reduction, sample_weight=weights)
        again, found = loss.value_and_grad(**arrays, reduction=reduction, sample_weight=4 * weights)
        yield f"{reduction} of scaled weights", gap(again, factor * value, terms.dtype)
        many = isinstance(found, tuple)
        for g, w in zip(found if many else (found,), gradient if many else (gradient,), strict=True):
            yield f"slopes of a {reduction} of scaled weights", gap(g, factor * w, terms.dtype)


def split(loss: Any, arrays: dict[str, Any], k: random.Random) -> Iterator[tuple[str, float]]:
    """Parts of a batch, each divided by the whole's count, add up to the whole."""
    rows = rows_of(loss, arrays)
    cut = k.randrange(1, rows)
    parts = [taken(loss, arrays, r) for r in (np.arange(cut), np.arange(cut, rows))]
    count = float(np.size(loss(**arrays, reduction="none")))
    wrt = names(loss.Class._default_wrt())
    value, gradients = loss.value_and_grad(**arrays, wrt=wrt)
    made = [loss.value_and_grad(**p, normalizer=count, wrt=wrt) for p in parts]
    dtype = gradients[0].dtype
    yield "mean of a split batch", gap(made[0][0] + made[1][0], value, dtype)
    for n, name in enumerate(wrt):
        axis = family_of(loss).batch.get(name, 0)
        pair = [m[1][n] for m in made]
        whole = pair[0] + pair[1] if axis is None else np.concatenate(pair, axis=axis)
        yield f"slopes by {name} of a split batch", gap(whole, gradients[n], dtype)


def invariants(share: float) -> Tally:
    """Permuted rows, scaled weights, split batches: of each loss, in each dtype that has eps."""
    tally = Tally()
    for name, loss in sorted(nl.registry.items()):
        for number in range(max(1, round(20 * share))):
            k = random.Random(f"{name} {number}")
            rng = np.random.default_rng(number)
            family = family_of(loss)
            dtype = np.dtype((np.float64, np.float32)[number % 2])
            arrays = casted(family.draw(loss, rng, SMALL[family.name]), dtype)
            for change in (permuted, scaled, split):
                tally.tried += 1
                tally.lost += [
                    f"{name} {dtype}: {said}: {apart:.0f} roundings"
                    for said, apart in change(loss, arrays, k)
                    if apart > 16
                ]
    return tally


TRIALS = [
    Trial("PyTorch's results, random options", against_torch),
    Trial("permuted, scaled, split", invariants),
]
