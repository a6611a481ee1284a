"""Training from a cache is training with the teacher itself, bit by bit."""

import copy

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, TextInfo
from limbeck.core.registry import method_class
from limbeck.core.specs import CacheSpec, DataSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Teacher
from limbeck.core.trainer import Trainer
from limbeck.data.cache.views import Views
from limbeck.data.cache.writer import fill_cache
from limbeck.data.loader import Loader
from limbeck.data.open import open_data
from limbeck.models.shipped import build_shipped
from limbeck.objectives.fused_head import DenseTeacher, HiddenTeacher, TopKTeacher
from limbeck.teachers.cached import CachedTeacher
from tests.data.cache.rig import BATCH, batch, fill, source, spec, teacher
from tests.methods.language import rig as language

STEPS = 12


def cached(folder, live, data, kind="dense", seed=0, epochs=1, batch_size=32, **options):
    """The teacher's cache of some data, in several shards."""
    wanted = CacheSpec(folder=str(folder), kind=kind, **options)
    fill_cache(folder, live, Views(data, seed, epochs), wanted, batch_size=batch_size, shard_bytes=20_000)
    return CachedTeacher(folder)


def train(slug, student, live, data, *, batch_size=32, steps=STEPS, seed=0, accumulate=1, **options):
    """All parameters of the student after some steps, in one vector."""
    kind = method_class(slug)
    torch.manual_seed(11)
    info = data.info()
    method = kind(kind.Options(**options), student=copy.deepcopy(student), teacher=live, data=info)
    train_spec = TrainSpec(steps=steps, batch_size=batch_size, accumulate=accumulate, optimizer=OptimizerSpec(lr=3e-3))
    loader = Loader(data, batch_size, seed, accumulate=accumulate)
    result = Trainer(method, loader, train_spec, steps=steps, items=len(data), seed=seed).fit()
    return torch.cat([parameter.detach().flatten() for parameter in result.parameters()])


def digits(*augmentations):
    return open_data(DataSpec(name="digits", limit=200, augment=list(augmentations))).train


def network(width, seed):
    torch.manual_seed(seed)
    return build_shipped("convnet", {"width": width, "classes": 10, "channels": 1})


@pytest.mark.parametrize("augmentations", [(), ("crop", "jitter")])
def test_classic_distillation_on_digits(tmp_path, augmentations):
    data, live = digits(*augmentations), LiveTeacher(network(8, 1))
    stored = cached(tmp_path, live, data, epochs=3)
    student = network(4, 2)
    assert torch.equal(train("kd", student, stored, data), train("kd", student, live, data))


def test_features_on_digits(tmp_path):
    data, live = digits("crop"), LiveTeacher(network(8, 1))
    stored = cached(tmp_path, live, data, "features", epochs=3, layers=["stages.1", "stages.2"])
    options = {"student_layers": ["stages.1", "stages.2"], "teacher_layers": ["stages.1", "stages.2"], "kd_weight": 0.5}
    student = network(4, 2)
    assert torch.equal(
        train("fitnet", student, stored, data, **options), train("fitnet", student, live, data, **options)
    )


@pytest.mark.parametrize("kind", ["hidden", "dense"])
def test_language_models(tmp_path, kind):
    data, live = language.source(), LiveTeacher(language.gpt2(seed=4, n_layer=2))
    stored = cached(tmp_path, live, data, kind, batch_size=8)
    given = stored.tokens(data.fetch(torch.arange(4)))
    assert isinstance(given, HiddenTeacher if kind == "hidden" else DenseTeacher)
    student = language.gpt2(seed=2)
    options = {"batch_size": 8, "label_weight": 0.5, "temperature": 2.0}
    assert torch.equal(train("kl", student, stored, data, **options), train("kl", student, live, data, **options))


def test_masked_language_models_whose_masks_change_with_each_epoch(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from limbeck.data.text.masking import Masking
    from limbeck.data.text.source import TextSource

    masking = Masking(0.3, 39, 40, torch.tensor([0, 1]))
    data = TextSource(language.source()._ids, vocab=40, masking=masking)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = [BertForMaskedLM(BertConfig(vocab_size=40, max_position_embeddings=40, **sizes)) for _ in range(2)]
    live = LiveTeacher(models[0])
    stored = cached(tmp_path, live, data, epochs=3, batch_size=8)
    options = {"batch_size": 8, "steps": 9}
    assert torch.equal(train("kl", models[1], stored, data, **options), train("kl", models[1], live, data, **options))


def test_micro_batches(tmp_path):
    data, live = digits(), LiveTeacher(network(8, 1))
    stored, student = cached(tmp_path, live, data, batch_size=8), network(4, 2)
    assert torch.equal(train("kd", student, stored, data, accumulate=4), train("kd", student, live, data, accumulate=4))


def test_a_cache_is_a_teacher(tmp_path):
    fill(tmp_path)
    stored = CachedTeacher(tmp_path)
    assert isinstance(stored, Teacher)
    assert stored.fingerprint == teacher().fingerprint
    items = batch([3, 4])
    both = Ensemble([stored, teacher(2)]).signal(items).logits
    assert torch.equal(both, Ensemble([teacher(), teacher(2)]).signal(items).logits)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_half_precision_is_read_back_in_the_teachers_own(tmp_path, dtype, error):
    fill(tmp_path, spec=spec(dtype=dtype))
    stored = CachedTeacher(tmp_path)
    items = batch([3, 4])
    given, exact = stored.signal(items).logits, teacher().signal(items).logits
    assert given.dtype == torch.float32
    assert torch.allclose(given, exact, rtol=error, atol=error)
    assert stored.fingerprint != teacher().fingerprint


def test_most_probable_tokens(tmp_path):
    data, live = language.source(), LiveTeacher(language.llama())
    stored = cached(tmp_path, live, data, "top-k", k=8, batch_size=8)
    items = data.fetch(torch.tensor([9, 2, 17]))
    given, exact = stored.tokens(items), live.tokens(items)
    assert isinstance(given, TopKTeacher)
    log_probs = torch.nn.functional.linear(exact.hidden, exact.weight).log_softmax(-1)
    values, ids = log_probs.topk(8)
    assert torch.equal(given.ids, ids.sort(-1).values)
    expected = values.gather(-1, ids.argsort(-1))
    assert torch.allclose(given.log_probs.exp(), expected.exp(), atol=0.01)
    weights = train("kl", language.gpt2(), stored, data, batch_size=8)
    assert weights.isfinite().all()
    assert stored.fingerprint != live.fingerprint


def test_most_probable_classes_share_the_rest_evenly(tmp_path):
    fill(tmp_path, spec=spec(kind="top-k", k=3))
    items = batch([3, 4, 30])
    given = CachedTeacher(tmp_path).signal(items).logits.softmax(-1)
    exact = teacher().signal(items).logits.softmax(-1)
    values, classes = exact.topk(3)
    assert torch.allclose(given.gather(-1, classes), values, atol=0.01)
    rest = ((1 - values.sum(-1, keepdim=True)) / 2).expand(3, 2)
    others = torch.ones_like(exact).scatter(-1, classes, 0).nonzero()[:, 1].view(3, 2)
    assert torch.allclose(given.gather(-1, others), rest, atol=0.01)


def test_layers_by_glob_and_layers_that_are_not_there(tmp_path):
    fill(tmp_path, spec=spec(kind="features", layers=["stages.*.conv"]))
    stored = CachedTeacher(tmp_path)
    assert stored.layers == ("stages.0.conv", "stages.1.conv")
    given = stored.signal(batch([1, 2]), ["*.1.conv", "stages.0.*"])
    assert list(given.features) == ["stages.1.conv", "stages.0.conv"]
    live = teacher().signal(batch([1, 2]), ["stages.1.conv"])
    assert torch.equal(given.features["stages.1.conv"], live.features["stages.1.conv"])
    assert torch.equal(given.logits, live.logits)
    with pytest.raises(IncompatibleError, match=r"no layer 'stages\.2'"):
        stored.signal(batch([1]), ["stages.2"])


def test_what_is_not_stored_is_refused(tmp_path):
    fill(tmp_path / "images")
    with pytest.raises(IncompatibleError, match="does not hold what a teacher says about tokens"):
        CachedTeacher(tmp_path / "images").tokens(batch([1]))
    data = language.source()
    stored = cached(tmp_path / "text", LiveTeacher(language.llama()), data, batch_size=BATCH)
    with pytest.raises(IncompatibleError, match="says about tokens"):
        stored.signal(data.fetch(torch.arange(2)))


def test_hidden_states_that_do_not_make_the_logits_are_refused(tmp_path):
    live = LiveTeacher(language.Headless(language.llama()))
    with pytest.raises(IncompatibleError, match="kind: dense"):
        cached(tmp_path, live, language.source(), "hidden", batch_size=8)


def test_the_example_of_varied_data_is_there_as_it_is(tmp_path):
    data, live = source("crop"), teacher()
    fill(tmp_path, data, live)
    example = data.info().example
    assert torch.equal(CachedTeacher(tmp_path).signal(example).logits, live.signal(example).logits)


def test_text_with_classes(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from limbeck.data.text.source import TextSource

    text = language.source()
    data = TextSource(text._ids, text._lengths, vocab=40, label=torch.arange(len(text)) % 3)
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "num_labels": 3}
    live = LiveTeacher(GPT2ForSequenceClassification(GPT2Config(pad_token_id=language.END, **settings)))
    stored = cached(tmp_path, live, data, batch_size=8)
    items = data.fetch(torch.arange(8))
    assert stored.description.shift is None
    assert torch.equal(stored.signal(items).logits, live.signal(items).logits)
    assert DataInfo(24, 3, items, TextInfo(40)).classes == 3
