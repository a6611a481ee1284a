import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock, DataInfo
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.objectives.contrastive import crd, crd_normaliser, crd_scores, update_bank
from tests.methods.classic.rig import CLASSES, ITEMS, batch, both, build, check_gradients, labels_loss, update_of
from tests.oracles.oracle import load

(CASE,) = (case for case in load("kd-foundations") if case.name == "crd_first_step")


class Given(nn.Module):
    """A backbone whose features are a parameter, so that their gradient can be read, and a head of no weight."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features)
        self.backbone = nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.backbone(self.features[: len(image)])


def small(**options):
    return build("crd", **{"negatives": 5, "embedding_dim": 4, **options})


def test_a_whole_first_step_equals_the_original(monkeypatch):
    given, hyper = CASE.inputs, CASE.hyperparameters
    student, teacher = Given(given["fs"]), LiveTeacher(Given(given["ft"]))
    items = Batch({"image": torch.zeros(4, 1), "index": given["idx"]})
    kind = method_class("crd")
    options = kind.Options(
        embedding_dim=hyper["dim"], negatives=hyper["K"], momentum=hyper["momentum"], weight=1.0,
        contrast_temperature=hyper["tau"], negatives_from="everywhere",
        student_layers=["backbone"], teacher_layers=["backbone"],
    )  # fmt: skip
    method = kind(options, student=student, teacher=teacher, data=DataInfo(hyper["n_data"], 0, items.select(slice(2))))
    with torch.no_grad():
        for side, letter in {"student": "s", "teacher": "t"}.items():
            method.connectors[side].weight.copy_(given[f"W{letter}"])
            method.connectors[side].bias.copy_(given[f"b{letter}"])
    method.student_bank.copy_(given["memory_v1"])
    method.teacher_bank.copy_(given["memory_v2"])
    monkeypatch.setattr(method, "draw", lambda batch: given["contrast_idx"])
    updates = method.step(items)
    update = next(updates)
    assert torch.equal(method.student_bank, given["memory_v1"])  # banks move after the update
    update.loss.backward()
    assert next(updates, None) is None
    CASE.check("loss", update.loss)
    CASE.check("grad_fs", student.features.grad)
    CASE.check("Z_v1", method.student_normaliser)
    CASE.check("Z_v2", method.teacher_normaliser)
    CASE.check("memory_v1_after", method.student_bank)
    CASE.check("memory_v2_after", method.teacher_bank)


def test_the_loss_is_the_weighted_sum_on_pooled_features():
    method = small(label_weight=0.3, weight=0.7)
    banks = method.student_bank.clone(), method.teacher_bank.clone()
    pairs = method.draw(batch())
    method.draw = lambda batch: pairs
    features, ours, targets, _ = both(method)
    student, teacher = (
        nn.functional.normalize(method.connectors[side](maps[-1].mean((2, 3))), dim=1)
        for side, maps in {"student": features, "teacher": targets}.items()
    )
    zs = crd_normaliser(crd_scores(student, banks[1], pairs), samples=ITEMS)
    zt = crd_normaliser(crd_scores(teacher, banks[0], pairs), samples=ITEMS)
    term = crd(student, teacher, *banks, pairs, student_normaliser=zs, teacher_normaliser=zt)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    torch.testing.assert_close(method.student_bank, update_bank(banks[0], student, batch().index))
    torch.testing.assert_close(method.teacher_bank, update_bank(banks[1], teacher, batch().index))


def test_gradients_reach_the_student_and_both_embeddings():
    check_gradients(small())


def test_defaults_are_those_of_the_paper():
    options = build("crd").options
    assert (options.weight, options.embedding_dim, options.negatives) == (0.8, 128, 16384)
    assert (options.contrast_temperature, options.momentum, options.negatives_from) == (0.07, 0.5, "other_classes")


def test_z_is_fixed_by_the_first_batch():
    method = small()
    update_of(method, batch(6))
    first = method.student_normaliser.clone(), method.teacher_normaliser.clone()
    assert min(first) > 0
    update_of(method, batch(4))
    assert (method.student_normaliser, method.teacher_normaliser) == first


def test_a_batch_with_a_nan_leaves_no_trace():
    method, broken = small(), batch()
    banks = method.student_bank.clone(), method.teacher_bank.clone()
    update = update_of(method, broken.replace(image=broken.image * torch.nan))
    assert update.loss.isnan()
    assert torch.equal(method.student_bank, banks[0])
    assert torch.equal(method.teacher_bank, banks[1])
    for module in method.modules():  # the student's own statistics are its own affair
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert update_of(method).loss.isfinite()


def test_negatives_come_from_other_classes():
    labels = torch.arange(ITEMS) % CLASSES
    method = small(negatives=200)
    assert torch.equal(method.classes, labels)
    pairs = method.draw(Batch({"image": torch.zeros(4, 1), "label": labels[:4], "index": torch.arange(4)}))
    assert pairs.shape == (4, 201)
    assert torch.equal(pairs[:, 0], torch.arange(4))
    assert (labels[pairs[:, 1:]] != labels[:4, None]).all()
    assert len(pairs[0, 1:].unique()) == (labels != 0).sum()


def test_negatives_from_everywhere_need_no_labels():
    method = small(negatives_from="everywhere", negatives=200)
    pairs = method.draw(Batch({"image": torch.zeros(2, 1), "index": torch.tensor([4, 9])}))
    assert pairs[:, 0].tolist() == [4, 9]
    assert len(pairs[0].unique()) == ITEMS


def test_draws_are_a_function_of_step_and_micro_batch():
    method = small(negatives_from="everywhere", negatives=50)
    drawn = {}
    for step in (1, 2, 1):
        method.clock = Clock(step=step, steps=9, seed=step)
        for part in (0, 1):
            torch.manual_seed(len(drawn))  # the ranks' own streams do not matter
            pairs = method.draw(batch())
            assert torch.equal(drawn.setdefault((step, part), pairs), pairs)
    assert len({tuple(pairs.flatten().tolist()) for pairs in drawn.values()}) == 4


def test_data_that_number_no_items_or_hold_no_classes_are_refused():
    kind, teacher = method_class("crd"), build("crd").teacher
    student, example = build("crd").student, batch(2)

    def made(info, **options):
        return kind(kind.Options(**options), student=student, teacher=teacher, data=info)

    bare = Batch({"image": example.image, "label": example.label})
    with pytest.raises(IncompatibleError, match="number their items"):
        made(DataInfo(ITEMS, 10, bare, labels=torch.arange(ITEMS) % 10))
    with pytest.raises(IncompatibleError, match=r"at least two classes[\s\S]*everywhere"):
        made(DataInfo(ITEMS, 1, example, labels=torch.zeros(ITEMS, dtype=torch.long)))
    assert made(DataInfo(ITEMS, 0, example), negatives_from="everywhere").student_bank.shape == (ITEMS, 128)
