"""A classifier in JAX with a focal loss of numbaloss: scikit-learn's digits, on the CPU.

The step is compiled by `jax.jit`; the loss and its gradient are one pass of numbaloss's kernel, which JAX
calls with its own buffers.

    python examples/jax_training.py  # needs JAX: pip install jax
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


def main() -> int:
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
        w = jnp.zeros((64, 10), jnp.float32)
        for _ in range(STEPS):
            value, slope = step(w, x.astype(np.float32), y)
            w = w - RATE * slope
        right = float((np.argmax(x_test @ np.asarray(w), axis=1) == y_test).mean())
        found[name] = float(value), right
        print(f"{name:26} loss {value:.4f}, right on unseen digits {right:.1%}")
    own, ours = found["cross entropy, JAX's own"], found["numbaloss, cross entropy"]
    assert abs(own[0] - ours[0]) < 1e-4 and found["numbaloss, focal"][1] > 0.9
    return 0


if __name__ == "__main__":
    sys.exit(main())
