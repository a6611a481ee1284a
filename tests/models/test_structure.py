"""Networks over shared memory."""

import torch

from limbeck.models.structure import share_frozen, structural_copy
from tests.models.test_adapters import outputs
from tests.models.test_roles import storage
from tests.models.texts import model


def test_equal_frozen_weights_loaded_apart_become_one():
    student, teacher = model("llama", adapter={"rank": 2}), model("llama").requires_grad_(False)
    before, expected = outputs(student), outputs(teacher)
    size = sum(parameter.nbytes for parameter in teacher.parameters())
    assert share_frozen(student, teacher) == size
    assert share_frozen(student, teacher) == 0
    assert storage(teacher) <= storage(student)
    assert torch.equal(outputs(student), before)
    assert torch.equal(outputs(teacher), expected)
    other = model("llama", seed=1).requires_grad_(False)
    ones = sum(p.nbytes for name, p in other.named_parameters() if "norm" in name)  # norms begin alike
    assert share_frozen(student, other) == ones
    assert share_frozen(model("llama"), teacher) == 0  # what trains is never shared


def test_a_structural_copy_shares_tensors_and_nothing_else():
    one = model("gpt2")
    copy = structural_copy(one)
    assert storage(copy) == storage(one)
    assert copy.transformer.wte.weight is one.transformer.wte.weight is copy.lm_head.weight  # ties stay tied
    copy.register_forward_hook(lambda *arguments: None)
    assert not one._forward_hooks
    assert not storage(structural_copy(one, share=lambda tensor: False)) & storage(one)
