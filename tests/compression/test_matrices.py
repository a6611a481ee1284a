"""Layers as matrices, and what is summed of their inputs."""

import pytest
import torch
from torch import nn

from limbeck.compression.matrices import (
    InputStatistics,
    as_matrices,
    from_matrices,
    input_rows,
    matrix_layers,
    reached_in_order,
    reconstruction_error,
)
from limbeck.models.convnet import ConvNet
from tests.methods.language.rig import batch, gpt2, llama

LAYERS = [
    (nn.Linear(6, 4), (3, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 8, (1, 3), groups=2, dilation=2, padding="same"), (2, 4, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 5, 6)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
    (nn.Conv1d(4, 6, 3, padding=2, groups=2), (2, 4, 9)),
]


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 6), (2, 3, 6)


@pytest.mark.parametrize("case", [*LAYERS, None])
def test_rows_times_matrices_are_what_the_layer_does(case):
    torch.manual_seed(0)
    layer, shape = case or conv1d()
    nn.init.normal_(layer.weight)
    x = torch.randn(shape)
    rows, matrices = input_rows(layer, x), as_matrices(layer, layer.weight)
    assert rows.shape[0] == matrices.shape[0]
    assert rows.shape[2] == matrices.shape[2]
    out = rows @ matrices.mT  # (groups, samples, outputs of a group)
    expected = layer(x) - (0 if layer.bias is None else layer(torch.zeros_like(x)))
    if expected.ndim > 2 and isinstance(layer, nn.Conv1d | nn.Conv2d):
        expected = expected.flatten(2).transpose(1, 2)
    expected = expected.reshape(-1, expected.shape[-1]).unflatten(1, (len(matrices), -1)).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(from_matrices(layer, matrices), layer.weight)


def test_embeddings_norms_and_heads_stay_out_unless_they_are_named():
    llama_layers, gpt2_layers = matrix_layers(llama()), matrix_layers(gpt2(n_layer=2))
    assert len(llama_layers) == 14
    assert not any("head" in path or "embed" in path or "norm" in path for path in llama_layers)
    assert len(gpt2_layers) == 8  # Conv1D of transformers; the head shares the embedding's weight
    assert all("attn" in path or "mlp" in path for path in gpt2_layers)
    net = ConvNet(width=4, depth=2)
    assert list(matrix_layers(net)) == ["stages.0.conv", "stages.1.conv"]
    assert list(matrix_layers(net, ["head"])) == ["head"]
    assert list(matrix_layers(net, None, ["stages.0.*"])) == ["stages.1.conv"]
    assert len(matrix_layers(llama(), ["*.mlp.*"], ["*.0.*"])) == 3
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert list(matrix_layers(plain)) == ["0"]
    with pytest.raises(ValueError, match="matches no"):
        matrix_layers(net, ["stagse.*"])
    with pytest.raises(ValueError, match="is left"):
        matrix_layers(net, ["head"], ["*"])


def test_a_shared_weight_counts_once():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 2)})
    net["b"].weight = net["a"].weight
    assert list(matrix_layers(net)) == ["a"]


def test_padding_does_not_count_and_nothing_stays_on_the_network():
    model, items = llama().eval(), batch(3)
    layers = matrix_layers(model)
    mask = items.attention_mask.bool()
    assert not mask.all()
    with InputStatistics(layers) as seen:
        seen.during(lambda: model(input_ids=items.input_ids, attention_mask=items.attention_mask), mask)
    path = "model.layers.1.mlp.down_proj"
    caught = []
    handle = layers[path].register_forward_pre_hook(lambda layer, args: caught.append(args[0]))
    with torch.no_grad():
        model(input_ids=items.input_ids, attention_mask=items.attention_mask)
    handle.remove()
    expected = sum(torch.outer(row, row) for row in caught[0][mask])
    torch.testing.assert_close(seen.found[path].products[0], expected, rtol=1e-4, atol=1e-5)
    assert seen.found[path].samples == int(mask.sum())
    assert not any(module._forward_pre_hooks for module in model.modules())
    spoilt = items.input_ids.clone()
    spoilt[~mask] = 7
    with InputStatistics(layers) as again:
        again.during(lambda: model(input_ids=spoilt, attention_mask=items.attention_mask), mask)
    torch.testing.assert_close(again.found[path].products, seen.found[path].products)


def test_squares_are_the_diagonal_and_passes_add_up():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    layers = matrix_layers(net, ["*"])
    parts = [torch.randn(2, 2, 7, 7) for _ in range(2)]
    with InputStatistics(layers) as products, InputStatistics(layers, squares=True) as squares:
        for part in parts:
            net(part)
    for path in layers:
        torch.testing.assert_close(
            squares.found[path].products, products.found[path].products.diagonal(dim1=-2, dim2=-1)
        )
    with InputStatistics(layers) as whole:
        net(torch.cat(parts))
    torch.testing.assert_close(whole.found["2"].products, products.found["2"].products, rtol=1e-4, atol=1e-4)
    assert whole.found["2"].samples == 4 * 9


def test_the_pass_ends_at_the_last_layer_that_is_asked_for():
    reached = []
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    net[2].register_forward_hook(lambda *_: reached.append(1))
    with InputStatistics({"0": net[0], "1": net[1]}) as seen:
        seen.during(lambda: net(torch.rand(2, 3)))
    assert not reached
    assert set(seen.found) == {"0", "1"}


def test_half_precision_is_summed_in_float32():
    net = nn.Linear(8, 2)
    with InputStatistics({"net": net}) as seen, torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(4, 8))
    assert seen.found["net"].products.dtype is torch.float32


def test_layers_in_the_order_of_the_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            return self.a(self.b(x))

    net = Backwards()
    layers = {name: net.get_submodule(name) for name in ("a", "b", "idle")}
    assert reached_in_order(layers, lambda: net(torch.rand(1, 2))) == ["b", "a"]
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_the_error_is_that_of_the_outputs():
    x = torch.randn(30, 5)
    before, after = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    expected = (x @ (before - after)[0].T).square().sum() / (x @ before[0].T).square().sum()
    products = (x.T @ x)[None]
    torch.testing.assert_close(reconstruction_error(before, after, products), expected)
    assert reconstruction_error(before, before, products) == 0
    assert float(reconstruction_error(before, torch.zeros_like(before), products)) == pytest.approx(1)
