import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.specs import DataSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.duplicates import near_duplicates, perceptual_hash, thumbnail
from limbeck.data.join import JoinedSource
from limbeck.data.open import open_data
from limbeck.data.selection import label_images, mine, top_k_per_class
from limbeck.data.source import ArraySource
from limbeck.data.split import split_pool


class NoLabels(ArraySource):
    """Images whose labels raise when anyone looks at them."""

    def __getattribute__(self, name):
        if name == "labels" and getattr(self, "sealed", False):
            raise AssertionError("a label was read")
        return super().__getattribute__(name)

    def __len__(self):
        return len(self._images)

    def fetch(self, indices, seed=None):
        return super().fetch(indices, seed) if not getattr(self, "sealed", False) else _unlabelled(self, indices)

    def select(self, rows):
        return NoLabels.sealed_from(self._images[rows])

    @classmethod
    def sealed_from(cls, images):
        source = cls(images, normalisation=([0.0], [1.0]), classes=10)
        source.sealed = True
        return source


def _unlabelled(source, indices):
    from limbeck.core.batch import Batch

    return Batch({"image": source.images(indices), "index": indices})


class Nearest(nn.Module):
    """Classes by the nearest class mean of labelled images."""

    def __init__(self, images, labels):
        super().__init__()
        self.means = torch.stack([images[labels == one].mean(0) for one in range(10)]).flatten(1)

    def forward(self, image):
        return -4 * torch.cdist(image.flatten(1), self.means)


@pytest.fixture(scope="module")
def digits():
    opened = open_data(DataSpec())
    images = [one.images(torch.arange(len(one))) for one in (opened.train, opened.validation)]
    return images[0], opened.train.labels, images[1]


def planted(images, evaluation, count=30):
    """A pool of 1000 images, of which `count` are evaluation images with another exposure and a little noise."""
    draws = torch.Generator().manual_seed(0)
    copies = 0.05 + 0.85 * evaluation[:count] + 0.02 * torch.randn(count, 1, 8, 8, generator=draws)
    pool = torch.cat([images[: 1000 - count], copies.clamp(0, 1)])
    order = torch.randperm(1000, generator=draws)
    return pool[order], (order >= 1000 - count)


def test_mining_finds_planted_duplicates_and_clear_images_of_every_class(digits):
    images, labels, evaluation = digits
    pool, plants = planted(images, evaluation)
    labeller = LiveTeacher(Nearest(images, labels))
    mined = mine(NoLabels.sealed_from(pool), ArraySource(evaluation), labeller, 40, cosine=0.98)
    assert int(plants[mined.duplicates].sum()) >= 29
    assert len(mined.duplicates) < 30 + 0.04 * 970  # and few others
    assert not set(mined.duplicates.tolist()) & set(mined.rows.tolist())
    counts = torch.bincount(mined.classes, minlength=10)
    assert int(counts.max()) == 40
    order = torch.randperm(1000, generator=_after_noise())
    truth = torch.cat([labels[:970], torch.full((30,), -1)])[order]
    assert float((truth[mined.rows] == mined.classes).float().mean()) > 0.9
    assert torch.equal(mined.source.images(torch.arange(len(mined.rows))), pool[mined.rows])


def _after_noise():
    draws = torch.Generator().manual_seed(0)
    torch.randn(30, 1, 8, 8, generator=draws)
    return draws


def test_the_best_of_each_class_stay():
    classes = torch.tensor([1, 0, 1, 1, 0, 3])
    scores = torch.tensor([0.2, 0.9, 0.8, 0.8, 0.95, 0.1])
    assert top_k_per_class(classes, scores, 1).tolist() == [2, 4, 5]  # of equal scores the first
    assert top_k_per_class(classes, scores, 2).tolist() == [1, 2, 3, 4, 5]
    assert top_k_per_class(classes, scores, 9).tolist() == list(range(6))
    with pytest.raises(IncompatibleError, match="per_class"):
        top_k_per_class(classes, scores, 0)


def test_labels_come_from_the_labeller(digits):
    images, labels, _ = digits
    network = Nearest(images, labels)
    source = ArraySource(images[:70], normalisation=([0.0], [1.0]))
    rows = torch.tensor([5, 3, 60])
    classes, scores = label_images(source, rows, LiveTeacher(network), batch_size=2)
    expected = network(images[rows]).softmax(1)
    assert torch.equal(classes, expected.argmax(1))
    torch.testing.assert_close(scores, expected.amax(1))


def test_nothing_is_left_of_a_pool_of_duplicates(digits):
    images, labels, evaluation = digits
    with pytest.raises(IncompatibleError, match="near-duplicate"):
        mine(ArraySource(evaluation), ArraySource(evaluation), LiveTeacher(Nearest(images, labels)), 3)


def test_a_descriptor_of_the_user_is_asked_alone_without_hashes():
    pool, evaluation = torch.rand(6, 1, 8, 8), torch.rand(2, 1, 8, 8)

    def corner(images):
        return torch.stack([images[:, 0, 0, 0] - 0.5, torch.ones(len(images))], 1)

    pool[3, 0, 0, 0] = evaluation[1, 0, 0, 0]
    found = near_duplicates(ArraySource(pool), ArraySource(evaluation), descriptor=corner, cosine=0.999999, bits=None)
    assert found[3]
    both = near_duplicates(ArraySource(pool), ArraySource(evaluation), descriptor=corner, cosine=-1.0, bits=0)
    assert not both.any()  # the hashes tell random images apart
    with pytest.raises(IncompatibleError, match="vectors"):
        near_duplicates(ArraySource(pool), ArraySource(evaluation), descriptor=lambda images: images[:1])


def test_hash_and_thumbnail_do_not_see_exposure_and_size():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(nn.functional.avg_pool2d(images, 16), (64, 64), mode="bilinear")
    darker, smaller = 0.5 * images + 0.1, nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    code = perceptual_hash(images)
    assert code.shape == (4, 63)
    for other in (darker, smaller):
        differing = (63 - code @ perceptual_hash(other).T) / 2
        assert float(differing.diagonal().max()) <= 10
        assert float(differing[~torch.eye(4, dtype=bool)].min()) > 20
        cosine = nn.functional.cosine_similarity(thumbnail(images), thumbnail(other))
        assert float(cosine.min()) > 0.99


def test_joined_sources_are_read_as_one_in_any_order():
    draws = torch.Generator().manual_seed(0)
    parts = [
        ArraySource(torch.rand(size, 1, 4, 4, generator=draws), torch.arange(size) % 3, classes=3) for size in (5, 2, 4)
    ]
    joined = JoinedSource(parts)
    everything = torch.cat([part.images(torch.arange(len(part))) for part in parts])
    rows = torch.tensor([10, 0, 6, 4, 5, 0])
    assert torch.equal(joined.images(rows), everything[rows])
    assert joined.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 0]
    assert joined.normalisation == parts[0].normalisation
    chosen = joined.select(torch.tensor([9, 1, 6]))
    assert torch.equal(chosen.images(torch.tensor([2, 0])), everything[[6, 9]])
    assert chosen.labels.tolist() == [2, 1, 1]
    assert torch.equal(chosen.select(torch.tensor([1])).images(torch.tensor([0])), everything[[1]])
    bare = JoinedSource(parts, torch.full((11,), -100))
    assert isinstance(bare.info(), DataInfo)
    assert set(bare.labels.tolist()) == {-100}


def test_what_does_not_go_together_is_not_joined():
    with pytest.raises(IncompatibleError, match="uint8"):
        JoinedSource([ArraySource(torch.rand(2, 1, 4, 4)), ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))])
    with pytest.raises(IncompatibleError, match="no source"):
        JoinedSource([])
    with pytest.raises(IncompatibleError, match="labels of shape"):
        JoinedSource([ArraySource(torch.rand(2, 1, 4, 4))], torch.zeros(3).long())


def test_a_pool_is_split_by_seed_and_labels():
    labels = torch.arange(50) % 10
    labels[::5] = -100
    split = split_pool(labels, 12, 8, seed=3)
    assert [len(part) for part in split] == [12, 8, 30]
    assert sorted(torch.cat(split).tolist()) == list(range(50))
    assert bool((labels[split.labelled] >= 0).all())
    assert bool((labels[split.holdout] >= 0).all())
    assert all(map(torch.equal, split, split_pool(labels, 12, 8, seed=3)))
    assert not torch.equal(split.labelled, split_pool(labels, 12, 8, seed=4).labelled)
    rest = split_pool(labels, None, 8)
    assert [len(part) for part in rest] == [32, 8, 10]
    assert bool((labels[rest.unlabelled] == -100).all())


@pytest.mark.parametrize(("labelled", "holdout"), [(None, 50), (40, 11), (None, 0)])
def test_a_pool_that_cannot_be_split_is_refused(labelled, holdout):
    with pytest.raises(IncompatibleError, match=r"lower holdout|no pool"):
        split_pool(torch.arange(50) % 10, labelled, holdout)
