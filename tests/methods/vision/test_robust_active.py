import pytest
import torch

import limbeck
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.errors import IncompatibleError, Interrupted
from limbeck.core.method import ProcedureContext
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.data.split import split_pool
from limbeck.methods.vision.robust_active import _SoftTargets
from limbeck.models.convnet import ConvNet
from limbeck.models.saved import load_model, save_model
from limbeck.objectives.querying import inclusion_probabilities, rad_distribution
from tests.contract.rigs import RIGS

RIG = RIGS["classification"]
KIND = method_class("robust-active")
SOURCE = RIG.source
TINY = dict(KIND.card.tiny)


class Counting(LiveTeacher):
    """A teacher that notes every item it is asked about."""

    def __init__(self, model, stop_after=None):
        super().__init__(model)
        self.asked, self.stop_after = [], stop_after

    def signal(self, batch, layers=()):
        self.asked += batch["index"].tolist()
        return super().signal(batch, layers)


def made(**options):
    reseed(0, "models")
    teacher = Counting(RIG.teacher())
    student = ConvNet(width=4, depth=2, norm="group")
    return KIND(KIND.Options(**{**TINY, **options}), student=student, teacher=teacher, data=SOURCE.info())


def context(folder, seed=0, rows=None, pause=lambda *message: None):
    folder.mkdir(parents=True, exist_ok=True)
    return ProcedureContext(SOURCE, folder, seed, (rows if rows is not None else []).append, pause)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("selector", ["rad", "random", "margin", "entropy", "k-centre", "cluster-margin"])
def test_only_the_budget_is_asked_and_each_item_once(selector, tmp_path):
    procedure, rows = made(selector=selector, clusters=3), []
    teacher, before, start = procedure.teacher, state(procedure.teacher.model), state(procedure.student)
    result = procedure.run(context(tmp_path, rows=rows))
    pool = split_pool(SOURCE.labels, 12, 6, 0)
    held = pool.holdout.tolist() if selector == "rad" else []
    assert sorted(teacher.asked[: len(held)]) == held
    bought = teacher.asked[len(held) :]
    assert len(bought) == len(set(bought)) == 8
    assert set(bought) <= set(pool.unlabelled.tolist())
    assert procedure.figures() == {"queries": 8, "holdout_queries": len(held), "rounds": 2}
    assert [row["queries"] for row in rows if "queries" in row] == [4, 8]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert result is procedure.student
    assert not same(start, state(result))
    assert same(before, state(teacher.model))
    assert not teacher.model.training
    assert all(value.isfinite().all() for value in result.state_dict().values())


def test_the_seed_decides_everything(tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # whatever was drawn before does not matter
        procedure, rows = made(), []
        result = procedure.run(context(tmp_path / str(number), seed, rows))
        found.append((state(result), procedure.teacher.asked, [{**row, "seconds": 0} for row in rows]))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert not same(found[0][0], found[2][0])
    assert found[0][1] != found[2][1]


class Stop:
    """Asks to stop at the given call."""

    def __init__(self, call):
        self.left = call

    def __call__(self, *message):
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stop")


@pytest.mark.parametrize("restart", [True, False])
def test_interruption_between_any_two_actions_changes_nothing_and_costs_nothing(restart, tmp_path):
    options = {"restart": restart, "batch_size": 2, "budget": 4}
    straight = made(**options)
    expected = state(straight.run(context(tmp_path / "straight")))
    pauses, asked = 0, []
    while True:  # each life ends at its second pause
        procedure = made(**options)
        torch.manual_seed(99 + pauses)
        try:
            result = procedure.run(context(tmp_path / "torn", pause=Stop(2)))
        except Interrupted:
            pauses += 1
            asked += procedure.teacher.asked
            continue
        asked += procedure.teacher.asked
        break
    assert pauses >= 3
    assert same(expected, state(result))
    assert asked == straight.teacher.asked  # no answer was paid for twice
    assert procedure.figures() == straight.figures()


def test_interruption_within_a_training_changes_nothing(tmp_path):
    class Dies(Exception):
        pass

    straight = made(steps=6)
    expected = state(straight.run(context(tmp_path / "straight")))

    def log(row):
        if row["step"] == 7 + 6:  # the last step of the second training
            raise Dies

    torn = context(tmp_path / "torn")
    with pytest.raises(Dies):
        made(steps=6).run(ProcedureContext(SOURCE, torn.directory, 0, log, torn.pause))
    assert Checkpoints(torn.directory / "round-1").steps() == [5]
    resumed = made(steps=6)
    assert same(expected, state(resumed.run(torn)))
    assert resumed.teacher.asked == straight.teacher.asked[-4:]


def test_restarting_and_going_on_differ_and_one_round_of_both_is_the_same(tmp_path):
    def run(name, **options):
        return state(made(**options).run(context(tmp_path / name)))

    assert not same(run("a", restart=True), run("b", restart=False))
    assert same(run("c", restart=True, rounds=1, budget=22), run("d", restart=True, rounds=3, budget=22))  # all bought


def test_the_student_learns_labels_and_answers():
    targets = torch.eye(10)[[3, 7]]
    targets[1] = torch.full((10,), 0.1)
    method = _SoftTargets(ConvNet(width=4, depth=2, norm="group"), SOURCE.info(), targets)
    batch = SOURCE.fetch(torch.tensor([0, 1]))
    (update,) = method.step(batch)
    log_p = method.student(batch.image).log_softmax(1)
    torch.testing.assert_close(update.loss, -(log_p[0, 3] + log_p[1].mean()) / 2)
    assert update.weight == 2
    assert not method.state_dict().keys() & {"targets"}


def test_labels_of_the_pool_are_not_read(tmp_path):
    pool = split_pool(SOURCE.labels, 12, 6, 0)
    results = []
    for number in range(2):
        procedure = made()
        hidden = context(tmp_path / str(number))
        if number:
            other = SOURCE.select(torch.arange(len(SOURCE)))
            known = other.labels[pool.unlabelled] != -100
            other.labels[pool.unlabelled] = torch.where(known, (other.labels[pool.unlabelled] + 1) % 10, -100)
            hidden = ProcedureContext(other, hidden.directory, 0, hidden.log, hidden.pause)
        results.append((state(procedure.run(hidden)), procedure.teacher.asked))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_error_comes_from_the_holdout_or_is_given(tmp_path):
    measured, rows = made(), []
    measured.run(context(tmp_path / "measured", rows=rows))
    held = split_pool(SOURCE.labels, 12, 6, 0).holdout
    said = measured.teacher.model(SOURCE.fetch(held).image).argmax(1)
    errors = {row["teacher_error"] for row in rows if "teacher_error" in row}
    assert errors == {float((said != SOURCE.labels[held]).float().mean())}
    given, rows = made(teacher_error=0.25, holdout=0), []
    given.run(context(tmp_path / "given", rows=rows))
    assert {row["teacher_error"] for row in rows if "teacher_error" in row} == {0.25}
    assert len(given.teacher.asked) == 8
    with pytest.raises(IncompatibleError, match="give holdout or teacher_error"):
        made(holdout=0).run(context(tmp_path / "neither"))


@pytest.mark.parametrize("cost", [{}, {"wrong_cost": 0.5, "cost_by": "confidence"}])
def test_the_draw_follows_the_robust_distribution(cost, tmp_path):
    """The first selection, drawn by many seeds, has the marginals of the closed form."""
    procedure = made(teacher_error=0.3, holdout=0, rounds=1, budget=5, **cost)
    here = context(tmp_path)
    procedure.run(here)
    left = procedure.pool.unlabelled
    with torch.no_grad():
        p = procedure.student.eval()(SOURCE.fetch(left).image).softmax(1)
    top = p.topk(2, dim=1).values
    losses = 0.5 * top[:, 0] if cost else torch.zeros(len(left))
    expected = inclusion_probabilities(
        rad_distribution(1 - (top[:, 0] - top[:, 1]), round(0.3 * len(left)), losses, at_least=5).probabilities, 5
    )
    counts = torch.zeros(len(left))
    for seed in range(200):
        picked, _ = procedure._select(left, 5, here, torch.Generator().manual_seed(seed))
        assert len(set(picked.tolist())) == 5
        counts[picked] += 1
    assert float((counts / 200 - expected).abs().max()) < 0.15
    assert float(counts[expected == 0].sum()) == 0


def test_the_result_is_exported_and_loads_again(tmp_path):
    result = made().run(context(tmp_path))
    save_model(result, tmp_path / "student")
    assert torch.equal(RIG.outputs(load_model(tmp_path / "student")), RIG.outputs(result))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    procedure = made()
    procedure.teacher = LiveTeacher(ConvNet(width=4, classes=7))
    with pytest.raises(IncompatibleError, match="the data have 10 classes and the teacher 7"):
        procedure.run(context(tmp_path))


def test_a_whole_run_reports_what_was_asked(tmp_path):
    options = {**TINY, "labelled": 30, "holdout": 20}
    run = limbeck.distill(
        "robust-active",
        student={"name": "mlp", "arguments": {"width": 8}},
        teacher=ConvNet(width=4),
        data="digits",
        out=tmp_path,
        options=options,
        quiet=True,
    )
    figures = run.results()["distil"]
    assert (figures["queries"], figures["holdout_queries"], figures["rounds"]) == (8, 20, 2)
    assert 0 <= figures["accuracy"] <= 1
    assert [row["queries"] for row in run.metrics() if "queries" in row] == [4, 8]
    assert limbeck.load(tmp_path) is not None
