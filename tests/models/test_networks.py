"""The shipped networks: shapes, layers, and the configuration that rebuilds them."""

import inspect
import json

import pytest
import torch
from pydantic import ValidationError

from limbeck.core.batch import Batch
from limbeck.core.taps import Taps
from limbeck.models.configs import SHIPPED
from limbeck.models.convnet import ConvNet
from limbeck.models.mlp import MLP
from limbeck.models.shipped import CLASSES
from limbeck.models.vit import VisionTransformer

NETWORKS = [
    ConvNet(channels=3, classes=7, width=4, depth=4, blocks=2, norm="group"),
    ConvNet(channels=3, classes=7, width=6, depth=1, norm="none"),
    VisionTransformer(image_size=8, patch_size=2, classes=7, dim=12, depth=3, heads=3),
    VisionTransformer(image_size=8, patch_size=8, classes=7, dim=12, depth=1, heads=2, distilled=True),
    MLP(inputs=192, classes=7, width=9, depth=3),
    MLP(inputs=192, classes=7, depth=0),
]
IDS = [f"{type(network).__name__}-{index}" for index, network in enumerate(NETWORKS)]


@pytest.mark.parametrize("network", NETWORKS, ids=IDS)
def test_the_configuration_rebuilds_the_network(network):
    config = json.loads(json.dumps(network.config))
    again = type(network)(**config)
    again.load_state_dict(network.state_dict())
    image = torch.randn(5, 3, 8, 8)
    assert torch.equal(again.eval()(image), network.eval()(image))
    assert network(image).shape == (5, 7)


@pytest.mark.parametrize("network", NETWORKS, ids=IDS)
def test_every_layer_can_be_tapped_and_every_weight_is_trained(network):
    network.train()
    with Taps(network, network.layers()) as taps:
        output = taps.run(Batch({"image": torch.randn(5, 3, 8, 8)}))
    assert len(taps.values()) == network.config["depth"]
    (sum(part.sum() for part in output) if isinstance(output, tuple) else output.sum()).backward()
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_configuration_has_the_constructor_s_arguments_and_defaults(name):
    parameters = list(inspect.signature(CLASSES[name].__init__).parameters.values())[1:]
    fields = SHIPPED[name].model_fields
    assert {parameter.name: parameter.default for parameter in parameters} == {
        field: info.default for field, info in fields.items()
    }
    assert all(info.description for info in fields.values())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_convnet_shows_maps_before_and_after_the_activation(norm):
    network = ConvNet(width=8, depth=3, blocks=2, norm=norm)
    with Taps(network, ["stages.*.norm"]) as before, Taps(network, network.layers()) as after:
        network(torch.randn(4, 1, 8, 8))
    for stage, (raw, active) in enumerate(zip(before.values(), after.values(), strict=True)):
        assert active.shape == (4, 8 * 2**stage, 8 // 2**stage, 8 // 2**stage)
        assert raw.min() < 0
        assert torch.equal(raw.relu(), active)


def test_convnet_takes_images_smaller_than_its_depth_suggests():
    assert ConvNet(depth=8, width=1).eval()(torch.randn(2, 1, 3, 5)).shape == (2, 10)


def test_the_distillation_token_has_a_head_of_its_own():
    network = VisionTransformer(image_size=8, patch_size=4, dim=16, heads=2, depth=2, distilled=True)
    image = torch.randn(3, 3, 8, 8)
    logits, distillation = network.train()(image)
    assert not torch.allclose(logits, distillation)
    torch.testing.assert_close(network.eval()(image), (logits + distillation) / 2)


def test_a_transformer_sees_where_a_patch_is():
    network = VisionTransformer(image_size=8, patch_size=4, dim=16, heads=2, depth=2).eval()
    image = torch.randn(3, 3, 8, 8)
    assert not torch.allclose(network(image), network(image.roll(4, -1)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionTransformer(image_size=9, patch_size=4), "patch_size .4. must divide image_size .9."),
        (lambda: VisionTransformer(dim=10, heads=4), "heads .4. must divide dim .10."),
        (lambda: ConvNet(width=0), "greater than or equal to 1"),
        (lambda: ConvNet(norm="layer"), "batch"),
        (lambda: MLP(depth=-1), "greater than or equal to 0"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(ValidationError, match=message):
        build()


def test_convnet_learns_digits():
    from limbeck.core.specs import DataSpec
    from limbeck.data.loader import Loader
    from limbeck.data.open import open_data
    from limbeck.metrics.classification import evaluate

    torch.manual_seed(0)
    data, network = open_data(DataSpec()), ConvNet()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for (batch,) in Loader(data.train, 64, seed=0).steps(0, 60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch.image), batch.label).backward()
        optimizer.step()
    assert evaluate(network, data.validation)["accuracy"] > 0.94
