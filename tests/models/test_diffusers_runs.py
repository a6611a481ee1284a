"""Students of diffusers in runs: trained, saved, adapted, and loaded by stock diffusers where limbeck is not there."""

import json
import os
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import limbeck
from limbeck.core.errors import DamagedFileError, IncompatibleError, LimbeckError, UsageError
from limbeck.core.specs import AdapterSpec, ModelSpec
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.schedules import EDM, VPDiscrete
from limbeck.models.adapters.diffusers import load_diffusers
from limbeck.models.adapters.diffusers_encoders import PipelineEncoder
from limbeck.models.build import build_model
from limbeck.models.export import export_formats, export_model
from limbeck.models.saved import ecosystem, load_model, save_model
from tests.models import pipelines
from tests.models.information import information, same_weights

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
SMALL = {
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}

PROGRAM = """
import sys
sys.modules["limbeck"] = None  # any import of it fails
import diffusers, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
given = load_file("given.safetensors")
made = {}
def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
draws = lambda: torch.Generator().manual_seed(5)
pixels = quiet(diffusers.DDIMPipeline.from_pretrained("pixels"))
made["pixels"] = pixels(batch_size=2, num_inference_steps=4, generator=draws(), output_type="pt").images
text = quiet(diffusers.DiffusionPipeline.from_pretrained("text"))
assert type(text).__name__ == "StableDiffusionPipeline" and type(text.scheduler).__name__ == "LCMScheduler"
arguments = dict(latents=given["latents"], num_inference_steps=1, guidance_scale=1.0, output_type="latent")
made["text"] = text(["cat", "dog"], **arguments).images
classes = quiet(diffusers.DiTPipeline.from_pretrained("classes"))
made["classes"] = classes([1, 7], 1.0, draws(), 4, "pt").images
pixel = quiet(diffusers.ConsistencyModelPipeline.from_pretrained("consistency"))
made["consistency"] = pixel(2, torch.tensor([1, 2]), 1, generator=draws(), output_type="pt").images
lora = quiet(diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1]))
arguments |= dict(num_inference_steps=2)
made["plain"] = lora(["cat", "dog"], **arguments).images
lora.load_lora_weights("lora")
made["lora"] = lora(["cat", "dog"], **arguments).images
save_file({name: tensor.contiguous() for name, tensor in made.items()}, "made.safetensors")
"""


def adapted_from(folder) -> torch.nn.Module:
    spec = ModelSpec(name=f"diffusers:{folder}", adapter=AdapterSpec(rank=2, alpha=6))
    model = build_model(spec, information(4, 8, 0), seed=0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draws))
    return model.eval()


def few(network: torch.nn.Module, **sampling) -> torch.nn.Module:
    process = process_of(network)
    return note_process(network, Process(process.schedule, process.parameterisation, Sampling(**sampling)))


@torch.no_grad()
def test_stock_diffusers_loads_and_samples_what_was_saved(stock, tmp_path):
    pixels = few(load_diffusers(stock.pixels), solver="ddim", steps=4)
    text = few(load_diffusers(stock.text), solver="consistency", steps=1)
    classes = few(load_diffusers(stock.classes), solver="ddim", steps=4)
    consistency = pipelines.unet(in_channels=3, out_channels=3, num_class_embeds=4)
    note_process(consistency, Process(EDM(), Preconditioned(0.5, True, "250-log"), Sampling("consistency", 1)))
    lora = adapted_from(stock.text)
    for name, network in {"pixels": pixels, "text": text, "classes": classes, "consistency": consistency}.items():
        save_model(network, tmp_path / name)
    export_model(lora, tmp_path / "lora", "diffusers")
    save_file({"latents": LATENTS}, tmp_path / "given.safetensors")
    subprocess.run([sys.executable, "-c", PROGRAM, str(stock.text)], cwd=tmp_path, check=True)
    made = load_file(tmp_path / "made.safetensors")

    def ours(network, noise, condition=None):
        return generate(NetworkDenoiser(network.eval()), noise, condition or {})

    def shown(images):
        return (images / 2 + 0.5).clamp(0, 1)

    def noise(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))

    labels = torch.tensor([1, 7])
    prompts = PipelineEncoder(stock.text).prompts(["cat", "dog"])
    decode = diffusers.AutoencoderKL.from_pretrained(stock.classes, subfolder="vae")
    latents = ours(classes, noise(2, 4, 8, 8), {"label": labels}) / decode.config.scaling_factor
    expected = {
        "pixels": shown(ours(pixels, noise(2, 1, 8, 8))),
        "text": ours(text, LATENTS, prompts),
        "classes": shown(decode.decode(latents).sample),
        "consistency": shown(ours(consistency, noise(2, 3, 8, 8), {"label": torch.tensor([1, 2])})),
    }
    for name, images in expected.items():
        assert torch.allclose(made[name], images, atol=1e-4, rtol=0), name
    process = process_of(lora)
    times = (501.0, 1.0, 0.0)  # the pipeline's own two steps, "leading" as it came
    lora_sampled = few(lora, solver="ddim", steps=2, times=times)
    assert process_of(lora_sampled).schedule is process.schedule
    assert torch.allclose(made["lora"], ours(lora_sampled, LATENTS, prompts), atol=1e-4, rtol=0)
    assert not torch.allclose(made["lora"], made["plain"], atol=1e-2)


def test_adapters_of_diffusion_networks_come_back_and_are_merged(stock, tmp_path):
    model = adapted_from(stock.text)
    assert ecosystem(model) == "peft"
    assert export_formats(model) == ["peft", "diffusers"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    process = Process(VPDiscrete.named("scaled-linear"), Direct("eps"), Sampling("consistency", 2))
    note_process(model, process)
    save_model(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "base").exists()  # the pipeline is named and not copied
    again = load_model(tmp_path / "adapter")
    assert process_of(again).config() == process.config()
    condition = PipelineEncoder(stock.text).prompts(["cat", "dog"])
    x, t = LATENTS, torch.tensor([10.0, 500.0])
    with torch.no_grad():
        expected = NetworkDenoiser(model)(x, t, condition).x0
        assert torch.equal(NetworkDenoiser(again.eval())(x, t, condition).x0, expected)
        export_model(again, tmp_path / "merged", "diffusers", merge=True)
        merged = load_model(tmp_path / "merged")
        assert torch.allclose(NetworkDenoiser(merged.eval())(x, t, condition).x0, expected, atol=1e-4)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert same_weights(pipeline.unet, merged)


def test_an_adapter_on_a_network_without_a_folder_brings_it_along(tmp_path):
    arguments = {**SMALL, "num_class_embeds": None}
    spec = ModelSpec(name="config:UNet2DModel", arguments=arguments, adapter=AdapterSpec(rank=2))
    model = build_model(spec, information(1, 8, 0), seed=0)
    note_process(model, Process(VPDiscrete.named("linear"), Direct("eps"), Sampling("ddim", 4)))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert same_weights(again, model)
    with pytest.raises(IncompatibleError, match=r"no stock pipeline[\s\S]*merge"):
        export_model(model, tmp_path / "lora", "diffusers")


def test_a_run_from_digits_to_a_stock_network(tmp_path):
    student = {"name": "config:UNet2DModel", "arguments": SMALL}
    run = limbeck.distill(
        "denoising",
        student=student,
        data={"name": "digits", "limit": 60},
        out=tmp_path / "run",
        steps=3,
        batch_size=8,
        quiet=True,
        options={"schedule": "linear", "kind": "eps", "steps": 1},
    )
    folder = run.folder / "student"
    network = limbeck.load(run.folder)
    process = process_of(network)
    assert (network.config.num_class_embeds, process.null_label) == (11, 10)
    assert process.schedule.config() == VPDiscrete.named("linear").config()
    stock = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert same_weights(stock, network)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert (scheduler.config.timestep_spacing, scheduler.config.clip_sample) == ("trailing", False)
    files = limbeck.export(run, "diffusers", tmp_path / "exported")
    assert {path.relative_to(tmp_path / "exported").parts[0] for path in files} >= {"unet", "scheduler"}
    again = build_model(ModelSpec(name=f"run:{run.folder}"), information(1, 8, 10), seed=0)
    assert same_weights(again, network)
    assert process_of(again).config() == process.config()


class Explosive:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def stored(stock, tmp_path):
    save_model(load_diffusers(stock.pixels), tmp_path / "m")
    return tmp_path / "m"


def test_pickles_are_refused_unopened(stored, tmp_path):
    (stored / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (stored / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Explosive(tmp_path / "mark")))
    with pytest.raises(UsageError, match="pickle"):
        load_model(stored)
    with pytest.raises(LimbeckError):
        load_diffusers(stored / "unet")
    assert not (tmp_path / "mark").exists()


def test_links_that_leave_the_folder_are_refused(stored, tmp_path):
    path = stored / "unet" / "config.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="link that leaves"):
        load_model(stored)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"_class_name": ["module", "Pipeline"], "unet": ["diffusers", "UNet2DModel"]}',
        '{"_class_name": "DDIMPipeline", "unet": ["evil", "UNet2DModel"]}',
        '{"_class_name": "DDIMPipeline", "text_encoder": ["os", "system"], "unet": ["diffusers", "UNet2DModel"]}',
        '{"_class_name": "DDIMPipeline", "vae": ["diffusers", "AutoencoderKL"]}',
    ],
)
def test_an_index_that_describes_no_pipeline_is_refused(stored, index):
    (stored / "model_index.json").write_text(index)
    with pytest.raises(LimbeckError) as caught:
        load_model(stored)
    assert str(stored) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/config.json", '{"_class_name": "os.system"}'),
        ("unet/config.json", '{"_class_name": "DDIMScheduler"}'),
        ("unet/config.json", '{"_class_name": "AutoencoderKL"}'),
        ("unet/config.json", "null"),
        ("unet/config.json", "[" * 100_000),
        ("unet/diffusion_pytorch_model.safetensors", "nothing"),
        ("limbeck_process.json", '{"process": {"schedule": 3}, "normalisation": null}'),
        ("limbeck_process.json", "{}"),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_schedule": "x"}'),
    ],
)
def test_damage_is_named(stored, name, content):
    (stored / name).write_text(content)
    if name.startswith("scheduler"):
        (stored / "limbeck_process.json").unlink()
    with pytest.raises(LimbeckError) as caught:
        load_model(stored)
    assert isinstance(caught.value, DamagedFileError | UsageError | IncompatibleError)


def test_weights_of_another_shape_are_refused(stored):
    config = json.loads((stored / "unet" / "config.json").read_text())
    (stored / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 8]}))
    with pytest.raises(LimbeckError, match="unet"):
        load_model(stored)
