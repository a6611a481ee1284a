"""Student and teacher as adapters over one backbone, and the backbone as their reference."""

import pytest
import torch

from limbeck.core.call import call, logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import AdapterSpec
from limbeck.models.adapters.roles import reference_mode, roles
from limbeck.models.saved import load_model, save_model
from tests.models.test_adapters import BATCH, disturbed, outputs, trainable
from tests.models.texts import model


def cast(folder=None):
    backbone = model("llama")
    teacher = AdapterSpec(rank=2) if folder is None else folder
    return backbone, roles(backbone, {"student": AdapterSpec(rank=2), "teacher": teacher, "base": None})


def storage(one: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for name, parameter in one.named_parameters() if "lora" not in name}


def test_the_backbone_is_held_once():
    backbone, played = cast()
    assert storage(played["student"]) == storage(played["teacher"]) == storage(played["base"]) == storage(backbone)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    moved = played["student"].to(torch.float64)  # what a device move does: the others follow
    assert storage(moved) == storage(played["teacher"])
    buffers = [dict(one.named_buffers()) for one in (played["base"], backbone)]
    assert buffers[0].keys() == buffers[1].keys()


def test_gradients_reach_the_student_s_adapter_alone():
    _, played = cast()
    teacher, base = outputs(disturbed(played["teacher"])), outputs(played["base"])
    student = played["student"].train()
    optimizer = torch.optim.SGD([one for one in student.parameters() if one.requires_grad], lr=0.5)
    for _ in range(3):
        logits_of(call(student, BATCH)).square().mean().backward()
        for role in ("teacher", "base"):
            assert all(parameter.grad is None for parameter in played[role].parameters())
        assert {name for name, one in student.named_parameters() if one.grad is not None} == set(trainable(student))
        optimizer.step()
    assert torch.equal(outputs(played["teacher"]), teacher)
    assert torch.equal(outputs(played["base"]), base)
    assert not torch.equal(outputs(student), base)


def test_the_order_of_passes_does_not_matter_under_checkpointing():
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        _, played = cast()
        student, teacher = disturbed(played["student"]).train(), disturbed(played["teacher"])
        if checkpointing:
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        loss = logits_of(call(student, BATCH)).square().mean()
        outputs(teacher)  # between the student's forward and backward pass, which computes the former again
        loss.backward()
        return [one.grad for one in student.parameters() if one.requires_grad]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_role_can_come_from_a_saved_adapter(tmp_path):
    first = disturbed(model("llama", adapter={"rank": 2}))
    save_model(first, tmp_path)
    _, played = cast(tmp_path)
    assert torch.equal(outputs(played["teacher"]), outputs(first))
    assert storage(played["teacher"]) == storage(played["student"])
    save_model(played["student"], tmp_path / "student")
    assert torch.equal(outputs(load_model(tmp_path / "student")), outputs(played["student"]))
    with pytest.raises(IncompatibleError, match="base model"):
        roles(first, {})


def test_roles_have_modes_of_their_own():
    _, played = cast()
    played["student"].train()
    played["teacher"].eval()
    assert played["student"].training
    assert not any(module.training for module in played["teacher"].modules())


def test_the_reference_is_the_model_without_its_adapter():
    adapted = disturbed(model("llama", adapter={"rank": 2, "dropout": 0.5}))
    base, own, names = outputs(model("llama")), outputs(adapted), trainable(adapted)
    adapted.train()
    with reference_mode(adapted) as reference:
        found = logits_of(call(reference, BATCH))
    assert torch.equal(found, base)
    assert not found.requires_grad
    assert adapted.training
    assert trainable(adapted) == names
    assert torch.equal(outputs(adapted), own)
    adapted.requires_grad_(False)
    with reference_mode(adapted):
        pass
    assert trainable(adapted) == []
    with pytest.raises(IncompatibleError, match="no adapter to turn off"), reference_mode(model("llama")):
        pass
