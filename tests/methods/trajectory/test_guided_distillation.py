import pytest
import torch
from pydantic import ValidationError
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock, DataInfo
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.editing import encode
from limbeck.diffusion.generation import count_evaluations, generate
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import encoding_times, jumps, two_step_target, weighted_error
from limbeck.diffusion.schedules import Cosine, FlowMatching, VPDiscrete
from limbeck.diffusion.steps import ddim_step
from limbeck.methods.trajectory.guided_distillation import GuidedDistillation
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.saved import load_model, save_model


def batch(items=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    image = torch.rand(items, 1, 2, 2, generator=draws) * 2 - 1
    return Batch({"image": image, "label": torch.arange(items) % 3, "index": torch.arange(items)})


def network(seed=0, guidance=True, width=16):
    torch.manual_seed(seed)
    return DenoisingMLP(numbers=4, classes=3, width=width, depth=1, guidance=guidance)


def teacher(schedule=None, null_label=3, kind="v"):
    process = Process(schedule or Cosine(), Direct(kind), Sampling("heun", 8, 2.0), null_label=null_label)
    return note_process(network(7, guidance=False), process)


def made(student=None, parent=None, clock=None, example=None, classes=3, **options):
    options = {"start_steps": 4, "end_steps": 1} | options
    method = GuidedDistillation(
        GuidedDistillation.Options(**options),
        student=network() if student is None else student,
        teacher=LiveTeacher(teacher() if parent is None else parent),
        data=DataInfo(items=8, classes=classes, example=example or batch(2)),
    )
    method.clock = clock or Clock(0, 100, seed=5)
    return method


def trainer(method, steps, given=None, rows=None, **spec):
    spec = {"optimizer": OptimizerSpec(lr=3e-3, schedule="constant"), "log_every": 1} | spec

    class Same:
        def steps(self, start, stop):
            return iter([[given or batch(seed=step)] for step in range(start, stop)])

    rows = [] if rows is None else rows
    return Trainer(method, Same(), TrainSpec(steps=steps, **spec), steps=steps, items=8, seed=0, record=rows.append)


def loss_of(method, given=None):
    return next(method.step(given or batch())).loss.detach()


def test_without_guidance_the_teachers_weights_are_already_right():
    """w = 0 is the conditional prediction, and the input for the scale starts silent."""
    parent = teacher()
    assert loss_of(made(parent=parent, stage="guidance", guidance_min=1.0, guidance_max=1.0)) == 0
    assert loss_of(made(parent=parent, stage="guidance", guidance_min=3.0, guidance_max=3.0)) > 1e-4


def test_the_first_loss_by_hand():
    method = made(stage="guidance", guidance_min=1.0, guidance_max=5.0)
    nn.init.normal_(method.student.guidance.weight)
    given = batch()
    loss, draws = loss_of(method, given), method.draws(given)
    schedule = Cosine()
    t = schedule.t_min + draws.uniform("time").double() * (schedule.t_max - schedule.t_min)
    w = 4 * draws.uniform("guidance")  # g = 1 + w
    noise = draws.normal("noise", given.image)
    total = 0.0
    for n in range(8):
        alpha, sigma = (torch.pi / 2 * t[n]).cos(), (torch.pi / 2 * t[n]).sin()
        z = (alpha * given.image[n] + sigma * noise[n]).float()[None]
        time, label = t[n : n + 1].float(), given.label[n : n + 1]
        with torch.no_grad():
            parent = method.teacher.model
            conditional = alpha * z - sigma * parent(z, time, {"label": label})
            unconditional = alpha * z - sigma * parent(z, time, {"label": torch.tensor([3])})
            ours = alpha * z - sigma * method.student(z, time, {"label": label, "guidance": 1 + w[n : n + 1]})
        target = (1 + w[n]) * conditional - w[n] * unconditional
        total += float(max(alpha**2 / sigma**2, 1) * (ours - target).square().mean())
    assert float(loss) == pytest.approx(total / 8, rel=1e-4)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "velocity", "score"])
def test_guidance_is_the_same_in_every_kind_of_prediction(kind):
    torch.manual_seed(0)
    method = made(stage="guidance")
    x_t, t = torch.randn(5, 1, 2, 2), torch.linspace(0.2, 0.8, 5).double()
    condition = {"label": torch.tensor([0, 1, 2, 0, 1])}
    parent = NetworkDenoiser(method.teacher.model)
    scale = torch.tensor([1.0, 2.0, 5.0, 0.0, 3.5])
    with torch.no_grad():
        plus, minus = (parent(x_t, t, given).as_kind(kind) for given in (condition, parent.null(condition)))
    expected = minus + scale.view(-1, 1, 1, 1) * (plus - minus)
    torch.testing.assert_close(method.ask(x_t, t, condition, scale).as_kind(kind), expected, rtol=1e-4, atol=1e-4)


def test_scales_cover_the_range_and_each_item_has_its_own():
    method = made(stage="guidance", guidance_min=2.0, guidance_max=14.0)
    scales = method.scale(ItemNoise(3, torch.arange(2000)))
    assert scales.min() == pytest.approx(2.0, abs=0.05)
    assert scales.max() == pytest.approx(14.0, abs=0.05)
    assert scales.mean() == pytest.approx(8.0, abs=0.3)
    assert made(stage="guidance", guidance_min=2.0, guidance_max=2.0).scale(ItemNoise(3, torch.arange(4))) == 2.0


def test_the_student_is_told_the_scale_that_its_teacher_uses(monkeypatch):
    method = made(stage="guidance")
    heard, asked = [], []
    monkeypatch.setattr(method.student, "embedded", _listening(method.student.embedded, heard))
    ask = method.ask
    monkeypatch.setattr(method, "ask", lambda x, t, c, scale: asked.append(scale) or ask(x, t, c, scale))
    loss_of(method)
    torch.testing.assert_close(heard[0], asked[0])


def _listening(embedded, heard):
    def listening(time, condition):
        heard.append(condition["guidance"])
        return embedded(time, condition)

    return listening


@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "encode"])
def test_the_second_loss_is_that_of_two_guided_steps(kind):
    choice = {"direction": "encode"} if kind == "encode" else {"sampler": kind}
    method = made(stage="steps", start_steps=4, end_steps=4, **choice)
    nn.init.normal_(method.student.guidance.weight)
    given = batch()
    loss, draws = loss_of(method, given), method.draws(given)
    x0, condition = method.read(given)
    t, between, s = jumps(Cosine(), 4, kind)[draws.integers("jump", 4)].unbind(1)
    scale = 1 + 4 * draws.uniform("guidance")
    x_t = Cosine().add_noise(x0, draws.normal("noise", x0), t)
    parent = NetworkDenoiser(method.teacher.model)
    with torch.no_grad():
        target = two_step_target(lambda x, time: guided(parent, x, time, condition, scale), x_t, t, between, s)
        prediction = method.denoiser(x_t, t, {**condition, "guidance": scale})
    torch.testing.assert_close(loss, weighted_error(prediction, target).mean())


class Knowing(nn.Module):
    """A network whose x0 is the same everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, time, condition):
        return self.value.expand_as(x)


@pytest.mark.parametrize("choice", [{}, {"sampler": "stochastic"}, {"direction": "encode"}])
@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), VPDiscrete.named("linear")])
def test_nothing_is_left_to_learn_from_a_constant_prediction(schedule, choice):
    process = Process(schedule, Direct("x0"), Sampling("ddim", 8), null_label=3)
    student, parent = (note_process(Knowing(0.4), process) for _ in range(2))
    same = {"guidance_min": 2.0, "guidance_max": 2.0}
    method = made(student, parent, stage="steps", start_steps=8, weighting="truncated-snr", **same, **choice).double()
    parent.double()
    given = batch()
    given = given.replace(image=given.image.double())
    assert loss_of(method, given) < 1e-9
    student.value.data += 0.1
    assert loss_of(method, given) > 1e-3


def test_a_teacher_that_is_told_the_scale_is_told_each_items():
    parent = network(7)
    nn.init.normal_(parent.guidance.weight)
    note_process(parent, Process(Cosine(), Direct("v"), Sampling("ddim", 8, 3.0), 3, guidance_input=True))
    method = made(parent=parent, stage="steps", start_steps=2)
    x0, condition = method.read(batch())
    t, scale = torch.full((8,), 0.5).double(), torch.linspace(1, 5, 8)
    with torch.no_grad():
        expected = NetworkDenoiser(parent)(x0, t, {**condition, "guidance": scale}).value
    assert torch.equal(method.ask(x0, t, condition, scale).value, expected)


def test_both_stages_follow_each_other_and_the_student_teaches_itself():
    method, rows = made(start_steps=4, end_steps=2, guidance_share=0.4), []
    asked = []
    ask = method.ask
    method.ask = lambda *given: asked.append(method.clock.step) or ask(*given)
    trainer(method, 10, rows=rows).fit()
    assert [row["student/steps"] for row in rows] == [0] * 4 + [4] * 2 + [2] * 4
    assert sorted(set(asked)) == [0, 1, 2, 3]
    assert made(stage="guidance").phases() == [(0, 1.0)]
    assert made(stage="steps").phases() == [(4, 1.0), (2, 2.0), (1, 2.0)]


def test_how_results_are_sampled():
    told = process_of(made().student)
    assert told.guidance_input
    assert (told.sampling.solver, told.sampling.steps, told.sampling.guidance) == ("ddim", 1, 3.0)
    assert process_of(made(guidance=1.5).student).sampling.guidance == 1.5
    first = process_of(made(stage="guidance").student).sampling
    assert (first.solver, first.steps, first.guidance) == ("heun", 8, 3.0)  # as the teacher is, but told the scale
    stochastic = made(sampler="stochastic", end_steps=4).student
    assert process_of(stochastic).sampling.solver == "stochastic_progressive"
    fixed = process_of(made(network(guidance=False), guidance_min=2.0, guidance_max=2.0).student)
    assert not fixed.guidance_input
    assert fixed.sampling.guidance == 1.0


def test_the_result_samples_with_one_evaluation_a_step_and_keeps_its_scale_input(tmp_path):
    method = made(start_steps=4, end_steps=4)
    trainer(method, 4).fit()
    save_model(method.result(), tmp_path / "student")
    denoiser = NetworkDenoiser(load_model(tmp_path / "student"))
    given = batch()
    condition = {"label": given.label}
    assert count_evaluations(denoiser, condition) == 4
    nn.init.normal_(denoiser.network.guidance.weight)
    with torch.no_grad():
        mild, strong = (generate(denoiser, given.image, condition, guidance=g) for g in (1.0, 5.0))
    assert not torch.equal(mild, strong)


def test_a_perfect_encoder_of_eight_steps_ends_nearer_to_many_steps_than_eight_of_its_teacher():
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(Cosine(), modes=2, radius=1.0, std=0.5).double()
    x = data = mixture.draw(500)
    table = jumps(Cosine(), 8, "encode")
    assert torch.equal(torch.cat([table[:, 0], table[-1:, 2]]), encoding_times(Cosine(), 8))
    for row in table:  # each step lands where two of half the length do
        t, between, s = row[:, None].expand(3, 500)
        x0 = two_step_target(mixture, x, t, between, s)
        x = ddim_step(Prediction(x0, "x0", x, t, Cosine()), s)
    plain, many = (encode(mixture, data, steps=steps) for steps in (8, 64))
    assert (x - many).square().mean() < 0.5 * (plain - many).square().mean()


def test_what_does_not_fit_is_refused():
    with pytest.raises(IncompatibleError, match="no input for the guidance scale"):
        made(network(guidance=False))
    with pytest.raises(IncompatibleError, match="cannot be guided"):
        made(parent=teacher(null_label=None))
    made(parent=teacher(null_label=None), guidance_min=1.0, guidance_max=1.0)
    with pytest.raises(IncompatibleError, match="too few times"):
        made(parent=teacher(VPDiscrete.named("linear")), start_steps=512)
    wrong = (
        {"guidance_min": 3.0, "guidance_max": 2.0},
        {"guidance": 9.0},
        {"direction": "encode", "sampler": "stochastic"},
    )
    for options in wrong:
        with pytest.raises(ValidationError):
            GuidedDistillation.Options(**options)


def test_data_without_classes_need_no_guidance():
    example = Batch({"image": batch(2).image, "index": torch.arange(2)})
    method = made(example=example, classes=0, stage="guidance")
    given = Batch({"image": batch().image, "index": torch.arange(8)})
    assert loss_of(method, given) == 0


def test_a_text_unet_of_diffusers_learns_the_scale_and_two_steps():
    diffusers = pytest.importorskip("diffusers")
    from limbeck.diffusion.ports import NULL_PROMPT

    def unet(width=None):
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=6,
            attention_head_dim=4,
            time_cond_proj_dim=width,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    torch.manual_seed(0)
    parent = note_process(unet(), Process(VPDiscrete.named(), Direct("v"), Sampling("ddim", 20, 7.5)))
    setattr(parent, NULL_PROMPT, {"prompt": torch.zeros(1, 3, 6)})
    student = unet(16)
    assert student.time_embedding.cond_proj.weight.any()
    latents, prompt = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 6)
    given = Batch({"image": latents, "prompt": prompt, "index": torch.arange(4)})
    options = {"start_steps": 2, "end_steps": 2, "guidance_share": 0.5, "guidance_min": 2.0, "guidance_max": 14.0}
    method = made(student, parent, classes=0, example=given, **options)
    assert not student.time_embedding.cond_proj.weight.any()
    rows = []
    result = trainer(method, 3, given, rows).fit()
    assert [row["student/steps"] for row in rows] == [0, 0, 2]
    assert student.time_embedding.cond_proj.weight.any()
    with torch.no_grad():
        condition = {"prompt": prompt}
        mild, strong = (generate(NetworkDenoiser(result), latents, condition, guidance=g) for g in (2.0, 14.0))
    assert mild.isfinite().all()
    assert not torch.equal(mild, strong)
    with pytest.raises(IncompatibleError, match="no input for the guidance scale"):
        made(unet(), parent, classes=0, example=given)


def test_an_inpainting_network_of_diffusers_sees_mask_and_rest():
    diffusers = pytest.importorskip("diffusers")
    from limbeck.diffusion.ports import NULL_PROMPT

    torch.manual_seed(0)

    def unet():
        return diffusers.UNet2DConditionModel(
            sample_size=4,
            in_channels=9,
            out_channels=4,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=6,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )

    process = Process(VPDiscrete.named(), Direct("v"), Sampling("ddim", 20, 7.5))
    parent, student = (note_process(unet(), process) for _ in range(2))
    setattr(parent, NULL_PROMPT, {"prompt": torch.zeros(1, 3, 6)})
    tensors = {"image": torch.randn(2, 4, 4, 4), "channels": torch.randn(2, 5, 4, 4), "prompt": torch.randn(2, 3, 6)}
    given = Batch({**tensors, "index": torch.arange(2)})
    options = {"start_steps": 2, "end_steps": 2, "stage": "steps", "guidance_min": 7.5, "guidance_max": 7.5}
    method = made(student, parent, classes=0, example=given, **options)
    rows = []
    trainer(method, 2, given, rows).fit()
    assert rows[0]["student/loss"] > 0
