"""Numbers of Liger-kernel's chunked loss, which is also a peer of the benchmark."""

import re

import pytest
from tests.oracles.oracle import load

from limbeck.objectives.divergences import divergence
from limbeck.objectives.fused_head import HiddenTeacher, fused_head_divergence
from limbeck.objectives.vocabulary import match_vocabulary

LIGER = load("fused-linear-jsd-liger")[0]


@pytest.mark.parametrize("key", sorted(name for name in LIGER.tensors if name.startswith("loss.beta")))
def test_liger(key):
    beta, hard, soft, temperature, chunk = (
        float(value) for value in re.fullmatch(r"loss\.beta(.+)_h(.+)_s(.+)_T(.+)_chunk(.+)", key).groups()
    )
    hidden, weight, bias = (
        LIGER.tensors[f"student_{name}"].clone().requires_grad_() for name in ("input", "weight", "bias")
    )
    loss = fused_head_divergence(
        hidden,
        weight,
        HiddenTeacher(LIGER.tensors["teacher_input"], LIGER.tensors["teacher_weight"]),
        divergence("jsd", beta=beta),
        bias=bias,
        labels=LIGER.tensors["labels"],
        temperature=temperature,
        soft_weight=soft,
        hard_weight=hard,
        chunk_size=int(chunk),
    )
    loss.backward()
    LIGER.check(key, loss)
    for name, tensor in (("input", hidden), ("weight", weight), ("bias", bias)):
        LIGER.check(key.replace("loss", f"grad_{name}"), tensor.grad, of_largest=True)


def test_liger_pads_a_smaller_vocabulary_with_logit_zero():
    """Reproduced only by asking for it: ours gives the missing entries no probability."""
    hidden = LIGER.tensors["student_input"].clone().requires_grad_()
    teacher = HiddenTeacher(LIGER.tensors["teacher_input"], LIGER.tensors["teacher_weight_bigger"])
    jsd = divergence("jsd")

    def phantom(student_logits, teacher_logits, temperature):
        return jsd(*match_vocabulary(student_logits, teacher_logits, "zero"), temperature)

    def loss_with(divergence_):
        return fused_head_divergence(
            hidden, LIGER.tensors["student_weight"], teacher, divergence_, labels=LIGER.tensors["labels"]
        )

    loss = loss_with(phantom)
    loss.backward()
    LIGER.check("loss.vocabpad_beta0.5", loss)
    LIGER.check("grad_input.vocabpad_beta0.5", hidden.grad, of_largest=True)
    assert loss_with(jsd) > loss


def test_every_liger_number_is_tested():
    for name in LIGER.tensors:
        recorded = re.sub(r"^(grad_\w+?|loss)\.", "", name)
        assert f"loss.{recorded}" in LIGER.tensors or name in LIGER.inputs, name
