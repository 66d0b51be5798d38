"""Ranks that are processes: by MPI, and by PyTorch's process groups."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import numbaloss as nl

SCRIPT = Path(__file__).with_name("ranks.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")


def equal(output):
    """The ranks that have found all equal: their lines may run together."""
    return sorted(int(k) for k in re.findall(r"rank (\d+) of \d+: equal", output))


@pytest.mark.skipif(
    not find_spec("mpi4py") or not MPIEXEC.exists(), reason="no mpi4py with an mpiexec of its own"
)
def test_mpi():
    done = subprocess.run(
        [MPIEXEC, "-n", "4", sys.executable, SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert equal(done.stdout) == [0, 1, 2, 3], done.stderr


def test_process_groups_of_pytorch(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, SCRIPT, "torch"]
    ranks = [
        subprocess.Popen(
            [*command, str(k), "2", tmp_path / "met"], stdout=-1, stderr=-1, text=True, env=os.environ
        )
        for k in range(2)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert equal("".join(out for out, _ in outputs)) == [0, 1], outputs


class Foreign:
    """Stands for a communicator of another library: it is known by its class's module."""

    def __init__(self):
        self.calls = []


def of_library(module, **names):
    return type("Communicator", (Foreign,), {"__module__": module, **names})()


def test_nccl_by_cupy(monkeypatch):
    """By way of the device, where arrays of the host are concerned, and on the caller's stream."""

    class Array(np.ndarray):
        def get(self):
            return np.array(self)

    fake = type(sys)("cupy")
    fake.asarray = lambda a: a if isinstance(a, Array) else a.copy().view(Array)
    monkeypatch.setitem(sys.modules, "cupy", fake)

    def all_reduce(self, in_array, out_array, op="sum", stream=None):
        assert isinstance(in_array, Array) and op == "sum" and stream == "mine"
        out_array += 1

    def all_gather(self, in_array, out_array, count, stream=None):
        assert count == in_array.size
        out_array[:] = in_array, in_array + 1

    comm = nl.distributed.communicator(
        of_library(
            "cupyx.distributed._nccl_comm", rank=1, _n_devices=2, all_reduce=all_reduce, all_gather=all_gather
        )
    )
    assert (comm.rank, comm.size) == (1, 2)
    buffer, out = np.zeros(3), np.empty((2, 3))
    comm.all_reduce(buffer, stream="mine")
    comm.all_gather(buffer, out)
    assert buffer.tolist() == [1, 1, 1] and out.tolist() == [[1, 1, 1], [2, 2, 2]]

    core = type(sys)("nccl.core")
    core.SUM, core.MAX = "SUM", "MAX"
    monkeypatch.setitem(sys.modules, "nccl.core", core)

    def allreduce(self, send, receive, op, *, stream=None):
        assert op == "MAX" and send is receive
        receive += 2

    def allgather(self, send, receive, *, stream=None):
        receive[:] = send

    comm = nl.distributed.communicator(
        of_library("nccl.core.communicator", rank=0, nranks=2, allreduce=allreduce, allgather=allgather)
    )
    comm.all_reduce(buffer, "max")
    comm.all_gather(buffer, out)
    assert comm.size == 2 and buffer.tolist() == [3, 3, 3] and (out == 3).all()


def test_ray(monkeypatch):
    collective, types = type(sys)("ray.util.collective"), type(sys)("ray.util.collective.types")
    types.ReduceOp = type("ReduceOp", (), {"SUM": "SUM"})
    collective.get_rank = {"here": 1}.get
    collective.get_collective_group_size = lambda name: 2
    collective.allreduce = lambda tensor, name, op: tensor.__iadd__(1)
    collective.allgather = lambda tensors, tensor, name: [t.__setitem__(slice(None), tensor) for t in tensors]
    for name, module in (
        ("ray", type(sys)("ray")), ("ray.util", type(sys)("ray.util")), ("ray.util.collective", collective),
        ("ray.util.collective.types", types),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["ray.util"], "collective", collective, raising=False)
    comm = nl.distributed.Ray("here")
    buffer, out = np.zeros(2), np.empty((2, 2))
    comm.all_reduce(buffer)
    comm.all_gather(buffer, out)
    assert (comm.rank, comm.size, buffer.tolist(), out.tolist()) == (1, 2, [1, 1], [[1, 1], [1, 1]])
    collective.get_rank = lambda name: -1
    with pytest.raises(ValueError, match="not in a collective group 'nowhere'"):
        nl.distributed.Ray("nowhere")
