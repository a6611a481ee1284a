"""Tokenizers and encoding: every byte can be written, prompts are told by lengths, conversations by templates."""

import time

import pytest
import transformers

from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.data.text.documents import Document
from limbeck.data.text.encoding import encode
from limbeck.data.text.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog and the cat", "über den Wolken"] * 20
PAIR = Document("four", "two plus two is ")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_the_special_tokens_come_first(tokenizer):
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (0, 1, 2, 3)
    assert 260 < len(tokenizer) <= 300


@pytest.mark.parametrize("text", ["", "the cat", "日本語 🙂\x00\t\n  two  spaces ", "\r\n"])
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_a_function_of_the_text(tokenizer):
    assert train_tokenizer(list(TEXTS), 300).get_vocab() == tokenizer.get_vocab()


def test_training_on_the_embedded_text_takes_less_than_two_seconds():
    from pydoc_data.topics import topics

    start = time.process_time()
    assert len(train_tokenizer(topics.values(), 1024)) == 1024
    assert time.process_time() - start < 2


def test_it_loads_from_its_folder_and_strangers_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(RecipeError, match=r"data\.text\.tokenizer.*no tokenizer"):
        load_tokenizer("nobody/nothing")


def test_a_text_is_closed_by_the_end_token(tokenizer):
    (one,) = encode([Document("the cat")], tokenizer)
    assert one.ids == [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert one.prompt == 0


def test_prompt_and_completion_are_tokenised_apart(tokenizer):
    (one,) = encode([PAIR], tokenizer)
    assert one.ids[: one.prompt] == tokenizer(PAIR.prompt)["input_ids"]
    assert one.ids[one.prompt :] == [*tokenizer(PAIR.text)["input_ids"], tokenizer.eos_token_id]


def test_a_tokenizer_s_own_special_tokens_stand_where_they_belong(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path)
    encoder = load_tokenizer(str(tmp_path))
    encoder.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
    )
    (text,), (pair,) = encode([Document("the cat")], encoder), encode([PAIR], encoder)
    assert (text.ids[0], text.ids[-1], text.ids.count(2)) == (1, 2, 1)
    assert (pair.ids[0], pair.ids[-1], pair.ids.count(1), pair.ids.count(2)) == (1, 2, 1, 1)


def test_what_the_assistant_says_is_the_target(tokenizer):
    encoded = encode([PAIR, Document("six", "three plus three is ")], tokenizer, chat=True)
    for one, document in zip(encoded, [PAIR, Document("six", "three plus three is ")], strict=True):
        assert tokenizer.decode(one.ids[: one.prompt]) == f"<|bos|>user\n{document.prompt}<|eos|>\n<|bos|>assistant\n"
        assert tokenizer.decode(one.ids[one.prompt :]) == f"{document.text}<|eos|>\n"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(IncompatibleError, match="token 0 once there is an answer"):
        encode([PAIR], other, chat=True)
    other.chat_template = None
    with pytest.raises(IncompatibleError, match="no chat template"):
        encode([PAIR], other, chat=True)
