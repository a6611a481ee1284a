"""What can be wrong with a cache."""

from limbeck.core.errors import DamagedFileError, UsageError

REMEDY = "make it again with: limbeck cache RECIPE"


class MissingCacheError(UsageError):
    """There is no cache in the folder, or not all of it yet."""


class ForeignCacheError(UsageError):
    """The cache was made by another teacher, of other data, or of something else than is asked of it now.

    Attributes:
        differences: what differs, by name; see `CacheKey`.
    """

    def __init__(self, message: str, hint: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.differences = differences


class DamagedCacheError(DamagedFileError):
    """A file of the cache is truncated, altered or missing; `path` names it."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(path, reason)
        self.hint = f"{REMEDY}; only what is damaged is computed again"
