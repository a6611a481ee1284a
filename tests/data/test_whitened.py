"""Whitened data: what sources give, what sets keep of it, and who is refused."""

import copy
from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.core.recipe import check_recipe
from limbeck.core.specs import DataSpec
from limbeck.data.open import open_data
from limbeck.metrics import synthetic
from limbeck.metrics.synthetic import Protocol
from limbeck.modality import adaptation, data_of_set
from limbeck.models.adapters.image_table import as_images
from limbeck.models.convnet import ConvNet
from limbeck.models.normalisation import set_normalisation
from limbeck.models.synthetic import SyntheticImages
from limbeck.synthesis.synthetic_set import SyntheticSet

ALL = torch.arange(300)
TREE = {
    "data": {"name": "digits", "limit": 300, "whiten": 0.1},
    "stages": [
        {
            "name": "distil",
            "method": "dm",
            "options": {"width": 4, "depth": 2},
            "student": {"name": "synthetic-set", "arguments": {"per_class": 2, "augmentation": []}},
            "train": {"steps": 1, "batch_size": 40, "optimizer": {"name": "sgd", "lr": 1e-6}},
        }
    ],
}


def test_both_sources_are_whitened_as_the_training_images_ask():
    plain, white = (open_data(DataSpec(limit=300, whiten=epsilon)) for epsilon in (None, 1e-4))
    plain.train.set_normalisation([0.0], [1.0])
    plain.validation.set_normalisation([0.0], [1.0])
    spread = white.train.fetch(ALL).image.flatten(1).T.cov()
    alive = spread.diagonal() > 0.5  # pixels at the border hardly ever change
    assert alive.sum() > 40
    assert (spread - torch.diag(spread.diagonal())).abs().max() < 0.2
    zca = white.train.whitening.zca
    for one, other in ((plain.train, white.train), (plain.validation, white.validation)):
        rows = torch.arange(50)
        torch.testing.assert_close(zca.invert(other.fetch(rows).image), one.fetch(rows).image, atol=1e-4, rtol=0)
        assert torch.equal(one.fetch(rows).label, other.fetch(rows).label)
    assert torch.equal(white.train.select(ALL[5:9]).fetch(ALL[:4]).image, white.train.fetch(ALL[5:9]).image)
    assert white.train.info().normalisation is None


def test_augmentation_comes_first():
    white = open_data(DataSpec(limit=300, whiten=0.1, augment=["crop"])).train
    assert white.varied
    seen = white.fetch(ALL[:8], 3).image
    assert torch.equal(seen, white.whitening.zca(white.source.fetch(ALL[:8], 3).image))
    assert not torch.equal(seen, white.fetch(ALL[:8]).image)


def test_a_run_keeps_the_whitening_with_the_set_and_shows_real_pictures(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(synthetic, "PROTOCOL", Protocol(steps=2, batch_size=8, networks=2))
    run = limbeck.run(check_recipe(TREE), out=tmp_path / "run", quiet=True)
    made = limbeck.load(run.folder)
    assert isinstance(made, SyntheticImages)
    assert made.config["whitened"]
    source = open_data(check_recipe(TREE).data).train
    assert torch.equal(made.whitening.matrix, source.whitening.zca.matrix)
    pictures = as_images(made)  # the step was tiny: they are still the real ones that the set began with
    real = source.source.fetch(ALL).image
    nearest = torch.cdist(pictures.flatten(1), real.flatten(1)).min(1).values
    assert nearest.max() < 1e-2
    assert made.budget() == 20 * 64 * 4 + 20 * 8
    assert limbeck.sample(run.folder, 20, out=tmp_path / "shown.png").shape == (20, 1, 8, 8)
    assert limbeck.evaluate(run.folder)["accuracy"] == run.results()["distil"]["accuracy"]


def test_a_set_keeps_a_copy():
    zca = open_data(DataSpec(limit=300, whiten=0.1)).train.whitening.zca
    made = SyntheticSet(torch.randn(2, 1, 8, 8), torch.arange(2))
    made.note_whitening(zca)
    made.double()
    assert zca.matrix.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [
        ({"mean": [0.5]}, {}, "takes the place of mean"),
        ({"whiten": 0.0}, {}, "data.whiten"),
        ({"name": "pydoc"}, {}, "only pictures"),
        ({}, {"method": "supervised", "options": {}, "student": "convnet"}, "'supervised' is none"),
    ],
)
def test_who_is_given_whitened_images(data, stage, message):
    tree = copy.deepcopy(TREE)
    tree["data"] |= data
    tree["stages"][0] |= stage
    with pytest.raises(RecipeError, match=message):
        check_recipe(tree)


def test_what_takes_plain_images_is_refused():
    data = open_data(DataSpec(limit=300, whiten=0.1))
    teacher = ConvNet()
    assert adaptation(teacher, data.train) is None
    set_normalisation(teacher, [0.5], [0.5])
    with pytest.raises(IncompatibleError, match="not whitened"):
        adaptation(teacher, data.train)
    with pytest.raises(IncompatibleError, match=r"learn\.data: .* whitened"):
        data_of_set(SyntheticSet(torch.randn(2, 1, 8, 8), torch.arange(2)), data, "learn.data")
