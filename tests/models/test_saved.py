"""Saving and loading: exact round trips, damage that is noticed, and files that are refused unopened."""

import contextlib
import json
import os
import pickle
import random

import pytest
import torch
from torch import nn

from limbeck.core.errors import DamagedFileError, IncompatibleError, LimbeckError, UsageError
from limbeck.models.convnet import ConvNet
from limbeck.models.mlp import MLP
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.saved import load_model, save_model
from limbeck.models.vit import VisionTransformer
from tests.models.information import same_weights


class Tied(nn.Module):
    """A model of the user's own, with one tensor under two names and a view of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("part", torch.arange(10.0)[2:5])
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)


@pytest.fixture
def stored(tmp_path):
    model = ConvNet(width=3)
    save_model(model, tmp_path / "m")
    return model, tmp_path / "m"


@pytest.mark.parametrize(
    "model",
    [ConvNet(width=3, blocks=2), VisionTransformer(dim=8, depth=1, heads=2, distilled=True), MLP(depth=0)],
    ids=lambda model: type(model).__name__,
)
def test_shipped_networks_come_back_as_they_were(tmp_path, model):
    set_normalisation(model, [0.5], [0.25])
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert type(again) is type(model)
    assert again.config == model.config
    assert same_weights(again, model)
    assert normalisation_of(again) == ([0.5], [0.25])
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_of_one_s_own_is_loaded_into_an_object(tmp_path):
    model = Tied()
    save_model(model, tmp_path)
    with pytest.raises(IncompatibleError, match=r"Tied.*\n.*model="):
        load_model(tmp_path)
    again = load_model(tmp_path, Tied())
    assert same_weights(again, model)
    assert again.two.weight is again.one.weight


def test_a_subclass_is_not_taken_for_a_shipped_network(tmp_path):
    class Wider(ConvNet):
        pass

    save_model(Wider(width=3), tmp_path)
    with pytest.raises(IncompatibleError, match="Wider"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(stored):
    with pytest.raises(IncompatibleError, match=r"do not fit ConvNet: .*stages\.0"):
        load_model(stored[1], ConvNet(width=4))
    with pytest.raises(IncompatibleError, match="do not fit MLP"):
        load_model(stored[1], MLP())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "folder"])
def test_damage_is_named(stored, name, damage):
    path = stored[1] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    with pytest.raises(DamagedFileError, match=name):
        load_model(stored[1])


def test_no_flip_of_a_bit_in_the_headers_leads_to_another_error(stored):
    draws = random.Random(0)
    for name, most in (("config.json", 10_000), ("model.safetensors", 600)):
        path = stored[1] / name
        content = path.read_bytes()
        for _ in range(150):
            place = draws.randrange(min(most, len(content)))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draws.randrange(8)]) + content[place + 1 :])
            with contextlib.suppress(LimbeckError):  # a flip in a weight or a note is for the run's manifest to tell
                load_model(stored[1])
        path.write_bytes(content)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "null",
        '{"format": "limbeck"}',
        '{"format": "limbeck", "model": "os.system", "arguments": {}}',
        '{"format": "limbeck", "model": "convnet", "arguments": {"width": "x"}}',
        '{"format": "limbeck", "model": "convnet", "arguments": [1]}',
        '{"format": "limbeck", "model": ["convnet"], "arguments": {}}',
        '{"format": "limbeck", "model": "convnet", "arguments": {}, "normalisation": 3}',
        '{"architecture": "resnet10t"}',
        '{"architecture": "os.system", "num_classes": 3, "pretrained_cfg": {}}',
        '{"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {}, "model_args": {"checkpoint_path": "x"}}',
        '{"architectures": ["system"], "model_type": "vit"}',
        '{"architectures": ["pipeline"], "model_type": "vit"}',
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}',
        '{"something": "else"}',
        "[" * 100_000,
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(stored, config):
    (stored[1] / "config.json").write_text(config)
    with pytest.raises(LimbeckError) as caught:
        load_model(stored[1])
    assert str(stored[1]) in str(caught.value)


class Explosive:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "model.safetensors"])
def test_pickles_are_refused_unopened(stored, tmp_path, name):
    (stored[1] / "model.safetensors").unlink()
    (stored[1] / name).write_bytes(pickle.dumps(Explosive(tmp_path / "mark")))
    with pytest.raises(LimbeckError, match=r"pickle|damaged"):
        load_model(stored[1])
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_ignored(stored, tmp_path):
    (stored[1] / "optimizer.pt").write_bytes(pickle.dumps(Explosive(tmp_path / "mark")))
    assert same_weights(load_model(stored[1]), stored[0])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_leave_the_folder_are_refused(stored, tmp_path, name):
    path = stored[1] / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="link that leaves"):
        load_model(stored[1])
    path.unlink()
    (tmp_path / "elsewhere").rename(stored[1] / "within")
    path.symlink_to("within")
    assert same_weights(load_model(stored[1]), stored[0])


def test_links_of_the_hub_s_cache_are_followed(stored, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (stored[1] / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert same_weights(load_model(snapshot), stored[0])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        load_model(tmp_path / "nothing")


def test_the_configuration_is_plain_json(stored):
    config = json.loads((stored[1] / "config.json").read_text())
    assert config["model"] == "convnet"
    assert config["arguments"] == stored[0].config
