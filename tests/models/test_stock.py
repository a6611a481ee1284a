"""What is saved loads with stock timm and stock transformers, in a fresh process in which limbeck is not there."""

import subprocess
import sys

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from limbeck.core.specs import ModelSpec
from limbeck.models.build import build_model
from limbeck.models.saved import save_model
from tests.models.information import information

PROGRAM = """
import sys
sys.modules["limbeck"] = None  # any import of it fails
import timm, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
logits = {}
for name, image in load_file("images.safetensors").items():
    if name.startswith("timm"):
        model = timm.create_model(f"local-dir:{name}", pretrained=True)
    else:
        model = transformers.AutoModelForImageClassification.from_pretrained(name)
    with torch.no_grad():
        output = model.eval()(image)
    logits[name] = getattr(output, "logits", output).contiguous()
save_file(logits, "logits.safetensors")
"""


def from_recipe(name: str, channels: int, size: int, **arguments) -> torch.nn.Module:
    return build_model(ModelSpec(name=name, arguments=arguments), information(channels, size, 5), seed=0)


def test_stock_libraries_load_what_was_saved(tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.ViTConfig(**tiny, patch_size=8).save_pretrained(tmp_path / "config")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    models = {
        "timm-resnet": (from_recipe("timm:resnet10t", 1, 32), (4, 1, 32, 32)),
        "timm-vit": (from_recipe("timm:test_vit", 3, 48), (4, 3, 48, 48)),
        "timm-convnext": (from_recipe("timm:test_convnext", 2, 32, drop_rate=0.1), (4, 2, 64, 96)),
        "timm-own": (timm.create_model("test_resnet", num_classes=3, in_chans=1), (4, 1, 64, 64)),
        "hf-vit": (from_recipe(f"hf:{tmp_path / 'config'}", 1, 32), (4, 1, 32, 32)),
        "hf-resnet": (transformers.ResNetForImageClassification(resnet), (4, 3, 24, 24)),
    }
    images = {name: torch.randn(shape) for name, (_, shape) in models.items()}
    for name, (model, _) in models.items():
        save_model(model, tmp_path / name)
    save_file(images, tmp_path / "images.safetensors")
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True)
    found = load_file(tmp_path / "logits.safetensors")
    for name, (model, _) in models.items():
        with torch.no_grad():
            output = model.eval()(images[name])
        assert torch.equal(found[name], getattr(output, "logits", output))
