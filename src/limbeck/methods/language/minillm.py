"""MiniLLM: reverse KL over whole sequences by policy gradient (Gu et al., 2023)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.answers import has_second_text, second_text
from limbeck.language.generation import prompts_of
from limbeck.language.mixed import generate_mixed
from limbeck.language.predictions import TokenReader, kept_labels
from limbeck.language.rollout import PolicyGradient, Rollout, by_item, filled_places, known_teacher, settled, spoken_by
from limbeck.language.sampler import PromptOptions, end_of, known_to, room_for, writer_of
from limbeck.methods.language.token_method import Terms, token_losses
from limbeck.objectives.divergences import divergence
from limbeck.objectives.sequence import (
    advantages,
    importance_weights,
    reverse_kl_k3,
    single_step,
    token_rewards,
    whiten,
)


@register
class MiniLLM(Method):
    r"""The student writes, and is drawn to what the teacher finds likelier than it does itself, over whole texts.

    .. math:: \nabla \mathrm{KL}(q\|p) = -\mathbb{E}_{y \sim q} \sum_t R_t \nabla \log q(y_t|y_{<t}), \qquad
        R_t = \sum_{i \ge t} \gamma^{i-t} \log\frac{p(y_i|y_{<i})}{q(y_i|y_{<i})}

    made steady in four ways. A token's own reward is taken out of the return and its expectation computed exactly, as
    reverse KL of the next-token distributions (`single_step`). Texts are drawn from
    :math:`\alpha p + (1-\alpha) q` and weighted by :math:`w_t = q/(\alpha p + (1-\alpha) q)`, one step's ratio for the
    product of all. Returns are divided by the tokens that are left, and whitened. And each rollout serves `ppo_epochs`
    times under the clipped surrogate :math:`\max(-R_t \rho_t w_t, -R_t\,\mathrm{clip}(\rho_t w_t, 1 \pm \epsilon))`,
    :math:`\rho_t = q/q_{old}`. All terms are means over tokens. Where a batch brings a pretraining text
    (`pretraining_input_ids` and so on), `lm_weight` · ((1 - `kd_ratio`) CE + `kd_ratio` KL(p‖q)) on it is added.

    Whitening couples the items of a batch: under gradient accumulation, and on each rank, every micro-batch writes and
    whitens for itself. A step is one rollout of its batch and takes `ppo_epochs` · `minibatches` optimizer steps.
    """

    card = Card(
        slug="minillm",
        title="MiniLLM: Knowledge Distillation of Large Language Models",
        arxiv="2306.08543",
        year=2023,
        family="language",
        task="language-modelling",
        needs=("teacher", "student", "prompts"),
        use="For instruction following, where fluent but wrong text is worse than a narrow repertoire.",
        couples_batch=True,
        tiny={"max_new_tokens": 4, "prompt_tokens": 2, "ppo_epochs": 2, "minibatches": 2},
    )

    class Options(PromptOptions):
        """How texts are drawn, what comes of them is worth, and how often they are learnt from."""

        alpha: float = Field(0.2, ge=0, lt=1, description="the teacher's share in what texts are drawn from")
        gamma: float = Field(0.95, ge=0, le=1, description="discount of a reward for each token that it lies ahead")
        normalise_length: bool = Field(True, description="divide returns by the number of tokens that are left")
        whiten: bool = Field(True, description="shift and scale the returns of a batch to mean 0 and variance 1")
        reward_scale: float = Field(1.0, gt=0, le=1e6, description="rewards are divided by this")
        reward_limit: float | None = Field(None, gt=0, le=1e6, description="rewards are cut at plus and minus this")
        single_step: bool = Field(True, description="a token's own reward by its exact expectation, not by sampling")
        clip_range: float = Field(0.2, gt=0, lt=1, description="the paper's epsilon: bounds of the surrogate's ratio")
        ppo_epochs: int = Field(4, ge=1, le=1000, description="how often each rollout is learnt from")
        minibatches: int = Field(
            1, ge=1, le=1000, description="parts of a rollout, each with a step of its own; at most one an item"
        )
        lm_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the pretraining text, where there is one")
        kd_ratio: float = Field(0.5, ge=0, le=1, description="share of forward KL on it; the rest is cross-entropy")
        compat: Literal["official", "trl"] | None = Field(
            None,
            description="quirks: `official` (a token's own reward counts twice, padding is whitened too, rewards are "
            "doubled and cut at 100), `trl` (TRL's discount by absolute position, and its way to count what is left)",
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.read_student = TokenReader(student, data.example)

    def step(self, batch: Batch) -> Iterator[Update]:
        rollout, reverse_kl = self.roll_out(batch)
        parts = min(self.options.minibatches, batch.size)
        for _ in range(self.options.ppo_epochs):
            for rows in torch.randperm(batch.size).tensor_split(parts):
                yield self.improve(rollout.select(rows), batch.select(rows), reverse_kl)

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> tuple[Rollout, Tensor]:
        """Texts that both models write after the batch's prompts, and their reverse KL as far as the tokens tell."""
        assert self.teacher is not None
        options = self.options
        writers = self.student, writer_of(self.teacher)
        prompts = prompts_of(batch, options.prompt_tokens)
        most = room_for(prompts, options.max_new_tokens, writers)
        text = generate_mixed(*writers, prompts, share=options.alpha, max_new_tokens=most, eos=end_of(self.data))
        text = known_to(text, writers)
        teacher = known_teacher(self.teacher.tokens(text))
        spoken = spoken_by(settled(self.read_student, text), teacher, kept_labels(text), options.alpha)
        weights = importance_weights(spoken.student, spoken.sampler)
        returns = self.returns(spoken.teacher, spoken.student, filled_places(text))
        reverse_kl = reverse_kl_k3(spoken.teacher - spoken.student).mean()
        return Rollout(text, teacher, spoken.student, returns, weights), reverse_kl

    def returns(self, teacher_log_probs: Tensor, student_log_probs: Tensor, filled: Tensor) -> Tensor:
        """What came of each token (tokens,), from the log-probabilities of the tokens; `filled` tells them apart."""
        options, official = self.options, self.options.compat == "official"
        scale, limit = (0.5, 100.0) if official else (options.reward_scale, options.reward_limit)
        rewards = token_rewards(teacher_log_probs, student_log_probs, scale=scale, limit=limit)
        values = advantages(
            by_item(rewards, filled),
            filled,
            gamma=options.gamma,
            normalise_length=options.normalise_length,
            include_current=official or not options.single_step,
            compat="trl" if options.compat == "trl" else None,
        )
        if options.whiten:
            values = whiten(values, None if official else filled)
        return values[filled]

    def improve(self, rollout: Rollout, batch: Batch, reverse_kl: Tensor) -> Update:
        """One step along the surrogate of some texts of a rollout."""
        options, tokens = self.options, kept_labels(rollout.text)
        gradient = PolicyGradient(rollout, tokens, options.clip_range, options.single_step)
        loss = token_losses(
            self.read_student(rollout.text),
            gradient,
            lambda ours, theirs, _: single_step(ours, theirs),
            tokens,
            Terms(),
        ).total
        logs = {"surrogate": loss.detach(), "reverse_kl": reverse_kl}
        if options.lm_weight and has_second_text(batch, "pretraining_"):
            logs["pretraining"] = (extra := self.pretraining_loss(batch)).detach()
            loss = loss + options.lm_weight * extra
        return Update("student", loss, len(tokens), logs)

    def pretraining_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy and forward KL on the pretraining text that a batch brings along."""
        assert self.teacher is not None
        text, ratio = second_text(batch, "pretraining_"), self.options.kd_ratio
        teacher = self.teacher.tokens(text)
        terms = Terms(weight=ratio, label_weight=1 - ratio)
        return token_losses(self.read_student(text), teacher, divergence("forward-kl"), kept_labels(text), terms).total
