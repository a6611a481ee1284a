"""The card of a method: who published it, what it needs, what it is for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Family = Literal["classic", "vision", "language", "trajectory", "distribution", "scenes", "datasets", "conversion"]
Need = Literal["teacher", "student", "labels", "features", "prompts", "index"]
Task = Literal["classification", "language-modelling", "generation", "scene", "dataset", "any"]


@dataclass(frozen=True, slots=True)
class Card:
    """What the command line, the documentation and the contract suite know of a method.

    Attributes:
        slug: name in recipes and on the command line, lower case with hyphens.
        title: title of the publication.
        arxiv: arXiv identifier, or "" where there is none.
        year: year of first publication.
        family: folder in `limbeck.methods`.
        task: what its models do; picks the tiny run of the contract suite. "any": by the data.
        needs: what must be present: a teacher, labels, tapped features, prompts, item indices.
        use: one sentence: when to reach for it.
        couples_batch: its loss couples the items of a batch, so gradient accumulation changes it (ranks gather).
        tiny: options that shrink it for the contract suite's run of seconds.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    family: Family
    task: Task
    needs: tuple[Need, ...]
    use: str
    couples_batch: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data."""
        return {**asdict(self), "needs": list(self.needs), "tiny": dict(self.tiny)}
