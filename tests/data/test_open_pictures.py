"""Opening class folders, parquet files and saved data sets: one path for all of them."""

import shutil
import sys

import pytest
import torch

from limbeck.core.errors import DamagedFileError, IncompatibleError, MissingExtraError, RecipeError
from limbeck.core.specs import DataSpec
from limbeck.data.items import ItemSource
from limbeck.data.names import check_data
from limbeck.data.open import open_data
from tests.data.pictures import CLASSES, dataset, pixels, png, write_folder

RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}


def shown(source, rows: list[int]) -> torch.Tensor:
    """The pictures at `rows` as bytes (items, height, width, 3)."""
    return (source.fetch(torch.tensor(rows)).image * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def drawn(*items: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(pixels(item)) for item in items])


def test_a_class_folder_is_split_by_class(tmp_path):
    write_folder(tmp_path / "d", each=10)
    split = open_data(DataSpec(name=f"folder:{tmp_path / 'd'}"))
    assert (len(split.train), len(split.validation)) == (24, 6)
    assert split.train.class_names == split.validation.class_names == CLASSES
    assert torch.bincount(split.train.labels).tolist() == [8, 8, 8]


def test_train_and_val_folders_are_the_split(tmp_path):
    write_folder(tmp_path / "train", each=4)
    write_folder(tmp_path / "val", each=2, classes=CLASSES[:2])
    split = open_data(DataSpec(name=f"folder:{tmp_path}", **RAW))
    assert (len(split.train), len(split.validation), split.validation.classes) == (12, 4, 3)
    assert split.train.labels.tolist() == [0, 1, 2] * 4
    assert torch.equal(shown(split.train, [0, 5]), drawn(0, 21))
    assert torch.equal(shown(split.validation, [1]), drawn(10))


def test_a_part_of_a_class_folder_holds_all_classes(tmp_path):
    write_folder(tmp_path / "train", each=4)
    write_folder(tmp_path / "val", each=2)
    train = open_data(DataSpec(name=f"folder:{tmp_path}", limit=6)).train
    assert torch.bincount(train.labels).tolist() == [2, 2, 2]


def test_a_class_that_was_not_trained_on_is_refused(tmp_path):
    write_folder(tmp_path / "train", classes=CLASSES[:2])
    write_folder(tmp_path / "val")
    with pytest.raises(RecipeError, match="'emu'"):
        open_data(DataSpec(name=f"folder:{tmp_path}"))


def test_pictures_of_different_sizes_need_an_image_size(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    (tmp_path / "train" / "dog" / "big.png").write_bytes(png(0, size=16))
    with pytest.raises(IncompatibleError, match=r"(?s)big\.png has 16x16.*8x8.*data\.image_size"):
        open_data(DataSpec(name=f"folder:{tmp_path}")).train.fetch(torch.arange(13))
    split = open_data(DataSpec(name=f"folder:{tmp_path}", image_size=10))
    assert split.train.info().example.image.shape == (2, 3, 10, 10)


def test_a_damaged_picture_is_named(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    path = tmp_path / "train" / "dog" / "02.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DamagedFileError, match=r"dog/02\.png"):
        open_data(DataSpec(name=f"folder:{tmp_path}")).train.fetch(torch.arange(12))


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(RecipeError, match="no pictures"):
        open_data(DataSpec(name=f"folder:{tmp_path}"))


def test_a_parquet_file_of_datasets_tells_columns_and_classes(tmp_path):
    dataset(30).to_parquet(tmp_path / "x.parquet")
    split = open_data(DataSpec(name=f"parquet:{tmp_path / 'x.parquet'}"))
    assert (len(split.train), len(split.validation), split.train.class_names) == (24, 6, CLASSES)


def test_a_parquet_folder_is_split_by_the_files_names(tmp_path):
    (tmp_path / "data").mkdir()
    rows = dataset(12)
    rows.select(range(6)).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    rows.select(range(6, 9)).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    rows.select(range(9, 12)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    split = open_data(DataSpec(name=f"parquet:{tmp_path}", **RAW))
    assert (len(split.train), len(split.validation)) == (9, 3)
    assert torch.equal(shown(split.train, [8, 2]), drawn(8, 2))
    assert torch.equal(shown(split.validation, [0]), drawn(9))
    assert split.validation.labels.tolist() == [0, 1, 2]


def test_plain_parquet_needs_no_notes_of_datasets(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"photo": [png(item) for item in range(9)], "animal": [CLASSES[i % 3] for i in range(9)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    split = open_data(DataSpec(name=f"parquet:{tmp_path}", validation=0.4, **RAW))
    assert split.train.class_names == CLASSES
    assert torch.equal(split.train.labels, torch.tensor([CLASSES.index(CLASSES[i]) for i in split.train.keys % 3]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "pictures"}, r"data\.image_column.*'pictures'\n.*'picture'"),
        ({"image_column": "kind"}, r"'kind' is no image\n.*picture"),
        ({"label_column": "picture"}, r"data\.label_column.*no label\n.*id, kind"),
    ],
)
def test_wrong_columns_get_a_hint(tmp_path, columns, message):
    dataset().to_parquet(tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match=message):
        open_data(DataSpec(name=f"parquet:{tmp_path}", **columns))


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DamagedFileError, match=r"x\.parquet"):
        open_data(DataSpec(name=f"parquet:{tmp_path}"))


def test_a_picture_kept_elsewhere_is_not_followed(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [{"bytes": None, "path": "/etc/passwd"}] * 4, "label": [0, 1, 0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DamagedFileError, match="item 0"):
        open_data(DataSpec(name=f"parquet:{tmp_path}"))


def test_a_saved_data_set_is_the_same_as_its_parquet(tmp_path):
    rows = dataset(12)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "x.parquet")
    ours = open_data(DataSpec(name=f"datasets:{tmp_path / 'saved'}"))
    theirs = open_data(DataSpec(name=f"parquet:{tmp_path / 'x.parquet'}"))
    for one, other in ((ours.train, theirs.train), (ours.validation, theirs.validation)):
        assert torch.equal(one.fetch(torch.arange(len(one))).image, other.fetch(torch.arange(len(other))).image)
        assert torch.equal(one.labels, other.labels)
        assert one.class_names == other.class_names == CLASSES


def test_a_saved_dictionary_of_data_sets_brings_its_split(tmp_path):
    from datasets import DatasetDict

    rows = dataset(12)
    DatasetDict({"train": rows.select(range(9)), "test": rows.select(range(9, 12))}).save_to_disk(tmp_path / "saved")
    split = open_data(DataSpec(name=f"datasets:{tmp_path / 'saved'}", **RAW))
    assert (len(split.train), len(split.validation)) == (9, 3)
    assert torch.equal(shown(split.validation, [2]), drawn(11))


def test_a_folder_that_is_no_saved_data_set_is_named(tmp_path):
    with pytest.raises(DamagedFileError, match="no saved data set"):
        open_data(DataSpec(name=f"datasets:{tmp_path}"))


def test_pictures_are_decoded_once_when_they_fit_and_each_time_when_they_do_not(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    whole = open_data(DataSpec(name=f"folder:{tmp_path}")).train
    assert isinstance(whole, ItemSource)
    small = ItemSource(whole.read, whole.labels, normalisation=whole.normalisation, cache_bytes=100)
    assert torch.equal(small.fetch(torch.arange(12)).image, whole.fetch(torch.arange(12)).image)
    shutil.rmtree(tmp_path / "train")
    whole.fetch(torch.arange(12))
    with pytest.raises(DamagedFileError):
        small.fetch(torch.arange(12))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("limbeck.data.names.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"limbeck\[vision\]"):
        check_data(DataSpec(name=f"datasets:{tmp_path}"))
