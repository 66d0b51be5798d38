"""PyTorch's losses for NumPy and CuPy arrays: value and gradient in one fused pass.

>>> import numpy as np, numbaloss as nl
>>> value, gradient = nl.huber_loss.value_and_grad(np.array([0.5, 3.0]), np.zeros(2), delta=1.0)
"""

from . import arguments
from .binary import (
    BCELoss,
    BCEWithLogitsLoss,
    HingeEmbeddingLoss,
    KLDivLoss,
    SoftMarginLoss,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    hinge_embedding_loss,
    kl_div,
    soft_margin_loss,
)
from .custom import elementwise_loss
from .elementwise import ElementwiseLoss
from .kernels import math
from .loss import Loss
from .regression import (
    GaussianNLLLoss,
    HuberLoss,
    L1Loss,
    MarginRankingLoss,
    MSELoss,
    PoissonNLLLoss,
    SmoothL1Loss,
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    margin_ranking_loss,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
)
