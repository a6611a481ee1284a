"""Packing and padding: no token is lost or doubled, and masks stay with their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import IncompatibleError
from limbeck.data.text.encoding import Encoded
from limbeck.data.text.packing import pack, pad

documents = st.lists(
    st.lists(st.integers(1, 99), min_size=1, max_size=12).flatmap(
        lambda ids: st.integers(0, len(ids)).map(lambda prompt: Encoded(ids, prompt))
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(4, 9))
def test_packing_keeps_every_token_and_its_mask(encoded, length):
    tokens = [token for document in encoded for token in document.ids]
    wanted = [place >= document.prompt for document in encoded for place in range(len(document.ids))]
    if len(tokens) < 2:
        with pytest.raises(IncompatibleError):
            pack(encoded, length)
        return
    rows = pack(encoded, length)
    present = torch.arange(length) < rows.lengths[:, None]
    lost = len(tokens) - int(present.sum())
    assert lost in (0, 1)  # a last row of a single token predicts nothing
    assert rows.ids[present].tolist() == tokens[: len(tokens) - lost]
    targets = present if rows.targets is None else rows.targets
    assert targets[present].tolist() == wanted[: len(tokens) - lost]


def test_a_completion_that_is_cut_goes_on_as_a_target_in_the_next_row():
    rows = pack([Encoded([1, 2, 3, 4, 5], 2), Encoded([6, 7, 8], 2)], 4)
    assert rows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert rows.targets.tolist() == [[False, False, True, True], [True, False, False, True]]


def test_padding_is_one_document_a_row_as_wide_as_the_longest():
    with pytest.warns(UserWarning, match="1 of 4 texts"):
        rows = pad([Encoded([1, 2], 1), Encoded([3, 4, 5, 6, 7], 4), Encoded([8, 9, 8]), Encoded([5] * 9)], 4, fill=77)
    assert rows.ids.tolist() == [[1, 2, 77, 77], [8, 9, 8, 77], [5] * 4]
    assert rows.lengths.tolist() == [2, 3, 4]
    assert rows.kept.tolist() == [0, 2, 3]
    assert rows.targets[0].tolist() == [False, True, True, True]


def test_text_without_a_target_is_refused():
    with pytest.raises(IncompatibleError, match="first 3 tokens"):
        pad([Encoded([1, 2, 3, 4], 3)], 3)
