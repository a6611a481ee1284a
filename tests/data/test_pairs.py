"""Pairs of noise and data on disk."""

import json

import pytest
import torch

from limbeck.core.errors import DamagedFileError, IncompatibleError, UsageError
from limbeck.core.specs import DataSpec
from limbeck.data.open import open_data
from limbeck.data.pairs import PairSource, pair_noise, read_pairs, write_pairs
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import NetworkDenoiser
from limbeck.diffusion.generation import generate
from limbeck.diffusion.pairs import PairSampling
from tests.diffusion.test_pairs import flow_network

HOW = PairSampling("euler", 3, 1.5)


def source(items: int = 10) -> ArraySource:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(items) % 3
    labels[4] = -100
    return ArraySource(torch.rand(items, 1, 2, 2, generator=draws), labels, normalisation=([0.5], [0.5]))


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path / "pairs", flow_network(), source(), HOW, seed=3, per_item=2, batch_size=7)


def test_what_is_read_is_what_the_teacher_makes_of_the_noise(folder):
    pairs = read_pairs(folder)
    assert (len(pairs), pairs.classes) == (20, 3)
    assert pairs.about["sampling"] == {
        "solver": "euler", "steps": 3, "guidance": 1.5, "eps": 1e-3, "compat": False, "tolerance": 1e-5
    }  # fmt: skip
    index = torch.tensor([0, 9, 13])
    batch = pairs.fetch(index)
    assert torch.equal(batch["noise"], pair_noise(3, index, batch["image"]))
    assert batch["label"].tolist() == [0, -100, 0]  # of the items 0, 4 and 6
    denoiser = NetworkDenoiser(flow_network())
    told = {"label": torch.tensor([0, 3, 0])}
    made = generate(denoiser, batch["noise"], told, steps=3, guidance=1.5, solver="euler")
    torch.testing.assert_close(batch["image"], made)


def test_noise_depends_on_seed_and_number_alone():
    like = torch.zeros(3, 2, 2)
    noise = pair_noise(0, torch.tensor([5, 2, 7]), like)
    assert torch.equal(noise[1:2], pair_noise(0, torch.tensor([2]), like[:1]))
    assert not torch.equal(noise, pair_noise(1, torch.tensor([5, 2, 7]), like))
    many = pair_noise(0, torch.arange(4000), torch.zeros(4000, 2))
    assert abs(many.mean().item()) < 0.04
    assert abs(many.std().item() - 1) < 0.03
    assert pair_noise(0, torch.arange(2), like[:2].double()).dtype == torch.float64


def test_a_recipe_names_the_folder(folder):
    split = open_data(DataSpec(name=f"pairs:{folder}", validation=0.25, limit=12))
    assert (len(split.train), len(split.validation)) == (12, 5)
    both = torch.cat([split.train.rows["noise"], split.validation.rows["noise"]])
    assert len(both.flatten(1).unique(dim=0)) == 17
    assert {"noise", "image", "label", "index"} == set(split.train.info().example)


def test_altered_shards_and_full_folders_are_refused(folder):
    with pytest.raises(UsageError, match="not empty"):
        write_pairs(folder, flow_network(), source(), HOW)
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match="shard-00001"):
        read_pairs(folder)
    about = json.loads((folder / "pairs.json").read_text())
    about["sampling"]["guidance"] = 1.0  # another guidance is another coupling
    (folder / "pairs.json").write_text(json.dumps(about))
    with pytest.raises(DamagedFileError, match=r"pairs\.json"):
        read_pairs(folder)


def test_pairs_need_both_ends():
    with pytest.raises(IncompatibleError, match="noise and image"):
        PairSource({"image": torch.zeros(2, 1)})
    with pytest.raises(IncompatibleError, match="noise and image"):
        PairSource({"image": torch.zeros(2, 1), "noise": torch.zeros(2, 2)})
    with pytest.raises(IncompatibleError, match="at least one item"):
        PairSource({"image": torch.zeros(0, 1), "noise": torch.zeros(0, 1)})
