"""Pictures of validation items with what every stage says about them."""

import base64
import struct
import zlib
from typing import TYPE_CHECKING

from limbeck.report.figures import percent
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.predictions import EXTERNAL, NothingToShow, Predictions, is_classifier
from limbeck.report.story import TEACHER, Story

if TYPE_CHECKING:
    from torch import Tensor

_EACH = 12
_SIDE = 80


def pictures(story: Story) -> Section | None:
    """An even sample of the validation items of the first run that can show some, and items that the stages dispute."""
    reason = "there is no run"
    for view in story.views:
        try:
            return _section(story, view.recipe.seed, story.predictions(view), view.run.folder.name)
        except NothingToShow as error:
            reason = str(error)
    body = fill("<p class='quiet'>No pictures: {}.</p>", reason)
    classify = any(is_classifier(stage) for view in story.views for stage in view.recipe.stages if view.results)
    return Section("pictures", "What they see", "", body) if classify else None


def _section(story: Story, seed: int, said: Predictions, folder: str) -> Section:
    colours = {series.stage.name: series.colour for series in reversed(story.series)}
    colours = {name: colours.get(name, TEACHER) for name in said.probabilities}
    legend = join(fill("<span class='c{} key'>{}</span>", colour, name) for name, colour in colours.items())
    even, disputed = _choice(said)
    share = "all" if said.complete else f"a sample of {len(said.rows)}"
    lead = (
        f"Run {folder}, seed {seed}, {share} of {len(said.source)} validation items. "
        "By each picture: its label in bold, then what every stage takes it for, with the probability that it gives. "
        "✕ marks a wrong answer."
    )
    parts = [fill("<div class='legend plain'>{}</div>", legend), _gallery("An even sample", said, even, colours)]
    if disputed:
        parts.append(_gallery("Where they disagree", said, disputed, colours))
    return Section("pictures", "What they see", lead, join(parts))


def _choice(said: Predictions) -> tuple[list[int], list[int]]:
    """Items of the even sample, and items on which two stages disagree, evenly spaced among all such."""
    best = [said.best(name) for name in said.probabilities]
    differing = [n for n in range(len(said.rows)) if len({int(answers[n]) for answers in best}) > 1]
    return _spaced(list(range(len(said.rows)))), _spaced(differing)


def _spaced(items: list[int]) -> list[int]:
    wanted = min(_EACH, len(items))
    return [items[n * len(items) // wanted] for n in range(wanted)]


def _gallery(title: str, said: Predictions, items: list[int], colours: dict[str, int]) -> Html:
    return fill("<h3>{}</h3><ul class='gallery'>{}</ul>", title, join(_card(said, item, colours) for item in items))


def _card(said: Predictions, item: int, colours: dict[str, int]) -> Html:
    label = int(said.labels[item])
    truth = said.names[label] if label >= 0 else "not labelled"
    return fill(
        "<li><figure><img src='{source}' alt='validation item {row}, {truth}' width='72' height='72'>"
        "<figcaption><span class='truth' title='{truth}'><span class='hidden'>label </span>{truth}</span>"
        "<ul>{answers}</ul></figcaption></figure></li>",
        source=data_uri(said.image(item)),
        row=int(said.rows[item]),
        truth=truth,
        answers=join(_answer(said, item, name, colour) for name, colour in colours.items()),
    )


def _answer(said: Predictions, item: int, name: str, colour: int) -> Html:
    best = int(said.best(name)[item])
    probability = float(said.probabilities[name][item, best])
    wrong = bool(said.wrong(name)[item])
    return fill(
        "<li class='c{colour}{wrong}' title='{name}: {guess}, {percent}'><span class='hidden'>{name}: </span>"
        "<span class='guess'>{guess}</span><span class='gauge' style='--w:{width:.1f}'></span>"
        "<span class='share'>{percent}</span><span class='mark'>{mark}</span></li>",
        colour=colour,
        wrong=" wrong" if wrong else "",
        name=name if name != EXTERNAL else "teacher",
        guess=said.names[best],
        width=100 * probability,
        percent=percent(probability, 0),
        mark=fill("<span aria-hidden='true'>✕</span><span class='hidden'>wrong</span>") if wrong else Html(""),
    )


def grid(images: "Tensor", columns: int) -> "Tensor":
    """Images (items, channels, height, width) in rows of one picture (channels, height, width), a pixel apart.

    Images of less than 32 pixels a side are enlarged by a whole factor.
    """
    import torch
    from torch.nn import functional

    factor = max(1, 32 // max(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    empty = -len(images) % columns
    images = torch.cat([images, images.new_ones(empty, *images.shape[1:])])
    framed = functional.pad(images, (0, 1, 0, 1), value=1.0)
    rows = framed.unflatten(0, (-1, columns))  # (rows, columns, channels, height, width)
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def data_uri(image: "Tensor", longest: int | None = _SIDE) -> str:
    """An image as a PNG within a link.

    Args:
        longest: pixels beyond which a side is scaled down; None for none.
        image: (channels, height, width), float32 in [0, 1]; of three channels or more the first three are red, green
            and blue, of two the first is gray.
    """
    return "data:image/png;base64," + base64.b64encode(png(image, longest)).decode()


def png(image: "Tensor", longest: int | None = _SIDE) -> bytes:
    """An image as a PNG file of eight bits a channel; see `data_uri`. Sides beyond `longest` pixels are scaled down."""
    import torch
    from torch.nn import functional

    image = image[:3] if len(image) >= 3 else image[:1]
    side = max(image.shape[1:])
    if longest is not None and side > longest:
        size = [max(1, round(length * longest / side)) for length in image.shape[1:]]
        image = functional.interpolate(image[None], size, mode="area")[0]
    channels, height, width = image.shape
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).reshape(height, -1).numpy()
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
