"""TAID: a target between the student's own prediction and the teacher's, and the clock that moves it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.divergences import cross_entropy_from_log_probs, log_probabilities
from limbeck.objectives.operands import full_precision
from limbeck.objectives.vocabulary import match_vocabulary


@full_precision
def interpolated_log_probs(
    student_logits: Float[Tensor, "*items vocab"],
    teacher_logits: Float[Tensor, "*items vocab"],
    time: float | Float[Tensor, ""],
) -> Float[Tensor, "*items vocab"]:
    """log softmax((1 - time) student + time teacher), without a gradient: 0 is the student, 1 the teacher.

    The logits are mixed, not the probabilities. An entry at -inf on a side with weight stays -inf.
    """
    student, teacher = student_logits.detach(), teacher_logits.detach()
    time = torch.as_tensor(time, device=student.device)
    absent = (torch.isneginf(student) & (time < 1)) | (torch.isneginf(teacher) & (time > 0))
    # 0 * -inf is NaN, hence 0 there first.
    student, teacher = (side.masked_fill(torch.isneginf(side), 0.0) for side in (student, teacher))
    return log_probabilities(((1 - time) * student + time * teacher).masked_fill(absent, -math.inf))


def interpolated_cross_entropy(
    student_logits: Float[Tensor, "*items student_vocab"],
    teacher_logits: Float[Tensor, "*items teacher_vocab"],
    time: float | Float[Tensor, ""],
) -> Float[Tensor, "*items"]:
    """Cross-entropy in nats of the student with TAID's target at ``time`` in [0, 1]; gradient q - target, 0 at time 0.

    Source: Shing et al., *TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models*, ICLR 2025, arXiv 2501.16937.
    """
    student_logits, teacher_logits = match_vocabulary(student_logits, teacher_logits)
    target = interpolated_log_probs(student_logits, teacher_logits, time)
    return cross_entropy_from_log_probs(log_probabilities(student_logits), target)


@dataclass(frozen=True)
class Clock:
    """The state of TAID's clock: 0-d tensors, so that nothing waits for the device.

    Attributes:
        time: the interpolation time t, from the start time to the end time.
        momentum: running mean of the relative fall of the loss.
        previous_loss: the last loss; NaN before the first.
        increment: the last proposed step of ``time`` (for logs); NaN before the second loss.
    """

    time: Float[Tensor, ""]
    momentum: Float[Tensor, ""]
    previous_loss: Float[Tensor, ""]
    increment: Float[Tensor, ""]


def start_clock(start: float = 0.4, device: torch.device | str = "cpu") -> Clock:
    """A clock that has seen no loss; ``start`` is in [0, 1] (0.4 and 0.2 in the paper's runs)."""
    values = (start, 0.0, math.nan, math.nan)
    return Clock(*(torch.tensor(value, dtype=torch.float32, device=device) for value in values))


def advance_clock(
    clock: Clock,
    loss: Float[Tensor, ""],
    progress: float,
    *,
    start: float = 0.4,
    end: float = 1.0,
    speed: float = 5e-4,
    momentum: float = 0.99,
    adaptive: bool = True,
) -> Clock:
    """The clock after one optimizer step with this loss: never behind the linear one, and faster while the loss falls.

    ``progress`` is step / total steps in [0, 1]. ``speed`` is the paper's alpha, ``momentum`` its beta. The first
    loss is only remembered. Over ranks and micro-batches pass the mean loss, once per optimizer step.

    Source: as :func:`interpolated_cross_entropy`.
    """
    loss = loss.detach().float()
    fall = (clock.previous_loss - loss) / (clock.previous_loss + 1e-15)
    average = momentum * clock.momentum + (1 - momentum) * fall
    increment = speed * torch.sigmoid(average) * (1 - clock.time)
    linear = torch.full_like(clock.time, start + (end - start) * progress)
    time = torch.maximum(linear, clock.time + increment).clamp_max(end) if adaptive else linear
    first = clock.previous_loss.isnan()
    return Clock(
        time=torch.where(first, clock.time, time),
        momentum=torch.where(first, clock.momentum, average),
        previous_loss=loss,
        increment=increment,
    )
