import pytest
import torch

from limbeck.objectives.divergences import divergence
from limbeck.objectives.tokens import label_mask, next_token_shift, reduce_tokens, select_tokens


def test_select_then_compute_equals_compute_then_select():
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.rand(2, 5) > 0.5
    kept = divergence("jsd")(*select_tokens(mask, student, teacher))
    assert torch.equal(kept, divergence("jsd")(student, teacher)[mask])


def test_masked_tokens_may_be_anything():
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    student[0, 1] = torch.nan
    student.requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    reduce_tokens(divergence("reverse-kl")(*select_tokens(mask, student, teacher))).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[~mask] == 0).all()


def test_select_refuses_other_items():
    with pytest.raises(ValueError, match="begin with the mask"):
        select_tokens(torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 4, 7))


def test_reduction_does_not_depend_on_the_split():
    values = torch.arange(10.0)
    whole = reduce_tokens(values)
    assert whole == values.mean()
    parts = [reduce_tokens(part, 10) for part in values.split([1, 6, 3])]
    torch.testing.assert_close(sum(parts), whole)
    assert reduce_tokens(values, torch.tensor(20)) == 45 / 20
    assert reduce_tokens(values[:0]) == 0


def test_shift_pairs_a_logit_with_the_next_label():
    labels = torch.tensor([[-100, 3, 1, 2]])
    logits = torch.nn.functional.one_hot(labels.clamp_min(0), 5).float()
    shifted, targets = next_token_shift(logits, labels)
    assert targets.tolist() == [[3, 1, 2]]
    assert shifted.argmax(-1).tolist() == [[0, 3, 1]]
    assert label_mask(labels).tolist() == [[False, True, True, True]]
