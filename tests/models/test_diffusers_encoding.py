"""Pictures and captions are encoded once by a pipeline's own encoders, kept, and trained on like any other batch."""

import io
import json
import warnings

import diffusers
import pytest
import torch

import limbeck
from limbeck.core.errors import IncompatibleError, LimbeckError, RecipeError
from limbeck.core.specs import DataSpec, EncodingSpec, ModelSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data import encoded as encoding
from limbeck.data.cache.errors import ForeignCacheError
from limbeck.data.encoded import encode
from limbeck.data.loader import Loader
from limbeck.data.names import check_data
from limbeck.data.open import open_data
from limbeck.data.readers.folder import read_folder
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import NetworkDenoiser, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.methods.trajectory.denoising import Denoising
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod
from limbeck.models.adapters.diffusers import load_diffusers
from limbeck.models.adapters.diffusers_encoders import PipelineEncoder
from limbeck.models.adapters.diffusers_schedulers import stock_times
from limbeck.models.build import build_model
from limbeck.models.saved import load_model, save_model
from tests.models import pipelines

WORDS = ["a red cat", "dog", "a blue dog", "cat", "red", "a dog", "blue cat", "a cat"]


def pictures(count: int = 8, size: int = 16) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=draws, dtype=torch.uint8)


def png(picture: torch.Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(stream, "PNG")
    return stream.getvalue()


def captioned() -> ArraySource:
    source = ArraySource(pictures())
    source.captions = tuple(WORDS)
    return source


@pytest.fixture
def folder(tmp_path):
    """A folder of captioned pictures."""
    home = tmp_path / "pictures"
    home.mkdir()
    rows = []
    for number, (picture, text) in enumerate(zip(pictures(), WORDS, strict=True)):
        (home / f"{number}.png").write_bytes(png(picture))
        rows.append({"file_name": f"{number}.png", "text": text})
    (home / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return home


def spec(folder, pipeline, **more) -> DataSpec:
    given = {"name": f"folder:{folder}", "caption_column": "text", "validation": 0.25}
    return DataSpec.model_validate(given | {"encoding": {"pipeline": str(pipeline), **more}})


def test_batches_hold_what_the_pipeline_s_encoders_give(stock, folder):
    wanted = spec(folder, stock.text)
    source, _ = read_folder(str(folder), wanted)
    batch = encode(source, wanted.encoding).fetch(torch.tensor([0, 3]))
    images = pictures()[[0, 3]].float() / 127.5 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(stock.text, subfolder="vae")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stock.text)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        prompt, _ = pipeline.encode_prompt([WORDS[0], WORDS[3]], "cpu", 1, False)
    assert torch.allclose(batch["image"], latents, atol=1e-5)
    assert torch.allclose(batch["prompt"], prompt, atol=1e-5)
    assert not torch.allclose(prompt[0], prompt[1], atol=1e-2)
    split = open_data(wanted)
    assert (len(split.train), len(split.validation), split.train.info().classes) == (6, 2, 0)
    parts = [part.fetch(torch.arange(len(part)))["prompt"] for part in (split.train, split.validation)]
    everything = PipelineEncoder(stock.text).prompts(WORDS)["prompt"]
    assert torch.allclose(torch.cat(parts).sum(0), everything.sum(0), atol=1e-4)  # each item once


def test_a_cache_is_read_again_without_the_encoders(stock, folder, tmp_path, monkeypatch):
    wanted = spec(folder, stock.text, cache=str(tmp_path / "cache"))
    first = open_data(wanted)
    memory = open_data(spec(folder, stock.text))

    def refuse(*_):
        raise AssertionError("the encoders were loaded")

    monkeypatch.setattr("limbeck.models.adapters.diffusers_encoders.PipelineEncoder.__init__", refuse)
    again = open_data(wanted)
    rows = torch.tensor([4, 1, 1])
    for name in ("image", "prompt"):
        assert torch.equal(first.train.fetch(rows)[name], again.train.fetch(rows)[name])
        assert torch.allclose(first.train.fetch(rows)[name], memory.train.fetch(rows)[name], atol=1e-5)
    changed = (folder / "metadata.jsonl").read_text().replace("a red cat", "a red dog").replace("blue cat", "blue")
    (folder / "metadata.jsonl").write_text(changed)
    with pytest.raises(ForeignCacheError, match="another teacher"):
        open_data(wanted)


def test_latents_are_drawn_anew_in_each_epoch_and_for_each_item(stock, folder):
    drawn = open_data(spec(folder, stock.text, draw=True)).train
    mean = open_data(spec(folder, stock.text)).train
    assert drawn.varied
    assert not mean.varied
    rows = torch.arange(4)
    assert torch.equal(drawn.fetch(rows)["image"], mean.fetch(rows)["image"])
    one, again, other = (drawn.fetch(rows, seed)["image"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(drawn.fetch(rows.flip(0), 1)["image"].flip(0), one)
    assert "view" in next(iter(Loader(drawn, 2, 0).at(0)))


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_tables_have_a_column_of_captions(stock, tmp_path, kind):
    import datasets

    rows = {"image": [{"bytes": png(one), "path": None} for one in pictures()], "text": WORDS, "more": WORDS}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    path = tmp_path / "table.parquet" if kind == "parquet" else tmp_path / "table"
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    given = {"name": f"{kind}:{path}", "caption_column": "text", "encoding": str(stock.text)}
    split = open_data(DataSpec.model_validate(given))
    assert split.train.fetch(torch.arange(2))["prompt"].shape == (2, 12, 16)
    with pytest.raises(RecipeError, match=r"caption_column.*no column 'txt'[\s\S]*text"):
        open_data(DataSpec.model_validate(given | {"caption_column": "txt"}))


def test_pictures_with_classes_are_encoded_without_captions(stock):
    source = ArraySource(pictures(), [0, 1] * 4)
    made = encode(source, EncodingSpec(pipeline=str(stock.classes)))
    batch = made.fetch(torch.arange(3))
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].shape == (3, 4, 8, 8)
    assert (made.classes, batch["label"].tolist()) == (2, [0, 1, 0])
    assert made.select(torch.tensor([2, 5])).fetch(torch.tensor([1]))["label"].tolist() == [1]


def test_what_does_not_fit_is_refused(stock, folder, monkeypatch):
    gray = ArraySource(pictures()[:, :1], [0, 1] * 4)
    with pytest.raises(IncompatibleError, match="takes 3 channels"):
        encode(gray, EncodingSpec(pipeline=str(stock.classes)))
    with pytest.raises(IncompatibleError, match=r"has text encoder[\s\S]*caption_column"):
        encode(ArraySource(pictures()), EncodingSpec(pipeline=str(stock.text)))
    with pytest.raises(IncompatibleError, match="no autoencoder"):
        encode(ArraySource(pictures()), EncodingSpec(pipeline=str(stock.pixels)))
    monkeypatch.setattr(encoding, "MEMORY_BYTES", 1000)
    with pytest.raises(IncompatibleError, match=r"data\.encoding\.cache"):
        encode(ArraySource(pictures()), EncodingSpec(pipeline=str(stock.classes)))
    (folder / "metadata.jsonl").write_text('{"file_name": "../../etc/passwd", "text": "a"}')
    with pytest.raises(LimbeckError, match="no picture"):
        open_data(spec(folder, stock.text))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"encoding": None}, "caption_column"),
        ({"augment": ["flip"]}, "augment"),
        ({"encoding": "./nowhere"}, "encoding.pipeline"),
        ({"name": "pydoc"}, "encoding"),
        ({"name": "digits"}, "caption_column"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_read(stock, folder, changes, key):
    given = spec(folder, stock.text).model_dump() | changes
    with pytest.raises(RecipeError, match=rf"data\.{key}"):
        check_data(DataSpec.model_validate(given))


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(stock):
    encoder = PipelineEncoder(stock.text)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stock.text)
    with torch.no_grad():
        _, negative = pipeline.encode_prompt(["a cat"], "cpu", 1, True)
    assert torch.allclose(encoder.empty()["prompt"], negative, atol=1e-6)


def test_a_lora_student_of_a_text_pipeline_is_trained_and_loaded_by_the_pipeline(stock, folder, tmp_path):
    data = spec(folder, stock.text, cache=str(tmp_path / "cache")).model_dump()
    student = {"name": f"diffusers:{stock.text}", "adapter": {"rank": 2, "target_modules": ["to_q", "to_v"]}}
    run = limbeck.distill(
        "denoising",
        student=student,
        data=data,
        out=tmp_path / "run",
        steps=3,
        batch_size=2,
        quiet=True,
        options={"steps": 2, "condition_dropout": 0.5},
        optimizer={"lr": 0.05},
    )
    network = limbeck.load(run.folder)
    assert process_of(network).sampling.steps == 2
    assert any(parameter.abs().sum() > 0 for name, parameter in network.named_parameters() if "lora_B" in name)
    limbeck.export(run, "diffusers", tmp_path / "lora")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stock.text)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    latents = torch.randn(1, 4, 8, 8)
    before = pipeline("cat", latents=latents, **arguments).images
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline.load_lora_weights(tmp_path / "lora")
    assert not torch.equal(pipeline("cat", latents=latents, **arguments).images, before)
    limbeck.export(run, "diffusers", tmp_path / "merged", merge=True)
    assert load_model(tmp_path / "merged").config.cross_attention_dim == 16


def test_a_smaller_student_learns_the_empty_prompt_from_its_teacher(stock, folder, tmp_path):
    small = {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    data = spec(folder, stock.text)
    info = open_data(data).train.info()
    student = build_model(ModelSpec(name="config:UNet2DConditionModel", arguments=small | blocks), info, seed=0)
    assert (student.config.in_channels, student.config.cross_attention_dim) == (4, 16)
    teacher = LiveTeacher(build_model(ModelSpec(name=f"diffusers:{stock.text}"), info, seed=0))

    class Copying(DiffusionMethod):
        card = Denoising.card
        Options = Denoising.Options

        def step(self, batch):
            raise NotImplementedError

    method = Copying(Copying.Options(), student=student, teacher=teacher, data=info)
    x0, condition = method.read(info.example)
    t = torch.full((len(x0),), 400.0)
    with torch.no_grad():
        null = method.denoiser.null(condition)
        assert torch.equal(null["prompt"], teacher.model.limbeck_null_prompt["prompt"].expand(2, -1, -1))
        assert method.denoiser(x0, t, null).x0.shape == x0.shape
        guided = method.ask(x0, t, condition, 3.0).x0
    assert guided.isfinite().all()
    save_model(student, tmp_path)
    assert torch.equal(load_model(tmp_path).limbeck_null_prompt["prompt"], null["prompt"][:1])


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_s_two_encoders_and_sizes(tmp_path, zeros):
    pipeline = pipelines.stable_diffusion_xl(tmp_path, force_zeros_for_empty_prompt=zeros)
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(pipeline)
    stock.set_progress_bar_config(disable=True)
    made = encode(captioned(), EncodingSpec(pipeline=str(pipeline)))
    batch = made.fetch(torch.tensor([1, 4]))
    with torch.no_grad():
        prompt, negative, pooled, negative_pooled = stock.encode_prompt([WORDS[1], WORDS[4]], device="cpu")
    for name, expected in {"prompt": prompt, "pooled": pooled}.items():
        assert torch.allclose(batch[name], expected, atol=1e-5)
    assert batch["time_ids"].tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2
    empty = PipelineEncoder(pipeline).empty()
    assert torch.allclose(empty["prompt"], negative[:1], atol=1e-6)
    assert torch.allclose(empty["pooled"], negative_pooled[:1], atol=1e-6)
    assert (empty["prompt"].abs().max() == 0) == zeros
    network = load_diffusers(pipeline)
    latents = torch.randn(2, 4, 8, 8)
    process = process_of(network)
    times = stock_times(stock.scheduler, process.schedule, 3)
    note_process(network, process.sampled(steps=3, times=tuple(times.tolist())))
    condition = {name: batch[name] for name in ("prompt", "pooled", "time_ids")}
    texts, size = [WORDS[1], WORDS[4]], {"height": 16, "width": 16}
    with torch.no_grad():
        # Euler's scheduler begins at sigma times the noise, and not at the noise itself.
        begin = latents * process.schedule.sigma(torch.tensor(999.0, dtype=torch.float64)).float()
        ours = generate(NetworkDenoiser(network), begin, condition)
        images = stock(texts, latents=latents, num_inference_steps=3, output_type="latent", **size).images
    assert torch.allclose(ours, images, atol=1e-3, rtol=1e-4)


def test_sd3_s_encoders_and_its_flow(tmp_path):
    pipeline = pipelines.stable_diffusion_3(tmp_path)
    stock = diffusers.StableDiffusion3Pipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    batch = encode(captioned(), EncodingSpec(pipeline=str(pipeline))).fetch(torch.tensor([1, 4]))
    network = load_diffusers(pipeline)
    process = process_of(network)
    assert process.sampling.steps == 28
    times = stock_times(stock.scheduler, process.schedule, 3)
    note_process(network, process.sampled(steps=3, times=tuple(times.tolist())))
    latents = torch.randn(2, 4, 8, 8)
    condition = {name: batch[name] for name in ("prompt", "pooled")}
    texts, size = [WORDS[1], WORDS[4]], {"height": 16, "width": 16}
    with torch.no_grad():
        vae = stock.vae.encode(pictures()[[1, 4]].float() / 127.5 - 1).latent_dist.mean
        ours = generate(NetworkDenoiser(network), latents, condition)
        images = stock(texts, latents=latents, num_inference_steps=3, output_type="latent", **size).images
    assert torch.allclose(batch["image"], (vae - 0.1) * 1.5, atol=1e-5)
    assert torch.allclose(ours, images, atol=1e-4)
