"""How runs become groups, stages become series, and who plays which part."""

import pytest

from limbeck.core.recipe import check_recipe
from limbeck.report.charts import curves
from limbeck.report.headline import headline
from limbeck.report.predictions import NothingToShow
from limbeck.report.story import ALONE, FIRST_OTHER, STUDENT, TEACHER, Cast, Story
from tests.report.conftest import TRAIN, recipe, write_run


def test_roles_of_the_stages():
    cast = Cast.of(check_recipe(recipe()))
    assert cast.student.name == "distilled"
    assert cast.teacher is not None
    assert cast.teacher.name == "teacher"
    assert cast.alone is not None
    assert cast.alone.name == "alone"


def test_a_longer_trained_student_is_no_baseline():
    tree = recipe()
    tree["stages"][1]["train"] = {**TRAIN, "steps": 60}
    assert Cast.of(check_recipe(tree)).alone is None


def test_groups_differ_in_more_than_their_seed(finished, tmp_path):
    other = write_run(tmp_path / "x", recipe(data={"name": "digits", "limit": 40}))
    story = Story.of([finished[2], other, finished[0]])
    assert [[view.recipe.seed for view in group.views] for group in story.groups] == [[0, 2], [0]]
    assert story.groups[0].name == finished[0].parent.name
    colours = [series.colour for series in story.series]
    assert colours == [TEACHER, ALONE, STUDENT, FIRST_OTHER, FIRST_OTHER + 1, FIRST_OTHER + 2]


def test_groups_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / n / "run", recipe(data={"name": "digits", "limit": int(n)})) for n in ("40", "50")]
    assert [group.name for group in Story.of(runs).groups] == ["run", "run (2)"]


def test_long_names_are_cut_in_the_middle(tmp_path):
    (group,) = Story.of([write_run(tmp_path / ("a" * 90 + "z" * 90), recipe())]).groups
    assert group.name == "a" * 20 + "…" + "z" * 19


def test_predictions_are_those_that_were_measured(finished):
    story = Story.of(finished)
    for view in story.views:
        said = story.predictions(view)
        assert said.complete
        for stage, figures in view.results.items():
            right = 1 - said.wrong(stage).float().mean()
            assert float(right) == pytest.approx(figures["accuracy"])
        same = (said.best("distilled") == said.best("teacher")).float().mean()
        assert float(same) == pytest.approx(view.results["distilled"]["agreement"])
        assert said.image(0).shape == (1, 8, 8)


def test_agreement_is_known_of_every_student(finished):
    story = Story.of(finished)
    teacher, alone, distilled = story.series
    assert story.agreement(teacher) is None
    assert story.agreement(distilled) == pytest.approx(sum(distilled.values("agreement")) / 3)
    assert 0 < (story.agreement(alone) or 0) <= 1


def test_a_teacher_from_elsewhere_is_shown_too(finished, tmp_path):
    tree = recipe(stages=[{**recipe()["stages"][2], "teacher": f"run:{finished[0]}"}])
    from limbeck.running import run

    view = Story.of([run(check_recipe(tree), tmp_path / "run", quiet=True).folder]).views[0]
    said = Story.of([view.run]).predictions(view)
    assert list(said.probabilities) == ["teacher (given)", "distilled"]


def test_too_large_a_model_is_not_run(tmp_path):
    story = Story.of([write_run(tmp_path / "x", recipe(), results={"teacher": {"parameters": 1e9}})])
    for _ in range(2):  # also when asked again
        with pytest.raises(NothingToShow, match="too large"):
            story.predictions(story.views[0])


def _with_accuracies(folder, alone, distilled):
    tree = recipe()
    figures = [
        {
            "teacher": {"accuracy": 0.9, "parameters": 5000},
            "alone": {"accuracy": theirs},
            "distilled": {"accuracy": ours, "parameters": 100},
        }
        for theirs, ours in zip(alone, distilled, strict=True)
    ]
    runs = [write_run(folder / str(n), {**tree, "seed": n}, results=one) for n, one in enumerate(figures)]
    story = Story.of(runs)
    return headline(story, story.groups[0])


def test_the_headline_says_how_sure_it_is(tmp_path):
    said = _with_accuracies(tmp_path, [0.80, 0.82, 0.84], [0.83, 0.84, 0.88])
    detail = said.detail.replace("\N{NO-BREAK SPACE}", " ")
    assert said.title.replace("\N{NO-BREAK SPACE}", " ").startswith("Taught, the student is right on 85.0 %")
    assert "+3.0 points over 3 seeds (95 % interval +0.5 to +5.5), better on 3 of them" in detail
    assert "50 times fewer than its teacher, which is right on 90.0 %" in detail


def test_the_headline_does_not_hide_a_loss(tmp_path):
    detail = _with_accuracies(tmp_path, [0.80, 0.84], [0.78, 0.80]).detail.replace("\N{NO-BREAK SPACE}", " ")
    assert "−3.0 points over 2 seeds" in detail
    assert "better on 0 of them" in detail


def test_curves_hold_the_mean_of_seeds_and_no_infinities(tmp_path):
    for seed, losses in enumerate(([4.0, 2.0], [2.0, float("inf")])):
        rows = [{"stage": "alone", "step": 10 * n, "student/loss": loss} for n, loss in enumerate(losses, 1)]
        write_run(tmp_path / str(seed), recipe(seed), rows=rows)
    section = curves(Story.of([tmp_path / "0", tmp_path / "1"]))
    assert section is not None
    (chart,) = section.data["charts"]  # type: ignore[index]
    assert chart["name"] == "loss"
    (line,) = chart["lines"]
    assert line["mean"] == [[10, 20], [3.0, float("inf")]]
    assert line["series"] == 1


def test_long_curves_are_thinned_and_end_where_they_end(tmp_path):
    rows = [{"stage": "alone", "step": n, "fake/loss": 1.0, "other": "text"} for n in range(1, 100_001)]
    section = curves(Story.of([write_run(tmp_path / "0", recipe(), rows=rows)]))
    assert section is not None
    steps = section.data["charts"][0]["lines"][0]["seeds"][0][0]  # type: ignore[index]
    assert len(steps) < 5000
    assert steps[-1] == 100_000
