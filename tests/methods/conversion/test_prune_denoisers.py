"""Pruning networks that denoise: what they are judged on, those of diffusers, and what becomes of the result."""

import copy
import json
import subprocess
import sys

import diffusers
import pytest
import torch

import limbeck
from limbeck.compression.quantized import quantization_of
from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, ProcedureContext
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import Process, Sampling, note_process, process_of
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, VPDiscrete
from limbeck.methods.conversion.calibration import calibration_batches, run_calibration
from limbeck.methods.conversion.prune import Prune
from limbeck.models.adapters.diffusers import load_diffusers
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.saved import load_model, save_model
from tests.models import pipelines

DISCRETE = Process(VPDiscrete.named("scaled-linear"), Direct("eps", 1.0), Sampling("ddim", 4))


def digits(classes=4):
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    labels[:: 7 if classes else 1] = -100
    return ArraySource(torch.rand(40, 1, 4, 4, generator=draws), labels, classes=classes, normalisation=([0.5], [0.5]))


class Latents:
    """Latents with what a pipeline's prompts or classes are encoded to."""

    def __init__(self, channels, **condition):
        draws = torch.Generator().manual_seed(1)
        self.image = torch.randn(12, channels, 8, 8, generator=draws)
        self.condition = {name: value.expand(12, *value.shape) for name, value in condition.items()}
        self.classes = 4

    def __len__(self):
        return 12

    def fetch(self, rows):
        condition = {name: value[rows] for name, value in self.condition.items()}
        return Batch({"image": self.image[rows], "index": rows, **condition})

    def info(self):
        return DataInfo(12, 0, self.fetch(torch.arange(2)))


def mlp(process=None):
    torch.manual_seed(0)
    process = process or Process(Cosine(), Direct("v"), Sampling("ddim", 5, 2.0), null_label=4)
    return note_process(DenoisingMLP(numbers=16, classes=4, width=16, depth=2), process)


def pruned(student, folder, data, seed=3, **options):
    options = {"calibration_items": 16, "batch_size": 4, **options}
    method = Prune(Prune.Options(**options), student=student, teacher=None, data=data.info())
    context = ProcedureContext(source=data, directory=folder, seed=seed, log=lambda row: None, pause=lambda: None)
    return method.run(context), method.figures()


def asked(network, data, items=16):
    """The (noisy items, times, labels) that a network is called with when it is calibrated."""
    calls = []
    original = network.forward
    network.forward = lambda x, time, condition: calls.append((x, time, condition)) or original(x, time, condition)
    for batch in calibration_batches(network, data, 3, items, 4):
        run_calibration(network, batch)
    del network.forward
    return calls


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), EDM(), VPDiscrete.named("linear")])
def test_a_denoiser_is_judged_where_its_sampler_asks_it(schedule):
    made = Preconditioned(0.5) if isinstance(schedule, EDM) else Direct("v", 0.001 if schedule.clean < 0 else 1.0)
    network, data = mlp(Process(schedule, made, Sampling("ddim", 4))), digits()
    batches = list(calibration_batches(network, data, 3, 16, 4))
    times = torch.cat([batch["time"] for batch in batches])
    grid = network.limbeck_process.sampling.times_for(schedule)[:-1]
    assert times.tolist() == pytest.approx(grid.repeat_interleave(4).tolist())
    for batch in batches:
        clean = data.fetch(batch["index"])["image"]
        alpha, sigma = (
            value.view(-1, 1, 1, 1) for value in (schedule.alpha(batch["time"]), schedule.sigma(batch["time"]))
        )
        noise = (batch["image"] - alpha * clean) / sigma
        assert 0.4 < noise.std() < 1.6
    seen = asked(network, data)
    assert len(torch.cat([time for _, time, _ in seen]).unique()) == 4


def test_guided_denoisers_are_asked_with_and_without_their_condition():
    labels = torch.cat([condition["label"] for _, _, condition in asked(mlp(), digits())])
    assert (labels == 4).sum() > 16  # one for each item, and those of items without a class
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}
    plain = Process(Cosine(), Direct("v"), Sampling("ddim", 5), null_label=4)
    assert sum(len(x) for x, _, _ in asked(mlp(plain), digits())) == 16
    assert all("label" not in condition for _, _, condition in asked(mlp(plain), digits(classes=0)))


def test_noise_is_a_function_of_the_seed_and_the_item():
    network, data = mlp(), digits()
    first, again, other = (
        {
            int(n): x
            for batch in calibration_batches(network, data, seed, 40, size)
            for n, x in zip(batch.index, batch.image, strict=True)
        }
        for seed, size in ((3, 4), (3, 16), (4, 4))
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_shipped_denoisers(tmp_path):
    before, data = mlp(), digits()
    errors = {}
    for criterion in ("obs", "magnitude"):
        result, figures = pruned(copy.deepcopy(before), tmp_path / criterion, data, criterion=criterion)
        assert figures["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert "unreached" not in figures
        assert process_of(result).config() == process_of(before).config()
        errors[criterion] = figures["reconstruction_error"]
    assert errors["obs"] < 0.8 * errors["magnitude"]
    with pytest.raises(IncompatibleError, match="how the DenoisingMLP denoises"):
        pruned(DenoisingMLP(numbers=16), tmp_path / "unknown", data)
    with pytest.raises(IncompatibleError, match="how the UNet2DModel denoises"):
        pruned(pipelines.unet(), tmp_path / "unknown", data)


PROMPT = {"prompt": torch.randn(5, 16, generator=torch.Generator().manual_seed(2))}
POOLED = {**PROMPT, "pooled": torch.randn(12, generator=torch.Generator().manual_seed(3))}
NETWORKS = {
    "pixels": (pipelines.unet, Latents(1), {}),
    "classes": (lambda: pipelines.unet(num_class_embeds=4), Latents(1, label=torch.tensor(2)), {}),
    "text": (pipelines.text_unet, Latents(4, **PROMPT), {"guidance": 3.0}),
    "dit": (pipelines.dit, Latents(4, label=torch.tensor(2)), {}),
    "sd3": (pipelines.sd3, Latents(4, **POOLED), {}),
    "flux": (pipelines.flux, Latents(4, **POOLED), {}),
    "sana": (pipelines.sana, Latents(4, **PROMPT, prompt_mask=torch.ones(5)), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers(name, tmp_path):
    build, data, sampling = NETWORKS[name]
    network = note_process(build(), DISCRETE.sampled(**sampling))
    network.limbeck_null_prompt = {name: torch.zeros_like(value[:1]) for name, value in data.condition.items()}
    if name == "flux":
        note_process(network, Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("euler", 4), None, True))
    untouched = copy.deepcopy(network.state_dict())
    result, figures = pruned(network, tmp_path, data, calibration_items=8, criterion="wanda", refresh="never")
    assert figures["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert figures.get("unreached", []) in ([], [path for path in figures.get("unreached", []) if "add_" in path])
    assert all(0 <= error < 1 for error in figures["reconstruction_error_by_layer"].values())
    layers = {f"{path}.weight" for path in figures["sparsity_by_layer"]}
    assert len(layers) >= 8
    assert all(name in layers or torch.equal(value, untouched[name]) for name, value in result.state_dict().items())


PROGRAM = """
import json, sys
for absent in ("limbeck", "transformers", "peft", "accelerate", "scipy", "sklearn"):  # diffusers does with less
    sys.modules[absent] = None
import diffusers, torch
torch.set_num_threads(1)
pipeline = diffusers.DDIMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
zeros = {path: int((module.weight == 0).sum()) for path, module in pipeline.unet.named_modules()
         if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
draws = torch.Generator().manual_seed(5)
images = pipeline(batch_size=1, num_inference_steps=2, generator=draws, output_type="pt").images
print(json.dumps([zeros, bool(images.isfinite().all()), list(images.shape)]))
"""


def test_stock_diffusers_loads_the_pruned_pipeline(tmp_path):
    pipeline = diffusers.DDIMPipeline(pipelines.unet(), diffusers.DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "dense")
    network = load_diffusers(tmp_path / "dense")
    note_process(network, process_of(network).sampled(steps=4, times=None))
    layers = {"layers": ["*resnets*", "*attentions*"], "exclude": ["*time_emb*", "*conv_shortcut*"]}
    result, figures = pruned(network, tmp_path / "work", Latents(1), pattern="2:4", calibration_items=8, **layers)
    save_model(result, tmp_path / "sparse")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "sparse")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    zeros, finite, shape = json.loads(done.stdout.splitlines()[-1])
    assert (finite, shape) == (True, [1, 1, 8, 8])
    assert set(figures["sparsity_by_layer"].values()) == {0.5}
    for path, module in result.named_modules():
        if path in zeros:
            assert zeros[path] == int((module.weight == 0).sum())
            assert zeros[path] == (module.weight.numel() // 2 if path in figures["sparsity_by_layer"] else 0)


def test_a_recipe_prunes_its_diffusion_teacher_and_rounds_it(tmp_path):
    recipe = {
        "data": {"name": "digits"},
        "stages": [
            {
                "name": "teacher",
                "method": "denoising",
                "student": {"name": "denoiser", "arguments": {"width": 32, "depth": 1}},
                "options": {"steps": 6, "guidance": 1.5},
                "train": {"steps": 30, "batch_size": 32},
            },
            {
                "name": "pruned",
                "method": "prune",
                "student": "stage:teacher",
                "options": {"sparsity": 0.5, "bits": 4, "calibration_items": 32},
            },
        ],
    }
    run = limbeck.run(recipe, out=tmp_path / "run", quiet=True)
    teacher, found = (run.results()[name] for name in ("teacher", "pruned"))
    assert found.keys() >= {"frechet", "sliced_wasserstein", "evaluations", "seconds_per_sample", "sparsity"}
    assert "accuracy" not in found
    assert found["evaluations"] == teacher["evaluations"] == 12
    assert found["sparsity"] >= 0.5
    assert found["huffman_bits"] < found["nominal_bits"] <= 3  # magnitudes, beside the signs
    student = limbeck.load(run.folder)
    assert {"stages.0.entry.weight"} <= quantization_of(student).keys()
    assert float((student.stages[0].entry.weight == 0).float().mean()) >= 0.5
    files = limbeck.export(run, "quantized", tmp_path / "small")
    small = load_model(tmp_path / "small")
    assert process_of(small).config() == process_of(student).config()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in small.state_dict().items())
    whole = limbeck.export(run, "limbeck", tmp_path / "whole")
    sizes = [sum(file.stat().st_size for file in made) for made in (files, whole)]
    assert sizes[0] < 0.7 * sizes[1]
