"""What ranks cost: a call of several against one, and a model of many, beside the schemes of others.

    python -m numbaloss.bench.distributed [--markdown FILE]

First table: calls with ``comm=`` and ``classes=`` on one rank, against the plain call, in turn. Second: the
exchange of class statistics over MPI on this machine, measured and by the model, whose latency and bandwidth
are fitted to two sizes; for it mpi4py has to be there, with an ``mpiexec`` of its own. Third: the model for
8, 64 and 1024 ranks on faster links, for our exchange, for Megatron-LM's and for Liger-Kernel's.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import numbaloss as nl
from numbaloss.class_shards import FEW

from . import machine
from .measure import Side, interleave
from .report import markdown

ROUNDS = 15
ROW_BYTES = 32  # what a rank tells of each row


def medians(calls: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The seconds of calls, in turn."""
    for call in calls:
        call()  # compiles
    taken = interleave({str(k): Side(call, rounds) for k, call in enumerate(calls)})
    return [statistics.median(t) for t in taken.values()]


# ---- one rank ---------------------------------------------------------------------------------------------


HEAD = ["call", "plain", "comm=", "of two", "classes=", "of two"]
CALLS = ("mse_loss", 1000, 1000), ("cross_entropy", 4096, 1000), ("cross_entropy", 2048, 32000)


class Second:
    """The first of two ranks, of which the other has nothing: all that a rank does, without a network."""

    rank, size = 0, 2

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        buffer[1:3] *= 2  # it says the same of its options

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        out[0], out[1] = buffer, (-np.inf, 0, 0, 0)
        out[1, 0, :2] = buffer[0, 1]


def of_one_rank(name: str, rows: int, columns: int) -> list[str]:
    """A row: the plain call, and those of one rank."""
    rng, (comm,), loss = np.random.default_rng(0), nl.distributed.threads(1), nl.registry[name]
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    labelled = name == "cross_entropy"
    y = rng.integers(0, columns, rows) if labelled else np.zeros_like(x)
    out = np.empty_like(x)
    ways: list[dict[str, Any]] = [{}, {"comm": comm}, {"comm": Second()}]
    if labelled:
        ways += [{"comm": comm, "classes": (0, columns)}, {"comm": Second(), "classes": (0, columns)}]
    times = medians([partial(loss.value_and_grad, x, y, out=out, **more) for more in ways])
    cells = [f"{1e3 * t:.2f} ms ({t / times[0]:.2f})" for t in times]
    return [f"{name} {rows} x {columns}", *cells, *["-"] * (5 - len(cells))]


# ---- the model --------------------------------------------------------------------------------------------


def all_gather(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of steps that double what each rank has: of all ranks it receives so many bytes."""
    return math.ceil(math.log2(ranks)) * latency + (ranks - 1) * size / bandwidth


def all_reduce(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of the quicker of a tree and a ring."""
    tree = 2 * math.ceil(math.log2(ranks)) * (latency + size / bandwidth)
    return min(tree, 2 * (ranks - 1) * (latency + size / ranks / bandwidth))


def ours(ranks: int, rows: int, latency: float, bandwidth: float) -> float:
    """One agreement of 40 bytes; then one exchange, or with many ranks two sums of float64."""
    agreed = all_reduce(ranks, 40, latency, bandwidth)
    if ranks <= FEW:
        return agreed + all_gather(ranks, ROW_BYTES * rows, latency, bandwidth)
    sums = sum(all_reduce(ranks, n * rows, latency, bandwidth) for n in (8, 24))
    return agreed + all_gather(ranks, ROW_BYTES, latency, bandwidth) + sums


SCHEMES: dict[str, Callable[[int, int, float, float], float]] = {
    "ours": lambda p, rows, a, b: ours(p, rows, a, b),
    # The largest score, the target's score and the sum of exponentials: float32, three all-reduces.
    "Megatron-LM": lambda p, rows, a, b: 3 * all_reduce(p, 4 * rows, a, b),
    # The same, and one more for exact label smoothing.
    "Liger-Kernel, smoothing": lambda p, rows, a, b: 4 * all_reduce(p, 4 * rows, a, b),
}


def received(scheme: str, ranks: int, rows: int) -> float:
    """Bytes that each rank receives."""
    if scheme == "ours" and ranks <= FEW:
        return (ranks - 1) * ROW_BYTES * rows
    if scheme == "ours":
        return 2 * ROW_BYTES * rows * (ranks - 1) / ranks
    return (3 if scheme == "Megatron-LM" else 4) * 2 * 4 * rows * (ranks - 1) / ranks


LINKS = {"NVLink, 8 us, 200 GB/s": (8e-6, 200e9), "InfiniBand, 12 us, 40 GB/s": (12e-6, 40e9)}
TOKENS, VOCABULARY, MEMORY = 8192, 131072, 2.5e12  # rows, classes; bytes a second of a GPU's memory


def modelled() -> list[list[str]]:
    """Exchanges and memory for many ranks."""
    table = []
    for ranks in (8, 64, 1024):
        link = list(LINKS)[ranks > 8]
        # Ours reads the shard twice and writes it once; the others keep exponentials, in float32.
        elements = TOKENS * VOCABULARY / ranks
        for scheme, seconds in SCHEMES.items():
            passes = 3 * 2 if scheme == "ours" else 3 * 2 + 3 * 4  # bytes an element, of bfloat16 scores
            exchange = seconds(ranks, TOKENS, *LINKS[link])
            table.append([
                str(ranks), link, scheme, f"{received(scheme, ranks, TOKENS) / 1e6:.2f} MB",
                f"{1e3 * exchange:.2f} ms", f"{1e3 * passes * elements / MEMORY:.2f} ms",
                "0" if scheme == "ours" else f"{4 * elements / 1e6:.0f} MB",
            ])  # fmt: skip
    return table


# ---- over MPI ---------------------------------------------------------------------------------------------


def of_rank() -> None:
    """On each rank: print the seconds of exchanges of some sizes, and of a call's."""
    from mpi4py import MPI

    comm = nl.distributed.communicator(MPI.COMM_WORLD)
    found = {}
    for rows in (16, 256, 4096, 65536):
        buffer = np.zeros((rows, 4))
        out = np.empty((comm.size, rows, 4))

        def exchange(buffer: Any = buffer, out: Any = out) -> None:
            comm.all_gather(buffer, out)

        found[str(rows)] = medians([exchange], 50)[0]
    if comm.rank == 0:
        print(json.dumps(found))


def over_mpi() -> list[list[str]]:
    """Measured exchanges of two and four ranks, beside the model's."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    table = []
    for ranks in (2, 4):
        command = [
            str(mpiexec),
            "-n",
            str(ranks),
            sys.executable,
            "-m",
            "numbaloss.bench.distributed",
            "--rank",
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = {int(n): t for n, t in json.loads(done.stdout.splitlines()[-1]).items()}
        least, most = min(found), max(found)
        bandwidth = (ranks - 1) * ROW_BYTES * (most - least) / (found[most] - found[least])
        latency = (found[least] - (ranks - 1) * ROW_BYTES * least / bandwidth) / math.log2(ranks)
        for rows, seconds in found.items():
            model = all_gather(ranks, ROW_BYTES * rows, latency, bandwidth)
            fitted = " (fitted)" if rows in (least, most) else ""
            table.append([str(ranks), str(rows), f"{1e6 * seconds:.0f} us", f"{1e6 * model:.0f} us{fitted}"])
    return table


TEXT = """\
# Several ranks

{machine}

## One rank against the plain call

Medians of calls in turn, and in brackets their ratio: with one rank, and with all that a rank of two does
but the network (the other one has no rows, or no classes). What the latter takes longer with `comm=` is
Python, some hundred microseconds a call; with `classes=` exponentials are taken twice, as none are kept.

{one}

## The exchange over MPI on this machine

Of 32 bytes a row, by two and four processes on two cores. The model is of steps that double what each rank
has; its latency and bandwidth are fitted to the smallest and the largest.

{mpi}

## The model for many ranks

{tokens} rows of {vocabulary} classes in bfloat16. What each rank receives; the time of the exchange; that of
the passes over memory at {memory:.1f} TB/s; memory kept beside the scores. Numbers of links are round ones.

{model}

Up to {few} ranks each tells all others its numbers, once: that takes less than Megatron's three sums. What is
sent grows with the ranks, so more of them find the largest scores together, and add up the rest, in float64,
about as quickly as others do in float32. At 8 ranks the passes take longer than any exchange; ours read and
write a third of what the others do, as no exponentials are kept. With hundreds of ranks any exchange takes
longer than the passes: there classes belong to the ranks of one machine, and rows to the others, which share
one number more for the mean (`count`, then `normalizer=`).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        of_rank()
        return 0
    text = TEXT.format(
        machine=machine.heading("mpi4py"),
        one=markdown(HEAD, [of_one_rank(*call) for call in CALLS]),
        mpi=markdown(["ranks", "rows", "measured", "model"], over_mpi()),
        model=markdown(
            ["ranks", "link", "scheme", "received", "exchange", "passes", "kept beside"], modelled()
        ),
        tokens=TOKENS, few=FEW, vocabulary=VOCABULARY, memory=MEMORY / 1e12,
    )  # fmt: skip
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
