"""ZCA whitening: against scikit-learn's PCA, its limits, its inverse, and batches."""

import pytest
import torch
from sklearn.decomposition import PCA

from limbeck.synthesis.whitening import ZCA


def pictures(items: int = 200) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    mixed = torch.randn(items, 12, generator=draws) @ torch.randn(12, 12, generator=draws)
    return (0.5 + 0.1 * mixed).view(items, 3, 2, 2)


def test_white_pixels_are_those_of_scikit_learn_turned_back():
    images = pictures()
    rows = images.flatten(1).double().numpy()
    peer = PCA(whiten=True).fit(rows)
    expected = torch.as_tensor(peer.transform(rows) @ peer.components_)  # the turn back makes ZCA of PCA
    found = ZCA.fit([images], epsilon=1e-12)(images)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=1e-3, atol=1e-3)


def test_pixels_are_uncorrelated_and_a_large_epsilon_only_shrinks():
    images = pictures()
    white = ZCA.fit([images], 1e-9)(images).flatten(1)
    torch.testing.assert_close(white.T.cov(), torch.eye(12), atol=1e-3, rtol=0)
    assert white.mean(0).abs().max() < 1e-3
    shrunk = 1e4 * ZCA.fit([images], 1e8)(images)
    torch.testing.assert_close(shrunk, images - images.mean(0), atol=1e-4, rtol=1e-3)


def test_the_matrix_is_symmetric_and_positive():
    matrix = ZCA.fit([pictures()], 0.1).matrix
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    variances = torch.linalg.eigvalsh(pictures().flatten(1).double().T.cov())
    expected = (variances + 0.1).rsqrt().flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(matrix.double()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 10.0])
def test_it_can_be_undone(epsilon):
    images = pictures()
    white = ZCA.fit([images], epsilon)
    assert not torch.allclose(white(images), images, atol=0.1)
    torch.testing.assert_close(white.invert(white(images)), images, atol=1e-4, rtol=0)


def test_batches_make_no_difference_and_a_far_mean_no_error():
    images = pictures()
    whole, parts = ZCA.fit([images]), ZCA.fit(images.split([1, 60, 139]))
    torch.testing.assert_close(parts.matrix, whole.matrix)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(ZCA.fit((images.double() + 1e6).split(50)).matrix, whole.matrix, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_images_and_a_constant_pixel_is_no_matter():
    images = pictures()
    images[:, 0, 0, 0] = 0.5
    white = ZCA.fit([images])
    leaf = images[:4].clone().requires_grad_()
    white(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert white(images).isfinite().all()


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        ZCA.fit([pictures(1)])


def test_the_state_is_all_that_there_is():
    white = ZCA.fit([pictures()])
    again = ZCA(12)
    again.load_state_dict(white.state_dict())
    assert torch.equal(again(pictures()), white(pictures()))
