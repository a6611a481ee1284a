"""Writing that survives a crash: temporary name, fsync, rename, fsync of the folder; and digests that tell damage.

Every system call that could be the last before a crash goes through `_write`, `_fsync` or `_rename`, so that the
fault tests can stop the process at each of them.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import DamagedFileError, DiskFullError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_LARGEST_JSON = 64 << 20
_TEMPORARY, _RETIRED = ".tmp-", ".old-"


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file's content as a whole: readers see the old bytes or the new ones, also after a power cut.

    Raises:
        DiskFullError: there is no room; the old content is untouched.
    """
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}")
    with needing_room(path, len(content), temporary):
        _write(temporary, lambda target: target.write_bytes(content))
        _fsync(temporary)
        _rename(temporary, path)
        _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as readable JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Plain data from a file that need not be trusted.

    Raises:
        DamagedFileError: the file is missing, larger than 64 MiB, nested too deeply, or no JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise DamagedFileError(path, f"{path.stat().st_size:,} bytes are too many")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFileError(path, "missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"unreadable ({type(error).__name__})") from error


def commit_folder(target: Path, fill: Callable[[Path], None], size: int = 0) -> None:
    """Creates a folder as a whole: `fill` writes into a temporary one, which is sealed with a manifest and renamed.

    An existing target is replaced only once the new folder is complete on disk.

    Args:
        target: the folder.
        fill: writes its files.
        size: bytes that these will take, as far as known; for the message when there is no room.

    Raises:
        DiskFullError: there is no room; an existing target is untouched.
    """
    temporary = target.with_name(f"{target.name}{_TEMPORARY}{os.getpid()}")
    with needing_room(target, size, temporary):
        _discard(temporary)
        temporary.mkdir(parents=True)
        _write(temporary, fill)
        _seal(temporary)
        retired = _retire(target)
        _rename(temporary, target)
        _fsync(target.parent)
    if retired is not None:
        _discard(retired)


def verify_folder(folder: Path) -> list[str]:
    """Checks every file of a committed folder against its manifest, and returns their names.

    Raises:
        DamagedFileError: naming the first file that is missing, of another size, altered, or not within the folder.
    """
    entries = read_manifest(folder)
    for name, expected in entries.items():
        try:
            _verify_file(folder, name, expected)
        except (OSError, ValueError) as error:  # a disk that fails, or no file's name at all
            raise DamagedFileError(folder / name, f"unreadable ({type(error).__name__})") from error
    return list(entries)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a committed folder, by name.

    Raises:
        DamagedFileError: the manifest is missing or altered.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    match manifest:
        case {"files": dict() as files, "sha256": str() as digest, **rest} if not rest:
            if digest != _digest_of({"files": files}):
                raise DamagedFileError(path, "its checksum does not match")
            if all(isinstance(entry, dict) for entry in files.values()):
                return files
    raise DamagedFileError(path, "it is no list of files")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Clears away what interrupted writes left behind; call it only as the folder's owner.

    A folder that was moved aside for a new one which never came is put back.
    """
    for path in sorted(path for path in folder.glob("*") if is_leftover(path)):
        replaced, retired, _ = path.name.rpartition(_RETIRED)
        if retired and not (folder / replaced).exists():
            _rename(path, folder / replaced)
        else:
            _discard(path)


def is_leftover(path: Path) -> bool:
    """Whether this is what an interrupted write leaves behind."""
    return re.search(rf"({re.escape(_TEMPORARY)}|{re.escape(_RETIRED)})\d+$", path.name) is not None


@contextmanager
def needing_room(path: Path, needed: int, temporary: Path | None = None) -> Iterator[None]:
    """Within it a full disk is a `DiskFullError`; whatever goes wrong, the temporary file or folder is removed.

    Args:
        path: what is written.
        needed: how many bytes that takes, as far as known.
        temporary: where it is written first.
    """
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            written = sum(file.stat().st_size for file in _files(temporary))
            _discard(temporary)  # what does not fit must not take up the room until someone clears it away
            needed = max(needed, written)
        if _no_room(error):
            raise DiskFullError(path, needed, shutil.disk_usage(path.parent).free) from error
        raise


def _no_room(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Either a file within the folder that is written, or safetensors, which has errors of its own.
    return isinstance(error, DiskFullError) or f"os error {errno.ENOSPC}" in str(error)


def _verify_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    path = folder / name
    if not path.exists():
        raise DamagedFileError(path, "missing")
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise DamagedFileError(path, "not a plain file within its folder")
    if path.stat().st_size != expected.get("size"):
        raise DamagedFileError(path, f"{path.stat().st_size} bytes instead of {expected.get('size')}")
    if sha256_of(path) != expected.get("sha256"):
        raise DamagedFileError(path, "its content changed (checksum)")


def _seal(folder: Path) -> None:
    """Makes the content durable, and then a manifest of it."""
    manifest = {"files": {str(file.relative_to(folder)): _describe(file) for file in _files(folder)}}
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    sealed = json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=2).encode()
    _write(folder / MANIFEST, lambda path: path.write_bytes(sealed))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _retire(target: Path) -> Path | None:
    """Moves a folder aside, for folders cannot be renamed onto each other; a crash in between is mended later."""
    if not target.is_symlink() and not target.exists():
        return None
    retired = target.with_name(f"{target.name}{_RETIRED}{os.getpid()}")
    _rename(target, retired)
    return retired


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """All files in a folder, or the file itself."""
    return sorted(file for file in (path, *path.rglob("*")) if file.is_file())


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    writer(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
