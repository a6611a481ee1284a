"""A cache of something else is refused, and the message says what differs."""

import dataclasses

import pytest
import torch

from limbeck.core.teacher import LiveTeacher
from limbeck.data.cache.errors import ForeignCacheError
from limbeck.data.cache.key import CacheKey, fingerprint, tokenizer_fingerprint
from limbeck.data.cache.views import Views
from limbeck.data.text.source import TextSource
from limbeck.data.text.tokenizer import train_tokenizer
from limbeck.models.normalisation import set_normalisation
from limbeck.teachers.cached import CachedTeacher
from tests.data.cache.rig import batch, fill, source, spec, teacher
from tests.methods.language import rig as language


def refused(folder, wanted=None, data=None, live=None, seed=0, epochs=1):
    """Names of what differs between the cache in a folder and the one that is asked for, and the message."""
    key = CacheKey.of(wanted or spec(), Views(data or source(), seed, epochs), live or teacher())
    with pytest.raises(ForeignCacheError) as caught:
        CachedTeacher(folder, key)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.differences, caught.value.message


def test_the_right_key_opens_it(tmp_path):
    fill(tmp_path)
    CachedTeacher(tmp_path, CacheKey.of(spec(), Views(source()), teacher()))


def test_another_teacher(tmp_path):
    fill(tmp_path)
    differences, message = refused(tmp_path, live=teacher(2))
    assert differences == ("teacher",)
    assert "another teacher" in message


def test_one_changed_weight_is_another_teacher(tmp_path):
    fill(tmp_path)
    live = teacher()
    with torch.no_grad():
        next(live.model.parameters()).view(-1)[0] += 1e-6
    assert refused(tmp_path, live=live)[0] == ("teacher",)


def test_without_a_teacher_the_cache_is_believed(tmp_path):
    fill(tmp_path)
    CachedTeacher(tmp_path, CacheKey.of(spec(), Views(source()), None))


def test_other_data(tmp_path):
    fill(tmp_path)
    assert refused(tmp_path, data=source(seed=5))[0] == ("normalisation", "data")  # which is measured on the data
    assert "data" in refused(tmp_path, data=source(items=49))[0]
    changed = source()
    changed.labels[3] = (changed.labels[3] + 1) % 5
    differences, message = refused(tmp_path, data=changed)
    assert differences == ("data",)
    assert "other data" in message


def test_another_normalisation_matters_where_the_teacher_has_none_of_its_own(tmp_path):
    fill(tmp_path / "bare")
    other = source()
    other.set_normalisation([0.5], [0.5])
    differences, message = refused(tmp_path / "bare", data=other)
    assert differences == ("normalisation",)
    assert "0.5" in message
    live = teacher()
    set_normalisation(live.model, [0.4], [0.2])
    fill(tmp_path / "own", live=live)
    CachedTeacher(tmp_path / "own", CacheKey.of(spec(), Views(other), live))


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"kind": "top-k", "k": 3}, "kind", "holds dense, and top-k"),
        ({"dtype": "bfloat16"}, "dtype", "holds float32, and bfloat16"),
        ({"kind": "features", "layers": ["stages.0"]}, "layers", "stages.0"),
    ],
)
def test_another_kind_precision_or_layers(tmp_path, changes, name, said):
    fill(tmp_path)
    differences, message = refused(tmp_path, spec(**changes))
    assert name in differences
    assert said in message


def test_another_k(tmp_path):
    fill(tmp_path, spec=spec(kind="top-k", k=3))
    assert refused(tmp_path, spec(kind="top-k", k=4)) == (
        ("k",),
        f"the cache in {tmp_path} is not for this: it holds the 3 most probable tokens, and 4 are asked for",
    )


def test_another_seed_or_kind_of_augmentation(tmp_path):
    fill(tmp_path, source("crop"), seed=1, epochs=2)
    CachedTeacher(tmp_path, CacheKey.of(spec(), Views(source("crop"), 1, 2), teacher()))
    assert refused(tmp_path, data=source("crop"), seed=2, epochs=2)[0] == ("augmentation",)
    assert refused(tmp_path, data=source("flip"), seed=1, epochs=2)[0] == ("augmentation",)
    assert refused(tmp_path, data=source(), seed=1)[0] == ("augmentation", "epochs")


def test_more_epochs_than_are_stored(tmp_path):
    fill(tmp_path, source("crop"), epochs=2)
    differences, message = refused(tmp_path, data=source("crop"), epochs=3)
    assert differences == ("epochs",)
    assert "holds 2 epochs" in message
    CachedTeacher(tmp_path, CacheKey.of(spec(), Views(source("crop"), 0, 1), teacher()))  # fewer are no trouble


def test_another_tokenizer(tmp_path):
    texts = ["the cat sat on the mat", "a dog ran after the cat"] * 5
    one, other = train_tokenizer(texts, 270), train_tokenizer([text[::-1] for text in texts], 270)

    def data(tokenizer):
        return TextSource(language.source()._ids, tokenizer=tokenizer)

    live = LiveTeacher(language.gpt2(vocab_size=300))
    fill(tmp_path, data(one), live, spec=spec(kind="top-k", k=5))
    differences, message = refused(tmp_path, spec(kind="top-k", k=5), data(other), live)
    assert differences == ("tokenizer",)
    assert "tokenizer" in message
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(train_tokenizer(texts, 270))
    one(texts, padding=True)  # leaves a trace in the tokenizer, which says nothing about its tokens
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(train_tokenizer(texts, 270))


def test_other_tokens_that_count(tmp_path):
    live, data = LiveTeacher(language.llama()), language.source()
    fill(tmp_path, data, live)
    everything = TextSource(data._ids, data._lengths, vocab=language.VOCAB)
    differences, message = refused(tmp_path, data=everything, live=live)
    assert differences == ("targets",)
    assert "other tokens of the text count" in message


def test_a_second_fill_is_refused_like_a_reading(tmp_path):
    fill(tmp_path)
    with pytest.raises(ForeignCacheError) as caught:
        fill(tmp_path, live=teacher(2))
    assert caught.value.differences == ("teacher",)


def test_the_hash_of_data_sees_every_part_of_them():
    base = fingerprint(source())
    assert fingerprint(source()) == base
    assert fingerprint(source("crop")) == base  # of which the augmentation is none
    assert fingerprint(source(seed=1)) != base
    assert fingerprint(source().select(torch.arange(49))) != base
    text = language.source()
    assert set(fingerprint(text)) == {"data", "targets"}
    moved = TextSource((text._ids + 1) % language.VOCAB, text._lengths, text._targets, vocab=language.VOCAB)
    assert fingerprint(moved)["data"] != fingerprint(text)["data"]


def test_keys_compare_all_their_parts():
    key = CacheKey.of(spec(), Views(source()), teacher())
    for field in dataclasses.fields(key):
        other = dataclasses.replace(key, **{field.name: "something else"})
        assert key.differences(other) == (field.name,)
        assert key.digest != other.digest


class TestItems:
    """Every batch is compared with what the teacher was shown."""

    def test_validation_data_are_not_taken_for_training_data(self, tmp_path):
        fill(tmp_path)
        with pytest.raises(ForeignCacheError, match=r"item 2 is another image .* when the cache was made"):
            CachedTeacher(tmp_path).signal(batch([2, 7], source(seed=9)))

    def test_neither_are_mixed_images(self, tmp_path):
        fill(tmp_path)
        items = batch([2, 7])
        mixed = items.replace(image=items["image"].lerp(items["image"].flip(0), 0.3))
        with pytest.raises(ForeignCacheError, match="another image"):
            CachedTeacher(tmp_path).signal(mixed)

    def test_another_normalisation_and_rounding_are(self, tmp_path):
        fill(tmp_path)
        items = batch([2, 7])
        image = (items["image"] * 1.7 - 0.3) * (1 + 1e-5)
        assert CachedTeacher(tmp_path).signal(items.replace(image=image)).logits is not None

    def test_an_item_beyond_the_data_is_refused(self, tmp_path):
        fill(tmp_path)
        items = batch([2, 7])
        with pytest.raises(ForeignCacheError, match="item 70 is not among the 50"):
            CachedTeacher(tmp_path).signal(items.replace(index=torch.tensor([2, 70])))

    def test_other_tokens_and_other_targets_are_refused(self, tmp_path):
        live, data = LiveTeacher(language.llama()), language.source()
        fill(tmp_path, data, live)
        cached, items = CachedTeacher(tmp_path), data.fetch(torch.arange(4))
        ids = items.input_ids.clone()
        ids[2, 0] += 1
        with pytest.raises(ForeignCacheError, match="item 2 has other tokens"):
            cached.tokens(items.replace(input_ids=ids))
        labels = items.labels.clone()
        labels[3, 4] = -100
        with pytest.raises(ForeignCacheError, match="item 3 counts other tokens"):
            cached.tokens(items.replace(labels=labels))

    def test_an_epoch_that_is_not_stored_is_refused(self, tmp_path):
        fill(tmp_path, source("crop"), epochs=2)
        cached = CachedTeacher(tmp_path)
        items = Views(source("crop"), 0, 3).fetch(torch.tensor([2 * 50 + 1]))
        with pytest.raises(ForeignCacheError, match="epoch 3 of augmented items"):
            cached.signal(items)
        with pytest.raises(ForeignCacheError, match="not as this batch does"):
            cached.signal(batch([4]))

    def test_a_batch_without_numbers_is_refused(self, tmp_path):
        from limbeck.core.batch import Batch

        fill(tmp_path)
        with pytest.raises(ForeignCacheError, match="without index"):
            CachedTeacher(tmp_path).signal(Batch({"image": batch([1])["image"]}))
