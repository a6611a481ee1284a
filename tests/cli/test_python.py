"""The Python API: `distill` with objects of one's own, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.core import catalogue, registry
from limbeck.core.card import Card
from limbeck.core.errors import UsageError
from limbeck.core.method import Method, Update
from limbeck.core.registry import register
from limbeck.core.teacher import TeacherSignal
from limbeck.data.open import DataSplit
from limbeck.data.source import ArraySource
from tests.cli.conftest import TINY, contents, write

QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8, "quiet": True}


class Own(nn.Module):
    """A network of the user's own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (items, 3)."""
        return self.net(image)


class Oracle:
    """A teacher of the user's own that is no module."""

    fingerprint = "oracle"

    def signal(self, batch: Any, layers: Any = ()) -> TeacherSignal:
        """Knows the labels."""
        return TeacherSignal(5.0 * nn.functional.one_hot(batch["label"], 3).float())

    def to(self, device: Any) -> None:
        """Holds nothing."""


@pytest.fixture
def arrays() -> tuple[Tensor, Tensor]:
    """Thirty images of three classes."""
    draws = torch.Generator().manual_seed(0)
    return torch.rand(30, 1, 4, 4, generator=draws), torch.arange(30) % 3


def test_names_are_those_of_the_package() -> None:
    assert set(limbeck.__all__) <= set(dir(limbeck))
    for name in limbeck.__all__:
        assert callable(getattr(limbeck, name))
    with pytest.raises(AttributeError, match="distil'"):
        limbeck.distil  # noqa: B018


def test_names_only(tmp_path: Path) -> None:
    data = {"name": "digits", "limit": 32}
    teacher = limbeck.distill("supervised", student="mlp", data=data, out=tmp_path / "teacher", **QUICK)
    run = limbeck.distill(
        "kd", teacher=f"run:{teacher.folder}", student={"name": "mlp", "arguments": {"width": 4}}, data=data,
        out=tmp_path / "student", options={"temperature": 2}, optimizer={"lr": 0.01}, seed=3, **QUICK,
    )  # fmt: skip
    recipe = run.recipe()
    assert recipe.seed == 3
    assert recipe.stages[0].options == {"temperature": 2}
    assert recipe.stages[0].train is not None
    assert recipe.stages[0].train.optimizer.lr == 0.01
    assert {"accuracy", "agreement", "parameters"} <= set(run.results()["distil"])
    assert limbeck.evaluate(run)["accuracy"] == run.results()["distil"]["accuracy"]


def test_objects(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    teacher, student = Own(16), Own()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    started = {name: value.clone() for name, value in student.state_dict().items()}
    run = limbeck.distill("kd", teacher=teacher, student=student, data=arrays, out=tmp_path / "run", **QUICK)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert any(not torch.equal(started[name], value) for name, value in student.state_dict().items())
    assert run.recipe().stages[0].student.name == "object:Own"
    loaded = limbeck.load(run.folder, model=Own())
    assert all(torch.equal(student.state_dict()[name], value) for name, value in loaded.state_dict().items())
    assert not loaded.training


def test_several_teachers_of_all_kinds(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    teachers = [Own(), Oracle(), "mlp"]
    run = limbeck.distill("kd", teacher=teachers, student=Own(), data=arrays, out=tmp_path / "run", **QUICK)
    assert [spec.name for spec in run.recipe().stages[0].teacher] == ["object:Own", "object:Oracle", "mlp"]
    assert "agreement" in run.results()["distil"]


def test_data_of_all_kinds(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = arrays
    source = ArraySource(images, labels)
    kinds: dict[str, dict[str, Any]] = {
        "arrays": {"data": (images.numpy(), labels.numpy()), "validation": (images[:6], labels[:6])},
        "source": {"data": source},
        "split": {"data": DataSplit(source, ArraySource(images[:5], labels[:5], classes=3))},
    }
    items = {}
    for name, given in kinds.items():
        run = limbeck.distill("supervised", student=Own(), out=tmp_path / name, **given, **QUICK)
        items[name] = run.results()["distil"]["items"]
    assert items == {"arrays": 6, "source": 6, "split": 5}


def test_resuming_continues(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": arrays, "out": tmp_path / "run", **QUICK}
    with pytest.raises(ZeroDivisionError):
        limbeck.distill("supervised", student=Own(), watch=lambda *row: 1 // 0, **given)
    with pytest.raises(UsageError, match="resume"):
        limbeck.distill("supervised", student=Own(), **given)
    run = limbeck.distill("supervised", student=Own(), resume=True, **given)
    assert run.status()["status"] == "done"


def test_the_watcher_sees_the_rows(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    rows = []
    run = limbeck.distill(
        "supervised", student=Own(), data=arrays, out=tmp_path / "run",
        log_every=1, watch=lambda *row: rows.append(row), **QUICK,
    )  # fmt: skip
    assert [(stage, steps, row["step"]) for stage, steps, row in rows] == [("distil", 3, step) for step in (1, 2, 3)]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Forgets afterwards what a test registered: other tests in this process look at all methods."""
    yield
    for table in (registry._registered, catalogue.read()):
        for slug in [slug for slug in table if slug.startswith("tests-")]:
            del table[slug]


@pytest.mark.usefixtures("own_methods")
def test_a_method_registered_by_the_caller(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    @register
    class Constant(Method):
        """Pulls the logits to zero."""

        card = Card("tests-constant", "A test", "", 2026, "classic", "classification", ("student",), "For this test.")

        def step(self, batch: Any) -> Any:
            yield Update("student", self.student(batch["image"]).square().mean(), batch.size)

    run = limbeck.distill("tests-constant", student=Own(), data=arrays, out=tmp_path / "run", **QUICK)
    assert run.status()["status"] == "done"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "kdd"}, "distil.method"),
        ({"teacher": None}, "distil.teacher"),
        ({"temperature": 3}, "options="),
        ({"batchsize": 8}, "'batch_size'"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr"),
        ({"options": {"temprature": 3}}, "'temperature'"),
        ({"student": "convnt"}, "'convnet'"),
        ({"data": "digit"}, "'digits'"),
        ({"data": [1, 2]}, "data: a list is no data"),
        ({"data": "digits", "validation": (1, 2)}, "validation"),
        ({"epochs": 2}, "steps"),
        ({"steps": None}, "distil.train"),
        ({"seed": -1}, "seed"),
        ({"track": ["tensorbord"]}, "'tensorboard'"),
    ],
)
def test_refusals(change: dict[str, Any], says: str, arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    given = {"method": "kd", "teacher": Own(), "student": Own(), "data": arrays, "steps": 3, **change}
    with pytest.raises(UsageError) as caught:
        limbeck.distill(given.pop("method"), **given, out=tmp_path / "run")
    assert says in str(caught.value)
    assert not contents(tmp_path)


def test_one_object_cannot_be_both(arrays: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = Own()
    with pytest.raises(UsageError, match="one object"):
        limbeck.distill("kd", teacher=model, student=model, data=arrays, out=tmp_path / "run", **QUICK)


def test_recipes_of_all_kinds(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.yaml", TINY)
    one = limbeck.run(file, tmp_path / "one", overrides={"distil.train.steps": 3}, quiet=True)
    assert limbeck.run(one.folder, resume=True, quiet=True).results() == one.results()
    other = limbeck.run(one.recipe(), tmp_path / "other", quiet=True)
    assert other.results()["distil"]["accuracy"] == one.results()["distil"]["accuracy"]
    with pytest.raises(UsageError, match="folder"):
        limbeck.run(TINY)
    with pytest.raises(UsageError, match="overrides"):
        limbeck.run(TINY, tmp_path / "third", overrides={"seed": 1})


def test_what_is_no_finished_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        limbeck.load(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    with pytest.raises(UsageError, match="not finished"):
        limbeck.load(tmp_path)
    with pytest.raises(UsageError, match="not finished"):
        limbeck.evaluate(tmp_path)
