"""All that a library of losses meets in real life, tried at length: ``python -m tests.battery``.

Each module holds trials of one kind and tells what was tried and what was lost; `tests/test_battery.py` runs
a little of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """How often something was tried, and what was lost: one line for each, none where all is well."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Tally") -> "Tally":
        self.tried += other.tried
        self.lost += other.lost
        return self


@dataclass(frozen=True)
class Trial:
    """A row of the battery's table.

    Attributes
    ----------
    name : str
        What is tried, in a few words.
    run : callable
        ``run(share)`` tries and returns a Tally; `share` is the part of the whole to do, 1.0 for all of it.
    """

    name: str
    run: Callable[[float], Tally]
