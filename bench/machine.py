"""What this machine and installation are, for reports and for `numbaloss info`."""

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
from datetime import date, datetime
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core.caching import FunctionCache

import numbaloss as nl
from numbaloss.kernels.cpu import blocks

from .devices import CUDA, Absent
from .peers import PEERS

SIMD = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("sve", 128), ("neon", 128), ("sse2", 128))


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def heading(*peers: str) -> str:
    """When and where tables were made, with the versions of these peers."""
    made = ", ".join(f"{n} {v}" for n, v in versions(*peers).items() if n not in ("numbaloss", "llvmlite"))
    where = f"{date.today()}, {processor()}, {numba.get_num_threads()} threads; {made}."
    return f"{where}\nWhat is wanted stands in brackets.\n"


def simd_bits() -> int:
    """The width of the widest vectors that kernels are compiled for."""
    features = llvmlite.binding.get_host_cpu_features()
    return next((bits for name, bits in SIMD if features.get(name)), 64)


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of what the library stands on, and of `more` distributions where installed."""
    found = {"python": platform.python_version(), "numbaloss": nl.__version__}
    for name in ("numpy", "numba", "llvmlite", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stamp() -> dict[str, Any]:
    """Where and when a report was made."""
    numba.get_num_threads()  # starts Numba's layer, which copies run on
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "simd_bits": simd_bits(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threading_layer": numba.threading_layer(),
            "system": platform.platform(),
        },
        "versions": versions("torch", "jax", "scikit-learn", "cupy-cuda12x", "cupy-cuda13x", "liger-kernel"),
    }


def cache() -> dict[str, Any]:
    """Where Numba keeps the CPU's kernels, how many, and of what size."""
    place = Path(FunctionCache(blocks.direct).cache_path)
    files = list(place.glob("*.nb[ic]"))
    return {
        "path": str(place),
        "kernels": sum(f.suffix == ".nbc" for f in files),
        "bytes": sum(f.stat().st_size for f in files),
    }


def gpus() -> tuple[list[str], str | None]:
    """The CUDA devices, and why there are none; nothing of CUDA is imported where there is no driver."""
    if ctypes.util.find_library("cuda") is None:
        return [], "no CUDA driver"
    try:
        runtime = CUDA().cupy.cuda.runtime
    except Absent as absent:
        return [], str(absent)
    properties = [runtime.getDeviceProperties(k) for k in range(runtime.getDeviceCount())]
    return [f"{p['name'].decode()}, {p['totalGlobalMem'] / 2**30:.0f} GiB" for p in properties], None


def missing() -> dict[str, str]:
    """What is not here, and how to get it."""
    wanted = {
        "ml_dtypes": ("bfloat16 arrays", 'pip install "numbaloss[bfloat16]"'),
        "matplotlib": ("bench --plot", 'pip install "numbaloss[bench]"'),
        "pytest_benchmark": ("pytest bench/", 'pip install "numbaloss[bench]"'),
        "threadpoolctl": ("bench --threads, for BLAS", "pip install threadpoolctl"),
    }
    found = {
        name: f"{purpose}: {command}"
        for name, (purpose, command) in wanted.items()
        if importlib.util.find_spec(name) is None
    }
    for peer in PEERS.values():
        if importlib.util.find_spec(peer.module) is None:
            found[peer.name] = f"bench --peer {peer.name}: {peer.install}"
    return found


def info() -> dict[str, Any]:
    """All of it."""
    names, why = gpus()
    return {
        **stamp(),
        "threads": {"used": numba.get_num_threads(), "most": numba.config.NUMBA_NUM_THREADS},
        "cache": cache(),
        "gpus": names,
        "gpus_absent": why,
        "missing": missing(),
    }
