"""SquareHead: its loss by hand, its zeros, its schedule. No recorded numbers exist; everything is worked out again."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from limbeck.compression.matrices import matrix_layers
from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import OptimizerSpec
from limbeck.language.states import StateReader
from limbeck.methods.conversion.squarehead import SquareHead
from limbeck.models.saved import save_model
from limbeck.objectives.features import square_head
from tests.methods.language.rig import (
    Headless,
    batch,
    both,
    build,
    check_gradients,
    gpt2,
    llama,
    logits,
    targets,
    trainer,
    update_of,
)

EPS = 2.0**-7
ADAM = OptimizerSpec(name="adam", lr=0.02, weight_decay=0.1, schedule="constant")


def sparse(model, share=0.75):
    """The model without the smallest weights of each layer."""
    with torch.no_grad():
        for layer in matrix_layers(model).values():
            limit = layer.weight.abs().flatten().kthvalue(int(share * layer.weight.numel())).values
            layer.weight[layer.weight.abs() <= limit] = 0
    return model


def made(student=None, teacher=None, **options):
    student = sparse(llama(seed=4)) if student is None else student
    return build("squarehead", student=student, teacher=teacher, **options)


def states(model, items):
    """Hidden states of all layers, of every position: those of the blocks, the last one normed."""
    found = model(input_ids=items.input_ids, attention_mask=items.attention_mask, output_hidden_states=True)
    return found.hidden_states[1:]


def by_loops(ours, theirs, mask):
    """The sum over layers, in plain Python."""
    total = 0.0
    for one, other in zip(ours, theirs, strict=True):
        error = size = count = 0.0
        for row_s, row_t, counted in zip(one.tolist(), other.tolist(), mask.tolist(), strict=True):
            for place, use in enumerate(counted):
                if use:
                    for s, t in zip(row_s[place], row_t[place], strict=True):
                        error += (s - t) ** 2
                        size += t * t
                        count += 1
        total += (error / count) / (size / count + EPS)
    return total


def zeros_of(method):
    return {name: ~method.masks[name] for name in method.masks.names}


@pytest.mark.parametrize("student", [llama, lambda **changes: gpt2(n_layer=2, **changes)])
def test_the_loss_is_the_sum_of_its_three_terms(student):
    method = made(sparse(student()), label_weight=0.7, weight=0.4, state_weight=1.3, temperature=2.0)
    items, mask = batch(), batch().attention_mask.bool()
    assert not mask.all()
    with torch.no_grad():
        expected = by_loops(states(method.student, items), states(method.teacher.model, items), mask)
    ours, theirs = both(method)
    hard = F.cross_entropy(ours, targets())
    soft = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    update = update_of(method)
    assert float(update.logs["states"]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(update.logs["cross_entropy"], hard.detach())
    torch.testing.assert_close(update.logs["divergence"], 4 * soft.detach(), rtol=1e-4, atol=1e-6)
    assert float(update.loss.detach()) == pytest.approx(
        0.7 * float(hard.detach()) + 1.6 * float(soft.detach()) + 1.3 * expected, rel=1e-4
    )
    assert update.weight == len(targets())
    assert float(update.logs["sparsity"]) == pytest.approx(0.75, abs=0.01)


def test_the_gradient_is_that_of_the_written_out_loss():
    method = made(label_weight=0.7, weight=0.4, state_weight=1.3)
    items, mask = batch(), batch().attention_mask.bool()
    with torch.no_grad():
        theirs, target = states(method.teacher.model, items), logits(method.teacher.model)
    ours, said = states(method.student, items), logits(method.student)
    loss = 0.7 * F.cross_entropy(said, targets())
    loss = loss + 0.4 * (target.softmax(-1) * (target.log_softmax(-1) - said.log_softmax(-1))).sum(-1).mean()
    for one, other in zip(ours, theirs, strict=True):
        loss = loss + 1.3 * (one - other)[mask].square().mean() / (other[mask].square().mean() + EPS)
    expected = torch.autograd.grad(loss, list(method.student.parameters()))
    got = torch.autograd.grad(update_of(method).loss, list(method.student.parameters()))
    for actual, gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_student_alone_and_an_equal_one_has_nothing_to_learn():
    method = made(weight=1.0)
    check_gradients(method, update_of(method).loss)
    assert float(update_of(made(llama(), label_weight=0.0, weight=1.0)).loss.detach()) == pytest.approx(0, abs=1e-6)


def test_what_has_no_weight_is_not_computed():
    assert set(update_of(made()).logs) == {"sparsity", "states", "cross_entropy"}
    assert set(update_of(made(state_weight=0.0)).logs) == {"sparsity", "cross_entropy"}
    assert set(update_of(made(label_weight=0.0)).logs) == {"sparsity", "states"}


def test_a_layers_scale_does_not_matter_but_to_the_plain_error():
    student, teacher = torch.randn(20, 6), torch.randn(20, 6)
    plain = square_head(student, teacher, eps=0.0)
    for factor in (0.01, 10.0, 1e4):
        torch.testing.assert_close(square_head(factor * student, factor * teacher, eps=0.0), plain)
    torch.testing.assert_close(
        square_head(10 * student, 10 * teacher), square_head(student, teacher), rtol=0.01, atol=0
    )
    sizes = {}
    for normalise in ("layer", "none"):
        for factor in (1.0, 10.0):
            networks = [sparse(llama(seed=4)), llama()]
            for network in networks:
                network.model.norm.register_forward_hook(lambda layer, args, output, by=factor: output * by)
            method = made(networks[0], networks[1], label_weight=0.0, normalise=normalise)
            sizes[normalise, factor] = float(update_of(method).loss.detach())
    assert sizes["layer", 10.0] == pytest.approx(sizes["layer", 1.0], rel=0.02)
    assert sizes["none", 10.0] > 10 * sizes["none", 1.0]


def test_a_student_of_zeros_costs_nearly_one_a_layer():
    teacher = torch.randn(50, 8) * 3
    size = float(teacher.square().mean())
    assert float(square_head(torch.zeros_like(teacher), teacher)) == pytest.approx(size / (size + EPS), rel=1e-5)
    assert square_head(torch.zeros(0, 8), torch.zeros(0, 8)) == 0
    assert square_head(teacher.bfloat16(), teacher.bfloat16()).dtype is torch.float32


def test_padding_has_no_influence():
    method, items = made(weight=1.0), batch()
    spoilt = items.input_ids.clone()
    spoilt[items.attention_mask == 0] = 9
    assert not torch.equal(spoilt, items.input_ids)
    torch.testing.assert_close(update_of(method, items).loss, update_of(method, items.replace(input_ids=spoilt)).loss)


def test_prompts_count_among_the_states_but_not_among_the_predictions():
    method, items = made(label_weight=0.0), batch()
    none = items.replace(labels=torch.where(torch.arange(12) == 5, items.labels, -100))
    torch.testing.assert_close(update_of(method, items).loss, update_of(method, none).loss)
    assert update_of(method, none).weight < update_of(method, items).weight


def test_states_of_both_sides_of_an_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    teacher = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, dropout_rate=0.0)).eval()
    student, items = sparse(copy.deepcopy(teacher)), batch(4)
    labels = torch.randint(2, 40, (4, 5))
    labels[0, 3:] = -100
    decoder = {"decoder_input_ids": teacher._shift_right(labels), "decoder_attention_mask": (labels != -100).long()}
    pair = Batch({"input_ids": items.input_ids, "attention_mask": items.attention_mask, "labels": labels, **decoder})
    method = SquareHead(
        SquareHead.Options(), student=student, teacher=made(teacher=teacher, student=student, info=_info(pair)).teacher,
        data=_info(pair),
    )  # fmt: skip
    fields = {name: pair[name] for name in pair if name != "labels"}
    with torch.no_grad():
        ours, theirs = (net(**fields, output_hidden_states=True) for net in (student, teacher))
    expected = by_loops(ours.encoder_hidden_states[1:], theirs.encoder_hidden_states[1:], pair.attention_mask.bool())
    expected += by_loops(ours.decoder_hidden_states[1:], theirs.decoder_hidden_states[1:], labels != -100)
    update = update_of(method, pair)
    assert float(update.logs["states"]) == pytest.approx(expected, rel=1e-4)
    hard = F.cross_entropy(ours.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(update.logs["cross_entropy"], hard, rtol=1e-4, atol=1e-5)


def _info(pair):
    from limbeck.core.method import DataInfo, TextInfo

    return DataInfo(4, 0, pair, TextInfo(40))


def test_one_pass_gives_states_and_predictions_and_the_head_computes_nothing():
    model, items, calls = llama(), batch(), []
    reader = StateReader(model, items)
    model.model.register_forward_hook(lambda *_: calls.append("pass"))
    model.lm_head.register_forward_hook(lambda layer, args, output: calls.append(output.shape[-2]))
    with torch.no_grad():
        found = reader.read(items)
    assert calls == ["pass", 0]
    torch.testing.assert_close(found.predictions.logits(), logits(model).detach())
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("mask_gradients", [False, True])
def test_zeros_stay_zeros_under_adam_with_momentum_decay_and_an_average(mask_gradients):
    method = made(mask_gradients=mask_gradients)
    zeros = zeros_of(method)
    before = {name: method.student.get_parameter(name).detach().clone() for name in zeros}
    run = trainer(method, steps=5, optimizer=ADAM)
    result = run.fit()
    for name, gone in zeros.items():
        weight = result.get_parameter(name)
        assert not weight[gone].any()
        assert (weight[~gone] != before[name][~gone]).float().mean() > 0.9
    assert (result.model.embed_tokens.weight != 0).float().mean() > 0.9  # one row is padding's
    state = run.players["student"].optimizer.state[method.student.get_parameter("model.layers.0.mlp.up_proj.weight")]
    kept_out = state["exp_avg"][zeros["model.layers.0.mlp.up_proj.weight"]]
    assert bool(kept_out.any()) != mask_gradients


def averaged(options, steps, ema):
    from limbeck.core.specs import TrainSpec
    from limbeck.core.trainer import Trainer
    from limbeck.data.loader import Loader
    from tests.methods.language.rig import source

    method = made(**options)
    spec = TrainSpec(steps=steps, batch_size=8, log_every=1, optimizer=ADAM, ema=ema)
    return method, Trainer(method, Loader(source(), 8, 0), spec, steps=steps, items=24, seed=0)


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.9, "begin": 0.0, "end": 1.0, "interval": 1}])
def test_an_average_has_the_zeros_too(options):
    method, run = averaged(options, 6, 0.9)
    result = run.fit()
    for name, gone in zeros_of(method).items():
        assert not result.get_parameter(name)[gone].any()
    assert method.figures()["sparsity"] == pytest.approx(options.get("sparsity", 0.75), abs=0.01)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_zeros_grow_along_the_cubic_schedule(criterion, scope):
    options = {"sparsity": 0.8, "begin": 0.25, "end": 0.75, "interval": 2, "criterion": criterion, "scope": scope}
    method, rows = made(llama(seed=4), **options), []
    trainer(method, steps=12, rows=rows, optimizer=ADAM).fit()
    seen = [row["student/sparsity"] for row in rows]
    # Prunings behind steps 3, 5, 7 and 9, of which the last is complete; each shows in the step that follows.
    expected = [0.8 * (1 - (1 - k / 3) ** 3) for k in (0, 1, 2, 3)]
    assert seen == pytest.approx(
        [*[0.0] * 4, *[expected[0]] * 2, *[expected[1]] * 2, *[expected[2]] * 2, *[0.8] * 2],
        abs=0.035 if scope == "row" else 0.01,
    )
    report = method.figures()
    assert report["sparsity"] == pytest.approx(0.8, abs=0.02)
    layers = report["sparsity_by_layer"].values()
    assert len(layers) == 14
    if scope == "tensor":
        assert all(share == pytest.approx(0.8, abs=0.01) for share in layers)
    if scope == "global":
        assert max(layers) - min(layers) > 0.02
    if scope == "row":
        gone = method.student.model.layers[0].mlp.up_proj.weight == 0
        assert set(gone.sum(1).tolist()) == {13}  # of 16 inputs


def test_the_schedule_begins_at_the_zeros_that_are_there():
    method, rows = made(sparse(llama(seed=4), 0.5), sparsity=0.75, begin=0.0, end=1.0, interval=2), []
    trainer(method, steps=5, rows=rows).fit()
    seen = [row["student/sparsity"] for row in rows]
    assert seen == pytest.approx([0.5, 0.5, 0.5, 0.75 - 0.25 / 8, 0.75 - 0.25 / 8], abs=0.02)
    assert method.figures()["sparsity"] == pytest.approx(0.75, abs=0.01)


def test_saliencies_are_summed_over_micro_batches():
    masks = []
    for accumulate in (1, 2):
        method = made(llama(seed=4), sparsity=0.5, begin=0.0, end=0.0, criterion="wanda")
        trainer(method, steps=1, accumulate=accumulate).fit()
        masks.append(torch.cat([method.masks[name].flatten() for name in method.masks.names]))
    assert (masks[0] == masks[1]).float().mean() > 0.99


class Crash(Exception):
    """The process dies."""


class Dies:
    """A loader that gives out after so many steps."""

    def __init__(self, loader, left):
        self.loader, self.left = loader, left

    def steps(self, start, stop):
        for number, batches in enumerate(self.loader.steps(start, stop)):
            if number == self.left:
                raise Crash
            yield batches


def test_resuming_keeps_the_masks(tmp_path):
    options = {"sparsity": 0.8, "begin": 0.0, "end": 0.5, "interval": 1, "criterion": "wanda"}

    def run(folder):
        method = made(llama(seed=4), **options)
        return method, trainer(method, steps=6, optimizer=ADAM, checkpoints=Checkpoints(tmp_path / folder))

    straight, whole = run("straight")
    whole.fit()
    _, part = run("torn")
    part.loader = Dies(part.loader, 4)
    part.spec = part.spec.model_copy(update={"checkpoint_every": 2})
    with pytest.raises(Crash):
        part.fit()
    resumed, rest = run("torn")
    assert float(resumed.masks.sparsity()) == 0
    rest.fit()
    for name in straight.masks.names:
        assert torch.equal(straight.masks[name], resumed.masks[name])
    for name, value in straight.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_a_copy_hooks_its_own_weights():
    method = made(mask_gradients=True)
    update_of(method)
    twin = copy.deepcopy(method)
    update_of(twin).loss.backward()
    name = method.masks.names[0]
    assert not twin.student.get_parameter(name).grad[~twin.masks[name]].any()


class Stored:
    """A teacher that cannot give hidden states."""

    def tokens(self, items):
        raise AssertionError


def test_what_does_not_fit_is_refused():
    with pytest.raises(IncompatibleError, match="hidden states of every layer"):
        made(teacher=Stored())
    with pytest.raises(IncompatibleError, match="hidden states"):
        made(teacher=Headless(llama()))
    with pytest.raises(IncompatibleError, match="3 layers of width 16 and the teacher 2 layers"):
        update_of(made(llama(num_hidden_layers=3)))
    with pytest.raises(IncompatibleError, match="layers of width 16"):
        update_of(made(llama(), llama(hidden_size=32)))
    with pytest.raises(IncompatibleError, match="matches no"):
        made(layers=["*.attention"])
    with pytest.raises(ValueError, match="begin"):
        SquareHead.Options(begin=0.6, end=0.5)


def test_the_result_loads_in_transformers_alone(tmp_path):
    method = made(sparsity=0.9, begin=0.0, end=0.0)
    result = trainer(method, steps=2, optimizer=ADAM).fit()
    save_model(result, tmp_path)
    code = (
        "import json, sys\n"
        "for absent in ('peft', 'accelerate', 'scipy', 'sklearn', 'torchvision', 'PIL'): sys.modules[absent] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "weights = {n: p for n, p in model.named_parameters() if 'proj' in n}\n"
        "zeros = sum(int((p == 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values())\n"
        "print(json.dumps([type(model).__name__, zeros, 'limbeck' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, zeros, knows = json.loads(done.stdout.splitlines()[-1])
    assert (name, knows) == ("LlamaForCausalLM", False)
    assert zeros == pytest.approx(0.9, abs=0.01)
