import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from limbeck.compression.huffman import huffman_lengths, mean_code_length
from limbeck.compression.points import quantile_points, quantize_to_points
from limbeck.compression.quantized import (
    QuantizedStateDict,
    note_quantization,
    pooled_histogram,
    quantization_of,
)
from limbeck.compression.quantizers import quantize
from limbeck.compression.storage import code_sizes, compact, digest, expand


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(state: QuantizedStateDict, model: nn.Module | None = None):
    tensors, metadata = compact(state, model)
    assert metadata["sha256"] == digest(metadata["quantized"], tensors)
    return expand(tensors, json.loads(metadata["quantized"]))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_indices_of_every_width_come_back(bits, count):
    state = QuantizedStateDict({"w": quantize(draw(count), 2**bits, bucket=64)})
    tensors, _ = compact(state)
    assert len(tensors["indices"]) == math.ceil(bits * count / 8)
    again, weights = back(state)
    assert torch.equal(again["w"].indices, state["w"].indices)
    assert torch.equal(weights["w"], state["w"].dequantize())


def test_all_kinds_come_back_from_one_file():
    weights = draw(30, 11)
    kinds = {
        "linear": quantize(weights, 4, bucket=64),
        "signs": quantize(weights, 3, bucket=100, scaling="absmax"),
        "points": quantize_to_points(weights, quantile_points(weights, 5, bucket=64), bucket=64),
        "one.point": quantize_to_points(weights, torch.tensor([0.5]), bucket=None),
        "half": quantize(weights.bfloat16(), 256),
        "double": quantize(weights.double(), 16),
        "scalar": quantize(torch.tensor(2.0), 16),
    }
    again, found = back(QuantizedStateDict(kinds))
    assert list(again) == list(kinds)
    for name, tensor in kinds.items():
        assert torch.equal(found[name], tensor.dequantize())
        assert found[name].dtype == tensor.dtype
        assert (again[name].levels, again[name].bucket) == (tensor.levels, tensor.bucket)


def test_more_indices_than_are_packed_at_once_come_back(monkeypatch):
    monkeypatch.setattr("limbeck.compression.storage._PIECE", 64)
    state = QuantizedStateDict({"w": quantize(draw(1001), 8, bucket=64)})
    assert torch.equal(back(state)[1]["w"], state["w"].dequantize())
    assert len(compact(state)[0]["indices"]) == math.ceil(3 * 1001 / 8)


def test_what_is_not_quantised_is_kept_once_under_all_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    state = QuantizedStateDict({"0.weight": quantize(model[0].weight.detach(), 4)})
    state.fill(model)
    _, weights = back(state, model)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not [name for name in compact(state, model)[0] if "2.weight" in name]


@pytest.mark.parametrize("change", ["levels", "shape", "more", "name", "dtype"])
def test_parts_that_do_not_go_together_are_refused(change):
    tensors, metadata = compact(QuantizedStateDict({"w": quantize(draw(40), 3, bucket=16)}))
    content = json.loads(metadata["quantized"])
    entry = content["tensors"][0]
    if change == "levels":
        entry["levels"] = 2
    elif change == "shape":
        entry["shape"] = [4000]
    elif change == "more":
        entry["shape"] = [33]
    elif change == "name":
        del tensors["beta"]
    else:
        entry["dtype"] = "complex64"
    with pytest.raises((ValueError, KeyError)):
        expand(tensors, content)


def test_the_digest_sees_every_part():
    tensors, metadata = compact(QuantizedStateDict({"w": quantize(draw(40), 4, bucket=16)}))
    content = metadata["quantized"]
    assert digest(content + " ", tensors) != metadata["sha256"]
    for name, tensor in tensors.items():
        moved = tensor.clone()
        moved.view(torch.uint8)[-1] ^= 1
        assert digest(content, {**tensors, name: moved}) != metadata["sha256"]


def test_sizes_are_counted_by_hand():
    weights = draw(1000)
    points = torch.tensor([0.0, 0.3, 0.7, 1.0])
    state = QuantizedStateDict(
        {"even": quantize(weights, 4, bucket=64), "learned": quantize_to_points(weights, points, bucket=64)}
    )
    counts = [0] * 256
    for tensor in state.values():
        for index in tensor.indices.tolist():
            counts[index] += 1
    assert pooled_histogram(state.values()) == counts
    mean_bits, buckets = mean_code_length(counts), math.ceil(1000 / 64)
    sizes = code_sizes(state)
    assert sizes["quantized_weights"] == 2000
    assert sizes["nominal_bits"] == 2.0
    # The paper's N meanbits + 64 ceil(N/b), and 32 k where the points are learned.
    total = 2000 * mean_bits + 2 * 64 * buckets + 32 * 4
    assert sizes["bits_per_weight"] == pytest.approx(total / 2000, rel=1e-12)
    signed = code_sizes(QuantizedStateDict({"w": quantize(weights, 4, bucket=64, scaling="absmax")}))
    assert signed["bits_per_weight"] == pytest.approx(signed["huffman_bits"] + (32 * buckets + 1000) / 1000, rel=1e-12)


def test_a_file_is_about_as_large_as_its_bits():
    state = QuantizedStateDict({"w": quantize(draw(1 << 16), 4, bucket=256)})
    stored = len(save(*compact(state)))
    assert 0 <= stored - ((1 << 16) * 2 + 64 * 256) // 8 < 600  # the header


def test_known_codes():
    assert huffman_lengths([5, 9, 12, 13, 16, 45]) == [4, 4, 3, 3, 3, 1]
    assert huffman_lengths([0, 7, 0]) == [0, 0, 0]
    assert huffman_lengths([1, 1, 1, 1]) == [2, 2, 2, 2]
    assert mean_code_length([]) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=64).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_a_code_is_complete_and_within_a_bit_of_the_entropy(counts):
    lengths = huffman_lengths(counts)
    assert sum(2.0**-length for length, count in zip(lengths, counts, strict=True) if count) == 1.0  # Kraft
    total = sum(counts)
    entropy = -sum(count / total * math.log2(count / total) for count in counts if count)
    assert entropy - 1e-9 <= mean_code_length(counts) < entropy + 1


def test_a_note_holds_as_long_as_the_weights_do():
    model = nn.Linear(20, 20)
    assert quantization_of(model) is None
    state = QuantizedStateDict({name: quantize(value.detach(), 4) for name, value in model.named_parameters()})
    assert quantization_of(note_quantization(model, state)) is None  # noted, but not quantised
    assert quantization_of(state.fill(model)) is state
    assert quantization_of(model.bfloat16()) is state
    with torch.no_grad():
        model.weight[3, 4] += 0.5
    assert quantization_of(model) is None


def test_only_a_model_of_the_same_shape_is_filled():
    state = QuantizedStateDict({"weight": quantize(draw(3, 4), 4)})
    with pytest.raises(ValueError, match="'weight' is"):
        state.fill(nn.Linear(3, 4))
