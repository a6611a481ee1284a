"""Learning rates of their own for parts of a student, by name."""

import pytest
import torch
from pydantic import ValidationError

from limbeck.core.errors import IncompatibleError
from limbeck.core.optim import build_optimizer, learning_rate
from limbeck.core.specs import OptimizerSpec
from limbeck.models.mlp import MLP
from tests.core.toys import build, weights

PLAIN = {"name": "sgd", "lr": 0.5, "momentum": 0.0, "schedule": "constant"}


def multipliers(spec: OptimizerSpec, **changes: int) -> dict[str, float]:
    model = MLP(**{"inputs": 4, "width": 3, "depth": 3, **changes})
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer("student", model, spec).param_groups
    return {names[parameter]: group["multiplier"] for group in groups for parameter in group["params"]}


def test_the_first_path_or_glob_that_fits_counts():
    spec = OptimizerSpec(lr_multipliers={"stages.0": 0.1, "stages.*.bias": 3.0, "stages.[12]": 0.2})
    expected = {
        "stages.0.linear.weight": 0.1,
        "stages.0.linear.bias": 0.1,
        "stages.1.linear.weight": 0.2,
        "stages.1.linear.bias": 3.0,
        "stages.2.linear.weight": 0.2,
        "stages.2.linear.bias": 3.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    assert multipliers(spec) == expected
    assert multipliers(OptimizerSpec(lr_multipliers={"*": 0.5})) == dict.fromkeys(expected, 0.5)


def test_a_path_does_not_fit_another_that_begins_alike():
    found = multipliers(OptimizerSpec(lr_multipliers={"stages.1": 0.5}), depth=12)
    assert {name for name, factor in found.items() if factor == 0.5} == {
        "stages.1.linear.weight",
        "stages.1.linear.bias",
    }


def test_norms_stay_without_decay_under_multipliers():
    spec = OptimizerSpec(weight_decay=0.1, decay_norms=False, lr_multipliers={"stages": 0.1})
    groups = build_optimizer("student", MLP(inputs=4), spec).param_groups
    found = {(group["multiplier"], group["weight_decay"], {p.ndim for p in group["params"]}.pop()) for group in groups}
    assert found == {(0.1, 0.1, 2), (0.1, 0.0, 1), (1.0, 0.1, 2), (1.0, 0.0, 1)}


def test_a_step_is_as_long_as_its_multiplier_says():
    moved = []
    for factors in ({}, {"0": 0.25, "2": 0.0}):
        trainer = build(optimizer=OptimizerSpec(**PLAIN, lr_multipliers=factors), steps=1)
        before = {name: value.detach().clone() for name, value in trainer.method.student.named_parameters()}
        trainer.fit()
        moved.append({n: value.detach() - before[n] for n, value in trainer.method.student.named_parameters()})
    plain, scaled = moved
    assert len({name.partition(".")[0] for name in plain}) == 2
    for name, value in plain.items():
        assert float(value.abs().sum()) > 0
        torch.testing.assert_close(scaled[name], value * (0.25 if name.startswith("0") else 0.0))


def test_schedules_are_scaled_and_multipliers_of_one_change_nothing():
    spec = {"lr": 0.01, "schedule": "cosine", "warmup": 2}
    one = build(optimizer=OptimizerSpec(**spec))
    other = build(optimizer=OptimizerSpec(**spec, lr_multipliers={"0": 1.0}))
    one.fit(), other.fit()
    assert torch.equal(weights(one.method), weights(other.method))
    scaled = build(optimizer=OptimizerSpec(**spec, lr_multipliers={"0": 0.1}))
    scaled.fit()
    rates = [group["lr"] for group in scaled.players["student"].optimizer.param_groups]
    last = learning_rate(OptimizerSpec(**spec), 5, 6)
    assert sorted(rates) == pytest.approx([0.1 * last, last])


def test_names_that_fit_nothing_and_senseless_factors_are_refused():
    for factors in ({"tail": 0.1}, {"*": 0.5, "head": 0.1}):
        with pytest.raises(IncompatibleError, match=r"lr_multipliers: no trained parameter of player 'student'"):
            multipliers(OptimizerSpec(lr_multipliers=factors))
    with pytest.raises(ValidationError):
        OptimizerSpec(lr_multipliers={"head": -1.0})
