"""Cayley's map and principal axes, against numbers of MatryoshkaKV's own code."""

import pytest
import torch

from limbeck.compression.orthogonal import Moments, Orthogonal, cayley, in_chart, inverse_cayley, project, restore
from tests.oracles.oracle import load

(CASE,) = load("matryoshka-kv")
GIVEN = CASE.tensors


def check(actual: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual.detach().float(), GIVEN[name], rtol=1e-4, atol=2e-5)


def test_the_map_and_its_gradient_are_the_recorded_ones():
    free = GIVEN["X2"].clone().requires_grad_(True)
    rotation = cayley(free)
    check(rotation, "ortho.cayley")
    (rotation * GIVEN["cot"]).sum().backward()
    check(free.grad, "grad_X2.cayley")


def test_the_inverse_is_the_recorded_one():
    check(inverse_cayley(GIVEN["Q"]), "cayley_param")
    check(cayley(GIVEN["cayley_param"]), "cayley_back")
    torch.testing.assert_close(cayley(inverse_cayley(GIVEN["Q"])), GIVEN["Q"], rtol=1e-4, atol=1e-5)


def test_projections_are_the_recorded_ones_and_ranks_are_nested():
    centred = GIVEN["keys"] - GIVEN["mean"]
    check(project(centred, GIVEN["Q"], 4), "proj_r4")
    for rank in range(1, 9):
        torch.testing.assert_close(project(centred, GIVEN["Q"], rank), project(centred, GIVEN["Q"], 8)[..., :rank])
    torch.testing.assert_close(restore(project(centred, GIVEN["Q"], 8), GIVEN["Q"]), centred, rtol=1e-4, atol=1e-5)


def axes(name: str):
    moments = Moments(8, 3)
    for number in (0, 1):
        moments.add(GIVEN[f"pca_{name}{number}"][0])
    return moments.principal_axes()


def test_principal_axes_are_the_recorded_ones():
    keys, values = axes("keys"), axes("values")
    check(keys.variances, "pca_key_eigvals")
    check(values.variances, "pca_value_eigvals")
    check(keys.mean, "pca_key_mean")
    first = keys.basis[..., :4]
    check(first @ first.mT, "pca_key_projector_r4")


def test_what_a_truncation_loses_is_the_variance_that_it_drops():
    keys = axes("keys")
    samples = torch.cat([GIVEN["pca_keys0"], GIVEN["pca_keys1"]], 2)[0].double()
    centred = samples - keys.mean[:, None]
    for rank in range(1, 9):
        lost = (centred - restore(project(centred, keys.basis, rank), keys.basis)).square().sum(-1).mean(-1)
        torch.testing.assert_close(lost, keys.variances[:, rank:].sum(-1), rtol=1e-4, atol=1e-9)


def test_trained_maps_stay_orthogonal_and_start_where_they_should():
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(5, 8, 8))
    maps = Orthogonal(basis)
    # Columns are the given ones but for their signs.
    torch.testing.assert_close((maps() * basis).sum(-2).abs(), torch.ones(5, 8), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(maps.parameters(), lr=0.3)
    for _ in range(5):
        (maps() * torch.randn(5, 8, 8)).sum().backward()
        optimizer.step()
    rotation = maps().double()
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(8).double().expand(5, 8, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(Orthogonal.identity(4, 2)(), torch.eye(4).expand(2, 4, 4))


def test_half_precision_does_not_spoil_orthogonality():
    maps = Orthogonal.identity(16)
    with torch.no_grad():
        maps.free.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        rotation = maps()
    assert rotation.dtype is torch.float32
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "basis",
    [
        torch.diag(torch.tensor([1.0, 1.0, -1.0])),  # reflects
        torch.diag(torch.tensor([1.0, -1.0, -1.0])),  # half a turn: determinant 1, and no Cayley map
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        -torch.eye(4),
    ],
)
def test_bases_outside_of_the_chart_are_turned_into_it(basis):
    with pytest.raises(ValueError, match="eigenvalue of -1"):
        inverse_cayley(basis)
    turned = in_chart(basis)
    torch.testing.assert_close(turned.abs(), basis.abs())
    torch.testing.assert_close(cayley(inverse_cayley(turned)), turned, rtol=1e-4, atol=1e-5)


def test_what_is_not_orthogonal_or_empty_is_refused():
    with pytest.raises(ValueError, match="not orthogonal"):
        inverse_cayley(torch.full((3, 3), 0.5))
    with pytest.raises(ValueError, match="no samples"):
        Moments(3).principal_axes()
