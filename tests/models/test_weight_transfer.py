"""Fine-tunes moved onto a rectified flow, and networks whose output changes its sign."""

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.weight_transfer import merged_delta, negate_output


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"weight": torch.randn(3, 2).to(dtype), "bias": torch.randn(3).to(dtype), "count": torch.tensor(seed)}


def test_the_delta_is_added_number_by_number():
    flow, custom, origin = state(0), state(1), state(2)
    merged = merged_delta(flow, custom, origin, 0.7)
    for key in ("weight", "bias"):
        rows = zip(*(one[key].flatten().tolist() for one in (flow, custom, origin, merged)), strict=True)
        assert all(m == pytest.approx(w + 0.7 * (c - o), rel=1e-5, abs=1e-6) for w, c, o, m in rows)
    assert merged["count"].item() == 0


def test_no_share_and_no_difference_change_nothing():
    flow, custom, origin = state(0), state(1), state(2)
    for merged in (merged_delta(flow, custom, origin, 0.0), merged_delta(flow, origin, origin)):
        assert all(torch.equal(merged[key], flow[key]) for key in flow)
        assert all(merged[key] is not flow[key] for key in flow)
    back = merged_delta(merged_delta(flow, custom, origin), origin, custom)
    torch.testing.assert_close(back["weight"], flow["weight"])


def test_half_precision_is_summed_in_single():
    flow, custom, origin = (state(seed, torch.bfloat16) for seed in range(3))
    merged = merged_delta(flow, custom, origin)["weight"]
    exact = flow["weight"].float() + custom["weight"].float() - origin["weight"].float()
    assert torch.equal(merged, exact.bfloat16())


def test_other_architectures_are_refused():
    flow = state(0)
    with pytest.raises(IncompatibleError, match="fine-tune and the rectified network differ at 'extra'"):
        merged_delta(flow, {**flow, "extra": torch.zeros(1)}, flow)
    with pytest.raises(IncompatibleError, match="original and the rectified network differ at 'bias'"):
        merged_delta(flow, flow, {**flow, "bias": torch.zeros(4)})


def test_the_last_layer_carries_the_sign():
    torch.manual_seed(0)
    network = DenoisingMLP(numbers=4, width=8, depth=1)
    x, time = torch.randn(3, 4), torch.rand(3)
    before = network(x, time, {})
    assert torch.equal(negate_output(network, "exit")(x, time, {}), -before)
