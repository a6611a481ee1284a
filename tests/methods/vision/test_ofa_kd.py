"""OFA: exits of every family, the loss worked out by hand, students of timm."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.registry import method_class
from limbeck.core.specs import ModelSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Renormalise, TeacherSignal
from limbeck.methods.vision.exit_branches import (
    Layout,
    PatchMerging,
    TokenExit,
    exit_branch,
    last_stages,
    layout_of,
    map_exit,
    readout_width,
    separable_block,
)
from limbeck.methods.vision.mixing import mixed
from limbeck.models.build import build_model
from limbeck.models.mlp import MLP
from limbeck.models.saved import save_model
from limbeck.objectives.target_enhanced import target_enhanced
from tests.methods.classic.rig import batch, build, labels_loss, stages, student_net, teacher_net, update_of, vit
from tests.oracles.oracle import load

CASES = {case.name: case for case in load("ofa-kd")}
FAMILIES = {
    "cnn": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": 64}),
    "registers": ("test_vit3", {"img_size": 64}),
    "two-tokens": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2}),
    "mixer": ("mixer_s32_224", {"img_size": 64}),
    "mlp": ("gmlp_ti16_224", {"img_size": 64}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
    ),
    "channels-last-cnn": ("test_mambaout", {}),
}


def student_of(family: str) -> nn.Module:
    """A tiny student of timm, always the same, for 64x64 images of five classes."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments)


def images(items: int = 4) -> Batch:
    image = torch.randn(items, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return Batch({"image": image, "label": torch.arange(items) % 5, "index": torch.arange(items)})


def timm_method(student: nn.Module, teacher: nn.Module | None = None, **options):
    torch.manual_seed(1)
    kind = method_class("ofa-kd")
    mean, std = [0.5] * 3, [0.25] * 3
    teacher = teacher or timm.create_model("test_convnext", num_classes=5)
    live = LiveTeacher(teacher, Renormalise((mean, std), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])))
    data = DataInfo(100, 5, images(2))
    return kind(kind.Options(**options), student=student, teacher=live, data=data).train()


def test_separable_blocks_are_those_of_the_original():
    case = CASES["sepconv_train"]
    block = separable_block(4, 8)
    given = {name.removeprefix("op_"): value for name, value in case.inputs.items() if name.startswith("op_")}
    for name, value in given.items():
        number, _, part = name.partition("_")
        block[int(number)].state_dict()[part].copy_(value)
    case.check("y", block.train()(case.inputs["x"]))


def test_patch_merging_is_that_of_the_original():
    case = CASES["patch_merging"]
    merging = PatchMerging(6, 10, (4, 4))
    for parameter, name in ((merging.norm.weight, "ln_w"), (merging.norm.bias, "ln_b"), (merging.linear.weight, "w")):
        parameter.data.copy_(case.inputs[name])
    case.check("y", merging(case.inputs["x"]))


def test_an_odd_grid_is_filled_up_with_zeros():
    merging, patches = PatchMerging(2, 3, (3, 5)), torch.randn(2, 15, 2)
    whole = PatchMerging(2, 3, (4, 6))
    whole.load_state_dict(merging.state_dict())
    filled = torch.zeros(2, 4, 6, 2)
    filled[:, :3, :5] = patches.view(2, 3, 5, 2)
    torch.testing.assert_close(merging(patches), whole(filled.flatten(1, 2)))
    assert merging(patches).shape == (2, 6, 3)


def test_exits_on_maps_double_their_width_up_to_the_widest_side():
    widths = [m.out_channels for m in map_exit(6, 3, 40, 5).modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert widths == [6, 12, 12, 24, 24, 40]
    last = map_exit(6, 0, 40, 5)
    assert [type(module) for module in last[0]] == [nn.Conv2d]
    assert last[0][0].kernel_size == (1, 1)
    assert last(torch.randn(2, 6, 3, 3)).shape == (2, 5)


@pytest.mark.parametrize(("side", "merges"), [(4, 0), (7, 0), (13, 0), (14, 1), (16, 1), (28, 2), (56, 3)])
def test_tokens_are_merged_down_to_about_seven_by_seven(side, merges):
    made = TokenExit(Layout("tokens", 8, (side, side), prefix=1, class_token=True), 8, 1, 5)
    assert sum(isinstance(module, PatchMerging) for module in made.modules()) == merges
    assert made(torch.randn(2, 1 + side**2, 8)).shape == (2, 5)


def test_widths_that_differ_are_brought_together_by_a_linear_map():
    made = TokenExit(Layout("tokens", 8, (2, 2), prefix=2, class_token=False), 12, 2, 5)
    assert isinstance(made.merge, nn.Linear)
    assert isinstance(made.align, nn.Linear)
    assert made(torch.randn(2, 6, 8)).shape == (2, 5)


def test_the_class_token_is_read_or_else_the_mean_over_the_patches():
    tokens = torch.randn(3, 5, 8)
    for layout, read in (
        (Layout("tokens", 8, (2, 2), 1, True), lambda hidden: hidden[:, 0]),
        (Layout("tokens", 8, (2, 2), 1, False), lambda hidden: hidden[:, 1:].mean(1)),
    ):
        made = exit_branch(layout, 0, 8, 8, 5)
        torch.testing.assert_close(made(tokens), made.head(read(made.blocks(tokens))))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("cnn", [("maps", 32), ("maps", 48), ("maps", 192), ("maps", 96)]),
        ("vit", [("tokens", 64, (4, 4), 1, True)] * 4),
        ("registers", [("tokens", 96, (4, 4), 1, False)] * 4),
        ("two-tokens", [("tokens", 16, (4, 4), 2, True)] * 4),
        ("mixer", [("tokens", 512, (2, 2))] * 4),
        ("swin", [("tokens", 8 * 2**i, (16 >> i, 16 >> i)) for i in range(4)]),
        ("channels-last-cnn", [("tokens", width, (16 >> i,) * 2) for i, width in enumerate((16, 32, 48, 64))]),
    ],
)
def test_students_of_timm_get_exits_at_four_stages(family, expected):
    method = timm_method(student_of(family))
    given, image = features(method), images().image
    found = [layout_of(f, image, method.student, path) for f, path in zip(given, method.layers, strict=True)]
    assert found == [Layout(*layout) for layout in expected]
    assert [branch(f).shape for branch, f in zip(method.exits, given, strict=True)] == [(4, 5)] * 4


def features(method) -> list[torch.Tensor]:
    with torch.no_grad():
        return method.observe(images())[1]


@pytest.mark.parametrize("family", ["cnn", "vit", "mixer", "swin"])
def test_gradients_of_the_exits_reach_the_first_stage_and_nothing_else_is_changed(family):
    method = timm_method(student_of(family), label_weight=0, weight=0)
    update = update_of(method, images())
    update.loss.backward()
    early = method.student.get_submodule(method.layers[0])
    assert any(parameter.grad.abs().sum() > 0 for parameter in early.parameters() if parameter.grad is not None)
    for name, parameter in method.exits.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in method.teacher.model.parameters())
    assert update.player == "student"


def test_removing_the_exits_leaves_the_student_as_it_is():
    method = timm_method(student_of("swin"))
    before = student_of("swin").eval()(images().image)
    assert torch.equal(method.result().eval()(images().image), before)
    assert method.result().state_dict().keys() == student_of("swin").state_dict().keys()
    assert not method.student.layers[0]._forward_hooks


PROGRAM = """
import sys
sys.modules["limbeck"] = None  # any import of it fails
import timm, torch
torch.set_num_threads(1)
for family in ("cnn", "vit", "mlp", "swin"):
    model = timm.create_model(f"local-dir:{family}", pretrained=True).eval()
    image, expected = (torch.load(f"{name}.pt", weights_only=True) for name in ("image", family))
    with torch.no_grad():
        assert torch.equal(model(image), expected)
"""


def test_the_students_load_in_stock_timm_in_a_fresh_process(tmp_path):
    torch.save(images().image, tmp_path / "image.pt")
    for family in ("cnn", "vit", "mlp", "swin"):
        name, arguments = FAMILIES[family]
        spec = ModelSpec(name=f"timm:{name}", arguments=arguments)
        method = timm_method(build_model(spec, DataInfo(100, 5, images(2)), seed=0))
        optimizer = torch.optim.SGD(method.players()["student"].parameters(), lr=0.01)
        update_of(method, images()).loss.backward()
        optimizer.step()
        save_model(method.result(), tmp_path / family)
        with torch.no_grad():
            torch.save(method.result().eval()(images().image), tmp_path / f"{family}.pt")
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True)


@pytest.mark.parametrize("powers", [None, [1.0, 1.2, 2.0]])
def test_the_loss_is_the_weighted_sum_of_its_three_terms(powers):
    method = build(
        "ofa-kd", label_weight=0.3, weight=0.7, exit_weight=0.2, power=1.4, temperature=2, exit_powers=powers
    )
    outputs, ours = stages(method.student, batch().image)
    with torch.no_grad():
        theirs = method.teacher.model(batch().image)
    settings = {"temperature": 2.0}
    own = target_enhanced(ours, theirs, batch().label, power=1.4, **settings)
    exits = sum(
        target_enhanced(branch(feature), theirs, batch().label, power=power, **settings)
        for branch, feature, power in zip(method.exits, outputs, powers or [1.4] * 3, strict=True)
    )
    update = update_of(method)
    torch.testing.assert_close(update.loss, 0.3 * labels_loss(ours) + 0.7 * own + 0.2 * exits)
    torch.testing.assert_close(update.logs["exits"], exits)
    assert update.weight == 6


def test_the_defaults_are_the_papers():
    options = method_class("ofa-kd").Options()
    weights = (options.label_weight, options.weight, options.exit_weight, options.temperature)
    assert weights == (1, 1, 1, 1)
    assert options.power == 1.5


def test_without_exits_and_at_power_one_it_is_soft_labels():
    method = build("ofa-kd", exit_weight=0, power=1)
    soft = build("soft-ce", label_weight=1, weight=1, temperature=1)
    torch.testing.assert_close(update_of(method).loss, update_of(soft).loss)
    assert method.players() == {"student": method.student}


def test_exits_are_trained_in_train_mode_and_with_the_student():
    method = build("ofa-kd")
    norms = [module for module in method.exits.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training and not norm.num_batches_tracked for norm in norms)  # none saw the example
    update_of(method)
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    trained = {id(parameter) for parameter in method.players()["student"].parameters()}
    assert {id(p) for p in (*method.student.parameters(), *method.exits.parameters())} == trained


def test_exits_on_maps_are_as_wide_as_the_wider_side():
    assert build("ofa-kd").exits[-1][-1].in_features == 24  # the teacher's 6 * 4, the student has 4 * 4
    assert build("ofa-kd", teacher=teacher_net(width=2)).exits[-1][-1].in_features == 16
    both = Ensemble([LiveTeacher(teacher_net(width=2)), LiveTeacher(teacher_net(width=9))])
    assert build("ofa-kd", teacher=both).exits[-1][-1].in_features == 36


def test_a_black_box_that_gives_logits_will_do():
    class Oracle:
        def signal(self, items, layers=()):
            return TeacherSignal(torch.eye(10)[items["label"]])

        def to(self, device):
            pass

    method = build("ofa-kd", teacher=Oracle())
    assert method.exits[-1][-1].in_features == 16
    assert update_of(method).loss.isfinite()


def test_an_mlp_carries_linear_exits():
    torch.manual_seed(0)
    method = build("ofa-kd", student=MLP(64, width=12, depth=3))
    assert [type(branch) for branch in method.exits] == [nn.Linear] * 3
    update_of(method).loss.backward()
    assert all(branch.weight.grad.abs().sum() > 0 for branch in method.exits)


def test_the_shipped_transformer_is_read_at_its_class_token():
    method = build("ofa-kd", student=vit(distilled=True))
    assert [branch.layout for branch in method.exits] == [Layout("tokens", 8, (4, 4), 2, True)] * 3


@pytest.mark.parametrize(
    ("count", "chosen"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [1, 2, 3, 4]), (12, [2, 5, 8, 11])]
)
def test_four_stages_are_chosen(count, chosen):
    assert last_stages([str(place) for place in range(count)]) == [str(place) for place in chosen]


def test_stages_can_be_named():
    method = build("ofa-kd", stages=["stages.0", "stages.2"])
    assert method.layers == ["stages.0", "stages.2"]
    assert len(method.exits) == 2


@pytest.mark.parametrize("label", [None, torch.full((6,), -100)])
def test_items_without_labels_take_the_teachers_class(label):
    items = batch()
    plain = Batch({"image": items.image}) if label is None else items.replace(label=label)
    method = build("ofa-kd", exit_weight=0)
    with torch.no_grad():
        guess = method.teacher.model(items.image).argmax(1)
    update, told = update_of(method, plain), update_of(method, items.replace(label=guess))
    assert float(update.logs["cross_entropy"].detach()) == 0
    torch.testing.assert_close(update.logs["objective"], told.logs["objective"])


def test_mixed_images_count_by_their_larger_part():
    method = build("ofa-kd", mixup=0.8, cutmix=1.0, exit_weight=0)
    torch.manual_seed(3)
    first, second = update_of(method).loss, update_of(method).loss
    torch.manual_seed(3)
    assert torch.equal(update_of(method).loss, first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    made = mixed(batch(), 10, mixup_alpha=0.8, cutmix_alpha=1.0)
    logits = method.student(made.image)
    with torch.no_grad():
        target = method.teacher.model(made.image)
    soft = nn.functional.cross_entropy(logits, made.label)
    torch.testing.assert_close(first, soft + target_enhanced(logits, target, made.label))


def test_mixed_images_without_labels_take_the_teachers_class():
    method = build("ofa-kd", mixup=0.8)
    update = update_of(method, Batch({"image": batch().image}))
    assert float(update.logs["cross_entropy"].detach()) == 0
    assert update.loss.isfinite()


def test_what_cannot_be_is_refused():
    with pytest.raises(IncompatibleError, match="2 exit_powers for 3 exits"):
        build("ofa-kd", exit_powers=[1.0, 2.0])
    with pytest.raises(IncompatibleError, match=r"no layer 'stage\.0'"):
        build("ofa-kd", stages=["stage.0"])
    with pytest.raises(IncompatibleError, match="there is no exit"):
        layout_of(torch.zeros(8, 3), torch.zeros(2, 1, 4, 4), nn.Identity(), "x")
    with pytest.raises(IncompatibleError, match="fill no grid"):
        layout_of(torch.zeros(2, 42, 3), torch.zeros(2, 1, 4, 4), nn.Identity(), "x")
    with pytest.raises(IncompatibleError, match="classes"):
        update_of(build("ofa-kd", teacher=teacher_net(classes=7)))


def test_a_stage_that_is_never_called_is_named():
    student = student_net()
    student.aside = nn.Linear(2, 2)
    with pytest.raises(IncompatibleError, match="not called as a module"):
        build("ofa-kd", student=student, stages=["aside"])


def test_grids_have_the_ratio_of_the_image():
    image = torch.zeros(2, 1, 8, 16)
    assert layout_of(torch.zeros(2, 33, 4), image, nn.Identity(), "x") == Layout("tokens", 4, (4, 8), 1, True)


@pytest.mark.parametrize(("family", "width"), [("cnn", 96), ("vit", 64), ("mixer", 512), ("swin", 64)])
def test_the_width_in_front_of_the_head_is_found(family, width):
    assert readout_width(student_of(family), 5) == width
    assert readout_width(nn.Sequential(nn.Linear(4, 3)), 5) == 0
