"""The one protocol by which ranks meet, and those who speak another."""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Communicator(Protocol):
    """Ranks that meet: every rank calls the same methods in the same order.

    Attributes
    ----------
    rank, size : int
        The number of this rank, from 0, and how many there are.
    """

    rank: int
    size: int

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        """Replace an array by the sum (``'max'``: the largest, ``'min'``: the smallest) of all ranks' ones.

        Parameters
        ----------
        buffer : array
            C-contiguous, of the same shape and dtype on each rank.
        op : {'sum', 'max', 'min'}
        stream : object, optional
            Of an array on a device, the stream on which it was written and will be read.
        """

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        """Store the arrays of all ranks in ``out[rank]``, of shape ``(size, *buffer.shape)``."""


def communicator(comm: Any) -> Communicator:
    """Return what speaks the protocol for an object of a library that does not.

    Parameters
    ----------
    comm : object
        A communicator of ``mpi4py.MPI``, ``cupyx.distributed.NCCLBackend``, ``nccl.core.Communicator``, a
        process group of ``torch.distributed``, or anything with `Communicator`'s names.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    library = type(comm).__module__.partition(".")[0]
    adapter: Any = {"mpi4py": MPI, "cupyx": of_cupy, "nccl": of_nccl, "torch": Torch}.get(library)
    if adapter is not None:
        return adapter(comm)
    if all(hasattr(comm, n) for n in ("rank", "size", "all_reduce", "all_gather")):
        return comm
    got = f"{type(comm).__module__}.{type(comm).__qualname__}".removeprefix("builtins.")
    raise TypeError(
        "comm must be a communicator of mpi4py, CuPy, nccl4py or torch.distributed, "
        f"numbaloss.distributed.Ray, or have rank, size, all_reduce and all_gather, got {got}"
    )


def is_on_host(array: Any) -> bool:
    return isinstance(array, np.ndarray)


class MPI:
    """mpi4py's. It takes arrays on devices too, which it reads at once: their stream has to be done."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self.api = sys.modules["mpi4py.MPI"]

    def _wait(self, stream: Any) -> None:
        if stream is not None:
            stream.synchronize()

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        self._wait(stream)
        self.comm.Allreduce(self.api.IN_PLACE, buffer, getattr(self.api, op.upper()))

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        self._wait(stream)
        self.comm.Allgather(buffer, out)


class OnDevice:
    """NCCL's, by two functions: arrays of the host go by way of the device."""

    def __init__(self, rank: int, size: int, reduce: Callable[..., Any], gather: Callable[..., Any]) -> None:
        self.rank, self.size, self.reduce, self.gather = rank, size, reduce, gather

    def _there(self, array: Any) -> Any:
        import cupy

        return cupy.asarray(array)

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        there = self._there(buffer)
        self.reduce(there, op, stream)
        if is_on_host(buffer):
            buffer[...] = there.get()

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        there = self._there(out)
        self.gather(self._there(buffer), there, stream)
        if is_on_host(out):
            out[...] = there.get()


def of_cupy(comm: Any) -> OnDevice:
    """Adapt ``cupyx.distributed.NCCLBackend``."""
    return OnDevice(
        comm.rank,
        comm._n_devices,
        lambda buffer, op, stream: comm.all_reduce(buffer, buffer, op, stream),
        lambda buffer, out, stream: comm.all_gather(buffer, out, buffer.size, stream),
    )


def of_nccl(comm: Any) -> OnDevice:
    """Adapt nccl4py's ``nccl.core.Communicator``."""
    api = sys.modules["nccl.core"]
    return OnDevice(
        comm.rank,
        comm.nranks,
        lambda buffer, op, stream: comm.allreduce(buffer, buffer, getattr(api, op.upper()), stream=stream),
        lambda buffer, out, stream: comm.allgather(buffer, out, stream=stream),
    )


class Torch:
    """A process group of ``torch.distributed``: Gloo's for arrays of the host, NCCL's for a device's."""

    def __init__(self, group: Any) -> None:
        import torch

        self.torch, self.group = torch, group
        self.rank, self.size = group.rank(), group.size()
        self.device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"

    def _taken(self, array: Any) -> Any:
        return self.torch.as_tensor(array, device=self.device)

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        tensor, api = self._taken(buffer), self.torch.distributed
        api.all_reduce(tensor, getattr(api.ReduceOp, op.upper()), self.group)
        if is_on_host(buffer) and self.device != "cpu":
            buffer[...] = tensor.cpu().numpy()

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        tensor = self._taken(out)
        self.torch.distributed.all_gather(list(tensor), self._taken(buffer), self.group)
        if is_on_host(out) and self.device != "cpu":
            out[...] = tensor.cpu().numpy()


class Ray:
    """A group of ``ray.util.collective``, made in each actor by ``init_collective_group``.

    Parameters
    ----------
    group_name : str, default 'default'
        The name that it was made with.
    """

    def __init__(self, group_name: str = "default") -> None:
        from ray.util import collective

        self.api, self.name = collective, group_name
        self.rank = collective.get_rank(group_name)
        self.size = collective.get_collective_group_size(group_name)
        if self.rank < 0:
            raise ValueError(f"Ray: this process is not in a collective group {group_name!r}")

    def all_reduce(self, buffer: Any, op: str = "sum", stream: Any = None) -> None:
        from ray.util.collective.types import ReduceOp

        self.api.allreduce(buffer, self.name, getattr(ReduceOp, op.upper()))

    def all_gather(self, buffer: Any, out: Any, stream: Any = None) -> None:
        self.api.allgather(list(out), buffer, self.name)
