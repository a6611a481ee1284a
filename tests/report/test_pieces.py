"""The small parts of a report: figures as text, escaped HTML, pictures, and tables of many classes."""

import base64
import io
import json

import pytest
import torch
from PIL import Image

from limbeck.core.recipe import check_recipe
from limbeck.report.confusion import _pairs
from limbeck.report.figures import count, duration, percent, points
from limbeck.report.markup import Html, data_block, fill, join
from limbeck.report.pictures import data_uri, png
from limbeck.report.story import Series
from tests.report.conftest import recipe


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (2.5e-8, "25 ns"),
        (3.4e-5, "34 µs"),
        (0.0123, "12.3 ms"),
        (1.5, "1.5 s"),
        (61, "1 min 01 s"),
        (3600, "1 h 00 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_numbers():
    assert percent(0.8749).replace("\N{NO-BREAK SPACE}", " ") == "87.5 %"
    assert points(-0.004) == "−0.4"
    assert points(0.019) == "+1.9"
    assert [count(n).replace("\N{NO-BREAK SPACE}", " ") for n in (7, 1702, 63123, 2.5e12)] == [
        "7",
        "1.7 k",
        "63.1 k",
        "2.5 T",
    ]


def test_values_are_escaped_and_html_is_not():
    assert fill("<b title='{}'>{x}</b>", "'<", x=Html("<i>")) == "<b title='&#x27;&lt;'><i></b>"
    assert fill("{:.1f}", 1.25) == "1.2"
    assert join(["<", Html("<")]) == "&lt;<"


def test_data_cannot_end_their_element():
    block = data_block("x", {"text": "</script><!-- & \u2028", "none": [float("nan"), (float("inf"), 1.5)]})
    inside = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not set("<>&\u2028") & set(inside)
    assert json.loads(inside) == {"text": "</script><!-- & \u2028", "none": [None, [None, 1.5]]}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB")])
def test_pictures_are_true_to_the_pixel(channels, mode):
    image = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    opened = Image.open(io.BytesIO(png(image)))
    assert (opened.mode, opened.size) == (mode, (7, 5))
    kept = 3 if mode == "RGB" else 1
    pixels = torch.tensor(list(opened.tobytes())).view(5, 7, kept).permute(2, 0, 1)
    assert torch.equal(pixels, (image[:kept] * 255).round().long())


def test_large_pictures_are_scaled_down():
    uri = data_uri(torch.rand(3, 200, 400))
    opened = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert opened.size == (80, 40)


def test_many_classes_are_told_as_pairs():
    matrix = torch.eye(30, dtype=torch.long) * 9
    matrix[3, 4] = 5
    matrix[7, 1] = 2
    names = tuple(f"class {n}" for n in range(30))
    series = Series(None, check_recipe(recipe()).stages[0], 0, "student")  # type: ignore[arg-type]
    table = _pairs(series, matrix, names)
    assert table.index("class 4") < table.index("class 1<")
    assert table.count("<tr>") == 3
