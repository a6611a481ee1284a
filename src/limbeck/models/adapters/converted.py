"""Transformers models whose attentions are replaced by other mixers, as a model type of transformers.

`import limbeck.models.adapters.converted` is all that `AutoModelForCausalLM.from_pretrained` needs to load one.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_utils import PreTrainedModel

from limbeck.core.errors import IncompatibleError
from limbeck.language.attention_layers import Projections, attention_layers, projections
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.mixer import Mixer, select_rows, state_bytes

MIXERS: dict[str, type[Mixer]] = {"discrete-mamba2": DiscreteMamba2}
"""Kinds of mixers by the name that a configuration gives them."""


class ConvertedConfig(PreTrainedConfig):
    """A model's own configuration, and the mixers in place of some of its attentions.

    Attributes:
        text_config: of the model that was converted.
        mixers: by layer number, from 0, as text: `kind` (a key of `MIXERS`) and its arguments.
    """

    model_type = "limbeck-converted"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: dict | PreTrainedConfig | None = None
    mixers: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool = False


class MixerLayer(nn.Module):
    """A mixer in the place of a decoder's attention, called as one.

    Args:
        mixer: the mixer.
        layer: number of the layer, from 0.
    """

    def __init__(self, mixer: Mixer, layer: int) -> None:
        super().__init__()
        self.mixer, self.layer = mixer, layer

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        if "token_mask" not in options:
            raise IncompatibleError(
                "the model does not pass keywords on to its attentions, so that a mixer cannot know of padding",
                "convert a model of another architecture",
            )
        mask: Tensor | None = options["token_mask"]
        if past_key_values is None:
            return self.mixer(hidden_states, mask), None
        cached: Any = past_key_values.layers[self.layer]
        mixed, cached.state = self.mixer.prefill(hidden_states, mask, cached.state)
        cached.seen += hidden_states.shape[1]
        return mixed, None


class StateLayer(CacheLayerMixin):
    """What a mixer remembers, of constant size, in the place of an attention's keys and values."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first pass makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called: a mixer has no keys and values."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all tokens were kept."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens that went by, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The states of other sequences of the batch."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The states of some sequences of the batch."""
        if self.state is not None:
            self.state = select_rows(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence's state several times."""
        if self.state is not None:
            rows = len(next(iter(vars(self.state).values())))
            device = next(iter(vars(self.state).values())).device
            self.batch_select_indices(torch.arange(rows, device=device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: states are small, and stay where they are."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""


class ConvertedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers with mixers in place of some or all of its attentions.

    Generation keeps one state of constant size for each mixer, and keys and values for each attention that was left.

    Attributes:
        attention_paths: module paths of attentions, those that were replaced included, first layer first.
        mixer_paths: of those that were replaced, by number of the layer, from 0.

    Args:
        config: what it was, and which mixers it has.
        base: the model itself, which is changed in place; built anew from the configuration if absent.

    Raises:
        IncompatibleError: a mask other than one for each token (items, length); or see `attention_layers`.
    """

    config_class = ConvertedConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _is_stateful = True  # what was forgotten cannot be taken back: no assisted generation
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConvertedConfig, base: nn.Module | None = None) -> None:
        super().__init__(config)
        self.base: Any = AutoModelForCausalLM.from_config(config.text_config) if base is None else base
        paths = attention_layers(self.base)
        self.attention_paths = [f"base.{path}" for path in paths]
        self.mixer_paths: dict[int, str] = {}
        for number, described in sorted((config.mixers or {}).items(), key=lambda entry: int(entry[0])):
            layer = int(number)
            arguments = {name: value for name, value in described.items() if name != "kind"}
            mixer = MIXERS[described["kind"]](**arguments)
            self.base.set_submodule(paths[layer], MixerLayer(mixer, layer))
            self.mixer_paths[layer] = self.attention_paths[layer]
        self.post_init()

    def mixers(self) -> dict[int, Mixer]:
        """The mixers by number of their layer, from 0."""
        return {layer: self.get_submodule(f"{path}.mixer") for layer, path in self.mixer_paths.items()}  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        # Spelt out, because generation looks at the signature for what it may pass; passed on where they say something.
        if position_ids is not None:
            options["position_ids"] = position_ids
        if labels is not None:
            options["labels"] = labels
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            options["logits_to_keep"] = logits_to_keep
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if use_cache is None:
            use_cache = not self.training and bool(getattr(self.config.text_config, "use_cache", True))
        if past_key_values is not None:
            self.prepare_cache(past_key_values)
        elif use_cache:
            past_key_values = self.new_cache()
        token_mask, attention_mask = _masks(attention_mask, given.shape[1])
        return self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            token_mask=token_mask,
            **options,
        )

    def _supports_logits_to_keep(self) -> bool:
        return self.base._supports_logits_to_keep()

    def new_cache(self) -> Cache:
        """An empty cache: states for mixers, and whatever the model keeps for an attention for those that are left."""
        return self.prepare_cache(DynamicCache(config=self.config.text_config))

    def prepare_cache(self, cache: Cache) -> Cache:
        """Puts states in the place of keys and values into a cache that is empty; one that is ready stays as it is.

        Raises:
            IncompatibleError: the cache was filled by another model.
        """
        for layer in self.mixer_paths:
            while len(cache.layers) <= layer:
                cache.layers.append(DynamicLayer())
            present: Any = cache.layers[layer]
            if isinstance(present, StateLayer):
                continue
            if present.get_seq_length():
                raise IncompatibleError("this cache was filled by another model", "begin with a new one")
            cache.layers[layer] = StateLayer()
        return cache

    def get_input_embeddings(self) -> nn.Module:
        """The converted model's own."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts others in their place."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The converted model's own."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Puts others in their place."""
        self.base.set_output_embeddings(value)


def _masks(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the new tokens for mixers, and that of all tokens for attentions; None where nothing is padding."""
    if mask is None:
        return None, None
    if mask.ndim != 2:
        raise IncompatibleError(
            f"a converted model cannot follow a mask of {mask.ndim} dimensions", "give (items, length)"
        )
    if bool(mask.all()):
        return None, None
    return mask[:, -length:].bool(), mask


def convert(model: nn.Module, mixers: Mapping[int, Mapping[str, Any]], carry_values: bool = True) -> nn.Module:
    """Replaces attentions of a causal language model by mixers, in place, and returns it in its new class.

    Args:
        model: of transformers.
        mixers: by number of the layer, from 0: `kind`, and the arguments that the attention leaves open. Width, heads
            and the size of a head are the attention's.
        carry_values: begin with the attention's values and output, behind an open gate and a convolution that passes
            its input on: the mixer's output is then what its matrix makes of the attention's values.

    Raises:
        IncompatibleError: no such layer, or attentions of an unknown kind.
    """
    attentions: dict[int, Projections] = {}
    paths = attention_layers(model)
    described: dict[str, dict[str, Any]] = {}
    for layer, given in mixers.items():
        if layer >= len(paths):
            raise IncompatibleError(f"there is no layer {layer}: the model has {len(paths)}, counted from 0")
        found = attentions[layer] = projections(model.get_submodule(paths[layer]))
        described[str(layer)] = {**given, **_shape(found)}
    base: Any = model
    implementation = base.config._attn_implementation
    config = ConvertedConfig(
        text_config=base.config, mixers=described, tie_word_embeddings=bool(base.config.tie_word_embeddings)
    )
    config._attn_implementation = implementation  # a new configuration would leave the parts' own undecided
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(base.config, name, None))
    weight = next(model.parameters())
    converted = ConvertedForCausalLM(config, base)
    converted.generation_config = base.generation_config
    for layer, mixer in converted.mixers().items():
        mixer.to(weight.device, weight.dtype)
        if carry_values:
            _take_values(mixer, attentions[layer])
    return converted.train(model.training)


def _shape(attention: Projections) -> dict[str, Any]:
    width = attention.out.out_features
    return {
        "width": width,
        "heads": attention.heads,
        "expand": attention.heads * attention.size / width,
        "out_bias": attention.out.bias is not None,
    }


def _take_values(mixer: Any, attention: Projections) -> None:
    mixer.identity_convolution()
    mixer.open_gate()
    mixer.take_projections(values=attention.values, out=attention.out)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: keys, values and states."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += state_bytes(layer.state) if layer.state is not None else 0
            continue
        kept: list[Any] = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        total += sum(part.numel() * part.element_size() for part in kept if isinstance(part, Tensor))
    return total


AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM)
