"""DistiLLM: skew divergences on as much of the student's own text as it needs (Ko et al., 2024)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.answers import has_second_text, second_text
from limbeck.language.predictions import kept_labels
from limbeck.language.rollout import settled
from limbeck.language.sampler import Adaptive, Mixture, OnPolicySampler, Policy, Replaying, WritingOptions
from limbeck.methods.language.token_method import Terms, TokenMethod, next_token_loss
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.tokens import IGNORED_LABEL
from limbeck.objectives.topk import TopKDivergence, topk_divergence

NAMES = {"forward": "skew-kl", "reverse": "skew-reverse-kl"}
"""Rows of the table of f-divergences."""


@register
class DistiLLM(TokenMethod):
    r"""A skew divergence on given text and, from a replay buffer, on ever more text of the student's own.

    .. math:: L = (1-r)\,\mathrm{CE} + r\,\mathrm{KL}\big(p \,\|\, \alpha p + (1-\alpha) q\big)
        \quad\text{or}\quad r\,\mathrm{KL}\big(q \,\|\, (1-\alpha) p + \alpha q\big)

    the mean over tokens, plus `lm_weight` times the cross-entropy with a pretraining text where the batch brings one
    (`pretraining_input_ids` and so on). A batch is the student's own with probability :math:`\phi`: newly written with
    a share of it that falls with progress (`replay_ratio`), else drawn from the last `capacity` of its texts. Once an
    epoch :math:`\phi \leftarrow \min(\phi + 0.1, 1)` if the loss on held-out text has risen by 0.1 since it last did.

    A method sees training data alone, so it holds out a share of them by item number: these are never trained on, and
    their cross-entropy, the mean over the period as they come by, is the held-out loss. The first one is the one that
    later ones are compared with; the original measures it before training.

    Draws and buffer couple the items of a batch: under gradient accumulation, and on each rank, every micro-batch draws
    and writes for itself, and reads what those before it wrote.
    """

    card = Card(
        slug="distillm",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        arxiv="2402.03898",
        year=2024,
        family="language",
        task="language-modelling",
        needs=("teacher", "student", "prompts", "index"),
        use="On-policy distillation at a fraction of its cost, on instruction data of a few epochs.",
        couples_batch=True,
        tiny={
            "max_new_tokens": 4,
            "prompt_tokens": 2,
            "capacity": 8,
            "threshold": 0.6,
            "held_out": 0.2,
            "validate_every": 0.3,
        },
    )

    class Options(WritingOptions):
        """The divergence, who writes when, and what is held out."""

        sampling: Literal["adaptive", "mixed", "on-policy", "off"] = Field(
            "adaptive", description="by held-out loss; or a fixed share replayed, or newly written; or given text only"
        )
        threshold: float = Field(0.0, ge=0, le=1, description="phi of `adaptive` at the start")
        replay_ratio: Literal["decreasing", "constant", "increasing"] = Field(
            "decreasing", description="how the newly written share of the student's text goes with progress"
        )
        mixed_alpha: float = Field(0.5, ge=0, le=1, description="share of student-written batches if not `adaptive`")
        capacity: int = Field(1000, ge=1, le=1 << 24, description="texts in the replay buffer")
        held_out: float = Field(0.05, ge=0, le=0.5, description="share of the items for the held-out loss")
        validate_every: float = Field(1.0, gt=0, le=1e6, description="epochs between two looks at the held-out loss")
        tolerance: float = Field(0.1, ge=0, le=1e6, description="how much the held-out loss must rise, in nats")
        alpha: float = Field(0.1, ge=0, le=1, description="skew: share of the first distribution in the mixture")
        direction: Literal["forward", "reverse"] = Field(
            "forward", description="whether the teacher or the student is the first distribution"
        )
        kd_ratio: float = Field(1.0, ge=0, le=1, description="r, weight of the divergence; the rest is cross-entropy's")
        lm_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the pretraining text, where there is one")

    held_out_loss: Tensor
    validations: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.adaptive = Adaptive(self.options.threshold, self.options.replay_ratio, tolerance=self.options.tolerance)
        share, sampling = self.options.mixed_alpha, self.options.sampling
        others: dict[str, Policy] = {"mixed": Replaying(share), "on-policy": Mixture(share), "off": Mixture(0.0)}
        policy: Policy = others.get(sampling, self.adaptive)
        kept = self.options.capacity if sampling in ("adaptive", "mixed") else 0
        self.sampler = OnPolicySampler(policy, self.options, data, kept)
        # Nothing is held out where nothing depends on it.
        self.every = round(1 / self.options.held_out) if sampling == "adaptive" and self.options.held_out else 0
        if self.every and "index" not in data.example:
            raise IncompatibleError("the data do not number their items", "add the tensor index, or set held_out: 0")
        self.register_buffer("held_out_loss", torch.zeros(2))  # sum, tokens
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64))

    def terms(self) -> Terms:
        return Terms(self.options.kd_ratio, 1 - self.options.kd_ratio)

    def divergence(self) -> LogitDivergence:
        return divergence(NAMES[self.options.direction], alpha=self.options.alpha)

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence(NAMES[self.options.direction], "bucket", alpha=self.options.alpha)

    def step(self, batch: Batch) -> Iterator[Update]:
        trained = self.hold_out(batch) if self.every else batch
        if trained.size:
            text = self.sampler(self.student, self.teacher, trained, self.clock.progress)
        else:  # a micro-batch of held-out items alone adds nothing, but takes its turn
            text = batch.replace(labels=torch.full_like(batch["labels"], IGNORED_LABEL))
        update = self.with_pretraining(self.match(text), batch)
        yield replace(update, logs={**update.logs, "threshold": self.adaptive.threshold.clone()})

    @torch.no_grad()
    def hold_out(self, batch: Batch) -> Batch:
        """Measures the loss on the held-out items of a batch and returns the others; at a period's end moves phi."""
        if self.clock.epoch >= self.options.validate_every * (int(self.validations) + 1):
            total, tokens = gather(self.held_out_loss[None]).sum(0)
            if tokens > 0:
                self.adaptive.observe(total / tokens)
            self.held_out_loss.zero_()
            self.validations += 1
        held = batch["index"] % self.every == self.every - 1
        if held.any():
            self.held_out_loss += self.measure(batch.select(held))
        return batch.select(~held)

    def measure(self, batch: Batch) -> Tensor:
        """Cross-entropy of the student, without dropout, and how many tokens it is summed over (2,)."""
        labels = kept_labels(batch, self.read_student.shift)
        loss = next_token_loss(settled(self.read_student, batch), labels)
        return torch.stack([loss * len(labels), loss.new_tensor(len(labels))])

    def with_pretraining(self, update: Update, batch: Batch) -> Update:
        """The update with the cross-entropy of the pretraining text that a batch brings along."""
        if not (self.options.lm_weight and has_second_text(batch, "pretraining_")):
            return update
        text = second_text(batch, "pretraining_")
        loss = next_token_loss(self.read_student(text), kept_labels(text, self.read_student.shift))
        logs = {**update.logs, "pretraining": loss.detach()}
        return replace(update, loss=update.loss + self.options.lm_weight * loss, logs=logs)
