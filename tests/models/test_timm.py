"""timm's models: built without download, stored in timm's format, loaded by stock timm."""

import json
import socket

import pytest
import timm
import torch

from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.core.specs import ModelSpec
from limbeck.models.adapters.timm import timm_config
from limbeck.models.build import build_model
from limbeck.models.describe import default_layers
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.saved import load_model, save_model
from tests.models.information import information, same_weights


def build(name: str, channels: int = 3, size: int = 32, **arguments) -> torch.nn.Module:
    return build_model(ModelSpec(name=f"timm:{name}", arguments=arguments), information(channels, size, 5), seed=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_stored_model_comes_back_as_it_was(tmp_path, name):
    model = build(name)
    set_normalisation(model, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert same_weights(model, again)
    assert normalisation_of(again) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert timm_config(again) == timm_config(model)
    settings = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert settings["input_size"] == [3, 32, 32]
    assert settings["mean"] == [0.1, 0.2, 0.3]


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert build("test_resnet.r160_in1k").num_classes == 5


def test_fresh_weights_know_no_normalisation_and_pretrained_settings_do():
    assert normalisation_of(build("test_resnet")) is None
    published = timm.create_model("test_resnet")
    assert normalisation_of(published) == tuple(map(list, (published.pretrained_cfg[n] for n in ("mean", "std"))))
    assert normalisation_of(timm.create_model("test_resnet", in_chans=1)) is None


def test_a_head_that_was_reset_by_timm_is_saved(tmp_path):
    model = build("test_resnet")
    model.reset_classifier(7)
    save_model(model, tmp_path)
    assert same_weights(load_model(tmp_path), model)


def test_a_model_that_was_rebuilt_by_hand_is_not_saved_as_timm_s(tmp_path):
    model = build("test_resnet")
    model.fc = torch.nn.Sequential(model.fc, torch.nn.Linear(5, 2))
    with pytest.raises(IncompatibleError, match=r"changed after it was built \(fc"):
        save_model(model, tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_model(build("test_resnet"), tmp_path / "a")
    save_model(build("test_resnet", channels=1), tmp_path / "b")
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(IncompatibleError, match="not those of its config"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("test_resnet", {"no_such_thing": 1}, RecipeError, r"model\.arguments"),
        ("test_resnet", {"checkpoint_path": "x.pth"}, RecipeError, r"arguments\.checkpoint_path"),
        ("test_resnet", {"pretrained_cfg": {"file": "x.pth"}}, RecipeError, r"arguments\.pretrained_cfg"),
        ("test_vit", {"global_pool": "nonsense"}, IncompatibleError, "test_vit cannot be built"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, error, message):
    with pytest.raises(error, match=message):
        build(name, **arguments)


def test_layers_are_timm_s_stages():
    assert default_layers(build("test_vit")) == [f"blocks.{block}" for block in range(6)]
    assert default_layers(build("test_resnet"))[1:] == ["layer1", "layer2", "layer3", "layer4"]


def test_arguments_that_json_cannot_hold_are_refused(tmp_path):
    model = timm.create_model("test_resnet", act_layer=torch.nn.ReLU6)
    with pytest.raises(IncompatibleError, match="JSON cannot hold"):
        save_model(model, tmp_path)
