"""What the report shows of generators: their samples, their figures, and the headline."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import limbeck
from limbeck.core.recipe import check_recipe
from limbeck.core.run import Run
from limbeck.report import write_report
from limbeck.report.figures import shown_figures
from limbeck.report.headline import headline
from limbeck.report.samples import samples
from limbeck.report.story import Story
from limbeck.running import run
from limbeck.sampling import draw
from tests.report.conftest import write_run

NETWORK = {"name": "denoiser", "arguments": {"width": 8, "depth": 1}}
FIGURES = {"items": 10, "frechet": 2.0, "sliced_wasserstein": 0.3, "judged": 0.8, "parameters": 1000}


def recipe(seed: int = 0) -> dict[str, Any]:
    """A diffusion teacher of five steps, and a consistency model distilled from it."""
    train = {"steps": 2, "batch_size": 8}
    stages = [
        {"name": "teacher", "method": "denoising", "student": NETWORK, "options": {"steps": 5}, "train": train},
        {
            "name": "student",
            "method": "consistency-distillation",
            "teacher": "stage:teacher",
            "student": NETWORK,
            "train": train,
        },
    ]
    return {"seed": seed, "data": {"name": "digits", "limit": 40, "mean": [0.5], "std": [0.5]}, "stages": stages}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests only read it."""
    return run(check_recipe(recipe()), tmp_path_factory.mktemp("generators") / "run", quiet=True).folder


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def captions(body: str) -> list[str]:
    """Texts under the pictures."""
    return [plain(re.sub("<.*?>", "", text)) for text in re.findall("<figcaption>(.*?)</figcaption>", body)]


def images(body: str) -> list[Image.Image]:
    found = re.findall("data:image/png;base64,([A-Za-z0-9+/=]+)", body)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_few_step_students_are_shown_at_one_two_and_four_steps(drawn):
    section = samples(Story.of([drawn]))
    assert section is not None
    figures = Run.open(drawn).results()
    expected = [("teacher, 5 steps", figures["teacher"])]
    expected += [
        (f"student, {steps} step{'s' if steps != '1' else ''}", figures["student"]["by_steps"][steps])
        for steps in ("1", "2", "4")
    ]
    shown = captions(section.body)
    assert len(shown) == 4
    for caption, (title, known) in zip(shown, expected, strict=True):
        assert caption.startswith(f"{title}: Fréchet distance {known['frechet']:.2f}, sliced Wasserstein ")
        assert f"{known['sliced_wasserstein']:.3f}, {100 * known['judged']:.0f} % seen as asked, " in caption
        assert re.search(rf" {known['evaluations']} evaluations?, .* a sample$", caption)
    assert "seed 0" in section.lead
    assert f"alt='samples of {expected[1][0]}'" in section.body


def test_the_pictures_are_what_the_stages_draw_from_the_same_noise(drawn):
    section = samples(Story.of([drawn]))
    pictures = images(section.body)
    assert {picture.size for picture in pictures} == {(10 * 33, 4 * 33)}  # 40 samples of 8 pixels, enlarged and framed
    opened = Run.open(drawn)
    for picture, steps in zip(pictures[1:], (1, 2, 4), strict=True):
        student = limbeck.load(drawn)
        expected = (draw(student, opened, 40, steps=steps)[0, 0] * 255).round()
        first = torch.tensor(list(picture.crop((0, 0, 32, 32)).tobytes())).view(32, 32)[::4, ::4]
        assert (first - expected).abs().max() <= 1
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_the_page_holds_the_panel_and_generators_figures(drawn, tmp_path):
    page = plain(write_report([drawn], tmp_path / "report.html").read_text())
    assert '<section id="samples"' in page or "<section id='samples'" in page
    for title in ("Fréchet distance", "Seen as asked", "Evaluations", "A sample"):
        assert title in page
    assert "Accuracy" not in page.partition("What they draw")[0].partition("<section")[2]


def test_a_student_s_own_number_of_steps_is_shown_too(drawn, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(drawn, copy)
    results = Run.open(copy).results()
    del results["student"]["by_steps"]["1"]
    (copy / "results.json").write_text(json.dumps(results))
    shown = captions(samples(Story.of([copy])).body)
    assert [text.partition(":")[0] for text in shown[1:]] == ["student, 2 steps", "student, 4 steps", "student, 1 step"]


def test_classifiers_have_no_such_panel(finished):
    assert samples(Story.of(finished[:1])) is None


def test_an_unfinished_run_has_none_and_a_started_one_what_is_there(drawn, tmp_path):
    assert samples(Story.of([write_run(tmp_path / "x", recipe(), results={})])) is None
    copy = tmp_path / "run"
    shutil.copytree(drawn, copy)
    results = {"teacher": Run.open(copy).results()["teacher"]}
    (copy / "results.json").write_text(json.dumps(results))
    assert [text.partition(":")[0] for text in captions(samples(Story.of([copy])).body)] == ["teacher, 5 steps"]


@pytest.mark.parametrize(
    ("results", "files", "says"),
    [
        ({"teacher": FIGURES}, None, "No samples: "),
        ({"teacher": FIGURES | {"parameters": 10**9}}, None, "too large to be run"),
        ({"teacher": FIGURES}, {"config.json": "{"}, "No samples: "),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, results, files, says):
    folder = write_run(tmp_path / "x", recipe(), results=results)
    if files is not None:
        place = folder / "stages" / "teacher"
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_text(content)
    section = samples(Story.of([folder]))
    assert says in section.body
    assert "<img" not in section.body
    assert write_report([folder], tmp_path / "report.html").is_file()


def measured(folder: Path, teacher: dict[str, Any] | None, student: dict[str, Any]) -> Story:
    results = {"student": FIGURES | student} | ({} if teacher is None else {"teacher": FIGURES | teacher})
    return Story.of([write_run(folder, recipe(), results=results)])


def test_the_headline_of_generators(tmp_path):
    story = measured(
        tmp_path / "x",
        {"frechet": 1.5, "evaluations": 50, "seconds_per_sample": 0.4},
        {"frechet": 2.25, "evaluations": 1, "seconds_per_sample": 0.01},
    )
    said = headline(story, story.groups[0])
    assert said.title == (
        "The student's samples take 1 evaluation and lie 2.25 from the data (Fréchet); its teacher's 50, and 1.50."
    )
    assert said.detail == "A sample takes 40 times less time."


@pytest.mark.parametrize(
    ("seconds", "detail"),
    [(0.1, "A sample takes 4.0 times less time."), (0.5, "The student has 1 k parameters.")],
)
def test_the_headline_says_what_a_sample_costs_where_it_is_less(tmp_path, seconds, detail):
    teacher = {"evaluations": 50, "seconds_per_sample": 0.4}
    story = measured(tmp_path / "x", teacher, {"evaluations": 4, "seconds_per_sample": seconds})
    assert plain(headline(story, story.groups[0]).detail) == detail


def test_the_headline_of_a_generator_whose_teacher_is_not_measured(tmp_path):
    story = measured(tmp_path / "x", None, {"evaluations": 4, "seconds_per_sample": 0.1})
    said = headline(story, story.groups[0])
    assert said.title == "The student's samples take 4 evaluations and lie 2.00 from the data (Fréchet)."
    assert plain(said.detail) == "The student has 1 k parameters."


def test_the_columns_of_generators(tmp_path):
    seeds = [
        write_run(
            tmp_path / "g" / f"seed-{seed}",
            recipe(seed),
            results={
                "teacher": FIGURES | {"evaluations": 5, "seconds_per_sample": 0.2},
                "student": FIGURES
                | {"frechet": 1.0 + seed, "judged": 0.5 + 0.2 * seed, "evaluations": 1, "seconds_per_sample": second},
            },
        )
        for seed, second in ((0, 0.003), (1, 0.5), (2, 0.004))
    ]
    story = Story.of(seeds)
    cells = {key: [plain(cell) for cell in row] for key, row in shown_figures(story, story.series).items()}
    assert cells["frechet"] == ["2.00", "2.00"]
    assert cells["judged"] == ["80.0 %", "70.0 %"]
    assert cells["evaluations"] == ["5", "1"]
    assert cells["seconds_per_sample"] == ["200 ms", "4 ms"]  # the median, not the mean
    assert "accuracy" not in cells
