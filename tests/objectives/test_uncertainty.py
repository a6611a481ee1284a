import math

import pytest
import torch

from limbeck.objectives.uncertainty import uncertainty

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_against_a_loop():
    for row, *found in zip(LOGITS.tolist(), *(uncertainty(LOGITS, k).tolist() for k in KINDS), strict=True):
        total = sum(map(math.exp, row))
        p = sorted((math.exp(value) / total for value in row), reverse=True)
        entropy = -sum(one * math.log(one) for one in p) / math.log(4)
        assert found == pytest.approx([1 - (p[0] - p[1]), entropy, 1 - p[0]], rel=1e-5)


KINDS = ("margin", "entropy", "least-confidence")


@pytest.mark.parametrize(("kind", "most"), [("margin", 1), ("entropy", 1), ("least-confidence", 0.75)])
def test_ends_of_the_scale(kind, most):
    ignorant, sure = torch.zeros(1, 4), torch.tensor([[0.0, -torch.inf, -1e4, -1e4]])
    assert float(uncertainty(ignorant, kind)) == pytest.approx(most)
    assert float(uncertainty(sure, kind)) == pytest.approx(0)


def test_only_the_margin_is_blind_to_the_rest():
    even, uneven = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log(), torch.tensor([[0.4, 0.4, 0.2, 1e-9]]).log()
    assert float(uncertainty(even, "margin")) == pytest.approx(float(uncertainty(uneven, "margin")), abs=1e-6)
    assert float(uncertainty(even, "entropy")) > float(uncertainty(uneven, "entropy")) + 0.01


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="2 classes"):
        uncertainty(torch.zeros(3, 1))
