"""RAD: active distillation from a teacher that may be wrong (Baykal et al., 2022)."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.distributed import World
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Procedure, ProcedureContext, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator
from limbeck.core.registry import register
from limbeck.core.snapshot import load_module, module_tensors
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.purchases import Purchases
from limbeck.data.querying import ask, look
from limbeck.data.split import split_pool
from limbeck.models.describe import default_layers
from limbeck.objectives.coverage import cluster_margin, k_centre
from limbeck.objectives.querying import dep_round, inclusion_probabilities, rad_distribution
from limbeck.objectives.uncertainty import Uncertainty, uncertainty


@register
class RobustActive(Procedure):
    r"""A costly teacher, which may be wrong just where the student is unsure, is asked about a few items of a pool.

    Each round trains the student, scores the pool by what an answer would gain, :math:`g_i = 1 - (p_{(1)} - p_{(2)})`,
    and draws items without replacement from the distribution that is best if the worst m answers are wrong:

    .. math::
        p_i = \frac{1 / g_i}{H_{k^*}} \text{ for } i \le k^*, \text{ else } 0, \qquad
        k^* = \arg\max_{k > m} \frac{k - m}{H_k}, \qquad H_k = \sum_{i \le k} 1 / g_i

    with gains in descending order and m from the teacher's accuracy on a hold-out it was not trained on. The student is
    then trained on cross-entropy with its labels and with the teacher's probabilities on the bought items, the mean
    over both.

    Of the paper's baselines random, margin, entropy, k-centre and cluster-margin (clustered anew in each round) are
    selectors; UNIXKD is not here: it asks about mixtures of images, not about items of the pool. The teacher sees an
    item once and as it is; training may augment it. One process only: each answer is paid for.
    """

    card = Card(
        slug="robust-active",
        title="Robust Active Distillation",
        arxiv="2210.01213",
        year=2022,
        family="vision",
        task="classification",
        needs=("teacher", "student", "labels"),
        use="Where each question to the teacher costs money, labels are few, and the teacher is not always right.",
        tiny={"labelled": 12, "holdout": 6, "budget": 4, "rounds": 2, "steps": 3, "batch_size": 8},
    )

    class Options(OptionsBase):
        """What is labelled, what is bought, how the student is trained."""

        selector: Literal["rad", "random", "margin", "entropy", "k-centre", "cluster-margin"] = Field(
            "rad", description="who chooses: the robust distribution, or one of the baselines"
        )
        gains: Uncertainty = Field("margin", description="what an answer is worth to the student (rad)")
        labelled: int | None = Field(
            None, ge=1, le=10**9, description="labelled items to train on; all that have a label if absent"
        )
        holdout: int = Field(
            100, ge=0, le=10**9, description="labelled items held out to measure the teacher's error (rad)"
        )
        teacher_error: float | None = Field(
            None, ge=0, le=1, description="share of the pool that it may get wrong; measured on the hold-out if absent"
        )
        wrong_cost: float = Field(0.0, ge=0, le=1000, description="what a wrong answer costs, in units of gain (rad)")
        cost_by: Literal["item", "confidence"] = Field(
            "item", description="every item costs the same, or in proportion to the student's confidence"
        )
        budget: int = Field(150, ge=1, le=10**9, description="questions a round")
        rounds: int = Field(1, ge=1, le=10_000, description="rounds of questions; one more training than rounds")
        restart: bool = Field(True, description="train from the first weights in each round; off: go on from the last")
        steps: int = Field(500, ge=1, le=10**9, description="optimizer steps of each training")
        batch_size: int = Field(64, ge=1, le=10**6, description="items a step, and items the teacher gets at a time")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimizer of torch.optim")
        lr: float = Field(1e-3, gt=0, le=100, description="peak learning rate; it falls along a cosine")
        weight_decay: float = Field(0.0, ge=0, le=10, description="decoupled for adamw, L2 otherwise")
        layer: str | None = Field(
            None, description="student's layer whose features k-centre and cluster-margin use; its last stage if absent"
        )
        clusters: int = Field(100, ge=2, le=100_000, description="clusters of the pool (cluster-margin)")

    def run(self, context: ProcedureContext) -> nn.Module:
        self.world = World()
        if self.world.size > 1:
            raise IncompatibleError("robust-active pays for each answer once", "launch it with one process")
        self.student.to(self.world.device)
        self.states = Checkpoints(context.directory)
        self.pool = split_pool(context.source.labels, self.options.labelled, self.options.holdout, context.seed)
        self.bought = Purchases.restore(self.states) or self._begun(context)
        while True:
            self._ask(context)
            self._train(context)
            left = self.pool.unlabelled[~torch.isin(self.pool.unlabelled, self.bought.rows)]
            if self.bought.round == self.options.rounds or not len(left):
                return self.student
            context.pause()
            self._choose(left, context)

    def figures(self) -> dict[str, float]:
        held = len(self.pool.holdout) if self._measures_error() else 0
        return {"queries": len(self.bought.answers), "holdout_queries": held, "rounds": self.bought.round}

    def _ask(self, context: ProcedureContext) -> None:
        """Asks the teacher about what was chosen and has no answer yet; each tenth of the budget is saved."""
        portion = max(self.options.batch_size, self.options.budget // 10)
        while (done := len(self.bought.answers)) < len(self.bought.rows):
            context.pause()
            asked = self.bought.rows[done : done + portion]
            answers = torch.cat([self.bought.answers, self._answers(asked, context)])
            self.bought = replace(self.bought, answers=answers)
            self.bought.save(self.states)

    def _train(self, context: ProcedureContext) -> None:
        options, bought = self.options, self.bought
        load_module(self.student, bought.initial if options.restart else bought.student)
        rows = torch.cat([self.pool.labelled, bought.rows])
        known = functional.one_hot(context.source.labels[self.pool.labelled], self.data.classes).float()
        spec = TrainSpec(
            steps=options.steps,
            batch_size=options.batch_size,
            optimizer=OptimizerSpec(name=options.optimizer, lr=options.lr, weight_decay=options.weight_decay),
        )
        seed, first = derive(context.seed, "round", bought.round), bought.round * (options.steps + 1)
        trainer = Trainer(
            _SoftTargets(self.student, self.data, torch.cat([known, bought.answers])),
            Loader(context.source.select(rows), options.batch_size, seed),
            spec,
            steps=options.steps,
            items=len(rows),
            seed=seed,
            checkpoints=Checkpoints(context.directory / f"round-{bought.round}", keep=1),
            record=lambda row: context.log({**row, "step": first + row["step"]}),
            world=self.world,
        )
        trainer.fit()

    def _choose(self, left: Tensor, context: ProcedureContext) -> None:
        """Settles what the next round asks about; the student as trained goes with it."""
        budget, number = min(self.options.budget, len(left)), self.bought.round + 1
        picked, about = self._select(left, budget, context, generator(context.seed, "selection", number))
        rows = torch.cat([self.bought.rows, left[picked]])
        self.bought = replace(self.bought, round=number, rows=rows, student=_copied(self.student))
        self.bought.save(self.states)
        shutil.rmtree(context.directory / f"round-{number - 1}", ignore_errors=True)
        context.log({"step": number * (self.options.steps + 1), "round": number, "queries": len(rows), **about})

    def _select(
        self, left: Tensor, budget: int, context: ProcedureContext, draws: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Places in `left` of `budget` items, and what can be said of the choice."""
        options, layer = self.options, self._layer()
        logits, features = look(self.student, context.source, left, layer, device=self.world.device)
        gains = uncertainty(logits, options.gains)
        about = {"pool": len(left), "mean_gain": float(gains.mean())}
        if options.selector == "random":
            return torch.randperm(len(left), generator=draws)[:budget], about
        if options.selector == "k-centre":
            centres = torch.cat([self.pool.labelled, self.bought.rows])
            known = look(self.student, context.source, centres, layer, device=self.world.device)[1]
            return k_centre(features, known, budget), about
        if options.selector == "cluster-margin":
            groups = _clusters(features, options.clusters)
            gains = uncertainty(logits, "margin")
            return cluster_margin(gains, groups, budget, candidates=10 * budget, generator=draws), about
        if options.selector != "rad":
            return uncertainty(logits, options.selector).topk(budget).indices, about
        confidence = logits.softmax(1).amax(1) if options.cost_by == "confidence" else torch.ones(len(left))
        wrong = round(self.bought.error * len(left))
        found = rad_distribution(gains, wrong, options.wrong_cost * confidence, at_least=budget, generator=draws)
        chances = inclusion_probabilities(found.probabilities, budget)
        about |= {"teacher_error": self.bought.error, "support": found.support, "value": found.value}
        return dep_round(chances, draws).nonzero().flatten(), about

    def _layer(self) -> str | None:
        if self.options.selector not in ("k-centre", "cluster-margin"):
            return None
        return self.options.layer or default_layers(self.student)[-1]

    def _measures_error(self) -> bool:
        return self.options.selector == "rad" and self.options.teacher_error is None

    def _answers(self, rows: Tensor, context: ProcedureContext) -> Tensor:
        assert self.teacher is not None
        said = ask(self.teacher, context.source, rows, batch_size=self.options.batch_size, device=self.world.device)
        if said.shape[1] != self.data.classes:
            raise IncompatibleError(
                f"the data have {self.data.classes} classes and the teacher {said.shape[1]}",
                "take one of these classes",
            )
        return said

    def _begun(self, context: ProcedureContext) -> Purchases:
        error, weights = self.options.teacher_error or 0.0, _copied(self.student)
        if self._measures_error():
            if not len(self.pool.holdout):
                raise IncompatibleError("nothing tells how often the teacher errs", "give holdout or teacher_error")
            said = self._answers(self.pool.holdout, context).argmax(1)
            error = float((said != context.source.labels[self.pool.holdout]).float().mean())
        nothing = torch.empty(0, dtype=torch.int64)
        self.bought = Purchases(0, nothing, torch.empty(0, self.data.classes), error, weights, weights)
        self.bought.save(self.states)
        return self.bought


class _SoftTargets(Method):
    """Cross-entropy with a distribution for each item: a label's, or the teacher's answer."""

    targets: Tensor

    def __init__(self, student: nn.Module, data: DataInfo, targets: Tensor) -> None:
        super().__init__(OptionsBase(), student=student, data=data)
        self.register_buffer("targets", targets, persistent=False)

    def step(self, batch: Batch) -> Iterator[Update]:
        logits = logits_of(call(self.student, batch))
        yield Update("student", functional.cross_entropy(logits.float(), self.targets[batch["index"]]), batch.size)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module_tensors(model).items()}


def _clusters(features: Tensor, count: int) -> Tensor:
    """Average-linkage clusters (items,) of features; the whole matrix of distances is held."""
    from sklearn.cluster import AgglomerativeClustering

    grouped = AgglomerativeClustering(n_clusters=min(count, len(features)), linkage="average")
    return torch.from_numpy(grouped.fit_predict(features.numpy())).long()
