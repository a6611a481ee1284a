"""A recipe's stage and the cache of its teacher."""

import math

from limbeck.core.errors import RecipeError
from limbeck.core.specs import StageSpec
from limbeck.core.teacher import Teacher
from limbeck.data.cache.errors import MissingCacheError
from limbeck.data.cache.key import CacheKey
from limbeck.data.cache.views import Views
from limbeck.data.source import Source
from limbeck.teachers.cached import CachedTeacher

_USUAL_BATCH = 64  # items at a time where nothing is trained


def open_cache(stage: StageSpec, source: Source, seed: int, teacher: Teacher | None) -> CachedTeacher:
    """The cached teacher of a stage.

    Args:
        stage: with a cache.
        source: the training data.
        seed: the recipe's.
        teacher: the teacher itself, of which nothing but the hash is used; None to take the cache's word for it.

    Raises:
        MissingCacheError: there is none, or not all of it; the hint is the command that makes it.
        ForeignCacheError: it was made by another teacher, of other data, or of something else.
    """
    assert stage.cache is not None
    key = CacheKey.of(stage.cache, views_for(stage, source, seed), teacher)
    try:
        return CachedTeacher(stage.cache.folder, key)
    except MissingCacheError as error:
        what = "RECIPE, or the run's folder," if not stages_used(stage) else "FOLDER (the run's)"
        hint = f"make it with: limbeck cache {what} --stage {stage.name}"
        raise MissingCacheError(f"{stage.name}.cache: {error.message}", hint) from None


def views_for(stage: StageSpec, source: Source, seed: int) -> Views:
    """What a stage's teacher is shown: the data, or, where they are varied, each epoch of the training.

    Raises:
        RecipeError: the cache is to hold fewer epochs than training takes.
    """
    needed, chosen = _epochs(stage, len(source)), stage.cache.epochs if stage.cache else None
    if source.varied and chosen is not None and chosen < needed:
        raise RecipeError(
            f"{stage.name}.cache.epochs",
            f"training takes {needed} epochs of augmented items, and the cache would hold {chosen}",
            f"raise it to {needed}, or leave it out",
        )
    return Views(source, seed, chosen or needed)


def micro_batch(stage: StageSpec, world: int) -> int:
    """Items that a training step shows the teacher at a time in each of `world` processes."""
    if stage.train is None:
        return _USUAL_BATCH
    return max(1, stage.train.batch_size // (stage.train.accumulate * world))


def stages_used(stage: StageSpec) -> list[str]:
    """The earlier stages whose results are this one's teachers, or what these are shown."""
    parts = [name.partition(":") for name in (*(model.name for model in stage.teacher), stage.data or "")]
    return [name for kind, _, name in parts if kind == "stage"]


def _epochs(stage: StageSpec, items: int) -> int:
    """Epochs of which training shows at least a part."""
    if stage.train is None:
        return 1
    return math.ceil(stage.train.total_steps(items) * stage.train.batch_size / items)
