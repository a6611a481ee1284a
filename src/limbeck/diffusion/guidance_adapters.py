"""Adapters that teach a frozen denoiser its guidance: one evaluation a step, and the scale still free (AGD, 2025).

Around each attention block stands an adapter that adds to what the block says. It knows the scale g, and the time, the
class and the prompt as far as wanted. The network's own weights stay as they are, and the adapters come off again.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["attention", "offset"]
Source = Literal["own", "base", "none"]


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters are made of; all of it plain data.

    Attributes:
        kind: "attention" (the block's tokens attend to the conditions) or "offset" (one vector for all tokens).
        blocks: module paths of the blocks.
        hidden: width of the adapters; even.
        heads: of the attention; divides `hidden`.
        time: where the time comes from: an encoder of its own, the network's own embedding, or nowhere.
        label: the same for the class.
        labels: rows of an own class table; classes beyond it share the last row.
        prompt: width of the prompt's tokens; 0 leaves it out.
        dropout: within the offset adapter's layers.
        scale_factor: what g is multiplied by for the offset adapter's encoder.
        silent: whether an adapter adds nothing at first. (The authors' flag of this meaning, `zero_init`, does the
            opposite in their attention adapter.)
        time_module: module path of the network's own time embedding, for `time` "base".
        label_module: of its class embedding.

    Raises:
        ValueError: no blocks, or widths that do not go together.
    """

    kind: Kind
    blocks: tuple[str, ...]
    hidden: int = 256
    heads: int = 1
    time: Source = "own"
    label: Source = "none"
    labels: int = 1000
    prompt: int = 0
    dropout: float = 0.0
    scale_factor: float = 1000.0
    silent: bool = True
    time_module: str = ""
    label_module: str = ""

    def __post_init__(self) -> None:
        if not self.blocks or self.kind not in ("attention", "offset"):
            raise ValueError("adapters are of the kind attention or offset, around one block or more")
        if self.hidden < 2 or self.hidden % 2 or self.heads < 1 or self.hidden % self.heads:
            raise ValueError(f"a hidden width is even and divided by its heads, unlike {self.hidden} by {self.heads}")
        for source, path in ((self.time, self.time_module), (self.label, self.label_module)):
            if source not in ("own", "base", "none") or (source == "base" and not path):
                raise ValueError(f"a condition is own, base (with the path of its module) or none, not {source!r}")

    def config(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "blocks": list(self.blocks)}

    @classmethod
    def from_config(cls, config: Any) -> "AdapterConfig":
        """From plain data, as they come from a file.

        Raises:
            ValueError: the data describe no adapters.
        """
        try:
            return cls(**{**config, "blocks": tuple(map(str, config["blocks"]))})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no guidance adapters are described by {config}") from error


class Told:
    """What the adapters of one network are told during a call; all but the scale may be absent.

    Attributes:
        guidance: the scale g (items,); None outside of calls, when adapters are silent.
        time: as the network is told it (items,).
        label: class numbers (items,).
        prompt: tokens (items, tokens, width).
        time_embedding: what the network's own time embedding said in this call (items, width).
        label_embedding: the same of its class embedding.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything: the adapters fall silent."""
        self.guidance: Tensor | None = None
        self.time: Tensor | None = None
        self.label: Tensor | None = None
        self.prompt: Tensor | None = None
        self.time_embedding: Tensor | None = None
        self.label_embedding: Tensor | None = None

    def hear_time(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook on the network's time embedding."""
        self.time_embedding = output

    def hear_label(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook on the network's class embedding."""
        self.label_embedding = output


class ScalarEncoder(nn.Module):
    r""":math:`E(s) = \mathrm{LayerNorm}(\mathrm{MLP}(\cos 2\pi (f s + \phi)))` with fixed random f and phi.

    Args:
        hidden: width of the code and of what comes out; the MLP is four times as wide.
        normed: a LayerNorm within the MLP, as the offset adapter has it.
        dropout: within the MLP of that form.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, hidden: int, normed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(hidden))
        self.register_buffer("phases", torch.rand(hidden))
        self.layers = _layers(hidden, 4 * hidden, hidden, normed, dropout)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, scalar: Float[Tensor, " items"]) -> Float[Tensor, "items hidden"]:
        frequencies = self.frequencies.to(torch.promote_types(self.frequencies.dtype, torch.float32))
        turns = frequencies * scalar.to(frequencies)[:, None] + self.phases
        return self.norm(self.layers(torch.cos(2 * math.pi * turns).to(self.norm.weight.dtype)))


class GuidanceAdapter(nn.Module):
    """What both kinds share: encoders of the scale and the conditions, and the hook that adds to a block.

    Args:
        config: see `AdapterConfig`.
        told: what the adapters of the network are told.
        widths: of the block's tokens before and after it.
        embedded: widths of the network's own time and class embeddings, where they are used.
    """

    def __init__(self, config: AdapterConfig, told: Told, widths: tuple[int, int], embedded: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.told, self.widths = config, told, widths
        hidden, form = config.hidden, (config.kind == "offset", config.dropout)
        self.guidance = ScalarEncoder(hidden, *form)
        self.time: nn.Module | None = None
        self.label: nn.Module | None = None
        if config.time != "none":
            self.time = ScalarEncoder(hidden, *form) if config.time == "own" else nn.Linear(embedded[0], hidden)
        if config.label != "none":
            own = config.label == "own"
            self.label = nn.Embedding(config.labels, hidden) if own else nn.Linear(embedded[1], hidden)
        self.prompt = nn.Linear(config.prompt, hidden) if config.prompt else None

    def known(self) -> list[Float[Tensor, "items hidden"]]:
        """Codes of the time and of the class, as far as the adapter takes them."""
        told, found = self.told, []
        if isinstance(self.time, ScalarEncoder):
            found.append(self.time(_present(told.time, "time")))
        elif self.time is not None:
            found.append(self.time(self._cast(_present(told.time_embedding, "time embedding"))))
        if isinstance(self.label, nn.Embedding):
            label, last = _present(told.label, "class"), self.label.num_embeddings - 1
            found.append(self.label(torch.where((label < 0) | (label > last), last, label)))
        elif self.label is not None:
            found.append(self.label(self._cast(_present(told.label_embedding, "class embedding"))))
        return found

    def join(self, block: nn.Module, args: Any, options: dict[str, Any], output: Any) -> Any:
        """A forward hook: the block's output and what this adds to it, in a tuple to the first alone."""
        if self.told.guidance is None:
            return output
        tokens = args[0] if args else options["hidden_states"]
        added, first = self(tokens), output[0] if isinstance(output, tuple) else output
        joined = first + added.to(first.dtype)  # not in place: the output may be a view
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.guidance.norm.weight.dtype)

    def _prompt(self) -> Tensor | None:
        return None if self.prompt is None else self._cast(_present(self.told.prompt, "prompt"))


class CrossAttentionAdapter(GuidanceAdapter):
    """The block's tokens attend to [E(g), time, class, prompt tokens ...], which carry a code of their place."""

    def __init__(self, config: AdapterConfig, told: Told, widths: tuple[int, int], embedded: tuple[int, int]) -> None:
        super().__init__(config, told, widths, embedded)
        hidden = config.hidden
        self.query = nn.Linear(widths[0], hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, widths[1])
        _start(self.out, config.silent)

    def forward(self, tokens: Float[Tensor, "items *tokens width"]) -> Float[Tensor, "items *tokens out"]:
        """What is added at the block's input tokens (items, tokens, width), or (items, width) where they have none."""
        codes = torch.stack([self.guidance(_present(self.told.guidance, "scale")), *self.known()], 1)
        prompt = self._prompt()
        if prompt is not None and self.prompt is not None:
            codes = torch.cat([codes, self.prompt(prompt)], 1)
        codes = codes + position_code(codes.shape[1], self.config.hidden).to(codes)
        single = tokens.ndim == 2
        query = self.query(self._cast(tokens[:, None] if single else tokens))
        heads, scale = self.config.heads, self.config.hidden**-0.5  # the authors' scale, whatever the heads
        sides = (query, self.key(codes), self.value(codes))
        q, k, v = (side.unflatten(-1, (heads, -1)).transpose(1, 2) for side in sides)
        seen = functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        added = self.out(seen)
        return added[:, 0] if single else added


class OffsetAdapter(GuidanceAdapter):
    """All tokens of the block get one vector, made from E(1000 g) + time + class + the prompt's mean."""

    def __init__(self, config: AdapterConfig, told: Told, widths: tuple[int, int], embedded: tuple[int, int]) -> None:
        super().__init__(config, told, widths, embedded)
        self.out = _layers(config.hidden, config.hidden, widths[1], True, config.dropout)
        _start(self.out[-1], config.silent)

    def forward(self, tokens: Float[Tensor, "items *tokens width"]) -> Float[Tensor, "items *tokens out"]:
        """What is added at the block's input tokens (items, tokens, width) or (items, width)."""
        code = self.guidance(self.config.scale_factor * _present(self.told.guidance, "scale"))
        for other in self.known():
            code = code + other
        prompt = self._prompt()
        if prompt is not None and self.prompt is not None:
            code = code + self.prompt(prompt.mean(1))
        added = self.out(code)
        return added.view(len(added), *[1] * (tokens.ndim - 2), -1).expand(*tokens.shape[:-1], -1)


KINDS: dict[Kind, type[GuidanceAdapter]] = {"attention": CrossAttentionAdapter, "offset": OffsetAdapter}
"""Adapters by kind."""


def position_code(count: int, hidden: int) -> Float[Tensor, "count hidden"]:
    """Row p is [sin(p w_j) ..., cos(p w_j) ...] with w_j = 10000^(-2j / hidden), all sines first."""
    rates = 10000 ** (-2 * torch.arange(hidden // 2, dtype=torch.float64) / hidden)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def _layers(width: int, hidden: int, out: int, normed: bool, dropout: float) -> nn.Sequential:
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, out)
    if not normed:
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(hidden), last)


def _start(layer: Any, silent: bool) -> None:
    nn.init.zeros_(layer.bias)
    if silent:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)


def _present(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the guidance adapters need the {name} in each call")
    return value
