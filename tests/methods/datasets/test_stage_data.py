"""A stage that trains on what an earlier one made: which recipes are refused, and what the stage is given."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.core.recipe import check_recipe
from limbeck.core.run import Run
from limbeck.core.specs import DataSpec
from limbeck.data.cache.errors import MissingCacheError
from limbeck.data.open import DataSplit, open_data
from limbeck.experiment import Experiment
from limbeck.metrics import synthetic
from limbeck.metrics.synthetic import Protocol
from limbeck.modality import data_of_set
from limbeck.models.convnet import ConvNet
from limbeck.models.normalisation import set_normalisation
from limbeck.models.saved import load_model
from limbeck.synthesis.recovery import from_bytes, to_bytes
from limbeck.synthesis.synthetic_set import SyntheticSet

TREE: dict[str, Any] = {
    "data": {"name": "digits", "limit": 300},
    "stages": [
        {
            "name": "distil",
            "method": "dm",
            "options": {"width": 4, "depth": 2},
            "student": {"name": "synthetic-set", "arguments": {"per_class": 2}},
            "train": {"steps": 2, "batch_size": 40},
        },
        {
            "name": "learn",
            "method": "supervised",
            "data": "stage:distil",
            "student": {"name": "convnet", "arguments": {"width": 4}},
            "train": {"epochs": 3, "batch_size": 5},
        },
    ],
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(synthetic, "PROTOCOL", Protocol(steps=2, batch_size=8, networks=2))


@pytest.fixture(scope="module")
def digits() -> DataSplit:
    return open_data(DataSpec())


def changed(**stage: Any) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    tree["stages"][1] |= stage
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(data="stage:missing"), "uses stage 'missing', which does not come before it"),
        (changed(data="stage:learn"), "does not come before it"),
        (changed(data="digits"), "learn.data"),
        (changed(data={"name": "digits"}), "learn.data"),
        (
            {**TREE, "stages": [{**TREE["stages"][1], "name": "distil", "data": None}, TREE["stages"][1]]},
            "no synthetic",
        ),
    ],
)
def test_recipes_without_a_set_there_are_refused(tree, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe(tree)


def test_a_stage_names_all_that_it_works_with():
    stage = check_recipe(changed(method="kd", teacher=["stage:distil", "convnet"])).stages[1]
    assert stage.earlier == ["distil", "distil"]
    assert check_recipe(TREE).stages[0].earlier == []


def test_the_images_are_trained_on_and_real_ones_measured(tmp_path: Path):
    limbeck.run(check_recipe(TREE), out=tmp_path / "run", quiet=True)
    run = Run.open(tmp_path / "run")
    assert run.results()["learn"]["items"] == 359
    assert max(row["step"] for row in run.metrics("learn")) == 12  # three epochs of twenty images, in fives
    made = load_model(run.stage_result("distil"))
    experiment = Experiment(run.recipe(), run)
    experiment.results = {"distil": made}
    prepared = experiment.prepare(run.recipe().stages[1])
    shown = prepared.data.train.fetch(torch.arange(20))
    torch.testing.assert_close(shown.image, made.images.detach())
    assert torch.equal(shown.label, made.labels)
    assert len(prepared.data.validation) == 359
    assert prepared.info.items == 20
    assert experiment.prepare(run.recipe().stages[0]).info.items == 300  # which has no data of its own


def test_it_is_planned_with_the_set_that_the_plan_made():
    stages = limbeck.plan(check_recipe(TREE)).stages
    assert [stage.steps for stage in stages] == [2, 12]


def test_the_cache_of_a_teacher_is_one_of_the_set(tmp_path: Path):
    tree = changed(method="kd", teacher="convnet", cache={"folder": str(tmp_path / "cache")})
    tree["stages"][1]["student"] = {"name": "convnet", "arguments": {"width": 3}}
    recipe = check_recipe(tree)
    with pytest.raises(MissingCacheError, match=r"learn\.cache"):
        limbeck.run(recipe, out=tmp_path / "run", quiet=True)
    limbeck.cache(tmp_path / "run", quiet=True)
    limbeck.run(recipe, out=tmp_path / "run", resume=True, quiet=True)
    assert "accuracy" in Run.open(tmp_path / "run").results()["learn"]


def test_eight_bits_stay_what_they_are(digits):
    mean, std = (torch.tensor(values) for values in digits.train.normalisation)
    pixels = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    made = SyntheticSet(from_bytes(pixels, mean, std), torch.arange(4))
    source = data_of_set(made, digits, "learn.data").train
    assert torch.equal(to_bytes(source.fetch(torch.arange(4)).image, mean, std), pixels)


def test_another_normalisation_is_the_sets_own_and_soft_labels_give_classes(digits):
    made = SyntheticSet(torch.randn(3, 1, 8, 8), torch.eye(10)[[7, 1, 4]])
    set_normalisation(made, [0.1], [0.9])
    source = data_of_set(made, digits, "learn.data").train
    assert source.normalisation == ([pytest.approx(0.1)], [pytest.approx(0.9)])
    torch.testing.assert_close(source.fetch(torch.arange(3)).image, made.images.detach(), atol=1e-5, rtol=1e-5)
    assert source.labels.tolist() == [7, 1, 4]
    assert source.classes == 10


def test_what_is_no_set_of_these_data_is_refused(digits):
    with pytest.raises(IncompatibleError, match="ConvNet holds no images"):
        data_of_set(ConvNet(), digits, "learn.data")
    with pytest.raises(IncompatibleError, match=r"\(1, 4, 4\)"):
        data_of_set(SyntheticSet(torch.randn(2, 1, 4, 4), torch.arange(2)), digits, "learn.data")
