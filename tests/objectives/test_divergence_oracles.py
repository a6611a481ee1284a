"""Numbers of DistiLLM's, TAID's and TRL's code: every recorded key is tested, and an unknown key fails."""

import re

import pytest
import torch
from tests.oracles.oracle import load

from limbeck.objectives.divergences import decoupled_kl, divergence, entropy, token_cross_entropy
from limbeck.objectives.sequence import advantages, token_rewards
from limbeck.objectives.tokens import label_mask, reduce_tokens, select_tokens

DISTILLM, TAID, GKD = (load(name)[0] for name in ("divergences-distillm", "divergences-taid-repo", "gkd-trl"))


def keys(case, prefix):
    return sorted(name.removeprefix(prefix) for name in case.tensors if name.startswith(prefix))


def number(text, key):
    return float(re.search(key + r"([0-9]+\.[0-9]+)", text)[1])


def distillm_loss(key):
    """DistiLLM's code leaves the teacher's entropy out of forward KL and skew KL: add it to ours."""
    if key in ("rkl", "tvd"):
        return divergence({"rkl": "reverse-kl", "tvd": "total-variation"}[key])
    if key == "fkl_ce":
        return token_cross_entropy
    name, lam = key.split("_")[0], number(key, "lam")
    if name == "js":
        return divergence("jsd", beta=1 - lam)
    if name == "srkl":
        return divergence("skew-reverse-kl", alpha=lam)
    entropy_weight = {"symkl": 1 - lam, "sfkl": 1.0}[name]
    plain = {"symkl": ("symmetric-kl", {"weight": lam}), "sfkl": ("skew-kl", {"alpha": lam})}[name]
    return lambda student, teacher: (
        divergence(plain[0], **plain[1])(student, teacher) + entropy_weight * entropy(teacher)
    )


@pytest.mark.parametrize("key", keys(DISTILLM, "loss."))
def test_distillm(key):
    student = DISTILLM.tensors["student_logits"].clone().requires_grad_()
    mask = label_mask(DISTILLM.tensors["label"])
    loss = reduce_tokens(distillm_loss(key)(*select_tokens(mask, student, DISTILLM.tensors["teacher_logits"])))
    loss.backward()
    DISTILLM.check(f"loss.{key}", loss)
    DISTILLM.check(f"grad_student.{key}", student.grad, of_largest=True)


def taid_loss(key, target):
    if key.startswith("adaptive_kl"):
        return divergence("adaptive-kl", mu=number(key, "mu"), compat="taid")
    if key.startswith("js"):
        return divergence("jsd", beta=number(key, "w"))
    alpha, beta, temperature = (number(key, letter) for letter in ("_a", "_b", "_T"))
    return lambda student, teacher: decoupled_kl(
        student, teacher, target, alpha=alpha, beta=beta, temperature=temperature, square_temperature=True
    )


@pytest.mark.parametrize("key", keys(TAID, "loss."))
def test_taid_repository(key):
    student, mask = TAID.tensors["student_logits"].clone().requires_grad_(), TAID.tensors["mask"].bool()
    chosen = select_tokens(mask, student, TAID.tensors["teacher_logits"], TAID.tensors["dkd_target"])
    # Its DKD divides by all positions, masked ones too.
    count = mask.numel() if key.startswith("dkd") else None
    loss = reduce_tokens(taid_loss(key, chosen[2])(*chosen[:2]), count)
    loss.backward()
    TAID.check(f"loss.{key}", loss)
    TAID.check(f"grad_student.{key}", student.grad, of_largest=True)


@pytest.mark.parametrize("key", keys(GKD, "loss."))
def test_gkd(key):
    student, mask = GKD.tensors["student_logits"].clone().requires_grad_(), label_mask(GKD.tensors["labels"])
    loss_of = divergence("jsd", beta=number(key, "beta"))
    values = loss_of(*select_tokens(mask, student, GKD.tensors["teacher_logits"]), number(key, "_T"))
    loss = reduce_tokens(values, 20 if key.endswith("items20") else None)
    loss.backward()
    GKD.check(f"loss.{key}", loss)
    if not key.endswith("items20"):
        GKD.check(f"grad_student.{key}", student.grad, of_largest=True)


@pytest.mark.parametrize("key", keys(GKD, "minillm_adv."))
def test_trl_advantages(key):
    rewards = token_rewards(GKD.tensors["mini_teacher_lp"], GKD.tensors["mini_student_lp"])
    got = advantages(
        rewards,
        GKD.tensors["mini_mask"].bool(),
        gamma=number(key, "gamma"),
        normalise_length=key.endswith("lennorm1"),
        compat="trl",
    )
    GKD.check(f"minillm_adv.{key}", got, of_largest=True)


def test_nothing_recorded_is_left_out():
    inputs = {"student_logits", "teacher_logits", "label", "labels", "mask", "dkd_target"}
    inputs |= {"mini_student_lp", "mini_teacher_lp", "mini_mask"}
    for case in (DISTILLM, TAID, GKD):
        for name in case.tensors:
            tested = (
                name.startswith(("loss.", "minillm_adv.")) or name.replace("grad_student.", "loss.") in case.tensors
            )
            assert tested or name in inputs, name
    assert not any(torch.isnan(tensor.float()).any() for tensor in GKD.tensors.values())
