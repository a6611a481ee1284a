from pathlib import Path

import pytest
import torch

from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.data.cache.errors import DamagedCacheError, MissingCacheError
from limbeck.data.cache.folder import CacheFolder
from limbeck.data.cache.reader import CacheReader
from limbeck.data.cache.views import Views
from tests.data.cache.rig import BATCH, ITEMS, batch, contents, fill, source, spec, teacher
from tests.methods.language import rig as language


def direct(rows):
    """The logits of items, from the teacher itself."""
    return teacher().signal(source().fetch(rows)).logits


@pytest.mark.parametrize("open_shards", [1, 2, 100])
def test_any_rows_in_any_order_come_back(tmp_path, open_shards):
    description = fill(tmp_path)
    assert description.shards >= 4
    reader = CacheReader(tmp_path, open_shards)
    for seed in range(5):
        rows = torch.randint(ITEMS, (23,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(reader.read(rows).tensors["logits"], direct(rows))
        assert len(reader._open) <= open_shards


def test_tokens_come_back_item_by_item_however_many_there_are(tmp_path):
    data, live = language.source(), LiveTeacher(language.llama())
    description = fill(tmp_path, data, live, spec=spec(kind="dense"), shard_bytes=8000)
    assert description.shards >= 3
    reader = CacheReader(tmp_path)
    rows = torch.tensor([20, 3, 3, 11, 0, 23])
    found = reader.read(rows)
    items = data.fetch(rows)
    assert torch.equal(found.counts, (items.labels[:, 1:] != -100).sum(1))
    assert torch.equal(found.tensors["logits"], torch.nn.functional.linear(*_hidden(live.tokens(items))))


def _hidden(signal):
    return signal.hidden, signal.weight


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell its maps")
def test_a_shard_is_mapped_and_not_read(tmp_path):
    fill(tmp_path, shard_bytes=1 << 20)
    reader = CacheReader(tmp_path)
    reader.read(torch.tensor([0]))
    (tensors,) = reader._open.values()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    name = str(CacheFolder(tmp_path).shard(0))
    spans = [[int(end, 16) for end in words[0].split("-")] for words in maps if words[-1] == name]
    for tensor in tensors.values():
        assert any(start <= tensor.data_ptr() < end for start, end in spans)


def test_the_same_work_gives_the_same_bytes(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_filling_again_asks_the_teacher_nothing(tmp_path):
    fill(tmp_path)
    before = contents(tmp_path)
    live = teacher()
    live.signal = lambda *given: pytest.fail("asked")
    fill(tmp_path, live=live)
    assert contents(tmp_path) == before


def test_a_new_call_reports_how_far_it_is(tmp_path):
    seen = []
    fill(tmp_path, report=lambda done, rows: seen.append((done, rows)))
    assert seen[-1] == (ITEMS, ITEMS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "cache.json", "seal.json"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_one_flipped_bit_is_found_and_named(tmp_path, name, place):
    fill(tmp_path)
    _flip(tmp_path / name, place)
    with pytest.raises(DamagedCacheError) as caught:
        CacheReader(tmp_path).read(torch.arange(ITEMS))
    assert name in caught.value.message
    assert "limbeck cache" in caught.value.hint


def test_a_flipped_bit_in_the_head_is_found_and_named(tmp_path):
    _fill_hidden(tmp_path)
    _flip(tmp_path / "shared.safetensors", 0.9)
    with pytest.raises(DamagedCacheError, match=r"shared\.safetensors"):
        _ = CacheReader(tmp_path).shared


def _fill_hidden(folder):
    return fill(folder, language.source(), LiveTeacher(language.llama()), spec=spec(kind="hidden"))


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_shard_that_is_short_or_gone_is_named(tmp_path, harm):
    fill(tmp_path)
    path = tmp_path / "shard-00002.safetensors"
    path.unlink() if harm == "remove" else path.write_bytes(path.read_bytes()[:-3])
    reader = CacheReader(tmp_path)
    reader.read(torch.arange(8))  # other shards still serve
    with pytest.raises(DamagedCacheError, match="shard-00002"):
        reader.read(torch.arange(ITEMS))


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.json", "seal.json", "cache.json"])
def test_filling_again_mends_what_is_damaged_and_leaves_the_rest(tmp_path, name):
    fill(tmp_path)
    before = contents(tmp_path)
    _flip(tmp_path / name, 0.5)
    if name == "cache.json":
        with pytest.warns(UserWarning, match="describing the cache anew"):
            fill(tmp_path)
    else:
        fill(tmp_path)
    assert contents(tmp_path) == before


def test_the_cache_of_another_folder_does_not_pass_for_a_shard(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "other", live=teacher(2))
    for end in ("safetensors", "json"):
        name = f"shard-00001.{end}"
        (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(DamagedCacheError, match="shard-00001"):
        CacheReader(tmp_path / "one").read(torch.arange(ITEMS))
    fill(tmp_path / "one")  # whose entry is sound but of another key
    rows = torch.arange(ITEMS)
    assert torch.equal(CacheReader(tmp_path / "one").read(rows).tensors["logits"], direct(rows))


def test_no_cache_and_half_a_cache_are_told_apart(tmp_path):
    with pytest.raises(MissingCacheError, match="no cache"):
        CacheReader(tmp_path / "nowhere")
    fill(tmp_path)
    for name in ("seal.json", "shard-00003.json"):
        (tmp_path / name).unlink()
    with pytest.raises(MissingCacheError, match=r"not complete: \d of \d shards"):
        CacheReader(tmp_path)


def test_a_cache_is_not_begun_among_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        fill(tmp_path)


def test_a_cache_of_a_later_version_is_refused(tmp_path):
    from limbeck.data.cache.folder import read_sealed, write_sealed

    fill(tmp_path)
    content = read_sealed(tmp_path / "cache.json")
    write_sealed(tmp_path / "cache.json", {**content, "version": 99})
    with pytest.raises(UsageError, match="version 99"):
        CacheReader(tmp_path)


def test_a_teacher_that_draws_anew_each_time_cannot_be_cached(tmp_path):
    with pytest.raises(IncompatibleError, match="anew for each batch"):
        fill(tmp_path, live=Ensemble([teacher(1), teacher(2)], "random"))


def test_hidden_states_of_images_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="text alone"):
        fill(tmp_path, spec=spec(kind="hidden"))


def test_an_ensemble_can_be_cached(tmp_path):
    both = Ensemble([teacher(1), teacher(2)])
    fill(tmp_path, live=both)
    rows = torch.arange(BATCH)
    expected = both.signal(batch(rows.tolist())).logits
    assert torch.equal(CacheReader(tmp_path).read(rows).tensors["logits"], expected)


def test_views_number_every_epoch_and_then_two_examples():
    views = Views(source("crop"), seed=3, epochs=2)
    assert len(views) == 2 * ITEMS + 2
    fetched = views.fetch(torch.tensor([0, 49, 50, 99, 100, 101]))
    assert fetched["index"].tolist() == [0, 49, 0, 49, 0, 1]
    assert fetched["view"].tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(fetched["image"][0], fetched["image"][2])
    assert torch.equal(fetched["image"][4:], source().fetch(torch.arange(2))["image"])
    assert len(Views(source(), epochs=5)) == ITEMS
