"""Losses of vectors that users could define, for the tests of both devices."""

import numbaloss as nl


class SumTriplet(nl.VectorLoss):
    """The triplet loss by sums of squares."""

    margin: float = 1.0
    eps: float = 1e-6

    def terms(anchor, positive, negative, eps):
        return (anchor - positive + eps) ** 2, (anchor - negative + eps) ** 2

    def finish(near, far, margin):
        return nl.math.maximum(margin + nl.math.sqrt(near) - nl.math.sqrt(far), 0.0)


def squares(x, y):
    return (x - y) ** 2


def pulled(total, label, margin=3.0):
    """Contrastive, with soft labels."""
    return label * total + (1 - label) * nl.math.maximum(margin - nl.math.sqrt(total), 0.0) ** 2


contrastive = nl.vector_loss(squares, pulled, name="contrastive")


class Scaled(contrastive.Class):
    homogeneous = 2
    lengths = ("margin",)


class Cauchy(nl.VectorLoss):
    """Options in both functions, a flag, two row arrays of which one enters with its square."""

    width: float = nl.arguments.positive(1.5)
    squared: bool = True

    def terms(x, y, width, squared):
        d = (x - y) / width
        return d * d if squared else abs(d)

    def finish(total, weight, shift, width, squared):
        return weight * nl.math.log1p(total + shift * shift) * width + (0.5 if squared else 0.0) * shift
