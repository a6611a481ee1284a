"""Building models by name."""

import copy
import subprocess
import sys

import pytest
import torch

from limbeck.core.errors import IncompatibleError, MissingExtraError, RecipeError, UnknownNameError
from limbeck.core.specs import ModelSpec
from limbeck.models.build import build_model
from limbeck.models.convnet import ConvNet
from limbeck.models.names import check_model, known_models
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.saved import save_model
from tests.models.information import information, same_weights

DENOISERS = ("denoiser", "stacked-denoiser")
OTHERS = (*DENOISERS, "synthetic-set")
CLASSIFIERS = [name for name in known_models() if name not in OTHERS and not name.startswith("scene-")]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (1, 28), (3, 7)])
def test_shipped_networks_fit_the_data(name, channels, size):
    data = information(channels, size, classes=6)
    model = build_model(ModelSpec(name=name), data, seed=0)
    assert model(data.example.image).shape == (2, 6)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 7)])
@pytest.mark.parametrize("classes", [0, 6])
def test_shipped_denoisers_fit_the_data(name, channels, size, classes):
    data = information(channels, size, classes=classes)
    model = build_model(ModelSpec(name=name), data, seed=0)
    assert (model.config["numbers"], model.config["classes"]) == (channels * size**2, classes)
    image = data.example.image
    condition = {"label": torch.tensor([1, 5])} if classes else {}
    assert model(image, torch.tensor([0.2, 0.9]), condition).shape == image.shape


def test_arguments_win_over_what_the_data_say():
    model = build_model(ModelSpec(name="vit", arguments={"classes": 3, "patch_size": 8, "dim": 8}), information(), 0)
    assert (model.config["classes"], model.config["patch_size"], model.config["image_size"]) == (3, 8, 8)


@pytest.mark.parametrize("name", [*known_models(), "timm:test_resnet"])
def test_fresh_weights_are_a_function_of_the_seed_alone(name):
    data = information(3, 32)
    # The trajectories of a hundred experts, the default, take gigabytes.
    arguments = {"experts": 2, "epochs": 1} if name == "experts" else {}
    torch.manual_seed(1)
    first = build_model(ModelSpec(name=name, arguments=arguments), data, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = (build_model(ModelSpec(name=name, arguments=arguments), data, seed=seed) for seed in (5, 6))
    pinned = build_model(ModelSpec(name=name, seed=5, arguments=arguments), data, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(first, again)
    assert same_weights(first, pinned)
    assert not same_weights(first, other)


def test_the_result_of_a_stage_is_copied():
    teacher = ConvNet().requires_grad_(False)
    student = build_model(ModelSpec(name="stage:first"), information(), 0, stages={"first": teacher})
    assert same_weights(teacher, student)
    assert all(weight.requires_grad for weight in student.parameters())
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        student.head.bias.add_(1)
    assert same_weights(teacher, before)


@pytest.mark.parametrize("form", ["run:{}", "{}"])
@pytest.mark.parametrize("within", [".", "student"])
def test_a_stored_model_is_found_in_its_folder_or_in_its_run(tmp_path, form, within):
    model = ConvNet(width=3)
    save_model(model, tmp_path / "run" / within)
    assert same_weights(build_model(ModelSpec(name=form.format(tmp_path / "run")), information(), 0), model)


def test_the_data_s_normalisation_is_noted_on_models_that_know_of_none(tmp_path):
    model = build_model(ModelSpec(name="convnet"), information(), 0, normalisation=([0.1], [0.2]))
    assert normalisation_of(model) == ([0.1], [0.2])
    assert normalisation_of(build_model(ModelSpec(name="convnet"), information(), 0)) is None
    set_normalisation(model, [0.3], [0.4])
    save_model(model, tmp_path)
    loaded = build_model(ModelSpec(name=f"run:{tmp_path}"), information(), 0, normalisation=([0.1], [0.2]))
    assert normalisation_of(loaded) == ([0.3], [0.4])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "convnett"}, UnknownNameError, "did you mean 'convnet'"),
        ({"name": "stage:two"}, UnknownNameError, "unknown stage 'two'"),
        ({"name": "timm:resnet10"}, UnknownNameError, "did you mean 'resnet1.*'"),
        ({"name": "run:/nowhere"}, RecipeError, r"a\.student\.name: there is no folder '/nowhere'"),
        ({"name": "hf:./nowhere"}, RecipeError, r"a\.student\.name: there is no folder"),
        ({"name": "hf:models/of/mine"}, RecipeError, r"a\.student\.name: there is no folder"),
        ({"name": "convnet", "arguments": {"widht": 3}}, RecipeError, r"(?s)a\.student\.arguments\.widht.*'width'"),
        ({"name": "convnet", "arguments": {"width": "wide"}}, RecipeError, r"a\.student\.arguments\.width"),
        ({"name": "vit", "arguments": {"patch_size": 3}}, RecipeError, r"a\.student\.arguments.*must divide"),
        ({"name": "vit", "arguments": {"image_size": "big"}}, RecipeError, r"a\.student\.arguments\.image_size"),
    ],
)
def test_wrong_names_and_arguments_get_a_hint(spec, error, message):
    with pytest.raises(error, match=message):
        build_model(ModelSpec(**spec), information(), 0, key="a.student")


def test_a_stored_model_takes_no_arguments(tmp_path):
    save_model(ConvNet(), tmp_path)
    with pytest.raises(RecipeError, match="takes no arguments"):
        build_model(ModelSpec(name=f"run:{tmp_path}", arguments={"width": 3}), information(), 0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("limbeck.models.names.find_spec", lambda name: None)
    for name in ("timm:resnet10t", "hf:somebody/something"):
        with pytest.raises(MissingExtraError, match=r"limbeck\[(vision|language)\]"):
            check_model(ModelSpec(name=name))


def test_a_transformer_needs_square_images():
    data = information()
    wide = type(data)(data.items, data.classes, data.example.replace(image=torch.zeros(2, 1, 8, 6)))
    with pytest.raises(IncompatibleError, match=r"(?s)square images, not 8x6.*data\.image_size"):
        build_model(ModelSpec(name="vit"), wide, 0)


def test_names_are_checked_without_torch():
    code = (
        "import sys\n"
        "from limbeck.core.specs import DataSpec, ModelSpec\n"
        "from limbeck.data.names import check_data, known_data\n"
        "from limbeck.models.names import check_model, known_models\n"
        "check_model(ModelSpec(name='vit', arguments={'dim': 32})); check_data(DataSpec())\n"
        "assert {'cell', 'convnet', 'denoiser', 'mlp', 'stacked-denoiser', 'vit'} <= set(known_models())\n"
        "assert 'digits' in known_data()\n"
        "assert not {'torch', 'numpy', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
