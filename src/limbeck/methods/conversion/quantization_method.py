"""Parent of the methods that give a student weights of a few bits."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from limbeck.compression.buckets import Scaling
from limbeck.compression.quantized import QuantizedStateDict
from limbeck.compression.storage import code_sizes, compact
from limbeck.compression.weights import chosen_weights, run_with
from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import Teacher
from limbeck.methods.classic.logit_method import check_same_classes
from limbeck.objectives.divergences import entropy
from limbeck.objectives.logits import kd


class QuantizationMethod(Method):
    r"""Distillation with quantised weights in the forward pass.

    .. math:: L = \frac1B \sum_b \begin{cases}
        (1 - \lambda)\,\mathrm{CE}_b + \lambda\,T^2\,\mathrm{KL}_b & \text{where the teacher is asked} \\
        \mathrm{CE}_b & \text{elsewhere} \end{cases}

    Subclasses say what the weights are: `quantized_weights`, with a gradient, and `quantized_state`, for keeps.
    """

    class Options(OptionsBase):
        """Loss, and which weights are quantised how; defaults of the published code."""

        distillation_weight: float = Field(0.7, ge=0, le=1, description="the paper's lambda; the labels get the rest")
        temperature: float = Field(2.0, gt=0, le=1000, description="softens both distributions")
        compat: bool = Field(
            False, description="divide the divergence by the number of classes too, as the published code does"
        )
        ask: Literal["always", "entropy", "random", "misclassified"] = Field(
            "always",
            description="items the teacher is asked about: all; those on which the student's entropy exceeds the "
            "cut-off; at random, with the entropy as a share of its largest as probability; those it gets wrong",
        )
        entropy_cutoff: float = Field(0.5, ge=0, le=20, description="nats; for ask: entropy")
        bucket: int | None = Field(256, ge=1, le=1 << 40, description="weights that share a scale; null: the tensor")
        scaling: Scaling = Field("linear", description="linear between extremes; absmax, absnorm: signs kept aside")
        matrices_only: bool = Field(False, description="leave biases and norms in floating point")
        first_and_last: bool = Field(True, description="quantise the first and the last layer too")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        chosen = chosen_weights(
            student, matrices_only=self.options.matrices_only, first_and_last=self.options.first_and_last
        )
        if not chosen:
            raise IncompatibleError(
                "nothing of the student would be quantised", "set first_and_last: true and matrices_only: false"
            )
        self.names = list(chosen)

    def quantized_weights(self) -> dict[str, Tensor]:
        """Weights of the forward pass by name, with a gradient for what is trained."""
        raise NotImplementedError

    def quantized_state(self) -> QuantizedStateDict:
        """The quantised weights as they stand."""
        raise NotImplementedError

    def chosen(self) -> dict[str, nn.Parameter]:
        """The student's parameters that are quantised.

        Raises:
            IncompatibleError: they are spread over ranks, so that no rank sees whole buckets.
        """
        own = dict(self.student.named_parameters())
        if any(isinstance(own[name], DTensor) for name in self.names):
            raise IncompatibleError("buckets of weights cannot be sharded", "launch without FSDP")
        return {name: own[name] for name in self.names}

    def update(self, player: str, batch: Batch, weights: Mapping[str, Tensor]) -> Update:
        """The loss of the student with these weights."""
        always = self.options.ask == "always" and self.options.distillation_weight > 0
        told = self._ask(batch) if always else None  # before the student runs: their peaks of memory do not add up
        logits = run_with(self.student, weights, lambda network: logits_of(call(network, batch)))
        asked = torch.arange(batch.size, device=logits.device) if always else self._uncertain(logits.detach(), batch)
        if told is None and len(asked):
            told = self._ask(batch.select(asked))
        labels = _cross_entropies(logits, batch)
        share = self.options.distillation_weight
        loss = labels.sum() / batch.size
        logs = {"cross_entropy": loss, "asked": loss.new_tensor(len(asked) / batch.size)}
        if told is not None:
            check_same_classes(logits[asked], told)
            reduction: Literal["numel", "batchmean"] = "numel" if self.options.compat else "batchmean"
            matched = kd(logits[asked], told, temperature=self.options.temperature, reduction=reduction)
            logs["objective"] = matched * (len(asked) / batch.size)
            loss = loss + share * (logs["objective"] - labels[asked].sum() / batch.size)
        return Update(player, loss, batch.size, logs)

    def result(self) -> nn.Module:
        """A copy of the student, made anew each time, whose weights are the quantised ones."""
        return self.quantized_state().fill(copy.deepcopy(self.student).requires_grad_(True))

    def figures(self) -> dict[str, Any]:
        """Bits a weight, and bytes: of the compact file, header and all, and of the same tensors in float32."""
        state, result = self.quantized_state(), self.result()
        whole = {tensor.data_ptr(): tensor.numel() for tensor in result.state_dict().values()}
        compact_bytes = len(save(*compact(state, result)))
        return code_sizes(state) | {"compact_bytes": compact_bytes, "float32_bytes": 4 * sum(whole.values())}

    def _ask(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        logits = self.teacher.signal(batch).logits
        if logits is None:
            raise IncompatibleError("the teacher gives no logits", "use a teacher with a classification head")
        return logits

    def _uncertain(self, logits: Tensor, batch: Batch) -> Tensor:
        """Rows of the items to ask the teacher about; those without a label are always asked about."""
        if self.options.distillation_weight == 0:
            return torch.zeros(0, dtype=torch.long, device=logits.device)
        unlabelled = batch["label"] < 0 if "label" in batch else torch.ones(len(logits), device=logits.device) > 0
        uncertainty = entropy(logits)
        if self.options.ask == "entropy":
            chosen = uncertainty > self.options.entropy_cutoff
        elif self.options.ask == "random":
            largest = torch.log(uncertainty.new_tensor(max(logits.shape[1], 2)))
            chosen = torch.rand_like(uncertainty) < uncertainty / largest
        else:
            chosen = logits.argmax(1) != batch.get("label", logits.argmax(1))
        return (chosen | unlabelled).nonzero()[:, 0]


def _cross_entropies(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each item with its label (items,), 0 where it has none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if "label" not in batch:
        return logits.new_zeros(len(logits))
    return functional.cross_entropy(logits, batch["label"], ignore_index=-100, reduction="none")
