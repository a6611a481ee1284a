"""The small denoising network: what it hears, what it ignores, and how it comes back from disk."""

import math

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, note_process
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.ports import is_own, takes_guidance
from limbeck.diffusion.schedules import Cosine
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.saved import load_model, save_model
from limbeck.models.shipped import build_shipped, shipped_name
from tests.models.information import same_weights

X = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
TIME = torch.tensor([0.0, 0.2, 0.7, 1.0])


def network(**changes) -> DenoisingMLP:
    torch.manual_seed(0)
    return DenoisingMLP(**{"numbers": 6, "classes": 3, "width": 16, "depth": 2, **changes}).eval()


def labelled(*labels: int) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(labels)}


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3), (6, 1, 1)])
def test_items_of_any_shape_keep_it(shape):
    model = network()
    x = X.reshape(4, *shape)
    made = model(x, TIME, labelled(0, 1, 2, 0))
    assert made.shape == x.shape
    assert torch.equal(made.flatten(1), model(X, TIME, labelled(0, 1, 2, 0)).flatten(1))


def test_items_do_not_see_each_other():
    model = network(guidance=True)
    condition = {**labelled(0, 1, 2, 0), "guidance": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    whole = model(X, TIME, condition)
    rows = torch.tensor([3, 1])
    part = model(X[rows], TIME[rows], {name: value[rows] for name, value in condition.items()})
    assert torch.allclose(part, whole[rows], atol=1e-6)


def test_time_and_class_are_heard():
    model = network()
    plain = model(X, TIME, labelled(0, 0, 0, 0))
    assert not torch.allclose(model(X, TIME + 0.1, labelled(0, 0, 0, 0)), plain, atol=1e-4)
    assert not torch.allclose(model(X, TIME, labelled(1, 1, 1, 1)), plain, atol=1e-4)


def test_labels_that_are_no_class_say_nothing():
    model = network()
    nothing = model(X, TIME, {})
    for label in (3, -1, -100, 17):
        assert torch.equal(model(X, TIME, labelled(label, label, label, label)), nothing)
    mixed = model(X, TIME, labelled(0, 3, -1, 2))
    assert torch.allclose(mixed[1:3], nothing[1:3], atol=1e-6)
    assert not torch.allclose(mixed[0], nothing[0], atol=1e-4)


def test_without_classes_a_label_is_ignored():
    model = network(classes=0)
    assert torch.equal(model(X, TIME, labelled(0, 1, 2, 0)), model(X, TIME, {}))


def test_the_guidance_scale_starts_out_unheard_and_can_be_learned():
    model, told = network(guidance=True), {"guidance": torch.tensor([1.0, 2.0, 5.0, 0.0])}
    before = model(X, TIME, {})
    assert torch.equal(model(X, TIME, told), before)
    model(X, TIME, told).square().sum().backward()
    assert model.guidance.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.guidance.weight.normal_()
    plain = model(X, TIME, {})
    heard = model(X, TIME, told)
    assert torch.allclose(heard[0], plain[0], atol=1e-6)  # 1 is what is taken where no scale is given
    assert all(not torch.allclose(heard[row], plain[row], atol=1e-4) for row in (1, 2, 3))
    assert (takes_guidance(model), takes_guidance(network())) == (True, False)
    assert is_own(model)


def test_the_time_s_embedding_by_hand():
    model = network()
    time = torch.tensor([0.37])
    octaves = [-3 + 6 * n / 15 for n in range(16)]
    angles = [0.37 * 2 * math.pi * 2**octave for octave in octaves]
    wave = torch.tensor([[math.sin(a) for a in angles] + [math.cos(a) for a in angles]])
    expected = model.time(wave) + model.label(torch.tensor([3]))
    assert torch.allclose(model.embedded(time, {}), expected, atol=1e-5)
    # The fastest wave turns at 8 periods a unit: neighbouring times are told apart mildly.
    assert float(model.frequencies.max()) == pytest.approx(16 * math.pi, rel=1e-5)


def test_layers_are_those_of_the_network():
    model = network(depth=3)
    assert model.layers() == ["stages.0", "stages.1", "stages.2"]
    assert all(model.get_submodule(path) is not None for path in model.layers())


def test_a_saved_network_comes_back(tmp_path):
    model = network(guidance=True)
    note_process(model, Process(Cosine(), Direct("v"), null_label=3, guidance_input=True))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert shipped_name(again) == "denoiser"
    assert again.config == model.config
    assert same_weights(again, model)
    assert "frequencies" not in model.state_dict()
    condition = {**labelled(0, 1, 2, 3), "guidance": torch.ones(4)}
    assert torch.equal(
        NetworkDenoiser(again.eval())(X, TIME, condition).x0, NetworkDenoiser(model)(X, TIME, condition).x0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(dtype):
    model = network(guidance=True).to(dtype)
    condition = {**labelled(0, 1, 2, 0), "guidance": torch.ones(4)}
    made = NetworkDenoiser(model, Process(Cosine(), Direct("v"), null_label=3))(X.to(dtype), TIME.double(), condition)
    assert made.value.dtype == torch.promote_types(dtype, torch.float32)
    assert made.value.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"), [({"widht": 3}, "'width'"), ({"depth": 0}, "depth"), ({"numbers": 0}, "numbers")]
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(RecipeError, match=says):
        build_shipped("denoiser", arguments)
