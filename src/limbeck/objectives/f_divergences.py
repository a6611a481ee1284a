"""The table of f-divergences: one row serves token distributions and, through its weight, score matching.

Every row is ``D_f(p || q) = sum_v q_v f(p_v / q_v)`` with p the teacher, q the student, f convex and f(1) = 0. A row
holds f with its two derivatives, and a form of the same sum that is stable in log-probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Stands for log 0 where logaddexp of two true -inf would have a NaN gradient; exp(_LOG_ZERO) is exactly 0.
_LOG_ZERO = -1e30

ScalarMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FDivergence:
    """One f-divergence: its generator, the generator's derivatives, and a stable form on log-probabilities.

    Attributes:
        f: the generator, elementwise in the ratio r = teacher / student, r > 0.
        df: f'.
        d2f: f'' (almost everywhere).
        from_log_probs: ``(log_student, log_teacher) -> (*items,)``, both ``(*items, vocab)``, in nats; the same
            number as ``sum q f(p/q)``. An entry whose term would be infinite because one side is -inf contributes 0.
        smooth: False where f'' is a point mass, so that no weight exists.
    """

    f: ScalarMap
    df: ScalarMap
    d2f: ScalarMap
    from_log_probs: Callable[[Tensor, Tensor], Tensor]
    smooth: bool = True

    def weight(self, ratio: Float[Tensor, "*items"]) -> Float[Tensor, "*items"]:
        """The factor h(r) = f''(r) r^2 on the score difference in distribution matching.

        ``ratio`` is teacher density / student density, positive; clamp it before (h of the chi-squares is unbounded).
        Raises ValueError for a divergence without a second derivative (total variation).

        Source: Xu et al., *One-step Diffusion Models with f-Divergence Distribution Matching*, 2025, arXiv 2502.15681.
        """
        if not self.smooth:
            raise ValueError("f'' is 0 almost everywhere here, so there is no weight; try 'jensen-shannon'")
        return self.d2f(ratio) * ratio.square()


def kl_divergence(
    log_a: Float[Tensor, "*items vocab"], log_b: Float[Tensor, "*items vocab"]
) -> Float[Tensor, "*items"]:
    """KL(a || b) in nats from log-probabilities; an entry where either side is -inf contributes 0."""
    absent = torch.isneginf(log_a) | torch.isneginf(log_b)
    return (log_a.exp() * (log_a - log_b).masked_fill(absent, 0.0)).sum(-1)


def log_mixture(
    log_a: Float[Tensor, "*items vocab"], log_b: Float[Tensor, "*items vocab"], weight: float
) -> Float[Tensor, "*items vocab"]:
    """log(weight a + (1 - weight) b) from log-probabilities, for weight in [0, 1], with finite gradients at -inf."""
    log_weight = math.log(weight) if weight > 0 else -math.inf
    log_rest = math.log1p(-weight) if weight < 1 else -math.inf
    return torch.logaddexp(log_a.clamp_min(_LOG_ZERO) + log_weight, log_b.clamp_min(_LOG_ZERO) + log_rest)


def _relative_difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """(a - b) / sqrt(b), 0 where b is 0; multiplied by sqrt(b) early, since (a/b)^2 alone overflows."""
    log_ratio = (log_a - log_b).masked_fill(torch.isneginf(log_b), 0.0)
    return torch.expm1(log_ratio) * (0.5 * log_b).exp()


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def forward_kl() -> FDivergence:
    """KL(p || q): covers every teacher mode; gradient q - p at temperature 1."""
    return FDivergence(
        f=lambda r: torch.xlogy(r, r),
        df=lambda r: r.log() + 1,
        d2f=lambda r: 1 / r,
        from_log_probs=lambda log_q, log_p: kl_divergence(log_p, log_q),
    )


def reverse_kl() -> FDivergence:
    """KL(q || p): seeks modes; its weight is 1 everywhere, which is plain distribution matching."""
    return FDivergence(
        f=lambda r: -r.log(),
        df=lambda r: -1 / r,
        d2f=lambda r: r**-2,
        from_log_probs=kl_divergence,
    )


def symmetric_kl(weight: float = 0.9) -> FDivergence:
    """(1 - weight) KL(p || q) + weight KL(q || p); 0.9 is DistiLLM's code.

    Source: Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    arXiv 2402.03898.
    """
    _check_unit("weight", weight)
    return FDivergence(
        f=lambda r: (1 - weight) * torch.xlogy(r, r) - weight * r.log(),
        df=lambda r: (1 - weight) * (r.log() + 1) - weight / r,
        d2f=lambda r: (1 - weight) / r + weight / r.square(),
        from_log_probs=lambda log_q, log_p: (
            (1 - weight) * kl_divergence(log_p, log_q) + weight * kl_divergence(log_q, log_p)
        ),
    )


def jeffreys() -> FDivergence:
    """KL(p || q) + KL(q || p)."""
    return FDivergence(
        f=lambda r: (r - 1) * r.log(),
        df=lambda r: r.log() + 1 - 1 / r,
        d2f=lambda r: 1 / r + r**-2,
        from_log_probs=lambda log_q, log_p: kl_divergence(log_p, log_q) + kl_divergence(log_q, log_p),
    )


def jensen_shannon() -> FDivergence:
    """KL(p || m) + KL(q || m) with m = (p + q)/2: f-distill's row, twice ``jsd`` at beta = 0.5."""
    half = generalised_jsd(0.5)
    return FDivergence(
        f=lambda r: 2 * half.f(r),
        df=lambda r: 2 * half.df(r),
        d2f=lambda r: 2 * half.d2f(r),
        from_log_probs=lambda log_q, log_p: 2 * half.from_log_probs(log_q, log_p),
    )


def generalised_jsd(beta: float = 0.5) -> FDivergence:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    By convention beta = 0 is KL(p || q) and beta = 1 is KL(q || p), although the formula itself tends to 0 at both
    ends: it is JSD/beta that tends to KL(p || q), and JSD/(1 - beta) that tends to KL(q || p). So the value jumps at
    the ends.

    Source: Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, arXiv 2306.13649.
    """
    _check_unit("beta", beta)
    if beta == 0.0:
        return forward_kl()
    if beta == 1.0:
        return reverse_kl()

    def from_log_probs(log_q: Tensor, log_p: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q, beta)
        return beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)

    def mixed(r: Tensor) -> Tensor:
        return beta * r + 1 - beta

    return FDivergence(
        f=lambda r: beta * torch.xlogy(r, r / mixed(r)) - (1 - beta) * mixed(r).log(),
        df=lambda r: beta * (r / mixed(r)).log(),
        d2f=lambda r: beta * (1 - beta) / (r * mixed(r)),
        from_log_probs=from_log_probs,
    )


def skew_kl(alpha: float = 0.1) -> FDivergence:
    """KL(p || alpha p + (1 - alpha) q); alpha = 0 is KL(p || q), alpha = 1 is 0.

    Source: Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    arXiv 2402.03898.
    """
    _check_unit("alpha", alpha)

    def mixed(r: Tensor) -> Tensor:
        return alpha * r + 1 - alpha

    return FDivergence(
        f=lambda r: torch.xlogy(r, r / mixed(r)),
        df=lambda r: (r / mixed(r)).log() + (1 - alpha) / mixed(r),
        d2f=lambda r: (1 - alpha) ** 2 / (r * mixed(r).square()),
        from_log_probs=lambda log_q, log_p: kl_divergence(log_p, log_mixture(log_p, log_q, alpha)),
    )


def skew_reverse_kl(alpha: float = 0.1) -> FDivergence:
    """KL(q || (1 - alpha) p + alpha q); alpha = 0 is KL(q || p), alpha = 1 is 0. Source: as ``skew_kl``."""
    _check_unit("alpha", alpha)

    def mixed(r: Tensor) -> Tensor:
        return (1 - alpha) * r + alpha

    return FDivergence(
        f=lambda r: -mixed(r).log(),
        df=lambda r: -(1 - alpha) / mixed(r),
        d2f=lambda r: (1 - alpha) ** 2 / mixed(r).square(),
        from_log_probs=lambda log_q, log_p: kl_divergence(log_q, log_mixture(log_q, log_p, alpha)),
    )


def softened_reverse_kl() -> FDivergence:
    """2 KL(m || p) with m = (p + q)/2: reverse KL whose weight 1/(1 + r) fades where the teacher dominates.

    Source: Xu et al., *One-step Diffusion Models with f-Divergence Distribution Matching*, 2025, arXiv 2502.15681.
    """
    return FDivergence(
        f=lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
        df=lambda r: ((r + 1) / (2 * r)).log() - 1 / r,
        d2f=lambda r: 1 / (r.square() * (r + 1)),
        from_log_probs=lambda log_q, log_p: 2 * kl_divergence(log_mixture(log_p, log_q, 0.5), log_p),
    )


def total_variation() -> FDivergence:
    """0.5 sum |p - q|, in [0, 1]; 1 minus it is the acceptance rate of speculative decoding. No weight: f'' = 0."""
    return FDivergence(
        f=lambda r: 0.5 * (r - 1).abs(),
        df=lambda r: 0.5 * (r - 1).sign(),
        d2f=torch.zeros_like,
        from_log_probs=lambda log_q, log_p: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
        smooth=False,
    )


def squared_hellinger() -> FDivergence:
    """1 - sum sqrt(p q), in [0, 1], written 0.5 sum (sqrt p - sqrt q)^2 so that it is exactly 0 at p = q."""
    return FDivergence(
        f=lambda r: 1 - r.sqrt(),
        df=lambda r: -0.5 * r**-0.5,
        d2f=lambda r: 0.25 * r**-1.5,
        from_log_probs=lambda log_q, log_p: 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1),
    )


def pearson_chi2() -> FDivergence:
    """sum (p - q)^2 / q."""
    return FDivergence(
        f=lambda r: (r - 1).square(),
        df=lambda r: 2 * (r - 1),
        d2f=lambda r: torch.full_like(r, 2.0),
        from_log_probs=lambda log_q, log_p: _relative_difference(log_p, log_q).square().sum(-1),
    )


def neyman_chi2() -> FDivergence:
    """sum (p - q)^2 / p."""
    return FDivergence(
        f=lambda r: (1 - r).square() / r,
        df=lambda r: 1 - r**-2,
        d2f=lambda r: 2 * r**-3,
        from_log_probs=lambda log_q, log_p: _relative_difference(log_q, log_p).square().sum(-1),
    )


F_DIVERGENCES: dict[str, Callable[..., FDivergence]] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "symmetric-kl": symmetric_kl,
    "jeffreys": jeffreys,
    "jsd": generalised_jsd,
    "jensen-shannon": jensen_shannon,
    "skew-kl": skew_kl,
    "skew-reverse-kl": skew_reverse_kl,
    "softened-reverse-kl": softened_reverse_kl,
    "total-variation": total_variation,
    "squared-hellinger": squared_hellinger,
    "pearson-chi2": pearson_chi2,
    "neyman-chi2": neyman_chi2,
}


def f_divergence(name: str, **parameters: float) -> FDivergence:
    """The row of the table with this name, e.g. ``f_divergence("skew-kl", alpha=0.1)``.

    Raises ValueError for an unknown name (with the known ones) and for a parameter out of its range.
    """
    if name not in F_DIVERGENCES:
        raise ValueError(f"unknown f-divergence {name!r}; known: {', '.join(sorted(F_DIVERGENCES))}")
    return F_DIVERGENCES[name](**parameters)
