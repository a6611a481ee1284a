"""What an experiment does differently for images and for text: how data and models are fitted to each other."""

from torch import nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.teacher import Renormalise
from limbeck.data.source import ImageSource, Normalisation, Source
from limbeck.data.text.source import TextSource
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.synthetic import SyntheticImages
from limbeck.models.tokenizers import set_tokenizer


def check_task(card: Card, data: DataInfo, key: str) -> None:
    """Refuses data that a method cannot work on: images for a language method, running text for a classifier.

    Raises:
        IncompatibleError: the message says what the data hold.
    """
    if card.task == "language-modelling" and "labels" not in data.example:
        raise IncompatibleError(
            f"{key}: method '{card.slug}' models language, and the data hold {', '.join(data.example)}",
            "take text, as data: pydoc, without label_column",
        )
    if card.task == "dataset" and ("image" not in data.example or not data.classes):
        raise IncompatibleError(
            f"{key}: method '{card.slug}' distils images with classes, and the data hold {', '.join(data.example)}"
            + ("" if data.classes else ", without classes")
        )
    if card.task == "classification" and data.text is not None and not data.classes:
        raise IncompatibleError(
            f"{key}: method '{card.slug}' works on classes, and the text has none", "name the column data.label_column"
        )


def normalisation_of_data(source: Source) -> Normalisation | None:
    """Per-channel (mean, deviation) that images are normalised with; None for data of another kind."""
    return source.normalisation if isinstance(source, ImageSource) else None


def preferred_normalisation(card: Card, measured: Normalisation | None) -> Normalisation | None:
    """What images are normalised with where neither the recipe nor a model says: generators work in [-1, 1], all other
    methods on images of mean 0 and deviation 1, as they were `measured`.
    """
    if card.task not in ("generation", "scene") or measured is None:
        return measured
    channels = len(measured[0])
    return [0.5] * channels, [0.5] * channels


def normalise(source: Source, normalisation: Normalisation | None) -> None:
    """Sets what images are normalised with; data of another kind are left as they are."""
    if isinstance(source, ImageSource) and normalisation is not None:
        source.set_normalisation(*normalisation)


def adaptation(teacher: nn.Module, source: Source) -> Renormalise | None:
    """What turns images normalised for the student into the teacher's: nothing when both want the same."""
    wanted, given = normalisation_of(teacher), normalisation_of_data(source)
    if wanted is None or given is None or (list(wanted[0]), list(wanted[1])) == (list(given[0]), list(given[1])):
        return None
    return Renormalise(given, wanted)


def begin_student(student: nn.Module, source: Source, seed: int) -> None:
    """Gives a student that is made of data its first ones, of the source as it is normalised; leaves others alone."""
    if isinstance(student, SyntheticImages):
        student.begin(source, seed)


def note_inputs(model: nn.Module, source: Source) -> None:
    """Notes on a result what its inputs have to be made like, so that it is saved with it."""
    normalisation = normalisation_of_data(source)
    if normalisation is not None:
        set_normalisation(model, *normalisation)
    if isinstance(source, TextSource) and source.tokenizer is not None:
        set_tokenizer(model, source.tokenizer)
