"""Opening the embedded digits, IDX files and NumPy archives."""

import gzip
import pickle
import struct

import numpy
import pytest
import torch

from limbeck.core.errors import DamagedFileError, RecipeError, UnknownNameError
from limbeck.core.specs import DataSpec
from limbeck.data.open import open_data
from limbeck.data.split import stratified_split
from tests.data.pictures import write_idx


def test_digits_are_split_by_class_and_always_in_the_same_way():
    first, second = (open_data(DataSpec(), seed) for seed in (0, 1))
    assert (len(first.train), len(first.validation), first.train.classes) == (1438, 359, 10)
    assert torch.equal(first.validation.labels, second.validation.labels)
    shares = torch.bincount(first.validation.labels) / torch.bincount(
        torch.cat([first.train.labels, first.validation.labels])
    )
    torch.testing.assert_close(shares, torch.full((10,), 0.2), atol=0.005, rtol=0)


def test_only_training_images_are_augmented_and_measured():
    split = open_data(DataSpec(augment=["flip"], limit=500))
    assert len(split.train) == 500
    assert split.train.augmentations == ("flip",)
    assert split.validation.augmentations == ()
    assert split.validation.normalisation == split.train.normalisation
    assert split.train.fetch(torch.arange(500)).image.mean().abs() < 1e-5


def test_a_given_mean_and_deviation_are_used_for_both_parts():
    split = open_data(DataSpec(mean=[0.5], std=[0.25]))
    assert split.train.normalisation == split.validation.normalisation == ([0.5], [0.25])


def test_digits_are_resized():
    assert open_data(DataSpec(image_size=12)).train.info().example.image.shape == (2, 1, 12, 12)


def test_a_stratified_split_keeps_every_class_on_both_sides():
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 1 + [-100] * 10)
    kept, held = stratified_split(labels, 0.1)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(63))
    assert torch.bincount(labels[held] + 100, minlength=103)[[0, 100, 101, 102]].tolist() == [1, 5, 1, 0]
    assert not torch.equal(held, stratified_split(labels, 0.1, seed=1)[1])


@pytest.mark.parametrize("zipped", [True, False])
def test_one_idx_pair_is_split_by_index(tmp_path, zipped):
    write_idx(tmp_path / "m", "t10k", 50, zipped)
    split = open_data(DataSpec(name=f"mnist:{tmp_path / 'm'}", mean=[0.0], std=[1.0]))
    assert (len(split.train), len(split.validation)) == (40, 10)
    batch = split.validation.fetch(torch.tensor([3]))
    assert batch.label.item() == 3
    assert torch.equal((batch.image * 255).round().long().flatten(), (43 + torch.arange(30)) % 256)


def test_two_idx_pairs_are_training_and_validation(tmp_path):
    write_idx(tmp_path, "train", 30)
    write_idx(tmp_path, "t10k", 12)
    split = open_data(DataSpec(name=f"mnist:{tmp_path}", image_size=8))
    assert (len(split.train), len(split.validation)) == (30, 12)
    assert split.train.info().example.image.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b"\0\0\x08\x03"),
        gzip.compress(struct.pack(">4I", 0x0803, 50, 6, 5) + bytes(100)),
        gzip.compress(struct.pack(">4I", 0x0801, 50, 6, 5) + bytes(1500)),
        gzip.compress(struct.pack(">4I", 0x0803, 2**31, 2**31, 2**31)),
        gzip.compress(struct.pack(">4I", 0x0803, 50, 6, 5) + bytes(1500))[:-20],
        gzip.compress(struct.pack(">4I", 0x0803, 49, 6, 5) + bytes(1470)),
    ],
    ids=["no gzip", "no header", "short", "labels", "overflow", "cut off", "one image too few"],
)
def test_damaged_idx_files_are_named(tmp_path, content):
    write_idx(tmp_path, "train", 50)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DamagedFileError, match="train-"):
        open_data(DataSpec(name=f"mnist:{tmp_path}"))


@pytest.mark.parametrize("shape", [(30, 5, 6), (30, 5, 6, 3), (30, 3, 5, 6)])
def test_archives_hold_images_in_the_usual_orders(tmp_path, shape):
    images = numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)
    numpy.savez(tmp_path / "a.npz", image=images, label=numpy.arange(30) % 3)
    split = open_data(DataSpec(name=f"npz:{tmp_path / 'a.npz'}", mean=[0.0] * (3 if len(shape) == 4 else 1)))
    assert split.train.info().example.image.shape == (2, 3 if len(shape) == 4 else 1, 5, 6)
    assert (len(split.train), len(split.validation), split.train.classes) == (24, 6, 3)


def test_an_archive_s_arrays_can_be_named(tmp_path):
    numpy.savez(tmp_path / "a.npz", x=numpy.random.rand(30, 5, 6), y=numpy.arange(30) % 3)
    spec = {"name": f"npz:{tmp_path / 'a.npz'}", "image_column": "x"}
    with pytest.raises(RecipeError, match=r"data\.label_column.*'label'"):
        open_data(DataSpec(**spec))
    assert len(open_data(DataSpec(**spec, label_column="y")).train) == 24


class Explosive:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return print, ("the pickle was opened",)


def test_pickles_in_archives_are_refused_unopened(tmp_path, capsys):
    numpy.savez(tmp_path / "a.npz", image=numpy.array([Explosive()] * 3), label=numpy.zeros(3))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Explosive()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DamagedFileError, match=name):
            open_data(DataSpec(name=f"npz:{tmp_path / name}"))
    assert "opened" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("digit", UnknownNameError, "did you mean 'digits'"),
        ("digits:here", UnknownNameError, "did you mean 'digits'"),
        ("mnist", UnknownNameError, "mnist:PATH"),
        ("parket:here", UnknownNameError, "parquet:PATH"),
        ("npz:/nowhere/x.npz", RecipeError, r"data\.name: there is no file or folder"),
        ("mnist:.", RecipeError, "no IDX files"),
    ],
)
def test_wrong_names_get_a_hint(name, error, message):
    with pytest.raises(error, match=message):
        open_data(DataSpec(name=name))


def test_wrong_numbers_of_channels_are_refused():
    with pytest.raises(Exception, match="1 channels"):
        open_data(DataSpec(mean=[0.1, 0.2, 0.3]))
