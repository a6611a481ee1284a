"""Converted models in the hands of transformers: run, generated with, saved, and loaded in a process of its own."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.language.attention_layers import attention_layers, projections
from limbeck.language.conversion import convert, is_converted, mixers_of
from limbeck.language.speculative import speculative_decode
from limbeck.language.teacher_forcing import eager_attention
from limbeck.models.adapters.converted import ConvertedForCausalLM, StateLayer, cache_bytes
from limbeck.models.saved import ecosystem, load_model, save_model

TOKENS = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1, "initializer_range": 0.2}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}


def model_of(kind: str = "llama", **changes: Any) -> nn.Module:
    own = {"opt": ("intermediate_size",), "gpt2": tuple(SHAPE)}.get(kind, ())
    shape = {name: value for name, value in SHAPE.items() if name not in own}
    config = transformers.CONFIG_MAPPING[kind](**{**TOKENS, **shape, **KINDS[kind], **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def converted(kind: str = "llama", keep: tuple[int, ...] = (1,), **changes: Any) -> ConvertedForCausalLM:
    return convert(model_of(kind, **changes), "discrete-mamba2", {"state": 4}, keep)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0  # left padding
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_token_by_token_equals_all_at_once(kind):
    model, (ids, mask) = converted(kind), text()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    cache = None
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=places[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(out.logits[real], whole[:, start:stop][real], rtol=1e-4, atol=1e-5)
    assert [isinstance(layer, StateLayer) for layer in cache.layers] == [True, False, True]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [(), (0,), (2,)])
@torch.no_grad()
def test_generation_equals_a_full_recomputation(kind, keep):
    model, (ids, mask) = converted(kind, keep), text()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_beams_carry_their_states_along():
    model, (ids, mask) = converted(), text()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind):
    model, (ids, _) = converted(kind), text()
    alone = model(input_ids=ids[:1, 4:]).logits
    left = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    places = (left.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids[:1], attention_mask=left, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    filled = torch.cat([ids[:1, 4:], ids[:1, :4]], 1)
    padded = model(input_ids=filled, attention_mask=left.flip(1)).logits[:, :3]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mixer_with_the_attentions_matrix_gives_its_output(kind, monkeypatch):
    """Values and output carry over: where T is the attention's matrix, the whole model says what it said."""
    model, (ids, _) = model_of(kind), text()
    for module in model.modules():  # fresh biases are 0, which would hide a lost one
        if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
            module.bias.normal_(std=0.3)
    with eager_attention(model):
        expected = model(input_ids=ids, output_attentions=True)
    made = convert(copy.deepcopy(model), "discrete-mamba2", {"state": 4})
    for matrices, mixer in zip(expected.attentions, mixers_of(made).values(), strict=True):

        def prefill(hidden, mask=None, state=None, mixer=mixer, matrices=matrices):
            mixed = torch.einsum("bhij,bjhp->bihp", matrices, mixer.values(hidden)).flatten(2)
            gate = nn.functional.silu(mixer._project(hidden, None, None)[3] + mixer.z_bias)
            return mixer.out_proj(mixed * gate), None

        monkeypatch.setattr(mixer, "prefill", prefill)
    torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_the_projections_are_those_of_the_attention(kind):
    model = model_of(kind)
    attention = model.get_submodule(attention_layers(model)[0])
    parts, hidden = projections(attention), torch.rand(2, 5, 16)
    if kind == "llama":
        pairs = [(parts.queries, attention.q_proj), (parts.values, attention.v_proj), (parts.out, attention.o_proj)]
        assert all(ours is theirs for ours, theirs in pairs)
        return
    fused = (attention.c_attn if kind == "gpt2" else attention.qkv_proj)(hidden)
    ours = torch.cat([layer(hidden) for layer in (parts.queries, parts.keys, parts.values)], -1)
    torch.testing.assert_close(ours, fused)
    assert (parts.heads, parts.size) == (4, 4)


@torch.no_grad()
def test_states_do_not_grow():
    model = converted(keep=())
    sizes = [cache_bytes(model(input_ids=torch.full((1, n), 5), use_cache=True).past_key_values) for n in (4, 40)]
    assert sizes[0] == sizes[1] > 0
    hybrid = converted()
    grown = [cache_bytes(hybrid(input_ids=torch.full((1, n), 5), use_cache=True).past_key_values) for n in (4, 40)]
    assert grown[1] - grown[0] == 36 * 2 * 2 * 4 * 4  # keys and values, 2 heads of 4 numbers of 4 bytes, of one layer


def test_training_through_checkpointed_blocks_gives_the_same_gradient():
    model, (ids, mask) = converted().train(), text()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].norm() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_saved_models_load_again(kind, tmp_path):
    tied = {"tie_word_embeddings": True}
    model, (ids, mask) = converted(kind, **tied), text()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is ConvertedForCausalLM
    assert is_converted(loaded)
    assert ecosystem(loaded) == "transformers"
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(loaded.eval()(input_ids=ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_a_fresh_process_needs_transformers_and_one_import(tmp_path):
    model, (ids, mask) = converted(), text()
    model.save_pretrained(tmp_path)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    code = (
        "import sys, torch\n"
        "for absent in ('peft', 'scipy', 'sklearn', 'torchvision', 'PIL'): sys.modules[absent] = None\n"
        "import limbeck.models.adapters.converted\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"ids, mask = torch.tensor({ids.tolist()}), torch.tensor({mask.tolist()})\n"
        "print(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == str(expected.tolist())


def test_what_cannot_be_converted_is_refused():
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(IncompatibleError, match="encoder"):
        attention_layers(both)
    fused = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=40, **SHAPE))
    with pytest.raises(IncompatibleError, match="attentions of a known kind"):
        convert(fused, "discrete-mamba2", {"state": 4})
    with pytest.raises(IncompatibleError, match="no layer 7"):
        converted(keep=(7,))
    with pytest.raises(IncompatibleError, match="all layers"):
        converted(keep=(0, 1, 2))
    with pytest.raises(IncompatibleError, match="4 dimensions"):
        converted()(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    ids = torch.full((1, 4), 5)
    filled = model_of()(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(IncompatibleError, match="another model"):
        converted()(input_ids=ids, past_key_values=filled)


def test_drafts_that_would_have_to_be_taken_back_are_refused():
    ids = torch.full((1, 4), 5)
    with pytest.raises(IncompatibleError, match="rolled back"):
        speculative_decode(converted(), model_of(), ids[0], drafted=2, max_new_tokens=4)
