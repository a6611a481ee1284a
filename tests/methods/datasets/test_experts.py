"""The stage of experts: the same whoever makes them, resumed, repaired, and named by a later stage."""

from multiprocessing import get_context

import pytest
import torch

import limbeck
from limbeck.core import catalogue
from limbeck.core.errors import IncompatibleError, Interrupted
from limbeck.core.method import ProcedureContext
from limbeck.core.registry import method_class
from limbeck.data.source import ArraySource
from limbeck.models.convnet import ConvNet
from limbeck.models.experts import Experts
from limbeck.models.saved import load_model, save_model


def source(labelled=True):
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    labels[::6] = -100
    made = ArraySource(torch.rand(24, 1, 4, 4, generator=draws), labels, classes=3)
    return made if labelled else ArraySource(torch.rand(4, 1, 4, 4), torch.full((4,), -100), classes=0)


def empty(**arguments):
    shape = {"network": "mlp", "channels": 1, "height": 4, "side": 4, "classes": 3, "width": 5, "depth": 1}
    return Experts(**{**shape, "experts": 3, "epochs": 2, **arguments})


def made(folder, student=None, seed=0, pause=lambda words: None, rows=None, **options):
    kind, data = method_class("experts"), source()
    given = kind.Options(**{"batch_size": 8, "lr": 0.1, **options})
    procedure = kind(given, student=student or empty(), data=data.info())
    log = (rows if rows is not None else []).append
    return procedure.run(ProcedureContext(data, folder, seed, log, pause))


def test_every_expert_starts_and_goes_its_own_way(tmp_path):
    rows = []
    held = made(tmp_path, rows=rows)
    assert held.snapshots.isfinite().all()
    for one in range(3):
        assert not torch.equal(held.snapshots[one, 0], held.snapshots[one - 1, 0])
        for epoch in range(2):
            assert not torch.equal(held.snapshots[one, epoch], held.snapshots[one, epoch + 1])
    assert [row["expert"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    weights = held.at(0, 2)
    assert all(torch.equal(weight, weights[name]) for name, weight in held.network.named_parameters())


def test_the_seed_and_the_options_decide(tmp_path):
    first = made(tmp_path / "a").snapshots
    assert torch.equal(made(tmp_path / "b").snapshots, first)
    assert not torch.equal(made(tmp_path / "c", seed=1).snapshots, first)
    for number, changed in enumerate([{"rho": 0.1}, {"lr": 0.2}, {"augmentation": "none"}, {"momentum": 0.5}]):
        other = made(tmp_path / str(number), **changed).snapshots
        assert torch.equal(other[:, 0], first[:, 0])
        assert not torch.equal(other[:, 2], first[:, 2]), changed


def test_processes_make_the_same_experts(tmp_path, monkeypatch):
    here = made(tmp_path / "here", rho=0.05)
    # Forked, they need not import torch again, which takes seconds.
    monkeypatch.setattr("limbeck.methods.datasets.experts.get_context", lambda name: get_context("fork"))
    apart = made(tmp_path / "apart", rho=0.05, processes=2)
    assert torch.equal(here.snapshots, apart.snapshots)


class StopAfter:
    """A run that is asked to stop when so many experts are made."""

    def __init__(self, count):
        self.left = count

    def __call__(self, words):
        self.left -= 1
        if not self.left:
            raise Interrupted(words)


def test_an_interrupted_stage_makes_what_is_missing(tmp_path):
    straight = made(tmp_path / "straight").snapshots
    with pytest.raises(Interrupted, match="2 of 3 experts"):
        made(tmp_path / "torn", pause=StopAfter(2))
    rows = []
    assert torch.equal(made(tmp_path / "torn", rows=rows).snapshots, straight)
    assert [row["expert"] for row in rows] == [2]


def test_a_damaged_expert_is_made_again(tmp_path):
    straight = made(tmp_path).snapshots
    (tmp_path / "expert-00001" / "snapshots.safetensors").write_bytes(b"?")
    rows = []
    assert torch.equal(made(tmp_path, rows=rows).snapshots, straight)
    assert [row["expert"] for row in rows] == [1]


def test_a_folder_of_other_experts_is_refused(tmp_path):
    made(tmp_path)
    with pytest.raises(IncompatibleError, match="another rho"):
        made(tmp_path, rho=0.5)


def test_convolutions_with_batch_norm(tmp_path):
    held = made(tmp_path, empty(network="pooled-convnet", depth=2, norm="batch", experts=1, epochs=1), rho=0.1)
    assert held.snapshots.isfinite().all()
    assert "network.norms.0.running_mean" in held.state_dict()


def test_they_are_saved_and_loaded(tmp_path):
    held = made(tmp_path / "run")
    save_model(held, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert type(loaded) is Experts
    assert torch.equal(loaded.snapshots, held.snapshots)
    images = source().fetch(torch.arange(4)).image
    assert torch.equal(loaded(images), held(images))


def test_other_students_and_data_are_refused():
    kind = method_class("experts")
    with pytest.raises(IncompatibleError, match="take the student experts"):
        kind(kind.Options(), student=ConvNet(), data=source().info())
    with pytest.raises(IncompatibleError, match="images with classes"):
        kind(kind.Options(), student=empty(), data=source(labelled=False).info())


def test_a_recipe_goes_from_experts_to_a_set(tmp_path, monkeypatch):
    known = catalogue.build()
    monkeypatch.setattr(catalogue, "read", lambda: known)
    arguments = {"network": "mlp", "width": 16, "depth": 1, "experts": 2, "epochs": 3}
    train = {"steps": 2, "optimizer": {"name": "sgd", "lr": 1, "momentum": 0.5, "lr_multipliers": {"log_lr": 1e-3}}}
    recipe = {
        "data": {"name": "digits", "limit": 64},
        "stages": [
            {
                "name": "experts",
                "method": "experts",
                "options": {"batch_size": 32},
                "student": {"name": "experts", "arguments": arguments},
            },
            {
                "name": "distil",
                "method": "ftd",
                "options": {"steps": 4, "segment": 1, "latest": 2},
                "student": {"name": "synthetic-set", "arguments": {"per_class": 1, "lr": 0.02}},
                "teacher": "stage:experts",
                "train": train,
            },
        ],
    }
    # What a finished set is measured by is another matter, and takes longer.
    monkeypatch.setattr("limbeck.experiment.Experiment._measure", lambda self, result, prepared, teacher: {})
    run = limbeck.run(recipe, tmp_path / "run", quiet=True)
    made = load_model(run.folder / "student")
    assert made.images.shape == (10, 1, 8, 8)
    assert made.images.isfinite().all()
    assert float(made.lr.detach()) != pytest.approx(0.02, rel=1e-7)
    experts = load_model(run.stage_result("experts"))
    assert experts.snapshots.shape[:2] == (2, 4)
    assert (run.folder / "checkpoints" / "experts" / "expert-00001" / "manifest.json").is_file()
