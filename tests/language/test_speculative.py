"""Speculative decoding: exactly the target's text or law, caches that are rolled back, counts that add up."""

import pytest
import torch
from scipy.stats import chisquare

from limbeck.core.errors import IncompatibleError
from limbeck.language.cached import CachedReader
from limbeck.language.sampling import Sampling
from limbeck.language.speculative import Decoded, plain_decode, speculative_decode
from tests.models.texts import model, text

PROMPT = torch.tensor([5, 9, 17, 4])
GREEDY = Sampling(0)


def near(kind: str, amount: float = 0.02) -> torch.nn.Module:
    """A draft that is right often but not always."""
    draft, draws = model(kind), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += amount * parameter.std(correction=0) * torch.randn(parameter.shape, generator=draws)
    return draft


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_reader_with_rollback_says_what_the_model_says(kind):
    one, ids = model(kind), text().fetch(torch.arange(1)).input_ids[:, :11]
    with torch.no_grad():
        expected = one(input_ids=ids).logits
        reader = CachedReader(one)
        reader.read(ids[:, :3])
        reader.read(torch.randint(0, 60, (1, 6)))
        reader.take_back(3)
        reader.take_back(9)
        parts = [reader.read(ids[:, 3:4]), reader.read(ids[:, 4:9])]
        reader.take_back(7)
        parts = [*parts[:1], parts[1][:, :3], reader.read(ids[:, 7:])]
    assert reader.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("drafted", [1, 4])
def test_greedy_text_is_the_target_s_whatever_the_draft(kind, drafted):
    target = model(kind)
    expected = plain_decode(target, PROMPT, max_new_tokens=17, sampling=GREEDY, eos=()).tokens
    rates = []
    for draft in (near(kind), model(kind, seed=1), model("llama", hidden_size=8)):
        found = speculative_decode(target, draft, PROMPT, max_new_tokens=17, drafted=drafted, sampling=GREEDY, eos=())
        assert found.tokens.tolist() == expected.tolist()
        rates.append(sum(found.accepted) / sum(found.proposed))
    assert rates[0] > rates[1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(0.7, top_k=9, top_p=0.8)])
def test_a_draft_that_is_the_target_is_always_accepted(sampling):
    target = model("llama")
    found = speculative_decode(target, target, PROMPT, max_new_tokens=20, drafted=4, sampling=sampling, eos=())
    assert found.accepted == found.proposed == (4, 4, 4, 4)
    assert (found.target_calls, found.block_efficiency, len(found.tokens)) == (4, 5.0, 20)
    assert found.tokens_per_second > 0


def test_counts_add_up():
    found = speculative_decode(model("llama"), near("llama"), PROMPT, max_new_tokens=23, drafted=3, eos=())
    assert len(found.tokens) == 23 == sum(found.accepted) + found.target_calls
    assert len(found.accepted) == len(found.proposed) == found.target_calls
    assert all(accepted <= proposed <= 3 for accepted, proposed in zip(found.accepted, found.proposed, strict=True))
    plain = plain_decode(model("llama"), PROMPT, max_new_tokens=5, eos=())
    assert (plain.target_calls, plain.block_efficiency, plain.accepted) == (5, 1.0, ())


@pytest.mark.parametrize("place", [0, 3, 6])
def test_decoding_ends_at_the_end_token(place):
    target = model("llama")
    spoken = plain_decode(target, PROMPT, max_new_tokens=12, sampling=GREEDY, eos=()).tokens.tolist()
    end = spoken[place]
    expected = spoken[: spoken.index(end) + 1]
    for draft in (near("llama"), target):
        found = speculative_decode(target, draft, PROMPT, max_new_tokens=12, sampling=GREEDY, eos=end)
        assert found.tokens.tolist() == expected
    assert plain_decode(target, PROMPT, max_new_tokens=12, sampling=GREEDY, eos=end).tokens.tolist() == expected


def law(target: torch.nn.Module, prompt: torch.Tensor, sampling: Sampling, vocab: int) -> torch.Tensor:
    """The exact law of the next two tokens (vocab, vocab)."""
    pairs = torch.cat([prompt.expand(vocab, -1), torch.arange(vocab)[:, None]], 1)
    with torch.no_grad():
        logits = target(input_ids=pairs).logits
    first, second = sampling.probabilities(logits[0, -2]), sampling.probabilities(logits[:, -1])
    return first[:, None] * second


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=3)])
def test_what_comes_out_follows_the_target_s_law_whatever_the_draft(sampling):
    source, runs = text(vocab=5), 400
    small = {"num_hidden_layers": 1, "hidden_size": 8, "spread": 12.0}
    target, draft = (model("gpt2", source, seed=seed, **small) for seed in (0, 3))
    prompt = torch.tensor([2])
    expected, torn = law(target, prompt, sampling, 5), law(draft, prompt, sampling, 5)
    assert (expected - torn).abs().sum() > 0.2  # else this would not tell the target from the draft
    torch.manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(runs):
        found = speculative_decode(target, draft, prompt, max_new_tokens=2, drafted=1, sampling=sampling, eos=())
        counts[tuple(found.tokens.tolist())] += 1
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    assert pvalue(counts, expected) > 1e-3
    assert pvalue(counts, torn + 1e-4) < 1e-6


def pvalue(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    wanted = probabilities[probabilities > 0].double()
    seen = counts[probabilities > 0].double()
    return chisquare(seen.numpy(), (seen.sum() * wanted / wanted.sum()).numpy()).pvalue


def test_lenience_accepts_more():
    target, draft = model("llama"), model("llama", seed=1)

    def accepted(epsilon: float) -> int:
        torch.manual_seed(0)
        options = {"max_new_tokens": 30, "sampling": Sampling(2.0), "eos": (), "epsilon": epsilon}
        return sum(speculative_decode(target, draft, PROMPT, **options).accepted)

    assert accepted(0.01) > accepted(1.0)


def test_a_padded_vocabulary_is_no_obstacle():
    target, draft = model("llama", vocab_size=64), model("llama", seed=1)
    for first, second in ((target, draft), (draft, target)):
        found = speculative_decode(first, second, PROMPT, max_new_tokens=12, eos=())
        assert len(found.tokens) == 12
        assert int(found.tokens.max()) < first.config.vocab_size


def test_modes_are_restored_and_gradients_not_recorded():
    target, draft = model("llama").train(), model("gpt2").train()
    speculative_decode(target, draft, PROMPT, max_new_tokens=3)
    assert target.training
    assert draft.training
    assert not any(parameter.grad is not None for parameter in target.parameters())


def test_what_cannot_be_decoded_is_refused():
    one = model("llama")
    with pytest.raises(IncompatibleError, match="at least one token"):
        plain_decode(one, torch.tensor([], dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match="at least one token"):
        speculative_decode(one, one, PROMPT, max_new_tokens=2, drafted=0)
    one._is_stateful = True
    with pytest.raises(IncompatibleError, match="rolled back"):
        CachedReader(one)
    assert Decoded(torch.arange(6), (), (), 3, 2.0).tokens_per_second == 3
