"""SquareHead: sparse fine-tuning towards the dense teacher's hidden states (Kurtic et al., 2023)."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.compression.masks import Masks, keep_globally, keep_largest, sparsity_report
from limbeck.compression.matrices import InputStatistics, as_matrices, from_matrices
from limbeck.compression.saliency import Criterion, saliency
from limbeck.compression.schedules import cubic_sparsity, pruning_step
from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.optim import whole
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.language.predictions import kept_labels
from limbeck.language.states import StateReader
from limbeck.methods.conversion.layer_choice import LayerOptions, chosen_layers
from limbeck.methods.language.token_method import TokenDivergence, TokenMethod, token_losses
from limbeck.objectives.divergences import divergence
from limbeck.objectives.features import hint, square_head


@register
class SquareHead(TokenMethod):
    r"""A sparse student keeps its zeros and is trained on towards the hidden states of the dense model it came from.

    .. math:: L = h_{ce} L_{ce} + h_{kl} T^2 \mathrm{KL}(p_t \| p_s) + h_{sq} \sum_l
        \frac{\mathrm{mean}\,(f^l_s - f^l_t)^2}{\mathrm{mean}\,(f^l_t)^2 + \epsilon}

    with :math:`f^l` what block l puts out, the last one after the final norm, at every token that is no padding, those
    of the prompt included; cross-entropy and divergence are means over the tokens that count. Each layer's error is
    measured in units of the teacher's own size there, so that layers of large values do not drown the others. Of an
    encoder-decoder all states of both sides are compared.

    The masks are the zeros that the student brings (see `prune`), set again after every step. With `sparsity` they
    grow in training by :math:`s_k = s + (s_0 - s)(1 - k/n)^3`. The teacher has to be live, for no cache holds states of
    every layer. The sizes in the denominators couple the batch's items: with accumulation they are each
    micro-batch's own, which changes the loss a little; ranks share theirs. Sharded (FSDP) weights are masked alike, but
    for their gradients: `mask_gradients` is refused then.
    """

    card = Card(
        slug="squarehead",
        title="Sparse Fine-tuning for Inference Acceleration of Large Language Models",
        arxiv="2310.06927",
        year=2023,
        family="conversion",
        task="language-modelling",
        needs=("teacher", "student"),
        use="Where a language model was pruned to 60 % zeros or more and plain fine-tuning does not win it back.",
        couples_batch=True,
        tiny={"sparsity": 0.5, "begin": 0.0, "end": 1.0, "interval": 1, "criterion": "wanda"},
    )

    class Options(LayerOptions):
        """Weights of the three terms, and where the zeros come from; defaults are the paper's."""

        label_weight: float = Field(1.0, ge=0, le=1e6, description="h_ce, weight of the cross-entropy with the text")
        weight: float = Field(0.0, ge=0, le=1e6, description="h_kl, weight of the divergence of the predictions")
        state_weight: float = Field(1.0, ge=0, le=1e6, description="h_sq, weight of the hidden states' term")
        temperature: float = Field(1.0, gt=0, le=1000, description="of the divergence, which is multiplied by T²")
        eps: float = Field(2.0**-7, gt=0, le=1, description="added to the mean square of the teacher's states")
        normalise: Literal["layer", "none"] = Field(
            "layer", description="divide each layer's squared error by the teacher's mean square, or by nothing"
        )
        mask_gradients: bool = Field(
            False, description="keep what zeros would do out of gradient norms and the optimizer's averages"
        )
        sparsity: float | None = Field(
            None, ge=0, le=1, description="share of zeros to prune to in training; the student's own zeros if absent"
        )
        criterion: Criterion = Field(
            "magnitude",
            description="what a weight is worth, judged by the training batch where inputs matter (sparsity)",
        )
        scope: Literal["tensor", "row", "global"] = Field(
            "tensor", description="compare a layer's weights, an output's, or all of them with each other (sparsity)"
        )
        begin: float = Field(0.1, ge=0, le=1, description="share of training at which pruning begins (sparsity)")
        end: float = Field(0.5, ge=0, le=1, description="share of training at which all of it is done (sparsity)")
        interval: int = Field(20, ge=1, le=10**9, description="steps between prunings (sparsity)")

        @model_validator(mode="after")
        def _forward(self) -> Self:
            if self.end < self.begin:
                raise ValueError("end must not lie before begin")
            return self

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(teacher, LiveTeacher):
            raise IncompatibleError(
                f"a {type(teacher).__name__} does not give the hidden states of every layer",
                "take one live network as the teacher, without a cache",
            )
        self.ours, self.theirs = (StateReader(model, data.example) for model in (student, teacher.model))
        self.paths = list(chosen_layers(student, self.options))
        self.masks = Masks.of_zeros(student, [f"{path}.weight" for path in self.paths])
        self.first_sparsity = float(self.masks.sparsity())
        self._seen: tuple[int, InputStatistics] | None = None
        self._masked: int | None = None

    def divergence(self) -> TokenDivergence:
        return divergence("forward-kl", square_temperature=True)

    def step(self, batch: Batch) -> Iterator[Update]:
        self._mask_gradients()
        with torch.no_grad():
            teacher = self.theirs.read(batch)
        with self._looking(batch):
            student = self.ours.read(batch)
        labels = kept_labels(batch, self.ours.shift)
        loss, logs = student.states[0].new_zeros(()), {"sparsity": self.masks.sparsity()}
        if self.options.state_weight:
            logs["states"] = self._state_loss(student.states, teacher.states, len(labels))
            loss = loss + self.options.state_weight * logs["states"]
        parts = {"divergence": self.options.weight, "cross_entropy": self.options.label_weight}
        if any(parts.values()):
            target = teacher.predictions.as_teacher()
            losses = token_losses(student.predictions, target, self.divergence(), labels, self.terms())
            logs |= {name: getattr(losses, name) for name, weight in parts.items() if weight}
            loss = loss + losses.total
        yield Update("student", loss, len(labels), {name: value.detach() for name, value in logs.items()})

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Prunes where that is due, and sets to zero again what the optimizer moved."""
        progress = self._due()
        if progress is not None:
            self._narrow(cubic_sparsity(progress, self.options.sparsity, self.first_sparsity))
        self.masks.apply_to(self.student)

    def result(self) -> nn.Module:
        self.masks.apply_to(self.student)  # an average remembers weights that became zero while it was kept
        return self.student

    def figures(self) -> dict[str, Any]:
        return sparsity_report(self.student, self.masks.names)

    def _state_loss(self, ours: list[Tensor], theirs: list[Tensor], labels: int) -> Tensor:
        """The sum over layers; over several ranks the terms add up to that of the whole batch."""
        if [state.shape for state in ours] != [state.shape for state in theirs]:
            shapes = [f"{len(side)} layers of width {side[0].shape[-1]}" for side in (ours, theirs)]
            raise IncompatibleError(
                f"the student has {shapes[0]} and the teacher {shapes[1]}", "prune a copy of the teacher itself"
            )
        if self.options.normalise == "none":
            return torch.stack([hint(one, other) for one, other in zip(ours, theirs, strict=True)]).sum()
        squares = torch.stack(
            [state.to(torch.promote_types(state.dtype, torch.float32)).square().sum() for state in theirs]
        )
        own = torch.cat([squares.new_tensor([labels, theirs[0].numel(), theirs[-1].numel()]), squares])
        total = gather(own[None]).sum(0)
        counts = squares.new_tensor([state.numel() for state in theirs])
        # Sides of an encoder-decoder have numbers of tokens of their own.
        everywhere = torch.where(counts == own[2], total[2], total[1])
        share = (counts / everywhere) * (total[0] / own[0].clamp_min(1))
        terms = [
            square_head(one, other, eps=self.options.eps, teacher_square=square)
            for one, other, square in zip(ours, theirs, total[3:] / everywhere, strict=True)
        ]
        return (torch.stack(terms) * share).sum()

    def _due(self) -> float | None:
        """Progress of the pruning that is due behind this step, if one is."""
        if self.options.sparsity is None:
            return None
        last = self.clock.steps - 1
        begin, end = (min(last, round(share * self.clock.steps)) for share in (self.options.begin, self.options.end))
        return pruning_step(self.clock.step, begin, end, self.options.interval)

    def _looking(self, batch: Batch) -> AbstractContextManager[Any]:
        """Sums what comes into the layers during this step's forward passes, where a pruning behind it wants that."""
        if self._due() is None or self.options.criterion == "magnitude":
            return nullcontext()
        if self._seen is None or self._seen[0] != self.clock.step:
            layers = {path: self.student.get_submodule(path) for path in self.paths}
            self._seen = self.clock.step, InputStatistics(layers, squares=self.options.criterion == "wanda")
        statistics = self._seen[1]
        statistics.mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        return statistics

    @torch.no_grad()
    def _narrow(self, sparsity: float) -> None:
        """Takes the least salient weights out of the masks; what is out stays out."""
        scores = {path: self._scores(path) for path in self.paths}
        scope = self.options.scope
        if scope == "global":
            keep = keep_globally(scores, sparsity)
        else:
            keep = {path: keep_largest(score, sparsity, scope) for path, score in scores.items()}
        for path, kept in keep.items():
            self.masks.narrow(f"{path}.weight", from_matrices(self.student.get_submodule(path), kept))
        self._seen = None

    def _scores(self, path: str) -> Tensor:
        """Saliencies of a layer's matrices; what is masked comes before everything else."""
        layer, name = self.student.get_submodule(path), f"{path}.weight"
        products = self._seen[1].found[path].products if self._seen is not None else None
        products = None if products is None else gather(products[None]).sum(0)
        scores = saliency(self.options.criterion, as_matrices(layer, whole(layer.get_parameter("weight"))), products)
        return torch.where(as_matrices(layer, self.masks[name]).to(scores.device), scores, -torch.ones_like(scores))

    def _mask_gradients(self) -> None:
        """Hooks the student's weights once; a copy of this method has weights of its own, without hooks."""
        if not self.options.mask_gradients:
            return
        if any(isinstance(self.student.get_parameter(name), DTensor) for name in self.masks.names):
            raise IncompatibleError(
                "gradients of sharded weights pass no hooks", "leave out mask_gradients, or launch without FSDP"
            )
        if self._masked != id(self.student):
            self.masks.mask_gradients(self.student)
            self._masked = id(self.student)
