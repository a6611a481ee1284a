"""What an experiment does differently for images and for text: how data and models are fitted to each other."""

import torch
from torch import nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.teacher import Renormalise
from limbeck.data.open import DataSplit
from limbeck.data.source import ArraySource, ImageSource, Normalisation, Source
from limbeck.data.text.source import TextSource
from limbeck.data.whitened import WhitenedSource
from limbeck.diffusion.denoiser import process_of
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.synthetic import SyntheticImages
from limbeck.models.tokenizers import set_tokenizer
from limbeck.synthesis.synthetic_set import SyntheticSet


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


def preferred_normalisation(card: Card, student: nn.Module, measured: Normalisation | None) -> Normalisation | None:
    """What images are normalised with where neither the recipe nor a model says: generators work in [-1, 1], whatever
    the method, all else on images of mean 0 and deviation 1, as they were `measured`.
    """
    generates = card.task in ("generation", "scene") or process_of(student) is not None
    if not generates or measured is None:
        return measured
    channels = len(measured[0])
    return [0.5] * channels, [0.5] * channels


def normalise(source: Source, normalisation: Normalisation | None) -> None:
    """Sets what images are normalised with; data of another kind are left as they are."""
    if isinstance(source, ImageSource) and normalisation is not None:
        source.set_normalisation(*normalisation)


def adaptation(teacher: nn.Module, source: Source) -> Renormalise | None:
    """What turns images normalised for the student into the teacher's: nothing when both want the same.

    Raises:
        IncompatibleError: the images are whitened, and the teacher was trained on others.
    """
    wanted, given = normalisation_of(teacher), normalisation_of_data(source)
    if wanted is not None and isinstance(source, WhitenedSource):
        raise IncompatibleError("the teacher takes images that are not whitened", "leave out data.whiten")
    if wanted is None or given is None or (list(wanted[0]), list(wanted[1])) == (list(given[0]), list(given[1])):
        return None
    return Renormalise(given, wanted)


def begin_student(student: nn.Module, source: Source, seed: int) -> None:
    """Gives a student that is made of data its first ones, of the source as it is normalised; leaves others alone."""
    if isinstance(student, SyntheticImages):
        student.begin(source, seed)


def data_of_set(made: nn.Module, data: DataSplit, key: str) -> DataSplit:
    """The images of a synthetic set to train on, with their most probable classes, and the same data to validate on.

    Args:
        made: an earlier stage's result, in the units of the normalisation that is noted on it, or else of the data's.
        data: those that it was made from.
        key: dotted path of what names it, for messages.

    Raises:
        IncompatibleError: it is no synthetic set, or not of these data.
    """
    train = data.train
    if not isinstance(made, SyntheticSet):
        raise IncompatibleError(f"{key}: a {type(made).__name__} holds no images to train on", "name a synthetic set")
    if not isinstance(train, ImageSource):
        raise IncompatibleError(f"{key}: the recipe's data are whitened, or no images", "leave out data.whiten")
    if made.images.shape[1:] != train.fetch(torch.zeros(1, dtype=torch.int64))["image"].shape[1:]:
        raise IncompatibleError(f"{key}: the set's images are {tuple(made.images.shape[1:])}, unlike the recipe's data")
    normalisation = normalisation_of(made) or train.normalisation
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)
    source = ArraySource(
        made.images.detach().cpu() * std + mean,  # not cut to [0, 1]: what was distilled may leave it
        made.hard_labels.cpu(),
        classes=train.classes,
        class_names=train.class_names,
        normalisation=normalisation,
        augmentations=train.augmentations,
    )
    return DataSplit(source, data.validation)


def note_inputs(model: nn.Module, source: Source) -> None:
    """Notes on a result what its inputs have to be made like, so that it is saved with it."""
    normalisation = normalisation_of_data(source)
    if normalisation is not None:
        set_normalisation(model, *normalisation)
    if isinstance(source, WhitenedSource) and isinstance(model, SyntheticSet):
        model.note_whitening(source.whitening.zca)
    if isinstance(source, TextSource) and source.tokenizer is not None:
        set_tokenizer(model, source.tokenizer)
