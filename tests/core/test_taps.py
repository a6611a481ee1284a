import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps, match_modules


class Net(nn.Module):
    """Three layers, the second of which returns a tuple, as transformers' do; counts how often its head ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3), Pair(), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 2)
        self.heads_run = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](image)
        hidden, _ = self.layers[1](hidden)
        self.heads_run += 1
        return self.head(self.layers[2](hidden))


class Pair(nn.Module):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden.relu(), "cache"


BATCH = Batch({"image": torch.randn(4, 3, generator=torch.Generator().manual_seed(1))})


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_outputs_are_caught_in_the_order_asked_for():
    net = Net()
    with Taps(net, ["layers.2", "layers.0"]) as taps:
        logits = taps.run(BATCH)
        assert list(taps.paths) == ["layers.2", "layers.0"]
        last, first = taps.values()
    torch.testing.assert_close(first, net.layers[0](BATCH.image))
    torch.testing.assert_close(last, net.layers[2](first.relu()))
    torch.testing.assert_close(logits, net.head(last))


def test_inputs_are_caught_on_request():
    net = Net()
    with Taps(net, ["layers.2", "head"], kind="input") as taps:
        taps.run(BATCH)
    torch.testing.assert_close(taps["layers.2"], net.layers[0](BATCH.image).relu())
    torch.testing.assert_close(taps["head"], net.layers[2](taps["layers.2"]))


def test_the_first_entry_of_a_tuple_is_the_feature():
    net = Net()
    with Taps(net, ["layers.1"]) as taps:
        taps.run(BATCH)
    torch.testing.assert_close(taps["layers.1"], net.layers[0](BATCH.image).relu())


def test_features_carry_gradients():
    net = Net()
    with Taps(net, ["layers.0"]) as taps:
        taps.run(BATCH)
    taps["layers.0"].sum().backward()
    assert net.layers[0].weight.grad.abs().sum() > 0
    assert net.head.weight.grad is None


def test_nothing_stays_on_the_model_even_after_an_error():
    net = Net()
    with Taps(net, ["layers.*"]):
        assert hooks(net) == 3
    assert hooks(net) == 0
    with pytest.raises(RuntimeError), Taps(net, ["layers.*"]) as taps:
        taps.run(Batch({"image": torch.zeros(4, 7)}))
    assert hooks(net) == 0


def test_a_pass_can_end_at_the_last_tap():
    net = Net()
    with Taps(net, ["layers.1", "layers.0"], stop=True) as taps:
        assert taps.run(BATCH) is None
        assert len(taps.values()) == 2
    assert net.heads_run == 0
    with Taps(net, ["layers.0"]) as taps:
        assert taps.run(BATCH) is not None
    assert net.heads_run == 1


def test_a_second_pass_replaces_the_first():
    net = Net()
    with Taps(net, ["layers.0"], stop=True) as taps:
        taps.run(BATCH)
        taps.run(Batch({"image": torch.zeros(2, 3)}))
        assert taps["layers.0"].shape == (2, 3)


def test_a_layer_that_was_not_reached_is_named():
    net = Net()
    net.layers.append(nn.Linear(3, 3))
    with Taps(net, ["layers.*"]) as taps:
        taps.run(BATCH)
    with pytest.raises(KeyError, match=r"layers.3[\s\S]*not reached"):
        taps["layers.3"]


def test_globs_match_in_the_models_order_and_each_layer_once():
    net = Net()
    assert match_modules(net, ["layers.*"]) == ["layers.0", "layers.1", "layers.2"]
    assert match_modules(net, ["layers.2", "layers.?", "head"]) == ["layers.2", "layers.0", "layers.1", "head"]
    assert match_modules(net, ["layers.[02]"]) == ["layers.0", "layers.2"]


def test_a_pattern_without_a_match_offers_the_nearest_layer():
    with pytest.raises(IncompatibleError, match=r"no layer 'layer.0' in Net[\s\S]*did you mean 'layers.0'"):
        Taps(Net(), ["layer.0"])
    with pytest.raises(IncompatibleError, match="no layer 'blocks"):
        match_modules(Net(), ["blocks.*"])
