"""MOHAWK's three stages on tiny models: what each trains, on what, and what it must leave alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Method
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.language.conversion import mixers_of
from limbeck.language.teacher_forcing import forced_inputs, observe
from limbeck.methods.language.kl import ForwardKL
from limbeck.models.saved import load_model, save_model
from tests.methods.language.rig import batch, source

INFO = source().info()


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    config = LlamaConfig(**{**tokens, **shape, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    return LlamaForCausalLM(config)


def mohawk(student: nn.Module | None = None, teacher: Any = None, **options: Any) -> Method:
    kind = method_class("mohawk")
    torch.manual_seed(5)
    made = kind(
        kind.Options(state_size=4, **options),
        student=llama(1) if student is None else student,
        teacher=LiveTeacher(llama()) if teacher is None else teacher,
        data=INFO,
    )
    assert isinstance(made, Method)
    return made


def padded() -> Batch:
    """Five sequences, the first of which is padded on the left and the others on the right."""
    plain = batch()
    mask = plain["attention_mask"].clone()
    mask[0] = 1
    mask[0, :5] = 0
    return plain.replace(attention_mask=mask)


def loss_of(method: Method, on: Batch | None = None) -> Tensor:
    [update] = method.step(padded() if on is None else on)
    return update.loss


def trained(method: Method) -> set[str]:
    return {name for name, parameter in method.named_parameters() if parameter.requires_grad}


def fit(method: Method, steps: int = 3, **optimizer: Any) -> None:
    spec = TrainSpec(steps=steps, batch_size=8, optimizer=OptimizerSpec(lr=0.01, **optimizer))
    Trainer(method, Loader(source(), 8, 0), spec, steps=steps, items=24, seed=0).fit()


def test_the_student_begins_with_the_teachers_weights():
    teacher = llama()
    method = mohawk(teacher=LiveTeacher(teacher))
    theirs, ours = teacher.state_dict(), method.student.state_dict()
    for name, value in theirs.items():
        if ".self_attn." not in name:
            assert torch.equal(ours[f"base.{name}"], value), name
    for path, mixer in mixers_of(method.student).items():
        attention = teacher.get_submodule(path)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
        values = attention.v_proj.weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)  # grouped heads
        assert torch.equal(mixer.in_proj.weight[:16], values)
    own = llama(1)
    kept = mohawk(copy.deepcopy(own), initialise="none", carry_values=False)
    assert torch.equal(kept.student.base.lm_head.weight, own.lm_head.weight)
    fresh = next(iter(mixers_of(kept.student).values()))
    assert not torch.equal(fresh.out_proj.weight, own.model.layers[0].self_attn.o_proj.weight)


def test_orientation_is_the_mean_distance_of_the_matrices_of_all_layers():
    teacher, on = llama(), padded()
    teacher.config._attn_implementation = "eager"
    method = mohawk(stage="orientation", teacher=LiveTeacher(teacher))
    mask = on["attention_mask"].bool()
    with torch.no_grad():
        out = teacher(**{k: on[k] for k in ("input_ids", "attention_mask")}, output_attentions=True,
                      output_hidden_states=True)  # fmt: skip
    total, both = 0.0, mask[:, None, :, None] & mask[:, None, None, :]
    for layer, mixer in enumerate(mixers_of(method.student).values()):
        hidden = teacher.model.layers[layer].input_layernorm(out.hidden_states[layer])
        gap = (mixer.materialize(hidden, mask) - out.attentions[layer]) * both
        total = total + gap.square().sum((-1, -2)).sqrt().mean() / 3
    torch.testing.assert_close(loss_of(method, on), total)


def test_alignment_is_the_mean_distance_of_outputs_before_the_residual():
    teacher, on = llama(), padded()
    method = mohawk(stage="alignment", teacher=LiveTeacher(teacher))
    mask, total = on["attention_mask"].bool(), 0.0
    seen = observe(teacher, [f"model.layers.{n}.self_attn" for n in range(3)], on)
    after = observe(teacher, [f"model.layers.{n}.post_attention_layernorm" for n in range(3)], on)
    before = observe(teacher, [f"model.layers.{n}.input_layernorm" for n in range(3)], on)
    for layer, mixer in enumerate(mixers_of(method.student).values()):
        added = after.inputs[layer] - before.inputs[layer]  # what the attention added to the residual stream
        total = total + (mixer(seen.inputs[layer], mask) - added)[mask].norm(dim=-1).mean() / 3
    torch.testing.assert_close(loss_of(method, on), total)


def test_equal_matrices_cost_nothing_and_then_neither_do_the_outputs(monkeypatch):
    orientation, alignment = mohawk(stage="orientation"), mohawk(stage="alignment")
    on = padded()
    seen = observe(orientation.teacher.model, orientation.paths, on, matrices=True)
    for method in (orientation, alignment):
        for mixer, matrices in zip(mixers_of(method.student).values(), seen.matrices, strict=True):

            def forward(hidden, mask=None, mixer=mixer, matrices=matrices):
                mixed = torch.einsum("bhij,bjhp->bihp", matrices, mixer.values(hidden)).flatten(2)
                gate = nn.functional.silu(mixer._project(hidden, None, None)[3] + mixer.z_bias)
                return mixer.out_proj(mixed * gate)

            monkeypatch.setattr(mixer, "forward", forward)
            monkeypatch.setattr(mixer, "materialize", lambda hidden, mask=None, matrices=matrices: matrices)
    assert loss_of(orientation, on) == 0
    assert loss_of(alignment, on) < 1e-4


@pytest.mark.parametrize("stage", ["orientation", "alignment"])
def test_no_gradient_passes_from_layer_to_layer(stage):
    method = mohawk(stage=stage, freeze_mlp=False if stage == "alignment" else None)
    [update] = method.step(padded())
    update.loss.backward()
    whole = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    other = next(iter(mixers_of(method.student).values()))  # a changed first layer leaves the others' gradients alone
    method.zero_grad()
    with torch.no_grad():
        other.in_proj.weight.mul_(3.0)
    [update] = method.step(padded())
    update.loss.backward()
    for name, parameter in method.named_parameters():
        if parameter.grad is not None and ".layers.0." not in name:
            assert torch.equal(parameter.grad, whole[name]), name
    assert not torch.equal(
        other.in_proj.weight.grad, whole["student.base.model.layers.0.self_attn.mixer.in_proj.weight"]
    )


def test_each_stage_trains_its_parts():
    mixers = "student.base.model.layers.{}.self_attn.mixer."
    parts = ("in_proj.weight", "conv.weight", "conv.bias", "D")
    expected = {mixers.format(layer) + part for layer in range(3) for part in parts}
    assert trained(mohawk(stage="orientation")) == expected
    expected |= {mixers.format(layer) + part for layer in range(3) for part in ("z_bias", "out_proj.weight")}
    assert trained(mohawk(stage="alignment")) == expected
    blocks = trained(mohawk(stage="alignment", freeze_mlp=False))
    assert blocks - expected
    assert all(".layers." in name for name in blocks)
    everything = trained(mohawk())
    assert {"student.base.lm_head.weight", "student.base.model.norm.weight"} < everything
    mlps = {name for name in everything if ".mlp." in name}
    assert everything - trained(mohawk(freeze_mlp=True)) == mlps
    assert len(mlps) == 9


def test_orientation_leaves_values_gate_and_output_alone_in_spite_of_weight_decay():
    method = mohawk(stage="orientation")
    before = {path: copy.deepcopy(mixer.state_dict()) for path, mixer in mixers_of(method.student).items()}
    fit(method, weight_decay=0.5)
    for path, mixer in mixers_of(method.student).items():
        after, inner, gate = mixer.state_dict(), mixer.inner, mixer.channels
        for name in ("z_bias", "out_proj.weight"):
            assert torch.equal(after[name], before[path][name])
        for name, left in (("in_proj.weight", [slice(0, inner), slice(gate, gate + inner)]),
                           ("conv.weight", [slice(0, inner)]), ("conv.bias", [slice(0, inner)])):  # fmt: skip
            for rows in left:
                assert torch.equal(after[name][rows], before[path][name][rows]), name
            assert not torch.equal(after[name], before[path][name]), name


def test_one_stage_continues_where_the_other_ended():
    first = mohawk(stage="orientation")
    fit(first, steps=20)
    oriented = copy.deepcopy(first.result()).requires_grad_(True)
    weights = {name: value.clone() for name, value in oriented.state_dict().items()}
    second = mohawk(oriented, stage="alignment")
    assert second.student is oriented
    assert all(torch.equal(value, weights[name]) for name, value in second.result().state_dict().items())
    before = loss_of(second).detach()
    assert before < 0.95 * loss_of(mohawk(stage="alignment"))  # what the matrices gained shows in the outputs
    fit(second, steps=20)
    assert loss_of(second) < 0.9 * before


def test_orientation_brings_matrices_together():
    method = mohawk(stage="orientation")
    before = loss_of(method).detach()
    fit(method, steps=30)
    assert loss_of(method) < 0.7 * before


def test_kept_layers_say_what_the_teacher_says_where_they_hear_the_same():
    teacher, on = llama().eval(), padded()
    method = mohawk(teacher=LiveTeacher(teacher), keep_attention=[0, 2])
    assert list(mixers_of(method.student)) == ["model.layers.1.self_attn"]
    student = method.student.eval()
    paths = ["model.layers.0", "model.layers.1", "model.layers.2"]
    theirs, ours = observe(teacher, paths, on), observe(student, [f"base.{path}" for path in paths], on)
    mask = on["attention_mask"].bool()
    assert torch.equal(ours.outputs[0], theirs.outputs[0])  # it stands before the first mixer
    assert not torch.equal(ours.outputs[1][mask], theirs.outputs[1][mask])
    with forced_inputs(student, [f"base.{path}" for path in paths], theirs.inputs):
        forced = observe(student, [f"base.{path}" for path in paths], on)
    assert torch.equal(forced.outputs[2], theirs.outputs[2])


def test_distillation_is_the_forward_kl():
    method = mohawk(label_weight=0.5)
    plain = ForwardKL(ForwardKL.Options(label_weight=0.5), student=method.student, teacher=method.teacher, data=INFO)
    assert torch.equal(loss_of(method.eval()), loss_of(plain.eval()))


def test_attention_is_as_it_was_after_the_teacher_was_asked_for_matrices():
    method = mohawk(stage="orientation")
    config = method.teacher.model.config
    assert config._attn_implementation == "sdpa"
    loss_of(method)
    assert config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in method.teacher.model.modules())


def test_padding_has_no_influence():
    for stage in ("orientation", "alignment"):
        method, on = mohawk(stage=stage), padded()
        losses = []
        for token in (3, 17):
            ids = on["input_ids"].masked_fill(on["attention_mask"] == 0, token)
            losses.append(loss_of(method, on.replace(input_ids=ids)))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


class Stored:
    """A teacher without a network."""


@pytest.mark.parametrize("stage", ["orientation", "alignment"])
def test_a_teacher_without_inner_signals_is_refused(stage):
    with pytest.raises(IncompatibleError, match="live teacher"):
        mohawk(teacher=Stored(), stage=stage, initialise="none")


def test_a_stored_teacher_serves_distillation_of_a_student_with_weights():
    with pytest.raises(IncompatibleError, match="initialise: teacher"):
        mohawk(teacher=Stored())
    mohawk(teacher=Stored(), initialise="none")


def test_models_that_do_not_go_together_are_refused():
    with pytest.raises(IncompatibleError, match="initialise: none"):
        mohawk(llama(intermediate_size=32))
    with pytest.raises(IncompatibleError, match="attends with 2 heads"):
        loss_of(mohawk(llama(), LiveTeacher(llama(num_attention_heads=2)), stage="orientation", initialise="none"))


def test_a_hybrid_is_saved_and_loads(tmp_path):
    method = mohawk(keep_attention=[1])
    fit(method)
    save_model(method.result(), tmp_path)
    loaded, on = load_model(tmp_path).eval(), padded()
    fields = {name: on[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(loaded(**fields).logits, method.result().eval()(**fields).logits)
