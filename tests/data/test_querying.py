import pytest
import torch

from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.core.teacher import LiveTeacher, TeacherSignal
from limbeck.data.purchases import Purchases
from limbeck.data.querying import ask, look
from limbeck.data.source import ArraySource
from limbeck.models.convnet import ConvNet

SOURCE = ArraySource(torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), augmentations=("flip",))
ROWS = torch.tensor([7, 2, 11, 0, 5])


def net():
    torch.manual_seed(0)
    return ConvNet(width=4, depth=2)


def test_answers_are_probabilities_of_the_plain_items_in_order():
    network = net()
    answers = ask(LiveTeacher(network), SOURCE, ROWS, batch_size=2)
    torch.testing.assert_close(answers, network(SOURCE.fetch(ROWS).image).softmax(1))


def test_a_teacher_without_logits_is_refused():
    class Mute(LiveTeacher):
        def signal(self, batch, layers=()):
            return TeacherSignal(None)

    with pytest.raises(IncompatibleError, match="no logits"):
        ask(Mute(net()), SOURCE, ROWS)


def test_features_are_those_of_the_layer_averaged_over_pixels():
    network = net().train()
    layer = network.layers()[-1]
    logits, features = look(network, SOURCE, ROWS, layer, batch_size=2)
    images = SOURCE.fetch(ROWS).image
    assert not logits.requires_grad
    torch.testing.assert_close(logits, network(images).detach())
    maps = images
    for stage in network.stages:
        maps = stage(maps)
    torch.testing.assert_close(features, maps.mean((2, 3)).detach())
    assert torch.equal(*look(network, SOURCE, ROWS))  # without a layer the logits are the features


def test_purchases_come_back_as_they_were(tmp_path):
    states, weights = Checkpoints(tmp_path), {"w": torch.randn(3)}
    assert Purchases.restore(states) is None
    first = Purchases(1, torch.tensor([4, 2]), torch.empty(0, 3), 0.25, weights, {"w": torch.ones(3)})
    first.save(states)
    Purchases(1, first.rows, torch.rand(1, 3), 0.25, weights, first.student).save(states)
    found = Purchases.restore(states)
    assert (found.round, found.error, found.rows.tolist(), found.answers.shape) == (1, 0.25, [4, 2], (1, 3))
    assert torch.equal(found.initial["w"], weights["w"])
    assert torch.equal(found.student["w"], torch.ones(3))


def test_what_is_no_purchase_is_named(tmp_path):
    Checkpoints(tmp_path).save(Checkpoint(3, {"asked": {"rows": torch.zeros(1)}}, {"round": 1}))
    with pytest.raises(DamagedFileError, match="step-000000003 is damaged: it holds no purchases"):
        Purchases.restore(Checkpoints(tmp_path))
