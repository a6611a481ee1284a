"""Distances between samples, against other implementations, closed forms and plain loops."""

import importlib.util
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from limbeck.metrics.distances import frechet_distance, mmd_rbf, pooled_pixels, sliced_wasserstein


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(items: int, dim: int, seed: int) -> torch.Tensor:
    """Features of a full covariance, away from 0."""
    return normal(items, dim, seed=seed) @ normal(dim, dim, seed=seed + 100) + normal(dim, seed=seed + 200)


def whitened(x: torch.Tensor) -> torch.Tensor:
    """The same items moved to mean 0 and covariance 1, to the last digits."""
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


# --- Fréchet


def test_frechet_against_the_root_of_the_product():
    a, b = correlated(300, 6, 1), correlated(200, 6, 2)
    one, two = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(one + two - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


class Flat(torch.nn.Module):
    """Features that are the pixels themselves."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()


def test_frechet_against_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = torch.rand(80, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.rand(60, 3, 2, 2) ** 2
    theirs = FrechetInceptionDistance(feature=Flat(), normalize=False, input_img_size=(3, 2, 2)).set_dtype(torch.double)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_frechet_against_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(300, 6, 1), correlated(200, 6, 2)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_of_gaussians_that_are_known():
    base = whitened(normal(100, 3))
    scales, shift = torch.tensor([[1.0, 2.0, 0.5], [0.3, -0.4, 1.2]], dtype=torch.float64)
    # Commuting covariances: |m|^2 + sum (s_a - s_b)^2.
    expected = float(shift.square().sum() + (scales - 1).square().sum())
    assert frechet_distance(base, base * scales + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-9)
    one = normal(50, 1)
    assert frechet_distance(one, 3 * one + 1) == pytest.approx(
        float((2 * one.mean() + 1) ** 2 + (2 * one.std()) ** 2), rel=1e-9
    )


def test_frechet_is_symmetric_and_sees_no_rotation():
    a, b = correlated(90, 5, 3), correlated(70, 5, 4)
    turn = torch.linalg.qr(normal(5, 5, seed=9))[0]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_of_fewer_items_than_features_is_finite_and_not_negative():
    a, b = normal(6, 40, seed=1), normal(5, 40, seed=2)
    assert 0 <= frechet_distance(a, a) < 1e-9
    # The root's trace is the nuclear norm of the centred items' products.
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a[:1], a[:1] + 2) == pytest.approx(4 * 40)


# --- sliced Wasserstein


def test_sliced_wasserstein_in_one_dimension_is_exact():
    a, b = normal(50, 1), 2 * normal(50, 1, seed=1) + 0.5
    exact = math.sqrt(
        sum((x - y) ** 2 for x, y in zip(sorted(a[:, 0].tolist()), sorted(b[:, 0].tolist()), strict=True)) / 50
    )
    assert sliced_wasserstein(a, b) == pytest.approx(exact, rel=1e-9)
    assert sliced_wasserstein(a, a[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_a_shift_is_the_mean_of_its_projections():
    a, shift = normal(200, 5), normal(5, seed=3)
    # |<shift, u>|^2 over random directions u has mean |shift|^2 / 5.
    many = sliced_wasserstein(a, a + shift, projections=20000)
    assert many == pytest.approx(float(shift.norm()) / math.sqrt(5), rel=0.02)


def test_sliced_wasserstein_of_sets_of_unequal_size():
    a = normal(4000, 3)
    assert sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0, abs=0.01)
    # Quantiles at 1/4 and 3/4 of 0, 1, 2, 3 lie between items: 0.5 and 2.5.
    small, large = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert sliced_wasserstein(small, large) == pytest.approx(0.5, rel=1e-9)
    assert sliced_wasserstein(large, small) == pytest.approx(0.5, rel=1e-9)


def test_sliced_wasserstein_is_a_function_of_the_sets_and_the_seed():
    a, b = normal(60, 2, 3), normal(60, 2, 3, seed=1) + 1
    shown = sliced_wasserstein(a, b)
    assert sliced_wasserstein(a.flip(0), b) == pytest.approx(shown, rel=1e-12)
    assert sliced_wasserstein(b, a) == pytest.approx(shown, rel=1e-12)
    assert sliced_wasserstein(a + 5, b + 5) == pytest.approx(shown, rel=1e-9)
    assert sliced_wasserstein(3 * a, 3 * b) == pytest.approx(3 * shown, rel=1e-9)
    state = torch.get_rng_state()
    assert sliced_wasserstein(a, b) == shown
    assert torch.equal(torch.get_rng_state(), state)
    assert sliced_wasserstein(a, b, projections=8, seed=1) != sliced_wasserstein(a, b, projections=8)


# --- MMD


def mmd_by_loops(a: torch.Tensor, b: torch.Tensor, bandwidth: float) -> float:
    def kernel(x: list[float], y: list[float]) -> float:
        return math.exp(-sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / (2 * bandwidth**2))

    def mean(xs: list[list[float]], ys: list[list[float]], within: bool) -> float:
        values = [kernel(x, y) for i, x in enumerate(xs) for j, y in enumerate(ys) if not (within and i == j)]
        return sum(values) / len(values)

    one, two = a.flatten(1).tolist(), b.flatten(1).tolist()
    return mean(one, one, True) + mean(two, two, True) - 2 * mean(one, two, False)


def test_mmd_against_plain_loops():
    a, b = normal(9, 2, 2), normal(7, 2, 2, seed=1) + 0.5
    assert mmd_rbf(a, b, 1.3) == pytest.approx(mmd_by_loops(a, b, 1.3), rel=1e-9)
    distances = [float((b[i] - b[j]).norm()) for i in range(7) for j in range(i)]
    assert mmd_rbf(a, b) == pytest.approx(mmd_by_loops(a, b, sorted(distances)[10]), rel=1e-9)


def test_mmd_is_unbiased():
    # Means of many estimates from eight points each: a biased one would be off by about 2 (1 - E k) / 8 = 0.13.
    same = [mmd_rbf(normal(8, 2, seed=2 * n), normal(8, 2, seed=2 * n + 1), 1.0) for n in range(600)]
    assert abs(sum(same) / 600) < 0.012
    assert min(same) < 0
    apart = [mmd_rbf(normal(8, 1, seed=2 * n), normal(8, 1, seed=2 * n + 1) + 1, 1.0) for n in range(600)]
    # Gaussian kernel, unit variances: E k = exp(-d^2 / 6) / sqrt(3) for points that lie d apart on average.
    expected = 2 * (1 - math.exp(-1 / 6)) / math.sqrt(3)
    assert sum(apart) / 600 == pytest.approx(expected, abs=0.03)


# --- features


def test_pooled_pixels_average_images_and_leave_the_rest():
    image = torch.arange(16 * 16, dtype=torch.float32).view(1, 1, 16, 16)
    pooled = pooled_pixels(image)
    assert pooled.shape == (1, 64)
    assert pooled[0, 0] == image[0, 0, :2, :2].mean()
    assert pooled[0, 63] == image[0, 0, 14:, 14:].mean()
    assert pooled_pixels(image, side=4).shape == (1, 16)
    small, points = torch.rand(2, 3, 8, 8), torch.rand(5, 20)
    assert torch.equal(pooled_pixels(small), small.flatten(1))
    assert torch.equal(pooled_pixels(points), points)
