"""Games between a critic and a generator, on the critic's logits: positive means real. Which way gradients point.

Every loss is a mean over all entries of its logits, so that heads and positions may stand in further dimensions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import full_precision


@full_precision
def hinge_discriminator(real: Float[Tensor, "*real"], fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    r"""The critic's hinge loss, :math:`\overline{\max(0, 1 - D(x))} + \overline{\max(0, 1 + D(\tilde x))}`.

    Args:
        real: logits of real items, any shape.
        fake: logits of generated items, any shape; detach the items for the critic's own update.

    Returns:
        A scalar, 2 for a critic that says 0 to all, 0 once both sides keep a margin of 1. Some papers halve it.

    Source: Lim and Ye, *Geometric GAN*, 2017, arXiv 1705.02894.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


@full_precision
def hinge_generator(fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    r"""The generator's side of the hinge game, :math:`-\overline{D(\tilde x)}`.

    Args:
        fake: logits of generated items, any shape.

    Returns:
        A scalar, unbounded.

    Source: Lim and Ye, *Geometric GAN*, 2017, arXiv 1705.02894.
    """
    return -fake.mean()


@full_precision
def logistic_discriminator(real: Float[Tensor, "*real"], fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    r"""The critic's logistic loss, :math:`\overline{\log(1 + e^{-D(x)})} + \overline{\log(1 + e^{D(\tilde x)})}`.

    Args:
        real: logits of real items, any shape.
        fake: logits of generated items, any shape; detach the items for the critic's own update.

    Returns:
        A scalar of at least 0, :math:`2 \log 2` for a critic that says 0 to all.

    Source: Goodfellow et al., *Generative Adversarial Networks*, NeurIPS 2014, arXiv 1406.2661.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


@full_precision
def logistic_generator(fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    r"""The generator's non-saturating side of the logistic game, :math:`\overline{\log(1 + e^{-D(\tilde x)})}`.

    Its gradient is largest where the critic is right, unlike that of the reversed critic's loss.

    Args:
        fake: logits of generated items, any shape.

    Returns:
        A scalar of at least 0.

    Source: Goodfellow et al., *Generative Adversarial Networks*, NeurIPS 2014, arXiv 1406.2661.
    """
    return F.softplus(-fake).mean()


def r1_penalty(logits: Float[Tensor, "batch *heads"], *inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    r"""Squared gradient of the critic at real items, :math:`\frac1B \sum_b \lVert \nabla_{x_b} D(x_b) \rVert^2`.

    The factor :math:`\gamma / 2` of the paper is the caller's.

    Args:
        logits: of real items, (batch, …), computed from `inputs` with their graph; summed over heads.
        inputs: what the gradient is taken at, each (batch, …) and requiring gradients: images, or tapped features.

    Returns:
        A scalar of at least 0 that can be differentiated by the critic's weights.

    Raises:
        ValueError: if there are no inputs.

    Source: Mescheder et al., *Which Training Methods for GANs do actually Converge?*, ICML 2018, arXiv 1801.04406.
    """
    if not inputs:
        raise ValueError("r1_penalty needs what the gradient is taken at: pass the real items, requiring gradients")
    gradients = torch.autograd.grad(logits.float().sum(), inputs, create_graph=True)
    return torch.stack([gradient.float().square().sum() for gradient in gradients]).sum() / len(logits)


@full_precision
def approximate_r1(logits: Float[Tensor, "*real"], perturbed: Float[Tensor, "*real"]) -> Float[Tensor, ""]:
    r"""R1 without a second derivative: mean squared change of the logits under a little noise on the real items.

    .. math:: \overline{(D(x) - D(x + \sigma \varepsilon))^2}, \qquad \varepsilon \sim N(0, I)

    For small :math:`\sigma` and one logit an item its mean over the noise is :math:`\sigma^2` times `r1_penalty`.

    Args:
        logits: of real items, any shape.
        perturbed: of the same items with noise added, the same shape.

    Returns:
        A scalar of at least 0.

    Source: Lin et al., *Diffusion Adversarial Post-Training for One-Step Video Generation*, 2025, arXiv 2501.08316.
    """
    return (logits - perturbed).square().mean()


def reverse_gradient(x: Float[Tensor, "*shape"], weight: float = 1.0) -> Float[Tensor, "*shape"]:
    r"""The identity whose gradient is turned round.

    .. math:: \frac{\partial L}{\partial x} \mapsto -w\,\frac{\partial L}{\partial x}

    What lies before it climbs the loss that what lies behind it descends.

    Args:
        x: any floating-point tensor.
        weight: w; 0 stops the gradient, negative numbers only scale it.

    Returns:
        A tensor equal to `x` to the bit.

    Source: Ganin and Lempitsky, *Unsupervised Domain Adaptation by Backpropagation*, ICML 2015, arXiv 1409.7495.
    """
    return _Reversed.apply(x, weight)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None
