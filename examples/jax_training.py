"""A classifier in JAX with a focal loss of numbaloss: scikit-learn's digits, on the CPU.

The step is compiled by `jax.jit`; the loss and its gradient are one pass of numbaloss's kernel, which JAX
calls with its own buffers.

    python examples/jax_training.py [picture.svg]  # needs JAX: pip install jax
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    print("JAX is not installed: pip install jax")
    sys.exit(0)

import numbaloss.jax as nj

STEPS, RATE = 150, 0.5


def draw(found: dict[str, tuple[list[float], float]], path: str) -> None:
    """The loss by step, and how well unseen digits are named then."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    looks = ("-", "#56B4E9", 5), ("--", "#0072B2", 2), ("o-", "#D55E00", 2)
    for (name, (losses, right)), (style, colour, width) in zip(found.items(), looks, strict=True):
        label = f"{name}: {right:.1%} right"
        axes.plot(losses, style, color=colour, linewidth=width, markevery=10, label=label)
    axes.set(title="Training with the losses of JAX and of numbaloss", xlabel="step", ylabel="loss")
    axes.legend(title="on unseen digits")
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    losses = {
        "cross entropy, JAX's own": lambda s, t: (
            -jnp.take_along_axis(jax.nn.log_softmax(s), t[:, None], axis=1).mean()
        ),
        "numbaloss, cross entropy": nj.cross_entropy,
        "numbaloss, focal": lambda s, t: nj.focal_cross_entropy(s, t, gamma=2.0),
    }
    found = {}
    for name, loss in losses.items():

        def of_weights(w, x, y, loss=loss):
            return loss(x @ w, y)

        step = jax.jit(jax.value_and_grad(of_weights))
        w, values = jnp.zeros((64, 10), jnp.float32), []
        for _ in range(STEPS):
            value, slope = step(w, x.astype(np.float32), y)
            w = w - RATE * slope
            values.append(value)
        right = float((np.argmax(x_test @ np.asarray(w), axis=1) == y_test).mean())
        found[name] = [float(v) for v in values], right
        print(f"{name:26} loss {value:.4f}, right on unseen digits {right:.1%}")
    if path:
        draw(found, path)
        print(f"picture: {path}")
    own, ours = found["cross entropy, JAX's own"], found["numbaloss, cross entropy"]
    assert abs(own[0][-1] - ours[0][-1]) < 1e-4 and found["numbaloss, focal"][1] > 0.9
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
