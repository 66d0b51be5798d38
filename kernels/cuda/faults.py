"""Faults in the data of CUDA devices: recorded there by kernels, raised here when the caller synchronises."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import driver
from .target import recorded

# Whether every call that checks values waits for its kernels and raises at once, as a call on the CPU does.
# It costs a synchronisation a call: for debugging. Set it here, or in the environment.
SYNCHRONOUS = os.environ.get("NUMBALOSS_CUDA_SYNCHRONOUS", "0") not in ("", "0")


class Faults:
    """What kernels found wrong in the data of one device.

    Each kind of call, the same loss on arrays of the same shape, has an int64 of its own there, in which the
    kernels record the first position (`kernels.cuda.target.record`).
    """

    COUNT = 4096

    def __init__(self, device: int) -> None:
        self.device = device
        self.address = driver.driver().zeros(self.COUNT)
        self.kinds: dict[Any, int] = {}
        self.errors: list[Callable[[int, int], Exception]] = []
        self.lock = threading.Lock()

    def slot(self, kind: Any, error: Callable[[int, int], Exception]) -> int:
        """Return the address where a kind of call records; ``error(position, number)`` is the exception."""
        with self.lock:
            if kind not in self.kinds:
                if len(self.errors) == self.COUNT:
                    self._raise()  # waits for the device: once in so many kinds
                    self.kinds.clear()
                    self.errors.clear()
                self.kinds[kind] = len(self.errors)
                self.errors.append(error)
            return self.address + 8 * self.kinds[kind]

    def check(self) -> None:
        """Wait for the device; raise what was found since the last time."""
        with self.lock:
            self._raise()

    def _raise(self) -> None:
        count = len(self.errors)
        found = driver.driver().read(self.address, count)
        (wrong,) = np.nonzero(found)
        if wrong.size:
            driver.driver().clear(self.address, count)
            record = recorded(int(found[wrong[0]]))
            assert record is not None
            raise self.errors[wrong[0]](*record)


_faults: dict[int, Faults] = {}


def faults(device: int) -> Faults:
    """A device's faults; it is the current one."""
    if device not in _faults:
        _faults[device] = Faults(device)
    return _faults[device]


def check_now(device: int) -> None:
    """Raise what is wrong at once, if that is asked for."""
    if SYNCHRONOUS:
        faults(device).check()


def synchronize() -> None:
    """Wait for the devices that losses were computed on, and raise what was wrong with their data."""
    for device, found in list(_faults.items()):
        entered = driver.driver().enter(device)
        try:
            found.check()
        finally:
            if entered:
                driver.driver().leave()
