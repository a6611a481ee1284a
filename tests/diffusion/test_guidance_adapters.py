"""Guidance adapters: against the authors' numbers, and on networks."""

import copy
import math

import pytest
import torch
from torch import nn

import limbeck
from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.diffusion.denoiser import Process, note_process, process_of
from limbeck.diffusion.guidance_adapted import GuidanceAdapted, block_widths, own_embeddings, usual_blocks
from limbeck.diffusion.guidance_adapters import KINDS, AdapterConfig, ScalarEncoder, Told, position_code
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.ports import takes_guidance, whole_output
from limbeck.diffusion.schedules import Cosine
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.guidance_files import save_guidance_adapters
from limbeck.models.saved import load_model, save_model
from tests.oracles.oracle import load

CASE = load("agd")[0]
NAMES = {
    "guidance_scale_embedder": "guidance",
    "timestep_embedder": "time",
    "class_embedder": "label",
    "prompt_proj": "prompt",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
}


def renamed(prefix):
    """The recorded state dict under our names."""
    state = {}
    for name, value in CASE.tensors.items():
        first, *rest = name.removeprefix(prefix).split(".")
        if not name.startswith(prefix) or first not in NAMES:
            continue
        path = ".".join([NAMES[first], *rest])
        path = path.replace("net.0.frequencies", "frequencies").replace("net.0.phases", "phases")
        if first in ("guidance_scale_embedder", "timestep_embedder"):
            path = path.replace(".net.1.net.", ".layers.").replace(".net.2.", ".norm.")
        state[path.replace("out.net.", "out.")] = value
    return state


def adapter(kind, **options):
    given = {"hidden": 16, "time": "own", "label": "own", "labels": 1000, "prompt": 6} | options
    config = AdapterConfig(kind, ("block",), **given)
    return KINDS[kind](config, Told(), (8, 8), (0, 0))


def told(made, **changes):
    made.told.guidance, made.told.time = CASE.inputs["w"], CASE.inputs["t"]
    made.told.label, made.told.prompt = CASE.inputs["label"], CASE.inputs["prompt"]
    for name, value in changes.items():
        setattr(made.told, name, value)
    return made


def recorded(kind):
    prefix = {"attention": "attn", "offset": "add"}[kind]
    made = adapter(kind, heads=2 if kind == "attention" else 1)
    made.load_state_dict(renamed(f"{prefix}_sd."))
    block = nn.Linear(8, 8)
    block.weight.data, block.bias.data = (CASE.tensors[f"{prefix}_sd.block.lin.{n}"] for n in ("weight", "bias"))
    return told(made), block, prefix


@pytest.mark.parametrize(("kind", "atol"), [("attention", 1e-4), ("offset", 1e-3)])
def test_values_are_the_authors(kind, atol):
    made, block, prefix = recorded(kind)
    block.register_forward_hook(made.join, with_kwargs=True)
    CASE.check(f"{prefix}_out", block(CASE.inputs["x"]), rtol=1e-4, atol=atol)
    made.told.clear()
    CASE.check(f"{prefix}_block_out", block(CASE.inputs["x"]), rtol=1e-6, atol=1e-6)


def mlp(layers, code):
    """The recorded MLP written out from its tensors."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            code = code @ layer.weight.T + layer.bias
        elif isinstance(layer, nn.ReLU):
            code = code.clamp(min=0)
        elif isinstance(layer, nn.LayerNorm):
            code = normed(layer, code)
    return code


def normed(layer, code):
    centred = code - code.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def encoded(encoder, scalar):
    turns = scalar[:, None] * encoder.frequencies + encoder.phases
    return normed(encoder.norm, mlp(encoder.layers, torch.cos(2 * math.pi * turns)))


def plain(made, x):
    """What an adapter adds, item by item, head by head."""
    inputs, rows = CASE.inputs, []
    prompt = inputs["prompt"] @ made.prompt.weight.T + made.prompt.bias
    time, label = encoded(made.time, inputs["t"]), made.label.weight[inputs["label"]]
    if made.config.kind == "offset":
        code = encoded(made.guidance, 1000 * inputs["w"]) + time + label + prompt.mean(1)
        return mlp(made.out, code)[:, None].expand_as(x)
    scale = encoded(made.guidance, inputs["w"])
    for item in range(len(x)):
        tokens = torch.cat([scale[item][None], time[item][None], label[item][None], prompt[item]])
        tokens = tokens + CASE.tensors["attn_sd.pos_enc.pe"][: len(tokens)]
        query, key, value = x[item] @ made.query.weight.T, tokens @ made.key.weight.T, tokens @ made.value.weight.T
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            weights = (query[:, part] @ key[:, part].T / 16**0.5).softmax(-1)
            heads.append(weights @ value[:, part])
        rows.append(torch.cat(heads, 1) @ made.out.weight.T + made.out.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["attention", "offset"])
def test_gradients_are_those_of_the_formula_written_out(kind):
    made, _, _ = recorded(kind)
    x = CASE.inputs["x"].clone().requires_grad_(kind == "attention")
    weights = [*made.parameters(), *([x] if kind == "attention" else [])]
    probe = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((made(x) * probe).sum(), weights)
    theirs = torch.autograd.grad((plain(made, x) * probe).sum(), weights)
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= 1e-3 * other.abs().max() + 1e-5


def test_the_position_code_is_the_authors():
    code = CASE.tensors["attn_sd.pos_enc.pe"]
    torch.testing.assert_close(position_code(*code.shape), code, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["attention", "offset"])
def test_a_silent_adapter_adds_nothing_and_another_does(kind):
    silent, loud = told(adapter(kind)), told(adapter(kind, silent=False))
    x = torch.randn(3, 5, 8)
    assert not silent(x).any()
    assert loud(x).abs().max() > 1e-3
    assert silent(x).shape == loud(x).shape == x.shape


def test_codes_of_scalars_are_saved_with_their_draws():
    torch.manual_seed(0)
    encoder = ScalarEncoder(256)
    assert {"frequencies", "phases"} <= encoder.state_dict().keys()
    assert abs(float(encoder.frequencies.std()) - 1) < 0.15
    assert float(encoder.phases.min()) >= 0
    assert float(encoder.phases.max()) < 1
    assert not any(name in ("frequencies", "phases") for name, _ in encoder.named_parameters())


def test_of_a_tuple_the_first_alone_is_joined():
    made = told(adapter("offset", silent=False))
    x, other = torch.randn(3, 5, 8), torch.randn(3)
    joined, same = made.join(nn.Identity(), (), {"hidden_states": x}, (x, other))
    assert torch.equal(joined, x + made(x))
    assert same is other


def test_absent_conditions_are_named():
    made = told(adapter("attention"), prompt=None)
    with pytest.raises(ValueError, match="prompt"):
        made(torch.randn(3, 5, 8))


@pytest.mark.parametrize("wrong", [{"blocks": ()}, {"hidden": 7}, {"hidden": 16, "heads": 3}, {"label": "base"}])
def test_configurations_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ValueError):  # noqa: PT011
        AdapterConfig(**({"kind": "attention", "blocks": ("a",)} | wrong))


def network(seed=0, width=16):
    torch.manual_seed(seed)
    made = DenoisingMLP(numbers=16, classes=4, width=width, depth=2)
    return note_process(made, Process(Cosine(), Direct("v"), null_label=4)).eval()


def adapted(base, kind="attention", **options):
    time, label = own_embeddings(base)
    given = {"hidden": 8, "time": "base", "label": "base", "silent": False} | options
    torch.manual_seed(9)
    config = AdapterConfig(kind, usual_blocks(base), time_module=time, label_module=label, **given)
    return GuidanceAdapted(base, config)


X, T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0.1, 0.5, 0.9])
ASKED = {"label": torch.tensor([0, 3, 4]), "guidance": torch.tensor([1.0, 2.0, 4.0])}
PLAIN = {"label": ASKED["label"]}


@pytest.mark.parametrize("kind", ["attention", "offset"])
def test_without_a_scale_and_after_removal_the_network_is_what_it_was(kind):
    base = network()
    before, weights = base(X, T, PLAIN), copy.deepcopy(base.state_dict())
    model = adapted(base, kind)
    assert takes_guidance(model)
    assert not torch.allclose(model(X, T, ASKED), before, atol=1e-4)
    assert torch.equal(model(X, T, PLAIN), before)
    assert torch.equal(model.network(X, T, PLAIN), before)  # nothing is left from the call before
    off = model.detach()
    assert off is base
    assert torch.equal(off(X, T, PLAIN), before)
    assert weights.keys() == off.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in off.state_dict().items())
    assert not any(part._forward_hooks for part in off.modules())


def test_adapters_alone_are_trained_and_their_names_are_the_blocks():
    model = adapted(network())
    model.train()
    model.requires_grad_(True)
    model(X, T, ASKED).square().mean().backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in model.network.parameters())
    assert all(weight.grad is not None for weight in model.adapters.parameters())
    assert not any(part.training for part in model.network.modules())
    assert {".".join(name.split(".")[:2]) for name in model.adapters.state_dict()} == {"stages.0", "stages.1"}
    # As in the authors' code: with the scale alone an attention adapter has eleven trained tensors.
    bare = adapted(network(), time="none", label="none")
    assert len(list(bare.adapters.parameters())) == 22


def test_copies_have_hooks_of_their_own():
    model = adapted(network())
    expected = model(X, T, ASKED)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.adapters.parameters():
            weight.zero_()
    assert torch.equal(copied(X, T, ASKED), expected)
    assert not torch.allclose(model(X, T, ASKED), expected)
    assert torch.equal(copied.detach()(X, T, PLAIN), model(X, T, PLAIN))


@pytest.mark.parametrize(("time", "label"), [("own", "own"), ("base", "none"), ("none", "own")])
def test_each_condition_that_is_taken_matters(time, label):
    model = adapted(network(), time=time, label=label)
    heard = []
    model.adapters.get_submodule("stages.0").register_forward_hook(lambda m, a, out: heard.append(out))
    start = {"tokens": torch.zeros(3, 16)}
    for t, condition in ((T, ASKED), (T + 0.05, ASKED), (T, ASKED | {"label": torch.tensor([1, 2, 3])})):
        model.network.entry.register_forward_hook(lambda m, a, out: start["tokens"])  # same tokens, other conditions
        model(X, t, condition)
    assert torch.equal(heard[0], heard[1]) == (time == "none")
    assert torch.equal(heard[0], heard[2]) == (label == "none")


def test_within_told_a_bare_network_is_guided():
    model = adapted(network())
    expected, bare = model(X, T, ASKED), model(X, T, PLAIN)
    with model.told(ASKED["guidance"]) as inner:
        assert torch.equal(inner(X, T, condition=PLAIN), expected)
    assert torch.equal(model.network(X, T, PLAIN), bare)


def test_saved_with_and_without_the_base_and_put_on_another(tmp_path):
    model, other = adapted(network(0)), network(1)
    note_process(model, Process(Cosine(), Direct("v"), null_label=4, guidance_input=True))
    expected = model(X, T, ASKED)
    save_model(model, tmp_path / "whole")
    loaded = limbeck.load(tmp_path / "whole")
    assert isinstance(loaded, GuidanceAdapted)
    assert torch.equal(loaded(X, T, ASKED), expected)
    assert process_of(loaded).guidance_input
    assert not process_of(loaded.network).guidance_input
    assert isinstance(load_model(tmp_path / "whole" / "base"), DenoisingMLP)
    save_guidance_adapters(model, tmp_path / "alone")
    with pytest.raises(UsageError, match="without their base"):
        load_model(tmp_path / "alone")
    moved = load_model(tmp_path / "alone", other)
    plain = other(X, T, PLAIN)
    assert torch.equal(moved(X, T, PLAIN), plain)
    assert not torch.allclose(moved(X, T, ASKED), plain, atol=1e-4)
    ours, theirs = model.adapters.state_dict(), moved.adapters.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(IncompatibleError, match="do not fit"):
        load_model(tmp_path / "alone", network(width=24))


def test_blocks_and_widths_are_found():
    base = network()
    assert usual_blocks(base) == ("stages.0", "stages.1")
    assert usual_blocks(base, ["stages.1", "stages.1.*"]) == ("stages.1",)
    assert block_widths(base.stages[0]) == (16, 16)
    with pytest.raises(ValueError, match="no blocks"):
        usual_blocks(base, ["attention.*"])
    with pytest.raises(ValueError, match="name its blocks"):
        usual_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["dit", "learned-variance-dit", "text-unet", "sd3"])
@pytest.mark.parametrize("kind", ["attention", "offset"])
def test_networks_of_diffusers(name, kind):
    pytest.importorskip("diffusers")
    from tests.diffusion import tiny

    base, condition, x = tiny.make(name), tiny.CONDITIONS[name], tiny.items(name)
    t = torch.tensor([900.0, 20.0])
    before = whole_output(base, x, t, condition)
    widths = {"prompt": 16} if "prompt" in condition else {"label": "base"}
    model = adapted(base, kind, **({"label": "none"} | widths))
    assert len(model.config.blocks) == 2 if name != "text-unet" else len(model.config.blocks) >= 2
    scale = {"guidance": torch.tensor([1.0, 5.0])}
    guided = whole_output(model, x, t, condition | scale)
    assert guided.shape == before.shape
    assert not torch.allclose(guided, before, atol=1e-5)
    assert torch.equal(whole_output(model, x, t, condition), before)
    with model.told(scale["guidance"]) as inner:
        assert torch.equal(whole_output(inner, x, t, condition), guided)
    other = whole_output(model, x, t, condition | {"guidance": torch.tensor([1.0, 2.0])})
    assert torch.equal(other[0], guided[0]) or torch.allclose(other[0], guided[0], atol=1e-5)
    assert not torch.allclose(other[1], guided[1], atol=1e-5)
