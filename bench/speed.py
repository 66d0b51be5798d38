"""The speed that the README claims, row by row.

    python -m numbaloss.bench.speed [--markdown FILE]

PyTorch and JAX are measured where they are installed; `-` stands where one is not, or has not the loss. All
sides of a row run in one process, one call of each after the other, and the medians are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit, prange

import numbaloss as nl

from . import machine
from . import math as math_bench
from .cases import ELEMENTWISE, Case, Shape, dimensions, family_of
from .devices import HOST, Call
from .measure import COPY, OURS, Side, interleave, plan
from .peers import PEERS
from .report import duration, markdown

LARGE, SMALL = 10_000_000, 100
LIGHT = ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss")
HEAVY = ("binary_cross_entropy_with_logits", "soft_margin_loss", "poisson_nll_loss", "kl_div")

LARGE_COLUMNS = [
    *("loss", "out=", "in place", "fresh", "add", "torch"),
    *("torch / out", "torch / in place", "add / out", "torch / fresh"),
]


class Work(NamedTuple):
    """A row of the table of rows, vectors and sequences: what is timed, and how many times as fast it is
    wanted.
    """

    loss: str
    shape: Shape
    how: str  # "in place", "out=" or "fresh"
    torch: float
    jax: float | None = None
    copy: float | None = None  # wanted share of a copy's speed
    memory: float | None = None  # wanted bytes beyond arguments and `out`, at most


LOGITS = 4 * 2048 * 32000  # that `linear_cross_entropy` never holds

WORK = (
    Work("cross_entropy", (32, 10), "in place", 4),
    Work("cross_entropy", (8192, 10), "in place", 4, 2),
    Work("cross_entropy", (128, 1000), "in place", 3, 2),
    Work("cross_entropy", (4096, 1000), "in place", 3, 2),
    Work("cross_entropy", (512, 32000), "in place", 12, copy=0.5),
    Work("cross_entropy", (8, 21, 256, 256), "out=", 3),
    Work("cosine_embedding_loss", (65536, 128), "out=", 4),
    Work("triplet_margin_loss", (65536, 128), "out=", 4),
    Work("multi_margin_loss", (4096, 1000), "out=", 3),
    Work("multilabel_margin_loss", (4096, 1000), "out=", 3),
    Work("ctc_loss", (200, 32, 64, 40), "fresh", 2),
    Work("linear_cross_entropy", (2048, 512, 32000), "out=", 0.9, memory=0.1 * LOGITS),
)


@njit(parallel=True, nogil=True)
def add(a, b, out):
    """The yardstick: two arrays in, one out, no arithmetic to speak of."""
    for i in prange(a.size):
        out[i] = a[i] + b[i]


def medians(sides: dict[str, Call], runs: int, calls: int = 1) -> dict[str, float]:
    """Median seconds of a call of each side; runs of `calls` of them are interleaved."""
    for call in sides.values():
        call()
        call()
    times = interleave({name: Side(call, runs, calls) for name, call in sides.items()})
    return {name: statistics.median(t) for name, t in times.items()}


def with_peers(case: Case, sides: dict[str, Call], *names: str) -> dict[str, Call]:
    """The sides, and those of the peers that are installed and have the loss."""
    for name in names:
        peer = PEERS[name]
        side = None if peer.missing() else peer.build(case, case.arrays())
        if side is not None:
            sides[name] = side
    return sides


def ratio(a: float | None, b: float) -> str:
    return "-" if a is None else f"{a / b:.1f}"


def large(name: str) -> list[str]:
    case = Case(name, (LARGE,))
    arrays = case.arrays()
    x, y = arrays.values()
    over, scratch = {**arrays, "input": x.copy()}, np.empty_like(x)
    sides = {
        "out": case.call(arrays, np.empty_like(x)),
        "in place": case.call(over, over["input"]),
        "fresh": case.call(arrays),
        "add": lambda: add(x, y, scratch),
    }
    m = medians(with_peers(case, sides, "torch"), 9)
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
    case = Case(name, (SMALL,))
    sides = with_peers(case, {"ours": case.call(case.arrays())}, "torch", "jax")
    m = medians(sides, 31, calls=100)  # one call at a time would measure the other sides' use of the caches
    cells = [name, f"{m['ours'] * 1e6:.2f}"]
    for peer, want in (("torch", 6), ("jax", 2)):  # half of JAX's time is twice its speed
        cells.append("-" if peer not in m else f"{m[peer] * 1e6:.1f}")
        cells.append(f"{ratio(m.get(peer), m['ours'])} ({want})")
    return cells


def rows(work: Work) -> list[str]:
    """A loss of rows, vectors or sequences."""
    case = Case(work.loss, work.shape, in_place=work.how == "in place")
    arrays = case.arrays()
    out = None
    if work.how != "fresh":
        out = case.out(arrays, None if case.in_place else np.empty_like)
    sides = {OURS: case.call(arrays, out), COPY: HOST.copier(case.traffic(arrays))}
    times = interleave(plan(with_peers(case, sides, "torch", "jax"), {}, HOST, 6.0))
    m = {name: statistics.median(t) for name, t in times.items()}
    ours = m[OURS]
    cells = [f"{work.loss} ({dimensions(work.shape)}), {work.how}", duration(ours)]
    for peer, wanted in (("torch", work.torch), ("jax", work.jax)):
        cells.append(duration(m[peer]) if peer in m else "-")
        cells.append(ratio(m.get(peer), ours) + (f" ({wanted:g})" if wanted else ""))
    cells.append(f"{m[COPY] / ours:.0%}" + (f" ({work.copy:.0%})" if work.copy else ""))
    peak = HOST.peak(sides[OURS])
    cells.append(f"{peak / 1e6:.2f}" + (f" ({work.memory / 1e6:.1f})" if work.memory else ""))
    return cells


def own_losses() -> list[list[str]]:
    """Losses of a user's own, as functions, against the built-in Huber loss."""

    # Defined here, for in this package a definition at the top of a module is one of the library's losses.
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

    x, t = Case("huber_loss", (LARGE,)).arrays().values()
    g = np.empty_like(x)
    sides: dict[str, Call] = {
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
    case = Case("mse_loss", (1_000_000,), in_place=True)
    arrays = case.arrays()
    call = case.call(arrays, case.out(arrays))
    call()
    peak = HOST.peak(call)
    return [["memory allocated with out=input, 4 MB arrays", f"{peak} bytes", "no array"]]


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"### {title}\n\n{markdown(head, rows)}"


def report() -> str:
    warnings.simplefilter("ignore")  # PyTorch's, of kl_div's 'mean'
    elementwise = [n for n, f in nl.registry.items() if family_of(f) is ELEMENTWISE]
    parts = [
        machine.heading("torch", "jax"),
        table(
            f"value_and_grad, {LARGE // 10**6} million float32, milliseconds",
            LARGE_COLUMNS,
            [large(n) for n in (*LIGHT, *HEAVY)],
        ),
        table(
            f"value_and_grad, {SMALL} float32, microseconds",
            ["loss", "ours", "torch", "torch / ours", "jax", "jax / ours"],
            [small(n) for n in elementwise],
        ),
        table(
            "value_and_grad, float32: rows of scores, vectors, sequences",
            ["work", "ours", "torch", "torch / ours", "jax", "jax / ours", "copy / ours", "memory, MB"],
            [rows(w) for w in WORK if w.loss in nl.registry],
        ),
        table(
            "float32 mathematics, nanoseconds an element, one thread, 8192 elements",
            ["function", "ours", "NumPy", "NumPy / ours"],
            [
                [name, f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f} (1)"]
                for name in ("exp", "log", "log1p", "expm1")
                for a, b in [math_bench.against_numpy(name, 8192)]
            ],
        ),
        table(
            f"losses of one's own, {LARGE // 10**6} million float32, milliseconds",
            ["loss", "ours", "speed of huber_loss"],
            own_losses(),
        ),
        table("the rest", ["what", "measured", "wanted"], startup() + memory()),
    ]
    missing = [w.loss for w in WORK if w.loss not in nl.registry]
    if missing:
        parts.append(f"Not measured, for this version has them not: {', '.join(missing)}.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the tables there")
    options = parser.parse_args()
    text = report()
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
