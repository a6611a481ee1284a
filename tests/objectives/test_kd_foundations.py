"""Every recorded case of the classic objectives: values and gradients of the original code."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.oracle import load

from limbeck.objectives.channels import ickd, nst
from limbeck.objectives.contrastive import crd, crd_normaliser, crd_scores, update_bank
from limbeck.objectives.features import attention_transfer, hierarchical_context_loss, partial_l2, vid, vid_log_scale
from limbeck.objectives.logits import dist, kd, standardise_logits
from limbeck.objectives.operands import pool_to_smaller
from limbeck.objectives.relations import pkt, rkd, similarity_preserving
from limbeck.objectives.similarity import cka, linear_cka, rbf_cka
from limbeck.objectives.target_class import dkd, nkd

CASES = load("kd-foundations")


def hinton(case, zs):
    return kd(zs, case.inputs["zt"], temperature=case.hyperparameters["T"])


def standardised(case, zs):
    case.check("norm_zs", standardise_logits(zs))
    return kd(standardise_logits(zs), standardise_logits(case.inputs["zt"]), temperature=case.hyperparameters["T"])


def decoupled(case, zs):
    options = case.hyperparameters
    return dkd(
        zs,
        case.inputs["zt"],
        case.inputs["y"],
        temperature=options["T"],
        target_weight=options["alpha"],
        non_target_weight=options["beta"],
    )


def stronger_teacher(case, zs):
    options, zt = case.hyperparameters, case.inputs["zt"]
    temperature = options["tau"]
    case.check("inter", dist(zs, zt, temperature=temperature, intra_weight=0.0) / temperature**2)
    case.check("intra", dist(zs, zt, temperature=temperature, inter_weight=0.0) / temperature**2)
    return dist(zs, zt, temperature=temperature, inter_weight=options["beta"], intra_weight=options["gamma"])


def normalised(case, zs):
    options = case.hyperparameters
    return nkd(
        zs,
        case.inputs["zt"],
        case.inputs["y"],
        temperature=options["temp"],
        non_target_weight=options["gamma"],
    )


def relational(case, fs):
    options = case.hyperparameters
    return rkd(
        fs,
        case.inputs["ft"],
        distance_weight=float(options["distance_weight"]),
        angle_weight=float(options["angle_weight"]),
        squared=options["squared"],
    )


def attention(case, fs):
    return attention_transfer(fs, case.inputs["ft"], power=case.hyperparameters["p"])


def overhaul(case, fs):
    return partial_l2(fs, case.inputs["ft"], case.inputs["margin"].flatten())


def information(case, fs):
    start = vid_log_scale(case.hyperparameters["init_pred_var"], eps=case.hyperparameters["eps"])
    assert math.log1p(math.exp(start)) + 1e-5 == pytest.approx(5.0)
    mean, target = pool_to_smaller(fs, case.inputs["ft"])
    for name in ("w1", "w2"):
        mean = F.conv2d(mean, case.inputs[name]).relu()
    return vid(F.conv2d(mean, case.inputs["w3"]), target, case.inputs["log_scale"], eps=case.hyperparameters["eps"])


def contrastive(case, fs):
    given, options = case.inputs, case.hyperparameters
    student = F.normalize(F.linear(fs, given["Ws"], given["bs"]), dim=1)
    teacher = F.normalize(F.linear(given["ft"], given["Wt"], given["bt"]), dim=1)
    student_bank, teacher_bank, drawn = given["memory_v1"], given["memory_v2"], given["contrast_idx"]
    assert torch.equal(drawn[:, 0], given["idx"])
    assert drawn.shape[1] == options["K"] + 1

    student_scores = crd_scores(student, teacher_bank, drawn, temperature=options["tau"])
    teacher_scores = crd_scores(teacher, student_bank, drawn, temperature=options["tau"])
    student_z = crd_normaliser(student_scores, samples=options["n_data"])
    teacher_z = crd_normaliser(teacher_scores, samples=options["n_data"])
    case.check("Z_v1", student_z)
    case.check("Z_v2", teacher_z)
    case.check("out_s", (student_scores / student_z)[..., None])
    case.check("out_t", (teacher_scores / teacher_z)[..., None])
    for name, bank, embedding in (("memory_v1", student_bank, student), ("memory_v2", teacher_bank, teacher)):
        after = update_bank(bank, embedding, given["idx"], momentum=options["momentum"])
        case.check(f"{name}_after", after, of_largest=True)
    return crd(
        student,
        teacher,
        student_bank,
        teacher_bank,
        drawn,
        student_normaliser=student_z,
        teacher_normaliser=teacher_z,
        temperature=options["tau"],
    )


def plain(objective):
    return lambda case, fs: objective(fs, case.inputs["ft"])


LOSSES = {
    "hinton_kd": hinton,
    "logit_std_kd": standardised,
    "dkd": decoupled,
    "dist": stronger_teacher,
    "nkd": normalised,
    "rkd": relational,
    "sp": plain(similarity_preserving),
    "at": attention,
    "review_hcl": plain(hierarchical_context_loss),
    "ofd_partial_l2": overhaul,
    "crd_first_step": contrastive,
    "pkt": plain(pkt),
    "nst": plain(nst),
    "vid": information,
    "ickd": plain(ickd),
}
ALIGNMENTS = ("cka", "cka_google")


def loss_of(name):
    return max((prefix for prefix in LOSSES if name == prefix or name.startswith(prefix + "_")), key=len, default=None)


def test_every_case_has_a_test():
    assert len(CASES) == 27
    assert [case.name for case in CASES if case.name not in ALIGNMENTS and loss_of(case.name) is None] == []


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ALIGNMENTS], ids=lambda case: case.name)
def test_loss(case):
    student = "zs" if "zs" in case.inputs else "fs"
    leaf = case.inputs[student].clone().requires_grad_()

    loss = LOSSES[loss_of(case.name)](case, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)

    case.check("loss", loss, of_largest=True)
    case.check(f"grad_{student}", gradient, of_largest=True)


def test_cka():
    case = next(case for case in CASES if case.name == "cka")
    x, y = case.inputs["X"], case.inputs["Y"]
    case.check("linear", linear_cka(x, y))
    case.check("linear", cka(x @ x.T, y @ y.T))
    case.check("linear_self", linear_cka(x, x))
    case.check("rbf", rbf_cka(x, y))


def test_cka_google():
    case = next(case for case in CASES if case.name == "cka_google")
    x, y = case.inputs["X"], case.inputs["Y"]
    case.check("linear", linear_cka(x, y))
    case.check("linear_debiased", linear_cka(x, y, debiased=True))
    case.check("gram_debiased", cka(x @ x.T, y @ y.T, debiased=True))
    case.check("rbf", rbf_cka(x, y, threshold=case.hyperparameters["rbf_threshold"]))
