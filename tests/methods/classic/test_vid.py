import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.features import vid
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, student_net, update_of
from tests.oracles.oracle import load

(CASE,) = (case for case in load("kd-foundations") if case.name == "vid")


def test_the_loss_is_the_weighted_sum_over_stages():
    method = build("vid", label_weight=0.3, weight=0.7, variance=2.0)
    features, ours, targets, _ = both(method)
    connectors = list(method.connectors.values())
    term = sum(vid(c(s), t, c.log_scale) for c, s, t in zip(connectors, features, targets, strict=True))
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    for connector in connectors:
        torch.testing.assert_close(F.softplus(connector.log_scale) + 1e-5, torch.full_like(connector.log_scale, 2.0))
    check_gradients(method)


def test_a_student_of_another_resolution_is_pooled():
    method = build("vid", student=student_net(depth=2), teacher_layers=["stages.1", "stages.2"])
    features, _, targets, _ = both(method)
    first, second = method.connectors.values()
    term = vid(first(F.avg_pool2d(features[0], 2)), targets[1], first.log_scale)
    term = term + vid(second(F.avg_pool2d(features[1], 2)), targets[2], second.log_scale)
    torch.testing.assert_close(update_of(method).logs["objective"], term)


def test_the_connector_computes_what_the_original_does():
    method = build("vid")
    connector = type(method.connectors["0"])(6, 10, 5.0)
    convolutions = [part for part in connector.mean if isinstance(part, torch.nn.Conv2d)]
    for convolution, name in zip(convolutions, ("w1", "w2", "w3"), strict=True):
        convolution.weight = torch.nn.Parameter(CASE.inputs[name])
    connector.log_scale = torch.nn.Parameter(CASE.inputs["log_scale"])
    method.connectors["0"] = connector
    student = CASE.inputs["fs"].requires_grad_()
    loss = method.layer_objective(0, student, CASE.inputs["ft"])
    CASE.check("loss", loss)
    CASE.check("grad_fs", torch.autograd.grad(loss, student)[0], of_largest=True)


def test_the_default_variance_is_the_original_s():
    assert build("vid").options.variance == pytest.approx(CASE.hyperparameters["init_pred_var"])
