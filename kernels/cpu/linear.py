"""Cross entropy of a linear layer's scores, by chunks: NumPy's product, and the kernels of `scores`."""

import math
from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ..chunks import chunk_rows, product_columns
from ..lift import scales_with_masses
from ..spec import DOUBLE, MISSING, Linear, Scores, Weighting, bad_index
from . import launch
from . import scores as scores_of

Index = slice | np.ndarray


class Part(NamedTuple):
    """Some rows and positions of a problem, as if it had both: without them, they are of length one."""

    input: np.ndarray  # (rows, features)
    linear_weight: np.ndarray  # (classes, positions, features)
    linear_bias: np.ndarray | None  # (classes, positions)
    target: np.ndarray  # indices (rows, positions) in int64, or probabilities (rows, classes, positions)
    live: np.ndarray  # (rows, positions): the terms that count; of others nothing is read
    sample_weight: np.ndarray | None  # (rows, positions)
    upstream: np.ndarray | None  # (rows, positions)

    @property
    def matrix(self) -> np.ndarray:
        """The weight, a row for each score."""
        classes, positions, features = self.linear_weight.shape
        return self.linear_weight.reshape(classes * positions, features)

    def cut(self, rows: Index, positions: slice, dtype: np.dtype) -> "Part":
        """Return the part of some rows and positions."""

        def of(terms: Any) -> Any:
            return None if terms is None else terms[rows][..., positions]

        return Part(
            np.ascontiguousarray(self.input[rows], dtype),
            self.linear_weight[:, positions],
            None if self.linear_bias is None else self.linear_bias[:, positions],
            of(self.target),
            of(self.live),
            of(self.sample_weight),
            of(self.upstream),
        )


def settle(p: Linear) -> tuple[Part, float]:
    """Return the whole problem as a part, with the terms that count, and what their sum is divided by."""
    classes, features = p.linear_weight.shape[0], p.linear_weight.shape[-1]
    batch, positions = math.prod(p.input.shape[:-1]), math.prod(p.linear_weight.shape[1:-1])

    def over_rows(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.broadcast_to(array, p.shape).reshape(batch, positions)

    sample_weight = over_rows(p.weighting.sample_weight)
    row_weight: Any = 1.0 if sample_weight is None else sample_weight.astype(np.float64)
    own: Any = 1.0
    if p.has_probabilities:
        target, counted = p.target.reshape(batch, classes, positions), np.ones((batch, positions), bool)
    else:
        _check_indices(p, classes)
        target = p.target.reshape(batch, positions)
        counted = target != p.ignore_index
        target = np.where(counted, target, 0).astype(np.int64)
        if p.weight is not None:
            own = p.weight.astype(np.float64)[target]
    needs_weight = not p.label_smoothing and scales_with_masses(p)
    divisor = p.weighting.divisor
    if divisor is None:
        divisor = float(np.where(counted, row_weight * own, 0.0).sum())
    whole = Part(
        p.input.reshape(batch, features),
        p.linear_weight.reshape(classes, positions, features),
        None if p.linear_bias is None else p.linear_bias.reshape(classes, positions),
        target,
        counted & (row_weight != 0) & ((own != 0) | (not needs_weight)),
        sample_weight,
        over_rows(p.weighting.upstream),
    )
    return whole, divisor


def _check_indices(p: Linear, classes: int) -> None:
    wrong = (p.target != p.ignore_index) & ((p.target < 0) | (p.target >= classes))
    if wrong.any():
        index = tuple(map(int, np.unravel_index(wrong.argmax(), p.shape)))
        raise bad_index(p.name, index, p.target[index], classes, "linear_weight")


# ---- chunks -------------------------------------------------------------------------------------------


def chunks(rows: np.ndarray, total: int, height: int) -> Iterator[Index]:
    """Yield the rows that count, `height` at a time."""
    for k in range(0, len(rows), height):
        yield slice(k, min(k + height, total)) if len(rows) == total else rows[k : k + height]


def pieces(live: np.ndarray) -> Iterator[tuple[Index, slice]]:
    """Yield rows and positions of each product: all at once; by position, where some do not count."""
    positions = live.shape[1]
    if live.all():
        yield slice(None), slice(0, positions)
        return
    for k in range(positions):
        rows = np.flatnonzero(live[:, k])
        if rows.size:
            yield rows, slice(k, k + 1)


# ---- products -----------------------------------------------------------------------------------------


def is_matrix(array: np.ndarray) -> bool:
    """Return whether NumPy's matrix product takes an array (C, ..., F) as it lies."""
    flags = array.flags
    return flags.c_contiguous or (flags.f_contiguous and array.size == array.shape[0] * array.shape[-1])


class ProductSum:
    """The sum over chunks of ``g.T @ x``, the gradient of the weight.

    NumPy's matrix product does not add to an array: a product is made of some classes at a time, in memory
    that stays in cache.
    """

    def __init__(self, out: np.ndarray, weight: np.ndarray, scratch: int) -> None:
        classes, positions, features = weight.shape
        direct = out.dtype == weight.dtype and is_matrix(out) and not np.may_share_memory(out, weight)
        self.out = out
        self.sum = out.reshape(weight.shape) if direct else np.empty(weight.shape, weight.dtype)
        self.fresh = True
        self.order: Any = "C" if self.sum.flags.c_contiguous else "F"
        self.step = product_columns(classes * positions, features * weight.itemsize, scratch)
        self.scratch = np.empty(self.step * features, weight.dtype)

    def add(self, g: np.ndarray, x: np.ndarray, positions: slice) -> None:
        into = self.sum[:, positions].reshape(g.shape[1], x.shape[1])
        if self.fresh and into.size == self.sum.size:
            np.matmul(g.T, x, out=into)
        else:
            self._clear()
            for k in range(0, len(into), self.step):
                some = into[k : k + self.step]
                product = self.scratch[: some.size].reshape(some.shape, order=self.order)
                some += np.matmul(g[:, k : k + self.step].T, x, out=product)
        self.fresh = False

    def finish(self) -> None:
        self._clear()
        if not np.may_share_memory(self.out, self.sum):
            self.out[...] = self.sum.reshape(self.out.shape)

    def _clear(self) -> None:
        if self.fresh:
            self.sum[...] = 0


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Linear, outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradients by their arguments' names; return the value, or the terms."""
    whole = in_one_chunk(p, outputs)
    if whole is not None:
        result = whole(arguments_of(p), outputs)
        if result is not MISSING:
            return result
    with np.errstate(all="ignore"):  # NumPy warns of products with what is not finite
        return _run(p, outputs)


def _run(p: Linear, outputs: dict[str, np.ndarray]) -> Any:
    dtype: Any = p.arithmetic
    whole, divisor = settle(p)
    w = whole.linear_weight
    classes, positions, _ = w.shape
    if w.dtype != dtype or not is_matrix(w):
        w = np.ascontiguousarray(w, dtype)
    bias = whole.linear_bias
    whole = whole._replace(linear_weight=w, linear_bias=None if bias is None else bias.astype(dtype))
    # The sum of terms, or these: what the mean divides by is in the factor.
    reduced = p.weighting.reduction != "none"
    weighting = Weighting(
        "sum" if reduced else "none", factor=float(p.weighting.factor / np.float64(divisor))
    )
    counted: Any = whole.live.any(axis=1)
    rows = np.flatnonzero(counted)
    # As large as the scores are two more arrays for the gradient by probabilities, six for that by class
    # weights (some of them float64), and the probabilities that are gathered.
    gathered = p.has_probabilities and len(rows) < len(counted)
    arrays = 1 + 2 * ("target" in outputs) + 6 * ("weight" in outputs) + gathered
    height, scratch = chunk_rows(len(rows), arrays * classes * positions * dtype.itemsize, *p.chunking)
    memory = np.empty(min(height, len(rows)) * classes * positions, dtype)

    by_row: dict[str, np.ndarray] = {
        n: np.atleast_2d(outputs[n]) for n in ("input", "target") if n in outputs
    }
    if not reduced:
        by_row["terms"] = np.empty(whole.live.shape, dtype)
    for out in by_row.values():
        out[~counted] = 0
    products = ProductSum(outputs["linear_weight"], w, scratch) if "linear_weight" in outputs else None
    sums: dict[str, np.ndarray] = {}
    if "linear_bias" in outputs:
        sums["linear_bias"] = np.zeros((classes, positions))
    if "weight" in outputs:
        sums["weight"] = np.zeros(classes)

    def value_of(chunk: Index) -> float:
        total = 0.0
        some = whole.cut(chunk, slice(0, positions), dtype)
        shapes = {"input": some.input.shape, "target": some.target.shape, "terms": some.live.shape}
        made = {n: np.zeros(shapes[n], dtype) for n in by_row}
        for mine, at in pieces(some.live):
            part = some.cut(mine, at, dtype)
            value, g, others = run_part(p, part, weighting, outputs, memory)
            if "terms" in made:
                made["terms"][mine, at] = value
            else:
                total += value
            if "input" in made:
                made["input"][mine] += g @ part.matrix
            if "target" in made:
                made["target"][mine, :, at] = others["target"]
            if products is not None:
                products.add(g, part.input, at)
            if "linear_bias" in sums:
                sums["linear_bias"][:, at] += g.sum(axis=0).reshape(classes, -1)
            if "weight" in sums:
                sums["weight"] += others["weight"]
        # Only now: a gradient may lie over what it is made of.
        for n, out in by_row.items():
            out[chunk] = made[n].reshape(len(made[n]), *out.shape[1:])
        return total

    total = sum(value_of(chunk) for chunk in chunks(rows, len(counted), height))
    if products is not None:
        products.finish()
    for n in sums:
        outputs[n][...] = sums[n].reshape(outputs[n].shape)
    if not reduced:
        return by_row["terms"].reshape(p.shape).astype(p.dtype, copy=False)
    return p.dtype.type(total / np.float64(divisor))


# ---- small problems -----------------------------------------------------------------------------------

rows_of_chunk = lru_cache(1024)(chunk_rows)  # it takes as long as a small product

# Of a problem, in the order that `in_one_chunk` takes them; then a launch's outputs.
Arguments = tuple[Any, ...]


def arguments_of(p: Linear) -> Arguments:
    """Return a problem's arrays."""
    return p.input, p.linear_weight, p.target, p.linear_bias, p.weight, p.weighting.sample_weight


def in_one_chunk(p: Linear, outputs: dict[str, np.ndarray]) -> Callable[..., Any] | None:
    """Return a function that computes problems like this one, of one chunk; None where it cannot be.

    ``whole(arguments, outputs, new)`` writes the outputs, of which those named in `new` share no memory with
    anything, and returns the value, or the terms; `MISSING` where there are more chunks, rows that count
    nothing, or anything wrong: then nothing is written.
    """
    known = {"input", "linear_weight", "linear_bias"}
    if p.has_probabilities or p.weighting.upstream is not None or outputs.keys() - known:
        return None
    if p.input.ndim != 2 or p.linear_weight.ndim != 2 or 0 in p.input.shape:
        return None
    dtype: Any = p.arithmetic
    reduced, graded = p.weighting.reduction != "none", bool(outputs)
    rows, classes = len(p.input), len(p.linear_weight)
    if chunk_rows(rows, classes * dtype.itemsize, *p.chunking)[0] < rows:
        return None
    logits = np.empty((rows, classes), dtype)
    scores = Scores(
        p.name, p.functions, (), logits, p.target, False, p.weight, p.ignore_index, p.label_smoothing,
        p.softcap, p.lse_square_scale, p.weighting, DOUBLE if reduced else dtype, dtype,
    )  # fmt: skip
    values = logits, p.target, p.weight, p.weighting.sample_weight
    kernel = launch.repeat(scores_of, scores, {"input": logits} if graded else {}, (), values)
    if kernel is None:
        return None
    # What is returned holds no array: see `launch.repeat`.
    ignored, chunking, to = p.ignore_index, p.chunking, p.dtype

    def whole(arguments: Arguments, outputs: dict[str, np.ndarray], new: Container[str] = ()) -> Any:
        x, w, target, bias, weight, sample_weight = arguments
        if not x.ndim == w.ndim == 2 or x.shape[1] != w.shape[1] or target.shape != x.shape[:1]:
            return MISSING
        rows, classes = len(x), len(w)
        if rows_of_chunk(rows, classes * dtype.itemsize, *chunking)[0] < rows or not x.size or not classes:
            return MISSING
        if bias is not None and bias.shape != (classes,):
            return MISSING
        if np.count_nonzero(target == ignored):
            return MISSING
        if any(a is not None and np.count_nonzero(a) < a.size for a in (weight, sample_weight)):
            return MISSING
        x = x if x.dtype == dtype else x.astype(dtype)
        w = w if w.dtype == dtype and is_matrix(w) else np.ascontiguousarray(w, dtype)
        with np.errstate(all="ignore"):  # NumPy warns of products with what is not finite
            g = np.matmul(x, w.T)
            if bias is not None:
                g += bias
            found = kernel((g, target, weight, sample_weight))
            if found is MISSING:
                return MISSING
            # All before the first is stored: a gradient may lie over what it is made of.
            made: list[tuple[np.ndarray, np.ndarray]] = []
            for n, out in outputs.items():
                if n == "linear_bias":
                    made.append((out, np.add.reduce(g, axis=0)))
                    continue
                pair = (g, w) if n == "input" else (g.T, x)
                direct = out.dtype == dtype and out.flags.c_contiguous
                if direct and (n in new or not (np.may_share_memory(out, w) or np.may_share_memory(out, x))):
                    np.matmul(*pair, out=out)
                else:
                    made.append((out, np.matmul(*pair)))
            for out, result in made:
                out[...] = result
            return to.type(found[0]) if reduced else found[0].astype(to, copy=False)

    return whole


def repeat(
    p: Linear, outputs: dict[str, np.ndarray], made: tuple[str, ...], values: tuple[Any, ...]
) -> Callable[[tuple[Any, ...]], Any] | None:
    """Return a function that computes small problems like this one again: see `backend.repeat`."""
    whole = in_one_chunk(p, outputs)
    written = [o for n, o in outputs.items() if n not in made]
    given = (*arguments_of(p), *written)
    at = [next((k for k, v in enumerate(values) if v is a), None) if a is not None else -1 for a in given]
    if whole is None or None in at or launch.apart(written, values) is None:
        return None
    pick, count = itemgetter(*at), len(given) - len(written)
    like = {"input": 0, "linear_weight": 1, "linear_bias": 3}
    names = tuple(outputs)
    dtypes = {n: outputs[n].dtype for n in made}

    def again(values: tuple[Any, ...]) -> Any:
        found = pick((*values, None))
        arguments, own = found[:count], iter(found[count:])
        new = {n: np.empty_like(arguments[like[n]], dtypes[n], subok=False) for n in made}
        result = whole(arguments, {n: new[n] if n in new else next(own) for n in names}, made)
        return MISSING if result is MISSING else (result, tuple(new.values()))

    return again


def run_part(
    p: Linear, part: Part, weighting: Weighting, wanted: Container[str], memory: np.ndarray
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Return a part's value or terms; the gradient by its scores, in `memory`; those by target and weight."""
    matrix = part.matrix
    logits = memory[: len(part.input) * len(matrix)].reshape(len(part.input), len(matrix))
    np.matmul(part.input, matrix.T, out=logits)
    if part.linear_bias is not None:
        logits += part.linear_bias.reshape(-1)
    shaped = logits.reshape(len(logits), *part.linear_weight.shape[:2])
    gradients = {}
    if any(n in wanted for n in ("input", "linear_weight", "linear_bias")):
        gradients["input"] = shaped  # where the scores lie
    if "target" in wanted:
        gradients["target"] = np.empty_like(shaped)
    if "weight" in wanted:
        gradients["weight"] = np.empty(shaped.shape[1])
    scores = Scores(
        p.name,
        p.functions,
        (),
        shaped,
        part.target,
        p.has_probabilities,
        p.weight,
        p.ignore_index,
        p.label_smoothing,
        p.softcap,
        p.lse_square_scale,
        weighting._replace(sample_weight=part.sample_weight, upstream=part.upstream),
        DOUBLE if weighting.reduction == "sum" else p.arithmetic,
        p.arithmetic,
    )
    return scores_of.compute(scores, gradients), logits, gradients
