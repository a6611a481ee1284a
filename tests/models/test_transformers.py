"""transformers' models: from a local configuration or local weights, stored so that stock transformers loads them."""

import json

import pytest
import torch
import transformers

from limbeck.core.errors import DamagedFileError, IncompatibleError, LimbeckError, RecipeError, UsageError
from limbeck.core.specs import ModelSpec
from limbeck.models.build import build_model
from limbeck.models.describe import default_layers
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.saved import load_model, save_model
from tests.models.information import information, same_weights

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}


@pytest.fixture
def config(tmp_path):
    transformers.ViTConfig(**TINY, image_size=64).save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def weights(tmp_path):
    settings = transformers.ViTConfig(**TINY, image_size=32, num_channels=1, num_labels=5)
    model = transformers.ViTForImageClassification(settings)
    model.save_pretrained(tmp_path / "weights")
    return model, tmp_path / "weights"


def build(folder, seed: int = 0, classes: int = 5, **arguments) -> torch.nn.Module:
    return build_model(ModelSpec(name=f"hf:{folder}", arguments=arguments), information(1, 32, classes), seed)


def test_a_configuration_alone_gives_fresh_weights_for_the_data(config):
    before = torch.get_rng_state()
    model, again, other = build(config), build(config), build(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(model, transformers.ViTForImageClassification)
    assert (model.config.num_channels, model.config.image_size, model.config.num_labels) == (1, 32, 5)
    assert model(information(1, 32).example.image).logits.shape == (2, 5)
    assert same_weights(model, again)
    assert not same_weights(model, other)


def test_stored_weights_are_taken_as_they_are(weights):
    model, folder = weights
    assert same_weights(build(folder), model)
    assert not same_weights(build(folder, pretrained=False), model)


def test_stored_half_precision_becomes_float32(weights, tmp_path):
    weights[0].to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in build(tmp_path / "half").parameters()} == {torch.float32}


def test_another_number_of_classes_needs_a_word(weights):
    model, folder = weights
    with pytest.raises(IncompatibleError, match=r"(?s)5 classes and the data 7.*num_labels: 7"):
        build(folder, classes=7)
    with pytest.raises(IncompatibleError, match="ignore_mismatched_sizes"):
        build(folder, classes=7, num_labels=7)
    new = build(folder, classes=7, num_labels=7, ignore_mismatched_sizes=True)
    assert new.classifier.weight.shape == (7, 16)
    assert same_weights(new.vit, model.vit)


def test_the_normalisation_is_saved_as_an_image_processor(config, tmp_path):
    model = build(config)
    assert normalisation_of(model) is None
    set_normalisation(model, [0.25], [0.5])
    save_model(model, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.25], [0.5])
    assert normalisation_of(load_model(tmp_path / "out")) == ([0.25], [0.5])
    assert normalisation_of(build(tmp_path / "out")) == ([0.25], [0.5])


def test_layers_are_the_encoder_s(config):
    layers = default_layers(build(config))
    assert len(layers) == 2
    assert all(layer.endswith(str(number)) for number, layer in enumerate(layers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hiden_size": 16}, r"(?s)arguments\.hiden_size.*'hidden_size'"),
        ({"architecture": "ViTForEverything"}, r"no model class 'ViTForEverything'"),
        ({"architecture": "pipeline"}, r"no model class 'pipeline'"),
        ({"pretrained": True}, "no safetensors"),
    ],
)
def test_wrong_arguments_are_named(config, arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(config, **arguments)


def test_an_architecture_can_be_chosen(config):
    assert type(build(config, architecture="ViTModel")) is transformers.ViTModel


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    for attempt in (lambda: build(folder), lambda: load_model(folder)):
        with pytest.raises(UsageError, match="never run"):
            attempt()
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_refused(weights):
    _, folder = weights
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for attempt in (lambda: build(folder), lambda: load_model(folder)):
        with pytest.raises(UsageError, match="pickle"):
            attempt()


def test_damaged_weights_are_named(weights):
    _, folder = weights
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match="weights"):
        load_model(folder)
    path.unlink()
    with pytest.raises(LimbeckError, match="weights"):
        load_model(folder)


def test_weights_of_another_shape_are_refused(weights, config, tmp_path):
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**{**TINY, "num_hidden_layers": 1}))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(weights[1] / "config.json")
    with pytest.raises(IncompatibleError):
        load_model(weights[1])


def test_a_name_that_the_hub_does_not_give_is_explained():
    with pytest.raises(UsageError, match="no folder or hub model"):
        build("nobody/nothing")
