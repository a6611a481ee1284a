"""Differentiable quantisation (Polino et al., 2018)."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from limbeck.compression.allocation import allocate
from limbeck.compression.points import LearnedPoints, fake_quantize_to_points, quantile_points, quantize_to_points
from limbeck.compression.quantized import QuantizedStateDict, even_points
from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.conversion.quantization_method import QuantizationMethod

_MOST_POINTS, _MOST_BITS = 256, 8


@register
class DifferentiableQuantization(QuantizationMethod):
    r"""The weights stay, and the levels to which they are rounded are learned.

    .. math:: w_{q,i} = \alpha_{B(i)}\,p_{a(i)} + \beta_{B(i)}, \quad a(i) = \arg\min_j |v_i - p_j|, \qquad
        \frac{\partial L}{\partial p_j} = \sum_{i:\,a(i) = j} \frac{\partial L}{\partial w_{q,i}}\,\alpha_{B(i)}

    with v the weights scaled to [0, 1] by bucket and k points p a tensor, sorted again after each step, and L the
    distillation loss with the unquantised model as teacher: `teacher: stage:NAME` and `student: stage:NAME` of the same
    stage. Running statistics of batch norms are estimated again with the quantised weights. A point's gradient is a sum
    over all weights, so rates are small: SGD with Nesterov momentum at 1e-5 to 1e-4. Where points change places, their
    momenta do not. The gradient does not see that weights change their nearest point, and the loss may rise for it: on
    small networks compare with the validation figures of the start.

    With `allocation: gradient-norm` the first steps train nothing: in them the tensors' gradients are measured, and the
    mean of their norms over these batches decides how many points each gets. Afterwards the points are begun anew.
    """

    card = Card(
        slug="differentiable-quantization",
        title="Model Compression via Distillation and Quantization (its differentiable quantisation)",
        arxiv="1802.05668",
        year=2018,
        family="conversion",
        task="classification",
        needs=("teacher", "student"),
        use="For quantising a trained network without touching its weights, at few levels.",
        tiny={"count": 4},
    )

    class Options(QuantizationMethod.Options):
        """How many points, where they begin, and who gets more."""

        count: int = Field(4, ge=1, le=256, description="points of a tensor, or bits of an index; see unit")
        unit: Literal["points", "bits"] = Field("points", description="what count is; bits: at most 8")
        start: Literal["quantiles", "uniform"] = Field("quantiles", description="where the points begin")
        allocation: Literal["even", "gradient-norm"] = Field(
            "even", description="the same for each tensor, or more where the loss depends more on it"
        )
        allocation_steps: int = Field(5, ge=1, le=1000, description="steps in which gradients are measured for it")

        @model_validator(mode="after")
        def _fits(self) -> "DifferentiableQuantization.Options":
            if self.unit == "bits" and self.count > _MOST_BITS:
                raise ValueError(f"count can be at most {_MOST_BITS} bits")
            least = 1 if self.unit == "bits" else 2
            if self.count < least * (2 if self.allocation == "gradient-norm" else 1):
                raise ValueError(
                    "count leaves a tensor with a single level; at least 2 bits or 4 points are shared out"
                )
            return self

    norms: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        count = self.options.count
        most = None
        if self.options.allocation == "gradient-norm":
            if data.classes == 0:
                raise IncompatibleError("gradients are measured on labels, and the data have none", "allocation: even")
            shares = [1.0, *[0.0] * (len(self.names) - 1)]
            most = self._levels(max(allocate(shares, count, self.options.unit)))
            self.register_buffer("norms", torch.zeros(len(self.names)))
        self.points = LearnedPoints(self._levels(count), len(self.names), most)
        self._begin([self._levels(count)] * len(self.names))

    def players(self) -> dict[str, nn.Module]:
        return {"points": self.points}

    def averaged(self) -> nn.Module:
        return self.points

    def step(self, batch: Batch) -> Iterator[Update]:
        if self._measuring():
            self.norms += gather(self._gradient_norms(batch)[None]).mean(0).to(self.norms)
            yield Update("points", torch.stack([points.sum() for points in self.points()]).sum() * 0, batch.size)
        else:
            yield self.update("points", batch, self.quantized_weights())

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        if not self._measuring():
            self.points.order()
        elif self.clock.step == self.options.allocation_steps - 1:
            shared = allocate([float(norm) for norm in self.norms], self.options.count, self.options.unit)
            self._begin([self._levels(count) for count in shared])

    def quantized_weights(self) -> dict[str, Tensor]:
        """Quantised weights by name; their gradient reaches the points, and no other parameter gets one."""
        fixed = {name: weights.detach() for name, weights in self.student.named_parameters()}
        for (name, weights), points in zip(self.chosen().items(), self.points(), strict=True):
            fixed[name] = fake_quantize_to_points(
                weights, points, bucket=self.options.bucket, scaling=self.options.scaling
            )
        return fixed

    def quantized_state(self) -> QuantizedStateDict:
        """The weights at their nearest points."""
        options = self.options
        quantized = {
            name: quantize_to_points(weights.detach(), points, bucket=options.bucket, scaling=options.scaling)
            for (name, weights), points in zip(self.chosen().items(), self.points(), strict=True)
        }
        return QuantizedStateDict(quantized)

    def _measuring(self) -> bool:
        return self.options.allocation == "gradient-norm" and self.clock.step < self.options.allocation_steps

    def _gradient_norms(self, batch: Batch) -> Tensor:
        """Norm of the cross-entropy's gradient with respect to each quantised tensor of the unquantised student."""
        weights = list(self.chosen().values())
        logits = logits_of(call(self.student, batch)).float()
        loss = functional.cross_entropy(logits, batch["label"], ignore_index=-100, reduction="sum") / batch.size
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return torch.stack([loss.new_zeros(()) if one is None else one.float().norm() for one in found])

    def _begin(self, levels: list[int]) -> None:
        options = self.options
        begun = [
            quantile_points(weights.detach(), count, bucket=options.bucket, scaling=options.scaling)
            if options.start == "quantiles"
            else even_points(count)
            for weights, count in zip(self.chosen().values(), levels, strict=True)
        ]
        self.points.begin(begun)

    def _levels(self, count: int) -> int:
        return min(_MOST_POINTS, 2**count if self.options.unit == "bits" else count)
