"""Whether all threads still beat one while other processes use the cores.

    python -m numbaloss.bench.busy [--markdown FILE]

With no, one and two other processes that compute all the time: calls of a million elements on all threads and
on one, in turn, and steps of training whose matrices NumPy multiplies, by threads of its own. The library's
threads are compared with Numba's layers, each in a process of its own, where each is there: those do the same
tasks in a ``prange``.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np

import numbaloss as nl
from numbaloss.kernels.cpu import parallel

from . import machine
from .cases import Case, dimensions
from .report import markdown

OWN = "ours"
LAYERS = (OWN, "tbb", "omp", "workqueue")
CASES = (
    Case("mse_loss", (1_000_000,)),
    Case("binary_cross_entropy_with_logits", (1_000_000,)),
    Case("cross_entropy", (1000, 1000)),
)
ROUNDS = 150


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Let so many other processes compute meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def in_a_prange(record, task, context, count):
    """Do what `parallel.fork` does, on Numba's threads."""
    for k in numba.prange(count):
        parallel.run_task(task, (context, k))
    return 0


def use_numbas_threads() -> Any:
    """Have tasks done in a ``prange``, until the mock is stopped."""
    signature = parallel.FORK_BY_RECORD
    compiled = numba.njit(signature, nogil=True, parallel=True, error_model="numpy")(in_a_prange)
    made = compiled.overloads[signature.args]
    address = made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)
    record = np.array([address, 0, 0], np.int64)
    return mock.patch.object(parallel, "address_of", lambda helpers: record.ctypes.data)


def step() -> Callable[[], Any]:
    """A step of training a linear classifier, but for the update."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 64)).astype(np.float32)
    w = rng.normal(scale=0.1, size=(64, 10)).astype(np.float32)
    target = rng.integers(0, 10, 2000)

    def call() -> Any:
        value, gradient = nl.cross_entropy.value_and_grad(x @ w, target)
        return value, x.T @ gradient

    return call


def calls() -> dict[str, Callable[[], Any]]:
    made = {}
    for case in CASES:
        arrays = case.arrays()
        made[f"{case.loss} ({dimensions(case.shape)})"] = case.call(arrays, case.out(arrays, np.empty_like))
    return made | {"x @ w, cross_entropy (2000x10), x.T @ g": step()}


def measure(layer: str) -> dict[str, list[float]]:
    """Seconds of each call on one thread and on all: medians, then what nine of ten calls stay below."""
    if layer == "tbb":  # installed by pip it lies where the loader does not look
        with suppress(OSError):
            ctypes.CDLL(str(Path(sys.prefix, "lib", "libtbb.so.12")), mode=ctypes.RTLD_GLOBAL)
    if layer != OWN:
        use_numbas_threads().start()
    every = numba.get_num_threads()
    found = {}
    for name, call in calls().items():
        times: dict[int, list[float]] = {1: [], every: []}
        for threads in times:
            numba.set_num_threads(threads)
            call()
        for _ in range(ROUNDS):
            for threads, taken in times.items():
                numba.set_num_threads(threads)
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        low = [statistics.median(t) for t in times.values()]
        high = [float(np.percentile(t, 90)) for t in times.values()]
        found[name] = low + high
    return found


def report() -> str:
    """The table, in Markdown."""
    rows = []
    for layer in LAYERS:
        environment = dict(os.environ)
        if layer != OWN:
            environment["NUMBA_THREADING_LAYER"] = layer
        command = [sys.executable, "-m", "numbaloss.bench.busy", "--layer", layer]
        for others in range(3):
            with busy(others):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append([layer, str(others), "not here", *[""] * 4])
                break
            for name, (one, every, high_one, high_every) in json.loads(done.stdout).items():
                seconds = [f"{1e3 * s:.2f}" for s in (one, every)]
                ratios = [f"{one / every:.2f}", f"{high_one / high_every:.2f}"]
                rows.append([layer, str(others), name, *seconds, *ratios])
    head = ["threads", "other processes", "call", "one, ms", "all, ms", "one / all", "of the slowest tenth"]
    return machine.heading() + "\n" + markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", choices=LAYERS, help=argparse.SUPPRESS)
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the table there")
    options = parser.parse_args()
    if options.layer:
        print(json.dumps(measure(options.layer)))
        return
    text = report()
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
