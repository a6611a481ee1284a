"""A teacher behind a server: right answers are used, wrong ones asked for again, and nothing wrong is passed on."""

import json
import time

import pytest
import torch

from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.data.cache.views import Views
from limbeck.data.cache.writer import fill_cache
from limbeck.data.text.source import TextSource
from limbeck.data.text.tokenizer import train_tokenizer
from limbeck.objectives.fused_head import TopKTeacher
from limbeck.teachers.cached import CachedTeacher
from limbeck.teachers.endpoint import Endpoint, ServedTeacherError
from limbeck.teachers.options import ServedOptions
from limbeck.teachers.served import ServedTeacher
from tests.data.cache.rig import spec
from tests.methods.language import rig as language
from tests.teachers.server import BROKEN, SPOILED, serving

K = 6
SHAPES = ("prompt_logprobs", "echo")


@pytest.fixture(scope="module")
def model():
    return language.llama()


def options(**changes):
    return ServedOptions(**{"model": "tiny", "k": K, "retries": 2, "backoff": 0.01, "timeout": 0.5, **changes})


def served(url, **changes):
    return ServedTeacher(url, options(**changes), language.VOCAB)


def expected(model, items):
    """Ids and log-probabilities from the model itself, ids ascending."""
    signal = LiveTeacher(model).tokens(items)
    values, ids = torch.nn.functional.linear(signal.hidden, signal.weight).log_softmax(-1).topk(K)
    return ids.sort(-1).values, values.gather(-1, ids.argsort(-1))


def same(given, model, items):
    ids, log_probs = expected(model, items)
    order = given.ids.argsort(-1)
    return torch.equal(given.ids.gather(-1, order), ids) and torch.allclose(
        given.log_probs.gather(-1, order), log_probs, atol=1e-5
    )


def requests(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_it_says_what_the_model_says(model, tmp_path, shape, max_tokens):
    items = language.batch(6)
    with serving(model, [], tmp_path / "log") as url:
        teacher = served(url, shape=shape, max_tokens=max_tokens)
        given = teacher.tokens(items)
    assert isinstance(teacher, Teacher)
    assert isinstance(given, TopKTeacher)
    assert same(given, model, items)
    sent = requests(tmp_path / "log")
    assert len(sent) == 6
    lengths = items.attention_mask.sum(1).tolist()
    assert sorted(map(str, (one["prompt"] for one in sent))) == sorted(
        str(row[:length]) for row, length in zip(items.input_ids.tolist(), lengths, strict=True)
    )
    assert {(one["path"], one["model"], one["key"]) for one in sent} == {("/v1/completions", "tiny", None)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [*SPOILED, *(how for how in BROKEN if how not in ("stall", "drip"))])
def test_what_is_wrong_is_asked_for_again_and_then_refused(model, tmp_path, how, shape):
    items = language.batch(1)
    with serving(model, [how, how, "right", f"always {how}"], tmp_path / "log") as url:
        teacher = served(url, shape=shape)
        assert same(teacher.tokens(items), model, items)  # the third time
        assert len(requests(tmp_path / "log")) == 3
        with pytest.raises(ServedTeacherError) as caught:
            teacher.tokens(items)
    assert len(requests(tmp_path / "log")) == 6
    assert "was asked 3 times and gave no usable answer" in caught.value.message
    assert caught.value.exit_code == 1
    assert "--resume" in caught.value.hint


@pytest.mark.parametrize("how", ["stall", "drip"])
def test_a_server_that_is_too_slow_is_asked_again_and_then_refused(model, tmp_path, how):
    items = language.batch(1)
    with serving(model, [how, "right", f"always {how}"], tmp_path / "log") as url:
        teacher = served(url, retries=1, timeout=0.4)
        assert same(teacher.tokens(items), model, items)
        begun = time.monotonic()
        with pytest.raises(ServedTeacherError, match=r"no whole answer within 0\.4 s"):
            teacher.tokens(items)
    assert time.monotonic() - begun < 2


def test_ranks_that_contradict_the_log_probabilities_are_refused(model, tmp_path):
    with (
        serving(model, ["always ranks"], tmp_path / "log") as url,
        pytest.raises(ServedTeacherError, match="contradict each other"),
    ):
        served(url, retries=0).tokens(language.batch(1))


def test_what_will_not_pass_is_not_asked_for_again(model, tmp_path):
    with (
        serving(model, ["always 401"], tmp_path / "log") as url,
        pytest.raises(ServedTeacherError, match=r"asked once .* status 401 \(who are you\?\)"),
    ):
        served(url).tokens(language.batch(1))
    assert len(requests(tmp_path / "log")) == 1


def test_no_server_at_all(tmp_path):
    with pytest.raises(ServedTeacherError, match="ConnectionRefused"):
        served("http://127.0.0.1:9/v1", retries=1).tokens(language.batch(1))


def test_one_bad_sequence_stops_the_batch_without_waiting_for_all(model, tmp_path):
    with serving(model, ["always 500"], tmp_path / "log") as url:
        teacher = served(url, retries=50, backoff=0.02, concurrency=4)
        teacher.endpoint.retries = 1
        with pytest.raises(ServedTeacherError):
            teacher.tokens(language.batch(20))
    assert len(requests(tmp_path / "log")) < 20


def test_tokens_by_their_text(tmp_path):
    texts = ["the cat sat on the mat", "a dög ran after the cat"] * 5
    tokenizer = train_tokenizer(texts, 280)
    vocab = len(tokenizer)
    model = language.llama(vocab_size=vocab)
    ids = tokenizer("the dög sat")["input_ids"]
    assert any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token]) for token in range(vocab))
    items = TextSource([ids], vocab=vocab, tokenizer=tokenizer).fetch(torch.arange(1))
    names = [f"{tokenizer.decode([token])}" for token in range(vocab)]
    unique = [n if names.count(n) == 1 else f"bytes:{t}" for t, n in enumerate(names)]  # as servers tell bytes apart
    with serving(model, [], tmp_path / "log", unique) as url:
        teacher = ServedTeacher(url, options(shape="echo", retries=0), vocab, tokenizer)
        if any(unique[token].startswith("bytes:") for token in ids):
            ids = [token for token in ids if not unique[token].startswith("bytes:")]
            items = TextSource([ids], vocab=vocab).fetch(torch.arange(1))
        given = teacher.tokens(items)
    signal = LiveTeacher(model).tokens(items)
    exact = torch.nn.functional.linear(signal.hidden, signal.weight).log_softmax(-1)
    assert given.ids.shape == (len(ids) - 1, K)
    for row, (entries, log_probs) in enumerate(zip(given.ids.tolist(), given.log_probs.tolist(), strict=True)):
        assert len(set(entries)) == K
        known = {token for token in exact[row].topk(K).indices.tolist() if not unique[token].startswith("bytes:")}
        assert {token for token, value in zip(entries, log_probs, strict=True) if value > -1e9} == known
        for token, value in zip(entries, log_probs, strict=True):
            assert value == -torch.inf or value == pytest.approx(float(exact[row, token]), abs=1e-5)


def test_another_tokenizer_on_the_server_is_found_out(model, tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat"], 270)
    names = [f"<{token}>" for token in range(language.VOCAB)]
    with (
        serving(model, [], tmp_path / "log", names) as url,
        pytest.raises(ServedTeacherError, match="came back as"),
    ):
        ServedTeacher(url, options(shape="echo", retries=0), language.VOCAB, tokenizer).tokens(language.batch(1))


def test_the_key_comes_from_the_environment_and_is_in_no_message(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret-123")
    with serving(model, ["right", "always 500"], tmp_path / "log") as url:
        teacher = served(url, key_variable="TEACHER_KEY", retries=0)
        teacher.tokens(language.batch(1))
        with pytest.raises(ServedTeacherError) as caught:
            teacher.tokens(language.batch(1))
    assert requests(tmp_path / "log")[0]["key"] == "Bearer secret-123"
    assert "secret" not in f"{caught.value} {vars(teacher.endpoint)} {teacher.options}"
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(UsageError, match="TEACHER_KEY is not set"):
        served("http://127.0.0.1:9/v1", key_variable="TEACHER_KEY")


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "localhost:8000", "http://", "http://host:99999/v1", "http://a:b@host/v1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError):
        Endpoint(url)


def test_waits_double_up_to_a_minute_and_are_drawn():
    endpoint = Endpoint("http://127.0.0.1:9/v1", backoff=1.0)
    waits = [endpoint._pause(attempt) for attempt in range(10)]
    for attempt, wait in enumerate(waits):
        assert min(60, 2**attempt) / 2 <= wait <= min(60, 2**attempt)
    assert len({endpoint._pause(3) for _ in range(5)}) > 1


def test_asking_draws_nothing_from_the_streams_of_training(model, tmp_path):
    import random

    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate())
    with serving(model, ["500"], tmp_path / "log") as url:
        served(url).tokens(language.batch(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_what_a_server_says_can_be_cached(model, tmp_path):
    data = language.source()
    with serving(model, [], tmp_path / "log") as url:
        live = served(url)
        fill_cache(tmp_path / "cache", live, Views(data), spec(kind="top-k", k=K), batch_size=8)
        fingerprint = live.fingerprint
    items = data.fetch(torch.arange(5))
    stored = CachedTeacher(tmp_path / "cache")
    assert torch.equal(stored.tokens(items).ids, expected(model, items)[0])
    assert stored.description.key.teacher == fingerprint


def test_it_has_neither_logits_nor_layers():
    with pytest.raises(IncompatibleError, match="most probable tokens"):
        served("http://127.0.0.1:9/v1").signal(language.batch(1))


def test_other_models_and_addresses_have_other_hashes():
    urls = ("http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1")
    hashes = {served(url, model=name).fingerprint for url in urls for name in ("a", "b")}
    assert len(hashes) == 4
