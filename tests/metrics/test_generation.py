"""Evaluating generators, where what they draw and what that costs is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.teacher import LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import Denoiser, Process, Sampling, note_process
from limbeck.diffusion.generation import count_evaluations, generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import EDM, Cosine, VPDiscrete
from limbeck.diffusion.solvers import SOLVERS
from limbeck.diffusion.steps import drawing_from, renoise
from limbeck.metrics.distances import frechet_distance, sliced_wasserstein
from limbeck.metrics.generation import evaluate_few_steps, evaluate_generation, noise_for, step_noise
from limbeck.metrics.tasks import details_for, evaluate_for

SHAPE = (1, 2, 2)
MEANS = torch.tensor([[0.8, 0.8, -0.8, -0.8], [-0.8, 0.8, -0.8, 0.8], [-0.8, -0.8, 0.8, 0.8]])


def source(classes: bool = True, items: int = 60) -> ArraySource:
    """Images of two by two pixels around the three means, normalised to [-1, 1]."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(items) % 3
    pixels = (MEANS[labels] + 0.05 * torch.randn(items, 4, generator=draws)) / 2 + 0.5
    given = labels if classes else None
    return ArraySource(pixels.clamp(0, 1).view(-1, *SHAPE), given, normalisation=([0.5], [0.5]))


def exact(schedule: Any = None, steps: int = 20, solver: str = "ddim", guidance: float = 1.0) -> Any:
    """The mixture's own denoiser."""
    denoiser = GaussianMixtureDenoiser(MEANS, 0.05, schedule or Cosine(), labels=torch.arange(3))
    denoiser.sampling = Sampling(solver, steps, guidance)  # type: ignore[arg-type]  # names of solvers
    return denoiser


class Pointing(nn.Module):
    """Says x0: the mean of the class that it is asked for, and 0 for any other; counts its items."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.cat([MEANS.roll(wrong, 0), torch.zeros(1, 4)]))
        self.asked: list[int] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        self.asked.append(len(x))
        self.modes.append(self.training)
        if "label" not in condition:
            return 0 * x
        return self.means[condition["label"].clamp(max=3)].view_as(x)


def pointing(wrong: int = 0, schedule: Any = None, told: bool = False, **sampling: Any) -> Pointing:
    made = Process(schedule or Cosine(), Direct("x0"), Sampling(**sampling), null_label=3, guidance_input=told)
    network = Pointing(wrong)
    note_process(network, made)
    return network


def test_a_network_of_known_samples():
    data = source()
    figures = evaluate_generation(pointing(steps=3), data, batch_size=16)
    everything = data.fetch(torch.arange(60))
    samples = MEANS[everything["label"]].view(-1, *SHAPE)
    assert figures["items"] == 60
    assert figures["sliced_wasserstein"] == pytest.approx(sliced_wasserstein(samples, everything["image"]), rel=1e-4)
    assert figures["frechet"] == pytest.approx(
        frechet_distance(samples.flatten(1), everything["image"].flatten(1)), rel=1e-3, abs=1e-6
    )
    assert figures["judged"] == 1.0
    assert figures["evaluations"] == 3
    assert 0 < figures["seconds_per_sample"] < 1
    assert "endpoint_error" not in figures


def test_samples_of_the_wrong_class_are_seen():
    assert evaluate_generation(pointing(wrong=1, steps=1), source())["judged"] == 0.0


def test_the_exact_denoiser_is_close_to_its_data():
    good = evaluate_generation(exact(steps=30), source())
    coarse = evaluate_generation(exact(steps=1), source(classes=False))
    assert good["judged"] == 1.0
    assert good["sliced_wasserstein"] < 0.05
    assert coarse["sliced_wasserstein"] > 4 * good["sliced_wasserstein"]  # one step gives the mean of all classes
    assert coarse["frechet"] > 10 * good["frechet"]


def test_steps_given_win_over_the_process():
    network = pointing(steps=3)
    figures = evaluate_generation(network, source(), steps=2, batch_size=60)
    assert figures["evaluations"] == len(network.asked) == 2


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_evaluations_are_those_that_are_made(solver, told, guidance):
    for schedule, steps in ((Cosine(), 4), (VPDiscrete.named("linear"), 1)):
        network = pointing(schedule=schedule, told=told, solver=solver, steps=steps, guidance=guidance)
        figures = evaluate_generation(network, source(items=10), batch_size=10)
        assert sum(network.asked) == 10 * figures["evaluations"]
        expected = (2 * steps - 1 if solver == "heun" else steps) * (2 if guidance != 1 and not told else 1)
        assert figures["evaluations"] == expected


def test_evaluations_of_heun_on_edm_s_grid_and_without_classes():
    network = pointing(schedule=EDM(), solver="heun", steps=5, guidance=3.0)
    figures = evaluate_generation(network, source(classes=False, items=10), batch_size=10)
    assert figures["evaluations"] == sum(network.asked) / 10 == 9  # nothing to leave out: guidance costs nothing
    assert count_evaluations(exact(steps=5, solver="heun", guidance=3.0), {"label": torch.zeros(1)}) == 18
    assert count_evaluations(exact(steps=5), {}, steps=3, guidance=2.0) == 3


def test_data_without_classes_are_not_judged():
    figures = evaluate_generation(exact(), source(classes=False))
    assert "judged" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_labels_that_are_missing_are_left_to_the_network():
    pixels, labels = torch.rand(12, *SHAPE), torch.tensor([0, 1, -100] * 4)
    asked = []

    class Listening(Pointing):
        def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
            asked.extend(condition["label"].tolist())
            return super().forward(x, time, condition)

    network = Listening()
    note_process(network, Process(Cosine(), Direct("x0"), Sampling(steps=1), null_label=3))
    figures = evaluate_generation(network, ArraySource(pixels, labels, normalisation=([0.5], [0.5])))
    assert asked == [0, 1, 3] * 4
    assert 0 <= figures["judged"] <= 1


def test_the_end_points_of_the_teacher_s_own_student_are_its_own():
    teacher = exact(steps=5)
    figures = evaluate_generation(exact(steps=5), source(), teacher=LiveTeacher(teacher), batch_size=7)
    assert figures["endpoint_error"] == 0
    random = exact(steps=5, solver="ancestral")
    assert evaluate_generation(random, source(), teacher=LiveTeacher(random))["endpoint_error"] == 0
    batch = source().fetch(torch.arange(60))
    with torch.no_grad():
        theirs = generate(teacher, noise_for(batch), {"label": batch["label"]})
    expected = float((MEANS[batch["label"]].view(-1, *SHAPE) - theirs).square().mean())
    measured = evaluate_generation(pointing(steps=1), source(), teacher=LiveTeacher(teacher), batch_size=13)
    assert expected > 1e-5
    assert measured["endpoint_error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "ancestral", "consistency"])
def test_figures_do_not_depend_on_the_batch_size(solver):
    few, many = (evaluate_generation(exact(steps=4, solver=solver), source(), batch_size=size) for size in (7, 60))
    for name in ("sliced_wasserstein", "frechet", "judged", "evaluations"):
        assert few[name] == pytest.approx(many[name], rel=1e-4, abs=1e-7)


def test_the_model_is_measured_in_eval_mode_and_left_as_it_was():
    network = pointing(steps=1).train()
    paused = []
    evaluate_generation(network, source(), batch_size=20, pause=lambda: paused.append(1))
    assert network.modes == [False] * 3
    assert network.training
    assert len(paused) == 3
    assert network.means.grad is None


def test_features_of_one_s_own():
    figures = evaluate_generation(pointing(steps=1), source(), extractor=lambda images: images.flatten(1)[:, :1] * 10)
    plain = evaluate_generation(pointing(steps=1), source(), extractor=lambda images: images.flatten(1)[:, :1])
    assert figures["frechet"] == pytest.approx(100 * plain["frechet"], rel=1e-3)


def test_noise_is_each_item_s_own():
    data = source()
    whole = noise_for(data.fetch(torch.arange(60)))
    rows = torch.tensor([17, 3, 17])
    assert torch.equal(noise_for(data.fetch(rows)), whole[rows])
    assert not torch.equal(noise_for(data.fetch(rows), seed=1), whole[rows])
    assert abs(float(whole.mean())) < 0.2
    assert float(whole.std()) == pytest.approx(1, abs=0.15)
    half = Batch({"image": torch.empty(2, *SHAPE, dtype=torch.bfloat16), "index": torch.arange(2)})
    assert noise_for(half).dtype == torch.bfloat16


@pytest.mark.parametrize("solver", ["consistency", "tcd"])
def test_consistency_models_are_measured_at_one_two_and_four_steps(solver):
    network = pointing(steps=8, solver=solver)
    figures = evaluate_few_steps(network, source())
    assert list(figures) == ["1", "2", "4"]
    assert [one["evaluations"] for one in figures.values()] == [1, 2, 4]
    assert details_for("generation", network, source(items=10))["by_steps"]["4"]["items"] == 10
    assert details_for("classification", network, source()) == {}
    assert evaluate_for("generation") is evaluate_generation


def test_other_generators_are_measured_at_their_own_number_of_steps():
    assert evaluate_few_steps(pointing(steps=1), source()) == {}
    assert details_for("generation", pointing(steps=1), source()) == {}


def test_what_is_no_denoiser_is_refused():
    with pytest.raises(ValueError, match="note its process"):
        evaluate_generation(nn.Linear(2, 2), source())
    assert isinstance(exact(), Denoiser)


def test_the_noise_of_random_steps_is_each_item_s_own_and_fresh_in_each():
    like = torch.empty(3, *SHAPE)
    draw = step_noise(torch.tensor([4, 9, 2]))
    first, second = draw(like), draw(like)
    assert not bool((first == second).any())
    alone = step_noise(torch.tensor([9]))
    assert torch.equal(alone(like[:1]), first[1:2])
    assert torch.equal(alone(like[:1]), second[1:2])
    assert not bool((step_noise(torch.tensor([4, 9, 2]), seed=1)(like) == first).any())
    x0, s = torch.zeros(3, *SHAPE), torch.tensor(0.5)
    with drawing_from(step_noise(torch.tensor([4, 9, 2]))):
        expected = math.sin(math.pi / 4) * first
        assert torch.allclose(renoise(x0, s, Cosine()), expected)
        with drawing_from(torch.zeros_like):
            assert not renoise(x0, s, Cosine()).any()
        assert torch.allclose(renoise(x0, s, Cosine()), math.sin(math.pi / 4) * second)
    torch.manual_seed(0)
    outside = renoise(x0, s, Cosine())
    torch.manual_seed(0)
    assert torch.allclose(outside, math.sin(math.pi / 4) * torch.randn_like(x0))
