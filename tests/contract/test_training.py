"""What every method that trains promises, on the tiny rig of its task."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.checkpoint import Checkpoints
from limbeck.core.method import Method
from limbeck.core.optim import optimizer_tensors
from limbeck.core.registry import MethodClass, all_methods
from limbeck.core.snapshot import module_tensors
from limbeck.core.trainer import Row, Trainer
from limbeck.models.saved import load_model, save_model
from tests.contract.rigs import SGD, Rig, rig_of

TRAINED = {slug: kind for slug, kind in all_methods().items() if issubclass(kind, Method)}
PER_ITEM = {slug: kind for slug, kind in TRAINED.items() if not kind.card.couples_batch}


@pytest.fixture(params=TRAINED)
def kind(request: pytest.FixtureRequest) -> MethodClass:
    """Every registered method that trains, in turn."""
    return TRAINED[request.param]


@pytest.fixture
def rig(kind: MethodClass) -> Rig:
    """The rig of its task."""
    return rig_of(kind)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def teacher_of(method: Method) -> nn.Module | None:
    return getattr(method.teacher, "model", None)


def test_three_steps_run_finitely_and_move_only_the_players_and_their_state(kind, rig):
    method, rows = rig.method(kind), []
    teacher = teacher_of(method)
    before, teacher_before = copied(method), copied(teacher) if teacher is not None else {}
    trainer = rig.trainer(method, rows=rows)
    players = trainer.players
    trainer.fit()
    assert [row["step"] for row in rows] == [1, 2, 3]
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert len(figures) > 6
    assert all(map(math.isfinite, figures))
    assert all(value.isfinite().all() for value in method.state_dict().values() if value.is_floating_point())
    moved = changed(before, method)
    trained = {id(parameter) for player in players.values() for parameter in player.parameters}
    for name, parameter in method.named_parameters():
        assert (name not in moved) or id(parameter) in trained, f"{name} moved and belongs to no player"
    for name, player in players.items():
        own = {id(parameter) for parameter in player.parameters}
        assert any(id(p) in own and n in moved for n, p in method.named_parameters()), f"player {name} did not move"
    if teacher is not None:
        assert not changed(teacher_before, teacher)
        assert not any(module.training for module in teacher.modules())
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_seed_decides_everything(kind, rig):
    results = []
    for build_seed, train_seed in ((0, 0), (0, 0), (0, 1), (1, 0)):
        torch.manual_seed(len(results))  # whatever was drawn before does not matter
        method = rig.method(kind, build_seed)
        rig.trainer(method, train_seed, steps=2).fit()
        results.append(module_tensors(method))
    first, again, other_order, other_start = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other_order[name]) for name in first)
    assert any(not torch.equal(first[name], other_start[name]) for name in first)


class Crash(Exception):
    """The process dies."""


class DiesAt(list[Row]):
    """Rows of metrics of a process that dies while it writes the row of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def append(self, row: Row) -> None:
        if row["step"] == self.step:
            raise Crash
        super().append(row)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors that a run leaves: of the method, the optimizers and the average."""
    tensors = {f"method/{name}": value for name, value in module_tensors(trainer.method).items()}
    for name, player in trainer.players.items():
        state = optimizer_tensors(player.module, player.optimizer)
        tensors |= {f"{name}/{entry}": value for entry, value in state.items()}
    return tensors | {f"average/{name}": value for name, value in trainer.average.state_dict().items()}


def timeless(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_resuming_is_exact_to_the_bit(kind, rig, tmp_path):
    def trainer(folder: str, rows: list[Row]) -> Trainer:
        return rig.trainer(rig.method(kind), steps=4, rows=rows, folder=tmp_path / folder, ema=0.9, accumulate=2)

    straight_rows, torn_rows, resumed_rows = [], DiesAt(3), []
    straight = trainer("straight", straight_rows)
    straight.fit()
    with pytest.raises(Crash):
        trainer("torn", torn_rows).fit()
    assert Checkpoints(tmp_path / "torn").steps() == [2]
    resumed = trainer("torn", resumed_rows)
    torch.manual_seed(99)  # a fresh process has another stream
    resumed.fit()
    assert timeless([*torn_rows, *resumed_rows]) == timeless(straight_rows)
    expected, actual = everything(straight), everything(resumed)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("slug", PER_ITEM)
def test_accumulation_changes_nothing(slug):
    kind = PER_ITEM[slug]
    rig, moved = rig_of(kind), []
    for accumulate in (1, 2, 8):
        method = rig.method(kind, per_item=True).double()
        if teacher_of(method) is not None:
            teacher_of(method).double()
        before = copied(method)
        trainer = rig.trainer(method, steps=3, accumulate=accumulate, optimizer=SGD)
        method.train()
        for module in method.modules():  # batch norms of connectors couple the items in train mode
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for micro_batches in trainer.loader.steps(0, 3):
            assert len(micro_batches) == accumulate
            trainer.train_step(micro_batches)
            trainer.step += 1
        moved.append(torch.cat([(p - before[n]).flatten() for n, p in method.named_parameters()]).detach())
    for other in moved[1:]:
        assert (other - moved[0]).norm() <= 1e-6 * moved[0].norm()
    assert moved[0].norm() > 0


def test_training_in_bfloat16_keeps_weights_in_float32(kind, rig):
    method, rows = rig.method(kind), []
    rig.trainer(method, steps=2, rows=rows, precision="bfloat16").fit()
    assert all(math.isfinite(row["student/loss"]) for row in rows if "student/loss" in row)
    assert {value.dtype for value in method.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_the_teacher_is_outside_of_parameters_state_and_checkpoints(kind, rig, tmp_path):
    method = rig.method(kind)
    teacher = teacher_of(method)
    if teacher is None:
        pytest.skip("it has no teacher")
    theirs = {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert not theirs & {id(tensor) for tensor in (*method.parameters(), *method.buffers())}
    assert not any(module is teacher for module in method.modules())
    rig.trainer(method, steps=2, folder=tmp_path).fit()
    saved = Checkpoints(tmp_path).load()
    assert saved.tensors["method"].keys() == method.state_dict().keys()
    telling = [value for value in teacher.state_dict().values() if value.numel() > 4 and value.unique().numel() > 4]
    assert telling
    for group, tensors in saved.tensors.items():
        for name, value in tensors.items():
            same = [other for other in telling if other.shape == value.shape and torch.equal(other, value)]
            assert not same, f"{group}/{name} holds the teacher"


def test_the_result_is_exported_and_loads_again(kind, rig, tmp_path):
    method = rig.method(kind)
    result = rig.trainer(method, steps=2, ema=0.5).fit()
    save_model(result, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert type(loaded) is type(result)
    assert torch.equal(rig.outputs(loaded), rig.outputs(result))
    parameters = sum(parameter.numel() for parameter in result.parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == parameters  # no connector, no teacher


def test_a_method_can_be_copied_and_moved(kind, rig):
    method = copy.deepcopy(rig.method(kind)).double()
    floating = [value for value in (*method.parameters(), *method.buffers()) if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float64}
