"""All that is to be proven on a GPU, by one command.

    python -m numbaloss.bench.gpu [--folder bench/results] [--jobs 12]

It runs the tests of `tests/cuda/test_gpu.py`, again under compute-sanitizer where that is installed, measures
the table of `WORK` against a copy, PyTorch and Liger-Kernel, and each loss against a copy, and writes
`cuda.md` and `cuda.json`: device, versions and figures. ``--only`` and ``--select`` do a part. The exit code
is 0 if every test passed.
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

import numbaloss as nl
from numbaloss.testing import finfo

from . import machine
from .cases import LINEAR, SEQUENCE, Arrays, Case, Shape, cases, casted, dimensions, dtype_of
from .devices import Absent, Call, Device, open_device
from .measure import COPY, OURS, interleave, plan
from .peers import PEERS, Peer
from .report import Report, duration, markdown
from .session import benchmark

COMPARED = ("torch", "torch-compile", "liger")
BUDGET = 120.0  # seconds of timing, for all cases
DRAWN = 1 << 20  # elements that are drawn; more are these again

TESTS = Path("tests/cuda/test_gpu.py")
SANITIZERS = ("memcheck", "racecheck")
PARTS = ("tests", "sanitizers", "table", "losses")

EVERY, FEWER = 1 << 25, 1 << 21  # elements of a case of each loss; where products or time steps bound it
EVERY_DTYPES = ("float32", "bfloat16")


class Work(NamedTuple):
    """A row of the table, and what is wanted of it."""

    loss: str
    shape: Shape
    dtype: str
    in_place: bool
    copy: float  # share of a copy's speed
    passes: float = 1  # bytes that must move, where it is not each argument and each gradient once
    torch: float | None = None  # times as fast
    liger: float | None = None


WORK = (
    Work("mse_loss", (1 << 26,), "float32", True, 0.9),
    Work("mse_loss", (1 << 26,), "bfloat16", True, 0.85),
    Work("binary_cross_entropy_with_logits", (1 << 26,), "float32", True, 0.9),
    Work("binary_cross_entropy_with_logits", (1 << 26,), "bfloat16", True, 0.85),
    # A row fits nowhere on the device: it is read twice and written once.
    Work("cross_entropy", (2048, 131072), "float32", True, 0.85, 1.5, 2, 1),
    Work("cross_entropy", (2048, 128256), "bfloat16", True, 0.85, 1.5, 2, 1),
    Work("cross_entropy", (64, 131072), "float32", True, 0.7),
    Work("cross_entropy", (1_000_000, 16), "float32", True, 0.7),
    Work("triplet_margin_loss", (250_000, 128), "float32", True, 0.8),
    Work("cosine_embedding_loss", (250_000, 128), "float32", True, 0.8),
)
SMALL = ("mse_loss", (1000,)), ("cross_entropy", (100, 10))  # launched sooner than PyTorch's


@dataclass(frozen=True)
class Large(Case):
    """A case whose arrays are a drawn part, again and again: drawing all would take minutes."""

    def arrays(self, seed: int = 0) -> Arrays:
        per_row = max(1, int(np.prod(self.shape[1:])))
        shape = (min(self.shape[0], max(1, DRAWN // per_row)), *self.shape[1:])
        drawn = self.family.draw(self.function, np.random.default_rng(seed), shape)
        part = casted(drawn, dtype_of(self.dtype))
        return {n: np.resize(a, (self.shape[0], *a.shape[1:])) for n, a in part.items()}


def case_of(work: Work, device: Device) -> Case:
    return Large(work.loss, work.shape, work.dtype, in_place=work.in_place, device=device.name)


def table(work: Sequence[Work], report: Report) -> str:
    """The report's rows against what is wanted of them."""
    head = ["work", "time", "share of a copy's speed", "torch / ours", "liger / ours", "error, ulp"]
    cells = []
    for w, row in zip(work, report.rows, strict=False):  # fewer rows after Ctrl-C
        how = ", in place" if w.in_place else ""

        def peer(name: str, wanted: float | None, row: Any = row) -> str:
            found = f"{row.peers[name].ratio:.2f}" if name in row.peers else "-"
            return found if wanted is None else f"{found} ({wanted:g})"

        eps = float(finfo(dtype_of(w.dtype)).eps)
        cells.append(
            [
                f"{w.loss} {dimensions(w.shape)} {w.dtype}{how}",
                duration(row.seconds.median),
                f"{w.passes * row.share_of_copy:.0%} ({w.copy:.0%})",
                peer("torch", w.torch),
                peer("liger", w.liger),
                " / ".join("-" if e is None else f"{e / eps:.1f}" for e in row.error.values()),
            ]
        )
    return markdown(head, cells)


def every_case(device: Device) -> list[Case]:
    """A case of each loss and dtype, its gradient not in place."""
    made = []
    for loss in nl.registry:
        for dtype in EVERY_DTYPES:
            (case,) = cases([loss], sizes=[EVERY], dtype=dtype, device=device.name)
            if case.family in (LINEAR, SEQUENCE):
                made += cases([loss], sizes=[FEWER], dtype=dtype, device=device.name)
            else:
                made.append(Large(case.loss, case.shape, dtype, device=device.name))
    return made


def compile_kernels(case: Case) -> None:
    """Compile what a case needs, by a small call: the kernels are kept on disk."""
    rows = max(1, 4096 // math.prod(case.shape[1:]))
    part = replace(case, shape=(rows, *case.shape[1:]))
    if case.family in (LINEAR, SEQUENCE):
        part = replace(case, shape=case.family.tiny)
    device = open_device(case.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part.call({n: device.put(a) for n, a in part.arrays().items()})()


def every_loss(device: Device, jobs: int) -> str:
    """The time of each loss with its gradient, and the share of a copy's speed that it has."""
    todo = every_case(device)
    if jobs:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            list(pool.map(compile_kernels, todo))
    cells = []
    for case in todo:
        drawn = case.arrays()
        call = case.call({n: device.put(a) for n, a in drawn.items()})
        calls = {OURS: call, COPY: device.copier(case.traffic(drawn))}
        times = interleave(plan(calls, {}, device, 0.1), device)
        seconds = statistics.median(times[OURS])
        share = statistics.median(np.array(times[COPY]) / np.array(times[OURS]))
        elements = case.family.elements(case.shape)
        cells.append(
            [
                f"{case.loss} {dimensions(case.shape)} {case.dtype}",
                duration(seconds),
                f"{seconds * 1e12 / elements:.2f}",
                f"{share:.0%}",
            ]
        )
        print(*cells[-1], flush=True)
    return markdown(["work", "time", "ps an element", "share of a copy's speed"], cells)


def launch_seconds(call: Call, device: Device, calls: int = 200) -> float:
    """Seconds from a call in Python until it has returned: the device works on meanwhile."""
    call()
    device.seconds(call)  # waits
    samples = []
    for _ in range(11):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
        device.seconds(call)
    return statistics.median(samples)


def small(device: Device, torch: Peer) -> str:
    """How long small calls take from Python to launched."""
    cells = []
    for loss, shape in SMALL:
        case = Case(loss, shape, device=device.name)
        arrays = case.arrays()
        there = {n: device.put(a) for n, a in arrays.items()}
        ours = launch_seconds(case.call(there), device)
        theirs = None if torch.missing(device.name) else torch.build(case, arrays)
        found = None if theirs is None else launch_seconds(theirs, device)
        cells.append(
            [
                f"{loss} {dimensions(shape)} float32",
                duration(ours),
                "-" if found is None else duration(found),
                "-" if found is None else f"{found / ours:.1f} (1)",
            ]
        )
    return markdown(["from Python to launched", "ours", "torch", "torch / ours"], cells)


def run_tests(parts: Collection[str], jobs: int, select: str) -> list[tuple[str, str, bool]]:
    """The tests, plain and under each sanitizer: what, the last line that it said, and whether it passed."""
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    if select:
        plain += ["-k", select]
    if jobs:
        plain += ["-p", "no:benchmark", "-n", str(jobs)]
    runs = {"tests": plain} if "tests" in parts else {}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS if "sanitizers" in parts and sanitizer else ():
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        runs[f"compute-sanitizer {tool}"] = [str(sanitizer), *options, *plain]
    done = []
    for what, command in runs.items():
        print(f"{what} ...", flush=True)
        finished = subprocess.run(command, capture_output=True, text=True)
        lines = (finished.stdout + finished.stderr).strip().splitlines() or [""]
        said = next(
            (line for line in reversed(lines) if "passed" in line or "ERROR SUMMARY" in line), lines[-1]
        )
        done.append((what, said.strip("= "), finished.returncode == 0))
        if finished.returncode:
            print(*lines[-40:], sep="\n")
    if "sanitizers" in parts and sanitizer is None:
        done.append(("compute-sanitizer", "not installed", True))
    return done


def measure_all(work: Sequence[Work], device: Device, budget: float, compared: Sequence[str]) -> Report:
    peers = [PEERS[n] for n in compared if PEERS[n].missing(device.name) is None]
    return benchmark(
        [case_of(w, device) for w in work],
        {device.name: device},
        {device.name: peers},
        threads=numba.get_num_threads(),
        budget=budget,
        show=lambda done, what: print(f"{done}/{len(work)} {what}", flush=True),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to do (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes for tests (pytest-xdist) and compiling"
    )
    parser.add_argument("--select", default="", help="tests, as pytest's -k takes them (default: all)")
    parser.add_argument("--peers", nargs="*", choices=COMPARED, default=COMPARED)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of timing")
    options = parser.parse_args(arguments)
    try:
        device = open_device("cuda")
    except Absent as absent:
        print(f"numbaloss: {absent}", file=sys.stderr)
        return 1
    if not TESTS.exists() or not options.folder.is_dir():
        print(f"numbaloss: run this where {TESTS} and {options.folder} are", file=sys.stderr)
        return 2
    tested = run_tests(options.only, options.jobs, options.select)
    passed = all(passed for _, _, passed in tested)
    losses = every_loss(device, options.jobs) if "losses" in options.only else ""
    if "table" not in options.only:
        print(markdown(["run", "said"], [[what, said] for what, said, _ in tested]), losses, sep="\n")
        return 0 if passed else 1
    report = measure_all(WORK, device, options.budget, options.peers)
    (options.folder / "cuda.json").write_text(report.to_json())
    names, _ = machine.gpus()
    versions = ", ".join(f"{n} {v}" for n, v in report.stamp["versions"].items())
    parts = [
        f"{report.stamp['date']}, {'; '.join(names)}, driver {driver_version()}; {versions}.",
        "`python -m numbaloss.bench.gpu`. What is wanted stands in brackets.\n",
        markdown(["run", "said"], [[what, said] for what, said, _ in tested]),
        table(WORK, report),
        small(device, PEERS["torch"]),
        losses,
        *report.notes,
    ]
    (options.folder / "cuda.md").write_text("\n".join(parts))
    print(*parts, sep="\n")
    return 0 if passed else 1


def driver_version() -> str:
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


if __name__ == "__main__":
    sys.exit(main())
