"""Random numbers of a training step, each item's own."""

import math

import pytest
import torch

from limbeck.data.noise import ItemNoise, uniforms

ITEMS = torch.arange(20_000)


def splitmix(seed: int, item: int, place: int) -> float:
    """The same number in Python's whole numbers: SplitMix64's finaliser, twice, and the first 24 bits."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((item * golden + seed) & mask) + place * golden) & mask) >> 40) / (1 << 24)


def test_uniforms_against_python_s_whole_numbers():
    items = torch.tensor([0, 1, 7, 123_456_789_012])
    for seed in (0, 5, (1 << 63) - 1):
        expected = [[splitmix(seed, item, place) for place in (1, 2, 3)] for item in items.tolist()]
        assert uniforms(seed, items, 3).tolist() == expected


def test_uniform_numbers_are_uniform():
    draws = ItemNoise(3, ITEMS).uniform("time")
    assert (draws.dtype, draws.shape) == (torch.float32, ITEMS.shape)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert float((counts - 1000).square().sum() / 1000) < 50  # chi-squared, 19 degrees of freedom: p = 0.0001
    assert float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1]) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1,)])
def test_normal_numbers_have_the_normal_s_moments(shape):
    draws = ItemNoise(4, ITEMS).normal("noise", torch.empty(len(ITEMS), *shape)).double()
    assert draws.shape == (len(ITEMS), *shape)
    assert draws.isfinite().all()
    count = draws.numel()
    moments = [float(draws.pow(power).mean()) for power in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert moment == pytest.approx(expected, abs=4 * math.sqrt(variance / count))
    beyond = float((draws.abs() > 1.959964).double().mean())
    assert beyond == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / count))
    if draws[0].numel() > 1:  # the two of a pair share their radius, and are independent all the same
        between = torch.corrcoef(draws.flatten(1).T)
        assert torch.allclose(between, torch.eye(len(between), dtype=between.dtype), atol=0.03)


def test_normal_numbers_at_the_largest_draw_are_finite(monkeypatch):
    largest = 1 - 2**-24  # of 24 bits
    monkeypatch.setattr(
        "limbeck.data.noise.uniforms", lambda seed, items, count: torch.full((len(items), count), largest)
    )
    assert ItemNoise(0, ITEMS[:2]).normal("noise", torch.empty(2, 4)).isfinite().all()


def test_whole_numbers_fill_their_range():
    noise = ItemNoise(5, ITEMS)
    draws = noise.integers("step", 7)
    assert draws.dtype == torch.int64
    counts = torch.bincount(draws, minlength=7)
    assert len(counts) == 7
    assert float((counts - 20_000 / 7).square().sum() / (20_000 / 7)) < 28  # chi-squared, 6 degrees: p = 0.0001
    highs = torch.tensor([1, 2, 5]).repeat(6667)[: len(ITEMS)]
    own = noise.integers("step", highs)
    assert bool((own < highs).all())
    assert set(own[highs == 5].tolist()) == {0, 1, 2, 3, 4}
    assert not own[highs == 1].any()


def test_an_item_s_numbers_do_not_depend_on_its_company():
    like = torch.empty(6, 3, 5)
    rows = torch.tensor([5, 900, 2, 77, 3, 11])
    whole = ItemNoise(6, rows)
    places = torch.tensor([3, 0])
    part = ItemNoise(6, rows[places])
    assert torch.equal(part.uniform("a"), whole.uniform("a")[places])
    assert torch.equal(part.normal("a", like[places]), whole.normal("a", like)[places])
    assert torch.equal(part.integers("a", 10), whole.integers("a", 10)[places])


def test_numbers_differ_by_key_seed_and_item_and_never_touch_torch_s_stream():
    state = torch.get_rng_state()
    like, items = torch.empty(3, 4), torch.arange(3)
    noise = ItemNoise(7, items)
    one = noise.normal("noise", like)
    assert torch.equal(noise.normal("noise", like), one)  # drawn again, not drawn on
    others = [noise.normal("other", like), ItemNoise(8, items).normal("noise", like)]
    others.append(ItemNoise(7, items + 3).normal("noise", like))
    assert all(not bool((other == one).any()) for other in others)
    assert len(set(one.flatten().tolist())) == 12
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_is_that_of_the_data():
    items = torch.arange(4)
    exact = ItemNoise(9, items).normal("noise", torch.empty(4, 3))
    for dtype in (torch.float64, torch.bfloat16):
        drawn = ItemNoise(9, items).normal("noise", torch.empty(4, 3, dtype=dtype))
        assert drawn.dtype == dtype
        assert torch.equal(drawn, exact.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_numbers_are_the_same_on_a_gpu():
    items = torch.arange(50)
    here, there = ItemNoise(9, items), ItemNoise(9, items.cuda())
    assert torch.equal(there.uniform("a").cpu(), here.uniform("a"))
    like = torch.empty(50, 7)
    assert torch.allclose(there.normal("a", like.cuda()).cpu(), here.normal("a", like), atol=1e-6)
