"""Exports: each format where it is allowed, and ONNX that computes the same."""

import builtins
import json

import numpy
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError, MissingExtraError
from limbeck.models.convnet import ConvNet
from limbeck.models.export import export_formats, export_model
from limbeck.models.normalisation import set_normalisation
from limbeck.models.vit import VisionTransformer
from tests.models.information import information

EXAMPLE = information().example


@pytest.mark.parametrize(
    "model",
    [
        ConvNet(width=4),
        VisionTransformer(image_size=8, patch_size=4, channels=1, dim=8, depth=1, heads=2, distilled=True),
    ],
    ids=["convnet", "vit"],
)
def test_onnx_computes_the_same_for_any_number_of_items(tmp_path, model):
    set_normalisation(model, [0.5], [0.25])
    files = export_model(model, tmp_path, "onnx", EXAMPLE)
    assert [path.name for path in files] == ["model.onnx", "preprocessing.json"]
    assert json.loads(files[1].read_text())["mean"] == [0.5]
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    for items in (1, 2, 7):
        image = torch.randn(items, 1, 8, 8)
        with torch.no_grad():
            expected = model.eval()(image).numpy()
        numpy.testing.assert_allclose(session.run(["logits"], {"image": image.numpy()})[0], expected, atol=1e-4)


def test_a_network_that_fixes_the_number_of_items_is_not_exported(tmp_path):
    class Fixed(nn.Module):
        def forward(self, image):
            return image.flatten(1) @ torch.ones(64, 10) + torch.arange(image.shape[0] * 10.0).view(3, 10)

    with pytest.raises(IncompatibleError, match="onnx"):
        export_model(Fixed(), tmp_path, "onnx", EXAMPLE)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("to", "allowed"), [("timm", "limbeck, onnx"), ("transformers", "limbeck, onnx")])
def test_a_format_of_another_library_is_refused_with_what_is_allowed(tmp_path, to, allowed):
    with pytest.raises(IncompatibleError, match=f"ConvNet cannot be exported to {to}\n.*{allowed}"):
        export_model(ConvNet(), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_each_library_s_models_go_to_its_own_format(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    assert export_formats(model) == ["timm", "onnx"]
    assert [path.name for path in export_model(model, tmp_path, "timm")] == ["config.json", "model.safetensors"]


def test_onnx_needs_an_example(tmp_path):
    with pytest.raises(IncompatibleError, match="example"):
        export_model(ConvNet(), tmp_path, "onnx")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"limbeck\[onnx\]"):
        export_model(ConvNet(), tmp_path, "onnx", EXAMPLE)
