import pytest
import torch

from limbeck.core.randomness import reseed
from limbeck.language.generation import generate, prompts_of
from limbeck.language.mixed import generate_mixed, spoken_log_probs
from tests.methods.language.rig import END, batch, gpt2, llama


def sure(model, factor=400.0):
    """The model with a single token that it can say."""
    with torch.no_grad():
        (model.lm_head if not model.config.tie_word_embeddings else model.transformer.ln_f).weight.mul_(factor)
    return model


@pytest.mark.parametrize("other", [gpt2, llama])
def test_without_a_share_it_is_the_student_alone(other):
    student, prompts = sure(other()), prompts_of(batch(6))
    expected = generate(student, prompts, max_new_tokens=6, temperature=0)
    got = generate_mixed(student, llama(seed=4), prompts, share=0.0, max_new_tokens=6)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_with_the_whole_share_it_is_the_teacher():
    teacher, prompts = sure(llama()), prompts_of(batch(6))
    expected = generate(teacher, prompts, max_new_tokens=6, temperature=0)
    got = generate_mixed(gpt2(), teacher, prompts, share=1.0, max_new_tokens=6)
    assert torch.equal(got.input_ids, expected.input_ids)


def test_the_first_token_is_drawn_from_the_mixture():
    student, teacher, items = gpt2(vocab_size=6), llama(vocab_size=6), batch(1)
    items = items.replace(input_ids=items.input_ids % 6)
    prompts = prompts_of(items)
    many = type(prompts)(*(value.repeat_interleave(6000, 0) for value in (prompts.input_ids, prompts.attention_mask)),
                         prompts.lengths.repeat(6000))  # fmt: skip
    reseed(0)
    drawn = generate_mixed(student, teacher, many, share=0.3, max_new_tokens=1, eos=[])
    tokens = drawn.labels[drawn.labels != -100]
    ids = prompts.input_ids
    with torch.no_grad():
        log_p, log_q = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (teacher, student))
    expected = 0.3 * log_p.exp() + 0.7 * log_q.exp()
    torch.testing.assert_close(torch.bincount(tokens, minlength=6) / 6000, expected, atol=0.03, rtol=0)


def test_what_the_teacher_alone_knows_is_never_said():
    student, teacher = torch.randn(3, 5), torch.randn(3, 7)
    said = spoken_log_probs(student, teacher, 0.4).exp()
    torch.testing.assert_close(said, 0.4 * teacher[:, :5].softmax(-1) + 0.6 * student.softmax(-1))
    assert spoken_log_probs(teacher, student, 0.4).shape == (3, 7)


def test_modes_and_gradients_are_left_alone():
    student, teacher = gpt2(resid_pdrop=0.5).train(), llama().eval()
    prompts = prompts_of(batch(2))
    reseed(0)
    first = generate_mixed(student, teacher, prompts, share=0.2, max_new_tokens=4)
    assert student.training
    assert not teacher.training
    reseed(0)
    again = generate_mixed(student, teacher, prompts, share=0.2, max_new_tokens=4)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.input_ids.max() != END or (first.response_length <= 4).all()
