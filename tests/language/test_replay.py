import torch

from limbeck.language.generation import Prompts, joined, prompts_of
from limbeck.language.replay import RememberedResponses, ReplayBuffer, text_batch
from tests.methods.language.rig import batch


def texts(first: int, items: int = 3, longest: int = 4):
    """Texts of a prompt of two tokens; the n-th text's tokens are all n."""
    numbers = torch.arange(first, first + items)
    prompts = Prompts(numbers[:, None].repeat(1, 2), torch.ones(items, 2).long(), torch.full((items,), 2))
    return joined(prompts, numbers[:, None].repeat(1, longest), 1 + numbers % longest)


def contents(buffer: ReplayBuffer) -> set[int]:
    return set(buffer.draw(100).input_ids[:, 0].tolist())


def test_the_oldest_makes_room():
    buffer = ReplayBuffer(5, 6)
    assert len(buffer) == 0
    buffer.push(texts(1))
    assert contents(buffer) == {1, 2, 3}
    assert not buffer.full
    buffer.push(texts(4))
    assert contents(buffer) == {2, 3, 4, 5, 6}
    assert buffer.full
    buffer.push(texts(10, items=7))
    assert contents(buffer) == {12, 13, 14, 15, 16}
    buffer.push(texts(20, items=1))
    assert contents(buffer) == {13, 14, 15, 16, 20}


def test_texts_come_back_as_they_went_in():
    buffer, pushed = ReplayBuffer(8, 20), texts(1, items=4)
    buffer.push(pushed)
    drawn = buffer.draw(4)
    assert set(drawn) == set(pushed)
    order = drawn.input_ids[:, 0] - 1
    for name, value in pushed.items():
        assert torch.equal(drawn[name], value[order][:, : drawn[name].shape[1]] if value.ndim > 1 else value[order])
    assert buffer.draw(2).size == 2


def test_texts_that_are_too_long_are_cut():
    buffer = ReplayBuffer(4, 5)
    buffer.push(texts(3, items=1, longest=8))
    drawn = buffer.draw(1)
    assert drawn.input_ids.tolist() == [[3] * 5]
    assert drawn.labels.tolist() == [[-100, -100, 3, 3, 3]]


def test_the_state_is_in_tensors():
    buffer, other = ReplayBuffer(5, 8), ReplayBuffer(5, 8)
    buffer.push(texts(1, items=4))
    other.load_state_dict(buffer.state_dict())
    for one in (buffer, other):
        one.push(texts(7))
        torch.manual_seed(0)
    first = buffer.draw(3)
    torch.manual_seed(0)
    assert torch.equal(first.input_ids, other.draw(3).input_ids)
    assert contents(other) == {3, 4, 7, 8, 9}


def test_lengths_and_not_ids_tell_where_a_text_ends():
    made = text_batch(torch.tensor([[5, 1, 1, 1], [5, 6, 7, 1]]), torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert made.labels.tolist() == [[-100, 1, 1, -100], [-100, -100, 7, 1]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert made.response_length.tolist() == [2, 2]


def test_responses_are_kept_by_item():
    memory, items = RememberedResponses(24, 6), batch(3)
    index, prompts = items["index"], prompts_of(items)
    assert memory.missing(index).tolist() == [0, 1, 2]
    written = joined(prompts.select(slice(0, 2)), torch.full((2, 4), 9), torch.tensor([4, 2]))
    memory.store(index[:2], written)
    assert memory.missing(index).tolist() == [2]
    recalled = memory.recall(index[:2], prompts.select(slice(0, 2)))
    for name, value in written.items():
        assert torch.equal(recalled[name], value), name
