"""The elementwise family: each term depends on one element of two or three arrays."""

import importlib.util
import inspect
import linecache
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba.core.errors import NumbaError

from . import dispatch, memory
from .arguments import Operand, like_scores, scores
from .dispatch import FLOAT32, FLOAT64
from .kernels.spec import Request, Scalars
from .loss import (
    GRAD,
    MISSING,
    VALUE,
    VALUE_AND_GRAD,
    VALUE_GRAD_HESS,
    Loss,
    Memo,
    Recipe,
    call_arguments,
    plain_function,
    resolve_normalizer,
    resolve_wrt,
    upstream,
)

# Elements from which even float64 is worth `memory`.
LARGE = memory.FROM_BYTES // 8


class Plan:
    """A call's checked options, and the kernels that serve it."""

    def __init__(
        self,
        cls: "type[ElementwiseLoss]",
        mode: str,
        options: dict[str, Any],
        wrt: tuple[str, ...],
        single: bool,
    ) -> None:
        self.cls, self.mode, self.wrt, self.single = cls, mode, wrt, single
        self.reduction: str = options["reduction"]
        self.numbers = tuple(float(options[n]) for n in cls._option_names if not isinstance(options[n], bool))
        self.padded = self.numbers + (0.0,) * (-(len(self.numbers) + 1) % 4)
        self.statics = tuple(options[n] if isinstance(options[n], bool) else None for n in cls._option_names)
        self.outputs = 0 if mode == VALUE else 2 if mode == VALUE_GRAD_HESS else len(wrt)
        # Where the operands are, for the gradients; the curvature lies over none.
        self.positions = tuple(map(cls._arrays.index, wrt)) if "weight" not in wrt else ()
        self.checked = any(cls.operands[n].domain for n in cls._arrays)
        self.kernels: dict[Any, Any] = {}
        # The quick path's kernels by dtype and outputs in place; 0 where it does not serve.
        self.quick: dict[Any, int] = {}

    def kernel(self, request: Request, dtype: np.dtype, arity: int) -> int:
        """The address of the kernel that serves a request."""
        key = request, dtype, arity
        if key not in self.kernels:
            from .kernels.cpu import (
                elementwise as cpu,  # on the first call: importing the library stays quick
            )

            scalars = self.cls._scalars(self.statics, arity)
            try:
                self.kernels[key] = cpu.compile_block(scalars, request, dtype)
            except NumbaError as error:
                raise _at_users_line(scalars, error) from error
        return self.kernels[key].address

    def prepare_quick(self, dtype: np.dtype, in_place: tuple[bool, ...], arity: int) -> int:
        if dtype not in (FLOAT32, FLOAT64) or len(self.positions) < len(self.wrt):
            address = 0
        else:
            overwritten = in_place[: len(self.wrt)]
            request = Request(
                wrt=self.positions,
                in_place=overwritten if any(overwritten) else (),
                curvature=self.mode == VALUE_GRAD_HESS,
            )
            address = self.kernel(request, dtype, arity)
        self.quick[(dtype, in_place)] = address
        return address

    def may_write(self, outputs: Any, operands: tuple[np.ndarray, ...]) -> tuple[bool, ...] | None:
        """Which outputs are their operands; None unless each is plainly that, or memory of its own."""
        if outputs.__class__ is not tuple or len(outputs) != self.outputs or not self.positions:
            return None
        first = operands[0]
        in_place = []
        for k, o in enumerate(outputs):
            if (
                o.__class__ is not np.ndarray
                or o.dtype is not first.dtype
                or o.shape != first.shape
                or not o.flags.carray
            ):
                return None
            own = self.positions[k] if k < len(self.positions) else -1
            same = own >= 0 and o is operands[own]
            if same and self.checked:
                return None
            for j, a in enumerate(operands):
                if not (same and j == own) and np.may_share_memory(o, a):
                    return None
            for other in outputs[:k]:
                if np.may_share_memory(o, other):
                    return None
            in_place.append(same)
        return tuple(in_place)


class Call(NamedTuple):
    """A checked call."""

    operands: dict[str, np.ndarray]
    weights: np.ndarray | None  # weight * sample_weight, of the terms' shape, possibly a broadcast view
    weight: np.ndarray | None
    sample_weight: np.ndarray | None
    divisor: Any  # a number; on a device, where it is a sum of weights, a 0-d array
    dtype: np.dtype
    shape: tuple[int, ...]


class ElementwiseLoss(Loss):
    """A loss whose terms depend on one element of each array: subclass it and define ``value``.

    ``value(input, target, <options>)`` gives one term, in ordinary arithmetic and the functions of
    ``numbaloss.math``; ``if`` is welcome. Its arguments that are no fields are the arrays. The derivatives
    are derived. One that is better stated by hand is given as ``slope_<argument>``, which takes the same
    arguments. ``check(<options>)``, where there is one, raises a ValueError for options that do not go
    together.

    Attributes
    ----------
    domains : dict
        Operands by name (see ``numbaloss.arguments``) where the default, any number, does not fit.
    """

    domains: ClassVar[dict[str, Operand]] = {}
    value: ClassVar[Callable[..., Any]]
    # The second derivative's meaning for reduction='mean' of `weight`: whether its sum is the divisor.
    weight_in_divisor: ClassVar[bool] = False

    _option_names: ClassVar[tuple[str, ...]] = ()
    _arrays: ClassVar[tuple[str, ...]] = ()  # value's operands, in order
    _slopes: ClassVar[dict[str, Callable[..., Any]]] = {}
    _plans: ClassVar[Memo] = Memo()
    _compiled: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _complete(cls) -> bool:
        return "value" in cls.__dict__ or hasattr(cls, "value")

    @classmethod
    def _prepare(cls) -> None:
        if "reduction" not in cls.fields:
            from . import arguments

            cls.fields = {**cls.fields, "reduction": arguments.reduction()}
        value = plain_function(cls, "value")
        names = list(inspect.signature(value).parameters)
        arrays = [n for n in names if n not in cls.fields or cls.fields[n].array]
        options = names[len(arrays) :]
        if names[: len(arrays)] != arrays or not 2 <= len(arrays) <= 3:
            raise TypeError(
                f"{cls.__name__}.value must take two or three arrays, then options; got {', '.join(names)}"
            )
        defaults = {n: scores() if k == 0 else like_scores() for k, n in enumerate(arrays)}
        cls.operands = {n: cls.domains.get(n, defaults[n]) for n in arrays}
        cls._arrays = tuple(arrays)
        cls._required = tuple(n for n in arrays if n not in cls.fields)
        cls._option_names = tuple(options)
        cls._slopes = {n: plain_function(cls, f"slope_{n}") for n in arrays if hasattr(cls, f"slope_{n}")}
        cls._plans, cls._compiled = Memo(), {}

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return (*cls._arrays, *(("weight",) if "weight" in cls.fields else ()))

    @classmethod
    def _scalars(cls, statics: tuple[bool | None, ...], arity: int) -> Scalars:
        operands = [cls.operands[n] for n in cls._arrays]
        domains = [o.domain for o in operands[:arity]] + [None] * (3 - arity)
        return Scalars(
            cls.function.__name__,
            arity,
            plain_function(cls, "value"),
            tuple((cls._arrays.index(n), f) for n, f in cls._slopes.items()),
            statics,
            tuple(domains),
            tuple(o.absent for o in operands[arity:]),
        )

    @classmethod
    def _scalar(cls) -> Any:
        from .kernels.cpu.inside import compile_scalar

        if "scalar" not in cls._compiled:
            scalars = cls._scalars((None,) * len(cls._option_names), len(cls._required))
            names = (*cls._required, *cls._option_names)
            defaults = tuple(cls.fields[n].default for n in cls._option_names)
            scalar = compile_scalar(scalars, names, defaults)
            if importlib.util.find_spec("numba_cuda") is not None:
                from .kernels.cuda import elementwise, target

                target.also_for_cuda(scalar, elementwise.compile_scalar(scalars, names, defaults))
            cls._compiled["scalar"] = scalar
        return cls._compiled["scalar"]

    @classmethod
    def _jit(cls) -> Any:
        from .kernels.cpu.inside import compile_whole

        if "jit" not in cls._compiled:
            scalars = cls._scalars((None,) * len(cls._option_names), len(cls._required))
            options = [n for n, f in cls.fields.items() if not f.array]
            defaults = (*(cls.fields[n].default for n in options), None)
            names = (*cls._required, *options, "out")
            cls._compiled["jit"] = compile_whole(scalars, names, defaults, cls._option_names)
        return cls._compiled["jit"]

    @classmethod
    def _plan(cls, mode: str, call: dict[str, Any]) -> Plan:
        """Check a call's options and `wrt`, and find what was worked out for them before."""
        name = cls.function.__name__
        options = {
            n: f.check(name, n, call[n]) if n in call else f.default
            for n, f in cls.fields.items()
            if not f.array
        }
        cls._check_options(options)
        wrt, single = ((), True) if mode == VALUE else resolve_wrt(cls, call.get("wrt"))
        if mode == VALUE_GRAD_HESS and not single:
            raise ValueError(f"{name}: value_grad_hess takes one name in wrt, got {wrt!r}")
        key = mode, wrt, single, *options.items()
        plan: Plan | None = cls._plans.get(key)
        if plan is None:
            plan = cls._plans[key] = Plan(cls, mode, options, wrt, single)
        return plan

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _evaluate(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recipe.plain:
            result = cls._evaluate_quick(mode, recipe, args, kwargs)
            if result is not MISSING:
                return result
        call = call_arguments(recipe, args, kwargs)
        plan = cls._plan(mode, call)
        if any(map(dispatch.is_device_array, call.values())):
            return _on_device().evaluate(plan, call)
        return cls._evaluate_call(plan, call)

    @classmethod
    def _evaluate_quick(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The commonest call, plain arrays and a reduced value, with nothing that it does not need.

        Returns MISSING where the call is not of that kind; whatever is wrong with it is found there.
        """
        count = len(cls._required)
        operands = args[:count]
        settings = (*args[count:], *[kwargs[k] for k in recipe.keys]) if recipe.keys else args[count:]
        try:
            plan = recipe.plans.get(settings)
        except TypeError:  # not hashable, so not right
            return MISSING
        if plan is None:
            plan = recipe.plans[settings] = cls._plan(mode, call_arguments(recipe, args, kwargs))
        if plan.reduction == "none":
            return MISSING
        x = operands[0]
        if x.__class__ is not np.ndarray:
            if dispatch.is_device_array(x):
                return _on_device().quick(plan, operands, kwargs.get("out"))
            return MISSING
        dtype, shape, n = x.dtype, x.shape, x.size
        for a in operands:
            if (
                a.__class__ is not np.ndarray
                or a.dtype is not dtype
                or a.shape != shape
                or not a.flags.carray
            ):
                return MISSING
        out = kwargs.get("out")
        in_place: tuple[bool, ...] = ()
        outputs: Any = ()
        if mode != VALUE:
            if out is None:
                new = np.empty if n < LARGE else memory.empty
                outputs = [new(shape, dtype) for _ in range(plan.outputs)]
            else:
                outputs = (out,) if plan.outputs == 1 and plan.single else out
                found = plan.may_write(outputs, operands)
                if found is None:
                    return MISSING
                in_place = found
        function = plan.quick.get((dtype, in_place))
        if function is None:
            function = plan.prepare_quick(dtype, in_place, count)
        if not function or not n:
            return MISSING
        arrays = (*operands, *outputs)
        if any(in_place):
            arrays = (*operands, *[o for o, same in zip(outputs, in_place, strict=True) if not same])
        if len(shape) != 1:
            arrays = tuple([a.reshape(-1) for a in arrays])
        scale = 1.0
        if plan.reduction != "sum":
            scale = 1.0 / (n if plan.reduction == "mean" else shape[0] if shape else 1)
        total, invalid = dispatch.run_direct(function, arrays, (scale, *plan.padded))
        if invalid:
            cls._refuse_domain(dict(zip(cls._required, operands, strict=True)), None)
        if mode == VALUE:
            return dtype.type(total * scale)
        if mode == VALUE_GRAD_HESS:
            return dtype.type(total * scale), *outputs
        gradient = outputs[0] if plan.single else tuple(outputs)
        return gradient if mode == GRAD else (dtype.type(total * scale), gradient)

    @classmethod
    def _evaluate_call(cls, plan: Plan, call: dict[str, Any]) -> Any:
        name = cls.function.__name__
        c = cls._check(plan, call)
        mode, reduction = plan.mode, plan.reduction
        scale = 1.0 if reduction in ("none", "sum") else _inverse(c.divisor)
        arithmetic = dispatch.arithmetic_dtype(c.dtype)
        factor, up = upstream(name, call.get("grad_output"), c.shape, reduction)
        if up is not None:
            up = dispatch.floating(name, "grad_output", up)

        if "weight" in plan.wrt:
            return cls._with_weight_gradient(plan, call, c, scale, factor, up)

        inputs = [c.operands[n] for n in cls._arrays if n in c.operands]
        full = [_broadcast_to(a, c.shape) for a in inputs]
        if c.weights is not None:
            full.append(c.weights)
        if up is not None:
            full.append(up)
        results, targets, in_place = cls._gradient_arrays(plan, call, c, arithmetic)
        terms = np.empty(c.shape, c.dtype) if reduction == "none" and mode != GRAD else None
        if terms is not None and full[0].ndim and not full[0].flags.c_contiguous:
            terms = np.empty_like(full[0], dtype=c.dtype, subok=False)
        outputs = ([] if terms is None else [terms]) + targets
        same = ([] if terms is None else [False]) + in_place
        total = 0.0
        if inputs[0].size or math.prod(c.shape):
            total = cls._launch(plan, c, full, outputs, same, scale * factor, arithmetic)
        names = plan.wrt * 2 if mode == VALUE_GRAD_HESS else plan.wrt
        for n, r, t in zip(names, results, targets, strict=True):
            if r is not t:
                _sum_into(cls._broadcast(name, n, r, c.shape), t)
        gradients = results
        if mode == GRAD:
            return gradients[0] if plan.single else tuple(gradients)
        value = terms if terms is not None else c.dtype.type(total * scale)
        if mode == VALUE:
            return value
        if mode == VALUE_GRAD_HESS:
            return value, *gradients
        return value, gradients[0] if plan.single else tuple(gradients)

    @classmethod
    def _launch(
        cls,
        plan: Plan,
        c: Call,
        inputs: list[np.ndarray],
        outputs: list[np.ndarray],
        in_place: list[bool],
        scale: float,
        arithmetic: np.dtype,
    ) -> float:
        """Run the kernel; raise if an element is out of its domain, before anything is overwritten."""
        arity = len(c.operands)
        weighted = c.weights is not None
        request = Request(
            weighted=weighted,
            upstream=len(inputs) > arity + weighted,
            terms=plan.reduction == "none" and plan.mode != GRAD,
            wrt=tuple(map(cls._arrays.index, plan.wrt)),
            curvature=plan.mode == VALUE_GRAD_HESS,
        )
        numbers = (scale, *plan.numbers)
        checked = any(cls.operands[n].domain for n in c.operands)
        if checked and any(in_place):
            first = Request(weighted=weighted)
            _, invalid = dispatch.run(
                lambda _: plan.kernel(first, arithmetic, arity),
                inputs[: arity + weighted],
                [],
                [],
                numbers,
                arithmetic,
            )
            if invalid:
                cls._refuse_domain(c.operands, c.weights)
        overwritten = tuple(in_place[request.terms : request.terms + len(request.wrt)])

        def kernel(same: bool) -> int:
            return plan.kernel(request._replace(in_place=overwritten) if same else request, arithmetic, arity)

        total, invalid = dispatch.run(kernel, inputs, outputs, in_place, numbers, arithmetic)
        if invalid:
            cls._refuse_domain(c.operands, c.weights)
        return total

    @classmethod
    def _check(cls, plan: Plan, call: dict[str, Any]) -> Call:
        """The call's arrays, checked: libraries, dtypes, shapes, weights."""
        name = cls.function.__name__
        arrays: dict[str, np.ndarray] = {}
        for n in (*cls._arrays, "weight", "sample_weight"):
            if call.get(n) is not None:
                arrays[n] = dispatch.as_array(name, n, call[n])
            elif n in cls._required:
                raise TypeError(f"{name}: {n} must be an array, got None")
        differentiated = {cls._arrays[0], *plan.wrt}
        floats = {}
        for n, a in arrays.items():
            weak = a.dtype.kind in "iub" or type(call[n]) in (float, int)
            if weak and n not in differentiated:
                continue  # as in NumPy and PyTorch, a Python number or an integer array promotes no float
            floats[n] = arrays[n] = dispatch.floating(name, n, a)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        arithmetic = dispatch.arithmetic_dtype(dtype)
        for n in arrays.keys() - floats.keys():
            arrays[n] = arrays[n].astype(arithmetic)
        for n in plan.wrt:
            if n not in arrays:
                raise ValueError(f"{name}: wrt names {n!r}, which is not given")

        first = cls._arrays[0]
        shape = arrays[first].shape
        for n in cls._arrays:
            if n not in arrays or arrays[n].shape == shape:
                continue
            if not cls.operands[n].broadcast:
                raise ValueError(f"{name}: {n} must have {first}'s shape {shape}, got {arrays[n].shape}")
            arrays[n] = cls._broadcast(name, n, arrays[n], shape)
        return Call(
            {n: arrays[n] for n in cls._arrays if n in arrays},
            *cls._weights(name, plan.reduction, call, arrays, shape, arithmetic),
            dtype,
            shape,
        )

    @classmethod
    def _broadcast(cls, name: str, argument: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A smaller operand, with the axes it needs to broadcast to the terms' shape."""
        if not broadcasts(array.shape, shape):
            raise ValueError(f"{name}: {argument} of shape {array.shape} does not broadcast to {shape}")
        return array

    @classmethod
    def _weights(
        cls,
        name: str,
        reduction: str,
        call: dict[str, Any],
        arrays: dict[str, np.ndarray],
        shape: tuple[int, ...],
        arithmetic: np.dtype,
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, Any]:
        """What multiplies the terms, and what the mean divides by."""
        given = []
        for n in ("weight", "sample_weight"):
            w = arrays.get(n)
            if w is not None and not broadcasts(w.shape, shape):
                raise ValueError(f"{name}: {n} of shape {w.shape} does not broadcast to {shape}")
            given.append(w)
        weight, sample_weight = given
        product = sample_weight if weight is None else weight
        if weight is not None and sample_weight is not None:
            product = weight.astype(arithmetic) * sample_weight.astype(arithmetic)
        normalizer = resolve_normalizer(name, call.get("normalizer"))
        counted = product if cls.weight_in_divisor else sample_weight
        size = math.prod(shape)
        if normalizer is not None:
            divisor = normalizer
        elif reduction in ("none", "sum"):
            divisor = 1.0
        else:
            # 'batchmean' counts rows where the mean counts terms.
            count = float(size if reduction != "batchmean" or not size else shape[0] if shape else 1)
            divisor = count if counted is None else _sum(counted, count, arithmetic)
        if product is not None:
            product = _broadcast_to(product, shape)
        return product, weight, sample_weight, divisor

    @classmethod
    def _gradient_arrays(
        cls, plan: Plan, call: dict[str, Any], c: Call, arithmetic: np.dtype
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[bool]]:
        """For each gradient: the array returned, the one the kernel writes, and whether it is its operand.

        They differ for an operand that is broadcast: its gradient is the sum over where it was used.
        """
        name = cls.function.__name__
        out = call.get("out")
        names = plan.wrt * 2 if plan.mode == VALUE_GRAD_HESS else plan.wrt
        if out is None:
            outs: list[Any] = [None] * len(names)
        elif len(names) == 1 and plan.single:
            outs = [out]
        else:
            if not isinstance(out, tuple | list) or len(out) != len(names):
                raise TypeError(
                    f"{name}: out must be a tuple of {len(names)} arrays, got {type(out).__name__}"
                )
            outs = list(out)
        arrays = [
            (n, dispatch.as_array(name, n, call[n]))
            for n in (*cls._arrays, "weight", "sample_weight", "grad_output")
            if call.get(n) is not None
        ]
        results: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        in_place: list[bool] = []
        for k, (n, o) in enumerate(zip(names, outs, strict=True)):
            like = dispatch.as_array(name, n, call[n])
            same = False
            if o is None:
                o = np.empty_like(like, subok=False)
                if dispatch.overlaps_itself(o) or not o.dtype.isnative:
                    o = np.empty(like.shape, like.dtype.newbyteorder("="))
            else:
                # The curvature is no gradient: it may not lie over the operand.
                inputs = arrays if k < len(plan.wrt) else [(f"the {a}", b) for a, b in arrays]
                same = dispatch.check_out(name, n, o, like, inputs)
                for other in results:
                    if dispatch.share_memory(o, other):
                        raise ValueError(f"{name}: two arrays in out overlap")
            results.append(o)
            if o.shape == c.shape:
                targets.append(o)
            else:
                targets.append(np.empty_like(o, arithmetic, subok=False, shape=c.shape))
                same = False
            in_place.append(same)
        return results, targets, in_place

    @classmethod
    def _with_weight_gradient(
        cls, plan: Plan, call: dict[str, Any], c: Call, scale: float, factor: float, up: np.ndarray | None
    ) -> Any:
        """Gradients that include the one by `weight`: a few products of the unweighted terms."""
        name = cls.function.__name__
        if plan.mode == VALUE_GRAD_HESS:
            raise ValueError(f"{name}: the loss is linear in weight; value_grad_hess needs another wrt")
        others = tuple(n for n in plan.wrt if n != "weight")
        arithmetic = dispatch.arithmetic_dtype(c.dtype)
        bare = {n: v for n, v in call.items() if n in cls._arrays or (n in cls.fields and n != "weight")}
        terms = cls.function(**{**bare, "reduction": "none"}).astype(arithmetic)
        w = np.ones((), arithmetic) if c.sample_weight is None else c.sample_weight.astype(arithmetic)
        terms = np.where(w == 0, 0, terms * w) if c.sample_weight is not None else terms
        if plan.reduction not in ("none", "sum") and cls.weight_in_divisor and call.get("normalizer") is None:
            # The divisor is a sum of weights too: d(sum w l / sum w) = (l - value) / sum w.
            value = cls.function(**{k: v for k, v in call.items() if k not in ("wrt", "out", "grad_output")})
            terms = terms - np.broadcast_to(w, c.shape) * arithmetic.type(value)
        full = terms * arithmetic.type(scale * factor)
        if up is not None:
            full = full * up.astype(arithmetic)
        outs = call.get("out")
        outs = (outs,) if plan.single and outs is not None else outs
        like = c.weight
        assert like is not None
        target = np.empty(like.shape, like.dtype)
        position = plan.wrt.index("weight")
        if outs is not None:
            if not isinstance(outs, tuple | list) or len(outs) != len(plan.wrt):
                raise TypeError(f"{name}: out must be a tuple of {len(plan.wrt)} arrays")
            target = outs[position]
            arrays = [(n, a) for n, a in (*c.operands.items(), ("weight", c.weight)) if a is not None]
            dispatch.check_out(name, "weight", target, like, arrays)
        rest = [n for n in plan.wrt if n != "weight"]
        arguments = {**call, "wrt": others}
        if outs is not None:
            arguments["out"] = tuple(o for k, o in enumerate(outs) if k != position)
        value, gradients = None, []
        if rest:
            value, found = cls.function.value_and_grad(**arguments)
            gradients = list(found)
        elif plan.mode == VALUE_AND_GRAD:
            value = cls.function(**{k: v for k, v in call.items() if k not in ("wrt", "out", "grad_output")})
        _sum_into(target, full)
        gradients.insert(position, target)
        result = gradients[0] if plan.single else tuple(gradients)
        return result if plan.mode == GRAD else (value, result)

    @classmethod
    def _refuse_domain(cls, operands: dict[str, np.ndarray], weights: np.ndarray | None) -> None:
        """Find the first element out of its domain, and say so."""
        name = cls.function.__name__
        for n, a in operands.items():
            domain = cls.operands[n].domain
            if domain is None:
                continue
            low, high, nan = domain
            x = np.asarray(a, dtype=np.float64)
            bad = ~((x >= low) & (x <= high))
            if nan:
                bad &= ~np.isnan(x)
            if weights is not None:
                bad = np.broadcast_to(bad, weights.shape) & (weights != 0)
                x = np.broadcast_to(x, weights.shape)
            if bad.any():
                index = tuple(map(int, np.argwhere(bad)[0]))
                at = f"[{', '.join(map(str, index))}]" if index else ""
                wanted = f"in [{low:g}, {high:g}]" if np.isfinite(high) else f">= {low:g}"
                raise ValueError(f"{name}: {n} must be {wanted}, got {n}{at} = {x[index]:g}")
        raise AssertionError("a kernel found an element out of its domain that NumPy does not find")


@cache
def _on_device() -> Any:
    from . import device_elementwise  # on the first call with an array on a device

    return device_elementwise


def _at_users_line(scalars: Scalars, error: NumbaError) -> TypeError:
    """Numba's error as one that leads to the line of the definition."""
    functions = [scalars.value, *(f for _, f in scalars.slopes)]
    file, line = functions[0].__code__.co_filename, functions[0].__code__.co_firstlineno
    text = str(error)
    for found in re.finditer(r'File "([^"]+)", line (\d+)', text):
        for f in functions:
            if Path(found[1]).name == Path(f.__code__.co_filename).name:
                file, line = f.__code__.co_filename, int(found[2])
    ours = ("During", "Failed in", "Overload", "Rejected", "File ", "- ", "->", "^", "[", "Known sig", " * ")
    stated = re.search(r"TypingError: (value must .*)", text)  # by the jets
    lines = [x.strip() for x in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    reasons = [x for x in lines if x and not x.startswith(ours) and "resolving callee" not in x]
    source = linecache.getline(file, line).strip()
    return TypeError(
        f"{scalars.name}: cannot be compiled and differentiated as it stands\n"
        f'  File "{file}", line {line}\n    {source}\n'
        f"{stated[1] if stated else reasons[0] if reasons else text}\n"
        "A loss's value may use arithmetic, if, abs, min, max and the functions of numbaloss.math."
    )


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _broadcast_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array if array.shape == shape else np.broadcast_to(array, shape)


def _inverse(divisor: float) -> float:
    """1 / divisor, as IEEE has it: a mean of nothing is NaN."""
    return 1.0 / divisor if divisor else np.nan


def _sum(weights: Any, count: float, arithmetic: np.dtype) -> Any:
    """The sum of weights that are used so many times altogether: a number, or an array on their device."""
    if not weights.size:
        return 0.0
    if dispatch.described(weights):
        return weights.total(count / weights.size, arithmetic)
    return float(weights.sum(dtype=np.float64)) * (count / weights.size)


def _sum_into(result: np.ndarray, full: np.ndarray) -> None:
    """Store `full` summed over the axes along which `result` was broadcast."""
    extra = full.ndim - result.ndim
    axes = (*range(extra), *(extra + k for k, n in enumerate(result.shape) if n != full.shape[extra + k]))
    result[...] = full.sum(axis=axes, dtype=np.float64).reshape(result.shape)
