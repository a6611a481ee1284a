"""Networks with guidance adapters around their blocks: put on, told the scale in each call, and taken off."""

import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.guidance_adapters import KINDS, AdapterConfig, GuidanceAdapter, Told
from limbeck.diffusion.ports import Condition, port_of

BLOCKS: dict[str, tuple[str, ...]] = {
    "DiTTransformer2DModel": ("transformer_blocks.*.attn1",),
    "UNet2DConditionModel": ("*.transformer_blocks.*.attn2",),
    "SD3Transformer2DModel": ("transformer_blocks.*.attn",),
    "FluxTransformer2DModel": ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    "SanaTransformer2DModel": ("transformer_blocks.*.attn2",),
    "DenoisingMLP": ("stages.*",),  # ours: it has no attention
}
"""The blocks that adapters stand around, by class of the network; globs."""

EMBEDDINGS: dict[str, tuple[str, str]] = {
    "DiTTransformer2DModel": (
        "transformer_blocks.0.norm1.emb.timestep_embedder",
        "transformer_blocks.0.norm1.emb.class_embedder",
    ),
    "UNet2DConditionModel": ("time_embedding", "class_embedding"),
    "SD3Transformer2DModel": ("time_text_embed.timestep_embedder", ""),
    "FluxTransformer2DModel": ("time_text_embed.timestep_embedder", ""),
    "SanaTransformer2DModel": ("time_embed.emb.timestep_embedder", ""),
    "DenoisingMLP": ("time", "label"),
}
"""Modules with a network's own embeddings of time and class."""


class GuidanceAdapted(nn.Module):
    """A frozen network and its guidance adapters, called as networks of this library are.

    Where the condition holds no `guidance` the adapters are silent and the network is what it was, so it can be guided
    by two predictions again. The network's modules keep their names, and their weights are not touched; a stock
    pipeline that holds the same network is guided within `told`.

    Args:
        network: any network of `ports`; it is frozen, and stays in eval mode.
        config: what the adapters are.

    Attributes:
        network: the network, with hooks on its blocks.
        adapters: all adapters, whose state dict is keyed by the module paths of their blocks.

    Raises:
        ValueError: the network takes the scale itself, or has no such block or embedding.
    """

    guidance = True  # `ports.takes_guidance` asks for it

    def __init__(self, network: nn.Module, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.network = network.requires_grad_(False)
        self.adapters = nn.Module()
        self._told, self._handles = Told(), []
        embedded = (self._listen(config.time == "base", config.time_module, self._told.hear_time),
                    self._listen(config.label == "base", config.label_module, self._told.hear_label))  # fmt: skip
        for path in config.blocks:
            block = _module(network, path)
            adapter = KINDS[config.kind](config, self._told, block_widths(block), embedded)
            _place(self.adapters, path, adapter)
            self._handles.append(block.register_forward_hook(adapter.join, with_kwargs=True))
        weight = next(network.parameters(), None)
        if weight is not None:
            self.adapters.to(weight.device)
        for name, value in vars(network).items():
            if name.startswith("limbeck_"):  # its process, its empty prompt, and the like
                setattr(self, name, value)
        self.train(self.training)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's whole output at items x (items, ...) and times (items,), guided by `condition["guidance"]`."""
        rest = {name: value for name, value in condition.items() if name != "guidance"}
        told = self._told
        try:
            told.guidance = condition.get("guidance")
            told.time, told.label, told.prompt = time, rest.get("label"), rest.get("prompt")
            return port_of(self.network)(self.network, x, time, rest)
        finally:
            told.clear()  # recomputing checkpoints find silent adapters, and torch raises on that

    @contextmanager
    def told(self, guidance: float | Tensor) -> Iterator[nn.Module]:
        """Within the context the bare network is guided, whoever calls it: a stock pipeline with its guidance off.

        Args:
            guidance: the scale g, one number or one an item.
        """
        told = self._told

        def before(network: Any, args: Any, options: dict[str, Any]) -> None:
            given = inspect.signature(network.forward).bind(*args, **options).arguments
            x = next(iter(given.values()))

            def items(value: Any) -> Tensor | None:
                if value is None:
                    return None
                return torch.as_tensor(value, dtype=torch.float32, device=x.device).expand(len(x))

            told.guidance = items(guidance)
            told.time = items(given.get("timestep", given.get("time")))
            condition: Mapping[str, Any] = given.get("condition", {})
            told.label = given.get("class_labels", condition.get("label"))
            told.prompt = given.get("encoder_hidden_states", condition.get("prompt"))

        def after(network: nn.Module, args: Any, output: Any) -> None:
            told.clear()

        handles = [
            self.network.register_forward_pre_hook(before, with_kwargs=True),
            self.network.register_forward_hook(after, always_call=True),
        ]
        try:
            yield self.network
        finally:
            for handle in handles:
                handle.remove()

    def detach(self) -> nn.Module:
        """Takes the adapters off and returns the network as it was; this object is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.network

    def train(self, mode: bool = True) -> "GuidanceAdapted":
        """Sets the mode of the adapters; the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "GuidanceAdapted":
        """Makes the adapters trainable or not; the network never is."""
        self.network.requires_grad_(False)
        self.adapters.requires_grad_(requires_grad)
        return self

    def _listen(self, wanted: bool, path: str, hear: Any) -> int:
        if not wanted:
            return 0
        module = _module(self.network, path)
        self._handles.append(module.register_forward_hook(hear))
        return _last_width(module)


def usual_blocks(network: nn.Module, patterns: Sequence[str] | None = None) -> tuple[str, ...]:
    """Module paths of the blocks that adapters stand around; of blocks within blocks the outer one.

    Args:
        network: any network.
        patterns: paths or globs; those of the network's class in `BLOCKS` if absent.

    Raises:
        ValueError: nothing fits, or nothing is known of the class.
    """
    globs = BLOCKS.get(type(network).__name__) if patterns is None else patterns
    if globs is None:
        raise ValueError(f"it is not known where a {type(network).__name__} has its attention: name its blocks")
    found: list[str] = []
    for name, _ in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            found.append(name)
    if not found:
        raise ValueError(f"a {type(network).__name__} has no blocks {', '.join(globs)}")
    return tuple(found)


def own_embeddings(network: nn.Module) -> tuple[str, str]:
    """Module paths of the network's own time and class embeddings; empty where it has none, or none is known."""
    paths = EMBEDDINGS.get(type(network).__name__, ("", ""))
    time, label = (path if path and _last_width(_found(network, path)) else "" for path in paths)
    return time, label


def block_widths(block: nn.Module) -> tuple[int, int]:
    """Widths of the tokens that a block takes and gives: of its query and output, or its first and last linear layer.

    Raises:
        ValueError: it has no linear layers.
    """
    asked: Any = getattr(block, "to_q", None)
    given: Any = getattr(block, "to_out", None)
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"a {type(block).__name__} has no linear layers to read its widths from")
    first = asked if isinstance(asked, nn.Linear) else layers[0]
    first_given = given[0] if isinstance(given, nn.ModuleList) else None
    last = first_given if isinstance(first_given, nn.Linear) else layers[-1]
    return first.in_features, last.out_features


def _place(adapters: nn.Module, path: str, adapter: GuidanceAdapter) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in adapters._modules:
            adapters.add_module(folder, nn.Module())
        adapters = adapters.get_submodule(folder)
    adapters.add_module(name, adapter)


def _found(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _module(network: nn.Module, path: str) -> nn.Module:
    module = _found(network, path)
    if module is None:
        raise ValueError(f"a {type(network).__name__} has no module '{path}'")
    return module


def _last_width(module: nn.Module | None) -> int:
    """Width of what an embedding gives: of the last linear layer or table in it; 0 for none."""
    widths = [0]
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.Linear):
            widths.append(part.out_features)
        elif isinstance(part, nn.Embedding):
            widths.append(part.embedding_dim)
    return widths[-1]
