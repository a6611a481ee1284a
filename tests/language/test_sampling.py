"""Sampling: the warped distribution is the one that transformers draws from."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from limbeck.language.sampling import Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.7, 1.0])
def test_it_warps_as_transformers_does(temperature, top_k, top_p):
    logits = 3 * torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(found, expected.softmax(-1))


def test_greedy_puts_everything_on_the_most_probable_token():
    probs = Sampling(0).probabilities(torch.tensor([[0.1, 2.0, 1.0], [3.0, 0.0, 1.0]]))
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"is at least|lies in"):
        Sampling(**options)
