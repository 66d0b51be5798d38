"""What needs numba-cuda: skipped where it is not installed. No test here needs a GPU."""

import importlib.util

if not all(map(importlib.util.find_spec, ("numba_cuda", "greenlet"))):
    collect_ignore_glob = ["*.py"]
