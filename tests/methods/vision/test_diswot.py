"""DisWOT: the score, the search as a procedure (seed, resume, teacher, result), and its place in recipes."""

import copy
import json

import pytest
import torch
from torch import nn

import limbeck
from limbeck.core import catalogue
from limbeck.core.errors import IncompatibleError, Interrupted
from limbeck.core.method import Procedure, ProcedureContext
from limbeck.core.registry import method_class
from limbeck.core.specs import ModelSpec
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.methods.vision.diswot import DisWOT
from limbeck.models.build import build_model
from limbeck.models.convnet import ConvNet
from limbeck.models.saved import load_model, save_model
from limbeck.search.ledger import Ledger
from limbeck.search.proxies import head_of, look, scores
from limbeck.search.space import with_arguments

SPACE = {"width": [2, 4, 6], "depth": [1, 2], "kernel": [1, 3], "skip": [False, True]}


def data(items=40, labelled=True):
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(items) % 10 if labelled else torch.full((items,), -100)
    return ArraySource(torch.rand(items, 1, 8, 8, generator=draws), labels, classes=10)


def teacher_net():
    torch.manual_seed(1)
    return ConvNet(width=6, depth=2, blocks=2, neck=12)


class Bench:
    """A procedure on tiny data, with everything that a run would give it."""

    def __init__(self, folder, seed=0, source=None, teacher=None, base=None, pause=lambda words: None, **options):
        self.folder, self.source, self.rows = folder, source or data(), []
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher = teacher or teacher_net()
        self.base = base if base is not None else {"neck": 12}
        self.built = []
        given = {"space": SPACE, "iterations": 20, "population": 6, "sample": 3, "parents": 2, "batch_size": 16}
        kind = method_class("diswot")
        self.procedure = kind(
            kind.Options(**{**given, **options}),
            student=self.build({}, None),
            teacher=LiveTeacher(self.teacher),
            data=self.source.info(),
        )
        assert isinstance(self.procedure, Procedure)
        self.context = ProcedureContext(self.source, folder, seed, self.rows.append, pause, self.build)

    def build(self, arguments, seed):
        self.built.append((arguments, seed))
        spec = ModelSpec(name="convnet", arguments=with_arguments(self.base, arguments))
        return build_model(spec, self.source.info(), 7 if seed is None else seed)

    def run(self):
        return self.procedure.run(self.context)

    @property
    def ranking(self):
        return json.loads((self.folder / "ranking.json").read_text())

    @property
    def ledger(self):
        rows = [json.loads(line) for line in (self.folder / "ledger.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_defaults_are_those_of_the_paper():
    options = DisWOT.Options()
    assert (options.population, options.sample, options.parents, options.iterations) == (36, 8, 5, 1000)
    assert (options.batch_size, options.repeats, options.proxy, options.teacher_weights) == (64, 1, "diswot", "random")


@pytest.mark.parametrize("proxy", ["diswot", "relation", "semantic", "rmi", "cka", "ickd", "at", "fitnet", "rkd"])
def test_a_network_is_most_like_itself(proxy):
    """The same object on both sides has every score's maximum, 0; another one has less."""
    batch, stages = data().fetch(torch.arange(16)), 3 if proxy == "rmi" else 1
    one, other = (look(net.train(), batch, None, stages, head=True) for net in (teacher_net(), teacher_net()))
    same = scores(proxy, one, other)
    assert all(value == pytest.approx(0.0, abs=2e-5) for value in same.values())
    torch.manual_seed(2)
    different = look(ConvNet(width=6, depth=2, blocks=2, neck=12).train(), batch, None, stages, head=True)
    assert scores(proxy, different, one)["score"] < -1e-6
    assert scores(proxy, different, one)["score"] < same["score"]


def test_the_paper_s_score_is_the_sum_of_its_terms():
    batch = data().fetch(torch.arange(16))
    student, teacher = ConvNet(width=4, depth=2, neck=12).train(), teacher_net().train()
    found = scores("diswot", *(look(net, batch, None, 1, head=True) for net in (student, teacher)))
    assert found["score"] == pytest.approx(found["relation"] + found["semantic"])
    assert found["relation"] < 0
    assert found["semantic"] < 0


def test_permuting_the_batch_for_both_leaves_the_score():
    rows, mixed = torch.arange(16), torch.randperm(16)
    student, teacher = ConvNet(width=4, depth=2, neck=12).train(), teacher_net().train()
    one, other = (
        scores("diswot", *(look(net, data().fetch(order), None, 1, head=True) for net in (student, teacher)))
        for order in (rows, mixed)
    )
    assert one["relation"] == pytest.approx(other["relation"], rel=1e-4)
    assert one["semantic"] == pytest.approx(other["semantic"], rel=1e-3)


def test_unequal_channels_are_compared_by_class_or_refused():
    batch = data().fetch(torch.arange(16))
    narrow, teacher = (
        look(net.train(), batch, None, 1, head=True) for net in (ConvNet(width=3, depth=2), teacher_net())
    )
    assert scores("semantic", narrow, teacher)["score"] == scores("semantic", narrow, teacher, "class")["score"] < 0
    with pytest.raises(ValueError, match="axis 'class'"):
        scores("semantic", narrow, teacher, "channel")


def test_the_head_is_the_last_linear_layer():
    assert head_of(teacher_net()) == "head"
    assert head_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == "2"
    with pytest.raises(IncompatibleError, match="no linear head"):
        head_of(nn.Conv2d(1, 1, 1))


def test_the_same_seed_gives_the_same_ranking(tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(results))  # whatever was drawn before does not matter
        bench = Bench(tmp_path / name, seed)
        results.append((bench.run(), bench))
    (model, first), (again, second), (_, other) = results
    assert first.ranking == second.ranking
    assert first.ledger == second.ledger
    assert first.rows == second.rows
    assert first.ranking != other.ranking
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_ranking_holds_every_scored_architecture_from_best_to_worst(tmp_path):
    bench = Bench(tmp_path, repeats=2)
    student = bench.run()
    ranking = bench.ranking
    assert [entry["score"] for entry in ranking] == sorted((entry["score"] for entry in ranking), reverse=True)
    assert len(ranking) == len({json.dumps(entry["arguments"]) for entry in ranking}) == len(bench.ledger) > 6
    assert all(-10 < entry["score"] <= 0 for entry in ranking)
    assert student.config == {**ConvNet(**bench.base, **ranking[0]["arguments"]).config}
    assert bench.procedure.figures()["score"] == ranking[0]["score"]
    assert bench.procedure.figures()["candidates"] == len(ranking)
    assert [row["step"] for row in bench.rows] == list(range(1, 21))
    assert bench.rows[-1]["best"] == ranking[0]["score"]


def test_the_result_has_the_recipe_s_fresh_weights_and_survives_saving(tmp_path):
    bench = Bench(tmp_path / "search")
    student = bench.run()
    assert bench.built[-1] == (bench.ranking[0]["arguments"], None)
    fresh = bench.build(bench.ranking[0]["arguments"], None)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in fresh.state_dict().items())
    save_model(student, tmp_path / "saved")
    loaded, image = load_model(tmp_path / "saved"), bench.source.fetch(torch.arange(4)).image
    assert torch.equal(loaded.eval()(image), student.eval()(image))


@pytest.mark.parametrize("weights", ["random", "given"])
def test_the_teacher_is_left_untouched(tmp_path, weights):
    bench = Bench(tmp_path, teacher_weights=weights, iterations=6)
    before = copy.deepcopy(bench.teacher.state_dict())
    bench.run()
    assert all(torch.equal(value, before[name]) for name, value in bench.teacher.state_dict().items())
    assert not bench.teacher.training
    assert all(weight.grad is None and not weight.requires_grad for weight in bench.teacher.parameters())


def test_random_teachers_ignore_given_weights_and_given_ones_do_not(tmp_path):
    other = teacher_net()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight))
    settings = {"strategy": "all", "space": {"width": [2, 4]}}
    for weights, equal in (("random", True), ("given", False)):
        benches = [
            Bench(tmp_path / f"{weights}{n}", teacher=net, teacher_weights=weights, **settings)
            for n, net in enumerate((teacher_net(), other))
        ]
        for bench in benches:
            bench.run()
        assert (benches[0].ledger == benches[1].ledger) is equal


def test_a_score_is_the_mean_over_initialisations_and_batches(tmp_path):
    single = {"strategy": "all", "space": {"width": [2, 4]}, "proxy": "relation"}
    three, one = Bench(tmp_path / "3", repeats=3, **single), Bench(tmp_path / "1", **single)
    three.run(), one.run()
    spread = [entry["score"] for entry in three.ledger], [entry["score"] for entry in one.ledger]
    assert spread[0] != spread[1]
    seeds = [seed for arguments, seed in three.built if arguments == {"width": 2} and seed is not None]
    assert len(set(seeds)) == 3


class Stop:
    """Asks the work to stop at the n-th safe point."""

    def __init__(self, after):
        self.left = after

    def __call__(self, words):
        self.left -= 1
        if self.left < 0:
            raise Interrupted(words)


@pytest.mark.parametrize("after", [1, 9, 15])
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, after):
    straight = Bench(tmp_path / "straight")
    expected = straight.run()
    torn = Bench(tmp_path / "torn", pause=Stop(after))
    with pytest.raises(Interrupted):
        torn.run()
    kept = torn.ledger
    assert 1 <= len(kept) <= after
    assert kept == straight.ledger[: len(kept)]
    resumed = Bench(tmp_path / "torn")
    result = resumed.run()
    assert resumed.ledger == straight.ledger
    assert resumed.ranking == straight.ranking
    assert resumed.rows == straight.rows
    scored = {json.dumps(arguments) for arguments, seed in resumed.built if seed is not None}
    assert len(scored) == len(straight.ledger) - len(kept)  # what was scored is not scored again
    assert all(torch.equal(value, result.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_torn_line_costs_one_evaluation(tmp_path):
    bench = Bench(tmp_path)
    bench.run()
    ledger, path = bench.ledger, tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = Bench(tmp_path)
    again.run()
    assert again.ledger == ledger
    assert len({json.dumps(arguments) for arguments, seed in again.built if seed is not None}) == 1


def test_a_ledger_that_may_not_write_leaves_the_file_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert Ledger(path, write=False).get("a", lambda: {"x": 1}) == {"x": 1}
    assert not path.exists()
    Ledger(path).get({"b": 1, "a": 2}, lambda: {"x": 2})
    assert Ledger(path).get({"a": 2, "b": 1}, dict) == {"x": 2}


def test_limits_of_cost_are_kept(tmp_path):
    free, capped = (
        Bench(tmp_path / "free", strategy="all", iterations=100),
        Bench(tmp_path / "capped", max_parameters=400),
    )
    free.run(), capped.run()
    assert max(entry["parameters"] for entry in free.ranking) > 400
    assert max(entry["parameters"] for entry in capped.ranking) <= 400
    assert {row["refused"] for row in capped.ledger if "refused" in row} == {"too many parameters"}
    assert all("score" not in row or row["score"] is None for row in capped.ledger if "refused" in row)
    operations = sorted(entry["flops"] for entry in free.ranking)
    slow = Bench(tmp_path / "slow", strategy="all", iterations=100, max_flops=operations[3])
    slow.run()
    assert [entry["flops"] for entry in sorted(slow.ranking, key=lambda e: e["flops"])] == operations[:4]


def test_a_limit_that_nothing_keeps_is_an_error(tmp_path):
    with pytest.raises(IncompatibleError, match="none was admitted"):
        Bench(tmp_path / "a", max_parameters=1).run()
    with pytest.raises(IncompatibleError, match=r"none is number 1[\s\S]*too many parameters"):
        Bench(tmp_path / "b", max_parameters=1, strategy="all").run()


def test_what_cannot_be_built_or_compared_is_refused_with_its_reason(tmp_path):
    bench = Bench(tmp_path, strategy="all", space={"width": [2, 0], "kernel": [3, 2]}, repeats=1)
    bench.run()
    reasons = {json.dumps(row["key"]): row.get("refused") for row in bench.ledger}
    assert len(bench.ranking) == 1
    assert "odd" in reasons['{"width": 2, "kernel": 2}']
    assert "width" in reasons['{"width": 0, "kernel": 3}']
    shallow = Bench(tmp_path / "rmi", strategy="all", space={"depth": [1, 2]}, proxy="rmi")
    shallow.run()  # with its neck the second one alone has three stages
    assert [entry["arguments"] for entry in shallow.ranking] == [{"depth": 2}]


def test_strategies(tmp_path):
    everything = Bench(tmp_path / "all", strategy="all", iterations=100)
    everything.run()
    assert len(everything.ranking) == 24
    drawn = Bench(tmp_path / "random", strategy="random", iterations=10)
    drawn.run()
    assert len(drawn.rows) == 10
    best = {json.dumps(entry["arguments"]): entry["score"] for entry in everything.ranking}
    assert all(best[json.dumps(entry["arguments"])] == entry["score"] for entry in drawn.ranking)
    still = Bench(tmp_path / "still", mutation_rate=0.0, iterations=60)
    still.run()
    assert len(still.ledger) <= 6
    evolved = Bench(tmp_path / "evolved", iterations=60)
    evolved.run()
    assert evolved.ranking[0]["score"] == everything.ranking[0]["score"]


def test_a_time_budget_ends_the_search(tmp_path):
    bench = Bench(tmp_path, max_seconds=1e-6, iterations=1000)
    bench.run()
    assert len(bench.rows) == 1


def test_without_a_space_the_student_alone_is_scored(tmp_path):
    bench = Bench(tmp_path, space={}, iterations=1000)
    bench.run()
    assert [entry["arguments"] for entry in bench.ranking] == [{}]
    assert len(bench.rows) == 1
    assert bench.procedure.figures()["score"] < 0


def test_pick_takes_another_place(tmp_path):
    first, third = Bench(tmp_path / "1"), Bench(tmp_path / "3", pick=3)
    first.run(), third.run()
    assert first.ranking == third.ranking
    assert third.built[-1] == (first.ranking[2]["arguments"], None)
    assert third.procedure.figures()["score"] == first.ranking[2]["score"]


def test_unlabelled_data_and_several_teachers_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="labelled"):
        Bench(tmp_path, source=data(labelled=False), strategy="all").run()
    kind = method_class("diswot")
    both = Ensemble([LiveTeacher(teacher_net()), LiveTeacher(teacher_net())])
    with pytest.raises(IncompatibleError, match="one network"):
        kind(kind.Options(), student=teacher_net(), teacher=both, data=data().info())
    with pytest.raises(ValueError, match="parents"):
        kind.Options(sample=2, parents=3)


@pytest.fixture
def known(monkeypatch):
    """The catalogue with the procedure, as it is after `make generate`."""
    kind = method_class("diswot")
    entry = {
        "card": kind.card.as_dict(),
        "description": "",
        "trains": False,
        "options": kind.Options.model_json_schema(),
    }
    monkeypatch.setitem(catalogue.read(), "diswot", entry)


def recipe(**search):
    small = {"name": "convnet", "arguments": {"width": 4, "depth": 1}}
    train = {"steps": 2, "batch_size": 16}
    return {
        "data": {"name": "digits", "limit": 64},
        "stages": [
            {"name": "teacher", "method": "supervised", "student": small, "train": train},
            {"name": "search", "method": "diswot", "teacher": "stage:teacher", "student": "convnet", **search},
            {"name": "kd", "method": "kd", "teacher": "stage:teacher", "student": "stage:search", "train": train},
        ],
    }


@pytest.mark.usefixtures("known")
def test_the_winner_is_distilled_by_the_next_stage(tmp_path):
    options = {"space": {"width": [2, 3], "depth": [1, 2]}, "strategy": "all", "batch_size": 16}
    run = limbeck.run(recipe(options=options), tmp_path / "run", quiet=True)
    ranking = json.loads((tmp_path / "run/checkpoints/search/ranking.json").read_text())
    results = run.results()
    assert len(ranking) == 4
    assert results["search"]["score"] == ranking[0]["score"]
    assert results["kd"]["parameters"] == ranking[0]["parameters"] == results["search"]["parameters"]
    student = limbeck.load(tmp_path / "run")
    assert {name: student.config[name] for name in ("width", "depth")} == ranking[0]["arguments"]
    assert [row["step"] for row in run.metrics("search")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("known")
def test_a_student_that_is_there_already_has_no_variants(tmp_path):
    stored = {"student": {"name": "stage:teacher"}, "options": {"space": {"width": [2, 3]}}}
    with pytest.raises(IncompatibleError, match="none was admitted"):
        limbeck.run(recipe(**stored), tmp_path / "run", quiet=True)


@pytest.mark.usefixtures("known")
def test_a_sweep_can_search_for_the_score(tmp_path):
    pytest.importorskip("optuna")
    tree = recipe(options={"batch_size": 16})
    tree["stages"] = tree["stages"][:2]
    path = tmp_path / "score.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    sweep = limbeck.sweep(
        path, ["search.student.arguments.width=2,8"], tmp_path / "out", trials=3, metric="score", quiet=True
    )
    assert sweep.best.metric == max(trial.metric for trial in sweep.trials) < 0
