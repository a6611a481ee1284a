"""Drawing from what a run left: pixels, latents, classes and prompts."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

import limbeck
from limbeck.canvas import Canvas
from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.core.run import Run
from limbeck.core.specs import DataSpec
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import VPDiscrete
from limbeck.models.adapters.diffusers import load_diffusers
from limbeck.models.adapters.diffusers_encoders import PipelineEncoder
from limbeck.sampling import draw, sample
from tests.models import pipelines

WORDS = ["a red cat", "dog", "a blue dog", "cat", "red", "a dog"]
QUICK: dict[str, Any] = {"steps": 2, "batch_size": 4, "quiet": True}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the small denoiser on digits, of the classes 0 to 9."""
    return limbeck.distill(
        "denoising",
        student={"name": "denoiser", "arguments": {"width": 16, "depth": 1}},
        data={"name": "digits", "limit": 60, "mean": [0.5], "std": [0.5]},
        out=tmp_path_factory.mktemp("digits") / "run",
        options={"steps": 3, "guidance": 2.0},
        **QUICK,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image pipeline."""
    pipelines.quiet()
    return pipelines.stable_diffusion(tmp_path_factory.mktemp("text"))


def pictures(folder: Path, captions: bool) -> Path:
    """A folder of six pictures of 16 pixels in two classes, or with captions."""
    rows = []
    for number, words in enumerate(WORDS):
        place = folder / (f"{number}.png" if captions else f"class-{number % 2}/{number}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 200 - 30 * number, 90)).save(place)
        rows.append({"file_name": f"{number}.png", "text": words})
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Run:
    """A run that trained adapters of the text-to-image pipeline on captioned pictures."""
    folder = tmp_path_factory.mktemp("captioned")
    name = f"folder:{pictures(folder / 'pictures', captions=True)}"
    return limbeck.distill(
        "denoising",
        student={"name": f"diffusers:{text}", "adapter": {"rank": 2, "target_modules": ["to_q"]}},
        data={"name": name, "caption_column": "text", "validation": 0.34, "encoding": str(text)},
        out=folder / "run",
        options={"steps": 2},
        **QUICK,
    )


# --- pixels


def test_images_of_digits(digits, tmp_path):
    images = sample(digits.folder, 20, out=tmp_path / "samples.png")
    assert images.shape == (20, 1, 8, 8)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    picture = Image.open(tmp_path / "samples.png")
    assert (picture.mode, picture.size) == ("L", (10 * 33, 2 * 33))  # a column a class, enlarged four times, framed
    first = torch.tensor(list(picture.crop((0, 0, 32, 32)).tobytes())).view(32, 32)
    assert torch.equal(first[::4, ::4], (images[0, 0] * 255).round().long())
    assert list(tmp_path.iterdir()) == [tmp_path / "samples.png"]


def test_what_is_drawn_is_what_the_network_s_process_says(digits):
    network = limbeck.load(digits.folder)
    labels = torch.tensor([3, 5, 3])
    canvas = Canvas(network, digits.recipe().data, labels=[3, 5])
    with torch.no_grad():
        noise = canvas.noise(torch.arange(3), seed=4)
        expected = generate(NetworkDenoiser(network), noise, {"label": labels})
    drawn = sample(digits, 3, labels=[3, 5], seed=4)
    assert torch.allclose(drawn, (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)
    with torch.no_grad():
        other = generate(NetworkDenoiser(network), noise, {"label": labels}, steps=1, guidance=1.0)
    drawn = sample(digits, 3, labels=[3, 5], seed=4, steps=1, guidance=1.0)
    assert torch.allclose(drawn, (other / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_equal_seeds_give_equal_images_whatever_the_batch_size(digits):
    images = sample(digits, 12)
    assert torch.allclose(sample(digits, 12, batch_size=5), images, atol=1e-5)
    assert torch.allclose(sample(digits, 4), images[:4], atol=1e-5)
    assert not torch.allclose(sample(digits, 12, seed=1), images, atol=1e-2)


@pytest.mark.parametrize("solver", ["consistency", "tcd", "ancestral", "sde", "stochastic_progressive"])
def test_random_solvers_draw_for_each_image_by_itself(digits, solver):
    network = limbeck.load(digits.folder)
    note_process(network, process_of(network).sampled(solver=solver, steps=4, guidance=1.0))
    images = draw(network, digits, 12)
    assert torch.allclose(draw(network, digits, 12, batch_size=5), images, atol=1e-5)
    assert torch.allclose(draw(network, digits, 12), images, atol=1e-5)
    assert not torch.allclose(draw(network, digits, 12, seed=1), images, atol=1e-2)


def test_random_numbers_elsewhere_are_left_alone(digits):
    network = limbeck.load(digits.folder).train()
    note_process(network, process_of(network).sampled(solver="consistency"))
    state = torch.get_rng_state()
    draw(network, digits, 2)
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": 0}, "between 1 and 65536"),
        ({"items": 65537}, "between 1 and 65536"),
        ({"steps": 0}, "one step or more, not 0"),
        ({"guidance": -1.0}, "0 or more, not -1"),
        ({"guidance": float("nan")}, "0 or more, not nan"),
        ({"batch_size": 0}, "at least one image"),
        ({"labels": [3, 10]}, r"no class 10[\s\S]*0 to 9"),
        ({"labels": [-1]}, "no class -1"),
        ({"prompts": ["a cat"]}, "takes no prompts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(digits, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        sample(digits, **{"out": tmp_path / "x.png", **given})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_refused_before_anything_is_drawn(digits, tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        sample(digits, out=tmp_path / "nowhere" / "x.png")
    with pytest.raises(UsageError, match="holds no run"):
        sample(tmp_path / "nowhere", out=tmp_path / "nowhere" / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_classifier_draws_nothing(tmp_path):
    run = limbeck.distill(
        "supervised", student="mlp", data={"name": "digits", "limit": 40}, out=tmp_path / "r", **QUICK
    )
    with pytest.raises(IncompatibleError, match="draws no samples"):
        sample(run)


def test_more_steps_than_a_schedule_has_times_are_refused(digits):
    network = limbeck.load(digits.folder)
    note_process(network, Process(VPDiscrete.named("linear", 10), Direct("v"), Sampling("ddim", 2)))
    assert draw(network, digits, 2, steps=10).shape == (2, 1, 8, 8)
    with pytest.raises(IncompatibleError, match="no samples can be drawn in this way"):
        draw(network, digits, 2, steps=11)
    with pytest.raises(IncompatibleError, match="no label that says nothing"):
        draw(network, digits, 2, guidance=2.0)


def test_data_that_were_given_as_objects_are_given_again(tmp_path):
    images = torch.rand(30, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    from limbeck.data.source import ArraySource

    source = ArraySource(images, normalisation=([0.2, 0.5], [0.3, 0.4]))
    student = {"name": "denoiser", "arguments": {"width": 8, "depth": 1}}
    run = limbeck.distill("denoising", student=student, data=(images, None), out=tmp_path / "r", **QUICK)
    with pytest.raises(UsageError, match=r"given as objects[\s\S]*data="):
        sample(run)
    drawn = sample(run, 5, data=source)
    assert drawn.shape == (5, 2, 4, 6)
    with pytest.raises(UsageError, match="no classes"):
        sample(run, 5, data=source, labels=[0])


# --- latents


def test_latents_are_decoded_and_prompts_are_encoded_by_the_pipeline(captioned, text):
    images = sample(captioned, 3, prompts=["a red cat", "dog"], seed=2)
    assert images.shape == (3, 3, 16, 16)
    network = limbeck.load(captioned.folder)
    assert process_of(network).sampling.steps == 2
    stock = diffusers.StableDiffusionPipeline.from_pretrained(text)
    with torch.no_grad():
        prompt, _ = stock.encode_prompt(["a red cat", "dog", "a red cat"], "cpu", 1, False)
        noise = Canvas(network, captioned.recipe().data).noise(torch.arange(3), 2)
        latents = generate(NetworkDenoiser(network), noise, {"prompt": prompt})
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    assert noise.shape == (3, 4, 8, 8)
    assert torch.allclose(images, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert torch.allclose(sample(captioned, 3, prompts=["a red cat", "dog"], seed=2, batch_size=1), images, atol=1e-4)
    assert not torch.allclose(sample(captioned, 3, prompts=["blue"], seed=2), images, atol=1e-3)


def test_captions_of_the_run_s_data_are_the_prompts_where_none_is_given(captioned):
    network = limbeck.load(captioned.folder)
    canvas = Canvas(network, captioned.recipe().data)
    assert set(canvas.prompts) < set(WORDS)
    assert len(canvas.prompts) == 4  # of the six, what is trained on
    assert torch.allclose(sample(captioned, 2), sample(captioned, 2, prompts=canvas.prompts), atol=1e-5)


def test_the_empty_prompt_is_guided_away_from(captioned):
    plain, guided = (sample(captioned, 1, prompts=["cat"], guidance=scale) for scale in (1.0, 5.0))
    assert not torch.allclose(plain, guided, atol=1e-3)


def test_text_to_image_students_are_not_asked_for_classes(captioned):
    with pytest.raises(UsageError, match=r"prompts and not for classes[\s\S]*--prompt"):
        sample(captioned, labels=[0])


def test_the_network_s_configuration_says_its_shape_where_the_data_are_pixels(digits, text):
    network = load_diffusers(text)
    with pytest.raises(UsageError, match=r"none is given[\s\S]*--prompt"):
        draw(network, digits, 2)
    images = draw(network, digits, 2, steps=1, prompts=["cat"])
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("build", ["class_conditional_latents", "unconditional"])
def test_pipelines_without_text(digits, tmp_path, build):
    pipelines.quiet()
    folder = getattr(pipelines, build)(tmp_path / "pipeline")
    network = load_diffusers(folder, classes=10)
    images = draw(network, digits, 2, steps=2, guidance=1.0, labels=[4])
    if build == "unconditional":  # of pixels: nothing is decoded
        assert images.shape == (2, 1, 8, 8)
        return
    canvas = Canvas(network, DataSpec(), labels=[4])
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        noise = canvas.noise(torch.arange(2), 0)
        latents = generate(NetworkDenoiser(network), noise, {"label": torch.tensor([4, 4])}, steps=2, guidance=1.0)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.allclose(images, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_a_network_of_its_own_is_decoded_by_the_pipeline_that_encoded_its_data(tmp_path):
    pipelines.quiet()
    pipeline = pipelines.class_conditional_latents(tmp_path / "pipeline")
    run = limbeck.distill(
        "denoising",
        student={"name": "denoiser", "arguments": {"width": 8, "depth": 1}},
        data={"name": f"folder:{pictures(tmp_path / 'pictures', captions=False)}", "encoding": str(pipeline)},
        out=tmp_path / "run",
        options={"steps": 1},
        **QUICK,
    )
    images = sample(run, 4, labels=[1], out=tmp_path / "x.png")
    assert images.shape == (4, 3, 16, 16)
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    with pytest.raises(UsageError, match="no class 2"):
        sample(run, labels=[2])


def test_sdxl_is_told_its_sizes_and_sd3_shifts_its_latents(digits, tmp_path):
    pipelines.quiet()
    for build, shape in ((pipelines.stable_diffusion_xl, (1, 6)), (pipelines.stable_diffusion_3, None)):
        folder = build(tmp_path / build.__name__)
        network = load_diffusers(folder)
        canvas = Canvas(network, DataSpec(), prompts=["cat"])
        condition = canvas.condition(torch.arange(1))
        assert ("time_ids" in condition) == (shape is not None)
        if shape is not None:
            assert condition["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
        images = draw(network, digits, 1, steps=1, guidance=1.0, prompts=["cat"])
        assert images.shape == (1, 3, 16, 16)


def test_decoding_undoes_encoding_s_shift_and_scale(tmp_path):
    pipelines.quiet()
    encoder = PipelineEncoder(pipelines.stable_diffusion_3(tmp_path))
    vae = encoder.pipeline.vae
    raw = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(raw).sample
    assert torch.allclose(encoder.images((raw - 0.1) * 1.5), expected, atol=1e-5)


def test_a_pipeline_that_is_gone_is_named(digits, text, tmp_path):
    network: Any = load_diffusers(text)
    network.limbeck_pipeline = str(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"is gone.*gone"):
        draw(network, digits, 1, prompts=["cat"])


def test_a_network_of_unknown_shape_is_refused(text):
    class Bare(nn.Module):
        limbeck_pipeline = str(text)

    with pytest.raises(IncompatibleError, match="shape of what a Bare draws"):
        Canvas(Bare(), DataSpec(), prompts=["cat"])
