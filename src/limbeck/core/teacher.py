"""Teachers: frozen models behind one interface, outside every checkpoint, optimizer and parameter list."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps, match_modules

if TYPE_CHECKING:
    from limbeck.language.predictions import TokenReader, TokenSignal


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """What a teacher says about one batch.

    Attributes:
        logits: (items, classes), or None when the pass ended before the head.
        features: tapped outputs by module path, in the order in which they were asked for.
    """

    logits: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Teacher(Protocol):
    """Anything that can say something about a batch: live, cached, served, or several of these."""

    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """Logits, and the outputs of `layers` (module paths or globs), for every item of the batch."""
        ...

    def tokens(self, batch: Batch) -> "TokenSignal":
        """What the teacher predicts at each kept token of a text batch; see `limbeck.language.predictions`."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves whatever the teacher holds."""
        ...

    @property
    def fingerprint(self) -> str:
        """A content hash: equal for equal weights, different otherwise."""
        ...


class Renormalise:
    """Turns images normalised for the student into images normalised for the teacher.

    Args:
        source: per-channel (mean, std) that the data were normalised with.
        target: per-channel (mean, std) that the teacher expects.
    """

    def __init__(
        self, source: tuple[Sequence[float], Sequence[float]], target: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        (source_mean, source_std), (target_mean, target_std) = (map(torch.tensor, source), map(torch.tensor, target))
        self.scale = (source_std / target_std).view(-1, 1, 1)
        self.shift = ((source_mean - target_mean) / target_std).view(-1, 1, 1)

    def __call__(self, batch: Batch) -> Batch:
        image = batch["image"]
        return batch.replace(image=image * self.scale.to(image) + self.shift.to(image))


class LiveTeacher:
    """A frozen model, run in eval mode without recording a graph.

    Args:
        model: the teacher; it is put in eval mode and its parameters stop requiring gradients.
        adapt: what the batch goes through first, such as `Renormalise`.
        until_layers: end the pass at the last tapped layer when only features are asked for.
    """

    def __init__(
        self, model: nn.Module, adapt: Callable[[Batch], Batch] | None = None, until_layers: bool = False
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.adapt = adapt
        self.until_layers = until_layers
        self._paths: dict[tuple[str, ...], list[str]] = {}
        self._reader: TokenReader | None = None

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for a student's backward pass
    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """Logits (items, classes) and the outputs of `layers`; see `Teacher`."""
        if self.adapt is not None:
            batch = self.adapt(batch)
        if not layers:
            return TeacherSignal(logits_of(call(self.model, batch)))
        with Taps(self.model, self._resolve(layers), stop=self.until_layers) as taps:
            output = taps.run(batch)
            logits = None if output is None else logits_of(output)
            return TeacherSignal(logits, {path: taps[path] for path in taps.paths})

    @torch.no_grad()
    def tokens(self, batch: Batch) -> "TokenSignal":
        """Hidden states in front of the head where that is exact, logits otherwise, of the kept tokens alone."""
        if self._reader is None:
            from limbeck.language.predictions import TokenReader

            self._reader = TokenReader(self.model, batch.select(slice(0, 1)))
        return self._reader(batch).as_teacher()

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of all weights and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _resolve(self, layers: Sequence[str]) -> list[str]:
        key = tuple(layers)
        if key not in self._paths:  # matching globs walks the whole model: once, not at every step
            self._paths[key] = match_modules(self.model, layers)
        return self._paths[key]


class Ensemble:
    """Several teachers as one.

    Args:
        teachers: at least one.
        reduce: "mean_prob" averages the softmax probabilities and returns their logarithm as logits; "weighted" does
            so with `weights`; "random" lets one teacher, drawn anew for each batch, speak for all.
        weights: one non-negative number a teacher, for "weighted"; they are normalised.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        reduce: Literal["mean_prob", "weighted", "random"] = "mean_prob",
        weights: Sequence[float] | None = None,
    ) -> None:
        if not teachers:
            raise IncompatibleError("an ensemble needs at least one teacher")
        if (reduce == "weighted") != (weights is not None) or (weights and len(weights) != len(teachers)):
            raise IncompatibleError("reduce 'weighted' takes one weight a teacher, and no other takes weights")
        self.teachers, self.reduce = list(teachers), reduce
        self.weights = torch.tensor(weights or [1.0] * len(teachers))
        self.weights = self.weights / self.weights.sum()

    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """The combined logits; features only where one teacher speaks for all ("random")."""
        if self.reduce == "random":
            return self.teachers[int(torch.randint(len(self.teachers), ()))].signal(batch, layers)
        if layers:
            raise IncompatibleError("an ensemble's features cannot be averaged", "use reduce: random, or one teacher")
        return TeacherSignal(self.combined([self._logits(teacher, batch) for teacher in self.teachers]))

    def tokens(self, batch: Batch) -> "TokenSignal":
        """The combined logits of the kept tokens."""
        if self.reduce == "random":
            return self.teachers[int(torch.randint(len(self.teachers), ()))].tokens(batch)
        from limbeck.objectives.fused_head import DenseTeacher

        return DenseTeacher(self.combined([logits_of_tokens(teacher.tokens(batch)) for teacher in self.teachers]))

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """Logarithm of the weighted mean of the probabilities of each teacher's logits (items, classes)."""
        log_probs = torch.stack([one.float().log_softmax(-1) for one in logits])
        weights = self.weights.log().to(log_probs).view(-1, *[1] * (log_probs.ndim - 1))
        return torch.logsumexp(log_probs + weights, 0)

    @staticmethod
    def _logits(teacher: Teacher, batch: Batch) -> Tensor:
        logits = teacher.signal(batch).logits
        if logits is None:
            raise IncompatibleError("a teacher of this ensemble gives no logits")
        return logits

    def to(self, device: torch.device) -> None:
        """Moves every teacher."""
        for teacher in self.teachers:
            teacher.to(device)

    @property
    def fingerprint(self) -> str:
        """Hash of the teachers' hashes and of how they are combined."""
        parts = [teacher.fingerprint for teacher in self.teachers]
        return hashlib.sha256(":".join([*parts, self.reduce, str(self.weights.tolist())]).encode()).hexdigest()


def logits_of_tokens(signal: "TokenSignal") -> Tensor:
    """The logits (tokens, vocab) behind a token signal.

    Raises:
        IncompatibleError: only the most probable tokens are known.
    """
    from limbeck.objectives.fused_head import DenseTeacher, HiddenTeacher

    if isinstance(signal, DenseTeacher):
        return signal.logits
    if isinstance(signal, HiddenTeacher):
        return torch.nn.functional.linear(signal.hidden, signal.weight, signal.bias)
    raise IncompatibleError("a teacher known by its top-k tokens has no logits", "cache dense logits or hidden states")
