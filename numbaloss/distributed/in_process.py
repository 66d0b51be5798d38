"""Ranks that are threads of one process: what others do over a network can be tried on any machine."""

import threading
from typing import Any

import numpy as np

REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum}


class Meeting:
    """Where threads leave an array each, and see those of all."""

    def __init__(self, size: int, timeout: float) -> None:
        self.left: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)

    def exchange(self, rank: int, array: Any) -> list[Any]:
        """Return the arrays of all ranks, in their order."""
        self.left[rank] = array.copy()
        try:
            self.barrier.wait()
            found = list(self.left)
            self.barrier.wait()  # nobody leaves another one before all have looked
        except threading.BrokenBarrierError:
            raise RuntimeError(f"rank {rank} waited for others, and one at least did not come") from None
        return found


class Thread:
    """The communicator of one thread: see `Communicator`."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, size

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} threads>"

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        """Replace an array by the sum, in the order of the ranks, or by the largest or smallest."""
        found = self.meeting.exchange(self.rank, buffer)
        reduced = found[0]
        for other in found[1:]:
            reduced = REDUCTIONS[op](reduced, other)
        buffer[...] = reduced

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        """Store the arrays of all ranks in ``out[rank]``."""
        for rank, array in enumerate(self.meeting.exchange(self.rank, buffer)):
            out[rank] = array


def threads(n: int, timeout: float = 60.0) -> list[Thread]:
    """Return communicators of one process, one for each of n threads.

    Parameters
    ----------
    n : int
        How many ranks there are.
    timeout : float, default 60.0
        Seconds for which a rank waits for the others, before it raises a RuntimeError.

    Returns
    -------
    list of Communicator
        One for each rank, in order.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> (comm,) = nl.distributed.threads(1)
    >>> float(nl.l1_loss(np.ones(4), np.zeros(4), comm=comm))
    1.0
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"threads: n must be a whole number >= 1, got {n!r}")
    meeting = Meeting(n, timeout)
    return [Thread(meeting, rank, n) for rank in range(n)]
