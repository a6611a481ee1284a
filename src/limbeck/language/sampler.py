"""On-policy text: who writes the continuations that a student learns from, and when."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.language.generation import Prompts, generate, prompts_of
from limbeck.language.replay import RememberedResponses, ReplayBuffer, text_batch

Author = Literal["data", "student", "teacher", "replay", "student into replay"]
"""Whose continuations a batch gets: the data's own, freshly written ones, or earlier ones of the student."""

Policy = Callable[[float, bool], Author]
"""(progress in [0, 1], whether the replay buffer is full) -> the author of this batch."""


class PromptOptions(OptionsBase):
    """What is continued, and how far."""

    max_new_tokens: int = Field(
        128, ge=1, le=1 << 20, description="most tokens of a continuation; fewer where a model has no positions left"
    )
    prompt_tokens: int = Field(
        16, ge=1, le=1 << 20, description="least tokens of a prompt: all of it in text that has none of its own"
    )


class WritingOptions(PromptOptions):
    """How continuations are written."""

    sampling_temperature: float = Field(
        1.0, ge=0, le=1000, description="of the distribution that continuations are drawn from; 0 is greedy"
    )
    top_k: int | None = Field(None, ge=1, le=1 << 24, description="draw from so many of the most probable tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the top tokens that reach this probability")


class Mixture:
    """GKD's policy: the student with probability `share`, another author otherwise; one draw a batch.

    Args:
        share: the paper's lambda, in [0, 1].
        otherwise: who writes the other batches.
    """

    def __init__(self, share: float, otherwise: Author = "data") -> None:
        self.share, self.otherwise = share, otherwise

    def __call__(self, progress: float, full: bool) -> Author:
        return "student" if random.random() < self.share else self.otherwise


class Replaying:
    """DistiLLM's policy without adaptation: with probability `share` the student writes and an earlier text is taken.

    Args:
        share: the paper's alpha of `mixed` sampling, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, progress: float, full: bool) -> Author:
        return "student into replay" if random.random() < self.share else "data"


class Adaptive(nn.Module):
    """DistiLLM's policy: as much of the student's own text as its loss on held-out text asks for.

    The student's text is used with probability `threshold`, newly written with a share of it that `schedule` sets (and
    as long as the buffer is not full), otherwise from the buffer.

    Args:
        threshold: the paper's phi at the start, in [0, 1].
        schedule: the share of new text falls with progress, is a half, or rises with it.
        increment: how much `threshold` rises when the held-out loss does.
        tolerance: how much more the loss has to be.
    """

    threshold: Tensor
    reference: Tensor
    seen: Tensor

    def __init__(
        self,
        threshold: float = 0.0,
        schedule: Literal["decreasing", "constant", "increasing"] = "decreasing",
        increment: float = 0.1,
        tolerance: float = 0.1,
    ) -> None:
        super().__init__()
        self.schedule, self.increment, self.tolerance = schedule, increment, tolerance
        self.register_buffer("threshold", torch.tensor(threshold))
        self.register_buffer("reference", torch.zeros(()))  # the loss that the next one is compared with
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, progress: float, full: bool) -> Author:
        """The author of a batch."""
        share = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.schedule]
        draw, threshold = random.random(), float(self.threshold)
        if draw < threshold * share or (draw < threshold and not full):
            return "student"
        return "replay" if draw < threshold else "data"

    def observe(self, loss: Tensor) -> None:
        """Raises the threshold where the held-out loss (a scalar) has risen; the first one is only remembered."""
        first = self.seen == 0
        risen = ~first & (loss >= self.reference + self.tolerance)
        self.threshold.copy_(torch.where(risen, (self.threshold + self.increment).clamp_max(1.0), self.threshold))
        self.reference.copy_(torch.where(first | risen, loss, self.reference))
        self.seen += 1


class OnPolicySampler(nn.Module):
    """Gives a batch the continuations of the author that its policy names.

    Randomness comes from the streams of Python and torch, which the trainer seeds at each step; under accumulation
    each micro-batch draws and writes for itself. What is written carries no item numbers: a cached teacher, which
    knows the data's own text alone, refuses it instead of answering for another text.

    Args:
        policy: names the author of each batch.
        writing: how continuations are written.
        data: for the end token and the longest text.
        buffer: texts to keep, for policies that replay; 0 keeps none.
    """

    def __init__(self, policy: Policy, writing: WritingOptions, data: DataInfo, buffer: int = 0) -> None:
        super().__init__()
        self.policy, self.writing, self.data = policy, writing, data
        length = data.example["input_ids"].shape[1] + writing.max_new_tokens
        self.buffer = ReplayBuffer(buffer, length) if buffer else None

    def forward(self, student: nn.Module, teacher: Teacher | None, batch: Batch, progress: float = 0.0) -> Batch:
        """The batch as it is, or its prompts with other continuations; see `generate` for the fields then."""
        author = self.policy(progress, self.buffer is not None and self.buffer.full)
        if author == "data":
            return batch
        if author == "replay":
            assert self.buffer is not None
            return self.buffer.draw(batch.size)
        writer = writer_of(teacher) if author == "teacher" else student
        texts = write(writer, batch, self.writing, self.data, readers(student, teacher))
        if author == "teacher" or self.buffer is None:
            return texts
        self.buffer.push(texts)
        return self.buffer.draw(batch.size) if author == "student into replay" else texts


class TeacherTexts(nn.Module):
    """The teacher's continuation of every item's prompt, written once and remembered.

    Args:
        writing: how it is written.
        data: for the number of items and the end token.
    """

    def __init__(self, writing: WritingOptions, data: DataInfo) -> None:
        super().__init__()
        self.writing, self.data = writing, data
        if "index" not in data.example:
            raise IncompatibleError("the data do not number their items", "add the tensor index to the batches")
        self.responses = RememberedResponses(data.items, writing.max_new_tokens)

    def forward(self, student: nn.Module, teacher: Teacher | None, batch: Batch) -> Batch:
        """The batch's prompts with the teacher's continuations; see `generate` for the fields."""
        rows = self.responses.missing(batch["index"])
        if len(rows):
            both = readers(student, teacher)
            texts = write(writer_of(teacher), batch.select(rows), self.writing, self.data, both)
            self.responses.store(batch["index"][rows], texts)
        return self.responses.recall(batch["index"], prompts_of(batch, self.writing.prompt_tokens))


def write(
    model: nn.Module, batch: Batch, writing: WritingOptions, data: DataInfo, readers: Sequence[nn.Module]
) -> Batch:
    """What a model writes after the prompts of a batch, as far as all `readers` can read it; see `generate`."""
    prompts = prompts_of(batch, writing.prompt_tokens)
    texts = generate(
        model,
        prompts,
        max_new_tokens=room_for(prompts, writing.max_new_tokens, readers),
        temperature=writing.sampling_temperature,
        top_k=writing.top_k,
        top_p=writing.top_p,
        num_beams=getattr(writing, "beams", 1),
        eos=end_of(data),
    )
    return known_to(texts.to(batch["input_ids"].device), readers)


def readers(student: nn.Module, teacher: Teacher | None) -> list[nn.Module]:
    """The models that will have to read a text."""
    return [student, teacher.model] if isinstance(teacher, LiveTeacher) else [student]


def room_for(prompts: Prompts, most: int, readers: Sequence[nn.Module]) -> int:
    """How many tokens, from 1 to `most`, all models still have positions for after the longest prompt."""
    places = [getattr(getattr(model, "config", None), "max_position_embeddings", None) for model in readers]
    room = min((count for count in places if count), default=1 << 62) - prompts.input_ids.shape[1]
    return max(1, min(most, room))


def end_of(data: DataInfo) -> int | None:
    """The token that ends a text by the data's tokenizer; None leaves it to the model."""
    return getattr(getattr(data.text, "tokenizer", None), "eos_token_id", None)


def writer_of(teacher: Teacher | None) -> nn.Module:
    """The model behind a teacher that is to write text.

    Raises:
        IncompatibleError: the teacher is not one live model.
    """
    if isinstance(teacher, LiveTeacher):
        return teacher.model
    raise IncompatibleError(
        f"a {type(teacher).__name__} writes no text, and this method learns from what its teacher writes",
        "take one live teacher",
    )


def known_to(texts: Batch, readers: Sequence[nn.Module]) -> Batch:
    """Texts cut before the first token that a vocabulary lacks: checkpoints pad theirs to different lengths."""
    found: list[Any] = [getattr(model, "get_input_embeddings", lambda: None)() for model in readers]
    sizes = [embeddings.num_embeddings for embeddings in found if hasattr(embeddings, "num_embeddings")]
    unknown = texts["input_ids"] >= min(sizes, default=1 << 62)
    if not unknown.any():
        return texts
    ends = texts["prompt_length"] + texts["response_length"]
    ends = torch.where(unknown.any(1), unknown.int().argmax(1).minimum(ends), ends)
    return text_batch(texts["input_ids"], texts["prompt_length"], ends)
