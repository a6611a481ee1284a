"""diffusers' networks: their process is that of their scheduler, they sample as their pipelines do, and come back."""

import math

import diffusers
import pytest
import torch

from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.core.specs import ModelSpec
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.ports import NULL_PROMPT
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow, VPDiscrete
from limbeck.models.adapters.diffusers import load_diffusers
from limbeck.models.adapters.diffusers_classes import pipeline_of
from limbeck.models.adapters.diffusers_encoders import PipelineEncoder
from limbeck.models.adapters.diffusers_samplers import scheduler_for
from limbeck.models.adapters.diffusers_schedulers import process_from_scheduler, stock_times
from limbeck.models.build import build_model
from limbeck.models.saved import ecosystem, load_model, save_model
from tests.models import pipelines
from tests.models.information import information, same_weights

NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=0)


def process_for(config: dict, network: torch.nn.Module) -> Process:
    return process_from_scheduler(config, network)


def in_steps(network: torch.nn.Module, scheduler, steps: int) -> torch.nn.Module:
    """The network, sampled at a scheduler's times of so many steps."""
    process = process_of(network)
    times = stock_times(scheduler, process.schedule, steps)
    return note_process(network, process.sampled(steps=steps, times=tuple(times.tolist())))


@torch.no_grad()
def test_an_unconditional_network_samples_as_its_pipeline(stock):
    pipeline = diffusers.DDIMPipeline.from_pretrained(stock.pixels)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(batch_size=2, generator=generator, output_type="pt", num_inference_steps=8).images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    ours = generate(NetworkDenoiser(in_steps(load_diffusers(stock.pixels), pipeline.scheduler, 8)), noise)
    assert close((ours / 2 + 0.5).clamp(0, 1), expected)
    assert expected.std() > 0.01


@torch.no_grad()
def test_a_text_conditional_network_samples_as_its_pipeline(stock):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stock.text)
    pipeline.set_progress_bar_config(disable=True)
    texts = ["a red cat", "dog"]
    expected = pipeline(texts, latents=LATENTS, num_inference_steps=8, output_type="latent").images
    condition = PipelineEncoder(stock.text).prompts(texts)
    network = in_steps(load_diffusers(stock.text), pipeline.scheduler, 8)
    ours = generate(NetworkDenoiser(network), LATENTS, condition)
    assert process_of(network).sampling.guidance == 7.5
    assert close(ours, expected)
    unguided = generate(NetworkDenoiser(network), LATENTS, condition, guidance=1.0)
    assert not close(unguided, expected)


@torch.no_grad()
def test_a_class_conditional_transformer_samples_as_its_pipeline(stock):
    pipeline = diffusers.DiTPipeline.from_pretrained(stock.classes)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipeline([1, 7], generator=generator, output_type="pt", num_inference_steps=8).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    network = in_steps(load_diffusers(stock.classes), pipeline.scheduler, 8)
    assert process_of(network).null_label == 1000
    latents = generate(NetworkDenoiser(network), noise, {"label": torch.tensor([1, 7])})
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert close((decoded / 2 + 0.5).clamp(0, 1), expected)


def test_conditions_are_dropped_by_methods_and_not_by_the_network(stock):
    network = load_diffusers(stock.classes).train()
    labels = torch.zeros(64, dtype=torch.int64)
    x, t = LATENTS[:1].expand(64, -1, -1, -1), torch.full((64,), 500)
    with torch.no_grad():
        output = network(x, t, class_labels=labels).sample
    assert torch.allclose(output, output[:1].expand_as(output), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "schedule", "made"),
    [
        ({"_class_name": "DDPMScheduler"}, VPDiscrete.named("linear"), Direct("eps")),
        ({"_class_name": "EulerDiscreteScheduler"}, VPDiscrete.named("linear"), Direct("eps")),
        ({"_class_name": "UniPCMultistepScheduler"}, VPDiscrete.named("linear"), Direct("eps")),
        (
            {"_class_name": "PNDMScheduler", "beta_schedule": "squaredcos_cap_v2", "skip_prk_steps": True},
            VPDiscrete.named("squared-cosine"),
            Direct("eps"),
        ),
        (
            {"_class_name": "LCMScheduler", "prediction_type": "v_prediction"},
            VPDiscrete.named("scaled-linear"),
            Direct("v"),
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.7}, EDM(), Preconditioned(0.7)),
        (
            {"_class_name": "CMStochasticIterativeScheduler"},
            EDM(),
            Preconditioned(0.5, boundary=True, noise="250-log"),
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, FlowMatching(), Direct("velocity", 1000.0)),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            },
            FlowMatching(),
            Direct("velocity", 1000.0),
        ),
        ({"_class_name": "SCMScheduler"}, TrigFlow(), Direct("v")),
    ],
    ids=lambda value: value["_class_name"] if isinstance(value, dict) and "_class_name" in value else "",
)
def test_a_scheduler_says_what_the_process_is(config, schedule, made):
    found = process_for(config, pipelines.unet())
    assert found.schedule.config() == schedule.config()
    assert found.parameterisation == made
    times = found.sampling.times_for(found.schedule)
    assert len(times) == found.sampling.steps + 1
    assert (times.diff() < 0).all()
    assert times[0] <= schedule.t_max + 1e-6
    again = scheduler_for(found, pipelines.unet(), config)
    assert process_for({**again.config, "_class_name": type(again).__name__}, pipelines.unet()) is not None
    assert type(again).__name__ == config["_class_name"] or found.sampling.solver in ("ddim", "dpmpp_2m")


def test_betas_of_one_s_own_and_no_signal_at_the_end():
    betas = torch.linspace(0.01, 0.2, 20, dtype=torch.float64).tolist()
    own = process_for(
        {"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 20}, pipelines.unet()
    )
    expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    assert torch.allclose(own.schedule.alphas_cumprod, expected, rtol=1e-12)
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = process_for(config, pipelines.unet()).schedule
    assert zero.alphas_cumprod[-1] == 0
    stock = diffusers.DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert torch.allclose(zero.alphas_cumprod, stock, atol=1e-6)


def test_processes_that_are_not_known_are_refused():
    with pytest.raises(IncompatibleError, match="no scheduler"):
        process_for({"_class_name": "os.system"}, pipelines.unet())
    with pytest.raises(IncompatibleError, match="no scheduler"):
        process_for({"_class_name": "UNet2DModel"}, pipelines.unet())
    with pytest.raises(IncompatibleError, match="prediction_type"):
        process_for({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, pipelines.unet())
    with pytest.raises(IncompatibleError, match="not known"):
        process_for({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, pipelines.unet())


def sampled_by(scheduler, network, x, steps, **condition) -> torch.Tensor:
    """Stock diffusers' loop."""
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, time.expand(len(x)), **condition).sample, time, x).prev_sample
    return x


@torch.no_grad()
def test_edm_and_flow_networks_sample_as_their_schedulers():
    network = pipelines.unet()
    edm = diffusers.EDMEulerScheduler()
    process = process_for({"_class_name": "EDMEulerScheduler"}, network)
    ours = generate(NetworkDenoiser(network, process.sampled(steps=6)), NOISE)
    assert close(ours, sampled_by(edm, network, NOISE * 80, 6))

    transformer = pipelines.sd3()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    process = process_for(config, transformer)
    condition = {"prompt": torch.randn(2, 5, 16), "pooled": torch.randn(2, 12)}
    given = {"encoder_hidden_states": condition["prompt"], "pooled_projections": condition["pooled"]}
    ours = generate(NetworkDenoiser(transformer, process), LATENTS, condition)

    def call(x, time):
        return transformer(hidden_states=x, timestep=time, **given)

    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert close(ours, sampled_by(stock, call, LATENTS, process.sampling.steps))


@torch.no_grad()
def test_a_consistency_network_samples_as_its_pipeline(tmp_path):
    network = pipelines.unet(in_channels=3, out_channels=3, num_class_embeds=4)
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    pipeline = diffusers.ConsistencyModelPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    noise = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1, 2])
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    output = network(scheduler.scale_model_input(noise * 80, time), time.expand(2), class_labels=labels).sample
    expected = scheduler.step(output, time, noise * 80).prev_sample
    loaded = load_diffusers(tmp_path)
    assert process_of(loaded).sampling.steps == 1
    assert close(generate(NetworkDenoiser(loaded), noise, {"label": labels}), expected)
    assert process_of(loaded).null_label == 3
    assert process_of(load_diffusers(tmp_path, classes=4)).null_label is None


@torch.no_grad()
def test_sana_sprint_s_network_is_a_flow_s():
    network = pipelines.sana(guidance_embeds=True)
    process = process_for({"_class_name": "SCMScheduler"}, network)
    assert isinstance(process.schedule, FlowMatching)
    assert process.guidance_input
    condition = {"prompt": torch.randn(2, 5, 16), "prompt_mask": torch.ones(2, 5)}
    ours = generate(NetworkDenoiser(network, process.sampled(steps=1, times=None, guidance=4.5)), LATENTS, condition)
    # The pipeline's one step, by its TrigFlow wrapper: at the noisy end sin = 1 and cos = 0, x is the noise.
    t = torch.tensor(1.5708)
    s = t.sin() / (t.cos() + t.sin())
    seen = LATENTS * (s**2 + (1 - s) ** 2).sqrt()
    scale = torch.full((2,), 4.5) * network.config.guidance_embeds_scale
    u = network(
        hidden_states=seen,
        timestep=s.expand(2),
        guidance=scale,
        encoder_hidden_states=condition["prompt"],
        encoder_attention_mask=condition["prompt_mask"],
    ).sample
    v = ((1 - 2 * s) * seen + (1 - 2 * s + 2 * s**2) * u) / (s**2 + (1 - s) ** 2).sqrt()
    expected = t.cos() * LATENTS - t.sin() * v
    assert close(ours, expected)
    times = process.sampled(steps=2, times=None)
    assert isinstance(
        scheduler_for(process_for({"_class_name": "SCMScheduler"}, network), network), diffusers.SCMScheduler
    )
    assert times.sampling.steps == 2


BARE = {
    "UNet2DModel": (lambda: pipelines.unet(num_class_embeds=5), {"_class_name": "DDPMScheduler"}),
    "UNet2DConditionModel": (pipelines.text_unet, {"_class_name": "DDIMScheduler"}),
    "DiTTransformer2DModel": (pipelines.dit, {"_class_name": "DDIMScheduler"}),
    "SD3Transformer2DModel": (pipelines.sd3, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
    "FluxTransformer2DModel": (
        pipelines.flux,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    ),
    "SanaTransformer2DModel": (pipelines.sana, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_networks_come_back_with_their_process(name, tmp_path):
    build, config = BARE[name]
    network = build()
    note_process(network, process_for(config, network))
    assert ecosystem(network) == "diffusers"
    save_model(network, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(network)
    assert same_weights(again, network)
    assert process_of(again).config() == process_of(network).config()
    assert all(parameter.requires_grad for parameter in again.parameters())
    part = "unet" if name.startswith("UNet") else "transformer"
    stock = getattr(diffusers, name).from_pretrained(tmp_path, subfolder=part)
    assert same_weights(stock, network)
    kind = getattr(diffusers, type(scheduler_for(process_of(network), network)).__name__)
    kind.from_pretrained(tmp_path, subfolder="scheduler")
    bare = load_diffusers(tmp_path / part)
    assert same_weights(bare, network)
    assert process_of(bare) is None


def test_a_network_without_a_process_comes_back_too(tmp_path):
    network = pipelines.unet()
    save_model(network, tmp_path)
    again = load_model(tmp_path)
    assert same_weights(again, network)
    assert process_of(again) is None
    other = pipelines.unet()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert load_model(tmp_path, other) is other
    assert same_weights(other, network)
    with pytest.raises(IncompatibleError, match="do not fit"):
        load_model(tmp_path, pipelines.unet(block_out_channels=(8, 8)))


def test_what_the_library_wrote_itself_counts_for_more_than_the_scheduler(stock, tmp_path):
    network = load_diffusers(stock.pixels)
    process = Process(Cosine(), Direct("v", 1000.0), Sampling("ddim", 4))
    note_process(network, process)
    save_model(network, tmp_path)
    assert process_of(load_model(tmp_path)).config() == process.config()
    assert not (tmp_path / "scheduler").exists()  # diffusers has no cosine schedule in continuous time


def test_a_pipeline_s_other_components_stay_with_the_network(stock, tmp_path):
    network = load_diffusers(stock.text)
    assert pipeline_of(network) == stock.text.resolve()
    empty = getattr(network, NULL_PROMPT)["prompt"]
    save_model(network, tmp_path / "once")
    save_model(load_model(tmp_path / "once"), tmp_path / "twice")
    for name in ("vae", "text_encoder", "tokenizer"):
        files = sorted(path.name for path in (stock.text / name).iterdir())
        assert sorted(path.name for path in (tmp_path / "twice" / name).iterdir()) == files
    again = load_model(tmp_path / "twice")
    assert torch.equal(getattr(again, NULL_PROMPT)["prompt"], empty)
    assert str(stock.text) not in (tmp_path / "twice" / "unet" / "config.json").read_text()


FEW_STEPS = [
    (Process(VPDiscrete.named("linear"), Direct("eps"), Sampling("ddim", 4)), "DDIMScheduler"),
    (Process(VPDiscrete.named("linear"), Direct("v"), Sampling("ddim", 8)), "DDIMScheduler"),
    (Process(VPDiscrete.named("scaled-linear"), Direct("eps"), Sampling("consistency", 4)), "LCMScheduler"),
    (
        Process(
            VPDiscrete.named("scaled-linear"),
            Direct("eps"),
            Sampling("consistency", 4, times=(999.0, 759.0, 499.0, 259.0, -1.0)),
        ),
        "LCMScheduler",
    ),
    (Process(VPDiscrete.named("scaled-linear"), Direct("eps"), Sampling("tcd", 4)), "TCDScheduler"),
    (Process(VPDiscrete.named("linear"), Direct("x0"), Sampling("ancestral", 10)), "DDPMScheduler"),
    (Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("euler", 4)), "FlowMatchEulerDiscreteScheduler"),
    (Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("euler", 1)), "FlowMatchEulerDiscreteScheduler"),
    (
        Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("consistency", 2)),
        "FlowMatchEulerDiscreteScheduler",
    ),
    (
        Process(EDM(), Preconditioned(0.5, True, "250-log"), Sampling("consistency", 1)),
        "CMStochasticIterativeScheduler",
    ),
    (Process(EDM(), Preconditioned(0.5), Sampling("euler", 18)), "EDMEulerScheduler"),
]


@pytest.mark.parametrize(("process", "name"), FEW_STEPS)
def test_the_scheduler_goes_to_the_times_of_the_process(process, name, recwarn):
    scheduler = scheduler_for(process, pipelines.unet())
    assert type(scheduler).__name__ == name
    assert not [one for one in recwarn if "has no setting for the times" in str(one.message)]
    scheduler.set_timesteps(process.sampling.steps)
    wanted = process.sampling.times_for(process.schedule)[:-1]
    if isinstance(process.schedule, VPDiscrete):
        assert torch.equal(scheduler.timesteps.double(), wanted)
    else:
        assert torch.allclose(scheduler.sigmas[:-1].double(), wanted, rtol=2e-3)
    derived = process_for({**scheduler.config, "_class_name": name}, pipelines.unet())
    assert derived.schedule.config() == process.schedule.config()
    assert derived.parameterisation == process.parameterisation


def test_times_that_no_setting_gives_are_told():
    process = Process(VPDiscrete.named("linear"), Direct("eps"), Sampling("ddim", 2, times=(999.0, 123.0, -1.0)))
    with pytest.warns(UserWarning, match=r"no setting for the times .*123"):
        scheduler_for(process, pipelines.unet())


@torch.no_grad()
def test_two_consistency_steps_of_a_flow_are_those_of_the_stock_scheduler():
    network = pipelines.sd3()
    process = Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("consistency", 2))
    condition = {"prompt": torch.randn(2, 5, 16), "pooled": torch.randn(2, 12)}

    def call(x, time):
        return network(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=condition["prompt"],
            pooled_projections=condition["pooled"],
        )

    torch.manual_seed(9)
    ours = generate(NetworkDenoiser(network, process), LATENTS, condition)
    torch.manual_seed(9)
    assert torch.allclose(ours, sampled_by(scheduler_for(process, network), call, LATENTS, 2), atol=2e-3)


def test_fresh_networks_take_their_shape_from_the_data():
    small = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
    spec = ModelSpec(name="config:UNet2DModel", arguments=small | blocks)
    network = build_model(spec, information(3, 8, 10), seed=0)
    config = network.config
    assert (config.sample_size, config.in_channels, config.out_channels, config.num_class_embeds) == (8, 3, 3, 11)
    assert same_weights(network, build_model(spec, information(3, 8, 10), seed=0))
    assert not same_weights(network, build_model(spec, information(3, 8, 10), seed=1))
    assert process_of(network) is None
    with pytest.raises(RecipeError, match=r"arguments\.block_out_chanels.*\n.*block_out_channels"):
        build_model(ModelSpec(name="config:UNet2DModel", arguments={"block_out_chanels": [8]}), information(), seed=0)
    with pytest.raises(RecipeError, match="can be built"):
        build_model(ModelSpec(name="config:UNet2DModel", arguments={"block_out_channels": [8]}), information(), seed=0)


def test_a_smaller_student_of_a_pipeline_stays_in_the_pipeline(stock, tmp_path):
    name = f"diffusers:{stock.text}"
    small = {"pretrained": False, "block_out_channels": [4, 8]}
    student = build_model(ModelSpec(name=name, arguments=small), information(4, 8, 0), seed=0)
    teacher = build_model(ModelSpec(name=name), information(4, 8, 0), seed=0)
    assert sum(p.numel() for p in student.parameters()) < 0.5 * sum(p.numel() for p in teacher.parameters())
    assert process_of(student).config() == process_of(teacher).config()
    save_model(student, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.block_out_channels == [4, 8]
    with pytest.raises(RecipeError, match="pretrained: false"):
        build_model(ModelSpec(name=name, arguments={"block_out_channels": [4, 8]}), information(4, 8, 0), seed=0)
    with pytest.raises(RecipeError, match=r"model_index\.json"):
        build_model(ModelSpec(name="diffusers:./nowhere"), information(), seed=0)


def test_ends_of_the_trigonometric_flow():
    found = process_for({"_class_name": "SCMScheduler"}, pipelines.unet())
    assert found.sampling.times_for(found.schedule)[0] == pytest.approx(math.pi / 2)
