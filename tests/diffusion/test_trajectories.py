import io

import pytest
import torch

from limbeck.diffusion import solvers
from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.schedules import Cosine, VPDiscrete
from limbeck.diffusion.trajectories import ReplayBuffer, record
from tests.diffusion.cases import normal, wave_denoiser


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_record_is_the_path_with_its_predictions(solver):
    schedule = VPDiscrete.named("scaled-linear")
    model, x, times = wave_denoiser(schedule), normal(2, 3), usual_times(schedule, 5)
    torch.manual_seed(0)
    kept = record(model, x, times, solver, kind="eps")
    torch.manual_seed(0)
    assert kept.states.equal(solvers.path(model, x, times, solver))
    assert kept.times.equal(times)
    assert kept.kind == "eps"
    assert kept.predictions.shape == (5, 2, 3)
    for state, t, said in zip(kept.states, times, kept.predictions, strict=False):
        torch.testing.assert_close(model(state, t.expand(2)).eps, said)


def test_kinds_and_memory():
    schedule = Cosine()
    model, x, times = wave_denoiser(schedule, "v"), normal(2, 3, dtype=torch.float32), usual_times(schedule, 4)
    exact, small = record(model, x, times), record(model, x, times, dtype=torch.float16)
    assert small.states.dtype == small.predictions.dtype == torch.float16
    assert exact.states.dtype == torch.float32
    assert small.states.equal(exact.states.half())  # the solver itself did not lose precision
    torch.testing.assert_close(exact.predictions[0], model(x, times[:1].expand(2)).x0)


def test_a_record_has_no_graph():
    schedule = Cosine()
    kept = record(wave_denoiser(schedule, "v"), normal(2, 3).requires_grad_(), usual_times(schedule, 2))
    assert not kept.states.requires_grad
    assert not kept.predictions.requires_grad


def rows(start, count):
    number = torch.arange(start, start + count)
    return {"number": number, "state": number[:, None].float() * torch.ones(2)}


def buffer(size=5):
    return ReplayBuffer(size, rows(0, 1))


def held(kept):
    return sorted(kept.get_buffer("row_number")[: len(kept)].tolist())


def test_the_latest_rows_are_kept():
    kept = buffer()
    assert len(kept) == 0
    for start, count, expected in (
        (1, 2, [1, 2]),
        (3, 2, [1, 2, 3, 4]),
        (5, 3, [3, 4, 5, 6, 7]),
        (8, 1, [4, 5, 6, 7, 8]),
    ):
        kept.add(rows(start, count))
        assert held(kept) == expected
    kept.add(rows(100, 12))  # more than fit
    assert held(kept) == [107, 108, 109, 110, 111]
    kept.add(rows(200, 1))
    assert held(kept) == [108, 109, 110, 111, 200]


def test_draws_are_even_over_what_is_filled():
    kept = buffer(10)
    kept.add(rows(1, 4))
    torch.manual_seed(0)
    drawn = kept.draw(4000)
    assert drawn["state"].equal(drawn["number"][:, None].float() * torch.ones(2))  # rows stay together
    counts = drawn["number"].bincount(minlength=5)
    assert counts[0] == 0
    assert ((counts[1:] / 4000 - 0.25).abs() < 0.03).all()


def test_draws_follow_torchs_stream():
    kept = buffer()
    kept.add(rows(1, 5))
    torch.manual_seed(1)
    first = kept.draw(8)["number"]
    torch.manual_seed(1)
    assert kept.draw(8)["number"].equal(first)


def test_a_saved_buffer_goes_on_exactly():
    kept = buffer()
    kept.add(rows(1, 7))
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    other = buffer()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert not list(kept.parameters())
    for one in (kept, other):
        one.add(rows(50, 2))
    torch.manual_seed(2)
    first = kept.draw(20)
    torch.manual_seed(2)
    second = other.draw(20)
    assert all(first[name].equal(second[name]) for name in first)


def test_rows_are_kept_in_the_buffers_precision_without_a_graph():
    kept = ReplayBuffer(4, {"x": torch.zeros(1, 3, dtype=torch.float16)})
    kept.add({"x": normal(2, 3).requires_grad_()})
    assert kept.draw(2)["x"].dtype == torch.float16
    assert not kept.draw(2)["x"].requires_grad


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="empty"):
        buffer().draw(1)
    with pytest.raises(ValueError, match="one row or more"):
        ReplayBuffer(0, rows(0, 1))
    with pytest.raises(ValueError, match="one row or more"):
        ReplayBuffer(3, {})
    for wrong in (
        {"number": torch.arange(2)},
        {**rows(0, 2), "more": torch.zeros(2)},
        {"number": torch.arange(2), "state": torch.zeros(3, 2)},
    ):
        with pytest.raises(ValueError, match="takes as many rows of each"):
            buffer().add(wrong)
