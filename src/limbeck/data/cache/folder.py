"""The files of a cache, and who may write them.

| file | holds |
|---|---|
| `cache.json` | key, number of rows, how they are cut into shards, the stored tensors; written once, first |
| `shared.safetensors` | what is the same for all items: a language model's output head |
| `shard-00000.safetensors` | the tensors of a stretch of rows |
| `shard-00000.json` | its size and SHA-256, its rows and the key's hash; a shard is there once this is |
| `seal.json` | all of these, written last: the cache is complete once this is |
| `*.lock` | held by the process that writes; empty |

Every JSON file carries its own SHA-256. Which rows a shard holds is arithmetic, so that nothing can be lost or doubled.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from limbeck.core.durable import is_leftover, read_json, sha256_of, write_bytes, write_json
from limbeck.core.errors import DamagedFileError, UsageError
from limbeck.data.cache.errors import DamagedCacheError, MissingCacheError
from limbeck.data.cache.key import CacheKey

VERSION = 1
DESCRIPTION, SEAL, SHARED = "cache.json", "seal.json", "shared.safetensors"


@dataclass(frozen=True)
class Description:
    """What a cache holds.

    Attributes:
        key: what its content depends on.
        rows: rows in all; see `Views`.
        rows_per_shard: rows of every shard but the last.
        items: items of the data.
        shift: see `shift_of`.
        given: precision of each tensor as the teacher gave it, which is what reading returns.
        shared: size and SHA-256 of the file of what all items share; None where there is none.
        version: of the format.
    """

    key: CacheKey
    rows: int
    rows_per_shard: int
    items: int
    shift: int | None
    given: dict[str, str]
    shared: dict[str, Any] | None
    version: int = VERSION

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    def stretch(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row behind its last."""
        start = shard * self.rows_per_shard
        return start, min(self.rows, start + self.rows_per_shard)


class CacheFolder:
    """A folder that holds a cache, or will."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()

    def describe(self) -> Description | None:
        """What the cache holds; None where there is none.

        Raises:
            UsageError: it was written by a later version.
            DamagedCacheError: the description was altered.
        """
        path = self.path / DESCRIPTION
        if not path.exists():
            return None
        content = read_sealed(path)
        if content.get("version") != VERSION:
            raise UsageError(f"{path} is of version {content.get('version')}, and this limbeck reads {VERSION}")
        try:
            return Description(**{**content, "key": CacheKey(**content["key"])})
        except (KeyError, TypeError):
            raise DamagedCacheError(path, "it describes no cache") from None

    def begin(self, description: Description, shared: dict[str, Tensor]) -> Description:
        """Writes the description, and before it what all items share."""
        entry = self._write(SHARED, shared) if shared else None
        complete = Description(**{**vars(description), "shared": entry})
        write_sealed(self.path / DESCRIPTION, asdict(complete))
        return complete

    def shard(self, number: int) -> Path:
        """Where a shard's tensors lie."""
        return self.path / f"shard-{number:05d}.safetensors"

    def write_shard(self, description: Description, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes a shard as its owner: tensors first, then the entry that makes it count."""
        entry = self._write(self.shard(number).name, tensors)
        write_sealed(self.shard(number).with_suffix(".json"), {**entry, **_of_whom(description, number)})

    def entry(self, number: int) -> dict[str, Any] | None:
        """Size and SHA-256 of a finished shard; None where there is none, or an entry that was damaged."""
        path = self.shard(number).with_suffix(".json")
        try:
            return read_sealed(path)
        except DamagedFileError:
            return None

    def is_whole(self, description: Description, number: int) -> bool:
        """Whether a shard of this cache is there, and every byte of it as it was written."""
        entry = self.entry(number)
        if entry is None or entry != {**entry, **_of_whom(description, number)}:
            return False
        try:
            check_file(self.shard(number), entry)
        except DamagedFileError:
            return False
        return True

    def seal(self, description: Description) -> None:
        """Declares the cache complete; every shard is there."""
        entries = [self.entry(number) for number in range(description.shards)]
        if self.entries() != entries:
            write_sealed(self.path / SEAL, {"shards": entries})

    def entries(self) -> list[dict[str, Any]] | None:
        """The entries of all shards; None while the cache is not complete, or where its seal was damaged."""
        try:
            return read_sealed(self.path / SEAL)["shards"]
        except (DamagedFileError, KeyError):
            return None

    def opened(self) -> tuple[Description, list[dict[str, Any]]]:
        """Description and entries of a complete cache.

        Raises:
            MissingCacheError: there is none, or it is not complete.
            DamagedCacheError: description or seal were altered.
        """
        description = self.describe()
        if description is None:
            raise MissingCacheError(f"there is no cache in {self.path}", "make it with: limbeck cache RECIPE")
        if not (self.path / SEAL).exists():
            there = sum(self.entry(number) is not None for number in range(description.shards))
            raise MissingCacheError(
                f"the cache in {self.path} is not complete: {there} of {description.shards} shards are there",
                "continue with: limbeck cache RECIPE",
            )
        entries = read_sealed(self.path / SEAL).get("shards")
        if not isinstance(entries, list) or len(entries) != description.shards:
            raise DamagedCacheError(self.path / SEAL, "it is no list of this cache's shards")
        return description, entries

    def refuse_foreign_files(self) -> None:
        """Refuses to begin a cache among other files.

        Raises:
            UsageError: the folder is not empty.
        """
        own = (SHARED, SEAL)
        others = [path for path in self.path.iterdir() if path.suffix != ".lock" and not is_leftover(path)]
        if any(path.name not in own for path in others):
            raise UsageError(f"{self.path} is not empty and holds no cache", "choose another cache.folder")

    @contextmanager
    def holding(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Holds one of the folder's locks; gives whether it could be had. It is let go when its holder dies.

        Args:
            name: of the lock.
            wait: for another holder.
        """
        with (self.path / f"{name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def clear_leftovers(self, *prefixes: str) -> None:
        """Removes what an interrupted writer left of files whose lock is held now."""
        for path in self.path.iterdir():
            if path.name.startswith(prefixes) and is_leftover(path):
                path.unlink(missing_ok=True)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        content = safetensors.torch.save(tensors)
        write_bytes(self.path / name, content)
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _of_whom(description: Description, number: int) -> dict[str, Any]:
    return {"rows": list(description.stretch(number)), "key": description.key.digest}


def check_file(path: Path, entry: dict[str, Any]) -> None:
    """Compares a file with its entry, every byte of it.

    Raises:
        DamagedCacheError: it is missing, of another size, or altered.
    """
    if not path.is_file():
        raise DamagedCacheError(path, "missing")
    if path.stat().st_size != entry.get("size"):
        raise DamagedCacheError(path, f"{path.stat().st_size} bytes instead of {entry.get('size')}")
    try:
        digest = sha256_of(path)
    except OSError as error:  # a disk that fails
        raise DamagedCacheError(path, f"unreadable ({type(error).__name__})") from error
    if digest != entry.get("sha256"):
        raise DamagedCacheError(path, "its content changed (checksum)")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes plain data with its own SHA-256, atomically."""
    write_json(path, {**content, "digest": _digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Plain data that `write_sealed` wrote.

    Raises:
        DamagedCacheError: it is missing or was altered.
    """
    try:
        content = read_json(path)
    except DamagedFileError as error:
        raise DamagedCacheError(path, "missing or unreadable") from error
    digest = content.pop("digest", None) if isinstance(content, dict) else None
    if digest is None or digest != _digest(content):
        raise DamagedCacheError(path, "its content changed (checksum)")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
