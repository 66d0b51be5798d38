"""What every loss is: arguments declared once, and from them a function and a class.

A definition is a subclass of :class:`Loss` (through a family, such as ``ElementwiseLoss``). Its annotated
fields are its options, in the order in which both PyTorch's function and class take them. From the class
come the function (``HuberLoss.function`` is ``huber_loss``), its signature and documentation, and the binding
of a call's arguments, which is worked out once for each way of calling and then remembered.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, dataclass_transform

from . import arguments
from .arguments import Operand, Option
from .kernels.freeze import Read, freeze, has_changed
from .kernels.spec import EXACT, GRAD, MISSING, OF_CURVATURES, VALUE, VALUE_AND_GRAD, VALUE_GRAD_HESS, Memo

# Every built-in loss by its function's name, in order of definition.
registry: dict[str, "LossFunction"] = {}

# Ways to call a loss that are no kernel's: what a mean divides by; the sum of a part, and that number.
COUNT, PARTIAL = "count", "partial"
OF_DERIVATIVES = VALUE_AND_GRAD, GRAD, *OF_CURVATURES
VALUED = VALUE, VALUE_AND_GRAD, VALUE_GRAD_HESS, PARTIAL

OF_RANKS = ("comm", "classes")
COMMON = ("sample_weight", "normalizer", *OF_RANKS)
OF_GRADIENT = {
    "wrt": ("str | tuple[str, ...] | None", None),
    "out": ("Any", None),
    "accumulate": ("bool", False),
    "grad_output": ("float | Array | None", None),
}
OF_CURVATURE = {"curvature": ("str", EXACT), "floor": ("float | None", None)}

COMMON_DOC = """
sample_weight : array, optional
    Broadcasts to the shape that ``reduction='none'`` gives and multiplies each term. With ``'mean'`` the
    divisor is the sum of the weights. A zero weight contributes exactly zero to value and gradient, even
    where its inputs are NaN or infinite.
normalizer : float, optional
    What ``'mean'`` divides by in place of its own count: the size of the whole batch, when gradients are
    accumulated over micro-batches.
comm : object, optional
    Ranks that have a part of the rows each, see ``numbaloss.distributed``: the value and what a mean divides
    by are then those of all rows. Each rank has to make the call, if with no rows.
"""

CLASSES_DOC = """
classes : tuple of int, optional
    ``(first, total)``: the input has the classes from the first on, of so many that the ranks of `comm` have
    together. Class indices and `weight` are of all classes, the same on every rank, as the value is; the
    gradient is of the own scores.
"""

GRADIENT_DOC = """
wrt : str or tuple of str, optional
    The arguments to differentiate. A name gives an array, a tuple gives a tuple in that order.
    Default: {default}.
out : array or tuple of arrays, optional
    Receives the gradient: of its argument's shape, in any layout, of its dtype or a narrower floating one. It
    may be the very argument it is the gradient of, which it then overwrites. A call that raises has
    overwritten no argument; another array holds numbers of no meaning then, if a value of an element was out
    of its domain.
accumulate : bool, default False
    Add to `out` what would be stored there. The sum is rounded once; a call that raises has added nothing.
grad_output : float or array, optional
    Upstream gradient: a number, or an array of the value's shape for ``reduction='none'``. Also the place
    for a loss scale.
"""

CURVATURE_DOC = """
curvature : str, default 'exact'
    What comes in place of the second derivative h:

    - ``'majorizer'``: the curvature of a parabola that touches the loss and is nowhere below it. Of a loss of
      the residual r it is slope / r (at r = 0 its limit h, though a loss with a kink there has no bound); of
      class scores half of their total weight (Böhning 1992); else the definition states it.
    - ``'absolute'``: abs(h). ``'gradient'``: the absolute value of the gradient.
    - ``'gershgorin'``: of class scores, the sum of absolute values in h's row of the Hessian.
    - ``'fisher'``: h's mean over targets that the model itself would draw.

floor : float, optional
    What comes is at least this, before weights, `grad_output` and the mean's divisor multiply and divide it.
"""


class Binding(NamedTuple):
    """How one way of calling (so many positions, these keywords) gives a loss its arguments."""

    names: tuple[str, ...]  # in the order given
    out: int  # the position of `out`; -1 where it is not given
    prepared: Memo  # calls seen before, by their signature


class Modes:
    """The ways to call a loss, as a function or as a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss's value."""
        return self._run(VALUE, args, kwargs)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> Any:
        """Value and gradient in one pass.

        Parameters
        ----------
        *args, **kwargs
            The loss's own arguments, and these by name.
        wrt : str or tuple of str, optional
            The arguments to differentiate; by default those that a model makes.
        out : array or tuple of arrays, optional
            Receives the gradient: of its argument's shape, in any layout, of its dtype or a narrower one. It
            may be the very argument.
        accumulate : bool, default False
            Add the gradient to `out`.
        grad_output : float or array, optional
            Multiplies the gradient: the upstream gradient, or a loss scale.

        Returns
        -------
        value : scalar, or array of the terms
            In the arrays' dtype and library.
        gradient : array, or tuple of arrays
            `out`, if it is given; a tuple if `wrt` is.
        """
        return self._run(VALUE_AND_GRAD, args, kwargs)

    def grad(self, *args: Any, **kwargs: Any) -> Any:
        """The gradient alone: `value_and_grad` without the value.

        Parameters
        ----------
        *args, **kwargs
            As `value_and_grad` takes them.

        Returns
        -------
        array, or tuple of arrays
            The gradient.
        """
        return self._run(GRAD, args, kwargs)

    def value_grad_hess(self, *args: Any, **kwargs: Any) -> Any:
        """Value, gradient and the diagonal of the Hessian, in one pass.

        Parameters
        ----------
        *args, **kwargs
            As `value_and_grad` takes them; `out` may be a pair, of the gradient's and the curvature's.
        curvature : str, default 'exact'
            What stands for the second derivative: ``'exact'``; ``'majorizer'``, of a parabola above the loss;
            ``'absolute'``, the exact one's size; ``'gradient'``, that of the slope; of class scores also
            ``'gershgorin'``, sums of a row of the Hessian, and ``'fisher'``, its expectation.
        floor : float, optional
            The least that it may be.

        Returns
        -------
        value : scalar, or array of the terms
            As of `value_and_grad`.
        gradient : array
            Of the input's shape.
        curvature : array
            Of the input's shape.
        """
        return self._run(VALUE_GRAD_HESS, args, kwargs)

    def count(self, *args: Any, **kwargs: Any) -> float:
        """What ``'mean'`` divides by, in float64: of the target, weights and options, without scores.

        It takes the loss's arguments, but what a model makes need not be given: its shape is taken to be that
        of the others, so give ``input`` by name beside a target that broadcasts. All reductions count as the
        mean does, but ``'batchmean'``. Class indices are compared with the number of classes where class
        weights tell it.

        Parameters
        ----------
        *args, **kwargs
            As `value_and_grad` takes them, without what a model makes.

        Returns
        -------
        float
            The number that a mean is divided by.
        """
        return self._run(COUNT, args, kwargs)

    _run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]


class LossFunction(Modes):
    """A loss as a function: ``loss(input, target, ...)`` gives its value.

    The same arguments give the gradient, value and gradient in one pass, and, where the loss has it, the
    curvature. :attr:`Class` is the class form, with the options in its constructor.
    """

    def __init__(self, definition: "type[Loss]", name: str) -> None:
        self.Class = definition
        self.__name__ = self.__qualname__ = name
        self.__module__ = definition.__module__
        self.__doc__ = definition._document(VALUE)
        self.__signature__ = definition._signature(VALUE)
        self._bindings: dict[Any, Binding] = {}
        # What the definition was compiled of: it is looked at again in every call.
        self._read: tuple[Read, ...] = NOTHING_YET

    def __repr__(self) -> str:
        return f"<loss function {self.__name__}{self.__signature__}>"

    @property
    def without_ranks(self) -> inspect.Signature:
        """The signature without what is of ranks, for libraries that share out arrays by themselves."""
        parameters = self.__signature__.parameters
        return self.__signature__.replace(parameters=[p for n, p in parameters.items() if n not in OF_RANKS])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if int(protocol) < 4 and getattr(sys.modules.get(self.__module__), self.__name__, None) is self:
            return self.__name__  # old protocols find a class by way of this
        return getattr, (self.Class, "function")  # the class by its name, or as its pickler takes classes

    @property
    def scalar(self) -> Any:
        """The compiled function of one element, to call in ``@njit`` functions and CUDA kernels."""
        return self._compiled("scalar", self.Class._scalar)

    @property
    def jit(self) -> Any:
        """A compiled function over whole arrays, to call in ``@njit`` functions."""
        return self._compiled("jit", self.Class._jit)

    def _compiled(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a function for compiled code, made once of the definition as it stands."""
        self._keep_up()
        compiled = self.Class._made.compiled
        if name not in compiled:
            compiled[name] = make()
        return compiled[name]

    def _keep_up(self) -> None:
        """Forget what was prepared and compiled if the definition now reads something else."""
        if has_changed(self._read):
            self.Class._freeze()

    def _run(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for get, name, value in self._read:
            if get(name, MISSING) is not value:
                self._keep_up()
                break
        binding = self._bindings.get((mode, len(args), *kwargs))
        if binding is None:
            binding = self._bind(mode, len(args), tuple(kwargs))
        return self.Class._evaluate(mode, binding, args, kwargs)

    def _bind(self, mode: str, count: int, keywords: tuple[str, ...]) -> Binding:
        """Work out a way of calling, as Python would; errors are Python's."""
        parameters = self.Class._signature(mode).parameters
        positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        name = self.__name__
        if count > len(positional):
            raise TypeError(
                f"{name}() takes at most {len(positional)} positional arguments but {count} were given"
            )
        names = (*positional[:count], *keywords)
        for k in keywords:
            if k not in parameters:
                of = "gradient" if k in OF_GRADIENT else "curvature" if k in OF_CURVATURE else ""
                hint = f" (it is for the {of})" if of else ""
                raise TypeError(f"{name}() got an unexpected keyword argument {k!r}{hint}")
            if k in positional[:count]:
                raise TypeError(f"{name}() got multiple values for argument {k!r}")
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in names]
        if missing:
            raise TypeError(
                f"{name}() missing required argument{'s'[: len(missing) > 1]}: {', '.join(missing)}"
            )
        out = names.index("out") if "out" in names else -1
        binding = self._bindings[(mode, count, *keywords)] = Binding(names, out, Memo())
        return binding


# Changed, whenever it is compared.
NOTHING_YET: tuple[Read, ...] = (({}.get, "", None),)


class Made:
    """What is worked out of a definition. Of a class in another process it is worked out anew."""

    def __init__(self) -> None:
        self.function: LossFunction | None = None
        self.frozen: dict[str, Any] = {}  # the definition's functions as they stand, by name
        self.settled = Memo()  # settings, by the arguments that they were made of
        self.compiled: dict[str, Any] = {}  # functions for compiled code

    def forget(self) -> None:
        self.frozen, self.settled, self.compiled = {}, Memo(), {}

    def __reduce__(self) -> Any:
        return Made, ()


class ClassFunction:
    """The attribute `function` of a loss: the same loss as a function.

    It is made when first asked for: a class that was sent to another process came without it.
    """

    def __get__(self, instance: Any, cls: "type[Loss]") -> LossFunction:
        made = getattr(cls, "_made", None)
        if made is None:
            raise AttributeError(f"{cls.__name__} is a family of losses, and no function")
        if made.function is None:
            made.function = LossFunction(cls, cls._function_name)
        return made.function


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(
    field_specifiers=(
        arguments.within,
        arguments.positive,
        arguments.length,
        arguments.non_negative,
        arguments.real,
        arguments.integer,
        arguments.order,
        arguments.distance,
        arguments.between,
        arguments.flag,
        arguments.choice,
        arguments.reduction,
        arguments.weights,
    )
)
class Loss(Modes):
    """The base of all losses: options as fields, arrays in the call.

    Attributes
    ----------
    fields : dict
        The options by name, in order.
    operands : dict
        The arrays by name, in order.
    function : LossFunction
        The same loss as a function.
    link : str
        How a model's raw scores become predictions: ``'identity'``, ``'log'`` (a score is the logarithm of a
        prediction), ``'logit'``, ``'softmax'``.
    """

    link: ClassVar[Any] = "identity"
    fields: ClassVar[dict[str, Option]] = {}
    operands: ClassVar[dict[str, Operand]] = {}
    function: ClassVar[Any] = ClassFunction()
    # Operands that a call must give: those that are no fields.
    _required: ClassVar[tuple[str, ...]] = ()
    _keyword_only: ClassVar[bool] = False
    # Arrays that an instance holds: its calls need not give them.
    _held: ClassVar[tuple[str, ...]] = ()
    # Arrays that may be on the host though others are on a device.
    _may_be_on_host: ClassVar[tuple[str, ...]] = ()
    # Shapes of the first operand that `testing.check_loss` tries, and whether there is a curvature.
    _shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((), (1,), (2, 3, 4), (0, 3))
    _curved: ClassVar[bool] = True
    # Whether ranks may have some classes each.
    _shares_classes: ClassVar[bool] = False
    # The functions that the definition states and that are compiled.
    _stated: ClassVar[tuple[str, ...]] = ()
    _function_name: ClassVar[str]
    _made: ClassVar[Made]
    # The definition's `check`, and the options it takes.
    _own_check: ClassVar[tuple[Callable[..., None], tuple[str, ...]] | None] = None

    def __init_subclass__(
        cls, function: str | None = None, keyword_only: bool = False, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls._keyword_only = keyword_only or cls._keyword_only
        own = {
            n: arguments.as_option(f"{cls.__name__}.{n}", cls.__dict__.get(n))
            for n, annotation in inspect.get_annotations(cls).items()
            if "ClassVar" not in str(annotation)
        }
        for n, field in cls.fields.items():  # another default of an option that is there
            if n in cls.__dict__ and n not in own:
                own[n] = replace(field, default=field.check(cls.__name__, n, cls.__dict__[n]))
        cls.fields = {**cls.fields, **own}
        for n in own:
            delattr(cls, n)  # an instance finds its own value, in `_options`
        if not cls._complete():
            return
        cls._made, cls._function_name = Made(), function or _snake(cls.__name__)
        check = plain_function(cls, "check")
        cls._own_check = check and (check, tuple(inspect.signature(check).parameters))
        cls._prepare()
        if (cls.__module__ or "").split(".")[0] == __package__:
            registry[cls.function.__name__] = cls.function

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        names = [n for n, f in self.fields.items() if not f.call_only]
        if len(args) > (0 if self._keyword_only else len(names)):
            raise TypeError(f"{name}() takes {len(names)} options, got {len(args)} positional arguments")
        given = dict(zip(names, args, strict=False))
        for k in kwargs:
            if k not in names:
                raise TypeError(f"{name}() got an unexpected keyword argument {k!r}")
            if k in given:
                raise TypeError(f"{name}() got multiple values for argument {k!r}")
        given.update(kwargs)
        checked = {n: self.fields[n].check(name, n, value) for n, value in given.items()}
        self._set({n: checked.get(n, self.fields[n].default) for n in names})
        self.__dict__["_named"] = frozenset(given)  # options that are not there by default

    def _set(self, options: dict[str, Any]) -> None:
        """Take checked options."""
        self._check_options(options)
        # An array that is not given is no argument of the call.
        given = {n: v for n, v in options.items() if v is not None or not self.fields[n].array}
        self.__dict__.update(_options=options, _given=given)

    def __setattr__(self, name: str, value: Any) -> None:
        field = self.fields.get(name)
        if field is None or field.call_only:
            object.__setattr__(self, name, value)
            return
        if "_options" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__}: {name} is an option; call super().__init__() first")
        self._set({**self._options, name: field.check(type(self).__name__, name, value)})
        self.__dict__["_named"] = self._named | {name}

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("_options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._options.items())})"

    # ---- sums --------------------------------------------------------------------------------------
    # NumPy's numbers leave a product with a loss to the loss.
    __array_ufunc__ = None
    # Makes a loss of factors and losses: `numbaloss.sums` gives it.
    _weighted_sum: ClassVar[Callable[..., "Loss"]]

    def _terms(self) -> tuple[tuple[float, "Loss"], ...]:
        """The loss as a sum: factors and losses that are no sums."""
        return ((1.0, self),)

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, Loss):
            return NotImplemented
        by = arguments.number(type(self).__name__, "factor", factor)
        return self._weighted_sum(tuple((by * f, part) for f, part in self._terms()))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, Loss):
            return NotImplemented
        return self * (1 / arguments.number(type(self).__name__, "divisor", divisor))

    def __neg__(self) -> Any:
        return self * -1.0

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Loss):
            return self._weighted_sum(self._terms() + other._terms())
        return self if isinstance(other, int) and other == 0 else NotImplemented  # `sum` begins with 0

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, Loss) else NotImplemented

    def _run(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > len(self._required):
            raise TypeError(
                f"{type(self).__name__}: takes {len(self._required)} arrays by position but {len(args)} were "
                "given; options go to the constructor"
            )
        return self.function._run(mode, args, {**self._given, **kwargs})

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> None:
        """What the definition's own ``check`` says of options that are each right by themselves."""
        if cls._own_check is not None:
            check, names = cls._own_check
            check(**{n: options[n] for n in names})

    # ---- what a family provides --------------------------------------------------------------------
    @classmethod
    def _complete(cls) -> bool:
        """Whether the class defines a loss, and is not a family."""
        return False

    @classmethod
    def _prepare(cls) -> None:
        """Read the definition: set `operands` and `_required`."""

    @classmethod
    def _evaluate(cls, mode: str, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise TypeError(f"{cls.__name__} is a family of losses; define `value` in a subclass")

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        """Names that `wrt` may hold."""
        return tuple(cls.operands)

    @classmethod
    def _scalar(cls) -> Any:
        raise AttributeError(f"{cls.function.__name__} has no function of one element")

    @classmethod
    def _jit(cls) -> Any:
        raise AttributeError(f"{cls.function.__name__} has no compiled function over arrays")

    @classmethod
    def _evaluate_classes(cls, mode: str, call: dict[str, Any]) -> Any:
        """Evaluate a call of ranks that have some classes each."""
        raise NotImplementedError

    @classmethod
    def _weights_have_part(cls, settings: Any, call: dict[str, Any]) -> bool:
        """Return whether the sum of `weight`, by which there is a gradient, divides the terms of a call."""
        return False

    # ---- derived -----------------------------------------------------------------------------------
    @classmethod
    def _freeze(cls) -> None:
        """Take the definition's functions as they stand."""
        read: list[Read] = []
        made: dict[str, Any] = {}
        for name in cls._stated:
            owner = next(vars(c) for c in cls.__mro__ if name in vars(c))
            read.append((owner.get, name, owner[name]))
            made[name], _, more = freeze(plain_function(cls, name))
            read += more
        cls._made.forget()
        cls._made.frozen = made
        cls.function._bindings = {}
        # The library's own definitions stay as they are.
        cls.function._read = () if registry.get(cls.function.__name__) is cls.function else tuple(read)

    @classmethod
    def _function(cls, name: str) -> Any:
        """A function that the definition states, as it stands."""
        if name not in cls._made.frozen:
            cls._freeze()
        return cls._made.frozen[name]

    @classmethod
    def _default_wrt(cls) -> Any:
        names = tuple(n for n in cls._required if cls.operands[n].model) or cls._required[:1]
        return names[0] if len(names) == 1 else names

    @classmethod
    def _counted_by(cls) -> tuple[str, ...]:
        """Return the arrays that tell how many terms there are: those that no model makes, if any."""
        return tuple(n for n in cls._required if not cls.operands[n].model) or cls._required[:1]

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return shapes that go with the arrays of a call, of those that a model makes."""
        raise NotImplementedError

    @classmethod
    def _signature(cls, mode: str) -> inspect.Signature:
        P = inspect.Parameter
        kind = P.KEYWORD_ONLY if cls._keyword_only and cls._function_keyword_only else P.POSITIONAL_OR_KEYWORD
        counted = cls._counted_by() if mode == COUNT else cls._required
        parameters = [P(n, P.POSITIONAL_OR_KEYWORD, annotation="Array") for n in counted]
        parameters += [P(n, kind, default=f.default, annotation=f.annotation) for n, f in cls.fields.items()]
        extra: dict[str, tuple[str, Any]] = {
            "sample_weight": ("Array | None", None),
            "normalizer": ("float | None", None),
            "comm": ("Any", None),
        }
        if cls._shares_classes and mode not in OF_CURVATURES:
            extra["classes"] = ("tuple[int, int] | None", None)
        if mode in (COUNT, PARTIAL):
            extra = {"sample_weight": extra["sample_weight"]}
            extra |= {n: ("Array | None", None) for n in cls._required if n not in counted}
        if mode in OF_DERIVATIVES:
            extra |= OF_GRADIENT
        if mode in OF_CURVATURES:
            extra |= OF_CURVATURE
        parameters += [P(n, P.KEYWORD_ONLY, default=d, annotation=a) for n, (a, d) in extra.items()]
        return inspect.Signature(parameters)

    _function_keyword_only: ClassVar[bool] = False

    @classmethod
    def _document(cls, mode: str) -> str:
        text = inspect.cleandoc(cls.__doc__ or cls.__name__)
        text += "\n\nBeyond PyTorch's arguments\n--------------------------" + COMMON_DOC.rstrip()
        if cls._shares_classes:
            text += CLASSES_DOC.rstrip()
        if mode in OF_DERIVATIVES:
            text += GRADIENT_DOC.format(default=repr(cls._default_wrt())).rstrip()
        if mode in OF_CURVATURES:
            text += CURVATURE_DOC.rstrip()
        return text + "\n"


def plain_function(cls: type, name: str) -> Any:
    """A function stated in a class body, as a function; None where there is none."""
    stated = inspect.getattr_static(cls, name, None)
    return getattr(stated, "__func__", stated)
