"""Plans: what is predicted without time, and that no run's folder is touched."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.core.run import Run
from limbeck.experiment import Experiment
from limbeck.metrics.memory import PeakMemory
from limbeck.planning import Plan
from limbeck.running import resolve
from tests.cli.conftest import TINY, Command, contents


@pytest.fixture(scope="module")
def plan() -> Plan:
    return limbeck.plan(TINY)


def test_parameters(plan: Plan) -> None:
    teacher, distil = plan.stages
    assert (teacher.student_parameters, teacher.teacher_parameters) == (64 * 16 + 16 + 16 * 10 + 10, 0)
    assert (distil.student_parameters, distil.teacher_parameters) == (64 * 8 + 8 + 8 * 10 + 10, 1210)
    assert [stage.steps for stage in plan.stages] == [4, 4]


def test_operations_of_a_step(plan: Plan) -> None:
    teacher, distil = plan.stages
    items = 16
    first, head = 2 * 64 * 16 * items, 2 * 16 * 10 * items
    # Backward: weights of both layers, and the head's input; nothing asks for the gradient of the images.
    assert teacher.flops_step == 2 * first + 3 * head
    assert distil.flops_teacher == first + head
    assert distil.flops_step == first + head + (2 * first + 3 * head) / 2


def test_disk(plan: Plan, finished: Path) -> None:
    for stage in plan.stages:
        kept = [*(finished / "checkpoints" / stage.stage).rglob("*.safetensors")]
        actual = sum(file.stat().st_size for file in [*kept, finished / "stages" / stage.stage / "model.safetensors"])
        assert stage.disk_bytes == pytest.approx(actual, rel=0.25)  # the files' headers weigh in such small ones


def test_memory(plan: Plan, tmp_path: Path) -> None:
    tree = copy.deepcopy(TINY)
    for stage in tree["stages"]:
        stage["train"]["evaluate_every"] = 2  # the peak of so small a model is in its evaluation
    recipe = resolve(tree)
    experiment = Experiment(recipe, Run(tmp_path / "run"))
    experiment.prepare(recipe.stages[0])
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        with PeakMemory() as peak:
            prepared = experiment.prepare(stage)
            experiment.results[stage.name] = experiment.trainer(stage, prepared, lambda row: None).fit()
        assert planned.memory_bytes == pytest.approx(peak.peak_bytes, rel=0.25)


def test_time_is_steps_times_a_step_and_more(plan: Plan) -> None:
    for stage in plan.stages:
        assert stage.seconds >= stage.seconds_step * stage.steps > 0
    assert plan.seconds == sum(stage.seconds for stage in plan.stages)


def test_the_command(tmp_path: Path, limbeck: Command, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["digits-kd", "--teacher.student.arguments.width", "2", "--distilled.train.batch_size", "8"]
    outcome = limbeck("plan", *words)
    assert outcome.code == 0, outcome.err
    for text in ("distilled", "kd", "FLOPs a step", "in all", "on disk", "KiB"):
        assert text in outcome.out
    stages = json.loads(limbeck("plan", *words, "--json").out)["stages"]
    assert [stage["stage"] for stage in stages] == ["teacher", "alone", "distilled"]
    assert not contents(tmp_path)
