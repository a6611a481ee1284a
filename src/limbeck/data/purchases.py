"""What was bought from a teacher so far, kept on disk so that no answer is paid for twice."""

from dataclasses import dataclass

from torch import Tensor

from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.errors import DamagedFileError


@dataclass(frozen=True)
class Purchases:
    """The state of an active learner between two of its actions.

    Attributes:
        round: how many selections were made.
        rows: items asked about (asked,), int64, in order.
        answers: the teacher's probabilities (answered, classes); fewer than `rows` while it is being asked.
        error: share of answers expected to be wrong, in [0, 1].
        initial: the student's weights at the start.
        student: its weights at the last selection.
    """

    round: int
    rows: Tensor
    answers: Tensor
    error: float
    initial: dict[str, Tensor]
    student: dict[str, Tensor]

    def save(self, states: Checkpoints) -> None:
        """Writes this state; what was there before stays until it is whole on disk."""
        tensors = {
            "asked": {"rows": self.rows, "answers": self.answers},
            "initial": self.initial,
            "student": self.student,
        }
        # A selection comes first and its answers after it: both count, so that each state has its own number.
        step = len(self.answers) + self.round
        states.save(Checkpoint(step, tensors, {"round": self.round, "error": self.error}))

    @classmethod
    def restore(cls, states: Checkpoints) -> "Purchases | None":
        """The latest whole state, None where there is none.

        Raises:
            DamagedFileError: what is there is none.
        """
        match saved := states.load():
            case None:
                return None
            case Checkpoint(
                tensors={"asked": {"rows": rows, "answers": answers}, "initial": initial, "student": student},
                state={"round": int() as number, "error": float() | int() as error},
            ) if len(answers) <= len(rows):
                return cls(number, rows, answers, float(error), initial, student)
        raise DamagedFileError(states.folder / f"step-{saved.step:09d}", "it holds no purchases")
