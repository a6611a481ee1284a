"""ZCA whitening: all pixels of a data set are decorrelated, with as little change to each image as that takes."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "items *shape"]


class ZCA(nn.Module):
    r"""Whitening that turns images back to where they came from, and can be undone.

    .. math:: z = U (\Lambda + \epsilon I)^{-1/2} U^\top (x - \mu), \qquad \Sigma = U \Lambda U^\top

    with mean :math:`\mu` and covariance :math:`\Sigma` of the flattened images. It does nothing until `fit` or a stored
    state has filled it in. Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009; data-set
    distillation takes it with epsilon 0.1 on images in [0, 1] (Cazenavette et al., 2022).

    Args:
        dims: numbers an image, channels times height times width.

    Attributes:
        mean: (dims,) float32.
        matrix: (dims, dims) float32, symmetric.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("matrix", torch.eye(dims))

    @classmethod
    def fit(cls, batches: Iterable[Float[Tensor, "_ *shape"]], epsilon: float = 0.1) -> "ZCA":
        """The whitening of some images, seen once, a batch at a time.

        Args:
            batches: images of one shape (items, *shape), at least two in all.
            epsilon: added to the variance along each direction; above 0, so that it can be undone.

        Raises:
            ValueError: fewer than two images.
        """
        count, total, products, origin = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
        for images in batches:
            rows = images.detach().cpu().flatten(1).double()
            if not count:
                origin = rows.mean(0)  # near the mean: products about it do not cancel
            rows = rows - origin
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
        if count < 2:
            raise ValueError(f"{count} images have no covariance: give at least two")
        shift = total / count
        variances, directions = torch.linalg.eigh((products - count * torch.outer(shift, shift)) / (count - 1))
        made = cls(len(shift))
        made.mean.copy_(origin + shift)
        made.matrix.copy_(directions * (variances.clamp(min=0) + epsilon).rsqrt() @ directions.T)
        return made

    def forward(self, images: Images) -> Images:
        """Images, whitened, in their shape; float32."""
        return ((images.flatten(1).float() - self.mean) @ self.matrix).view(images.shape)

    def invert(self, images: Images) -> Images:
        """Whitened images as they were before, up to rounding; for pictures."""
        rows = torch.linalg.solve(self.matrix.double(), images.flatten(1).double().T).T
        return (rows + self.mean).to(torch.float32).view(images.shape)
