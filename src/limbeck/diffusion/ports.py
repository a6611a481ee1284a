"""How a denoising network is called: one function for each family's signature, found by the name of its class.

Nothing of diffusers is imported here: its models are known by name. Networks of this library are called as
`network(x, time, condition)`.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.embeddings import scalar_embedding

Condition = Mapping[str, Tensor]
Port = Callable[[Any, Tensor, Tensor, Condition], Tensor]

_EXACT = ("guidance", "time_ids")

NULL_PROMPT = "limbeck_null_prompt"
"""Attribute of a network that holds the condition of the empty prompt, each tensor with one row."""


def call_network(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The network's output at items x (items, ...) and times (items,), cut to the channels of x.

    Networks that learn the variance too give it as further channels after the prediction; it is not used here.
    """
    output = whole_output(network, x, time, condition)
    return output[:, : x.shape[1]] if output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1] else output


def whole_output(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The network's output with all its channels.

    Items and what they are conditioned on are brought to the precision of the network's weights; times and scales keep
    theirs, float32 at least, since half precision does not tell neighbouring times apart.
    """
    weights = chain(network.parameters(), network.buffers())  # frozen copies have nothing but buffers
    weight = next((weight for weight in weights if weight.is_floating_point()), x)
    time = time.to(torch.promote_types(weight.dtype, torch.float32))
    condition = {
        name: value.to(weight.dtype) if value.is_floating_point() and name not in _EXACT else value
        for name, value in condition.items()
    }
    x = x.to(weight.dtype)
    seen = torch.cat([x, condition["channels"]], 1) if "channels" in condition else x
    return port_of(network)(network, seen, time, condition)


def port_of(network: nn.Module) -> Port:
    """How the network is called; by the names of its class and parents, looking through an adapter."""
    for kind in type(without_adapter(network)).__mro__:
        if kind.__name__ in PORTS and kind.__module__.startswith("diffusers."):
            return PORTS[kind.__name__]
    return _own


def is_own(network: nn.Module) -> bool:
    """Whether the network is called as those of this library are."""
    return port_of(network) is _own


def takes_guidance(network: nn.Module) -> bool:
    """Whether the network can be told the guidance scale."""
    network = without_adapter(network)
    if is_own(network):
        return getattr(network, "guidance", None) is not None
    config: Any = getattr(network, "config", None)
    return any(getattr(config, name, None) for name in ("time_cond_proj_dim", "guidance_embeds"))


def without_adapter(network: nn.Module) -> nn.Module:
    """The network under peft's wrapper, or the network itself."""
    unwrap: Any = getattr(network, "get_base_model", None)
    return unwrap() if callable(unwrap) else network


def null_condition(network: nn.Module, condition: Condition, null_label: int | None) -> Condition:
    """The condition that says nothing: the null label, or the empty prompt; the guidance scale stays as it is.

    Raises:
        ValueError: the network knows none.
    """
    empty = dict(condition)
    if "label" in condition:
        if null_label is None:
            raise ValueError("the network has no label that says nothing: it was not trained without its condition")
        empty["label"] = torch.full_like(condition["label"], null_label)
    if "prompt" in condition:
        noted: Condition | None = getattr(without_adapter(network), NULL_PROMPT, None)
        if noted is None:
            raise ValueError("the empty prompt is not known: note it on the network")
        for name in condition.keys() & _OF_PROMPT:
            if name not in noted:
                raise ValueError(f"the empty prompt is noted on the network without its '{name}'")
            empty[name] = noted[name].to(condition[name]).expand_as(condition[name])
    return empty


def share_null_prompt(network: nn.Module, other: nn.Module | None) -> None:
    """Notes on a network that knows no empty prompt the one of another, whose encoders' prompts it is trained on."""
    noted = None if other is None else getattr(without_adapter(other), NULL_PROMPT, None)
    if noted is not None and getattr(without_adapter(network), NULL_PROMPT, None) is None:
        setattr(without_adapter(network), NULL_PROMPT, noted)


_OF_PROMPT = {"prompt", "prompt_mask", "pooled"}


def _own(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, time.to(x.dtype), condition)


def _unet(network: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    labels = condition.get("label") if network.class_embedding is not None else None  # it refuses what it does not use
    return network(x, time, class_labels=labels).sample


def _text_unet(network: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    given: dict[str, Any] = {"encoder_hidden_states": condition.get("prompt")}
    if "prompt_mask" in condition:
        given["encoder_attention_mask"] = condition["prompt_mask"]
    if "label" in condition and network.class_embedding is not None:
        given["class_labels"] = condition["label"]
    if "guidance" in condition:
        width = network.config.time_cond_proj_dim
        if width is None:
            raise ValueError("the UNet takes no guidance scale: build it with time_cond_proj_dim")
        given["timestep_cond"] = scalar_embedding(condition["guidance"] - 1, width).to(x.dtype)  # w, not g
    if "pooled" in condition:
        given["added_cond_kwargs"] = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    return network(x, time, **given).sample


def _dit(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(x, time, class_labels=condition["label"]).sample


def _sd3(network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=condition["prompt"],
        pooled_projections=condition["pooled"],
    ).sample


def _flux(network: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    items, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    tokens = x.reshape(items, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    prompt = condition["prompt"]
    given = {"guidance": condition["guidance"].to(x.dtype)} if "guidance" in condition else {}
    output = network(
        hidden_states=tokens.reshape(items, rows * columns, 4 * channels),
        timestep=time / 1000,  # Flux multiplies by 1000 itself
        encoder_hidden_states=prompt,
        pooled_projections=condition["pooled"],
        img_ids=places.view(-1, 3),
        txt_ids=torch.zeros(prompt.shape[1], 3, device=x.device, dtype=x.dtype),
        **given,
    ).sample
    blocks = output.view(items, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(items, -1, height, width)


def _sana(network: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    given: dict[str, Any] = {}
    if "guidance" in condition:
        given["guidance"] = condition["guidance"].to(x.dtype) * network.config.guidance_embeds_scale
    return network(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=condition["prompt"],
        encoder_attention_mask=condition.get("prompt_mask"),
        **given,
    ).sample


PORTS: dict[str, Port] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _text_unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "SanaTransformer2DModel": _sana,
}
"""Networks of diffusers by class name."""
