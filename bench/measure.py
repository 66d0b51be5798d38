"""How a case is measured: all sides in one process, one after the other, against a copy of as many bytes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import event

from numbaloss import reference
from numbaloss.kernels.spec import GRAD, VALUE

from .cases import Arrays, Case, casted, dtype_of
from .devices import HOST, Call, Device
from .peers import NumPy, Peer

OURS, COPY = "numbaloss", "copy"

SAMPLE_SECONDS = 2e-3  # a timed sample holds as many calls as take that long
# Sides whose threads, of OpenMP, spin for milliseconds after a call: the next waits until they sleep,
# as if the other were not there.
SPINNING = {COPY, "add", "torch", "torch-compile"}
SPIN_SECONDS = 8e-3
RUNS = 5, 101  # samples: of ours and the copy at least, of any side at most
ERROR_ELEMENTS = 1 << 17  # of the input, that results are compared with the reference on


class Quartiles(NamedTuple):
    """The median of a sample, and what a quarter of it lies below and above."""

    low: float
    median: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median


def quartiles(sample: Sequence[float] | np.ndarray) -> Quartiles:
    return Quartiles(*map(float, np.percentile(sample, (25, 50, 75))))


class Side(NamedTuple):
    """One of the things that are timed in turns."""

    call: Call
    runs: int
    calls: int = 1
    prepare: Call | None = None  # done before each sample, outside of the clock


def interleave(sides: Mapping[str, Side], device: Device = HOST) -> dict[str, list[float]]:
    """Seconds of a call in each sample of each side, one sample of each after the other.

    What changes the machine's speed meanwhile meets all of them. A side with fewer runs takes part in rounds
    that are spread evenly.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = max(side.runs for side in sides.values())
    for k in range(rounds):
        for name, side in sides.items():
            if (k + 1) * side.runs // rounds > k * side.runs // rounds:
                if side.prepare is not None:
                    side.prepare()
                elif side.calls > 1:  # a short call would be timed in the caches that another side left
                    side.call()
                times[name].append(device.seconds(side.call, side.calls))
                if name in SPINNING and device is HOST and numba.get_num_threads() > 1:
                    time.sleep(SPIN_SECONDS)
    return times


def plan(
    calls: Mapping[str, Call], prepare: Mapping[str, Call], device: Device, budget: float
) -> dict[str, Side]:
    """Warm the sides up, and give each its share of the budget of seconds."""
    share = budget / len(calls)
    sides = {}
    for name, call in calls.items():
        ready = prepare.get(name)
        once = math.inf
        for k in range(3):
            if ready is not None:
                ready()
            last = device.seconds(call)
            if k:  # the first warms up, and may have compiled
                once = min(once, last)
            if k and last > share:
                break
        repeat = 1 if ready is not None else max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))
        runs = int(share / (repeat * max(once, 1e-9)))
        sides[name] = Side(call, min(max(runs, 1), RUNS[1]), repeat, ready)
    # Ours and the copy take part in the same rounds, so that their ratio is one of neighbours.
    runs = max(RUNS[0], min(sides[OURS].runs, sides[COPY].runs))
    return {n: s._replace(runs=runs) if n in (OURS, COPY) else s for n, s in sides.items()}


@dataclass
class PeerTime:
    """A peer's seconds, and how many times as long as ours they are."""

    seconds: Quartiles
    ratio: float


@dataclass
class Row:
    """What was measured of a case: a row of the report. bench/schema.json says what the fields mean."""

    loss: str
    family: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    in_place: bool
    device: str
    threads: int
    bytes: int
    runs: int
    seconds: Quartiles
    gb_per_s: float
    copy_seconds: Quartiles
    copy_gb_per_s: float
    share_of_copy: float
    relative: Quartiles
    compile_s: float | None
    load_s: float | None
    peak_bytes: int
    error: dict[str, float | None]
    peers: dict[str, PeerTime] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return Case(self.loss, self.shape, self.dtype, self.mode, self.in_place, self.device)

    @property
    def key(self) -> tuple[Case, int]:
        """What two rows have in common that can be compared."""
        return self.case, self.threads


def measure(
    case: Case,
    device: Device,
    peers: Sequence[Peer] = (),
    budget: float = 1.0,
    note: Callable[[str], None] = print,
) -> Row:
    """Measure a case.

    Parameters
    ----------
    case : Case
    device : Device
        The case's.
    peers : sequence of Peer
        Those that have not this loss are left out.
    budget : float
        Seconds to spend on timing. Drawing the arguments, compiling and checking come on top.
    note : callable
        Takes a line about a peer that failed.
    """
    drawn = case.arrays()
    arrays = {n: device.put(a) for n, a in drawn.items()}
    traffic = case.traffic(drawn)
    prepare: dict[str, Call] = {}
    call = case.call(arrays)
    if case.in_place:
        over = {n: device.put(drawn[n].copy()) if n in case.wrt else a for n, a in arrays.items()}
        call = case.call(over, case.out(over))
        if any(case.function.Class.operands[n].domain for n in case.wrt):
            # A gradient is no probability: the argument is put back before each call.
            def restore() -> None:
                for n in case.wrt:
                    over[n][...] = arrays[n]

            prepare[OURS] = restore
    first, compiled = first_call(call)

    calls: dict[str, Call] = {OURS: call, COPY: device.copier(traffic)}
    for peer in peers:
        # What goes wrong in other people's code costs its column, and not the run.
        try:
            side = peer.build(case, drawn)
            if side is not None:
                side()
                calls[peer.name] = side
        except Exception as error:
            lines = str(error).strip().splitlines()
            note(f"{peer.name}, {case}: {type(error).__name__}: {lines[0] if lines else ''}")

    times = interleave(plan(calls, prepare, device, budget), device)
    ours, copy = np.array(times[OURS]), np.array(times[COPY])
    seconds, copy_seconds = quartiles(ours), quartiles(copy)
    relative = quartiles(ours / copy)
    extra = max(first - seconds.median, 0.0)
    if prepare:
        prepare[OURS]()
    peak = device.peak(call)
    return Row(
        loss=case.loss,
        family=case.family.name,
        shape=case.shape,
        dtype=case.dtype,
        mode=case.mode,
        in_place=case.in_place,
        device=case.device,
        threads=numba.get_num_threads(),
        bytes=traffic,
        runs=len(ours),
        seconds=seconds,
        gb_per_s=traffic / seconds.median / 1e9,
        copy_seconds=copy_seconds,
        copy_gb_per_s=traffic / copy_seconds.median / 1e9,
        share_of_copy=1 / relative.median,
        relative=relative,
        compile_s=extra if compiled else None,
        load_s=None if compiled else extra,
        peak_bytes=peak,
        error=errors(case, drawn, device),
        peers={
            n: PeerTime(q, q.median / seconds.median)
            for n, q in ((n, quartiles(t)) for n, t in times.items() if n not in (OURS, COPY))
        },
    )


def first_call(call: Call) -> tuple[float, bool]:
    """Seconds of a call, and whether anything was compiled for it."""
    with event.install_recorder("numba:compile") as recorder:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, bool(recorder.buffer)


def errors(case: Case, drawn: Arrays, device: Device) -> dict[str, float | None]:
    """How far results are from exact ones, on the first rows of the case.

    The value is compared with the float64 reference, and the gradient with plain array code in float64; of
    the losses that have none with their own gradient in float64.
    """
    head = case.family.head(drawn, max(1, ERROR_ELEMENTS // math.prod(case.shape[1:])))
    result = case.call({n: device.put(a) for n, a in head.items()})()
    value, gradient = (
        (result, None) if case.mode == VALUE else (None, result) if case.mode == GRAD else result
    )
    found: dict[str, float | None] = {"value": None, "gradient": None}
    if value is not None:
        found["value"] = relative_error(device.get(value), getattr(reference, case.loss)(**head))
    if gradient is not None and case.dtype != "float64":
        wide = casted(head, dtype_of("float64"))
        plain = NumPy().build(replace(case, dtype="float64", mode=GRAD), wide)
        exact = case.function.grad(*wide.values()) if plain is None else plain()
        pairs = zip(gradient, exact, strict=True) if isinstance(gradient, tuple) else [(gradient, exact)]
        found["gradient"] = max(relative_error(device.get(g), e) for g, e in pairs)
    return found


def relative_error(got: np.ndarray, wanted: Any) -> float:
    """The largest difference, relative to the larger of what was wanted there and its mean size."""
    got, wanted = np.atleast_1d(got).astype(np.float64), np.atleast_1d(wanted)
    gap = np.abs(got - wanted)
    size = np.maximum(np.abs(wanted), np.abs(wanted).mean())
    return float(np.divide(gap, size, out=np.zeros_like(gap), where=gap > 0).max())
