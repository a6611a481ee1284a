"""Students of other kinds: adapters on a frozen model, masked language models, models on plain text."""

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.method import DataInfo, TextInfo
from limbeck.data.text.source import TextSource
from limbeck.objectives.divergences import divergence
from tests.methods.language.rig import ITEMS, VOCAB, batch, build, gpt2, logits, targets, trainer, update_of

SHORT = {"max_new_tokens": 4, "prompt_tokens": 2}


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("kl", {}),
        ("taid", {}),
        ("gkd", {**SHORT, "lam": 1.0}),
        ("distillm", {**SHORT, "capacity": 8, "sampling": "mixed", "mixed_alpha": 1.0}),
        ("distillspec", SHORT),
        ("seq-kd", {**SHORT, "beams": 2}),
        ("minillm", {**SHORT, "ppo_epochs": 2}),
        ("next-token", {}),
    ],
)
def test_an_adapter_is_trained_and_nothing_else(slug, options):
    student = adapted()
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    method = build(slug, student=student, **options)
    assert method.read_student.head_path is not None
    trainer(method, steps=2).fit()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def bert(seed):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=20, initializer_range=0.4, **shape))


def test_masked_language_models_predict_in_place():
    items = batch()
    method = build("kl", student=bert(1).eval(), teacher=bert(2), label_weight=0.5)
    method.eval()
    wanted = items.labels != -100
    ours, theirs = (
        model(input_ids=items.input_ids, attention_mask=items.attention_mask).logits[wanted]
        for model in (method.student, method.teacher.model)
    )
    expected = divergence("forward-kl")(ours, theirs).mean() + 0.5 * F.cross_entropy(ours, items.labels[wanted])
    torch.testing.assert_close(update_of(method).loss, expected)


def test_plain_training_on_text():
    method = build("next-token", teacher=None)
    update = update_of(method)
    torch.testing.assert_close(update.loss, F.cross_entropy(logits(method.student), targets()))
    assert update.weight == len(targets())
    rows = []
    trainer(method, steps=8, rows=rows).fit()
    assert rows[-1]["student/loss"] < rows[0]["student/loss"]


@pytest.mark.parametrize("slug", ["gkd", "distillspec", "seq-kd", "minillm", "distillm"])
def test_plain_text_gives_its_first_tokens_as_prompts(slug):
    ids = torch.randint(2, VOCAB, (ITEMS, 12), generator=torch.Generator().manual_seed(0))
    source = TextSource(ids, vocab=VOCAB)
    own = {"gkd": {"lam": 1.0}, "distillm": {"sampling": "on-policy", "mixed_alpha": 1.0, "capacity": 8}}
    options = {"max_new_tokens": 3, "prompt_tokens": 7, **own.get(slug, {})}
    items = source.fetch(torch.arange(4))
    method = build(slug, info=DataInfo(ITEMS, 0, items.select(slice(0, 2)), TextInfo(VOCAB)), **options)
    update = next(iter(method.step(items)))
    assert update.weight <= 12
    if slug == "seq-kd":
        method.teacher_texts(method.student, method.teacher, items)
        recalled = method.teacher_texts(method.student, None, items)
        assert torch.equal(recalled.input_ids[:, :7], ids[:4, :7])
        assert (recalled.prompt_length == 7).all()
