"""What needs numba-cuda: skipped where it is not installed. No test here needs a GPU."""

import importlib.util

import pytest

if not importlib.util.find_spec("numba_cuda"):
    collect_ignore_glob = ["*.py"]


@pytest.fixture
def gpu(monkeypatch):
    """The driver of devices whose memory and kernels `ptx.device` has."""
    from ptx import device

    return device.install(monkeypatch)
