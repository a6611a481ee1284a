"""Synthetic sets as students of a run: begun, trained, measured, saved, shown, exported."""

import pytest
import torch

import limbeck
from limbeck.core.errors import IncompatibleError
from limbeck.metrics import synthetic
from limbeck.metrics.synthetic import Protocol
from limbeck.models.saved import load_model, save_model
from limbeck.models.synthetic import SyntheticImages
from limbeck.report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twenty digits after two steps of DataDAM, measured by networks that hardly train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PROTOCOL", Protocol(steps=3, batch_size=32, networks=2))
        return limbeck.distill(
            "datadam",
            student={"name": "synthetic-set", "arguments": {"per_class": 2, "augmentation": ["crop", "scale"]}},
            data="digits",
            options={"width": 4, "depth": 2},
            steps=2,
            batch_size=40,
            out=tmp_path_factory.mktemp("run") / "set",
            quiet=True,
        )


def test_a_run_measures_its_set(run):
    (figures,) = run.results().values()
    assert figures["images"] == 20
    assert figures["bytes"] == 20 * 64 * 4 + 20 * 8
    assert figures["items"] == 359
    shares = [figures[name] for name in ("accuracy", "accuracy_plain", "random", "full")]
    assert all(0 <= share <= 1 for share in shares)
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert list(figures["by_network"]) == ["pooled-convnet", "convnet", "mlp"]
    assert figures["by_network"]["pooled-convnet"] == figures["accuracy"]


def test_the_set_comes_back_and_does_not_begin_anew(run):
    made = limbeck.load(run.folder)
    assert isinstance(made, SyntheticImages)
    before = made.images.detach().clone()
    assert made.config["begun"]
    assert made.augmentation == ("crop", "scale")
    made.begin(None, 0)
    assert torch.equal(made.images, before)


def test_soft_labels_and_step_size_are_stored(tmp_path):
    made = SyntheticImages(2, 4, 4, classes=3, per_class=2, lr=0.05)
    made.set_labels(torch.rand(6, 3).softmax(1))
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.labels, made.labels)
    assert float(again.lr.detach()) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="4 probabilities"):
        made.set_labels(torch.rand(6, 4))


def test_a_set_of_another_shape_is_refused():
    from limbeck.core.specs import DataSpec
    from limbeck.data.open import open_data

    digits = open_data(DataSpec()).train
    with pytest.raises(IncompatibleError, match="10 of"):
        SyntheticImages(1, 8, 8, classes=4).begin(digits, 0)
    with pytest.raises(IncompatibleError, match=r"\(1, 4, 4\)"):
        SyntheticImages(1, 4, 4).begin(digits, 0)


def test_the_images_are_shown_a_row_a_class(run):
    pictures = limbeck.sample(run.folder, 20, out=run.folder / "shown.png")
    assert pictures.shape == (20, 1, 8, 8)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert (run.folder / "shown.png").read_bytes().startswith(b"\x89PNG")
    made = limbeck.load(run.folder)
    mean, std = made.limbeck_normalisation
    torch.testing.assert_close(pictures[2:4], (made.of_class(1).detach() * std[0] + mean[0]).clamp(0, 1))


def test_the_report_shows_the_images_and_what_is_learned_from_them(run, tmp_path):
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "What was distilled" in page
    assert "synthetic images of" in page
    assert "as many real images" in page
    assert "No images" not in page


def test_a_finished_run_is_measured_again(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PROTOCOL", Protocol(steps=3, batch_size=32, networks=2))
        figures = limbeck.evaluate(run.folder)
    (before,) = run.results().values()
    assert figures["accuracy"] == before["accuracy"]


@pytest.mark.parametrize("soft", [False, True])
def test_the_parquet_file_loads_with_datasets(run, soft, tmp_path):
    datasets = pytest.importorskip("datasets")
    from limbeck.core.specs import DataSpec
    from limbeck.data.open import open_data
    from limbeck.models.export import export_model

    made = limbeck.load(run.folder)
    if soft:
        made.set_labels(torch.rand(20, 10).softmax(1))
        export_model(made, tmp_path / "out", "parquet")
    else:
        limbeck.export(run.folder, "parquet", tmp_path / "out")
    path = tmp_path / "out" / "train.parquet"
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["label"][:] == made.hard_labels.tolist()
    assert loaded[0]["image"].size == (8, 8)
    if soft:
        torch.testing.assert_close(torch.tensor(loaded["probabilities"][:]), made.labels)
    ours = open_data(DataSpec(name=f"parquet:{path}", validation=0.2)).train  # and with limbeck itself
    assert ours.classes == 10


def test_data_without_classes_are_refused(tmp_path):
    from limbeck.core.batch import Batch
    from limbeck.core.method import DataInfo
    from limbeck.core.registry import method_class
    from limbeck.modality import check_task

    info = DataInfo(2, 0, Batch({"image": torch.zeros(2, 1, 8, 8)}))
    with pytest.raises(IncompatibleError, match="without classes"):
        check_task(method_class("dm").card, info, "distil")
