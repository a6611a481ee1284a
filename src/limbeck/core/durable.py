"""Writing that survives a crash: temporary name, fsync, rename, fsync of the folder; and digests that tell damage.

Every system call that could be the last before a crash goes through `_write`, `_fsync` or `_rename`, so that the
fault tests can stop the process at each of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.core.errors import DamagedFileError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file's content as a whole: readers see the old bytes or the new ones, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    _write(temporary, lambda target: target.write_bytes(content))
    _fsync(temporary)
    _rename(temporary, path)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as readable JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def commit_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Creates a folder as a whole: `fill` writes into a temporary one, which is sealed with a manifest and renamed.

    An existing target is replaced only once the new folder is complete on disk.
    """
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(temporary, fill)
    files = _files(temporary)
    for file in files:
        _fsync(file)
    manifest = {"files": {str(file.relative_to(temporary)): _describe(file) for file in files}}
    sealed = json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=2).encode()
    _write(temporary / MANIFEST, lambda path: path.write_bytes(sealed))
    _fsync(temporary / MANIFEST)
    _fsync(temporary)
    if target.exists():
        retired = target.with_name(f"{target.name}.old-{os.getpid()}")
        _rename(target, retired)
        _rename(temporary, target)
        _fsync(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        _rename(temporary, target)
        _fsync(target.parent)


def verify_folder(folder: Path) -> None:
    """Checks every file of a committed folder against its manifest.

    Raises:
        DamagedFileError: naming the first file that is missing, extra in size, truncated or altered.
    """
    manifest_path = folder / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_bytes())
        digest = manifest.pop("sha256")
        entries = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedFileError(manifest_path, f"unreadable ({type(error).__name__})") from error
    if digest != _digest_of(manifest):
        raise DamagedFileError(manifest_path, "its checksum does not match")
    for name, expected in entries:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedFileError(path, "missing" if not path.exists() else "not a plain file")
        if path.stat().st_size != expected["size"]:
            raise DamagedFileError(path, f"{path.stat().st_size} bytes instead of {expected['size']}")
        if sha256_of(path) != expected["sha256"]:
            raise DamagedFileError(path, "its content changed (checksum)")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Deletes what interrupted writes left behind (`*.tmp-*`, `*.old-*`); call it only as the folder's owner."""
    for pattern in ("*.tmp-*", "*.old-*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
