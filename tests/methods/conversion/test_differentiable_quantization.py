import copy

import pytest
import torch
from torch import nn

from limbeck.compression.allocation import allocate
from limbeck.compression.points import quantile_points, quantize_to_points
from limbeck.compression.quantized import even_points, quantization_of
from limbeck.core.method import Clock
from limbeck.core.registry import method_class
from limbeck.models.convnet import ConvNet
from limbeck.models.export import export_model
from limbeck.models.mlp import MLP
from limbeck.objectives.logits import kd
from tests.methods.classic.rig import batch, build

SLUG = "differentiable-quantization"


def student() -> MLP:
    torch.manual_seed(7)
    return MLP(width=8, depth=1)


def method(**options):
    return build(SLUG, student=student(), **{"bucket": 16, "distillation_weight": 1.0, **options})


def test_points_begin_at_quantiles_or_evenly():
    made = method(count=5)
    for (name, weights), points in zip(made.student.named_parameters(), made.points(), strict=True):
        assert torch.equal(points, quantile_points(weights, 5, bucket=16)), name
    assert all(torch.equal(points, even_points(8)) for points in method(count=3, unit="bits", start="uniform").points())


def test_the_gradient_is_that_of_points_gathered_by_hand():
    made, items = method(count=4), batch()
    tables = [points.detach().clone().requires_grad_() for points in made.points()]
    network = copy.deepcopy(made.student)
    for (path, weights), points in zip(list(made.student.named_parameters()), tables, strict=True):
        fixed = quantize_to_points(weights.detach(), points, bucket=16)
        size = min(16, weights.numel())
        alpha = fixed.alpha.repeat_interleave(size)[: weights.numel()]
        beta = fixed.beta.repeat_interleave(size)[: weights.numel()]
        owner, _, name = path.rpartition(".")
        del network.get_submodule(owner)._parameters[name]
        setattr(network.get_submodule(owner), name, (alpha * points[fixed.indices.long()] + beta).view_as(weights))
    expected = kd(network(items.image), made.teacher.signal(items).logits, temperature=2.0)
    expected.backward()
    update = next(made.step(items))
    torch.testing.assert_close(update.loss, expected)
    update.loss.backward()
    for points, table in zip(made.points.points, tables, strict=True):
        torch.testing.assert_close(points.grad, table.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in made.student.parameters())


def test_the_weights_stay_and_points_are_sorted_after_each_step():
    made = method(count=4)
    before = copy.deepcopy(made.student.state_dict())
    with torch.no_grad():
        made.points.points[0].copy_(torch.tensor([0.7, 0.1, 0.9, 0.4]))
    made.after_update("points", {})
    assert made.points()[0].tolist() == pytest.approx([0.1, 0.4, 0.7, 0.9])
    result = made.result()
    assert all(torch.equal(value, before[name]) for name, value in made.student.state_dict().items())
    assert all(parameter.requires_grad for parameter in result.parameters())
    for name, weights in result.named_parameters():
        assert torch.equal(weights, made.quantized_weights()[name])
        assert quantization_of(result)[name].levels == 4


def test_learning_brings_the_network_closer_to_itself():
    original = student()
    made = build(
        SLUG, student=student(), teacher=original, bucket=16, distillation_weight=1.0, start="uniform", count=3
    )
    items = batch(20)
    optimizer = torch.optim.Adam(made.points.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        update = next(made.step(items))
        losses.append(float(update.loss.detach()))
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
        made.after_update("points", {})
    assert min(losses[-5:]) < 0.75 * losses[0]


def test_statistics_of_batch_norms_are_estimated_again_and_kept():
    torch.manual_seed(0)
    made = build(SLUG, student=ConvNet(width=4, depth=2))
    before = made.student.state_dict()["stages.0.norm.running_mean"].clone()
    next(made.step(batch()))
    after = made.result().state_dict()["stages.0.norm.running_mean"]
    assert not torch.equal(after, before)
    assert torch.equal(after, made.student.state_dict()["stages.0.norm.running_mean"])


@pytest.mark.parametrize(("unit", "count"), [("points", 6), ("bits", 3)])
def test_points_are_shared_out_by_the_norms_of_gradients(unit, count):
    made = method(count=count, unit=unit, allocation="gradient-norm", allocation_steps=2)
    assert set(made.points.sizes()) == {count if unit == "points" else 2**count}
    norms = torch.zeros(len(made.names))
    for step, seed in ((0, 0), (1, 1)):
        items = batch()
        items = items.replace(image=items.image + seed)
        made.clock = Clock(step=step)
        update = next(made.step(items))
        update.loss.backward()
        assert update.loss == 0
        assert all(points.grad is None or (points.grad == 0).all() for points in made.points.parameters())
        network = copy.deepcopy(made.student)
        nn.functional.cross_entropy(network(items.image), items.label).backward()
        norms += torch.stack([parameter.grad.norm() for parameter in network.parameters()])
        made.after_update("points", {})
    torch.testing.assert_close(made.norms, norms, rtol=1e-4, atol=1e-6)
    shared = allocate(norms.tolist(), count, unit)
    assert len(set(shared)) > 1
    assert made.points.sizes() == (shared if unit == "points" else [min(256, 2**bits) for bits in shared])
    made.clock = Clock(step=2)
    assert next(made.step(batch())).loss > 0
    assert [tensor.levels for tensor in quantization_of(made.result()).values()] == made.points.sizes()


def test_what_was_shared_out_survives_resuming():
    options = {"count": 6, "allocation": "gradient-norm", "allocation_steps": 1}
    made = method(**options)
    made.clock = Clock(step=0)
    next(made.step(batch()))
    made.after_update("points", {})
    again = method(**options)
    again.load_state_dict(made.state_dict())
    assert again.points.sizes() == made.points.sizes() != [6] * 4
    again.clock = made.clock = Clock(step=3)
    assert torch.equal(next(again.step(batch())).loss, next(made.step(batch())).loss)


def test_figures_count_the_points(tmp_path):
    made = method(count=4)
    figures = made.figures()
    files = export_model(made.result(), tmp_path / "out", "quantized")
    assert figures["compact_bytes"] == next(f for f in files if f.suffix == ".safetensors").stat().st_size
    buckets = sum(len(tensor.alpha) for tensor in made.quantized_state().values())
    extra = (64 * buckets + 32 * 4 * len(made.names)) / figures["quantized_weights"]
    assert figures["bits_per_weight"] == pytest.approx(figures["huffman_bits"] + extra)


@pytest.mark.parametrize(
    "options", [{"count": 9, "unit": "bits"}, {"count": 1}, {"count": 3, "allocation": "gradient-norm"}]
)
def test_counts_that_leave_nothing_to_choose_are_refused(options):
    with pytest.raises(ValueError, match="count"):
        method_class(SLUG).Options(**options)
