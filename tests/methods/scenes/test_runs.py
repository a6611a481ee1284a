"""Scenes as students of a run: trained, measured, saved, loaded and shown."""

import pytest
import torch

import limbeck
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.metrics.scene import evaluate_scene
from limbeck.models.saved import load_model, save_model
from limbeck.models.shipped import build_shipped
from limbeck.rendering.images import ImageScene
from limbeck.rendering.particles import all_around
from tests.methods.scenes.toys import SCHEDULE, denoiser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two small scenes after three steps."""
    return limbeck.distill(
        "prolific-dreamer",
        teacher=denoiser(64, 10),
        student={"name": "scene-voxels", "arguments": {"particles": 2, "resolution": 4, "samples": 4}},
        data={"name": "digits", "mean": [0.5], "std": [0.5]},
        options={"labels": [3]},
        steps=3,
        batch_size=4,
        out=tmp_path_factory.mktemp("run") / "scenes",
        quiet=True,
    )


def test_a_run_measures_its_scenes(run):
    (figures,) = run.results().values()
    assert (figures["particles"], figures["views"]) == (2, 24)
    assert 0 < figures["opacity"] < 1
    assert 0 <= figures["judged_class"] < 10
    assert figures["teacher_error"] > 0
    assert figures["difference"] > 0
    assert figures["flops"] >= 0


def test_a_run_shows_its_scenes_once_around(run):
    from PIL import Image

    pictures = limbeck.sample(run.folder, 5, out=run.folder / "shown.png")
    assert pictures.shape == (10, 3, 96, 96)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert (run.folder / "shown.png").is_file()
    with Image.open(run.folder / "shown.gif") as animation:
        assert animation.size == (192, 96)
        assert animation.n_frames > 1


@pytest.mark.parametrize("name", ["voxels", "hash", "gaussians", "mesh", "images"])
def test_shipped_scenes_load_again_as_they_were(name, tmp_path):
    torch.manual_seed(0)
    small = {"hash": {"table": 6, "levels": 2}, "mesh": {"subdivisions": 1}}.get(name, {})
    scene = build_shipped(f"scene-{name}", {"particles": 2, **small}).eval()
    save_model(scene, tmp_path)
    again = load_model(tmp_path).eval()
    assert type(again) is type(scene)
    with torch.no_grad():
        shown = all_around(scene, 2, 6, 6)
        assert torch.equal(all_around(again, 2, 6, 6), shown)
    one, other = shown.chunk(2)
    assert not torch.equal(one, other), "particles start different"


def test_modes_that_images_reach_are_counted():
    mixture = GaussianMixtureDenoiser.ring(SCHEDULE, modes=4, std=0.1)
    at = torch.cat([mixture.means[:2] + 0.1, torch.zeros(1, 2)])[..., None, None]

    class Nothing:
        classes = 0

        def __len__(self) -> int:
            return 2

        def fetch(self, rows):
            from limbeck.core.batch import Batch

            return Batch({"image": torch.zeros(len(rows), 2), "index": rows})

        def info(self):
            from limbeck.core.method import DataInfo

            return DataInfo(2, 0, self.fetch(torch.arange(2)))

    from limbeck.core.teacher import LiveTeacher

    figures = evaluate_scene(ImageScene(at), Nothing(), teacher=LiveTeacher(mixture))
    assert figures["modes"] == 0.5
    assert abs(figures["spread"] - 1.0) < 1e-5
    exact = evaluate_scene(ImageScene(mixture.draw(500)[..., None, None]), Nothing(), teacher=LiveTeacher(mixture))
    assert exact["modes"] == 1.0
    assert exact["teacher_error"] < figures["teacher_error"]
