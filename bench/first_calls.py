"""Seconds of a loss's first calls, each loss in a process of its own with a cache of its own.

    python -m numbaloss.bench.first_calls [LOSS ...] [--markdown FILE]

- cold: a small call of ``value_and_grad``, on an empty cache;
- large: a call in the same process that is worth all threads, less the same call again;
- warm: the small call in a new process, on the cache that the first one left.

All are counted from after ``import numbaloss``. `mse_loss` is measured before and after each other loss, as
machines drift; a ratio is to the median of the six measured nearest. Its own row has the medians of all.
"""

import os
import statistics
import subprocess
import sys
import tempfile

import numbaloss as nl

from . import machine
from .cases import family_of
from .report import markdown, tables_of_losses

BASE = "mse_loss"
LARGE = 1 << 18  # elements that are worth all threads, whatever the loss

CODE = """
import sys, time
import numpy as np
import numbaloss
start = time.perf_counter()
from numbaloss.bench.cases import Case
small, large = (Case(sys.argv[1], tuple(map(int, s.split("x")))) for s in sys.argv[2:4])
calls = [case.call(case.arrays()) for case in (small, large)]
start = time.perf_counter()
calls[0]()
first = time.perf_counter() - start
seconds = []
for _ in range(2):
    start = time.perf_counter()
    calls[1]()
    seconds.append(time.perf_counter() - start)
print(first, seconds[0] - seconds[1])
"""


def first_calls(loss: str) -> tuple[float, float, float]:
    """Seconds of a cold call, of the first large one after it, and of a call on a warm cache."""
    family = family_of(nl.registry[loss])
    shapes = ["x".join(map(str, shape)) for shape in (family.tiny, family.sized(LARGE))]
    with tempfile.TemporaryDirectory() as cache:

        def measured() -> list[float]:
            done = subprocess.run(
                [sys.executable, "-c", CODE, loss, *shapes],
                env={**os.environ, "NUMBA_CACHE_DIR": cache},
                check=True,
                capture_output=True,
                text=True,
            )
            return [float(x) for x in done.stdout.split()]

        cold, large = measured()
        return cold, large, measured()[0]


def report(losses: list[str]) -> str:
    """The table, in Markdown."""
    bases, measured = [first_calls(BASE)], []
    for name in losses:
        if name != BASE:
            measured.append((name, first_calls(name)))
            bases.append(first_calls(BASE))

    def base_beside(k: int) -> float:
        return statistics.median(cold for cold, *_ in bases[max(0, k - 2) : k + 4])

    of_base = tuple(statistics.median(column) for column in zip(*bases, strict=True))
    every = [(BASE, of_base, of_base[0])]
    every += [(name, seconds, base_beside(k)) for k, (name, seconds) in enumerate(measured)]
    rows = [
        [
            name,
            f"{cold:.2f}",
            f"{cold / base:.2f} (2)",
            f"{large:.2f}",
            f"{large / base:.2f} (1)",
            f"{warm:.2f}",
        ]
        for name, (cold, large, warm), base in every
    ]
    head = ["loss", "cold, s", f"cold / {BASE}", "then large, s", f"large / {BASE}", "warm, s"]
    return f"{machine.heading()}\n{markdown(head, rows)}"


if __name__ == "__main__":
    tables_of_losses(__doc__, report, nl.registry)
