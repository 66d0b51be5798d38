"""Whether a call has the same bits in every mode, on every kind of processor.

    python -m numbaloss.bench.bits [LOSS ...] [--processors NAME ...] [--markdown FILE]

Each call of ``value_and_grad`` is made again in other ways: for the value or the gradient alone, with the
curvature, in place, on one thread, of slices, with options at their neutral value, inside compiled code. All
must give the same bits. With processors that LLVM knows (``haswell``, ``nehalem``, ``skylake-avx512``; as
``NUMBA_CPU_NAME``) all is done again, compiled for each, and the bits are compared with this processor's.
Those of elementwise losses are promised to be equal on all processors that fuse products with sums, but for
functions of libm.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numba
import numpy as np

import numbaloss as nl

from .cases import casted, family_of
from .report import markdown

Call = dict[str, Any]
PLAIN = "value_and_grad"
SHAPES = {"elementwise": (1037,), "classes": (67, 19), "margins": (67, 19), "vectors": (67, 37)}
LARGE = {"elementwise": (50_021,), "classes": (701, 61), "margins": (701, 61), "vectors": (701, 61)}


def tuple_of(found: Any) -> tuple[Any, ...]:
    """One array or several, as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def digest(array: Any) -> str:
    """Few letters that stand for an array's bits."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=6).hexdigest()


def calls(loss: Any, dtype: np.dtype) -> Iterator[tuple[str, Call, Call]]:
    """Names of calls, with their arrays and keywords."""
    family = family_of(loss)
    rng = np.random.default_rng(0)
    for shape in (SHAPES.get(family.name, family.tiny), LARGE.get(family.name, family.quick[0])):
        arrays = casted(family.draw(loss, rng, shape), dtype)
        yield f"{shape}", arrays, {}
        if family.name != "linear":
            rows = np.shape(loss(**arrays, reduction="none"))
            weights = rng.uniform(0.5, 2, rows).astype(dtype)
            yield f"{shape} sample_weight", arrays, {"sample_weight": weights}
            yield f"{shape} none", arrays, {"reduction": "none"}
            yield f"{shape} sum", arrays, {"reduction": "sum", "grad_output": 1.5}


def strided(a: np.ndarray) -> np.ndarray:
    """A slice with the same elements."""
    return np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a


def neutral(loss: Any, arrays: Call, given: Call) -> Call:
    """Options at values that change nothing."""
    family = family_of(loss)
    first = next(iter(arrays.values()))
    options: Call = {}
    if family.name != "linear" and "sample_weight" not in given:
        options["sample_weight"] = np.ones(np.shape(loss(**arrays, reduction="none")), first.dtype)
    if "grad_output" not in given and given.get("reduction") != "none":
        options["grad_output"] = 1.0
    return options


def ways(loss: Any, arrays: Call, given: Call) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """Names of ways to make a call, and functions that give value and gradients, or None for one of them."""
    valued = {n: v for n, v in given.items() if n != "grad_output"}
    wrt = tuple_of(loss.Class._default_wrt())

    def in_place() -> Any:
        copies = {n: a.copy() for n, a in arrays.items()}
        out = tuple(copies[n] for n in wrt)
        return loss.value_and_grad(**copies, **given, out=out if len(out) > 1 else out[0])

    def on_one_thread() -> Any:
        before = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            return loss.value_and_grad(**arrays, **given)
        finally:
            numba.set_num_threads(before)

    yield PLAIN, lambda: loss.value_and_grad(**arrays, **given)
    yield "value", lambda: (loss(**arrays, **valued), None)
    yield "grad", lambda: (None, loss.grad(**arrays, **given))
    if loss.Class._curved and len(wrt) == 1:
        yield "value_grad_hess", lambda: loss.value_grad_hess(**arrays, **given)[:2]
    yield "in place", in_place
    yield "one thread", on_one_thread
    yield "neutral options", lambda: loss.value_and_grad(**arrays, **given, **neutral(loss, arrays, given))
    if family_of(loss).name != "linear":
        slices = {n: strided(a) for n, a in arrays.items()}
        yield "slices", lambda: loss.value_and_grad(**slices, **given)
    # Compiled code takes its matrix products from another library than NumPy does.
    if not given and family_of(loss).name != "linear":
        yield "jit", lambda: inside_compiled_code(loss, arrays)


def inside_compiled_code(loss: Any, arrays: Call) -> tuple[Any, Any]:
    """The value and the gradients, from the function that users call in compiled code.

    An elementwise loss gives the gradient by its first argument there.
    """
    wrt = tuple_of(loss.Class._default_wrt())
    wrt = wrt[:1] if family_of(loss).name == "elementwise" else wrt
    out = tuple(np.empty_like(arrays[n]) for n in wrt)
    value = loss.jit(*arrays.values(), out=out if len(out) > 1 else out[0])
    return out[0].dtype.type(value), out  # a float64 there


def digests(losses: list[str], dtypes: tuple[str, ...] = ("float32", "float64")) -> dict[str, Any]:
    """For each call and way, digests of the value and of the gradients."""
    found: dict[str, Any] = {}
    for name in losses:
        loss = nl.registry[name]
        for dtype in dtypes:
            for call, arrays, given in calls(loss, np.dtype(dtype)):
                made = found[f"{name} {dtype} {call}"] = {}
                for way, function in ways(loss, arrays, given):
                    value, gradients = function()
                    made[way] = [
                        None if value is None else digest(value),
                        None if gradients is None else [digest(g) for g in tuple_of(gradients)],
                    ]
    return found


def differing(made: dict[str, Any]) -> list[str]:
    """The ways of one call that have other bits than the plain one."""
    value, gradients = made[PLAIN]
    return [
        way
        for way, (v, g) in made.items()
        if (v is not None and v != value) or (g is not None and g != gradients[: len(g)])
    ]


def on_processor(name: str, losses: list[str]) -> dict[str, Any]:
    """The digests, compiled for a processor in a process of its own; "native" is the one at hand."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        if name != "native":
            environment |= {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
        command = [sys.executable, "-m", "numbaloss.bench.bits", "--digests", *losses]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each loss: on each processor, whether all ways agree, and with the first processor's bits."""
    first = next(iter(found))
    rows = []
    for loss in dict.fromkeys(call.split()[0] for call in found[first]):
        row = [loss]
        for processor, made in found.items():
            own = {call: ways for call, ways in made.items() if call.split()[0] == loss}
            wrong = sorted({way for ways in own.values() for way in differing(ways)})
            same = all(found[first][call][PLAIN] == ways[PLAIN] for call, ways in own.items())
            row.append(", ".join(wrong) or ("equal" if processor == first or same else "equal; own bits"))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("losses", nargs="*")
    parser.add_argument("--processors", nargs="+", default=["native"], metavar="NAME")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--digests", action="store_true", help="print this processor's digests as JSON")
    options = parser.parse_args(arguments)
    losses = options.losses or list(nl.registry)
    if options.digests:
        print(json.dumps(digests(losses)))
        return 0
    names = options.processors
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        found = dict(zip(names, pool.map(on_processor, names, repeat(losses)), strict=True))
    rows = table(found)
    text = markdown(["loss", *names], rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return int(any(not cell.startswith("equal") for row in rows for cell in row[1:]))


if __name__ == "__main__":
    sys.exit(main())
