"""InstaFlow's loss by hand, its pairs, phases and students."""

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.core.specs import TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.pairs import PairSource, pair_noise
from limbeck.data.source import ArraySource
from limbeck.diffusion.decoding import note_decoder
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.pairs import PairSampling, endpoints
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.rectified import straightness
from limbeck.diffusion.schedules import Cosine, FlowMatching, VPDiscrete
from limbeck.methods.trajectory import instaflow as module
from limbeck.methods.trajectory.instaflow import InstaFlow
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.stacked import StackedDenoiser
from tests.methods.trajectory.toys import Linear, build, images, only_update

DATA = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))


class Shift(nn.Module):
    """A flow that shifts everything by one vector, v = shift: u = -shift."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        return -self.shift.expand_as(x)


def flow(network: nn.Module, null: int | None = None, guidance: bool = False) -> nn.Module:
    return note_process(network, Process(FlowMatching(), Direct("velocity"), Sampling("euler", 4), null, guidance))


def net(seed: int = 0, classes: int = 0, **changes: Any) -> DenoisingMLP:
    torch.manual_seed(seed)
    return DenoisingMLP(**{"numbers": 4, "classes": classes, "width": 16, "depth": 1, **changes})


def shifted(**options: Any) -> Any:
    """A method whose teacher shifts by one vector."""
    options = {"initialise": "none", "solver_steps": 3, **options}
    return build("instaflow", Linear(0.3, 0.2), DATA, teacher=flow(Shift(torch.full((1, 2, 2), 0.7))), **options)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, lambda u: u * 0.999 + 0.001),
        ({"eps": 0.1}, lambda u: u * 0.9 + 0.1),
        ({"times": "t0"}, lambda u: 0.001),
        ({"phase": "distil"}, lambda u: 0.0),
        ({"phase": "distil", "eps": 0.001}, lambda u: 0.001),
        ({"times": 2, "eps": 0.2}, lambda u: 0.2 if u < 0.5 else 0.6),
        ({"reduction": "half-sum"}, lambda u: u * 0.999 + 0.001),
    ],
)
def test_the_loss_by_hand(options, rows):
    method = shifted(**options)
    batch = images(DATA)
    update = only_update(method, batch)
    draws = method.draws(batch).uniform("time").tolist()
    noise = pair_noise(0, torch.arange(6), DATA)
    total = 0.0
    for u, x0 in zip(draws, noise.flatten(1).tolist(), strict=True):
        tau = rows(u)
        for number in x0:
            data = number + 0.7
            x = tau * data + (1 - tau) * number
            said = 0.3 * x + 0.2 * (1 - tau)  # the student's velocity u, at t = 1 - tau
            total += (-said - (data - number)) ** 2
    expected = total / 12 if options.get("reduction") == "half-sum" else total / 24
    assert update.loss.item() == pytest.approx(expected, rel=1e-5)
    assert update.logs["transport_cost"].item() == pytest.approx(4 * 0.49, rel=1e-5)


def test_one_step_by_number_is_one_step_by_name():
    losses = [only_update(shifted(times=times, eps=0.01), images(DATA)).loss for times in ("t0", 1)]
    assert torch.equal(*losses)


def test_a_student_that_shifts_as_the_teacher_does_has_no_loss():
    for phase in ("reflow", "distil"):
        teacher = flow(Shift(torch.full((1, 2, 2), 0.7)))
        options = {"phase": phase, "initialise": "none", "distance": "pseudo-huber", "eps": 0.0}
        for solver in ("euler", "heun", "rk45"):
            method = build("instaflow", copy.deepcopy(teacher), DATA, teacher=teacher, solver=solver, **options)
            assert only_update(method, images(DATA)).loss < 2e-5
        other = build("instaflow", Shift(torch.zeros(1, 2, 2)), DATA, teacher=teacher, **options)
        assert only_update(other, images(DATA)).loss > 0.5


def test_the_quirk_reaches_the_pairs():
    """Authors' Euler goes a full step of 1/N over a span of 1 - eps; one that spans it ends short by eps."""
    _, exact = shifted(eps=0.2).couple(images(DATA))
    _, quirk = shifted(eps=0.2, compat=True).couple(images(DATA))
    torch.testing.assert_close(exact, quirk)  # of a shift, both are whole
    bent = flow(net())
    made = [
        build("instaflow", net(1), DATA, teacher=bent, initialise="none", eps=0.2, compat=compat).couple(images(DATA))[
            1
        ]
        for compat in (False, True)
    ]
    noise = pair_noise(0, torch.arange(6), DATA)
    how = PairSampling(steps=25, eps=0.2, compat=True)
    torch.testing.assert_close(made[1], endpoints(NetworkDenoiser(bent), noise, how=how))
    assert (made[0] - made[1]).abs().max() > 1e-4


def test_pairs_are_made_once_and_are_a_function_of_run_and_item():
    asked = []
    teacher = flow(net())
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    method = build("instaflow", net(1), DATA, teacher=teacher, solver_steps=2, initialise="none")
    batch = images(DATA)
    noise, data = method.couple(batch)
    assert asked == [6, 6]
    method.clock = Clock(5, 100, 1.0, seed=99)
    again = method.couple(batch.select(torch.tensor([3, 1])))
    assert asked == [6, 6]
    assert torch.equal(again[0], noise[[3, 1]])
    assert torch.equal(again[1], data[[3, 1]])
    other = build("instaflow", net(1), DATA, teacher=teacher, solver_steps=2, initialise="none")
    torch.testing.assert_close(other.couple(batch.select(torch.tensor([2])))[1], data[[2]])
    other.clock = Clock(0, 100, 0.0, 7, run_seed=1)
    assert not torch.equal(other.couple(batch)[0], noise)


def test_several_noises_an_item_and_fresh_ones():
    many = build("instaflow", net(1), DATA, teacher=flow(net()), pairs_per_item=3, initialise="none")
    assert len(many.bank.known) == 18
    seen = []
    for step in range(12):
        many.clock = Clock(step, 12, 0.0, seed=step)
        seen.append(many.couple(images(DATA))[0][0])
    assert len(torch.stack(seen).flatten(1).unique(dim=0)) == 3
    fresh = build("instaflow", net(1), DATA, teacher=flow(net()), pairs="fresh", initialise="none")
    first = fresh.couple(images(DATA))
    fresh.clock = Clock(1, 12, 0.0, seed=1)
    assert fresh.bank is None
    assert not torch.equal(first[0], fresh.couple(images(DATA))[0])


def test_pairs_of_the_data_are_taken_as_they_are():
    source = PairSource({"noise": torch.randn(6, 4), "image": torch.randn(6, 4)})
    options = InstaFlow.Options(initialise="none")
    method = InstaFlow(options, student=net(), teacher=LiveTeacher(flow(net(1))), data=source.info())
    batch = source.fetch(torch.arange(6))
    assert method.bank is None
    assert method.couple(batch)[0] is batch["noise"]
    assert method.couple(batch)[1] is batch["image"]
    assert torch.isfinite(only_update(method, batch).loss)


def test_data_without_numbers_need_fresh_pairs():
    info = images(DATA)
    unnumbered = Batch({"image": info["image"]})
    from limbeck.core.method import DataInfo

    data = DataInfo(6, 0, unnumbered)
    with pytest.raises(IncompatibleError, match="do not number"):
        InstaFlow(InstaFlow.Options(initialise="none"), student=net(), teacher=LiveTeacher(flow(net())), data=data)
    options = InstaFlow.Options(initialise="none", pairs="fresh")
    method = InstaFlow(options, student=net(), teacher=LiveTeacher(flow(net())), data=data)
    assert torch.isfinite(only_update(method, unnumbered).loss)


@pytest.mark.parametrize(
    ("phase", "asked", "expected"), [("reflow", None, 6.0), ("distil", None, 1.5), ("distil", 1.0, 1.0)]
)
def test_guidance_of_the_pairs(phase, asked, expected):
    labels = torch.tensor([0, 1, 2, -100, 1, 0])
    teacher = flow(net(classes=3), null=3)
    method = build(
        "instaflow", net(1, 3), DATA, teacher=teacher, classes=3,
        phase=phase, guidance=asked, solver_steps=2, initialise="none",
    )  # fmt: skip
    noise, data = method.couple(images(DATA, labels))
    told = {"label": labels.masked_fill(labels < 0, 3)}
    made = endpoints(NetworkDenoiser(teacher), noise, told, PairSampling("euler", 2, expected))
    torch.testing.assert_close(data, made)


def test_a_teacher_that_needs_its_condition_is_not_guided_unless_asked():
    labels, teacher = torch.tensor([0, 1, 2, 0, 1, 2]), flow(net(classes=3))
    common = {"teacher": teacher, "classes": 3, "solver_steps": 1, "initialise": "none"}
    method = build("instaflow", net(1, 3), DATA, **common)
    noise, data = method.couple(images(DATA, labels))
    once = PairSampling("euler", 1, 1.0)
    torch.testing.assert_close(data, endpoints(NetworkDenoiser(teacher), noise, {"label": labels}, once))
    with pytest.raises(ValueError, match="says nothing"):
        build("instaflow", net(1, 3), DATA, guidance=2.0, **common).couple(images(DATA, labels))


def test_reflow_leaves_the_condition_out_for_a_share_and_distillation_never():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for phase, rate, expected in (("reflow", 1.0, {3}), ("reflow", 0.0, {0, 1, 2}), ("distil", 1.0, {0, 1, 2})):
        student, heard = net(1, 3), []
        student.register_forward_pre_hook(lambda module, inputs, heard=heard: heard.extend(inputs[2]["label"].tolist()))
        method = build(
            "instaflow", student, DATA, teacher=flow(net(classes=3), null=3), classes=3,
            phase=phase, condition_dropout=rate, initialise="none",
        )  # fmt: skip
        only_update(method, images(DATA, labels))
        assert set(heard) == expected


def test_a_student_that_takes_the_scale_is_told_that_of_its_pairs():
    student, heard = flow(net(1, 3, guidance=True), null=3, guidance=True), []
    student.register_forward_pre_hook(lambda module, inputs: heard.extend(inputs[2]["guidance"].tolist()))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    teacher = flow(net(classes=3), null=3)
    method = build("instaflow", student, DATA, teacher=teacher, classes=3, guidance=2.5, initialise="none")
    only_update(method, images(DATA, labels))
    assert set(heard) == {2.5}
    assert process_of(student).sampling.guidance == 2.5


def test_a_diffusion_network_becomes_a_flow():
    teacher = note_process(net(), Process(VPDiscrete.named(), Direct("eps", 0.001), Sampling("dpmpp_2m", 5)))
    student = copy.deepcopy(teacher)
    method = build("instaflow", student, DATA, teacher=teacher)
    process = process_of(student)
    assert isinstance(process.schedule, FlowMatching)
    assert process.parameterisation == Direct("velocity", 1.0)
    assert (process.sampling.solver, process.sampling.steps) == ("euler", 25)
    assert process.sampling.times[0] == pytest.approx(0.999)
    assert process.sampling.times[-1] == 0
    noise, data = method.couple(images(DATA))
    made = generate(NetworkDenoiser(teacher), noise, steps=25, solver="dpmpp_2m")
    torch.testing.assert_close(data, made)
    assert process_of(method.result()) is process


def test_one_step_of_the_distilled_student_is_the_papers_generator():
    student = net(1)
    build("instaflow", student, DATA, teacher=flow(net()), phase="distil", initialise="none")
    noise = torch.randn(5, 1, 2, 2)
    v = -student(noise, torch.ones(5), {})
    torch.testing.assert_close(generate(NetworkDenoiser(student), noise), noise + v)
    k = net(1)
    build("instaflow", k, DATA, teacher=flow(net()), phase="distil", times=4, eps=0.2, initialise="none")
    assert process_of(k).sampling.times == pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))


def test_the_student_starts_from_the_teacher_in_both_halves():
    teacher = flow(net())
    for student in (net(1), StackedDenoiser(numbers=4, width=16, depth=1)):
        build("instaflow", student, DATA, teacher=teacher, phase="distil")
        for half in (student.first, student.second) if isinstance(student, StackedDenoiser) else (student,):
            assert all(torch.equal(a, b) for a, b in zip(half.parameters(), teacher.parameters(), strict=True))
    noise = torch.randn(5, 1, 2, 2)
    once = generate(NetworkDenoiser(student), noise)
    torch.testing.assert_close(once, generate(NetworkDenoiser(teacher), noise, steps=2, solver="euler"))
    with pytest.raises(IncompatibleError, match="initialise: none"):
        build("instaflow", net(width=8), DATA, teacher=teacher)


def test_lpips_is_of_decoded_endpoints_and_of_one_step_alone(monkeypatch):
    seen = []

    def lpips(a: Tensor, b: Tensor, network: str) -> Tensor:
        seen.append((a, b, network))
        return (a - b).abs().flatten(1).mean(1)

    monkeypatch.setattr(module, "lpips", lpips)
    options = {"phase": "distil", "distance": "l2", "later_distance": "lpips", "lpips_network": "alex"}
    method = shifted(**options)
    note_decoder(method.teacher.model, lambda latents: 2 * latents)
    only_update(method, images(DATA))
    assert not seen
    method.clock = Clock(50, 100, 0.0, 7)
    loss = only_update(method, images(DATA)).loss
    noise = pair_noise(0, torch.arange(6), DATA)
    ((a, b, network),) = seen
    assert network == "alex"
    torch.testing.assert_close(b, 2 * (noise + 0.7))
    torch.testing.assert_close(a, 2 * (noise - 0.3 * noise - 0.2))
    both = only_update(shifted(phase="distil", distance="lpips+l2"), images(DATA)).loss
    plain = only_update(shifted(phase="distil"), images(DATA)).loss
    torch.testing.assert_close(both, plain + loss / 2)  # the second method's networks have no decoder
    for wrong in ({"distance": "lpips"}, {"phase": "distil", "times": 2, "later_distance": "lpips+l2"}):
        with pytest.raises(ValidationError, match="times: t0"):
            InstaFlow.Options(**wrong)
    InstaFlow.Options(times=1, distance="lpips")


def trained(source: Any, student: nn.Module, teacher: nn.Module, steps: int, batch: int = 256, **options: Any) -> Any:
    """A method's result after some steps."""
    method = InstaFlow(InstaFlow.Options(**options), student=student, teacher=LiveTeacher(teacher), data=source.info())
    spec = TrainSpec(steps=steps, batch_size=batch, optimizer={"lr": 3e-3})
    return Trainer(method, Loader(source, batch, 0), spec, steps=steps, items=len(source), seed=0).fit()


def test_reflow_straightens():
    torch.manual_seed(0)
    ring = GaussianMixtureDenoiser.ring(FlowMatching(), modes=3)
    noise = torch.randn(2000, 2)
    data = endpoints(ring, noise, how=PairSampling("heun", 20))
    source = PairSource({"noise": noise, "image": data})
    student = net(numbers=2, width=32, depth=2)
    reflowed = NetworkDenoiser(trained(source, student, ring, 200, 128, initialise="none"))
    bent = straightness(lambda x, t: ring(x, t), noise, data)
    ends = endpoints(reflowed, noise, how=PairSampling("heun", 20))
    assert straightness(lambda x, t: reflowed(x, t), noise, ends) < 0.3 * bent


def test_a_network_of_diffusers_is_trained_and_loads_in_the_stock_class(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    shape = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    torch.manual_seed(0)
    teacher = note_process(diffusers.UNet2DModel(**shape), Process(VPDiscrete.named(), Direct("eps")))
    source = ArraySource(torch.rand(12, 1, 8, 8), normalisation=([0.5], [0.5]))
    student = copy.deepcopy(teacher)
    flow_net = trained(source, student, teacher, 3, 4, solver_steps=3)
    one = trained(source, copy.deepcopy(flow_net), flow_net, 3, 4, phase="distil", solver_steps=3)
    assert process_of(one).parameterisation == Direct("velocity", 1000.0)
    one.save_pretrained(tmp_path / "unet")
    stock = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        said = stock(noise, scheduler.timesteps[0]).sample
        stepped = scheduler.step(said, scheduler.timesteps[0], noise).prev_sample
        torch.testing.assert_close(generate(NetworkDenoiser(one.eval()), noise), stepped, rtol=1e-4, atol=1e-5)


def test_the_teachers_time_scale_and_schedule_may_be_any():
    teacher = note_process(net(), Process(Cosine(), Direct("v"), Sampling("ddim", 5)))
    method = build("instaflow", net(1), DATA, teacher=teacher, initialise="none", compat=True, solver_steps=3)
    _, data = method.couple(images(DATA))
    assert data.isfinite().all()
    assert torch.isfinite(only_update(method, images(DATA)).loss)
