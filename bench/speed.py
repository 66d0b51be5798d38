"""The speed that the README claims, line by line.

    python -m numbaloss.bench.speed [--markdown FILE] [--readme FILE]

PyTorch (2 threads) and JAX are measured where they are installed; `-` stands where one is not. All sides of a
row run in one process, one call of each after the other, and the medians are compared.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit, prange

import numbaloss as nl

from . import math as math_bench

LARGE, SMALL = 10_000_000, 100
LIGHT = ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss")
HEAVY = ("binary_cross_entropy_with_logits", "soft_margin_loss", "poisson_nll_loss", "kl_div")

LARGE_COLUMNS = [
    *("loss", "out=", "in place", "fresh", "add", "torch"),
    *("torch / out", "torch / in place", "add / out", "torch / fresh"),
]


@njit(parallel=True, nogil=True)
def add(a, b, out):
    """The yardstick: two arrays in, one out, no arithmetic to speak of."""
    for i in prange(a.size):
        out[i] = a[i] + b[i]


def medians(sides: dict[str, Callable[[], Any]], runs: int, calls: int = 1) -> dict[str, float]:
    """Median seconds of a call of each side; runs of `calls` of them are interleaved."""
    for call in sides.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, call in sides.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def samples(name: str, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    loss = nl.registry[name].Class
    return [loss.operands[n].draw(rng, size).astype(np.float32) for n in loss._required]


def torch_side(name: str, arrays: list[np.ndarray]) -> Callable[[], Any] | None:
    """Forward and backward of eager PyTorch on the same numbers."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(numba.get_num_threads())
    function = getattr(torch.nn.functional, name)
    wrt = nl.registry[name].Class._default_wrt()
    names = nl.registry[name].Class._required
    tensors = [
        torch.from_numpy(a.copy()).requires_grad_(n in wrt) for n, a in zip(names, arrays, strict=True)
    ]

    def run() -> None:
        for t in tensors:
            t.grad = None
        function(*tensors).backward()

    return run


def jax_side(name: str, arrays: list[np.ndarray]) -> Callable[[], Any] | None:
    """A jitted value_and_grad of the mean, on arrays that JAX holds already."""
    if importlib.util.find_spec("jax") is None or name not in JAX:
        return None
    import jax

    run = jax.jit(jax.value_and_grad(lambda *a: JAX[name](jax, *a).mean()))
    held = [jax.numpy.asarray(a) for a in arrays]
    return lambda: jax.block_until_ready(run(*held))


JAX: dict[str, Callable[..., Any]] = {
    "l1_loss": lambda jax, x, t: abs(x - t),
    "mse_loss": lambda jax, x, t: (x - t) ** 2,
    "huber_loss": lambda jax, x, t: jax.numpy.where(abs(x - t) <= 1, 0.5 * (x - t) ** 2, abs(x - t) - 0.5),
    "binary_cross_entropy_with_logits": lambda jax, x, t: jax.nn.softplus(x) - x * t,
    "soft_margin_loss": lambda jax, x, t: jax.nn.softplus(-x * t),
    "poisson_nll_loss": lambda jax, x, t: jax.numpy.exp(x) - x * t,
}


def ratio(a: float | None, b: float) -> str:
    return "-" if a is None else f"{a / b:.1f}"


def large(name: str) -> list[str]:
    arrays = samples(name, LARGE)
    x, rest = arrays[0], arrays[1:]
    loss, g, scratch = nl.registry[name], np.empty_like(x), np.empty_like(x)
    over = x.copy()
    sides = {
        "out": lambda: loss.value_and_grad(x, *rest, out=g),
        "in place": lambda: loss.value_and_grad(over, *rest, out=over),
        "fresh": lambda: loss.value_and_grad(x, *rest),
        "add": lambda: add(x, rest[0], scratch),
    }
    peer = torch_side(name, arrays)
    if peer:
        sides["torch"] = peer
    m = medians(sides, 9)
    eager = m.get("torch")
    wanted = 75 if name in LIGHT else 50
    share = 100 * m["add"] / m["out"]
    return [
        name,
        f"{m['out'] * 1e3:.2f}",
        f"{m['in place'] * 1e3:.2f}",
        f"{m['fresh'] * 1e3:.2f}",
        f"{m['add'] * 1e3:.2f}",
        "-" if eager is None else f"{eager * 1e3:.1f}",
        f"{ratio(eager, m['out'])} (8)",
        f"{ratio(eager, m['in place'])} (8)",
        f"{share:.0f}% ({wanted}%)",
        f"{ratio(eager, m['fresh'])} (5)",
    ]


def small(name: str) -> list[str]:
    arrays = samples(name, SMALL)
    loss = nl.registry[name]
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: loss.value_and_grad(*arrays)}
    for peer, side in (("torch", torch_side(name, arrays)), ("jax", jax_side(name, arrays))):
        if side:
            sides[peer] = side
    m = medians(sides, 31, calls=100)  # one call at a time would measure the other sides' use of the caches
    cells = [name, f"{m['ours'] * 1e6:.2f}"]
    for peer, want in (("torch", 6), ("jax", 2)):  # half of JAX's time is twice its speed
        cells.append("-" if peer not in m else f"{m[peer] * 1e6:.1f}")
        cells.append(f"{ratio(m.get(peer), m['ours'])} ({want})")
    return cells


@nl.elementwise_loss
def my_huber(input, target, delta=1.0):
    r = abs(input - target)
    if r <= delta:
        return 0.5 * r * r
    return delta * (r - 0.5 * delta)


@nl.elementwise_loss
def log_cosh(input, target):
    d = abs(input - target)
    return d + nl.math.log1p(nl.math.exp(-2 * d)) - 0.6931471805599453


@nl.elementwise_loss
def geman_mcclure(input, target):
    r = (input - target) / 1.5
    q = r * r
    if q < 1e-12:
        return 0.5 * q
    return 2 * q / (q + 4)


def own_losses() -> list[list[str]]:
    """Losses of a user's own, as functions, against the built-in Huber loss."""
    x, t = samples("huber_loss", LARGE)
    g = np.empty_like(x)
    sides: dict[str, Callable[[], Any]] = {
        f.__name__: lambda f=f: f.value_and_grad(x, t, out=g)  # type: ignore[misc]
        for f in (nl.huber_loss, my_huber, log_cosh, geman_mcclure)
    }
    m = medians(sides, 15)
    built_in = m["huber_loss"]
    return [[n, f"{s * 1e3:.2f}", f"{100 * built_in / s:.0f}% (90%)"] for n, s in m.items()]


def seconds_of(code: str, **environment: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    return time.perf_counter() - start


def first_call(cache: str) -> float:
    """Seconds from after the import to the end of the first call, in a new process."""
    code = (
        "import time, numpy as np, numbaloss as nl\n"
        "x = np.ones(10, np.float32)\n"
        "start = time.perf_counter()\n"
        "nl.huber_loss.value_and_grad(x, x)\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def startup() -> list[list[str]]:
    """Import, and the first call with a cold and a warm cache."""
    seconds_of("import numba, numbaloss")
    pairs = [(seconds_of("import numbaloss"), seconds_of("import numba")) for _ in range(7)]
    imports = statistics.median(a / b for a, b in pairs)
    with tempfile.TemporaryDirectory() as cache:
        cold = first_call(cache)
        warm = statistics.median(first_call(cache) for _ in range(5))
    return [
        ["import numbaloss / import numba", f"{imports:.2f}", "at most 1.3"],
        ["first call, cache warm / cold", f"{warm / cold:.3f} ({warm:.2f} s / {cold:.2f} s)", "under 0.2"],
    ]


def memory() -> list[list[str]]:
    x, t = samples("mse_loss", 1_000_000)
    nl.mse_loss.value_and_grad(x, t, out=x)
    tracemalloc.start()
    nl.mse_loss.value_and_grad(x, t, out=x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [["memory allocated with out=input, 4 MB arrays", f"{peak} bytes", "no array"]]


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("numpy", "numba", "torch", "jax"):
        if importlib.util.find_spec(name):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def report() -> str:
    warnings.simplefilter("ignore")  # PyTorch's, of kl_div's 'mean'
    names = list(nl.registry)
    elementwise = [n for n in names if issubclass(nl.registry[n].Class, nl.ElementwiseLoss)]
    parts = [
        f"{date.today()}, {processor()}, {numba.get_num_threads()} threads; {versions()}.",
        "What is wanted stands in brackets.\n",
        markdown(
            f"value_and_grad, {LARGE // 10**6} million float32, milliseconds",
            LARGE_COLUMNS,
            [large(n) for n in (*LIGHT, *HEAVY)],
        ),
        markdown(
            f"value_and_grad, {SMALL} float32, microseconds",
            ["loss", "ours", "torch", "torch / ours", "jax", "jax / ours"],
            [small(n) for n in elementwise],
        ),
        markdown(
            "float32 mathematics, nanoseconds an element, one thread, 8192 elements",
            ["function", "ours", "NumPy", "NumPy / ours"],
            [
                [name, f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f} (1)"]
                for name in ("exp", "log", "log1p", "expm1")
                for a, b in [math_bench.against_numpy(name, 8192)]
            ],
        ),
        markdown(
            f"losses of one's own, {LARGE // 10**6} million float32, milliseconds",
            ["loss", "ours", "speed of huber_loss"],
            own_losses(),
        ),
        markdown("the rest", ["what", "measured", "wanted"], startup() + memory()),
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the tables there")
    parser.add_argument("--readme", metavar="FILE", type=Path, help="also put them between that file's marks")
    options = parser.parse_args()
    text = report()
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.readme:
        before, _, after = re.split("(?s)(<!-- speed -->.*<!-- /speed -->)", options.readme.read_text())
        options.readme.write_text(f"{before}<!-- speed -->\n{text}\n<!-- /speed -->{after}")


if __name__ == "__main__":
    main()
