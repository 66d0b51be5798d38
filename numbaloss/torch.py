"""The losses for PyTorch: functions and modules of its names, on tensors, with autograd.

>>> import torch, numbaloss.torch as nt
>>> scores = torch.zeros(2, 4, requires_grad=True)
>>> nt.cross_entropy(scores, torch.tensor([2, 0])).backward()
>>> scores.grad[0].tolist()
[0.125, 0.125, -0.375, 0.125]

``nt.function(loss)`` and ``nt.Module(criterion)`` do the same for a loss of one's own.

A loss is a few operators of PyTorch's, each made when it is first called: ``numbaloss::huber_loss`` gives the
value, ``numbaloss::huber_loss_by_input`` the value and, in the same pass, the gradient that the backward pass
then scales. So a gradient is computed where an argument requires it, and once. ``torch.compile`` takes the
operators as they are; under autocast they compute in float32, as PyTorch's own losses do. An ordinary call,
that nothing traces or transforms, computes the same without them: PyTorch's dispatcher takes longer than a
small loss. CPU tensors are used where they lie, so are those on CUDA devices, on PyTorch's current stream.

There are second derivatives of losses of elements, by one argument. Others, forward-mode derivatives and
``torch.func.grad`` raise an error.
"""

import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("numbaloss.torch needs PyTorch: pip install torch") from error
from torch.autograd import forward_ad

from .arguments import Option
from .call import resolve_normalizer
from .families.elementwise import ElementwiseLoss
from .loss import Loss, LossFunction, registry
from .losses.embedding import triplet_margin_with_distance_loss as _with_distance
from .losses.linear import LinearCrossEntropyLoss as _LinearCrossEntropyLoss
from .losses.linear import LinearCrossEntropyOptions
from .terms import axes_beyond_terms, names_of_arrays, shape_of_terms

# ---- tensors and arrays -------------------------------------------------------------------------------


def as_array(loss: str, name: str, tensor: Any) -> Any:
    """Return a CPU tensor as an array over the same memory, one on a CUDA device as it is."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        return tensor
    if not tensor.is_cpu:
        raise TypeError(f"{loss}: {name} must be on the CPU or a CUDA device, got {tensor.device}")
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(f"{loss}: {name} is bfloat16, which needs ml_dtypes: pip install ml_dtypes") from None
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_tensor(result: Any) -> Any:
    """Return a result, an array or a number of NumPy's, as a tensor over the same memory."""
    if isinstance(result, torch.Tensor):
        return result
    array = np.asarray(result)
    if array.dtype.kind != "V":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def laid_out(made: Any, like: Any) -> Any:
    """Return a gradient in the layout that `torch.empty_like` gives, on which compiled code relies."""
    if made.is_contiguous() and like.is_contiguous():
        return made
    wanted = torch.empty_like(like, device="meta").stride()
    return made if made.stride() == wanted else torch.empty_like(like).copy_(made)


def scaled(gradient: Any, upstream: Any, axes: Sequence[int]) -> Any:
    """Return a gradient times the upstream one, which has no such axes."""
    for axis in axes:
        upstream = upstream.unsqueeze(axis)
    if upstream.dim() > gradient.dim():  # a lone row of one score
        upstream = upstream.reshape(gradient.shape)
    if not is_free(gradient, upstream):
        return gradient * upstream
    gradient = gradient.detach()
    if upstream.device.type == "cpu" and not upstream.dim() and upstream.item() == 1:
        return gradient  # a pass over memory less
    return gradient.mul_(upstream)


# PyTorch says so nowhere else; where it does not, nothing is overwritten.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_wrappers = tuple(
    getattr(getattr(torch._C, "_functorch", None), name, lambda tensor: True)
    for name in ("is_functorch_wrapped_tensor", "is_legacy_batchedtensor")
)


def is_free(gradient: Any, upstream: Any) -> bool:
    """Return whether a saved gradient may be overwritten: in an ordinary backward pass, the last one."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    plain = type(gradient) is torch.Tensor and type(upstream) is torch.Tensor
    return plain and not _keeps_graph() and not any(wraps(upstream) for wraps in _wrappers)


# What may look at calls. Where a PyTorch does not say whether it does, it is taken to.
_onlookers: tuple[Callable[[], Any], ...] = tuple(
    getattr(holder, name, lambda: True)
    for holder, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),
        (torch._C, "_get_tracing_state"),
        (torch._C, "_is_any_autocast_enabled"),
    )
)


def is_watched() -> bool:
    """Return whether anything looks at calls: a compiler, a tracer, a transform, a mode, autocast."""
    return torch.compiler.is_compiling() or any(look() for look in _onlookers)


def is_plain(tensor: Any) -> bool:
    """Return whether a tensor is PyTorch's own, on a device that losses are computed on."""
    kind = type(tensor)
    return (kind is torch.Tensor or kind is torch.nn.Parameter) and (tensor.is_cpu or tensor.is_cuda)


# ---- operators ----------------------------------------------------------------------------------------

CHUNKING = "int[]?"  # `LinearCrossEntropyOptions` in a schema
NUMBERS = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def type_in_schema(loss: str, name: str, option: Option) -> str:
    """Return the type of an option in an operator's schema."""
    values = (option.default, *option.samples)
    kinds = {type(v) for v in values}
    optional = "?" if type(None) in kinds else ""
    kinds.discard(type(None))
    if kinds == {LinearCrossEntropyOptions}:
        return CHUNKING
    for kind, classes in NUMBERS.items():
        if kinds and kinds <= {*classes}:
            return kind + optional
    raise TypeError(f"{loss}: {name} is no bool, number or string, which an operator of PyTorch's could take")


class Operators:
    """The operators of a loss, each made when it is first asked for.

    Attributes
    ----------
    names : tuple of str
        A call's arguments, in the order in which operators take them.
    arrays : dict of str to int
        The positions of the tensors.
    types : dict of str to str
        Of the others, their types in a schema.
    """

    def __init__(self, loss: LossFunction, name: str) -> None:
        self.loss, self.cls, self.name = loss, loss.Class, name
        parameters: Any = loss.without_ranks.parameters
        self.names = tuple(parameters)
        self.positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        self.arrays = {n: self.names.index(n) for n in names_of_arrays(self.cls)}
        fields = self.cls.fields.items()
        self.types = {n: type_in_schema(loss.__name__, n, f) for n, f in fields if not f.array}
        self.types["normalizer"] = "float?"
        self.chunkings = [self.names.index(n) for n, kind in self.types.items() if kind == CHUNKING]
        self.reduction = self.names.index("reduction")
        self.made: dict[tuple[str, ...], str] = {}
        self.direct: dict[tuple[str, ...], Callable[..., Any]] = {}
        self.lock = threading.Lock()

    def find(self, kind: str, wrt: tuple[str, ...]) -> str:
        """Return the name of the operator of a kind, value, gradient or curvature, by some arguments."""
        found = self.made.get((kind, *wrt))
        if found is None:
            with self.lock:  # another thread may have made it meanwhile
                found = self.made.get((kind, *wrt)) or getattr(self, kind)(wrt)
                self.made[(kind, *wrt)] = found
        return found

    def directly(self, wrt: tuple[str, ...]) -> Callable[..., Any]:
        """Return the function that computes as the operator `value` does, without PyTorch's dispatcher."""
        found = self.direct.get(wrt)
        if found is None:
            kernel, _, (backward, setup_context) = self.parts(wrt)

            def forward(ctx: Any, *given: Any) -> Any:
                result = kernel(*given)
                setup_context(ctx, given, result)  # of its own PyTorch would call it at length
                return result

            body: dict[str, Any] = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            function: Any = type(self.name, (torch.autograd.Function,), body)
            found = function.apply if wrt else kernel
            self.direct[wrt] = found
        return found

    def run(self, kind: str, wrt: tuple[str, ...], *given: Any) -> Any:
        """Call an operator."""
        return getattr(torch.ops.numbaloss, self.find(kind, wrt)).default(*given)

    def define(
        self,
        suffix: str,
        more: str,
        outputs: int,
        kernel: Any,
        fake: Any,
        autograd: tuple[Any, Any] | None = None,
    ) -> str:
        """Make an operator that takes a call's arguments, and more; return its name."""
        optional = {n for n in self.arrays if n not in self.cls._required}
        types = {n: "Tensor?" if n in optional else self.types.get(n, "Tensor") for n in self.names}
        arguments = ", ".join(f"{kind} {n}" for n, kind in types.items())
        result = ", ".join(["Tensor"] * outputs)
        name = f"{self.name}{suffix}"
        operator = torch.library.custom_op(
            f"numbaloss::{name}",
            kernel,
            mutates_args=(),
            schema=f"({arguments}{more}) -> {result if outputs == 1 else f'({result})'}",
        )
        operator.register_fake(fake)
        for device in ("cpu", "cuda"):
            operator.register_autocast(device, torch.float32)
        if autograd is not None:
            operator.register_autograd(autograd[0], setup_context=autograd[1])
        return name

    # ---- a call's arguments ----------------------------------------------------------------------------
    def call(self, given: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments for the loss itself."""
        values = list(given)
        for n, k in self.arrays.items():
            if values[k] is not None:
                values[k] = as_array(self.loss.__name__, n, values[k])
        for k in self.chunkings:
            if values[k] is not None:
                values[k] = LinearCrossEntropyOptions(*(size or None for size in values[k]))
        keywords = zip(self.names[self.positional :], values[self.positional :], strict=True)
        return tuple(values[: self.positional]), dict(keywords)

    def tensors(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return the tensors that are given, by name."""
        return {n: given[k] for n, k in self.arrays.items() if given[k] is not None}

    def unreduced(self, given: Sequence[Any]) -> bool:
        """Return whether a call's value are its terms."""
        return given[self.reduction] == "none"

    def axes(self, given: Sequence[Any], wrt: tuple[str, ...]) -> list[Any]:
        """Return each argument's axes that the value does not have; None where it adds up several terms.

        Such a gradient cannot be scaled: it is worked out when the upstream gradient is known.
        """
        if not self.unreduced(given):
            return [()] * len(wrt)
        shapes = {n: t.shape for n, t in self.tensors(given).items()}
        return [axes_beyond_terms(self.cls, n, shapes) for n in wrt]

    def dtype(self, tensors: Mapping[str, Any], wrt: tuple[str, ...]) -> Any:
        """Return the dtype that a call's tensors promote to: labels promote nothing, unless by request."""
        labels = [n for n in getattr(self.cls, "labels", ()) if n not in wrt]
        found = None
        for n, t in tensors.items():
            if t.is_floating_point() and n not in labels:
                found = t.dtype if found is None else torch.promote_types(found, t.dtype)
        return found

    # ---- values and gradients --------------------------------------------------------------------------
    def value(self, wrt: tuple[str, ...]) -> str:
        """Make the operator that gives the value, and then each gradient; empty where it has to wait."""
        kernel, fake, autograd = self.parts(wrt)
        suffix = f"_by_{'_'.join(wrt)}" if wrt else ""
        return self.define(suffix, "", 1 + len(wrt), kernel, fake, autograd if wrt else None)

    def parts(self, wrt: tuple[str, ...]) -> tuple[Any, Any, tuple[Any, Any]]:
        """Return the functions of that operator: itself, of fake tensors, and backward with its context."""

        def ready(given: Sequence[Any]) -> tuple[str, ...]:
            return tuple(n for n, axes in zip(wrt, self.axes(given, wrt), strict=True) if axes is not None)

        def kernel(*given: Any) -> Any:
            args, kwargs = self.call(given)
            names = ready(given)
            if names:
                value, gradients = self.loss.value_and_grad(*args, **kwargs, wrt=names)
            else:
                value, gradients = self.loss(*args, **kwargs), ()
            value = as_tensor(value).contiguous()
            if not wrt:
                return value
            found = dict(zip(names, map(as_tensor, gradients), strict=True))
            tensors = self.tensors(given)
            return value, *(
                laid_out(found[n], tensors[n]) if n in found else tensors[n].new_empty(0) for n in wrt
            )

        def fake(*given: Any) -> Any:
            tensors, names = self.tensors(given), ready(given)
            shapes = {n: t.shape for n, t in tensors.items()}
            shape = shape_of_terms(self.cls, shapes) if self.unreduced(given) else ()
            value = next(iter(tensors.values())).new_empty(shape, dtype=self.dtype(tensors, wrt))
            if not wrt:
                return value
            return value, *(
                torch.empty_like(tensors[n]) if n in names else tensors[n].new_empty(0) for n in wrt
            )

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)  # tells a second backward pass
            ctx.axes = self.axes(inputs, wrt)
            keep = None in ctx.axes or self.is_curved(wrt)
            ctx.places = [k for k in self.arrays.values() if keep and inputs[k] is not None]
            ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
            ctx.save_for_backward(*output[1:], *(inputs[k] for k in ctx.places))

        def backward(ctx: Any, upstream: Any, *seconds: Any) -> Any:
            saved = ctx.saved_tensors  # asked for once: a checkpoint computes them here
            gradients, kept = saved[: len(wrt)], saved[len(wrt) :]
            given, found = list(ctx.others), [None] * len(ctx.others)
            for k, tensor in zip(ctx.places, kept, strict=True):
                given[k] = tensor
            for n, gradient, axes, second in zip(wrt, gradients, ctx.axes, seconds, strict=True):
                made = None
                if upstream is not None:
                    made = (
                        self.run("gradient", (n,), *given, upstream)
                        if axes is None
                        else scaled(gradient, upstream, axes)
                    )
                if second is not None:
                    more = second * self.second_derivative(given, wrt)
                    made = more if made is None else made + more
                found[self.arrays[n]] = made
            return tuple(found)

        return kernel, fake, (backward, setup_context)

    def gradient(self, wrt: tuple[str, ...]) -> str:
        """Make the operator that gives one gradient of unreduced terms, each times the upstream's number."""
        (name,) = wrt

        def kernel(*given: Any) -> Any:
            args, kwargs = self.call(given[:-1])
            upstream = as_array(self.loss.__name__, "upstream", given[-1])
            made = self.loss.grad(*args, **kwargs, wrt=name, grad_output=upstream)
            return laid_out(as_tensor(made), given[self.arrays[name]])

        def fake(*given: Any) -> Any:
            return torch.empty_like(given[self.arrays[name]])

        return self.define(f"_gradient_by_{name}", ", Tensor upstream", 1, kernel, fake)

    # ---- second derivatives ----------------------------------------------------------------------------
    def is_curved(self, wrt: tuple[str, ...]) -> bool:
        """Return whether the Hessian by some arguments is a diagonal that the loss gives."""
        return issubclass(self.cls, ElementwiseLoss) and len(wrt) == 1 and wrt[0] in self.cls._arrays

    def second_derivative(self, given: Sequence[Any], wrt: tuple[str, ...]) -> Any:
        """Return the diagonal of the Hessian by an argument."""
        if not self.is_curved(wrt):
            raise NotImplementedError(
                f"{self.loss.__name__}: no second derivative by {' and '.join(wrt)}: numbaloss.torch has "
                "those of losses of elements, where one argument requires grad"
            )
        return self.run("curvature", wrt, *given)

    def curvature(self, wrt: tuple[str, ...]) -> str:
        """Make the operator that gives the diagonal of the Hessian by one argument."""
        (name,) = wrt

        def kernel(*given: Any) -> Any:
            args, kwargs = self.call(given)
            made = self.loss.value_grad_hess(*args, **kwargs, wrt=name)[2]
            return laid_out(as_tensor(made), given[self.arrays[name]])

        def fake(*given: Any) -> Any:
            return torch.empty_like(given[self.arrays[name]])

        return self.define(f"_curvature_by_{name}", "", 1, kernel, fake)


# ---- functions ----------------------------------------------------------------------------------------

_functions: dict[LossFunction, Callable[..., Any]] = {}
_names: set[str] = set()


def function(loss: Any) -> Callable[..., Any]:
    """Make a function on tensors of a loss: one of the library, or of one's own.

    Parameters
    ----------
    loss : LossFunction, or subclass of Loss
        For instance what ``nl.elementwise_loss`` gives.

    Returns
    -------
    function
        With the loss's arguments: tensors in place of arrays.

    Raises
    ------
    TypeError
        If it is no loss, or has options that are no bool, number or string.

    Examples
    --------
    >>> import torch, numbaloss as nl, numbaloss.torch as nt
    >>> @nl.elementwise_loss
    ... def quartic(input, target, scale=1.0):
    ...     return scale * (input - target) ** 4
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> nt.function(quartic)(x, torch.zeros(2), reduction="sum").backward()
    >>> x.grad
    tensor([ 4., 32.])
    """
    loss = getattr(loss, "function", loss)
    if not isinstance(loss, LossFunction):
        raise TypeError(f"function: loss must be a loss function or a subclass of Loss, got {loss!r}")
    if loss not in _functions:
        own = registry.get(loss.__name__) is loss
        base = loss.__name__ if own else re.sub(r"\W+", "_", f"{loss.__module__}_{loss.__name__}")
        candidates = (f"{base}_{k}" if k else base for k in itertools.count())
        name = next(n for n in candidates if n not in _names)
        _names.add(name)
        _functions[loss] = _function(Operators(loss, name))
    return _functions[loss]


def _function(operators: Operators) -> Callable[..., Any]:
    """Return the function that checks a call's arguments and gives them to the right operator."""
    loss, cls = operators.loss, operators.cls
    name = loss.__name__
    arrays, on_host = tuple(operators.arrays.items()), cls._may_be_on_host
    required, differentiable = cls._required, cls._differentiable()
    checks = tuple(_checks(operators))

    # To `torch.compile` the name is a constant: how an operator is made is not to be traced.
    @torch.compiler.assume_constant_result
    def operator(wrt: tuple[str, ...]) -> str:
        return operators.find("value", wrt)

    def call(*given: Any) -> Any:
        values = list(given)
        wrt: tuple[str, ...] = ()
        recorded, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
        ordinary = not is_watched()
        for n, k in arrays:
            value = values[k]
            if isinstance(value, torch.Tensor):
                if forward and forward_ad.unpack_dual(value).tangent is not None:
                    raise NotImplementedError(f"{name}: no forward-mode derivative by {n}")
                if recorded and value.requires_grad:
                    if n not in differentiable:
                        raise ValueError(
                            f"{name}: {n} requires grad, but is not differentiated; pass {n}.detach()"
                        )
                    wrt += (n,)
                ordinary = ordinary and is_plain(value)
            elif value is not None and n in on_host:
                values[k] = torch.as_tensor(value, dtype=torch.int64)
            elif value is not None or n in required:
                raise TypeError(f"{name}: {n} must be a tensor, got {type(value).__name__}")
        for n, k, check, classes in checks:
            if type(values[k]) not in classes:
                values[k] = check(name, n, values[k])
        if ordinary:
            found = operators.directly(wrt)(*values)
        else:
            found = getattr(torch.ops.numbaloss, operator(wrt)).default(*values)
        return found[0] if wrt else found

    return _with_signature(loss, call)


def _checks(operators: Operators) -> Iterator[tuple[str, int, Callable[..., Any], tuple[type, ...]]]:
    """Yield each option's name, position, check, and the classes of values that need none."""
    for n, kind in operators.types.items():
        classes = () if kind == CHUNKING else NUMBERS[kind.rstrip("?")]
        if kind.endswith("?"):
            classes += (type(None),)
        if n == "normalizer":
            check: Callable[..., Any] = lambda loss, name, value: resolve_normalizer(loss, value)
        else:
            check = operators.cls.fields[n].check
        yield n, operators.names.index(n), _chunk_sizes if kind == CHUNKING else check, classes


def _chunk_sizes(loss: str, name: str, value: Any) -> list[int]:
    """Return `LinearCrossEntropyOptions` as a schema has them."""
    options = _LinearCrossEntropyLoss.fields[name].check(loss, name, value)
    return [options.batch_chunk_size or 0, options.memory_budget or 0]


def _with_signature(loss: LossFunction, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a loss's parameters, as Python binds them, that gives their values in order."""
    parameters: Any = loss.without_ranks.parameters
    said, starred = [], False
    for n, p in parameters.items():
        if p.kind is p.KEYWORD_ONLY and not starred:
            said.append("*")
            starred = True
        said.append(n if p.default is p.empty else f"{n}=_defaults[{n!r}]")
    source = f"lambda {', '.join(said)}: _call({', '.join(parameters)})"
    defaults = {n: p.default for n, p in parameters.items()}
    made = eval(compile(source, __file__, "eval"), {"_call": call, "_defaults": defaults})
    made.__name__ = made.__qualname__ = loss.__name__
    made.__module__ = __name__
    made.__doc__ = f"{_summary(loss)}\n\nAs ``{loss.__module__}.{loss.__name__}``, on tensors.\n"
    return made


def _summary(loss: LossFunction) -> str:
    return (loss.__doc__ or loss.__name__).splitlines()[0]


# ---- modules ------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """A loss with its options as a module of PyTorch's.

    Parameters
    ----------
    criterion : Loss
        For instance ``nl.HuberLoss(delta=0.5)``, or an instance of a class of one's own. Its arrays, such as
        class weights, become buffers, its other options attributes.

    Raises
    ------
    TypeError
        If it is no instance of a loss's class.

    Examples
    --------
    >>> import torch, numbaloss as nl, numbaloss.torch as nt
    >>> nt.Module(nl.HuberLoss(delta=0.5))
    HuberLoss(reduction='mean', delta=0.5)
    """

    def __init__(self, criterion: Loss) -> None:
        if not isinstance(criterion, Loss):
            raise TypeError(f"Module: criterion must be an instance of a loss's class, got {criterion!r}")
        if getattr(type(criterion), "function", None) is None:
            raise TypeError(
                f"Module: {criterion!r} is not computed in one pass; add up the values of its parts' modules"
            )
        if criterion._held:
            raise TypeError(f"Module: {type(criterion).__name__} has parameters; use that of numbaloss.torch")
        self._start(type(criterion).function, criterion._options)

    def _start(self, loss: LossFunction, options: Mapping[str, Any]) -> None:
        """Take checked options."""
        super().__init__()
        self._loss, self._call, self._options = loss, function(loss), tuple(options)
        for n, value in options.items():
            if loss.Class.fields[n].array:
                self.register_buffer(n, None if value is None else as_tensor(value))
            else:
                setattr(self, n, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of tensors; ``sample_weight`` and ``normalizer`` are keywords."""
        options = {n: getattr(self, n) for n in self._options}
        return self._call(*args, **options, **kwargs)

    def extra_repr(self) -> str:
        fields = self._loss.Class.fields
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in self._options if not fields[n].array)

    def _get_name(self) -> str:
        return self._loss.Class.__name__

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if n != "_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_call": function(state["_loss"])})


class LinearCrossEntropyLoss(Module):
    """Cross entropy of the scores that a linear layer gives: see ``numbaloss.LinearCrossEntropyLoss``.

    As in PyTorch the layer is the submodule ``linear``, with a flat weight.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: Sequence[int] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        loss = _LinearCrossEntropyLoss
        fields = {n: f for n, f in loss.fields.items() if not f.call_only}
        for n in options:
            if n not in fields:
                raise TypeError(f"{loss.__name__}() got an unexpected keyword argument {n!r}")
        given = {n: options.get(n, f.default) for n, f in fields.items()}
        self._start(loss.function, {n: fields[n].check(loss.__name__, n, v) for n, v in given.items()})
        self.in_features, self.num_classes = in_features, num_classes
        self.out_features = tuple(out_features)
        size = prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, size, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Any, target: Any, **kwargs: Any) -> Any:
        """Return the loss of tensors; ``sample_weight`` and ``normalizer`` are keywords."""
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight.reshape(*shape, self.in_features), self.linear.bias
        if bias is not None:
            bias = bias.reshape(shape)
        return super().forward(input, weight, target, linear_bias=bias, **kwargs)


def _module(loss: LossFunction) -> type[Module]:
    """Return the class of a loss's modules, which takes the loss's options."""
    cls = loss.Class

    def __init__(self: Module, *args: Any, **kwargs: Any) -> None:
        self._start(loss, cls(*args, **kwargs)._options)

    doc = f"{_summary(loss)}\n\nAs ``{cls.__module__}.{cls.__name__}``, a module on tensors.\n"
    return type(cls.__name__, (Module,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})


# ---- the library's losses -----------------------------------------------------------------------------


def triplet_margin_with_distance_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    distance_function: Any = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
    sample_weight: Any = None,
    normalizer: float | None = None,
) -> Any:
    """Wants the positive nearer to the anchor than the negative, by a margin, in a distance of one's own.

    As ``numbaloss.triplet_margin_with_distance_loss``, on tensors. A `distance_function` of one's own takes
    and gives tensors, and PyTorch differentiates it.
    """
    if not callable(distance_function):
        return _by_name(
            anchor,
            positive,
            negative,
            distance_function=distance_function,
            margin=margin,
            swap=swap,
            reduction=reduction,
            sample_weight=sample_weight,
            normalizer=normalizer,
        )
    near, far = distance_function(anchor, positive), distance_function(anchor, negative)
    if swap:
        far = torch.minimum(far, distance_function(positive, negative))
    return function(registry["margin_ranking_loss"])(
        far,
        near,
        torch.ones_like(near),
        margin=_with_distance.Class.fields["margin"].check(_with_distance.__name__, "margin", margin),
        reduction=reduction,
        sample_weight=sample_weight,
        normalizer=normalizer,
    )


_by_name = function(_with_distance)
_functions[_with_distance] = triplet_margin_with_distance_loss

__all__ = ["LinearCrossEntropyLoss", "LinearCrossEntropyOptions", "Module", "function"]
for _loss in registry.values():
    globals()[_loss.__name__] = function(_loss)
    if _loss.Class is not _LinearCrossEntropyLoss:
        globals()[_loss.Class.__name__] = _module(_loss)
    __all__ += [n for n in (_loss.__name__, _loss.Class.__name__) if n not in __all__]
