"""Pruning in one shot: layers in order, figures, interruption, classifiers and language models."""

import copy

import pytest
import torch

from limbeck.compression.masks import Pattern, keep_largest
from limbeck.compression.matrices import InputStatistics, as_matrices, input_rows, matrix_layers
from limbeck.compression.quantized import quantization_of
from limbeck.compression.second_order import solve
from limbeck.core.call import call
from limbeck.core.errors import IncompatibleError, Interrupted
from limbeck.core.method import ProcedureContext
from limbeck.core.randomness import generator
from limbeck.data.source import ArraySource
from limbeck.methods.conversion.layer_choice import down_to_number
from limbeck.methods.conversion.prune import Prune
from limbeck.metrics.tasks import evaluate_for
from limbeck.models.convnet import ConvNet
from tests.methods.language.rig import gpt2, llama, source


def images():
    draws = torch.Generator().manual_seed(0)
    return ArraySource(torch.rand(40, 1, 8, 8, generator=draws), torch.arange(40) % 10)


def pruned(student, folder, data=None, pause=lambda: None, rows=None, **options):
    data = data or source()
    method = Prune(
        Prune.Options(**{"calibration_items": 16, **options}), student=student, teacher=None, data=data.info()
    )
    log = (rows if rows is not None else []).append
    result = method.run(ProcedureContext(source=data, directory=folder, seed=3, log=log, pause=pause))
    return result, method.figures()


def zeros(model, path):
    return model.get_parameter(f"{path}.weight") == 0


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("network", ["llama", "gpt2", "convnet"])
def test_every_layer_gets_its_zeros_and_the_rest_stays_dense(network, criterion, tmp_path):
    student = {"llama": llama, "gpt2": lambda: gpt2(n_layer=2), "convnet": lambda: ConvNet(width=8, depth=3)}[network]()
    before, rows = copy.deepcopy(student), []
    data = images() if network == "convnet" else source()
    result, figures = pruned(student, tmp_path, data, rows=rows, criterion=criterion, sparsity=0.6)
    layers = matrix_layers(before)
    assert result is student
    assert figures["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert figures["sparsity_by_layer"].keys() == layers.keys() == figures["reconstruction_error_by_layer"].keys()
    assert "unreached" not in figures
    for path, layer in layers.items():
        count, rows_of = layer.weight.numel(), as_matrices(layer, layer.weight)
        exact = round(0.6 * rows_of.shape[-1]) * rows_of.shape[1] if criterion == "wanda" else round(0.6 * count)
        assert abs(int(zeros(result, path).sum()) - exact) <= 1
        assert 0 < figures["reconstruction_error_by_layer"][path] < 1
    touched = {f"{path}.weight" for path in layers}
    for name, value in before.state_dict().items():
        assert name in touched or torch.equal(value, result.state_dict()[name]), name
    assert len(rows) == {"llama": 2, "gpt2": 2, "convnet": 3}[network]


def test_second_order_changes_the_outputs_least(tmp_path):
    errors = {
        criterion: pruned(llama(), tmp_path / criterion, criterion=criterion, calibration_items=24)[1][
            "reconstruction_error"
        ]
        for criterion in ("obs", "wanda", "magnitude")
    }
    assert errors["obs"] < 0.8 * errors["wanda"] < 0.8 * errors["magnitude"]


def test_layers_see_what_pruned_layers_give_them(tmp_path):
    """Written out for a network of two layers: the second one's inputs are those behind the pruned first."""
    torch.manual_seed(0)
    student, data = ConvNet(width=4, depth=2, norm="none"), images()
    first, second = (stage.conv for stage in copy.deepcopy(student).stages)
    order = torch.randperm(40, generator=generator(3, "calibration"))
    x = data.fetch(order[:16]).image
    for layer in (first, second):
        seen = input_rows(layer, x)[0]
        weight = layer.weight.detach().flatten(1)
        solved = solve(weight, seen.T @ seen, sparsity=0.5).weight
        with torch.no_grad():
            layer.weight.copy_(solved.view_as(layer.weight))
            x = layer(x).relu()
    result, _ = pruned(student, tmp_path, data, sparsity=0.5)
    for layer, stage in zip((first, second), result.stages, strict=True):
        torch.testing.assert_close(stage.conv.weight, layer.weight, rtol=1e-3, atol=1e-4)


def test_how_often_inputs_are_looked_at_again(tmp_path):
    made = {
        refresh: pruned(llama(), tmp_path / refresh, refresh=refresh)[0].state_dict()
        for refresh in ("layer", "block", "never")
    }
    early, late = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert all(torch.allclose(state[early], made["never"][early], atol=1e-6) for state in made.values())
    assert not torch.equal(made["layer"][late], made["block"][late])
    assert not torch.equal(made["never"][late], made["block"][late])
    assert down_to_number("model.layers.11.mlp.up_proj") == "model.layers.11"
    assert down_to_number("3") == "3"
    assert down_to_number("head") == "head"


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
def test_patterns(criterion, tmp_path):
    result, figures = pruned(llama(), tmp_path, criterion=criterion, pattern="2:4", sparsity=0.9)
    assert figures["sparsity"] == 0.5
    for path in figures["sparsity_by_layer"]:
        assert ((~zeros(result, path)).view(-1, 4).sum(1) == 2).all()
    with pytest.raises(IncompatibleError, match=r"24 inputs of 'model.layers.0.mlp.down_proj' are no whole .* of 16"):
        pruned(llama(), tmp_path / "16", pattern="8:16")
    assert Pattern.parse("2:4").sparsity == 0.5


def test_a_global_choice_lets_layers_differ(tmp_path):
    result, figures = pruned(llama(), tmp_path, criterion="magnitude", scope="global", sparsity=0.7)
    layers = matrix_layers(llama())
    scores = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
    keep = keep_largest(scores[None, None], 0.7).flatten()
    found = torch.cat([~zeros(result, path).flatten() for path in layers])
    assert torch.equal(found, keep)
    assert figures["sparsity"] == pytest.approx(0.7, abs=1e-3)
    for wrong in ({"scope": "global"}, {"scope": "global", "criterion": "wanda", "pattern": "2:4"}, {"pattern": "4:2"}):
        with pytest.raises(ValueError, match=r"global|no pattern"):
            Prune.Options(**wrong)


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_rounding_afterwards_keeps_the_zeros(criterion, tmp_path):
    sparse, _ = pruned(llama(), tmp_path / "sparse", sparsity=0.6)
    before = copy.deepcopy(sparse)
    result, figures = pruned(sparse, tmp_path / "rounded", criterion=criterion, sparsity=0.0, bits=4)
    assert 0.6 <= figures["sparsity"] < 0.75  # some small weights round to zero
    for path in figures["sparsity_by_layer"]:
        old, new = before.get_parameter(f"{path}.weight"), result.get_parameter(f"{path}.weight")
        assert not new[old == 0].any()
        for was, row in zip(old, new, strict=True):
            step = float(was.detach().abs().max()) / 7
            assert all(abs(value / step - round(value / step)) < 1e-3 for value in row.tolist())
            assert len(set(row.tolist())) <= 15


class Stops:
    """Asks to stop before one unit of work."""

    def __init__(self, at):
        self.left = at

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stop")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    straight, figures = pruned(llama(), tmp_path / "straight")
    with pytest.raises(Interrupted):
        pruned(llama(), tmp_path / "torn", pause=Stops(2))
    rows = []
    resumed, again = pruned(llama(), tmp_path / "torn", rows=rows)
    assert [row["step"] for row in rows] == [2]
    assert again == figures
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_layers_that_no_item_reaches_are_named_and_stay_dense(tmp_path):
    student = ConvNet(width=8, depth=2)
    student.spare = torch.nn.Linear(4, 4)
    result, figures = pruned(student, tmp_path, images())
    assert figures["unreached"] == ["spare"]
    assert not zeros(result, "spare").any()
    with pytest.raises(IncompatibleError, match="no layer is reached"):
        pruned(student, tmp_path / "none", images(), layers=["spare"])
    with pytest.raises(IncompatibleError, match="matches no"):
        pruned(student, tmp_path / "none", images(), exclude=["nothing"])


def test_padding_does_not_judge(tmp_path):
    model, data = llama(), source()
    items = data.fetch(torch.arange(4))
    with InputStatistics(matrix_layers(model)) as seen:
        seen.during(lambda: call(model, items), items.attention_mask.bool())
    assert {found.samples for found in seen.found.values()} == {int(items.attention_mask.sum())}


def test_it_is_measured_by_what_the_data_are():
    measure = evaluate_for(Prune.card.task)
    assert "accuracy" in measure(ConvNet(width=4), images())
    assert "perplexity" in measure(llama(), source())


@pytest.mark.parametrize(("bits", "group"), [(2, None), (4, 8), (9, None)])
def test_rounding_is_noted_to_the_bit_also_after_an_interruption(bits, group, tmp_path):
    with pytest.raises(Interrupted):
        pruned(llama(), tmp_path, pause=Stops(2), bits=bits, group=group)
    result, figures = pruned(llama(), tmp_path, bits=bits, group=group)
    state = quantization_of(result)
    assert state.keys() == {f"{path}.weight" for path in figures["sparsity_by_layer"]}
    assert {tensor.levels for tensor in state.values()} == {2 ** (bits - 1)}
    assert figures["quantized_weights"] == sum(tensor.count for tensor in state.values())


def test_what_the_compact_form_cannot_hold_is_not_noted(tmp_path):
    assert quantization_of(pruned(gpt2(), tmp_path / "transposed", bits=4)[0]) is None
    assert quantization_of(pruned(llama(), tmp_path / "fine", bits=10)[0]) is None
    state = quantization_of(pruned(llama(), tmp_path / "uneven", bits=4, group=16)[0])
    assert len(state) == 12  # but the two layers of 24 inputs
