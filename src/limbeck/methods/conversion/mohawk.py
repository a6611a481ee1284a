"""MOHAWK: attentions become state-space models in three steps of ever larger parts (Bick et al., 2024)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.taps import Taps
from limbeck.core.teacher import Teacher
from limbeck.core.warm_start import start_from
from limbeck.language.attention_layers import block_of
from limbeck.language.conversion import convert, is_converted, mixers_of, mlps_of
from limbeck.language.teacher_forcing import forced_inputs, live_model, observe
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.mixing import matrix_distance, output_distance
from limbeck.objectives.topk import TopKDivergence, topk_divergence

Layer = Annotated[int, Field(ge=0, le=1000)]


@register
class Mohawk(TokenMethod):
    r"""Attentions are replaced by discrete Mamba-2 mixers that match first their matrices, then their outputs, and at
    last the whole model's predictions: three stages of a recipe, one after the other.

    .. math:: L_{orientation} = \frac{1}{N}\sum_l \frac{1}{BH} \sum_{b,h} \lVert T^l_{bh} - A^l_{bh} \rVert_F, \qquad
        L_{alignment} = \frac{1}{N}\sum_l \frac{1}{|M|} \sum_{i \in M} \lVert s^l_i - t^l_i \rVert_2

    .. math:: L_{distillation} = w\,\frac{1}{|M|}\sum_{i \in M} \mathrm{KL}(p_i \,\Vert\, q_i) + w_y\,\mathrm{CE}(q, y)

    with :math:`T` the matrices of the mixers, :math:`A` those of the teacher's attentions behind the softmax, and
    :math:`s, t` what a mixer and an attention return. In the first two every layer by itself receives what the
    teacher's layer receives, so that no gradient passes from one layer to another. A student that has attentions is
    converted when its first stage begins: values and outputs carry over, behind an open gate and a convolution that
    passes its input on, and so do all other weights. Orientation trains B, C, the decay, their convolution and D;
    alignment all of the mixers, with blocks of frozen MLPs; distillation everything. The stage that is called by
    itself, the default, is distillation: with the weights that carry over it is of use alone.

    Alignment and orientation call mixers by themselves, which sharded (FSDP) weights do not allow: they are refused.
    """

    card = Card(
        slug="mohawk",
        title="Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models",
        arxiv="2408.10189",
        year=2024,
        family="conversion",
        task="language-modelling",
        needs=("teacher", "student"),
        use="When a transformer has to read or write long texts at a cost that grows no faster than their length.",
        tiny={"state_size": 4},
    )

    class Options(TokenMethod.Options):
        """Which stage it is, what is converted into what, and the weights of distillation."""

        stage: Literal["orientation", "alignment", "distillation"] = Field(
            "distillation", description="matrices, outputs of single layers, or predictions of the whole"
        )
        keep_attention: list[Layer] = Field(
            default_factory=list, description="numbers of layers, from 0, that stay as they are: a hybrid"
        )
        state_size: int = Field(64, ge=1, le=4096, description="state of a head, where the student is yet to convert")
        taps: int = Field(4, ge=1, le=64, description="tokens that the mixer's convolution sees, likewise")
        initialise: Literal["teacher", "none"] = Field(
            "teacher", description="whose weights a student yet to convert begins with: the teacher's, or its own"
        )
        carry_values: bool = Field(
            True,
            description="mixers yet to make begin with the attention's values and output, behind an open gate and a "
            "convolution that passes its input on; the paper does this before alignment",
        )
        freeze_mlp: bool | None = Field(
            None,
            description="keep MLPs as they are; null does so in alignment and not in distillation. Where alignment "
            "trains them, whole blocks are compared, and their norms are trained along",
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        chosen: Any = options
        if not is_converted(student):
            if chosen.initialise == "teacher":
                start_from(student, live_model(teacher, "the student's first weights (initialise: teacher)"))
            mixer = {"state": chosen.state_size, "taps": chosen.taps}
            student = convert(student, "discrete-mamba2", mixer, chosen.keep_attention, chosen.carry_values)
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.paths = list(mixers_of(student))  # of the attentions, in the teacher
        trained = {id(parameter) for parameter in self._trained()}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if chosen.stage != "distillation":
            live_model(teacher, f"stage {chosen.stage}")
        if chosen.stage == "orientation":
            for number, kept in enumerate(part.clone() for part in self._beside()):
                self.register_buffer(f"kept_{number}", kept, persistent=False)

    def divergence(self) -> LogitDivergence:
        return divergence("forward-kl")

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence("forward-kl", "bucket")

    def step(self, batch: Batch) -> Iterator[Update]:
        stage = self.options.stage
        yield self.match(batch) if stage == "distillation" else self._layer_by_layer(batch)

    @torch.no_grad()
    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Puts what orientation leaves alone back to where it was: weight decay reaches it without any gradient."""
        if self.options.stage == "orientation":
            for number, part in enumerate(self._beside()):
                part.copy_(self.get_buffer(f"kept_{number}"))

    def _layer_by_layer(self, batch: Batch) -> Update:
        """Orientation or alignment: the mean over the layers, each on what the teacher's layer receives."""
        if any(isinstance(parameter, DTensor) for parameter in self.student.parameters()):
            raise IncompatibleError(
                f"stage {self.options.stage} calls mixers by themselves, and sharded ones cannot be",
                "launch this stage without FSDP; distillation may go on with it",
            )
        teacher, mask = live_model(self.teacher, "MOHAWK"), _tokens(batch)
        by_block = self.options.stage == "alignment" and self.options.freeze_mlp is False
        paths = [block_of(path) for path in self.paths] if by_block else self.paths
        seen = observe(teacher, paths, batch, matrices=self.options.stage == "orientation")
        if self.options.stage == "orientation":
            losses = [
                matrix_distance(mixer.materialize(hidden, mask), _of_heads(mixer, matrices), mask)
                for mixer, hidden, matrices in zip(self._mixers(), seen.inputs, seen.matrices, strict=True)
            ]
        else:
            outputs = self._blocks(batch, paths, seen.inputs) if by_block else self._mixed(seen.inputs, mask)
            losses = [output_distance(ours, theirs, mask) for ours, theirs in zip(outputs, seen.outputs, strict=True)]
        weight = batch.size if self.options.stage == "orientation" else _count(batch, mask)
        return Update("student", torch.stack(losses).mean(), weight)

    def _mixed(self, inputs: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        """What each mixer returns."""
        return [mixer(hidden, mask) for mixer, hidden in zip(self._mixers(), inputs, strict=True)]

    def _blocks(self, batch: Batch, paths: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What each block of the student returns."""
        own = [f"base.{path}" for path in paths]
        with forced_inputs(self.student, own, inputs), Taps(self.student, own, stop=True) as taps:
            taps.run(batch)
            return taps.values()

    def _mixers(self) -> list[Any]:
        return list(mixers_of(self.student).values())

    def _trained(self) -> Iterator[nn.Parameter]:
        """What the stage trains."""
        options = self.options
        if options.stage == "orientation":
            for mixer in self._mixers():
                yield from (mixer.in_proj.weight, *mixer.conv.parameters(), mixer.D)
        elif options.stage == "alignment":
            for path, mixer in mixers_of(self.student).items():
                whole = options.freeze_mlp is False
                yield from (self.student.get_submodule(f"base.{block_of(path)}") if whole else mixer).parameters()
        else:
            frozen = {id(parameter) for parameter in mlps_of(self.student)} if options.freeze_mlp else set()
            yield from (parameter for parameter in self.student.parameters() if id(parameter) not in frozen)

    def _beside(self) -> Iterator[Tensor]:
        """The rows of trained weights that the matrices do not depend on: those of x and of the gate."""
        for mixer in self._mixers():
            inner, gate = mixer.inner, mixer.channels
            yield from (mixer.in_proj.weight[:inner], mixer.in_proj.weight[gate : gate + inner])
            yield from (mixer.conv.weight[:inner], mixer.conv.bias[:inner])


def _tokens(batch: Batch) -> Tensor | None:
    """True at tokens; None where there is no padding."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def _count(batch: Batch, mask: Tensor | None) -> Tensor | float:
    return batch["input_ids"].numel() if mask is None else mask.sum()


def _of_heads(mixer: Any, matrices: Tensor) -> Tensor:
    if matrices.shape[1] != mixer.heads:
        raise IncompatibleError(
            f"the teacher attends with {matrices.shape[1]} heads and the student mixes with {mixer.heads}",
            "convert a student with the teacher's heads, or begin with stage: alignment",
        )
    return matrices
