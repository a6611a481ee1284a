"""Networks of diffusers as denoisers: every family's port, on tiny random models."""

import pytest
import torch

pytest.importorskip("diffusers")

from limbeck.diffusion.denoiser import NetworkDenoiser, Process, denoiser_of, note_process, process_of
from limbeck.diffusion.embeddings import scalar_embedding
from limbeck.diffusion.generation import generate
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.ports import NULL_PROMPT, PORTS, call_network, is_own, port_of, takes_guidance
from limbeck.diffusion.schedules import FlowMatching, VPDiscrete
from tests.diffusion.cases import Wave, normal
from tests.diffusion.tiny import CONDITIONS, items, make, shared

NAMES = list(CONDITIONS)
FLOWS = ("sd3", "flux", "told-flux", "sana", "told-sana")


def process_for(name):
    if name in FLOWS:
        return Process(FlowMatching(), Direct("velocity", time_scale=1000.0), guidance_input=name.startswith("told"))
    return Process(VPDiscrete.named("scaled-linear"), Direct("eps"), null_label=10, guidance_input=name == "told-unet")


def times_for(name, place=0.5):
    schedule = process_for(name).schedule
    return torch.tensor([place, place / 2]).double() * schedule.t_max


@pytest.mark.parametrize("name", NAMES)
def test_predictions_have_the_shape_of_the_items(name):
    model, x = NetworkDenoiser(shared(name), process_for(name)), items(name)
    with torch.no_grad():
        said = model(x, times_for(name), CONDITIONS[name])
    for kind in ("x0", "eps", "velocity"):
        assert said.as_kind(kind).shape == x.shape
        assert said.as_kind(kind).dtype == torch.float32
        assert said.as_kind(kind).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_condition_and_the_time_matter(name):
    model, x, given = NetworkDenoiser(shared(name), process_for(name)), items(name), CONDITIONS[name]
    said = model(x, times_for(name), given).value
    assert not torch.allclose(model(x, times_for(name, 0.9), given).value, said, atol=1e-5)
    for part, value in given.items():
        if part == "prompt_mask":
            other = value.flip(1)
        else:
            other = (value + 2) % 10 if part == "label" else value + 3
        changed = model(x, times_for(name), {**given, part: other}).value
        assert not torch.allclose(changed, said, atol=1e-5), part


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_do_not_know_each_other(name):
    """Of a batch, each item is predicted from its own time and condition."""
    model, x, given = NetworkDenoiser(shared(name), process_for(name)), items(name), CONDITIONS[name]
    together = model(x, times_for(name), given).value
    for row in (0, 1):
        alone = model(x[row : row + 1], times_for(name)[row : row + 1], {k: v[row : row + 1] for k, v in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone.value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_ports_call_as_the_pipelines_do():
    """Against plain calls, written out."""
    x, t = items("text-unet"), torch.tensor([500.0, 3.0])
    given = CONDITIONS["told-unet"]
    network = shared("told-unet")
    w, half = given["guidance"] - 1, 16
    angle = 1000 * w[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / (half - 1))
    embedded = torch.cat([angle.sin(), angle.cos()], 1)
    expected = network(x, t, given["prompt"], timestep_cond=embedded).sample
    torch.testing.assert_close(call_network(network, x, t, given), expected, rtol=1e-4, atol=1e-4)

    network, given = shared("text-unet"), CONDITIONS["text-unet"]
    expected = network(x, t, given["prompt"], encoder_attention_mask=given["prompt_mask"]).sample
    assert call_network(network, x, t, given).equal(expected)

    network, given = shared("xl-unet"), CONDITIONS["xl-unet"]
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    assert call_network(network, x, t, given).equal(network(x, t, given["prompt"], added_cond_kwargs=added).sample)

    network, given = shared("learned-variance-dit"), CONDITIONS["dit"]
    whole = network(x, t, class_labels=given["label"]).sample
    assert whole.shape[1] == 8
    assert call_network(network, x, t, given).equal(whole[:, :4])

    network, given = shared("told-sana"), CONDITIONS["told-sana"]
    expected = network(
        x, given["prompt"], t, guidance=0.1 * given["guidance"], encoder_attention_mask=given["prompt_mask"]
    ).sample
    assert call_network(network, x, t, given).equal(expected)


def test_flux_packs_as_its_pipeline_does():
    """Tokens, their places and the way back, against the pipeline's own packing."""
    from diffusers import FluxPipeline

    x, seen = normal(2, 4, 6, 8, dtype=torch.float32), {}
    network = shared("flux")

    def echo(module, args, given):
        seen.update(given)

    handle = network.register_forward_pre_hook(echo, with_kwargs=True)
    given = CONDITIONS["flux"]
    with torch.no_grad():
        output = call_network(network, x, torch.tensor([700.0, 3.0]), given)
    handle.remove()
    assert output.shape == x.shape
    assert seen["hidden_states"].equal(FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert seen["img_ids"].equal(FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32))
    torch.testing.assert_close(seen["timestep"], torch.tensor([0.7, 0.003]))
    assert seen["txt_ids"].shape == (5, 3)

    class Same(torch.nn.Module):  # says its tokens: unpacking must give x again
        def forward(self, hidden_states, **given):
            return type("Output", (), {"sample": hidden_states})

    assert PORTS["FluxTransformer2DModel"](Same(), x, torch.zeros(2), given).equal(x)
    shuffled = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert PORTS["FluxTransformer2DModel"](Same(), shuffled, torch.zeros(2), given).equal(x)


def test_null_conditions():
    model = NetworkDenoiser(make("class-unet"), process_for("class-unet"))
    assert model.null({"label": torch.tensor([1, 7])})["label"].tolist() == [10, 10]
    network = make("text-unet")
    model = NetworkDenoiser(network, process_for("text-unet"))
    given = CONDITIONS["text-unet"]
    with pytest.raises(ValueError, match="empty prompt is not known"):
        model.null(given)
    setattr(network, NULL_PROMPT, {"prompt": torch.zeros(1, 5, 16)})
    with pytest.raises(ValueError, match="prompt_mask"):
        model.null(given)
    setattr(network, NULL_PROMPT, {"prompt": torch.zeros(1, 5, 16), "prompt_mask": torch.ones(1, 5, dtype=torch.int64)})
    empty = model.null({**given, "guidance": torch.tensor([2.0, 3.0])})
    assert empty["prompt"].equal(torch.zeros(2, 5, 16))
    assert empty["prompt_mask"].equal(torch.ones(2, 5, dtype=torch.int64))
    assert empty["guidance"].tolist() == [2.0, 3.0]
    assert model.null({"prompt": given["prompt"]}).keys() == {"prompt"}
    empty.pop("guidance")
    with torch.no_grad():
        x, t = items("text-unet"), times_for("text-unet")
        plus, minus = model(x, t, given).value, model(x, t, empty).value
        expected = minus + 3 * (plus - minus)
        torch.testing.assert_close(guided(model, x, t, given, 3.0).value, expected, rtol=1e-4, atol=1e-5)


def test_a_unet_that_takes_no_scale_says_so():
    model = NetworkDenoiser(shared("text-unet"), process_for("text-unet"))
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        model(items("text-unet"), times_for("text-unet"), {**CONDITIONS["text-unet"], "guidance": torch.ones(2)})


@pytest.mark.parametrize("name", NAMES)
def test_who_takes_the_scale(name):
    assert takes_guidance(shared(name)) == name.startswith("told")
    assert not is_own(shared(name))


def test_own_networks_are_called_with_the_condition():
    network = Wave()
    assert is_own(network)
    x, t = normal(2, 3), torch.tensor([1.0, 2.0]).double()
    assert call_network(network, x, t, {}).equal(network(x, t))


@pytest.mark.parametrize("name", ["text-unet", "class-unet", "dit", "sd3", "flux", "sana"])
def test_half_precision_networks(name):
    """States and times stay in float32; the output is raised to it."""
    network = make(name).bfloat16()
    model = NetworkDenoiser(network, process_for(name))
    x, t, given = items(name), times_for(name, 0.997), CONDITIONS[name]
    seen = []
    for module in network.modules():
        if type(module).__name__ == "Timesteps":
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        said = model(x, t, given)
        full = NetworkDenoiser(shared(name), process_for(name))(x, t, given)
    assert said.value.dtype == said.x0.dtype == torch.float32
    assert said.x_t is x
    assert float((said.value - full.value).norm() / full.value.norm()) < 0.1
    if name != "flux":  # it rounds times by itself, as its pipeline does
        expected = (model.process.parameterisation.time_scale * t).float()
        assert seen[0].float().equal(expected)  # 996 would be 1000 in bfloat16


@torch.no_grad()
def test_scales_and_sizes_keep_their_digits_in_half_precision():
    """In bfloat16 1023 would be 1024, and a scale of 3.17 two radians away in its embedding."""
    seen = {}
    for name, part in (("told-unet", "timestep_cond"), ("xl-unet", "added_cond_kwargs")):
        network = make(name).bfloat16()
        network.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
        given = {**CONDITIONS[name]}
        given |= (
            {"guidance": torch.tensor([3.17, 2.0])} if name == "told-unet" else {"time_ids": torch.full((2, 6), 1023.0)}
        )
        call_network(network, items(name), torch.tensor([500.0, 3.0]), given)
        assert part in seen
    exact = scalar_embedding(torch.tensor([2.17, 1.0]), 32)
    torch.testing.assert_close(seen["timestep_cond"].float(), exact, rtol=0, atol=1e-2)
    assert seen["added_cond_kwargs"]["time_ids"].double().eq(1023).all()


@torch.no_grad()
def test_under_an_adapter():
    """A LoRA around the UNet: the same port and process, changed output, and the plain network when disabled."""
    peft = pytest.importorskip("peft")
    network = note_process(make("told-unet"), process_for("told-unet"))
    x, t, given = items("told-unet"), times_for("told-unet"), CONDITIONS["told-unet"]
    before = NetworkDenoiser(network)(x, t, given).value
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = peft.get_peft_model(network, config)
    assert process_of(adapted) is process_of(network)
    assert port_of(adapted) is port_of(shared("told-unet"))
    assert takes_guidance(adapted)
    model = denoiser_of(adapted)
    assert not model(x, t, given).value.allclose(before)
    with adapted.disable_adapter():
        torch.testing.assert_close(model(x, t, given).value, before)


@pytest.mark.parametrize("name", ["class-unet", "sana", "learned-variance-dit"])
@torch.no_grad()
def test_sampling_from_a_network(name):
    network = note_process(make(name), process_for(name).sampled(steps=3, solver="heun"))
    torch.manual_seed(0)
    samples = generate(denoiser_of(network), items(name), CONDITIONS[name])
    assert samples.shape == items(name).shape
    assert samples.isfinite().all()


def test_gradients_reach_the_network():
    network = make("class-unet")
    said = NetworkDenoiser(network, process_for("class-unet"))(
        items("class-unet"), times_for("class-unet"), CONDITIONS["class-unet"]
    )
    said.x0.square().mean().backward()
    assert all(weight.grad is not None for weight in network.parameters())
