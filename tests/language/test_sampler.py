import random
from collections import Counter

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.randomness import reseed
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.language.generation import generate, prompts_of
from limbeck.language.sampler import (
    Adaptive,
    Mixture,
    OnPolicySampler,
    Replaying,
    TeacherTexts,
    WritingOptions,
    known_to,
    room_for,
)
from tests.methods.language.rig import END, ITEMS, batch, gpt2, llama

WRITING = WritingOptions(max_new_tokens=5, prompt_tokens=2)
INFO = DataInfo(ITEMS, 0, batch(2))


def sampler(policy, buffer=0, writing=WRITING):
    return OnPolicySampler(policy, writing, INFO, buffer)


def shares(policy, progress=0.0, full=True, draws=4000):
    random.seed(0)
    counts = Counter(policy(progress, full) for _ in range(draws))
    return {author: count / draws for author, count in counts.items()}


def test_mixture():
    assert shares(Mixture(0.0)) == {"data": 1}
    assert shares(Mixture(1.0)) == {"student": 1}
    assert shares(Mixture(0.3, "teacher")) == pytest.approx({"student": 0.3, "teacher": 0.7}, abs=0.03)
    assert shares(Replaying(0.5)) == pytest.approx({"student into replay": 0.5, "data": 0.5}, abs=0.03)


@pytest.mark.parametrize(
    ("schedule", "progress", "written"),
    [("decreasing", 0.25, 0.75), ("constant", 0.25, 0.5), ("increasing", 0.25, 0.25), ("decreasing", 1.0, 0.0)],
)
def test_adaptive(schedule, progress, written):
    found = shares(Adaptive(0.6, schedule), progress)
    assert found["data"] == pytest.approx(0.4, abs=0.03)
    assert found.get("student", 0) == pytest.approx(0.6 * written, abs=0.03)
    assert found.get("replay", 0) == pytest.approx(0.6 * (1 - written), abs=0.03)
    unfilled = shares(Adaptive(0.6, schedule), progress, full=False)
    assert set(unfilled) == {"data", "student"}  # nothing is replayed before the buffer is full


def test_the_threshold_rises_with_the_held_out_loss():
    policy = Adaptive(0.0)
    seen = []
    for loss in (2.0, 2.05, 2.11, 2.15, 1.0, 2.3):
        policy.observe(torch.tensor(loss))
        seen.append(round(float(policy.threshold), 3))
    # 2.11 is 0.1 above 2.0 and becomes the reference; a fall does not lower it.
    assert seen == [0, 0, 0.1, 0.1, 0.1, 0.2]
    for loss in range(3, 20):
        policy.observe(torch.tensor(float(loss)))
    assert policy.threshold == 1


def test_masks_of_written_text():
    """Prompt and padding are no targets, the end token is one though it is the padding's id too."""
    items, student = batch(8), gpt2()
    prompts = prompts_of(items)
    reseed(0)
    text = sampler(Mixture(1.0))(student, None, items)
    assert "index" not in text
    assert text.input_ids.shape[1] <= int(prompts.lengths.max()) + 5
    ended = 0
    for row in range(8):
        before = int(prompts.lengths[row])
        assert torch.equal(text.input_ids[row, :before], items.input_ids[row, :before])
        length = int(text.attention_mask[row].sum())
        assert text.attention_mask[row, :length].all()
        counted = (text.labels[row] != -100).nonzero().squeeze(1)
        assert counted.tolist() == list(range(before, length))
        assert torch.equal(text.labels[row, before:length], text.input_ids[row, before:length])
        response = text.input_ids[row, before:length]
        assert (response[:-1] != END).all()
        ended += int(response[-1] == END)
        assert len(response) == 5 or response[-1] == END
    assert ended < 8


def test_an_author_of_its_own_for_each_policy():
    items, student, teacher = batch(), gpt2(), LiveTeacher(llama())
    greedy = WritingOptions(max_new_tokens=5, prompt_tokens=2, sampling_temperature=0)
    assert sampler(Mixture(0.0))(student, teacher, items) is items
    for policy, writer in ((Mixture(1.0), student), (Mixture(0.0, "teacher"), teacher.model)):
        text = sampler(policy, writing=greedy)(student, teacher, items)
        expected = generate(writer, prompts_of(items, 2), max_new_tokens=5, temperature=0)
        assert torch.equal(text.input_ids, expected.input_ids)
        assert torch.equal(text.labels, expected.labels)


def test_replayed_texts_are_the_students_earlier_ones():
    items, student = batch(4), gpt2()
    made = sampler(Replaying(1.0), buffer=6)
    reseed(0)
    first = made(student, None, items)
    assert len(made.buffer) == 4
    assert first.size == 4
    made(student, None, items)
    assert len(made.buffer) == 6
    only = sampler(lambda progress, full: "replay", buffer=6)
    only.load_state_dict(made.state_dict())
    known = {tuple(row.tolist()) for row in made.buffer.tokens}
    for row in only(student, None, items).input_ids:
        assert any(tuple(row.tolist()) == text[: len(row)] for text in known)


def test_tokens_that_one_side_lacks_end_a_text():
    teacher = llama(vocab_size=44)
    with torch.no_grad():
        teacher.lm_head.weight[42:] += 3 * teacher.lm_head.weight.abs().max()  # says what the student cannot read
    items, student, live = batch(8), gpt2(), LiveTeacher(teacher)
    reseed(1)
    text = sampler(Mixture(0.0, "teacher"))(student, live, items)
    assert text.input_ids.max() < 40
    assert (text.response_length >= 0).all()
    student(input_ids=text.input_ids, attention_mask=text.attention_mask)
    assert known_to(items, [student]) is items


def test_no_model_is_led_beyond_its_positions():
    prompts, short = prompts_of(batch(8)), gpt2(n_positions=7)
    widest = prompts.input_ids.shape[1]
    assert room_for(prompts, 100, [llama(), short]) == 7 - widest
    assert room_for(prompts, 2, [llama(), short]) == 2
    assert room_for(prompts, 100, [torch.nn.Linear(1, 1)]) == 100
    long = WritingOptions(max_new_tokens=30, prompt_tokens=2)
    text = sampler(Mixture(0.0, "teacher"), writing=long)(short, LiveTeacher(llama()), batch(8))
    assert text.input_ids.shape[1] <= 7


def test_an_ensemble_writes_nothing():
    both = Ensemble([LiveTeacher(llama()), LiveTeacher(llama(seed=3))])
    with pytest.raises(IncompatibleError, match="Ensemble writes no text"):
        sampler(Mixture(0.0, "teacher"))(gpt2(), both, batch())


def test_teacher_texts_are_written_once():
    texts, teacher, items = TeacherTexts(WRITING, INFO), LiveTeacher(llama()), batch()
    reseed(0)
    first = texts(gpt2(), teacher, items)
    reseed(1)
    wider = texts(gpt2(), teacher, batch(8)).select(slice(0, 5))
    assert torch.equal(first.response_length, wider.response_length)
    assert torch.equal(first.input_ids, wider.input_ids[:, : first.input_ids.shape[1]])
    resumed = TeacherTexts(WRITING, INFO)
    resumed.load_state_dict(texts.state_dict())
    assert torch.equal(resumed(gpt2(), None, items).input_ids, first.input_ids)  # nobody is asked


def test_items_without_numbers_cannot_be_remembered():
    bare = batch(2)
    bare = type(bare)({name: bare[name] for name in bare if name != "index"})
    with pytest.raises(IncompatibleError, match="do not number their items"):
        TeacherTexts(WRITING, DataInfo(ITEMS, 0, bare))
