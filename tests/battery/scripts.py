"""Scripts in a fresh interpreter, and what they told: how many things they tried, and which they lost.

A script prints ``tried <number>`` and ``lost <what>``; a death, a time-out or silence is a loss as well.
``trying <what>`` says what it would die of, and ``note <what>`` what is to be known and is no loss.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import Tally

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a script printed, and how it ended if it did not end well."""

    lines: list[str]
    fault: str

    def tally(self, what: str) -> Tally:
        """Count what the script told, under a name for what it did."""
        counts = [int(line.split()[1]) for line in self.lines if line.startswith("tried ")]
        lost = [line.removeprefix("lost ") for line in self.lines if line.startswith("lost ")]
        if self.fault or not counts:
            began = [line.removeprefix("trying ") for line in self.lines if line.startswith("trying ")]
            lost.append(" ".join([*began[-1:], self.fault or "it told nothing"]))
        return Tally(sum(counts) or 1, [f"{what}: {line}" for line in lost])

    def remark(self) -> str:
        """What the script noted beside what it tried."""
        notes = [line.removeprefix("note ") for line in self.lines if line.startswith("note ")]
        return "; ".join(notes)


def run(script: str, seconds: float = 300, place: Path | None = None, **environment: Any) -> Outcome:
    """Run a script in a process of its own, in a folder whose modules it can import."""
    with TemporaryDirectory() as own:
        path = (place or Path(own)) / "script.py"
        path.write_text(script)
        with open(Path(own) / "output", "w+") as output, open(Path(own) / "errors", "w+") as errors:
            # One thread for matrices: more may round in another order.
            given = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environment}
            process = subprocess.Popen(
                [sys.executable, str(path)],
                env={**os.environ, **given},
                cwd=path.parent,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                fault = f"exit {code}" if code else ""
            except subprocess.TimeoutExpired:
                fault = f"nothing more was heard in {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)  # its children, too
                process.wait()
            output.seek(0)
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            return Outcome(output.read().splitlines(), fault and f"{fault}: {last}")


def rewrite(path: Path, text: str) -> None:
    """Write a file that has the same age as before: an unpacked archive, or a copied one."""
    path.write_text(text)
    os.utime(path, (1e9, 1e9))


@contextmanager
def installation(read_only: bool = False) -> Iterator[Path]:
    """A copy of the library, in a folder to import it from."""
    with TemporaryDirectory() as made:
        place = Path(made)
        shutil.copytree(ROOT / "numbaloss", place / "numbaloss", ignore=shutil.ignore_patterns("__pycache__"))
        if read_only:
            lock(place)
        try:
            yield place
        finally:
            for path in (place, *place.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)


def lock(place: Path) -> None:
    """Let nobody write to a folder, and what is in it."""
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def nowhere(place: Path, script: str) -> str:
    """A script as a user runs it who has no home and can write nowhere: even root."""
    return f"""
import ctypes, os, sys
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
if sys.platform == "linux" and os.geteuid() == 0:
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0
os.environ.update(HOME={str(place)!r}, XDG_CACHE_HOME={str(place)!r})
os.environ.pop("NUMBA_CACHE_DIR", None)
sys.path.insert(0, {str(place)!r})
{script}"""


# Before a script that cannot write to its cache: open() refuses, as it does where a disk is full.
FULL_DISK = """
import builtins, errno, os
real = open
def full(file, mode="r", *args, **kwargs):
    if "w" in mode and str(file).startswith(os.environ["NUMBA_CACHE_DIR"]):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
    return real(file, mode, *args, **kwargs)
builtins.open = full
"""

# Before a script that counts what is compiled.
COUNT = """
from numba.core import event
compiled = []
class Count(event.Listener):
    def on_start(self, e): compiled.append(e)
    def on_end(self, e): pass
event.register("numba:compile", Count())
"""
