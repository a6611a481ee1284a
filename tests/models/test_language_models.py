"""Language models of transformers: built from a type or a folder for the text at hand, with their tokenizer."""

import copy

import pytest
import torch
import transformers

from limbeck.core.call import call
from limbeck.core.errors import IncompatibleError, RecipeError, UsageError
from limbeck.core.specs import ModelSpec
from limbeck.models.build import build_model
from limbeck.models.describe import count_flops, default_layers, latency
from limbeck.models.names import check_model
from limbeck.models.saved import load_model, save_model
from limbeck.models.tokenizers import set_tokenizer, tokenizer_of
from tests.models.information import information, same_weights
from tests.models.texts import SIZES, VOCAB, model, text, tokenizer


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, transformers.LlamaForCausalLM),
        ("gpt2", {}, transformers.GPT2LMHeadModel),
        ("bert", {"masked": True}, transformers.BertForMaskedLM),
        ("bert", {"classes": 3}, transformers.BertForSequenceClassification),
        ("llama", {"classes": 3}, transformers.LlamaForSequenceClassification),
        ("gemma2", {}, transformers.Gemma2ForCausalLM),
    ],
)
def test_the_class_follows_the_task_and_the_sizes_the_data(kind, options, expected):
    source = text(**options)
    made = build_model(ModelSpec(name=f"config:{kind}", arguments={**SIZES[kind], "pad_token_id": 0}), source.info(), 0)
    assert type(made) is expected
    assert (made.config.vocab_size, made.config.max_position_embeddings) == (VOCAB, 24)
    width = options.get("classes", VOCAB)
    assert call(made, source.info().example).logits.shape[-1] == width
    assert made.config.num_labels == options.get("classes", made.config.num_labels)


def test_arguments_and_the_tokenizer_s_special_tokens_enter_the_configuration():
    source = text()
    source.tokenizer = tokenizer()
    made = build_model(
        ModelSpec(name="config:gpt2", arguments={**SIZES["gpt2"], "n_positions": 40, "attn_pdrop": 0.0}),
        source.info(),
        0,
    )
    config = made.config
    assert (config.n_embd, config.n_positions, config.attn_pdrop) == (16, 40, 0.0)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert made.generation_config.eos_token_id == 2


def test_weights_are_a_function_of_the_seed():
    before = torch.get_rng_state()
    assert same_weights(model("llama"), model("llama"))
    assert not same_weights(model("llama"), model("llama", seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_have_types_too():
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
    }
    spec = ModelSpec(name="config:vit", arguments={**small, "architecture": "ViTForImageClassification"})
    made = build_model(spec, information(1, 8, 5), 0)
    assert made(information(1, 8).example.image).logits.shape == (2, 5)
    spec = ModelSpec(name="config:vit", arguments=small)
    assert type(build_model(spec, information(1, 8, 5), 0)) is transformers.ViTForImageClassification


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("config:lama", {}, r"(?s)model\.name: .*'lama'.*did you mean 'llama'"),
        ("config:llama", {"hiden_size": 16}, r"(?s)arguments\.hiden_size.*'hidden_size'"),
        ("config:llama", {"hidden_size": "wide"}, r"(?s)model\.arguments.*hidden_size|model\.arguments.*int"),
        ("config:bert", {"hidden_size": 30, "num_attention_heads": 4}, "no bert can be built.*multiple"),
        ("config:llama", {"architecture": "LlamaForEverything"}, "no model class 'LlamaForEverything'"),
    ],
)
def test_what_transformers_does_not_know_is_named(name, arguments, message):
    with pytest.raises(RecipeError, match=message):
        build_model(ModelSpec(name=name, arguments=arguments), text().info(), 0)


def test_names_are_checked_without_building_anything():
    check_model(ModelSpec(name="config:llama"))
    with pytest.raises(UsageError, match="config:TYPE"):
        check_model(ModelSpec(name="config:"))


def test_a_saved_model_is_built_and_loaded_again_with_its_tokenizer(tmp_path):
    made, used = model("llama"), tokenizer()
    set_tokenizer(made, used)
    save_model(made, tmp_path / "a")
    for again in (load_model(tmp_path / "a"), build_model(ModelSpec(name=f"run:{tmp_path / 'a'}"), text().info(), 0)):
        assert same_weights(made, again)
        assert tokenizer_of(again).get_vocab() == used.get_vocab()
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert tokenizer_of(copy.deepcopy(made)).get_vocab() == used.get_vocab()


def test_a_folder_serves_as_stored_weights_or_as_a_configuration(tmp_path):
    made = model("llama")
    save_model(made, tmp_path)
    stored = build_model(ModelSpec(name=f"hf:{tmp_path}"), text().info(), 0)
    fresh = build_model(ModelSpec(name=f"hf:{tmp_path}", arguments={"pretrained": False}), text(vocab=70).info(), 0)
    assert same_weights(made, stored)
    assert (fresh.config.vocab_size, fresh.config.hidden_size) == (70, 16)


def test_the_task_chooses_the_class_of_stored_weights_too(tmp_path):
    save_model(model("bert"), tmp_path)
    spec = ModelSpec(name=f"hf:{tmp_path}", arguments={"num_labels": 4})
    assert type(build_model(spec, text(classes=4).info(), 0)) is transformers.BertForSequenceClassification


def test_a_model_with_too_few_tokens_is_refused(tmp_path):
    save_model(model("llama"), tmp_path)
    with pytest.raises(IncompatibleError, match=r"(?s)knows 60 tokens and the data have 70.*tokenizer"):
        build_model(ModelSpec(name=f"hf:{tmp_path}"), text(vocab=70).info(), 0)
    build_model(ModelSpec(name=f"hf:{tmp_path}"), text(vocab=50).info(), 0)  # padded vocabularies are usual


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_cost_and_layers_can_be_told(kind):
    source = text(masked=kind == "bert")
    made, example = model(kind, source), source.info().example
    assert count_flops(made, example) > 12 * 2 * VOCAB * 16  # at least the head
    assert latency(made, example, repeats=2) > 0
    assert len(default_layers(made)) == 2
