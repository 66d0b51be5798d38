"""Time the scalar functions against NumPy's: `python -m numbaloss.bench.math`.

One thread, float32, a million elements into a given array; a second column stays in cache, as a kernel's
blocks do. Runs of the two alternate, so that a change in the machine's speed meets both.
"""

from statistics import median
from time import perf_counter

import numpy as np
from numba import njit

from numbaloss.kernels import math
from numbaloss.kernels.cpu.target import LOOP, prefer_widest_vectors

NAMES = ("exp", "expm1", "log", "log1p", "sigmoid", "softplus", "log_sigmoid", "tanh", "sqrt")
SIZES = (1 << 20, 1 << 13)
WORK = 1 << 20  # elements a run visits, by repetition
RUNS = 15


def loop_over(function):
    """A loop that applies `function` to every element, compiled as the kernels' are."""

    @njit(**LOOP)
    def loop(x, out):
        prefer_widest_vectors()
        for i in range(x.size):
            out[i] = function(x[i])

    return loop


def sample(name, size):
    """Ordinary arguments from the function's domain."""
    x = (np.random.default_rng(0).standard_normal(size) * 5).astype(np.float32)
    return np.exp(x) if name in ("log", "log1p", "sqrt") else x


def compare(functions, x):
    """Median ns an element of each function, runs alternating."""
    out = np.empty_like(x)
    repeat = WORK // x.size
    times = [[] for _ in functions]
    for run in range(RUNS + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = perf_counter()
            for _ in range(repeat):
                function(x, out)
            if run:  # the first compiles
                seconds.append(perf_counter() - start)
    return [median(seconds) / WORK * 1e9 for seconds in times]


def numpy_of(name):
    """NumPy's function; of several passes where it has none of its own."""
    ufunc = getattr(np, name, None)
    if ufunc is not None:
        return lambda x, out: ufunc(x, out=out)
    plain = getattr(math, name)
    return lambda x, out: np.copyto(out, plain(x))


def against_numpy(name, size):
    """Nanoseconds an element of ours and of NumPy's."""
    return compare([loop_over(getattr(math, name)), numpy_of(name)], sample(name, size))


def main():
    print("ns/element    " + "".join(f"{f'{size} ours':>14}{'NumPy':>8}" for size in SIZES))
    for name in NAMES:
        rows = [against_numpy(name, size) for size in SIZES]
        print(f"{name:14}" + "".join(f"{ours:14.3f}{numpy:8.3f}" for ours, numpy in rows))


if __name__ == "__main__":
    main()
