"""Predictions at kept tokens: those of the whole model in value and gradient, dense where that alone is exact."""

import pytest
import torch

from limbeck.core.call import call, logits_of
from limbeck.language.predictions import TokenReader, kept_labels, kept_tokens
from tests.models.test_adapters import disturbed
from tests.models.texts import model, text

CASES = {
    "llama": ("llama", {}, True),
    "gpt2": ("gpt2", {}, True),
    "bert": ("bert", {}, True),
    "gemma2 caps its logits": ("gemma2", {"final_logit_softcapping": 2.0}, False),
    "lora": ("llama", {"adapter": {"rank": 2}}, True),
    "lora on gpt2": ("gpt2", {"adapter": {"rank": 2}}, True),
    "lora on bert": ("bert", {"adapter": {"rank": 2}}, True),
    "lora on the head": ("llama", {"adapter": {"rank": 2, "target_modules": ["lm_head", "q_proj"]}}, False),
    "a trained head": ("llama", {"adapter": {"rank": 2, "modules_to_save": ["lm_head"]}}, None),
}


@pytest.mark.parametrize(("kind", "options", "fused"), CASES.values(), ids=CASES.keys())
def test_it_reads_what_the_whole_model_says(kind, options, fused):
    source = text(masked=kind == "bert")
    one, batch = disturbed(model(kind, source, **options)), source.fetch(torch.arange(8))
    reader = TokenReader(one, source.info().example)
    assert reader.shift == (0 if kind == "bert" else 1)
    assert fused is None or (reader.head_path is not None) == fused

    shift = reader.shift
    whole = logits_of(call(one, batch))[:, : batch.labels.shape[1] - shift]
    labels = batch.labels[:, shift:]
    expected = whole[labels != -100]
    assert torch.equal(kept_labels(batch, shift), labels[labels != -100])
    assert int(kept_tokens(batch, shift).sum()) == len(expected)

    found = reader(batch).logits()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad((found * direction).sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad((expected * direction).sum(), trained, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert not one.training
