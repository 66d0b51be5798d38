"""A run of the benchmark: cases one after the other, until they are done or the user has seen enough."""

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numba

from . import machine
from .cases import Case
from .devices import Device
from .measure import Row, measure
from .peers import Peer
from .report import Report, slower

CONFIRMATIONS = 2  # measurements more in which a row must turn out slower


def benchmark(
    todo: Sequence[Case],
    devices: Mapping[str, Device],
    peers: Mapping[str, Sequence[Peer]],
    *,
    threads: int,
    budget: float,
    earlier: Iterable[Row] = (),
    show: Callable[[int, str], None] = lambda done, what: None,
) -> Report:
    """Measure cases.

    Parameters
    ----------
    todo : sequence of Case
    devices, peers : mappings
        By a device's name.
    threads : int
        Of all sides.
    budget : float
        Seconds of timing, shared by the cases.
    earlier : iterable of Row
        A row that seems slower than its namesake here is measured again before it is believed.
    show : callable
        Called before each case, with the number of those done.

    Returns
    -------
    Report
        After Ctrl-C with the rows measured so far.
    """
    names = {p.name for found in peers.values() for p in found}
    settings = {"threads": threads, "time_budget_s": budget, "peers": sorted(names)}
    report = Report(machine.stamp(), settings)
    old = {row.key: row for row in earlier}

    def measured(case: Case) -> Row:
        share = budget / len(todo)
        return measure(case, devices[case.device], peers[case.device], share, report.notes.append)

    with warnings.catch_warnings(), using(threads):
        warnings.simplefilter("ignore")  # other libraries', of how we use them
        try:
            for done, case in enumerate(todo):
                show(done, str(case))
                row = measured(case)
                for _ in range(CONFIRMATIONS):
                    if row.key in old and slower(old[row.key], row):
                        row = measured(case)
                report.rows.append(row)
        except KeyboardInterrupt:
            report.interrupted = True
    return report


@contextmanager
def using(threads: int) -> Iterator[None]:
    """So many threads for Numba, and for BLAS where threadpoolctl is installed."""
    blas: Any = nullcontext()
    if importlib.util.find_spec("threadpoolctl"):
        blas = importlib.import_module("threadpoolctl").threadpool_limits(threads)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        with blas:
            yield
    finally:
        numba.set_num_threads(before)
