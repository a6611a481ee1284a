import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.compression.packing import pack, packed_bytes, unpack
from limbeck.data.cache.bits import SortedSets


@pytest.mark.parametrize("width", range(25))
@pytest.mark.parametrize("count", [1, 3, 50])
def test_fields_of_any_width_come_back(width, count):
    values = torch.randint(2**width, (7, count), generator=torch.Generator().manual_seed(width))
    packed = pack(values, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, packed_bytes(count, width))
    assert torch.equal(unpack(packed, count, width), values.int())


def test_the_largest_fields_do_not_touch_their_neighbours():
    values = torch.tensor([[0, 2**11 - 1, 0, 2**11 - 1, 0]])
    assert torch.equal(unpack(pack(values, 11), 5, 11), values.int())


def test_fields_lie_least_significant_bit_first():
    assert pack(torch.tensor([[1, 2, 3]]), 3).tolist() == [[0b11_010_001, 0b0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sorted_set_comes_back(data):
    universe = data.draw(st.integers(1, 300_000))
    count = data.draw(st.integers(1, min(universe, 40)))
    members = data.draw(st.lists(st.integers(0, universe - 1), min_size=count, max_size=count, unique=True))
    sets = SortedSets(count, universe)
    stored = sets.encode(torch.tensor([sorted(members)]))
    assert stored.shape == (1, sets.size)
    assert sets.decode(stored).tolist() == [sorted(members)]


@pytest.mark.parametrize("universe", [50, 51, 99, 100, 32_000, 2**20])
def test_the_extreme_sets_come_back(universe):
    sets = SortedSets(50, universe)
    ends = torch.stack([torch.arange(50), torch.arange(universe - 50, universe)])
    assert torch.equal(sets.decode(sets.encode(ends)), ends)


def test_a_set_takes_at_most_two_bits_a_member_more_than_any_code_must():
    for universe in (1000, 50_257, 151_936):
        least = sum(torch.log2(torch.tensor((universe - i) / (i + 1))).item() for i in range(50))
        assert 8 * SortedSets(50, universe).size <= least + 2 * 50 + 16


def test_bytes_that_hold_no_sets_are_refused():
    sets = SortedSets(5, 100)
    stored = sets.encode(torch.tensor([[1, 5, 7, 50, 99]]))
    stored[0, -1] ^= 1
    with pytest.raises(ValueError, match="no sets of 5"):
        sets.decode(stored)
