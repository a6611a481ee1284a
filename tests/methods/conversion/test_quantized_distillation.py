import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.compression.quantized import quantization_of
from limbeck.compression.quantizers import quantize
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.core.teacher import LiveTeacher
from limbeck.models.export import export_model
from limbeck.models.mlp import MLP
from tests.methods.classic.rig import batch, build, teacher_net


def student(width: int = 8) -> MLP:
    torch.manual_seed(7)
    return MLP(width=width, depth=1)


def method(**options):
    return build("quantized-distillation", student=student(), **{"bucket": 16, "bits": 2, **options})


def terms(made, items):
    """Cross-entropy and divergence of each item, of the student with its weights quantised by hand."""
    network, options = copy.deepcopy(made.student), made.options
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(quantize(weights, 2**options.bits, bucket=options.bucket).dequantize())
    ours, theirs = network(items.image).log_softmax(1), []
    labels = F.nll_loss(ours, items.label, ignore_index=-100, reduction="none")
    told = made.teacher.signal(items).logits
    soft = (network(items.image) / options.temperature).log_softmax(1)
    target = (told / options.temperature).log_softmax(1)
    for row in range(items.size):
        theirs.append(sum(math.exp(t) * (t - s) for t, s in zip(target[row].tolist(), soft[row].tolist(), strict=True)))
    return network, labels, torch.tensor(theirs) * options.temperature**2


def test_the_loss_is_that_of_the_quantised_network():
    made, items = method(), batch()
    _, labels, matched = terms(made, items)
    update = next(made.step(items))
    torch.testing.assert_close(update.loss, 0.3 * labels.mean() + 0.7 * matched.mean(), rtol=1e-4, atol=1e-5)
    assert (update.player, update.weight) == ("student", 6)


def test_the_gradient_is_that_of_the_quantised_weights_and_lands_on_the_full_ones():
    made, items = method(distillation_weight=0.0), batch()
    before = copy.deepcopy(made.student.state_dict())
    network, labels, _ = terms(made, items)
    labels.mean().backward()
    next(made.step(items)).loss.backward()
    for ours, theirs in zip(made.student.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, made.student.state_dict()[name]) for name, value in before.items())


def test_without_the_teacher_it_is_plain_cross_entropy():
    made, items = method(distillation_weight=0.0, bits=8, bucket=1), batch()  # one weight a bucket: nothing is lost
    expected = F.cross_entropy(made.student(items.image), items.label)
    torch.testing.assert_close(next(made.step(items)).loss, expected)


def test_unlabelled_items_learn_from_the_teacher_alone():
    made, items = method(), batch()
    items = items.replace(label=torch.tensor([0, -100, 2, -100, 4, 5]))
    _, labels, matched = terms(made, items)
    assert labels[1] == 0
    torch.testing.assert_close(
        next(made.step(items)).loss, 0.3 * labels.mean() + 0.7 * matched.mean(), rtol=1e-4, atol=1e-5
    )


def test_the_published_code_divides_by_the_classes_too():
    items = batch()
    _, labels, matched = terms(method(), items)
    update = next(method(compat=True).step(items))
    torch.testing.assert_close(update.loss, 0.3 * labels.mean() + 0.07 * matched.mean(), rtol=1e-4, atol=1e-5)


class Counting(LiveTeacher):
    """Remembers how many items it was asked about."""

    def signal(self, batch, layers=()):
        self.asked = batch.size
        return super().signal(batch, layers)


@pytest.mark.parametrize("ask", ["entropy", "misclassified"])
def test_the_teacher_is_asked_about_some_items_only(ask):
    made, items = method(ask=ask, entropy_cutoff=1.2), batch(10)
    network, labels, matched = terms(made, items)
    probabilities = network(items.image).softmax(1)
    entropies = -(probabilities * probabilities.log()).sum(1)
    chosen = entropies > 1.2 if ask == "entropy" else probabilities.argmax(1) != items.label
    assert 0 < chosen.sum() < 10
    made.teacher = Counting(teacher_net())
    update = next(made.step(items))
    expected = torch.where(chosen, 0.3 * labels + 0.7 * matched, labels).mean()
    torch.testing.assert_close(update.loss, expected, rtol=1e-4, atol=1e-5)
    assert made.teacher.asked == chosen.sum()
    assert update.logs["asked"] == pytest.approx(float(chosen.sum()) / 10)


def test_a_sure_student_asks_nobody():
    made, items = method(ask="entropy", entropy_cutoff=20.0), batch()
    made.teacher = None  # would fail if it were asked
    _, labels, _ = terms(method(), items)
    torch.testing.assert_close(next(made.step(items)).loss, labels.mean(), rtol=1e-4, atol=1e-5)


def test_at_random_the_more_uncertain_items_are_asked_about_more_often():
    made, items = method(ask="random"), batch(10)
    network, _, _ = terms(made, items)
    probabilities = network(items.image).softmax(1)
    expected = float((-(probabilities * probabilities.log()).sum(1) / math.log(10)).mean())
    torch.manual_seed(0)
    shares = [float(next(made.step(items)).logs["asked"]) for _ in range(100)]
    assert sum(shares) / 100 == pytest.approx(expected, abs=0.06)
    assert len(set(shares)) > 2


def test_stochastic_rounding_is_the_same_for_all_micro_batches_of_a_step():
    made, items = method(rounding="stochastic"), batch()
    made.clock = Clock(seed=3)
    first = made.quantized_weights()
    torch.manual_seed(9)
    assert all(torch.equal(value, first[name]) for name, value in made.quantized_weights().items())
    made.clock = Clock(seed=4)
    assert any(not torch.equal(value, first[name]) for name, value in made.quantized_weights().items())
    assert next(made.step(items)).loss.isfinite()


def test_the_result_is_a_fresh_copy_with_quantised_weights():
    made = method()
    one, other = made.result(), made.result()
    assert one is not made.student
    assert one is not other
    for name, weights in one.named_parameters():
        assert torch.equal(weights, made.quantized_weights()[name])
        buckets = weights.detach().flatten().split(16)
        assert all(bucket.unique().numel() <= 4 for bucket in buckets)
    assert quantization_of(one).keys() == dict(one.named_parameters()).keys()
    assert made.averaged() is not one


def test_a_clamped_student_is_taken_home_clamped():
    made = method(gradient="truncated", bits=8)
    with torch.no_grad():
        made.student.head.weight *= 10
    assert made.student.head.weight.abs().max() > 2
    assert made.result().head.weight.abs().max() <= 1
    assert torch.equal(made.result().head.weight, made.quantized_weights()["head.weight"])


def test_layers_can_be_left_out():
    torch.manual_seed(0)
    made = build("quantized-distillation", student=MLP(width=8, depth=3), first_and_last=False)
    for bias in (value for value in made.student.parameters() if value.ndim == 1):
        nn.init.normal_(bias)
    result, own = made.result(), made.student.state_dict()
    same = {name for name, value in result.state_dict().items() if torch.equal(value, own[name])}
    assert same == {"stages.0.linear.weight", "stages.0.linear.bias", "head.weight", "head.bias"}
    with pytest.raises(IncompatibleError, match="nothing of the student"):
        build("quantized-distillation", student=MLP(depth=0), first_and_last=False)


def test_figures_are_those_of_the_exported_file(tmp_path):
    made = method(bits=3, first_and_last=True)
    figures = made.figures()
    files = export_model(made.result(), tmp_path / "out", "quantized")
    assert figures["compact_bytes"] == next(f for f in files if f.suffix == ".safetensors").stat().st_size
    count = sum(parameter.numel() for parameter in made.student.parameters())
    assert figures["float32_bytes"] == 4 * count
    assert figures["quantized_weights"] == count
    assert figures["nominal_bits"] == 3
    assert 1 < figures["huffman_bits"] < 3.5
    buckets = sum(math.ceil(parameter.numel() / 16) for parameter in made.student.parameters())
    assert figures["bits_per_weight"] == pytest.approx(figures["huffman_bits"] + 64 * buckets / count)
