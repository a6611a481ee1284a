"""AGD: paths, losses, what is trained, and a network of diffusers."""

import copy

import pytest
import torch
from pydantic import ValidationError

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock, DataInfo
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.generation import count_evaluations, generate, guided_model
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.guidance_adapted import GuidanceAdapted
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.ports import whole_output
from limbeck.diffusion.schedules import Cosine, VPDiscrete
from limbeck.diffusion.trajectories import record
from limbeck.methods.trajectory.agd import AGD
from limbeck.models.denoising_mlp import DenoisingMLP


def batch(items=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    image = torch.rand(items, 1, 2, 2, generator=draws) * 2 - 1
    return Batch({"image": image, "label": torch.arange(items) % 3, "index": torch.arange(items)})


def teacher(guidance=False, null_label=3, kind="v"):
    torch.manual_seed(7)
    process = Process(Cosine(), Direct(kind), Sampling("ddim", 8, 2.0), null_label=null_label)
    return note_process(DenoisingMLP(numbers=4, classes=3, width=16, depth=1, guidance=guidance), process).eval()


def made(parent=None, student=None, clock=None, example=None, classes=3, **options):
    parent = teacher() if parent is None else parent
    torch.manual_seed(5)
    method = AGD(
        AGD.Options(**({"path_steps": 4, "solver": "ddim", "hidden": 8, "half": False} | options)),
        student=copy.deepcopy(parent) if student is None else student,
        teacher=LiveTeacher(parent),
        data=DataInfo(items=8, classes=classes, example=example or batch(2)),
    )
    method.clock = clock or Clock(0, 100, seed=5, run_seed=3)
    return method


def loss(method, given=None):
    (update,) = method.step(given or batch())
    assert update.player == "student"
    return update.loss.detach()


def trainer(method, steps, given=None):
    class Same:
        def steps(self, start, stop):
            return ([given or batch()] for _ in range(start, stop))

    spec = TrainSpec(steps=steps, batch_size=8, optimizer=OptimizerSpec(lr=1e-2, schedule="constant"))
    return Trainer(method, Same(), spec, steps=steps, items=8, seed=3)


@pytest.mark.parametrize("data", ["trajectories", "forward-noised"])
@pytest.mark.parametrize("adapter", ["attention", "offset"])
def test_without_guidance_the_teachers_network_has_nothing_to_learn(data, adapter):
    method = made(data=data, adapter=adapter, guidance_min=1.0, guidance_max=1.0)
    assert float(loss(method)) < 1e-10
    assert float(loss(made(data=data, adapter=adapter))) > 1e-5


def test_paths_are_those_of_the_guided_sampler():
    method, parent, given = made(), teacher(), batch()
    loss(method)
    assert bool(method.bank.known.all())
    states, targets = (method.bank.get_buffer(name).view(torch.float32) for name in ("states", "targets"))
    theirs, condition = NetworkDenoiser(parent), {"label": given["label"]}
    scale, _ = method._on_path(given, given["image"], torch.zeros(8, dtype=torch.int64), condition)
    assert float(scale.min()) >= 1
    assert float(scale.max()) <= 6
    assert float(scale.std()) > 0.3

    def model(x_t, t):
        return guided(theirs, x_t, t, condition, scale)

    path = record(model, states[:, 0], method.times, kind="v")
    torch.testing.assert_close(states, path.states[:-1].transpose(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets, path.predictions.transpose(0, 1), rtol=1e-4, atol=1e-4)
    assert abs(float(states[:, 0].std()) - 1) < 0.5


def test_a_path_is_its_items_own_and_stays():
    whole, parts, other = made(solver="ancestral"), made(solver="ancestral"), made(solver="ancestral")
    loss(whole)
    kept = whole.bank.states.clone()
    for rows in (slice(5, 8), slice(0, 5)):
        loss(parts, batch().select(rows))
    torch.testing.assert_close(*(one.bank.states.view(torch.float32) for one in (whole, parts)))
    whole.clock = Clock(9, 100, seed=77, run_seed=3)  # another step of the same run
    loss(whole)
    assert torch.equal(whole.bank.states, kept)
    other.clock = Clock(0, 100, seed=5, run_seed=4)
    loss(other)
    assert not torch.equal(other.bank.states, kept)
    assert not torch.equal(kept, made_states("ddim"))


def made_states(solver):
    method = made(solver=solver)
    loss(method)
    return method.bank.states


@pytest.mark.parametrize("kind", ["mse", "l1", "cos", "noise"])
def test_losses_are_those_written_out(kind):
    method, given = made(loss=kind, silent=False), batch()
    value = float(loss(method))
    theirs, ours = NetworkDenoiser(teacher()), method.denoiser
    place, total = method.draws(given).integers("place", 4), 0.0
    assert len(place.unique()) > 1
    for n in range(8):
        item = given.select(slice(n, n + 1))
        condition = {"label": item["label"]}
        scale, lesson = method._on_path(item, item["image"], place[n : n + 1], condition)
        t = method.times[place[n : n + 1]]
        x_t = lesson.states
        near, free = theirs(x_t, t, condition), theirs(x_t, t, {"label": torch.tensor([3])})
        wanted = free.value + scale * (near.value - free.value)
        gap = ours(x_t, t, condition | {"guidance": scale}).value - wanted
        error = gap.abs().mean() if kind == "l1" else gap.square().mean()
        if kind == "noise":
            error = error * Cosine().sigma(t)
        if kind == "cos":
            first, second = near.eps.flatten(), near.with_value(wanted).eps.flatten()
            error = error * 0.5 * abs(1 - first @ second / first.norm() / second.norm())
        total += float(error.detach()) / 8
    assert abs(value - total) < 1e-3 * total


def test_noised_data_are_noised_data():
    method, given = made(data="forward-noised", silent=False), batch()
    assert method.bank is None
    draws, theirs = method.draws(given), NetworkDenoiser(teacher())
    t = method.times[draws.integers("place", 4)]
    x_t = Cosine().add_noise(given["image"], draws.normal("noise", given["image"]), t)
    scale, condition = 1 + 5 * draws.uniform("guidance"), {"label": given["label"]}
    wanted = guided(theirs, x_t, t, condition, scale).value
    said = method.denoiser(x_t, t, condition | {"guidance": scale}).value
    torch.testing.assert_close(loss(method), (said - wanted).square().mean())


def test_adapters_learn_and_the_network_stays_to_the_bit():
    parent = teacher()
    method = made(parent, path_steps=8)
    with torch.no_grad():
        first = float(loss(method))
    model = trainer(method, 120).fit()
    assert isinstance(model, GuidanceAdapted)
    with torch.no_grad():
        assert float(loss(method)) < 0.6 * first
    for name, value in parent.state_dict().items():
        assert torch.equal(value, model.network.state_dict()[name])
    denoiser, theirs, condition = NetworkDenoiser(model), NetworkDenoiser(parent), {"label": batch()["label"]}
    noise = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    ends = [generate(one, noise, condition, guidance=4.0) for one in (denoiser, theirs)]
    plain = generate(theirs, noise, condition, guidance=1.0)
    assert (ends[0] - ends[1]).square().mean() < 0.7 * (plain - ends[1]).square().mean()
    assert count_evaluations(denoiser, condition) * 2 == count_evaluations(theirs, condition) == 16
    # With the scale unsaid the old network answers, which can be guided by two predictions again.
    off = NetworkDenoiser(model.network)
    assert torch.equal(generate(off, noise, condition, guidance=4.0), ends[1])


def test_samples_are_drawn_with_the_teachers_scale_or_the_one_asked_for():
    assert process_of(made().student).sampling.guidance == 2.0
    assert process_of(made(guidance=3.5).student).sampling.guidance == 3.5
    assert process_of(made(guidance_min=3.0).student).sampling.guidance == 4.5
    process = process_of(made().student)
    assert process.guidance_input
    assert process.null_label == 3


def test_training_goes_on_with_the_adapters_that_are_there():
    first = made(silent=False, hidden=12)
    second = made(student=copy.deepcopy(first.student).requires_grad_(True), hidden=8)
    assert second.student.config.hidden == 12
    assert not any(weight.requires_grad for weight in second.student.network.parameters())
    expected = first.student.adapters.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in second.student.adapters.state_dict().items())


def test_half_precision_is_near():
    half, single = made(half=True), made(half=False)
    assert half.bank.states.dtype == torch.int16
    assert float(loss(half)) == pytest.approx(float(loss(single)), rel=0.02)
    before = half.bank.states.clone()
    assert torch.equal(half.double().bank.states, before)


def test_paths_in_a_folder_are_found_again_and_those_of_others_refused(tmp_path):
    given = {"folder": str(tmp_path / "paths"), "half": True}
    method, memory = made(**given), made(half=True)
    expected = loss(memory)
    assert torch.equal(loss(method), expected)
    assert not any(name.startswith("bank") for name in method.state_dict())
    again = made(**given)
    asked = []
    again.teach = lambda *a: asked.append(a) or AGD.teach(again, *a)
    assert torch.equal(loss(again), expected)
    assert len(asked) == 1  # for the shapes; no path is made again
    other = made(**given, clock=Clock(0, 100, seed=5, run_seed=99))
    with pytest.raises(IncompatibleError, match="another training"):
        loss(other)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(IncompatibleError, match="takes the guidance scale itself"):
        made(student=teacher(guidance=True), initialise="none")
    with pytest.raises(IncompatibleError, match="condition_dropout"):
        made(teacher(null_label=None))
    with pytest.raises(IncompatibleError, match="nothing to be guided to"):
        made(classes=0)
    with pytest.raises(IncompatibleError, match="number their items"):
        made(example=Batch({name: value for name, value in batch(2).items() if name != "index"}))
    with pytest.raises(IncompatibleError, match="no blocks"):
        made(blocks=["attention"])
    for wrong in ({"guidance_min": 3.0, "guidance_max": 2.0}, {"hidden": 8, "heads": 3}):
        with pytest.raises(ValidationError):
            AGD.Options(**wrong)


def test_a_dit_with_learned_variance():
    pytest.importorskip("diffusers")
    from tests.diffusion import tiny

    parent = tiny.make("learned-variance-dit")
    assert parent.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 11
    for block in parent.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    note_process(parent, Process(VPDiscrete.named("linear"), Direct("eps"), Sampling("ddim", 4, 2.0), null_label=10))
    image = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = Batch({"image": image, "label": torch.arange(8), "index": torch.arange(8)})
    method = made(parent, classes=10, example=given.select(slice(0, 2)), solver="ancestral")
    assert method.bank.targets.shape == (8, 4, 8, 8, 8)
    loss(method, given)
    stored, theirs = method.bank.recall(torch.arange(8), torch.full((8,), 2), image), {"label": given["label"]}
    t = method.times[2].expand(8)
    variance = whole_output(parent, stored.states, t, theirs)[:, 4:]
    torch.testing.assert_close(stored.targets[:, 4:], variance, rtol=1e-3, atol=1e-3)
    assert made(parent, classes=10, example=given.select(slice(0, 2)), variance=False).bank.targets.shape[2] == 4
    weights = copy.deepcopy(parent.state_dict())
    before = generate(NetworkDenoiser(parent), image, theirs, guidance=1.0)
    model = trainer(method, 3, given).fit()
    assert all(torch.equal(weights[name], value) for name, value in model.network.state_dict().items())
    assert any(weight.abs().max() > 0 for name, weight in model.adapters.named_parameters() if "out.weight" in name)
    on = guided_model(NetworkDenoiser(model), theirs, 4.0)(image, t).value
    off = NetworkDenoiser(model)(image, t, theirs).value
    assert not torch.equal(on, off)
    assert torch.equal(off, NetworkDenoiser(parent)(image, t, theirs).value)
    removed = note_process(model.detach(), process_of(parent))
    assert torch.equal(generate(NetworkDenoiser(removed), image, theirs, guidance=1.0), before)
