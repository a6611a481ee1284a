"""What all feature methods share: which layers are paired, what errors say, and features of every shape."""

import pytest
import timm
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.methods.classic.feature_method import channel_counts, pooled, spatial
from limbeck.models.mlp import MLP
from limbeck.objectives.logits import kd
from tests.methods.classic.rig import (
    both,
    build,
    check_gradients,
    labels_loss,
    student_net,
    teacher_net,
    update_of,
    vit,
)

ANY_SHAPES = ["sp", "rkd", "pkt", "crd", "fitnet", "vid"]
POSITIONS = ["at", "nst", "review-kd", "ickd"]


def test_stages_are_aligned_at_their_ends():
    method = build("at", student=student_net(depth=2), teacher=teacher_net(depth=3))
    assert method.student_layers == ["stages.0", "stages.1"]
    assert method.teacher_layers == ["stages.1", "stages.2"]


def test_layers_are_named_by_path_or_glob():
    method = build("at", student_layers=["stages.?.norm"], teacher_layers=["stages.0", "stages.1", "stages.2"])
    assert method.student_layers == ["stages.0.norm", "stages.1.norm", "stages.2.norm"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"student_layers": ["stages.0"]}, "1 student layers cannot be paired with 3 teacher layers"),
        ({"student_layers": ["stages.*"], "teacher_layers": ["stages.1"]}, "cannot be paired"),
        ({"student_layers": ["stage.0"]}, r"no layer 'stage.0' in ConvNet[\s\S]*did you mean 'stages.0'"),
        ({"teacher_layers": ["nowhere"]}, "no layer 'nowhere'"),
    ],
)
def test_layers_that_cannot_be_paired_are_refused(layers, message):
    with pytest.raises(IncompatibleError, match=message):
        build("at", **layers)


def test_an_ensemble_needs_named_layers_and_one_voice():
    teachers = [LiveTeacher(teacher_net()), LiveTeacher(teacher_net())]
    with pytest.raises(IncompatibleError, match="teacher_layers"):
        build("at", teacher=Ensemble(teachers))
    named = {"student_layers": ["stages.1"], "teacher_layers": ["stages.1"]}
    with pytest.raises(IncompatibleError, match="averaged"):
        build("at", teacher=Ensemble(teachers), **named)
    assert update_of(build("at", teacher=Ensemble(teachers, "random"), **named)).loss.isfinite()


def test_a_hinton_term_can_be_added():
    method = build("at", label_weight=0.3, weight=0.0, kd_weight=0.5, temperature=2.0)
    _, ours, _, theirs = both(method)
    torch.testing.assert_close(
        update_of(method).loss, 0.3 * labels_loss(ours) + 0.5 * kd(ours, theirs, temperature=2.0)
    )


@pytest.mark.parametrize(("kd_weight", "runs"), [(0.0, False), (1.0, True)])
def test_the_teacher_runs_as_far_as_it_is_needed(kd_weight, runs):
    teacher, reached = teacher_net(), []
    method = build("at", teacher=teacher, kd_weight=kd_weight)
    teacher.head.register_forward_hook(lambda module, args, output: reached.append(True))
    assert update_of(method).loss.isfinite()
    assert bool(reached) is runs


def test_reading_the_shapes_moves_no_batch_norm_and_keeps_the_mode():
    student = student_net()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    student.train()
    build("fitnet", student=student)
    assert student.training
    assert all(torch.equal(before[name], buffer) for name, buffer in student.named_buffers())


@pytest.mark.parametrize("slug", [*ANY_SHAPES, *POSITIONS, "ofd"])
def test_tokens_of_a_transformer_are_matched_with_maps(slug):
    method = build(slug, student=vit(), **({"negatives": 4} if slug == "crd" else {}))
    check_gradients(method)
    assert update_of(method).logs["objective"].isfinite()


@pytest.mark.parametrize("slug", [*ANY_SHAPES, *POSITIONS])
def test_tokens_are_matched_with_tokens(slug):
    method = build(slug, student=vit(), teacher=vit(dim=12), **({"negatives": 4} if slug == "crd" else {}))
    check_gradients(method)


@pytest.mark.parametrize("slug", POSITIONS)
def test_vectors_have_no_positions(slug):
    with pytest.raises(IncompatibleError, match="no positions"):
        update_of(build(slug, student=MLP(64, width=8)))


@pytest.mark.parametrize("slug", ANY_SHAPES)
def test_vectors_are_matched_with_vectors(slug):
    options = {"negatives": 4} if slug == "crd" else {}
    check_gradients(build(slug, student=MLP(64, width=8), teacher=MLP(64, width=12), **options))


def test_vectors_and_maps_meet_in_the_pooled_methods():
    check_gradients(build("rkd", student=MLP(64, width=8)))
    check_gradients(build("fitnet", student=student_net(), teacher=MLP(64, width=12)))


def test_timms_networks_say_their_stages():
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    method = build("at", student=student)
    assert method.student_layers == ["layer2", "layer3", "layer4"]
    assert update_of(method).loss.isfinite()


def test_tokens_are_laid_out_on_their_grid():
    maps = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    for before in (0, 1, 2, 5):
        tokens = torch.cat([torch.full((2, before, 3), -1.0), maps.flatten(2).mT], 1)
        assert torch.equal(spatial(tokens), maps)
    assert spatial(maps) is maps
    with pytest.raises(IncompatibleError, match="no square grid"):
        spatial(torch.zeros(2, 24, 3))
    with pytest.raises(IncompatibleError, match="no positions"):
        spatial(torch.zeros(2, 24))


def test_pooling_and_channels_of_every_shape():
    maps, tokens, vectors = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 3), torch.rand(2, 3)
    assert torch.equal(pooled(vectors), vectors)
    torch.testing.assert_close(pooled(tokens), tokens.mean(1))
    torch.testing.assert_close(pooled(maps), maps.flatten(2).mean(2))
    assert channel_counts([maps, tokens, vectors]) == [3, 3, 3]
