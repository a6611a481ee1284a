"""Kernel ridge heads: recorded values and gradients, scikit-learn, both forms of the solution, limits, invariance."""

import math

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as Peer
from torch import Tensor, nn

from limbeck.synthesis.kernel_ridge import KernelRidge, kernel_ridge_loss, relative_ridge, ridge_head, with_bias
from tests.oracles import oracle


class Recorded(nn.Module):
    """The features of the recorded network: twice convolution, batch norm, ReLU and pooling, flattened."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2))
                for a, b in ((3, 4), (4, 6))
            )
        ).double()
        names = {name: name.removeprefix("layers.").replace("block.", "") for name in tensors if "layers" in name}
        self.blocks.load_state_dict({own: tensors[name] for name, own in names.items()})
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(image).flatten(1)


@pytest.fixture(params=["noclip", "clip"])
def recorded(request) -> dict[str, Tensor]:
    (case,) = oracle.load("krr-st")
    return {
        name.removeprefix(f"{request.param}."): value
        for name, value in case.tensors.items()
        if name.startswith(f"{request.param}.")
    } | {"limit": torch.tensor(0.05 if request.param == "clip" else math.inf)}


def test_loss_gradients_and_step_as_recorded(recorded):
    network = Recorded({name.removeprefix("model."): value for name, value in recorded.items() if "model." in name})
    images, targets = (recorded[name].clone().requires_grad_() for name in ("x_syn", "y_syn"))
    real = recorded["x_real"]
    wanted = nn.functional.linear(real.flatten(1), recorded["target.weight"], recorded["target.bias"])
    loss = kernel_ridge_loss(network(images), targets, network(real), wanted)
    torch.testing.assert_close(loss, recorded["loss"], rtol=1e-7, atol=0)
    loss.backward()
    for tensor, name in ((images, "x"), (targets, "y")):
        nn.utils.clip_grad_norm_([tensor], float(recorded["limit"]))  # each by its own norm
        expected = recorded[f"grad_{name}"]
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
        torch.testing.assert_close(tensor.detach() - 0.1 * tensor.grad, recorded[f"{name}_after"], rtol=1e-7, atol=1e-9)
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("items", [5, 30])
def test_predictions_are_those_of_scikit_learn(items):
    torch.manual_seed(0)
    features, targets, others = torch.randn(items, 12), torch.randn(items, 3), torch.randn(7, 12)
    for ridge in (1e-3, 1.0, 50.0):
        peer = Peer(alpha=ridge, kernel="linear").fit(features.double().numpy(), targets.double().numpy())
        said = others.double() @ ridge_head(features.double(), targets.double(), ridge)
        torch.testing.assert_close(said, torch.as_tensor(peer.predict(others.double().numpy())), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("items", [4, 9])
def test_primal_and_dual_solution_agree_with_their_gradients(items):
    torch.manual_seed(1)
    features, targets = (torch.randn(items, dims, dtype=torch.float64, requires_grad=True) for dims in (6, 2))
    slope = torch.randn(6, 2, dtype=torch.float64)
    dual = features.T @ torch.linalg.solve(features @ features.T + 0.3 * torch.eye(items).double(), targets)
    primal = torch.linalg.solve(features.T @ features + 0.3 * torch.eye(6).double(), features.T @ targets)
    found = [
        (head.detach(), *torch.autograd.grad((head * slope).sum(), (features, targets)))
        for head in (dual, primal, ridge_head(features, targets, 0.3))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(2)
    features, targets = (torch.randn(4, dims, dtype=torch.float64, requires_grad=True) for dims in (6, 2))
    assert torch.autograd.gradcheck(lambda f, y: ridge_head(f, y, 0.1), (features, targets))


def test_an_endless_ridge_leaves_no_head():
    torch.manual_seed(3)
    features, targets = torch.randn(5, 3), torch.randn(5, 2)
    assert float(ridge_head(features, targets, 1e12).abs().max()) < 1e-10
    shrunk = 1e6 * ridge_head(features.double(), targets.double(), 1e6)  # on the way there W is F'Y / lambda
    torch.testing.assert_close(shrunk, features.double().T @ targets.double(), rtol=1e-4, atol=1e-4)


def test_no_ridge_is_least_squares_and_a_singular_matrix_is_refused():
    torch.manual_seed(4)
    features, targets = torch.randn(9, 3), torch.randn(9, 2)
    expected = torch.linalg.lstsq(features.double(), targets.double()).solution
    torch.testing.assert_close(ridge_head(features.double(), targets.double(), 0.0), expected)
    with pytest.raises(ValueError, match="raise the ridge"):
        ridge_head(torch.zeros(4, 3), torch.randn(4, 2), 0.0)


def test_items_that_are_fitted_cost_nothing():
    torch.manual_seed(5)
    features, targets = torch.randn(5, 8), torch.randn(5, 2)
    assert 0 <= float(kernel_ridge_loss(features, targets, features, targets)) < 1e-6
    assert float(kernel_ridge_loss(features, targets, features, targets + 1)) == pytest.approx(1.0, abs=1e-3)


def test_the_order_of_the_items_does_not_matter_and_targets_scale_the_loss_quadratically():
    torch.manual_seed(6)
    features, targets, seen, wanted = (torch.randn(n, d).double() for n, d in ((5, 4), (5, 2), (7, 4), (7, 2)))
    loss = kernel_ridge_loss(features, targets, seen, wanted)
    order = torch.randperm(5)
    torch.testing.assert_close(kernel_ridge_loss(features[order], targets[order], seen, wanted), loss)
    torch.testing.assert_close(kernel_ridge_loss(features, 3 * targets, seen, 3 * wanted), 9 * loss)


def test_only_the_synthetic_side_gets_gradients_and_none_through_the_ridge():
    torch.manual_seed(7)
    features, targets, seen, wanted = (
        torch.randn(n, d, requires_grad=True) for n, d in ((5, 4), (5, 2), (7, 4), (7, 2))
    )
    kernel_ridge_loss(features, targets, seen, wanted, share=0.1).backward()
    assert seen.grad is None
    assert wanted.grad is None
    own, fixed = with_bias(features), float(relative_ridge(with_bias(features), 0.1))
    said = with_bias(seen).double() @ ridge_head(own.double(), targets.double(), fixed)
    expected = torch.autograd.grad((said - wanted).square().mean(), (features, targets))
    torch.testing.assert_close((features.grad, targets.grad), expected)
    assert not relative_ridge(own).requires_grad


def test_precision_half_precision_features_and_single_precision_solutions():
    torch.manual_seed(8)
    features, targets = torch.randn(6, 9).bfloat16(), torch.randn(6, 2).bfloat16()
    exact = ridge_head(features.double(), targets.double(), 0.5)
    found = ridge_head(features, targets, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float())
    single = ridge_head(features, targets, 0.5, torch.float32)
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(single, found)


def test_a_head_learns_classes():
    torch.manual_seed(9)
    labels = torch.arange(3).repeat(10)
    centres = 4 * torch.randn(3, 5)
    head = KernelRidge().fit(centres[labels] + 0.1 * torch.randn(30, 5), labels)
    seen = centres[labels] + 0.1 * torch.randn(30, 5)
    scores = head.predict(seen)
    assert scores.shape == (30, 3)
    assert torch.equal(scores.argmax(1), labels)
    torch.testing.assert_close(head.predict(seen[4:5]), scores[4:5])  # an item at a time is all the same
    with pytest.raises(ValueError, match="fit the head"):
        KernelRidge().predict(seen)


def test_a_head_takes_vectors_and_finds_the_bias():
    torch.manual_seed(10)
    features = torch.randn(40, 3).double()
    targets = features @ torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]]).double() + torch.tensor([5.0, -1.0])
    torch.testing.assert_close(
        KernelRidge(1e-12).fit(features, targets).predict(features), targets, rtol=1e-6, atol=1e-6
    )
