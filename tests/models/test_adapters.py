"""LoRA adapters: what trains, what is saved, what is merged, and several of them over one backbone."""

import json

import pytest
import torch

from limbeck.core.call import call, logits_of
from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError, UsageError
from limbeck.core.specs import AdapterSpec, ModelSpec
from limbeck.models.adapters.peft import (
    add_adapter,
    is_adapted,
    merged,
)
from limbeck.models.build import build_model
from limbeck.models.export import export_formats, export_model
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.saved import ecosystem, load_model, save_model
from tests.models.information import information, same_weights
from tests.models.texts import SIZES, model, text

SOURCE = text()
BATCH = SOURCE.fetch(torch.arange(6))


def outputs(one: torch.nn.Module, batch=BATCH) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(call(one.eval(), batch))


def disturbed(one: torch.nn.Module) -> torch.nn.Module:
    """With adapters that do something: fresh ones are zero."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return one


def trainable(one: torch.nn.Module) -> list[str]:
    return [name for name, parameter in one.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "gemma2"])
def test_only_the_adapter_trains_and_it_begins_as_the_base_model(kind):
    source = text(masked=kind == "bert")
    batch = source.fetch(torch.arange(4))
    base, adapted = model(kind, source), model(kind, source, adapter={"rank": 2})
    assert is_adapted(adapted)
    assert not is_adapted(base)
    names = trainable(adapted)
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name or "decoder" in name for name in names)
    assert torch.equal(outputs(adapted, batch), outputs(base, batch))


def test_options_reach_the_adapter():
    spec = AdapterSpec(rank=3, alpha=6, dropout=0.25, target_modules=["q_proj", "v_proj"], modules_to_save="lm_head")
    adapted = model("llama", adapter=spec)
    layers = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
    layer = adapted.get_submodule(sorted(layers)[0])
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 2.0, 0.25)
    assert any("lm_head.modules_to_save" in name for name in trainable(adapted))
    assert model("llama", adapter={"rank": 4, "rank_stabilised": True}).peft_config["default"].use_rslora
    assert any("magnitude" in name for name in trainable(model("llama", adapter={"decomposed": True})))
    excluded = model("llama", adapter={"exclude_modules": ["up_proj", "down_proj", "gate_proj"]})
    assert all("self_attn" in name for name in trainable(excluded))


def test_wrong_targets_and_second_adapters_are_refused():
    with pytest.raises(RecipeError, match=r"adapter\.target_modules"):
        model("llama", adapter={"target_modules": ["no_such_layer"]})
    with pytest.raises(IncompatibleError, match="has an adapter already"):
        add_adapter(model("llama", adapter={}), AdapterSpec())


def test_fresh_adapters_are_a_function_of_the_seed():
    before = torch.get_rng_state()
    first, again, other = (model("llama", seed=seed, adapter={"rank": 2}) for seed in (0, 0, 1))
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_is_saved_with_a_base_model_that_has_no_folder(tmp_path):
    adapted = disturbed(model("llama", adapter={"rank": 2}))
    save_model(adapted, tmp_path)
    assert ecosystem(adapted) == "peft"
    assert (tmp_path / "base" / "model.safetensors").is_file()
    again = load_model(tmp_path)
    assert torch.equal(outputs(again), outputs(adapted))
    assert trainable(again) == trainable(adapted)
    save_model(again, tmp_path / "second")
    assert torch.equal(outputs(load_model(tmp_path / "second")), outputs(adapted))


def test_a_base_model_that_lies_in_a_folder_is_named_and_not_copied(tmp_path):
    save_model(model("llama"), tmp_path / "base-model")
    spec = ModelSpec(name=f"hf:{tmp_path / 'base-model'}", adapter=AdapterSpec(rank=2))
    adapted = disturbed(build_model(spec, SOURCE.info(), 0))
    save_model(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base-model")
    assert not (tmp_path / "adapter" / "base").exists()
    assert torch.equal(outputs(load_model(tmp_path / "adapter")), outputs(adapted))


def test_a_changed_configuration_or_a_stage_s_result_is_not_its_folder(tmp_path):
    save_model(model("llama"), tmp_path / "stored")
    info = SOURCE.info()
    changed = ModelSpec(name=f"hf:{tmp_path / 'stored'}", arguments={"pretrained": False}, adapter=AdapterSpec())
    staged = ModelSpec(name="stage:one", adapter=AdapterSpec())
    stages = {"one": build_model(ModelSpec(name=f"hf:{tmp_path / 'stored'}"), info, 0)}
    for number, spec in enumerate((changed, staged)):
        save_model(build_model(spec, info, 0, stages=stages), tmp_path / str(number))
        assert (tmp_path / str(number) / "base").is_dir()


def test_the_result_of_a_stage_keeps_only_its_adapter_trainable():
    stages = {"one": model("llama", adapter={"rank": 2})}
    again = build_model(ModelSpec(name="stage:one"), SOURCE.info(), 0, stages=stages)
    assert trainable(again) == trainable(stages["one"])


def test_merging_gives_an_ordinary_model_of_the_same_outputs(tmp_path):
    adapted = disturbed(model("gpt2", adapter={"rank": 2}))
    before = outputs(adapted)
    whole = merged(adapted)
    torch.testing.assert_close(outputs(whole), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(adapted), before)
    assert ecosystem(whole) == "transformers"
    assert all(parameter.requires_grad for parameter in whole.parameters())
    with pytest.raises(IncompatibleError, match="no adapter to merge"):
        merged(whole)
    assert export_formats(adapted) == ["peft", "onnx"]
    with pytest.raises(IncompatibleError, match="merge its adapter"):
        export_model(adapted, tmp_path / "x", "transformers")
    export_model(adapted, tmp_path / "whole", "transformers", merge=True)
    torch.testing.assert_close(outputs(load_model(tmp_path / "whole")), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"), [("timm:test_vit", {"img_size": 32}), ("vit", {}), ("mlp", {}), ("timm:resnet10t", {})]
)
def test_models_of_other_ecosystems_take_adapters_too(name, arguments, tmp_path):
    info = information(1, 32)
    targets = ["conv2"] if "resnet" in name else None
    spec = ModelSpec(name=name, arguments=arguments, adapter=AdapterSpec(rank=2, target_modules=targets))
    adapted = disturbed(build_model(spec, info, 0))
    set_normalisation(adapted, [0.25], [0.5])
    assert all("lora_" in one for one in trainable(adapted))
    save_model(adapted, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(outputs(again, info.example), outputs(adapted, info.example))
    assert normalisation_of(again) == ([0.25], [0.5])


def test_a_model_without_linear_layers_needs_names():
    with pytest.raises(RecipeError, match="no linear layers"):
        build_model(ModelSpec(name="convnet", adapter=AdapterSpec()), information(1, 32), 0)


def test_damaged_adapters_are_named(tmp_path):
    save_model(model("llama", adapter={"rank": 2}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match="no adapter of this base model"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(DamagedFileError, match="JSON object"):
        load_model(tmp_path)


def test_an_adapter_whose_base_model_is_gone_is_explained(tmp_path):
    save_model(model("llama"), tmp_path / "gone")
    spec = ModelSpec(name=f"hf:{tmp_path / 'gone'}", adapter=AdapterSpec(rank=2))
    save_model(build_model(spec, SOURCE.info(), 0), tmp_path / "adapter")
    (tmp_path / "gone").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="gone"):
        load_model(tmp_path / "adapter")


def test_recipes_name_adapters():
    spec = ModelSpec(name="config:llama", arguments=SIZES["llama"], adapter={"rank": 4, "target_modules": "q_proj"})
    assert spec.adapter is not None
    assert (spec.adapter.rank, spec.adapter.target_modules) == (4, ["q_proj"])
