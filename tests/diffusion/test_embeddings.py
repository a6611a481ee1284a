import math

import pytest
import torch

from limbeck.diffusion.embeddings import scalar_embedding


@pytest.mark.parametrize("dim", [2, 3, 8, 33])
def test_against_a_loop(dim):
    w, half = torch.tensor([0.0, 0.3, 2.0]), dim // 2
    embedded = scalar_embedding(w, dim, scale=10.0)
    assert embedded.shape == (3, dim)
    for row, value in enumerate(w.tolist()):
        frequencies = [10000 ** (-j / max(half - 1, 1)) for j in range(half)]
        expected = [math.sin(10 * value * f) for f in frequencies] + [math.cos(10 * value * f) for f in frequencies]
        expected += [0.0] * (dim % 2)
        torch.testing.assert_close(embedded[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert embedded.isfinite().all()


def test_half_precision_scales_are_embedded_in_float32():
    assert scalar_embedding(torch.tensor([7.5]).bfloat16(), 8).equal(scalar_embedding(torch.tensor([7.5]), 8))
