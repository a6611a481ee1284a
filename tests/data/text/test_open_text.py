"""Text by name: files and tables read, split by document, tokenised with what the training part alone has taught."""

import json

import pytest
import torch
from pydantic import ValidationError

from limbeck.core.errors import DamagedFileError, RecipeError, UsageError
from limbeck.core.specs import DataSpec
from limbeck.data.names import check_data
from limbeck.data.open import DataSplit, open_data
from limbeck.data.text.documents import Document, hold_out

ROWS = [
    {"question": f"what is {n} and {n}? ", "answer": f"it is {2 * n}", "kind": "even" if n % 2 else "odd"}
    for n in range(40)
]
PAIRS = {"prompt_column": "question", "completion_column": "answer", "length": 64, "packing": False}


def opened(name: str, **text) -> DataSplit:
    fields = {key: text.pop(key) for key in ("label_column", "limit", "validation") if key in text}
    return open_data(DataSpec(name=name, text={"tokenizer": "bpe:280", **text}, **fields))


def written(folder, name: str = "rows.jsonl", rows=ROWS) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(source, prompt: bool = False) -> list[str]:
    batch = source.fetch(torch.arange(len(source)))
    chosen = (batch.labels == -100) & (batch.attention_mask == 1) if prompt else batch.labels != -100
    return [source.tokenizer.decode(ids[mask]) for ids, mask in zip(batch.input_ids, chosen, strict=True)]


def whole(source) -> str:
    """All targets as one text; rows may end within a character."""
    labels = source.fetch(torch.arange(len(source))).labels
    return source.tokenizer.decode(labels[labels != -100])


@pytest.fixture(scope="module")
def pydoc():
    return opened("pydoc")


def test_the_embedded_text_is_split_by_document(pydoc):
    from pydoc_data.topics import topics

    parts = [whole(source) for source in (pydoc.train, pydoc.validation)]
    for text in topics.values():
        homes = [text[:200] in part for part in parts]
        assert sum(homes) == 1
    assert len(parts[1]) / sum(map(len, parts)) == pytest.approx(0.2, abs=0.02)
    assert pydoc.train.vocab == pydoc.validation.vocab == 280


def test_opening_it_again_gives_the_same_tokens(pydoc):
    again = opened("pydoc")
    assert torch.equal(again.train._ids, pydoc.train._ids)
    assert again.train.tokenizer.get_vocab() == pydoc.train.tokenizer.get_vocab()


def test_whole_documents_are_held_out_and_about_the_share():
    documents = [Document("x" * size) for size in (500, 10, 20, 30, 40, 100, 101, 102, 103)]
    kept, held = hold_out(documents, 0.2, 3)
    assert sorted(map(len, [d.text for d in kept + held])) == sorted(len(d.text) for d in documents)
    assert sum(document.size for document in held) <= 201
    assert hold_out(documents, 0.2, 3) == (kept, held) != hold_out(documents, 0.2, 4)
    assert len(hold_out(documents[:2], 1e-6, 0)[1]) == 1
    with pytest.raises(RecipeError, match="single document"):
        hold_out(documents[:1], 0.2, 0)


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    lines = [f"line number {number} of the file\n" for number in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = opened(f"text:{tmp_path / 'a.txt'}", length=32)
    train, held = whole(data.train), whole(data.validation)
    assert train.removesuffix("<|eos|>") + held.removesuffix("<|eos|>") == "".join(lines)
    assert held.startswith("line number 160 ")


def test_without_packing_a_paragraph_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n  \n\nfour\n")
    data = opened(f"text:{tmp_path}", packing=False, validation=0.3)
    found = sorted(texts(data.train) + texts(data.validation))
    assert found == ["four<|eos|>", "one\ntwo<|eos|>", "three<|eos|>"]


def test_file_names_tell_the_split(tmp_path):
    (tmp_path / "train-1.txt").write_text("alpha " * 50)
    (tmp_path / "valid.txt").write_text("beta " * 50)
    data = opened(f"text:{tmp_path}", length=16)
    assert "beta" not in "".join(texts(data.train))
    assert "alpha" not in "".join(texts(data.validation))


def test_prompts_are_recoverable_and_no_targets(tmp_path):
    data = opened(f"jsonl:{written(tmp_path)}", **PAIRS)
    found = dict(zip(texts(data.train, prompt=True), texts(data.train), strict=True))
    assert len(data.train) + len(data.validation) == 40
    for row in ROWS:
        if row["question"] in found:
            assert found[row["question"]] == row["answer"] + "<|eos|>"
    assert len(found) == len(data.train)


def test_packed_completions_keep_their_masks(tmp_path):
    data = opened(f"jsonl:{written(tmp_path)}", **{**PAIRS, "packing": True, "length": 16})
    joined = "".join(texts(data.train))
    assert "what" not in joined
    assert joined.count("<|eos|>") == joined.count("it is ")


def test_chat_marks_what_the_assistant_says(tmp_path):
    data = opened(f"jsonl:{written(tmp_path)}", chat=True, **PAIRS)
    assert all(text.startswith("it is ") and text.endswith("<|eos|>\n") for text in texts(data.train))
    assert all(text.endswith("assistant\n") for text in texts(data.train, prompt=True))


def test_a_folder_brings_its_own_validation_rows_and_a_limit_keeps_the_first(tmp_path):
    written(tmp_path, "train.jsonl", ROWS[:30])
    written(tmp_path, "test.jsonl", ROWS[30:])
    data = opened(f"jsonl:{tmp_path}", limit=5, **PAIRS)
    assert (len(data.train), len(data.validation)) == (5, 10)
    assert texts(data.train, prompt=True)[0] == ROWS[0]["question"]


def test_text_can_have_classes(tmp_path):
    name = f"jsonl:{written(tmp_path)}"
    data = opened(name, label_column="kind", completion_column="question", length=64)
    assert data.train.class_names == data.validation.class_names == ("even", "odd")
    batch = data.train.fetch(torch.arange(len(data.train)))
    for ids, mask, label in zip(batch.input_ids, batch.attention_mask, batch.label, strict=True):
        number = int(data.train.tokenizer.decode(ids[mask.bool()]).split()[2])
        assert data.train.class_names[label] == ("even" if number % 2 else "odd")


def test_tables_of_other_formats_serve_too(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": table.select(range(30)), "test": table.select(range(30, 40))}).save_to_disk(
        tmp_path / "saved"
    )
    expected = sorted(row["answer"] + "<|eos|>" for row in ROWS)
    for name in (f"parquet:{tmp_path / 'rows.parquet'}", f"datasets:{tmp_path / 'saved'}"):
        data = opened(name, **PAIRS)
        assert sorted(texts(data.train) + texts(data.validation)) == expected


def test_masked_text_hides_tokens(tmp_path):
    data = opened("pydoc", mask_rate=0.2, length=32)
    batch = data.train.fetch(torch.arange(50), 1)
    assert (batch.labels != -100).float().mean() == pytest.approx(0.2, abs=0.03)
    assert (batch.input_ids == data.train.tokenizer.mask_token_id).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "pydoc", "text": {"tokenizer": "bpe:100"}}, r"(?s)data\.text\.tokenizer.*from 260"),
        ({"name": "pydoc", "text": {"tokenizer": "bpe"}}, r"data\.text\.tokenizer"),
        ({"name": "pydoc", "text": {"tokenizer": "./nowhere"}}, "no folder './nowhere'"),
        ({"name": "pydoc:x"}, "unknown data set"),
        ({"name": "text:nowhere.txt"}, "no file or folder"),
        ({"name": "pydoc", "augment": ["flip"]}, r"data\.augment"),
        ({"name": "pydoc", "label_column": "x", "text": {"mask_rate": 0.1}}, r"data\.label_column"),
    ],
)
def test_wrong_names_and_options_are_seen_without_reading_anything(spec, message):
    with pytest.raises(UsageError, match=message):
        check_data(DataSpec(**spec))


def test_unknown_options_are_refused():
    with pytest.raises(ValidationError):
        DataSpec(name="pydoc", text={"lenght": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"completion_column": "anwser"}, r"(?s)completion_column.*'answer'"),
        ({"prompt_column": "x", "completion_column": "answer"}, "prompt_column"),
        ({}, "(?s)name the column.*question, answer"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        opened(f"jsonl:{written(tmp_path)}", **text)


def test_broken_rows_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DamagedFileError, match="line 3 is no JSON"):
        opened(f"jsonl:{path}")
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(RecipeError, match="row 1 has no text"):
        opened(f"jsonl:{path}")
    (tmp_path / "b.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(DamagedFileError, match="no UTF-8 at byte 5"):
        opened(f"text:{tmp_path / 'b.txt'}")
