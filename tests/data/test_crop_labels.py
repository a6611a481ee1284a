"""Stored soft labels: what comes back, and what is refused."""

import pytest
import torch

from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.data.crop_labels import CropLabels

ABOUT = {"teacher": "abc", "flip": 0.5}
INDEX = torch.tensor([4, 1, 7])
TENSORS = {"logits": torch.randn(3, 5).half(), "flips": torch.tensor([True, False, True]), "paste": torch.arange(4)}


def test_what_was_stored_comes_back_for_the_same_step_and_items(tmp_path):
    labels = CropLabels(tmp_path / "a", ABOUT)
    assert labels.read(2, INDEX) is None
    labels.write(2, INDEX, TENSORS)
    again = CropLabels(tmp_path / "a", ABOUT).read(2, INDEX)
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], value) for name, value in TENSORS.items())
    assert labels.read(3, INDEX) is None
    assert labels.read(2, INDEX.flip(0)) is None


def test_labels_of_another_teacher_are_refused(tmp_path):
    CropLabels(tmp_path, ABOUT).write(0, INDEX, TENSORS)
    with pytest.raises(IncompatibleError, match="another teacher"):
        CropLabels(tmp_path, {**ABOUT, "teacher": "abd"})


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_damage_is_named(tmp_path, damage):
    labels = CropLabels(tmp_path, ABOUT)
    labels.write(0, INDEX, TENSORS)
    (path,) = tmp_path.glob("step-*")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:50]), "other": b"nothing"}[damage])
    with pytest.raises(DamagedFileError, match=path.name):
        labels.read(0, INDEX)
