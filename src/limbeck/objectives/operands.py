"""What every objective does to its operands: promote the precision, check the shapes, pool maps to one size."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Reduction = Literal["batchmean", "numel"]
"""``batchmean`` sums over the classes and averages over the batch; ``numel`` averages over both."""

P = ParamSpec("P")
R = TypeVar("R")


def promote(value: object) -> object:
    """Cast a half-precision tensor to float32 and return anything else (float64 too) unchanged.

    Args:
        value: any argument of an objective.

    Returns:
        The value, with float16 and bfloat16 tensors as float32; gradients flow back through the cast.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4:
        return value.float()
    return value


def full_precision(objective: Callable[P, R]) -> Callable[P, R]:
    """Make an objective compute in float32 or better, whatever precision its caller works in.

    Promotes the tensors among the arguments and switches autocast off inside, because autocast would send the matrix
    products of float32 tensors back to half precision.

    Args:
        objective: a function of tensors.

    Returns:
        The function with the same signature.
    """

    @functools.wraps(objective)
    def promoted(*args: P.args, **kwargs: P.kwargs) -> R:
        with _no_autocast((*args, *kwargs.values())):
            return objective(*map(promote, args), **{name: promote(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return promoted


def _no_autocast(values: tuple[object, ...]) -> AbstractContextManager:
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    # Asked first because entering the context costs more than a small loss.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that no softmax can be divided by.

    Args:
        temperature: dimensionless, above 0.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: 1 leaves the logits as they are")


def check_same_shape(student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Refuse operands that cannot be compared entry by entry.

    Args:
        student: the student's operand, any shape.
        teacher: the teacher's operand.
        remedy: what the caller can do about it, the end of the message.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape: {remedy}")


def check_same_batch(student: Tensor, teacher: Tensor, *, at_least: int = 1) -> None:
    """Refuse operands that do not describe the same samples.

    Args:
        student: the student's operand, samples first.
        teacher: the teacher's operand, samples first.
        at_least: how many samples the objective needs.

    Raises:
        ValueError: if the numbers of samples differ or are too small.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} samples, teacher {len(teacher)}: pass outputs of one batch")
    if len(student) < at_least:
        raise ValueError(f"got {len(student)} samples, at least {at_least} are needed: use a larger batch")


def pool_to_smaller(
    student_features: Float[Tensor, "batch student_channels student_height student_width"],
    teacher_features: Float[Tensor, "batch teacher_channels teacher_height teacher_width"],
) -> tuple[
    Float[Tensor, "batch student_channels height width"],
    Float[Tensor, "batch teacher_channels height width"],
]:
    """Bring two feature maps to one size by adaptive average pooling of the larger to the smaller.

    Args:
        student_features: maps of the student (batch, channels, height, width).
        teacher_features: maps of the teacher; channels, height and width may differ from the student's.

    Returns:
        Both maps at the smaller height and the smaller width.
    """
    size = (
        min(student_features.shape[2], teacher_features.shape[2]),
        min(student_features.shape[3], teacher_features.shape[3]),
    )
    return _pool(student_features, size), _pool(teacher_features, size)


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)
