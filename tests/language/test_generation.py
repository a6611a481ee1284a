"""Generation: prompts out of labels, responses told by their lengths, nothing of the model's own habits or modes."""

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.language.generation import Prompts, generate, prompts_of
from limbeck.language.predictions import TokenReader, kept_labels
from limbeck.models.adapters.peft import merged
from tests.models.test_adapters import disturbed
from tests.models.texts import model, text


def rows(padded: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [ids[chosen.bool()].tolist() for ids, chosen in zip(padded, mask, strict=True)]


def prompts(*lengths: int) -> Prompts:
    ids = torch.randint(4, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor(lengths)
    mask = torch.arange(max(lengths)) >= (max(lengths) - sizes)[:, None]
    return Prompts(ids, mask.long(), sizes)


def by_hand(one: nn.Module, prompt: list[int], most: int, end: int | None = None) -> list[int]:
    """Greedy decoding without a cache or padding."""
    ids = torch.tensor([prompt])
    for _ in range(most):
        with torch.no_grad():
            ids = torch.cat([ids, one(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) == end:
            break
    return ids[0, len(prompt) :].tolist()


def test_prompts_are_the_tokens_before_the_first_target():
    batch = text().fetch(torch.arange(10))
    found = prompts_of(batch)
    first = (batch.labels != -100).int().argmax(1)
    assert found.lengths.tolist() == first.tolist()
    expected = [ids[:length].tolist() for ids, length in zip(batch.input_ids, first, strict=True)]
    assert rows(found.input_ids, found.attention_mask) == expected
    assert found.input_ids.shape == (10, int(first.max()))
    assert found.attention_mask[:, -1].all()


def test_plain_text_gives_prompts_of_the_length_asked_for():
    ids = torch.arange(12).view(2, 6)
    batch = Batch({"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]), "labels": ids})
    batch = batch.replace(labels=ids.masked_fill(batch.attention_mask == 0, -100))
    found = prompts_of(batch, at_least=4)
    assert rows(found.input_ids, found.attention_mask) == [[0, 1, 2, 3], [6, 7, 8]]
    assert prompts_of(batch).lengths.tolist() == [1, 1]
    assert prompts_of(Batch({"input_ids": ids})).lengths.tolist() == [6, 6]


def test_selected_prompts_lose_padding_they_do_not_need():
    found = prompts(5, 2, 3).select(torch.tensor([1, 2]))
    assert found.input_ids.shape == (2, 3)
    assert (
        rows(found.input_ids, found.attention_mask)
        == rows(*(lambda p: (p.input_ids, p.attention_mask))(prompts(5, 2, 3)))[1:]
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_greedy_text_is_what_the_model_says_without_cache_or_padding(kind):
    one, given = model(kind), prompts(5, 1, 3)
    batch = generate(one, given, max_new_tokens=8, temperature=0, eos=())
    for number, prompt in enumerate(rows(given.input_ids, given.attention_mask)):
        whole = batch.input_ids[number][batch.attention_mask[number].bool()].tolist()
        assert whole == prompt + by_hand(one, prompt, 8)


def test_a_response_ends_with_its_end_token_also_where_that_is_the_padding():
    one, given = model("llama"), prompts(4, 2, 3)
    spoken = [by_hand(one, prompt, 10) for prompt in rows(given.input_ids, given.attention_mask)]
    end = spoken[0][3]  # what the first one says as its fourth token, perhaps earlier
    one.generation_config.pad_token_id = one.config.pad_token_id = end
    batch = generate(one, given, max_new_tokens=10, temperature=0, eos=end)
    for number, prompt in enumerate(rows(given.input_ids, given.attention_mask)):
        response = by_hand(one, prompt, 10, end)
        assert int(batch.response_length[number]) == len(response)
        assert int(batch.prompt_length[number]) == len(prompt)
        assert batch.labels[number][batch.labels[number] != -100].tolist() == response
        assert batch.input_ids[number, : len(prompt) + len(response)].tolist() == prompt + response
        assert batch.attention_mask[number].tolist() == [1] * (len(prompt) + len(response)) + [0] * (
            batch.input_ids.shape[1] - len(prompt) - len(response)
        )


def test_the_prompts_of_a_response_are_the_prompts():
    given = prompts(4, 2, 3)
    batch = generate(model("gpt2"), given, max_new_tokens=5, eos=())
    again = prompts_of(batch)
    assert torch.equal(again.lengths, given.lengths)
    assert rows(again.input_ids, again.attention_mask) == rows(given.input_ids, given.attention_mask)


def test_the_model_s_own_habits_do_not_count_and_come_back():
    one = model("llama")
    plain = generate(one, prompts(3, 3), max_new_tokens=6, temperature=0, eos=()).input_ids
    habits = one.generation_config
    habits.update(repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=int(plain[0, 3]), max_new_tokens=2)
    assert torch.equal(generate(one, prompts(3, 3), max_new_tokens=6, temperature=0, eos=()).input_ids, plain)
    assert one.generation_config is habits
    assert generate(one, prompts(3, 3), max_new_tokens=6, temperature=0).response_length[0] == 1


def test_draws_come_from_torch_s_stream_and_modes_are_restored():
    one = model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    one.transformer.h[0].eval()

    def drawn(seed: int, **options) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(one, prompts(3, 3, 3), max_new_tokens=6, eos=(), **options).input_ids.tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, temperature=0) == drawn(1, temperature=0)  # no dropout
    assert drawn(0, top_k=1) == drawn(0, temperature=0) == drawn(3, top_p=1e-6)
    assert (one.training, one.transformer.h[0].training, one.transformer.h[1].training) == (True, False, True)
    assert all(parameter.grad is None for parameter in one.parameters())


def test_beam_search_finds_at_least_as_probable_a_text():
    one, given = model("llama", spread=6.0), prompts(3, 4)

    def log_probability(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            logits = TokenReader(one, batch)(batch).logits()
        values = logits.log_softmax(-1).gather(-1, kept_labels(batch)[:, None]).view(2, -1)
        return values.sum(1)

    beams = generate(one, given, max_new_tokens=6, temperature=0, num_beams=8, eos=())
    greedy = generate(one, given, max_new_tokens=6, temperature=0, eos=())
    assert (log_probability(beams) >= log_probability(greedy) - 1e-4).all()


def test_a_model_with_an_adapter_writes_what_it_writes_when_merged():
    one = disturbed(model("llama", adapter={"rank": 2}))
    found = generate(one, prompts(3, 5), max_new_tokens=6, temperature=0, eos=())
    expected = generate(merged(one), prompts(3, 5), max_new_tokens=6, temperature=0, eos=())
    assert torch.equal(found.input_ids, expected.input_ids)


def test_what_writes_no_text_is_refused():
    with pytest.raises(IncompatibleError, match="generates no text"):
        generate(nn.Linear(2, 2), prompts(2), max_new_tokens=2)
