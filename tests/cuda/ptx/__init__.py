"""CUDA devices on which the library's PTX is executed in Python, for machines without a GPU."""
