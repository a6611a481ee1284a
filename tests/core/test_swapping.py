"""Modules replaced and put back: in small trees, a diffusers UNet and a Llama."""

import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.swapping import swap_modules
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.generalised_linear_attention import GeneralisedLinearAttention


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.tied = self.layers[0].attn

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.tied(x)


def no_bias(path, module):
    return nn.Linear(4, 4, bias=False)


def objects(model):
    return [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]


def test_by_glob_and_back_to_the_very_same_modules():
    model, x = Tree().eval(), torch.randn(2, 4)
    before, y, state = objects(model), model(x), list(model.state_dict())
    seen = []
    with swap_modules(model, "layers.*.attn", lambda path, m: seen.append((path, m)) or no_bias(path, m)) as swapped:
        assert seen == [(path, swapped.originals[path]) for path, _ in seen]
        assert [path for path, _ in seen] == [f"layers.{i}.attn" for i in range(3)]
        assert "layers.1.attn.weight" in model.state_dict()
        assert "layers.1.attn.bias" not in model.state_dict()
        assert not model.layers[1].attn.training
        assert not torch.equal(model(x), y)
    assert objects(model) == before
    assert list(model.state_dict()) == state
    assert torch.equal(model(x), y)


def test_a_shared_module_is_swapped_once_for_all_places():
    model = Tree()
    with swap_modules(model, "tied", no_bias) as swapped:
        assert model.tied is model.layers[0].attn
        assert list(swapped.replacements) == ["layers.0.attn", "tied"]
        assert isinstance(model.layers[1].attn.bias, nn.Parameter)
    assert model.tied is model.layers[0].attn
    assert model.tied.bias is not None


def test_nested_matches_leave_with_the_outermost():
    model = Tree()
    before = objects(model)
    asked = []
    patterns = ["layers.1*", "layers.2.mlp.0"]
    with swap_modules(model, patterns, lambda path, m: asked.append(path) or nn.Identity()) as swapped:
        assert asked == ["layers.1", "layers.2.mlp.0"]
        assert list(swapped.replacements) == ["layers.1", "layers.2.mlp.0"]
    assert objects(model) == before


def test_what_the_factory_leaves_is_looked_into():
    model = Tree()
    before = objects(model)
    with swap_modules(model, "*", lambda path, m: no_bias(path, m) if type(m) is nn.Linear else m) as swapped:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(linear) == 6
        assert all(m.bias is None for m in linear)
        assert len(swapped.replacements) == 7
    assert objects(model) == before


def test_a_replacement_may_hold_the_original():
    model, x = Tree(), torch.randn(2, 4)
    before, y = objects(model), model(x)
    swapped = swap_modules(model, "layers.*.mlp", lambda path, m: nn.Sequential(m))
    assert torch.equal(model(x), y)
    swapped.undo()
    swapped.undo()
    assert objects(model) == before


def test_two_swaps_are_undone_in_reverse():
    model = Tree()
    before = objects(model)
    first = swap_modules(model, "layers.*.attn", no_bias)
    middle = objects(model)
    second = swap_modules(model, "layers.1.attn", lambda path, m: nn.Identity())
    with pytest.raises(IncompatibleError, match="undo the later swap first"):
        first.undo()
    second.undo()
    assert objects(model) == middle
    first.undo()
    assert objects(model) == before


def test_a_failing_factory_changes_nothing():
    model = Tree()
    before = objects(model)

    def fails(path, module):
        if path == "layers.2.attn":
            raise RuntimeError("no")
        return nn.Identity()

    with pytest.raises(RuntimeError, match="no"):
        swap_modules(model, "layers.*.attn", fails)
    assert objects(model) == before


def test_a_path_that_is_not_there():
    with pytest.raises(IncompatibleError, match=r"layers\.0\.attn"):
        swap_modules(Tree(), "layers.0.atn", no_bias)


@pytest.fixture(scope="module")
def diffusers():
    """The library, whose import takes longer than the test."""
    return pytest.importorskip("diffusers.models")


def test_in_a_diffusers_unet(diffusers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 8))

    class InPlace(nn.Module):
        """Called as diffusers calls its attention."""

        def __init__(self, attention) -> None:
            super().__init__()
            self.mixer = GeneralisedLinearAttention(attention.query_dim, attention.heads)
            self.mixer.take_projections(attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])

        def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
            return self.mixer(hidden_states)

    with torch.no_grad():
        before = unet(*inputs).sample
        with swap_modules(unet, "*.attn1", lambda path, m: InPlace(m)) as swapped:
            assert len(swapped.replacements) == 4
            inside = unet(*inputs).sample
            assert inside.isfinite().all()
            assert (inside - before).norm() > 1e-3 * before.norm()
            assert any(name.endswith("attn1.mixer.psi_q.0.weight") for name in unet.state_dict())
        assert torch.equal(unet(*inputs).sample, before)


def test_in_a_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 7))

    class InPlace(nn.Module):
        """Called as transformers calls its attention."""

        def __init__(self, attention) -> None:
            super().__init__()
            self.mixer = DiscreteMamba2(16, 4, 8)
            self.mixer.identity_convolution()
            self.mixer.take_projections(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)

        def forward(self, hidden_states, **options):
            return self.mixer(hidden_states), None

    with torch.no_grad():
        before = model(ids).logits
        with swap_modules(model, "model.layers.*.self_attn", lambda path, m: InPlace(m)):
            inside = model(ids).logits
            changed = ids.clone()
            changed[:, 4] = (ids[:, 4] + 1) % 50
            assert torch.equal(model(changed).logits[:, :4], inside[:, :4])
            assert not torch.allclose(inside, before)
            assert "model.layers.1.self_attn.mixer.in_proj.weight" in model.state_dict()
        assert torch.equal(model(ids).logits, before)
