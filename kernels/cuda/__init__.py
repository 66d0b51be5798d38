"""The GPU's templates, compiled by numba-cuda.

`target` is the one module that knows numba-cuda. A kernel is a plain Python function over the raw pointers
and intrinsics that it gives; tests/cuda/ptx executes the PTX that becomes of it without a GPU.
"""

from . import math as math  # the functions of `numbaloss.math` for this target
