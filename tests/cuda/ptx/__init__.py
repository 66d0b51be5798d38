"""CUDA devices on which the library's PTX is executed in Python, for machines without a GPU."""

import sys
from pathlib import Path

if __name__ != "ptx":  # a command's: pytest puts the folder of the tests there itself
    sys.path.insert(0, str(Path(__file__).parents[2]))
