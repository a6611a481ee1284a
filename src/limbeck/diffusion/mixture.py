"""The laboratory: a denoiser whose data are a Gaussian mixture, so that everything about it is known exactly."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.diffusion.denoiser import NONE, Condition, Denoiser, Sampling
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Schedule, along


class GaussianMixtureDenoiser(nn.Module, Denoiser):
    """The exact denoiser of a mixture of isotropic Gaussians, conditional on labels where components have them.

    Args:
        means: of each component (components, dim).
        std: deviation, one number for all or one a component (components,).
        schedule: noise over time.
        weights: of each component (components,), summing to 1; equal if absent.
        labels: class of each component (components,); None for a mixture without classes.

    The label -1 is the null label. Items are (items, dim), or of any shape that holds dim numbers.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor
    labels: Tensor | None

    def __init__(
        self,
        means: Float[Tensor, "components dim"],
        std: float | Float[Tensor, " components"],
        schedule: Schedule,
        weights: Float[Tensor, " components"] | None = None,
        labels: Int[Tensor, " components"] | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.sampling = schedule, Sampling()
        count = len(means)
        self.register_buffer("means", means)
        self.register_buffer("std", torch.as_tensor(std, dtype=means.dtype).expand(count).clone())
        equal = torch.full((count,), 1 / count, dtype=means.dtype)
        self.register_buffer("log_weights", (equal if weights is None else weights).log())
        self.register_buffer("labels", labels)

    @classmethod
    def ring(
        cls, schedule: Schedule, modes: int = 8, radius: float = 1.4, std: float = 0.1, classes: int | None = None
    ) -> "GaussianMixtureDenoiser":
        """Modes on a circle in the plane; per-dimension deviation about 1 at the default radius.

        With `classes`, neighbouring modes belong to one class.
        """
        angle = torch.arange(modes, dtype=torch.float32) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        labels = None if classes is None else torch.arange(modes) * classes // modes
        return cls(means, std, schedule, labels=labels)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Prediction:
        """The exact x0 at noisy items (items, ...) and times (items,)."""
        flat = x_t.flatten(1)
        alpha, sigma = (along(c(t.double()), flat) for c in (self.schedule.alpha, self.schedule.sigma))
        variance = alpha.square() * self.std.to(flat).square() + sigma.square()  # (items, components)
        share = self.posterior(x_t, t, condition)
        # E[x0 | x_t, k] = (alpha s_k^2 x_t + sigma^2 mu_k) / variance_k
        pull = (share * alpha * self.std.to(flat).square() / variance).sum(1, keepdim=True) * flat
        x0 = pull + (share * sigma.square() / variance) @ self.means.to(flat)
        return Prediction(x0.view_as(x_t), "x0", x_t, t, self.schedule)

    def posterior(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Float[Tensor, "items components"]:
        """How probable it is that each noisy item came from each component."""
        flat = x_t.flatten(1)
        alpha, sigma = (along(c(t.double()), flat) for c in (self.schedule.alpha, self.schedule.sigma))
        variance = alpha.square() * self.std.to(flat).square() + sigma.square()
        distance = (flat[:, None] - alpha[:, :, None] * self.means.to(flat)).square().sum(-1)
        dim = flat.shape[1]
        log_joint = self._log_prior(flat, condition) - distance / (2 * variance) - dim / 2 * variance.log()
        return log_joint.softmax(1)

    def null(self, condition: Condition) -> Condition:
        """The condition with the label -1."""
        return {**condition, **({"label": torch.full_like(condition["label"], -1)} if "label" in condition else {})}

    @torch.no_grad()
    def draw(self, items: int, label: int | None = None) -> Float[Tensor, "items dim"]:
        """Data from the mixture, of one class where a label is given; from torch's stream."""
        prior = self.log_weights.exp()
        if label is not None and self.labels is not None:
            prior = prior * (self.labels == label)
        component = torch.multinomial(prior, items, replacement=True)
        noise = torch.randn(items, self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        return self.means[component] + self.std[component, None] * noise

    def label_of(self, x: Tensor) -> Int[Tensor, " items"]:
        """The number of the component whose mean is nearest to each item."""
        return torch.cdist(x.flatten(1), self.means.to(x)).argmin(1)

    def _log_prior(self, flat: Tensor, condition: Condition) -> Tensor:
        prior = self.log_weights.to(flat)
        if self.labels is None or "label" not in condition:
            return prior
        label = condition["label"][:, None]
        return prior.masked_fill((label != self.labels) & (label >= 0), -torch.inf)
