import pytest
import torch

from limbeck.objectives.divergences import divergence
from limbeck.objectives.speculative import (
    acceptance,
    expected_tokens,
    greedy_step,
    lenient,
    speculative_step,
    speedup,
)

SAMPLES = 20_000
# 99.9 % quantiles of chi-square at 5 and at 35 degrees of freedom.
QUANTILE = {5: 20.515, 35: 66.619}


def distributions(seed, *shape):
    return (1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def step(draft, target, seed=0, **options):
    """SAMPLES independent steps; draft (drafted, vocab), target (drafted + 1, vocab)."""
    generator = torch.Generator().manual_seed(seed)
    drafted = torch.multinomial(draft, SAMPLES, replacement=True, generator=generator).t()
    repeated = [side.expand(SAMPLES, *side.shape) for side in (draft, target)]
    return speculative_step(drafted, *repeated, generator=generator, **options)


def chi_square(counts, probs):
    expected = counts.sum() * probs
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_first_token_follows_the_target(seed):
    draft, target = distributions(seed, 3, 6), distributions(seed + 10, 4, 6)
    tokens = step(draft, target, seed).tokens
    assert chi_square(tokens[:, 0].bincount(minlength=6), target[0]) < QUANTILE[5]


def test_pairs_follow_the_target():
    """Tokens 0 and 1 together, where the step yields both: given that, the second is the target's too."""
    draft, target = distributions(3, 2, 6), distributions(4, 3, 6)
    result = step(draft, target)
    # What the step does not yield, the target samples: complete the pair and the law must be the product.
    rest = torch.multinomial(target[1], SAMPLES, replacement=True, generator=torch.Generator().manual_seed(5))
    second = torch.where(result.accepted >= 1, result.tokens[:, 1], rest)
    counts = (6 * result.tokens[:, 0] + second).bincount(minlength=36)
    assert chi_square(counts, torch.outer(target[0], target[1]).flatten()) < QUANTILE[35]


def test_the_naive_step_would_fail_the_test():
    """The chi-square has power: keeping the draft's tokens is told apart at once."""
    draft, target = distributions(0, 1, 6), distributions(10, 1, 6)
    drafted = torch.multinomial(draft[0], SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    assert chi_square(drafted.bincount(minlength=6), target[0]) > 10 * QUANTILE[5]


def test_acceptance_is_one_minus_total_variation():
    draft, target = distributions(0, 50, 9).double(), distributions(1, 50, 9).double()
    rate = acceptance(draft, target)
    torch.testing.assert_close(rate, 1 - divergence("total-variation")(draft.log(), target.log()), rtol=0, atol=1e-6)
    measured = (step(draft[:1].float(), target[[0, 1]].float()).accepted == 1).float().mean()
    assert measured.item() == pytest.approx(rate[0].item(), abs=0.015)


def test_a_draft_equal_to_the_target_is_accepted_whole():
    target = distributions(0, 5, 6)
    result = step(target[:4], target)
    assert (result.accepted == 4).all()
    assert chi_square(result.tokens[:, 4].bincount(minlength=6), target[4]) < QUANTILE[5]


def test_layout():
    result = step(distributions(0, 3, 6), distributions(1, 4, 6))
    place = torch.arange(4)
    assert ((result.tokens >= 0) == (place <= result.accepted.unsqueeze(-1))).all()
    assert set(result.accepted.tolist()) == {0, 1, 2, 3}


def test_block_efficiency():
    """One context repeated, so that acceptances are independent and the closed form is exact."""
    draft, target = distributions(0, 1, 6), distributions(1, 1, 6)
    result = step(draft.expand(4, 6), target.expand(5, 6))
    rate = acceptance(draft, target)[0]
    measured = (result.accepted + 1).double().mean()
    assert measured.item() == pytest.approx(expected_tokens(rate, 4).item(), rel=0.02)


def test_what_the_target_forbids_is_never_accepted():
    draft, target = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    tokens = step(draft, target).tokens
    assert not (tokens[:, 0] == 0).any()


def test_same_generator_same_tokens():
    draft, target = distributions(0, 3, 6), distributions(1, 4, 6)
    assert torch.equal(step(draft, target, 3).tokens, step(draft, target, 3).tokens)


@pytest.mark.parametrize("kind", ["linear", "square", "exponential"])
def test_lenience(kind):
    draft, target = distributions(0, 1, 6), distributions(1, 2, 6)
    assert torch.equal(lenient(target, 1.0, kind), target)
    assert (lenient(target, 0.5, kind) >= target).all()
    exact, lossy = (
        step(draft, target, epsilon=epsilon, lenience=kind).accepted.float().mean() for epsilon in (1.0, 0.5)
    )
    assert lossy > exact + 0.02
    expected = torch.minimum(lenient(target[:1], 0.5, kind), draft).sum()
    assert lossy.item() == pytest.approx(expected.item(), abs=0.015)


def test_greedy():
    scores = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 3]] * 3), 4).float()
    drafted = torch.tensor([[1, 2, 0], [1, 0, 0], [0, 2, 0]])
    result = greedy_step(drafted, scores)
    assert result.accepted.tolist() == [3, 1, 0]
    assert result.tokens.tolist() == [[1, 2, 0, 3], [1, 2, -1, -1], [1, -1, -1, -1]]


def test_greedy_decoding_gives_the_targets_own_string():
    """A target that is any function of the last token; a draft that is often wrong."""
    target = torch.tensor([2, 0, 3, 1, 2])
    plain, speculative = [4], [4]
    while len(plain) < 30:
        plain.append(int(target[plain[-1]]))
    generator = torch.Generator().manual_seed(0)
    while len(speculative) < 30:
        drafted = torch.randint(4, (1, 3), generator=generator)
        context = torch.cat([torch.tensor([speculative[-1:]]), drafted], dim=1)
        scores = torch.nn.functional.one_hot(target[context], 5).float()
        result = greedy_step(drafted, scores)
        speculative += result.tokens[0, : int(result.accepted[0]) + 1].tolist()
    assert speculative[:30] == plain


def test_closed_forms():
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.8, 4).item() == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert speedup(0.8, 4, 0.1).item() == pytest.approx(expected_tokens(0.8, 4).item() / 1.4)
    assert expected_tokens(torch.tensor([0.5, 0.9]), 2).tolist() == pytest.approx([1.75, 2.71])


def test_refusals():
    draft, target = distributions(0, 1, 3, 6), distributions(1, 1, 3, 6)
    with pytest.raises(ValueError, match="one more"):
        speculative_step(torch.zeros(1, 3, dtype=torch.long), draft, target)
    with pytest.raises(ValueError, match="one more"):
        greedy_step(torch.zeros(1, 3, dtype=torch.long), target)
    with pytest.raises(ValueError, match="epsilon"):
        lenient(target, 0.0)
