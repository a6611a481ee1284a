"""Unrolled inner loops: against plain differentiation and a closed form, with and without recomputation."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck.metrics.memory import PeakMemory
from limbeck.synthesis.inner_loop import Stateless, trajectory_loss, unrolled_sgd

LABELS = torch.arange(12) % 3


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4 * 16, 3)).double()


def images():
    return torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own_weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def unrolled(net, steps, chunk, seen=None, by_value=False):
    """The end of a loop, and gradients of a fixed function of it in images, step size and first weights."""
    stateless, seen = Stateless(net), (images() if seen is None else seen).requires_grad_()
    lr = torch.tensor(0.2, dtype=seen.dtype, requires_grad=True)
    start = {name: weight.requires_grad_() for name, weight in own_weights(net).items()}

    def loss(weights, step, shown, labels):
        return (1 + 0.1 * step) * functional.cross_entropy(stateless(weights, shown), labels)

    torch.manual_seed(5)
    end = unrolled_sgd(start, loss, (seen, LABELS), lr, steps, chunk=chunk)
    value = sum((weight * weight.cos()).sum() for weight in end.values())
    gradients = torch.autograd.grad(value, [seen, lr, *start.values()], allow_unused=True)
    return [weight.detach() for weight in end.values()], gradients


def plainly(net, steps):
    """The same by moving the weights of real modules' functional twins by hand, differentiated by torch as it is."""
    shown = images().requires_grad_()
    lr = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    first = [weight.requires_grad_() for weight in own_weights(net).values()]
    kernel, bias, scale, shift, matrix, offset = first
    for step in range(steps):
        hidden = functional.conv2d(shown, kernel, bias, padding=1)
        hidden = functional.group_norm(hidden, 4, scale, shift).relu().flatten(1)
        value = (1 + 0.1 * step) * functional.cross_entropy(hidden @ matrix.T + offset, LABELS)
        slopes = torch.autograd.grad(value, (kernel, bias, scale, shift, matrix, offset), create_graph=True)
        moved = (w - lr * g for w, g in zip((kernel, bias, scale, shift, matrix, offset), slopes, strict=True))
        kernel, bias, scale, shift, matrix, offset = moved
    end = [kernel, bias, scale, shift, matrix, offset]
    value = sum((weight * weight.cos()).sum() for weight in end)
    return [weight.detach() for weight in end], torch.autograd.grad(value, [shown, lr, *first])


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 9])
def test_values_and_gradients_are_those_of_plain_differentiation(chunk):
    expected, slopes = plainly(network(), 5)
    end, found = unrolled(network(), 5, chunk)
    for one, other in zip([*end, *found], [*expected, *slopes], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_a_parabola_in_closed_form():
    """From w on 0.5 c w^2 at rate a: w (1 - a c)^n, whose derivatives are known."""
    w, c, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.5, 0.7, 0.3))
    for chunk in (0, 2):
        end = unrolled_sgd({"w": w}, lambda x, _, curve: 0.5 * curve * x["w"] ** 2, (c,), a, 7, chunk=chunk)["w"]
        assert float(end.detach()) == pytest.approx(1.5 * (1 - 0.21) ** 7)
        found = torch.autograd.grad(end, (w, c, a))
        inner = 1.5 * 7 * 0.79**6
        assert [float(value) for value in found] == pytest.approx([0.79**7, -0.3 * inner, -0.7 * inner])


def test_no_step_and_no_rate_end_where_they_began():
    start = own_weights(network())
    for steps, lr, chunk in ((0, 0.1, 0), (0, 0.1, 2), (3, 0.0, 0), (3, 0.0, 2)):
        stateless, seen = Stateless(network()), images()
        loss = lambda w, step, x, net=stateless: functional.cross_entropy(net(w, x), LABELS)  # noqa: E731
        end = unrolled_sgd(start, loss, (seen,), lr, steps, chunk=chunk)
        assert all(torch.equal(end[name], start[name]) for name in start)


def test_what_was_dropped_is_dropped_again():
    whole, slopes = unrolled(network(dropout=0.4), 6, 0)
    chunked, found = unrolled(network(dropout=0.4), 6, 2)
    for one, other in zip([*chunked, *found], [*whole, *slopes], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    seen, weights = torch.ones(2, requires_grad=True), {"w": torch.ones(2)}
    end = unrolled_sgd(weights, lambda w, _, x: (functional.dropout(w["w"]) * x).sum(), (seen,), 0.1, 1, chunk=1)
    state = torch.get_rng_state()
    end["w"].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # the second pass leaves the stream as it was


def test_low_precision_is_the_same_in_the_second_pass():
    def run(chunk, kinds):
        def loss(weights, step, shown):
            logits = stateless(weights, shown)
            kinds.append(logits.dtype)
            return functional.cross_entropy(logits.float(), LABELS)

        stateless, seen = Stateless(network().float()), images().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            end = unrolled_sgd(own_weights(stateless.network), loss, (seen,), 0.1, 4, chunk=chunk)
        return torch.autograd.grad(sum(weight.square().sum() for weight in end.values()), seen)[0]

    kinds: list[torch.dtype] = []
    chunked, whole = run(2, kinds), run(0, [])
    assert kinds == [torch.bfloat16] * 8  # four steps, twice
    assert (chunked - whole).norm() < 0.02 * whole.norm()  # sums are rounded in another order


def test_gradients_of_a_larger_graph_reach_through_the_loop():
    """Images may come from somewhere, and gradients be asked for with `inputs`, as with several players."""
    found = []
    for chunk in (0, 2):
        raw = images().requires_grad_()
        stateless = Stateless(network())
        loss = lambda w, _, x, net=stateless: functional.cross_entropy(net(w, x), LABELS)  # noqa: E731
        end = unrolled_sgd(own_weights(stateless.network), loss, (raw.tanh() * 2,), 0.1, 4, chunk=chunk)
        sum(weight.square().sum() for weight in end.values()).backward(inputs=[raw])
        found.append(raw.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def test_memory_grows_with_the_square_root_of_the_steps():
    def peak(steps, chunk):
        with PeakMemory() as memory:
            unrolled(network(), steps, chunk)
        return memory.peak_bytes

    whole, whole_longer = peak(9, 0), peak(36, 0)
    chunked, chunked_longer = peak(9, 3), peak(36, 6)
    assert whole_longer > 3 * whole  # linear: four times the steps
    assert chunked_longer < 2.2 * chunked  # about twice
    assert chunked_longer < 0.35 * whole_longer


def test_a_stateless_network_is_left_as_it_is():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    net[0].train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = {name: 2 * weight for name, weight in own_weights(net).items()}
    torch.manual_seed(0)
    found = Stateless(net)(weights, images().float())
    assert [part.training for part in (net, *net)] == [False, True, False, False]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert (found == 0).float().mean() > 0.3  # dropout was at work
    net.train().load_state_dict({**net.state_dict(), **weights})
    torch.manual_seed(0)
    torch.testing.assert_close(found, net(images().float()))  # by the batch's own statistics


def test_the_trajectory_loss_is_0_at_the_target_and_1_at_the_start():
    start, target = own_weights(network()), {name: w + 0.1 for name, w in own_weights(network()).items()}
    assert float(trajectory_loss(target, target, start)) == 0
    assert float(trajectory_loss(start, target, start)) == 1
    halfway = {name: 0.5 * (start[name] + target[name]) for name in start}
    assert float(trajectory_loss(halfway, target, start)) == pytest.approx(0.25)


def test_the_trajectory_loss_against_a_loop():
    torch.manual_seed(2)
    end, target, start = ({"a": torch.randn(2, 3), "b": torch.randn(2)} for _ in range(3))
    missed = way = 0.0
    for name in end:
        for e, t, s in zip(*(part[name].flatten().tolist() for part in (end, target, start)), strict=True):
            missed, way = missed + (e - t) ** 2, way + (s - t) ** 2
    assert float(trajectory_loss(end, target, start)) == pytest.approx(missed / way, rel=1e-5)


def test_the_way_of_the_expert_carries_no_graph():
    start, end, target = (torch.tensor([value], requires_grad=True) for value in (0.0, 1.0, 3.0))
    trajectory_loss({"w": end}, {"w": target.detach()}, {"w": start}).backward()
    assert start.grad is None
    assert float(end.grad) == pytest.approx(2 * (1 - 3) / 9)
