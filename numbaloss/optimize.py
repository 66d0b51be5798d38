"""Losses for optimisers: ``scipy.optimize``, ``statsmodels.robust`` and iminuit.

`objective` is a loss of a linear model's parameters, with gradient and Hessian; `Objective` is one of any
model's. `rho` is a loss for ``scipy.optimize.least_squares``, `norm` one for ``statsmodels.RLM``. None of
these libraries is imported here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .families.elementwise import ElementwiseLoss
from .loss import Loss, LossFunction
from .losses.multiclass import CrossEntropyLoss

__all__ = ["LinearObjective", "Norm", "Objective", "Rho", "norm", "objective", "rho"]

# Stand for smaller residuals in l'(r) / r and in its derivative by r**2. These have limits at 0, and lose
# digits on the way: a rounding of the slope is divided by r, and by r**3.
SMALL, SMALL_TWICE = 1e-7, 1e-3


def parts_of(what: str, loss: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the definitions that a function or a criterion computes, each with its options."""
    if isinstance(loss, LossFunction):
        return [(loss.Class, {n: f.default for n, f in loss.Class.fields.items()})]
    if isinstance(loss, Loss):
        return [(type(part), part._options) for _, part in loss._terms()]
    raise TypeError(f"{what}: loss must be a loss, such as nl.huber_loss or nl.HuberLoss(), got {loss!r}")


def operands_of(loss: Any) -> tuple[str, ...]:
    return (loss.Class if isinstance(loss, LossFunction) else loss)._required


# ---- functions of parameters ----------------------------------------------------------------------------


class Objective:
    """A loss of a model's parameters.

    Value and gradient at a point are computed once, however often and in whatever order they are asked for.
    The point is copied, as optimisers write into theirs; results are the caller's own.

    Parameters
    ----------
    loss : LossFunction or Loss
        Such as ``nl.huber_loss`` or ``nl.HuberLoss(delta=0.5)``.
    model : function
        ``model(x)``: the loss's first argument (predictions, scores) of the parameters, a 1-D float64 array.
    vjp : function
        ``vjp(x, d)``: the transposed Jacobian of the model at `x`, times an array of the model's shape.
    *arrays : array
        The loss's other arrays, the target first.
    **options
        Of the loss: ``reduction='sum'``, ``sample_weight``, ``delta``, ...

    Raises
    ------
    TypeError
        If `loss` is none.
    ValueError
        If the reduction is ``'none'``; at a point, what the loss raises.

    Notes
    -----
    Second derivatives of a loss do not make the Hessian of a model that is not linear: `objective` alone has
    ``hess`` and ``hessp``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> t = np.array([0.0, 1.0, 2.0])
    >>> decay = nl.optimize.Objective(
    ...     nl.huber_loss,
    ...     lambda x: np.exp(-x[0] * t),
    ...     lambda x, d: np.array([-d @ (t * np.exp(-x[0] * t))]),
    ...     np.array([1.0, 0.4, 0.1]),
    ... )
    >>> import scipy.optimize
    >>> found = scipy.optimize.minimize(decay.value_and_grad, [0.0], jac=True)
    >>> found.x.round(3)
    array([0.99])
    """

    def __init__(
        self,
        loss: Any,
        model: Callable[[np.ndarray], Any],
        vjp: Callable[[np.ndarray, Any], Any],
        *arrays: Any,
        **options: Any,
    ) -> None:
        parts = parts_of("objective", loss)
        if "none" in (
            options.get("reduction"),
            *(o["reduction"] for _, o in parts if "reduction" not in options),
        ):
            raise ValueError("objective: reduction must be 'mean' or 'sum', got 'none'")
        self.loss, self.model, self.vjp = loss, model, vjp
        self.arrays, self.options = arrays, options
        self._x: np.ndarray | None = None
        self._found: dict[str, Any] = {}

    def value(self, x: Any) -> float:
        """The loss at parameters (P)."""
        return self._first_order(self._at(x))[0]

    def gradient(self, x: Any) -> np.ndarray:
        """The gradient (P)."""
        at = self._at(x)
        if "gradient" not in at:
            pulled = self.vjp(at["x"], self._first_order(at)[1])
            at["gradient"] = np.array(pulled, np.float64).reshape(at["x"].shape)
        return at["gradient"].copy()

    def value_and_grad(self, x: Any) -> tuple[float, np.ndarray]:
        """Value and gradient, as ``scipy.optimize.minimize`` wants them with ``jac=True``."""
        return self.value(x), self.gradient(x)

    def _at(self, x: Any) -> dict[str, Any]:
        """Return what was found at a point so far: at a new one, the model's prediction."""
        if "x" not in self._found or not np.array_equal(x, self._found["x"]):
            self._found = {}
            at = np.array(x, np.float64)
            self._found = {"x": at, "prediction": self.model(at)}
        return self._found

    def _first_order(self, at: dict[str, Any]) -> tuple[float, Any]:
        """Return the value, and the gradient by the prediction."""
        if "slopes" not in at:
            wrt = operands_of(self.loss)[0]
            value, slopes = self.loss.value_and_grad(at["prediction"], *self.arrays, wrt=wrt, **self.options)
            at["slopes"] = float(value), slopes
        return at["slopes"]


class LinearObjective(Objective):
    """A loss of a linear model's parameters: see `objective`."""

    def __init__(self, loss: Any, X: Any, *arrays: Any, outputs: int | None = None, **options: Any) -> None:
        super().__init__(loss, self._predict, self._pull, *arrays, **options)
        self.X = X.astype(np.float64) if hasattr(X, "tocsr") else np.asarray(X, np.float64)
        self.outputs = outputs
        if self.X.ndim != 2:
            raise ValueError(f"objective: X must have shape (N, F), got {self.X.shape}")
        (first, held), *more = parts_of("objective", loss)
        given = {**held, **options}
        self._by_elements = all(issubclass(d, ElementwiseLoss) for d in (first, *(d for d, _ in more)))
        capped = given.get("softcap") is not None or given.get("lse_square_scale")
        self._by_softmax = not more and issubclass(first, CrossEntropyLoss) and not capped
        self._curved = False  # whether second derivatives were asked for: then they come along

    @property
    def hess(self) -> Callable[[Any], np.ndarray]:
        """``hess(x)``: the Hessian (P, P)."""
        self._check_hessian()
        return self._hess

    @property
    def hessp(self) -> Callable[[Any, Any], np.ndarray]:
        """``hessp(x, v)``: the product (P) of the Hessian and a vector, without the Hessian."""
        self._check_hessian()
        return self._hessp

    def _check_hessian(self) -> None:
        if not (self._by_elements or self._by_softmax):
            name = getattr(self.loss, "__name__", self.loss)
            raise AttributeError(
                f"objective: the Hessian of {name} is not known exactly, "
                "only that of losses of elements and of cross_entropy without softcap and lse_square_scale; "
                "leave hess and hessp out"
            )

    def _shaped(self, x: np.ndarray) -> np.ndarray:
        """Return parameters as (F), or (outputs, F)."""
        features = self.X.shape[1]
        shape = (features,) if self.outputs is None else (self.outputs, features)
        if x.ndim != 1 or x.size != features * (self.outputs or 1):
            raise ValueError(
                f"objective: x must hold {' x '.join(map(str, shape))} parameters, got shape {x.shape}"
            )
        return x.reshape(shape)

    def _predict(self, x: np.ndarray) -> np.ndarray:
        return self.X @ self._shaped(x).T

    def _pull(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.asarray(self.X.T @ d).T.ravel()

    # ---- second derivatives ------------------------------------------------------------------------
    def _hessp(self, x: Any, v: Any) -> np.ndarray:
        bend, moved = self._second_order(self._at(x)), self._predict(np.asarray(v, np.float64))
        if self._by_softmax:
            # Of a row of mass m with probabilities p it is m (diag(p) - p p').
            p, mass = bend
            moved = mass * p * (moved - (p * moved).sum(axis=1, keepdims=True))
        else:
            moved = bend * moved
        return self._pull(v, moved)

    def _hess(self, x: Any) -> np.ndarray:
        bend, features = self._second_order(self._at(x)), self.X.shape[1]
        if self.outputs is None:
            return self._gram(bend)
        found = np.zeros((self.outputs, features, self.outputs, features))
        for k in range(self.outputs):
            if not self._by_softmax:
                found[k, :, k] = self._gram(bend[:, k])
                continue
            p, mass = bend
            for j in range(k + 1):
                block = self._gram(mass[:, 0] * p[:, k] * ((j == k) - p[:, j]))
                found[k, :, j] = found[j, :, k] = block
        return found.reshape(self.outputs * features, -1)

    def _gram(self, weights: np.ndarray) -> np.ndarray:
        """Return ``X' diag(weights) X``."""
        if isinstance(self.X, np.ndarray):
            return self.X.T @ (weights[:, None] * self.X)
        return (self.X.T @ self.X.multiply(weights[:, None]).tocsr()).toarray()

    def _first_order(self, at: dict[str, Any]) -> tuple[float, Any]:
        if self._curved and self._by_elements:
            self._second_order(at)
        return super()._first_order(at)

    def _second_order(self, at: dict[str, Any]) -> Any:
        """Return the second derivatives by the predictions; of a softmax its probabilities and masses."""
        self._curved = True
        if "bends" not in at:
            prediction = at["prediction"]
            if self._by_softmax:
                p = np.exp(prediction - prediction.max(axis=1, keepdims=True))
                at["bends"] = p / p.sum(axis=1, keepdims=True), self._masses(prediction)
            else:
                wrt = operands_of(self.loss)[0]
                value, slopes, at["bends"] = self.loss.value_grad_hess(
                    prediction, *self.arrays, wrt=wrt, **self.options
                )
                at.setdefault("slopes", (float(value), slopes))
        return at["bends"]

    def _masses(self, prediction: np.ndarray) -> np.ndarray:
        """Return each row's targets' sum, its weights and the divisor in it: (N, 1).

        Of scores that are all the same a row's loss is its mass times log(C).
        """
        same, classes = np.zeros_like(prediction), prediction.shape[1]
        if classes == 1:
            return same
        rows = self.loss(same, *self.arrays, **{**self.options, "reduction": "none"})
        total, all_rows = float(self.loss(same, *self.arrays, **self.options)), float(rows.sum())
        return (rows * ((total / all_rows if all_rows else total) / np.log(classes)))[:, None]


def objective(loss: Any, X: Any, *arrays: Any, outputs: int | None = None, **options: Any) -> LinearObjective:
    """Make a loss of a linear model's parameters, with gradient and Hessian, for optimisers.

    Parameters
    ----------
    loss : LossFunction or Loss
        Such as ``nl.huber_loss`` or ``nl.HuberLoss(delta=0.5)``. Its first argument is ``X @ x``.
    X : array or SciPy's sparse array, shape (N, F)
        For an intercept append a column of ones.
    *arrays : array
        The loss's other arrays, the target first.
    outputs : int, optional
        How many predictions a row has: classes, or targets. They are ``X @ x.reshape(outputs, F).T`` then.
    **options
        Of the loss: ``reduction='sum'``, ``sample_weight``, ``delta``, ...

    Returns
    -------
    LinearObjective
        With ``value(x)``, ``gradient(x)``, ``value_and_grad(x)``, ``hess(x)`` and ``hessp(x, v)``, all in
        float64. What is known at a point is not computed again there. The Hessian is exact: there is one of
        losses of elements, and of `cross_entropy`; of others ``hess`` is an AttributeError.

    Raises
    ------
    TypeError
        If `loss` is none.
    ValueError
        If shapes do not fit, or the reduction is ``'none'``.

    Notes
    -----
    For iminuit an objective is a cost function with its gradient. Of summed negative log-likelihoods, such as
    that of counts here, its errors are right::

        cost = nl.optimize.objective(nl.poisson_nll_loss, X, counts, reduction="sum")
        minuit = iminuit.Minuit(cost.value, x0, grad=cost.gradient)
        minuit.errordef = iminuit.Minuit.LIKELIHOOD
        minuit.migrad()

    Examples
    --------
    >>> import numpy as np, numbaloss as nl, scipy.optimize
    >>> X = np.stack([np.arange(6.0), np.ones(6)], axis=1)
    >>> y = np.array([1.0, 3.0, 5.0, 7.0, 9.0, 90.0])
    >>> line = nl.optimize.objective(nl.huber_loss, X, y, delta=0.1)
    >>> found = scipy.optimize.minimize(
    ...     line.value_and_grad, [0, 0], jac=True, hessp=line.hessp, method="trust-ncg"
    ... )
    >>> found.x.round(1)
    array([2., 1.])
    """
    return LinearObjective(loss, X, *arrays, outputs=outputs, **options)


# ---- functions of residuals -----------------------------------------------------------------------------


class OfResidual:
    """A loss of ``input - target`` alone, as a function of that residual."""

    what = "norm"

    def __init__(self, loss: Any, **options: Any) -> None:
        self.loss, self.options = loss, options
        parts_of(self.what, loss)
        if len(operands_of(loss)) != 2:
            raise ValueError(
                f"{self.what}: loss must take two arrays, got one of {', '.join(operands_of(loss))}"
            )
        r = np.array([0.25, 1.5, 4.0])
        here, there = (self._evaluate(r + shift, shift)[0] for shift in (0.0, 2.0))
        if not np.allclose(here, there, rtol=1e-6, atol=0):
            raise ValueError(
                f"{self.what}: loss must depend on input - target alone, and {self._name} does not"
            )

    @property
    def _name(self) -> str:
        return getattr(self.loss, "__name__", None) or repr(self.loss)

    def __repr__(self) -> str:
        options = "".join(f", {n}={v!r}" for n, v in self.options.items())
        return f"{self.what}({self._name}{options})"

    def _evaluate(self, r: np.ndarray, target: float = 0.0) -> tuple[Any, Any, Any]:
        """Return value, slope and second derivative by the residual."""
        return self.loss.value_grad_hess(
            r,
            np.full_like(r, target),
            **{**self.options, "reduction": "none", "wrt": operands_of(self.loss)[0]},
        )


class Rho(OfResidual):
    """A loss for ``scipy.optimize.least_squares``: see `rho`."""

    what = "rho"

    def __init__(self, loss: Any, **options: Any) -> None:
        super().__init__(loss, **options)
        r = np.array([0.25, 1.5, 4.0])
        if not np.allclose(self._evaluate(r)[0], self._evaluate(-r)[0], rtol=1e-6, atol=0):
            raise ValueError(
                f"rho: loss must be the same for a residual and its negative, and {self._name} is not"
            )

    def __call__(self, z: Any) -> np.ndarray:
        z = np.asarray(z, np.float64)
        r = np.sqrt(z)
        value, slope, bend = self._evaluate(np.append(r, (SMALL, SMALL_TWICE)))
        # By z = r**2 the derivative is half of that by r, over r.
        with np.errstate(divide="ignore", invalid="ignore"):
            first = slope[:-2] / r
            second = (bend[:-2] - first) / (2 * z)
        limit = slope[-2] / SMALL
        limit_of_second = (bend[-1] - slope[-1] / SMALL_TWICE) / (2 * SMALL_TWICE**2)
        first = np.where(r < SMALL, limit, first)
        return np.stack([2 * value[:-2], first, np.where(r < SMALL_TWICE, limit_of_second, second)])


def rho(loss: Any, **options: Any) -> Rho:
    """Make a loss for ``scipy.optimize.least_squares(..., loss=...)`` of one of residuals.

    Parameters
    ----------
    loss : LossFunction or Loss
        Of elements of two arrays, by their difference alone, and of both signs the same:
        ``nl.HuberLoss(delta=2.0)``, one of your own, a sum of such.
    **options
        Of the loss. Its reduction is no matter here.

    Returns
    -------
    Rho
        ``rho(z)`` of squared residuals (m) is an array (3, m): twice the loss of ``sqrt(z)``, and its two
        derivatives by z. SciPy halves it, and scales by ``f_scale``. Of a loss that is half the square near
        0, as ``huber_loss``, it begins as z, as SciPy's own do.

    Raises
    ------
    TypeError
        If `loss` is none.
    ValueError
        If it is no such loss.

    Notes
    -----
    At 0 the derivatives by z are limits: for residuals below 1e-7 the first is the one at 1e-7, for those
    below 1e-3 the second is the one at 1e-3. Those of a loss with a kink at 0, as ``l1_loss``, are infinite
    there, and these stand for them. With ``f_scale`` a loss is to bend at residuals near 1, and not at such
    small ones.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.optimize.rho(nl.huber_loss)(np.array([0.0, 0.25, 4.0]))
    array([[ 0.    ,  0.25  ,  3.    ],
           [ 1.    ,  1.    ,  0.5   ],
           [ 0.    ,  0.    , -0.0625]])
    """
    return Rho(loss, **options)


class Norm(OfResidual):
    """A norm for ``statsmodels.RLM``: see `norm`."""

    def rho(self, z: Any) -> Any:
        """The loss of residuals."""
        return self._evaluate(np.asarray(z, np.float64))[0]

    __call__ = rho

    def psi(self, z: Any) -> Any:
        """Its derivative."""
        return self._evaluate(np.asarray(z, np.float64))[1]

    def weights(self, z: Any) -> Any:
        """The derivative over the residual: weights of iteratively reweighted least squares."""
        z = self._off_zero(z)
        return self._evaluate(z)[1] / z

    def psi_deriv(self, z: Any) -> Any:
        """The second derivative."""
        return self._evaluate(self._off_zero(z))[2]

    def _off_zero(self, z: Any) -> np.ndarray:
        z = np.asarray(z, np.float64)
        return np.copysign(np.maximum(np.abs(z), SMALL), z)


def norm(loss: Any, **options: Any) -> Norm:
    """Make a norm for ``statsmodels.api.RLM(y, X, M=...)`` of a loss of residuals.

    Parameters
    ----------
    loss : LossFunction or Loss
        Of elements of two arrays, by their difference alone: ``nl.HuberLoss(delta=1.345)``, one of your own,
        a sum of such.
    **options
        Of the loss. Its reduction is no matter here.

    Returns
    -------
    Norm
        With ``rho``, ``psi``, ``weights`` and ``psi_deriv``, each of an array of residuals over their scale.

    Raises
    ------
    TypeError
        If `loss` is none.
    ValueError
        If it is no such loss.

    Notes
    -----
    Weight and second derivative of a residual below 1e-7 are those at 1e-7: near the limit, and finite where
    a loss has a kink at 0.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> huber = nl.optimize.norm(nl.huber_loss, delta=1.345)
    >>> huber.weights(np.array([0.0, -1.0, 2.69]))
    array([1. , 1. , 0.5])
    """
    return Norm(loss, **options)
