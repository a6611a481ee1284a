"""The one contract of the library: a method yields updates, and the trainer carries them out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.options import OptionsBase

if TYPE_CHECKING:
    from pathlib import Path

    from limbeck.core.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step to take: whose, along which loss, and over how many items that loss is a mean.

    Attributes:
        player: whose optimizer steps.
        loss: scalar, the mean over `weight` items.
        weight: how many items (images, valid tokens, pairs) the mean is over.
        logs: scalars to record; never `.item()`-ed by the method, detached by the trainer.
    """

    player: str
    loss: Tensor
    weight: Tensor | float = 1.0
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where training stands.

    Attributes:
        step: this step, from 0.
        steps: all steps.
        epoch: epochs so far, as a real number.
        seed: a seed of this step that all ranks share; the global random streams differ from rank to rank.
        run_seed: the seed of the whole training, for what is drawn once and used in many steps.
    """

    step: int = 0
    steps: int = 1
    epoch: float = 0.0
    seed: int = 0
    run_seed: int = 0

    @property
    def progress(self) -> float:
        """Share of the steps done, in [0, 1]."""
        return self.step / max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class TextInfo:
    """What is known of data that are text.

    Attributes:
        vocab: number of token ids, special tokens included.
        tokenizer: what made the tokens, of transformers; None for tokens from elsewhere.
        masked: whether tokens are hidden to be guessed, as masked language models are trained.
    """

    vocab: int
    tokenizer: Any = None
    masked: bool = False


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What a method may know of its data before training.

    Attributes:
        items: number of training items.
        classes: number of classes, 0 where there are none.
        example: two items, for reading shapes.
        labels: class of each item (items,), -100 for none; None where items have no class.
        text: vocabulary and tokenizer of text; None for data of any other kind.
        normalisation: per-channel (mean, deviation), of images in [0, 1], that the images are normalised with; None for
            data of any other kind.
    """

    items: int
    classes: int
    example: Batch
    text: TextInfo | None = None
    labels: Tensor | None = None
    normalisation: tuple[list[float], list[float]] | None = None


class Method(nn.Module):
    """One published system. One file, one class.

    Subclasses define `card`, `Options` and `step`; the trainer does everything else. Everything trainable or stateful
    is a submodule or a buffer, so that checkpoints hold it; teachers are plain attributes and stay outside.
    """

    card: ClassVar[Card]

    class Options(OptionsBase):
        """Options of this method; defaults are the paper's."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: "Teacher | None" = None, data: DataInfo
    ) -> None:
        super().__init__()
        self.options: Any = options
        self.student = student
        self.teacher = teacher
        self.data = data
        self.clock = Clock()

    def players(self) -> dict[str, nn.Module]:
        """What is optimised, each with its own optimizer."""
        return {"student": self.student}

    def step(self, batch: Batch) -> Iterator[Update]:
        """The paper's algorithm box: yields the updates of one step in order; code after a yield sees new weights."""
        raise NotImplementedError

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Called once after each optimizer step with the update's logs, averaged over micro-batches and ranks.

        What it does to the weights, such as masking some, is part of the step: a moving average sees it.
        """

    def result(self) -> nn.Module:
        """What the user takes home."""
        return self.student

    def averaged(self) -> nn.Module:
        """Whose weights a moving average follows; a player's module, where `result` is made anew of its weights."""
        return self.result()

    def figures(self) -> dict[str, Any]:
        """What else is to be said of the result, by name, once training is done; joins the figures of the stage."""
        return {}


class Procedure:
    """A system that does not train by gradient: a search, mining, a closed form, a calibration."""

    card: ClassVar[Card]

    class Options(OptionsBase):
        """Options of this procedure; defaults are the paper's."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: "Teacher | None" = None, data: DataInfo
    ) -> None:
        self.options: Any = options
        self.student = student
        self.teacher = teacher
        self.data = data

    def run(self, context: "ProcedureContext") -> nn.Module:
        """Does the work and returns what the user takes home."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """What was found out, by name, once `run` is done; joins the figures of the stage."""
        return {}


@dataclass(frozen=True)
class ProcedureContext:
    """What a procedure may use of its run.

    Attributes:
        source: the training data.
        directory: a folder of its own, kept between interruption and resumption.
        seed: seed of all its randomness.
        log: records a row of metrics.
        pause: call it between units of work; raises `Interrupted` when the run was asked to stop.
        build: makes the stage's student anew from (arguments, seed): with some of its arguments changed, by name or by
            a path such as `layers.0`, and fresh weights, those of the recipe for the seed None.
    """

    source: Any
    directory: "Path"
    seed: int
    log: Any
    pause: Any
    build: Any = None
