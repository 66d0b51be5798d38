"""A call of all ranks at once, each with a part of the rows.

Ranks meet once or twice, with five float64 each time: before a pass whose gradients are divided by what all
rows count for, and after it, with the values. A rank whose call fails says so where the others wait for it,
so that all of them raise.
"""

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from .distributed.communicators import communicator
from .kernels import devices
from .loss import GRAD, OF_CURVATURE, OF_DERIVATIVES, OF_GRADIENT, VALUE

# Among a call's arguments, the value of all ranks, which the gradient by weights is made with.
MEAN = "mean of all ranks"


class Ranks:
    """Where the ranks of a call meet."""

    def __init__(self, loss: str, comm: Any) -> None:
        self.loss, self.comm = loss, communicator(comm)
        self.said = 0  # a digest of what all ranks must have in common
        self.error: Exception | None = None

    def attempt(self, step: Callable[[], Any]) -> Any:
        """Do a step of this rank's, unless one failed before."""
        if self.error is None:
            try:
                return step()
            except Exception as error:
                self.error = error
        return None

    def meet(self, *numbers: float) -> list[float]:
        """Add up numbers of all ranks; raise where one failed, or their calls differ."""
        buffer = np.array([self.error is not None, self.said, self.said**2, *numbers], np.float64)
        self.comm.all_reduce(buffer)
        failed, said, squared, *sums = buffer.tolist()
        self.check(failed)
        if self.comm.size * squared != said * said:
            raise ValueError(f"{self.loss}: ranks have different options, dtypes or devices")
        return sums

    def check(self, failed: float) -> None:
        """Raise this rank's error, or that others have one: so many failed."""
        if self.error is not None:
            raise self.error
        if failed:
            raise RuntimeError(
                f"{self.loss}: {failed:.0f} of {self.comm.size} ranks failed, and say themselves why"
            )

    def agree(self, *said: Any) -> None:
        """Keep a digest of what all ranks must have in common: small, so that its square is exact."""
        self.said = zlib.crc32(repr(said).encode()) & 0xFFFF


def evaluate(cls: Any, mode: str, call: dict[str, Any], rounded: bool = True) -> Any:
    """Evaluate a loss of the rows of all ranks; the value is of the call's dtype if it is to be rounded."""
    ranks = Ranks(cls.function.__name__, call["comm"])
    call = {n: v for n, v in call.items() if n != "comm"}
    with ExitStack() as stack:

        def begin() -> Any:
            backend = devices.of(call.values())
            described = stack.enter_context(backend.describe(ranks.loss, call, cls._may_be_on_host))
            return cls._evaluation(mode, described, backend)

        evaluation = ranks.attempt(begin)
        part: Any = None if evaluation is None else evaluation.part
        given: Any = None
        reduced = averages = counts = False
        if part is not None:
            settings, dtype = part.settings, part.problem.dtype
            given = part.call.get("normalizer")
            reduced = settings.reduction != "none"
            averages = settings.reduction not in ("none", "sum")
            counts = averages and given is None
            options = [(n, v) for n, v in settings.options.items() if isinstance(v, bool | int | float | str)]
            more = (
                settings.wrt,
                settings.policy,
                settings.floor,
                given,
                str(dtype),
                str(part.problem.arithmetic),
            )
            ranks.agree(ranks.loss, mode, options, more, part.backend.__name__)

        def finish(divisor: float) -> Any:
            if reduced:
                part.share(divisor)
            return evaluation.result()

        def value_of(result: Any) -> float:
            if not reduced or mode == GRAD:
                return 0.0
            return part.backend.as_float(result if mode == VALUE else result[0])

        counted: Any = ranks.attempt(lambda: part.divisor()) if counts else 0.0
        divisor = float(given) if averages and given is not None else 1.0
        if counts and mode in OF_DERIVATIVES:
            divisor, _ = ranks.meet(counted or 0.0, 0.0)
            if "weight" in settings.wrt and cls._weights_have_part(settings, call):
                of_value = {n: v for n, v in call.items() if n not in (*OF_GRADIENT, *OF_CURVATURE)}
                part.call[MEAN] = part.backend.constant(
                    float(evaluate(cls, VALUE, {**of_value, "comm": ranks.comm}, rounded=False)),
                    part.problem.arithmetic,
                )
            result = ranks.attempt(lambda: finish(divisor))
            if mode == GRAD:  # there is nothing to add up
                if ranks.error is not None:
                    raise ranks.error
                return part.backend.give(result)
            value: Any = ranks.attempt(lambda: value_of(result))
            _, total = ranks.meet(0.0, value or 0.0)
        else:
            result = ranks.attempt(lambda: finish(divisor))
            value = ranks.attempt(lambda: value_of(result))
            count, total = ranks.meet(counted or 0.0, value or 0.0)
            divisor = count if counts else divisor
        if reduced and mode != GRAD:
            of = dtype if rounded else part.problem.arithmetic
            value = part.backend.constant(part.backend.over(total, divisor)[0], of)
            result = value if mode == VALUE else (value, *result[1:])
        return part.backend.give(result)
