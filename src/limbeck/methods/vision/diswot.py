"""DisWOT: the student architecture that will distil best, found without training (Dong et al., 2023)."""

import copy
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, JsonValue, model_validator
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import World
from limbeck.core.durable import write_json
from limbeck.core.errors import IncompatibleError, Interrupted, LimbeckError
from limbeck.core.method import DataInfo, Procedure, ProcedureContext
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator, reseed
from limbeck.core.registry import register
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.search.evolution import Scored, aging_evolution, random_search, ranked
from limbeck.search.initialisation import Initialisation, reinitialised
from limbeck.search.ledger import Ledger, Row
from limbeck.search.proxies import Look, Proxy, SemanticAxis, look, needs_head, scores, stages_of
from limbeck.search.space import ArgumentSpace, Choice

Values = Annotated[list[JsonValue], Field(min_length=1, max_length=1000)]


@register
class DisWOT(Procedure):
    r"""Of the students that a space offers, the one that looks at data most like the teacher before either is trained.

    .. math:: M = M_r + M_s, \qquad M_r = -\frac{1}{B^2} \|G_t - G_s\|_F^2, \qquad
        M_s = -\frac{1}{K C} \sum_k \|H_{t,k} - H_{s,k}\|_F^2

    with G the Gram matrix of the items' last maps and :math:`H_k` that of row k of the gradient of the cross-entropy on
    the classifier's weight, all rows of unit length. Teacher and students have random weights and batch norms in train
    mode, and see the same batches. An aging evolution looks for the largest M: of `sample` living architectures drawn,
    one of the `parents` best gets a child with one argument changed, which takes the place of the oldest.

    Any feature loss may take the place of M (`proxy`). The space is all combinations of values of the student's
    arguments; without one, the student alone is scored, which makes `score` a figure that `limbeck sweep` can search
    for. Result is the best architecture with fresh weights, for a later stage to distil; `pick` takes another place of
    the ranking. `ledger.jsonl`, `ranking.json` and every score lie in the stage's folder under `checkpoints`.

    Where teacher and student have unequally many channels, :math:`M_s` compares classes in place of channels, which is
    an extension. The predictor-based rankings that the paper compares itself with are not here. Its claim is about
    spaces of networks of nearly equal cost; where costs differ, compare with the count of parameters first.
    """

    card = Card(
        slug="diswot",
        title="DisWOT: Student Architecture Search for Distillation WithOut Training",
        arxiv="2303.15678",
        year=2023,
        family="vision",
        task="classification",
        needs=("teacher", "student", "labels", "features"),
        use="To choose a student's width, depth or operations for a given teacher in minutes, before any training.",
        tiny={"space": {"width": [2, 4], "depth": [1, 2]}, "iterations": 6, "population": 3, "batch_size": 16},
    )

    class Options(OptionsBase):
        """Space, score and search; defaults are the paper's."""

        space: dict[str, Values] = Field(
            {},
            description="values by argument of the student, as {width: [8, 16], layers.0: [1, 2, 3]}; a path names an "
            "entry of a list that student.arguments gives; empty: the student is scored as it is",
        )
        proxy: Proxy = Field("diswot", description="what scores a student; a feature loss counts with its sign turned")
        semantic_axis: SemanticAxis = Field(
            "auto", description="Gram matrices of the semantic term: channels (paper), classes, or by what fits"
        )
        strategy: Literal["evolution", "random", "all"] = Field(
            "evolution", description="aging evolution, independent draws, or every architecture of the space in turn"
        )
        iterations: int = Field(1000, ge=1, le=10_000_000, description="candidates, the first population included")
        max_seconds: float | None = Field(
            None, gt=0, le=1e8, description="stop when all scores together have taken so long; iterations still count"
        )
        population: int = Field(36, ge=1, le=1_000_000, description="living architectures")
        sample: int = Field(8, ge=1, le=1_000_000, description="living architectures drawn for a child's parent")
        parents: int = Field(5, ge=1, le=1_000_000, description="the best of these, of which one becomes the parent")
        mutation_rate: float = Field(1.0, ge=0, le=1, description="probability that a child differs from its parent")
        batch_size: int = Field(64, ge=2, le=1_000_000, description="labelled items that are looked at")
        repeats: int = Field(
            1, ge=1, le=10_000, description="batches and initialisations that a score is averaged over"
        )
        initialisation: Initialisation = Field(
            "default", description="random weights: each layer's own, or N(0, 1) in convolutions and linear layers"
        )
        teacher_weights: Literal["random", "given"] = Field(
            "random", description="the teacher's weights: random as the paper's, or those that it has"
        )
        max_parameters: int | None = Field(None, ge=1, le=10**15, description="most parameters of a student")
        max_flops: float | None = Field(
            None,
            gt=0,
            le=1e20,
            description="most operations of a student's forward pass of an item; a product and sum are two",
        )
        student_layers: list[str] | None = Field(
            None, description="module paths or globs in students, the map before pooling last; their stages if absent"
        )
        teacher_layers: list[str] | None = Field(
            None, description="module paths or globs in the teacher, the map before pooling last; its stages if absent"
        )
        pick: int = Field(1, ge=1, le=1_000_000, description="place in the ranking of the student that is returned")

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.parents > self.sample:
                raise ValueError(f"parents ({self.parents}) are chosen among sample ({self.sample}): lower them")
            return self

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(teacher, LiveTeacher):
            raise IncompatibleError("the teacher is built anew with random weights", "give one network as the teacher")
        self.live = teacher
        self.device = World().device
        self._found: dict[str, float] = {}

    def run(self, context: ProcedureContext) -> nn.Module:
        self.context, writes = context, World().main
        self.space = ArgumentSpace(self.options.space, context.build, self.data.example.select(slice(0, 1)))
        self.ledger = Ledger(context.directory / "ledger.jsonl", write=writes)
        self._looks: dict[int, tuple[Batch, Look]] = {}
        self._seconds: dict[Choice, float] = {}
        history: list[Scored[Choice]] = []
        best = -math.inf
        for found in self._candidates():
            history.append(found)
            best = max(best, found.score)
            if writes:
                context.log({"step": len(history), "best": best, **self._figures(found)})
            if sum(self._seconds.values()) >= (self.options.max_seconds or math.inf):
                break
        return self._picked(ranked(history), writes)

    def figures(self) -> dict[str, float]:
        """Score and costs of the student that was picked, and how many architectures were looked at."""
        return self._found

    def _candidates(self) -> Iterator[Scored[Choice]]:
        """The candidates in the order in which the search comes to them; a function of the seed."""
        options, draws = self.options, random.Random(derive(self.context.seed, "search"))
        found: Iterator[Scored[Choice]]
        if options.strategy == "all" or len(self.space) == 1:
            scored = ((architecture, self._score(architecture)) for architecture in self.space)
            found = (Scored(architecture, score) for architecture, score in scored if score is not None)
        elif options.strategy == "random":
            found = random_search(self.space, self._score, draws)
        else:
            settings = options.model_dump(include={"population", "sample", "parents", "mutation_rate"})
            found = aging_evolution(self.space, self._score, draws, **settings)
        return itertools.islice(found, options.iterations)

    def _score(self, architecture: Choice) -> float | None:
        self.context.pause("what was scored is kept")
        row = self._row(architecture)
        self._seconds[architecture] = row["seconds"]
        return row["score"]

    def _row(self, architecture: Choice) -> Row:
        return self.ledger.get(self.space.arguments(architecture), lambda: self._assess(architecture))

    def _assess(self, architecture: Choice) -> Row:
        """Costs and score of one architecture; a score of None and the reason where it is refused."""
        begun, row = time.perf_counter(), Row(score=None)
        try:
            row |= asdict(self.space.cost(architecture))
            most = {"parameters": self.options.max_parameters, "flops": self.options.max_flops}
            over = [name for name, limit in most.items() if limit is not None and row[name] > limit]
            row |= {"refused": f"too many {over[0]}"} if over else self._average(architecture)
        except (Interrupted, torch.OutOfMemoryError):
            raise
        except (LimbeckError, ValueError, RuntimeError) as error:  # no such network, or none that can be compared
            row["refused"] = str(error).partition("\n")[0]
        return {**row, "seconds": time.perf_counter() - begun}

    def _average(self, architecture: Choice) -> Row:
        """The score and its terms, averaged over initialisations and batches."""
        options, every = self.options, []
        for repeat in range(options.repeats):
            batch, theirs = self._teacher_look(repeat)
            seed = derive(self.context.seed, "student", repeat)
            student = reinitialised(self.space.build(architecture, seed), options.initialisation, seed)
            ours = self._look(student, batch, options.student_layers)
            every.append(scores(options.proxy, ours, theirs, options.semantic_axis))
        means = {name: fmean(one[name] for one in every) for name in every[0]}
        if not all(map(math.isfinite, means.values())):
            raise ValueError("the score is not finite")
        return means

    def _teacher_look(self, repeat: int) -> tuple[Batch, Look]:
        """The batch of a repetition and what the teacher makes of it, worked out once."""
        if repeat not in self._looks:
            seed, options = derive(self.context.seed, "teacher", repeat), self.options
            teacher = self.live.model
            if options.teacher_weights == "random":
                teacher = reinitialised(teacher, options.initialisation, seed)
            batch = self._batch(repeat)
            adapted = self.live.adapt(batch) if self.live.adapt is not None else batch
            look = self._look(copy.deepcopy(teacher).train(), adapted, options.teacher_layers)
            self._looks[repeat] = batch, look
        return self._looks[repeat]

    def _batch(self, repeat: int) -> Batch:
        """Labelled items, a draw of its own for each repetition."""
        source = self.context.source
        labelled = (source.labels >= 0).nonzero()[:, 0]
        if len(labelled) < 2:
            raise IncompatibleError("the data have no labelled items to look at", "name the label's column")
        order = torch.randperm(len(labelled), generator=generator(self.context.seed, "batch", repeat))
        return source.fetch(labelled[order[: self.options.batch_size]]).to(self.device)

    def _look(self, model: nn.Module, batch: Batch, layers: list[str] | None) -> Look:
        reseed(self.context.seed, "forward")  # of dropout and its like
        proxy = self.options.proxy
        return look(model.to(self.device), batch, layers, stages_of(proxy), head=needs_head(proxy))

    def _figures(self, found: Scored[Choice]) -> dict[str, float]:
        return {name: value for name, value in self._row(found.architecture).items() if name != "seconds"}

    def _picked(self, ranking: list[Scored[Choice]], writes: bool) -> nn.Module:
        """Writes the ranking, and builds the student at the place that is asked for."""
        if writes:
            entries = [{"arguments": self.space.arguments(one.architecture), **self._figures(one)} for one in ranking]
            write_json(self.context.directory / "ranking.json", entries)
        if len(ranking) < self.options.pick:
            reasons = [row["refused"] for row in self.ledger.rows.values() if "refused" in row]
            raise IncompatibleError(
                f"{len(ranking)} architectures were admitted, and none is number {self.options.pick}",
                f"the last that was refused: {reasons[-1]}" if reasons else "lower pick",
            )
        chosen = ranking[self.options.pick - 1]
        self._found = {"candidates": len(ranking), **self._figures(chosen)}
        return self.space.build(chosen.architecture, None)
