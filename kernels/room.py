"""How much of a disk compiled kernels take: those that were used longest ago give way to new ones."""

import os
from contextlib import suppress

LIMIT = 2**30  # bytes of kernels in a directory; a sixteenth more may come before it is looked at again
KINDS = ".nbc", ".nbi", ".cubin"  # in the names of files, and of those that a killed process left unfinished

_stored: dict[str, int] = {}  # bytes, by directory, since it was looked at


def used(path: str | os.PathLike[str]) -> None:
    """Note that a file was used, in its time of modification; one of a read-only disk keeps its own."""
    with suppress(OSError):
        os.utime(path)


def stored(path: str | os.PathLike[str], size: int) -> None:
    """Note a new file, and make room where its directory holds more than LIMIT bytes."""
    directory = os.path.dirname(path)
    since = _stored.get(directory, LIMIT) + size  # so a process looks at its first file
    _stored[directory] = since if since < LIMIT // 16 else 0
    if since >= LIMIT // 16:
        _make_room(directory)


def _make_room(directory: str) -> None:
    kernels = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if any(kind in entry.name for kind in KINDS):
                with suppress(OSError):  # another process may have removed it
                    about = entry.stat()
                    kernels.append((about.st_mtime_ns, about.st_size, entry.path))
    total = sum(size for _, size, _ in kernels)
    for _, size, path in sorted(kernels):
        if total <= LIMIT:
            break
        with suppress(OSError):
            os.unlink(path)
        total -= size
