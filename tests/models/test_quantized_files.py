import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn

import limbeck
from limbeck.compression.points import quantile_points, quantize_to_points
from limbeck.compression.quantized import QuantizedStateDict, quantization_of
from limbeck.compression.quantizers import quantize
from limbeck.compression.weights import chosen_weights
from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.diffusion.denoiser import Process, Sampling, denoiser_of, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import VPDiscrete
from limbeck.models.convnet import ConvNet
from limbeck.models.export import export_formats, export_model
from limbeck.models.quantized_files import QUANTIZED, read_quantized
from limbeck.models.saved import load_model, save_model


def quantised(model: nn.Module, levels: int = 4, **chosen: bool) -> nn.Module:
    tensors = {
        name: quantize(value.detach(), levels, bucket=64) for name, value in chosen_weights(model, **chosen).items()
    }
    return QuantizedStateDict(tensors).fill(model)


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=10, in_chans=1)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))


def unet() -> nn.Module:
    pytest.importorskip("diffusers")
    from tests.models import pipelines

    return note_process(pipelines.unet(), Process(VPDiscrete.named("linear"), Direct("eps", 1.0), Sampling("ddim", 4)))


MODELS = {
    "shipped": lambda: ConvNet(width=4, depth=3),
    "timm": timm_model,
    "transformers": llama,
    "diffusers": unet,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("first_and_last", [True, False])
def test_the_compact_folder_loads_to_the_same_bits(model, first_and_last, tmp_path):
    model = quantised(model, first_and_last=first_and_last)
    files = export_model(model, tmp_path / "out", "quantized")
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    stored = [file for file in files if file.suffix == ".safetensors"]
    assert [file.name for file in stored] == [QUANTIZED]
    loaded = limbeck.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert same(loaded, model)
    assert quantization_of(loaded).keys() == quantization_of(model).keys()
    assert stored[0].stat().st_size < 0.7 * sum(value.nbytes for value in model.state_dict().values())


def test_a_saved_model_keeps_how_it_is_quantised(model, tmp_path):
    model = quantised(model)
    save_model(model, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert same(loaded, model)
    assert "quantized" in export_formats(loaded)
    export_model(loaded, tmp_path / "out", "quantized")
    assert same(limbeck.load(tmp_path / "out"), model)
    given = MODELS["shipped"]() if isinstance(model, ConvNet) else None
    if given is not None:
        assert limbeck.load(tmp_path / "out", given) is given
        assert same(given, model)


def test_stock_libraries_load_the_saved_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    language, vision = quantised(llama()), quantised(timm_model())
    save_model(language, tmp_path / "language")
    save_model(vision, tmp_path / "vision")
    assert same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "language"), language)
    assert same(timm.create_model(f"local-dir:{tmp_path / 'vision'}", pretrained=True), vision)


def test_other_exports_hold_the_weights_alone(tmp_path):
    model = quantised(ConvNet(width=4))
    files = export_model(model, tmp_path / "out", "limbeck")
    assert QUANTIZED not in {file.name for file in files}
    assert same(load_model(tmp_path / "out"), model)


def test_a_model_that_is_not_quantised_any_more_cannot_be_exported_so(tmp_path):
    model = quantised(ConvNet(width=4))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(model, tmp_path / "student")
    assert not (tmp_path / "student" / QUANTIZED).exists()
    with pytest.raises(IncompatibleError, match="cannot be exported to quantized"):
        export_model(model, tmp_path / "out", "quantized")


@pytest.fixture
def folder(tmp_path):
    export_model(quantised(ConvNet(width=4)), tmp_path / "out", "quantized")
    return tmp_path / "out"


def test_a_flipped_bit_anywhere_in_the_file_is_seen(folder):
    path = folder / QUANTIZED
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 97):
        altered = bytearray(whole)
        altered[place] ^= 4
        path.write_bytes(altered)
        with pytest.raises(DamagedFileError):
            load_model(folder)
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError):
            load_model(folder)
    path.write_bytes(whole)
    load_model(folder)


def test_a_file_of_another_model_is_refused(folder, tmp_path):
    export_model(quantised(ConvNet(width=6)), tmp_path / "other", "quantized")
    shutil.copy(tmp_path / "other" / QUANTIZED, folder / QUANTIZED)
    with pytest.raises(IncompatibleError):
        load_model(folder)


def test_a_note_beside_other_weights_is_refused(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        torch.manual_seed(seed)
        save_model(quantised(ConvNet(width=4)), tmp_path / name)
    shutil.copy(tmp_path / "one" / QUANTIZED, tmp_path / "other" / QUANTIZED)
    with pytest.raises(DamagedFileError, match="other weights"):
        load_model(tmp_path / "other")


def test_weights_in_place_of_the_compact_file_are_refused(tmp_path):
    save_model(ConvNet(width=4), tmp_path / "plain")
    with pytest.raises(DamagedFileError, match="no quantised weights"):
        read_quantized(tmp_path / "plain" / "model.safetensors")
    with pytest.raises(DamagedFileError, match="missing"):
        read_quantized(tmp_path / QUANTIZED)


def test_weights_of_a_denoiser_of_diffusers_can_be_quantised():
    diffusers = pytest.importorskip("diffusers")
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(**shape, **blocks)
    tensors = {
        name: quantize_to_points(value.detach(), quantile_points(value, 16))
        for name, value in chosen_weights(network).items()
    }
    images, times = torch.randn(1, 3, 8, 8), torch.tensor([5])
    with torch.no_grad():
        before = network(images, times).sample
        after = QuantizedStateDict(tensors).fill(network)(images, times).sample
    assert quantization_of(network) is not None
    assert 0 < (after - before).norm() / before.norm() < 0.5


def test_the_file_says_what_it_holds(folder):
    with safe_open(folder / QUANTIZED, "pt") as file:
        assert set(file.metadata()) == {"quantized", "sha256"}


@torch.no_grad()
def test_a_quantised_pipeline_keeps_its_other_components_and_its_empty_prompt(stock, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from limbeck.models.adapters.diffusers import load_diffusers
    from limbeck.models.adapters.diffusers_classes import pipeline_of

    network = quantised(load_diffusers(stock.text), 16)
    save_model(network, tmp_path / "student")
    assert (tmp_path / "student" / "unet" / QUANTIZED).is_file()
    whole = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    assert same(whole.unet, network)
    assert export_formats(load_model(tmp_path / "student")) == ["diffusers", "quantized"]
    files = export_model(load_model(tmp_path / "student"), tmp_path / "out", "quantized")
    parts = {str(file.relative_to(tmp_path / "out")) for file in files if file.suffix == ".safetensors"}
    assert parts == {f"unet/{QUANTIZED}", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    for loaded in (limbeck.load(tmp_path / "out"), load_diffusers(tmp_path / "out"), load_model(tmp_path / "out")):
        assert same(loaded, network)
        assert not loaded.training
        assert quantization_of(loaded).keys() == quantization_of(network).keys()
        assert pipeline_of(loaded) == tmp_path / "out"
        assert process_of(loaded).config() == process_of(network).config()
        null = denoiser_of(loaded).null({"prompt": torch.zeros(1, 12, 16)})["prompt"]
        assert null.abs().sum() > 0
    noise, prompts = torch.randn(2, 4, 8, 8), {"prompt": torch.randn(2, 12, 16)}
    images = [generate(denoiser_of(one.eval()), noise, prompts, steps=2) for one in (network, loaded)]
    assert torch.equal(*images)
    save_model(loaded, tmp_path / "again")
    assert same(load_model(tmp_path / "again"), network)


def test_a_damaged_compact_network_is_refused(tmp_path):
    export_model(quantised(unet()), tmp_path / "out", "quantized")
    path = tmp_path / "out" / "unet" / QUANTIZED
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError):
        limbeck.load(tmp_path / "out")
    export_model(quantised(timm_model()), tmp_path / "other", "quantized")
    shutil.copy(tmp_path / "other" / QUANTIZED, path)
    with pytest.raises(IncompatibleError, match="do not fit"):
        limbeck.load(tmp_path / "out")


def test_an_adapter_has_no_compact_form(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = quantised(adapted)
    assert export_formats(model) == ["peft", "onnx"]
    with pytest.raises(IncompatibleError, match=r"cannot be exported to quantized\n.*merge its adapter"):
        export_model(model, tmp_path / "out", "quantized")
    save_model(model, tmp_path / "student")
    assert not (tmp_path / "student" / QUANTIZED).exists()
