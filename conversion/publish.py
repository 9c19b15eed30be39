"""Directories that appear complete or not at all, with a manifest that says what is in them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_PARTIAL, _OLD = ".partial", ".old"


class ManifestError(ValueError):
    """A directory is not what its manifest says."""


@contextlib.contextmanager
def published(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `out` to write into, renamed to `out` when the block succeeds.

    Whatever a killed conversion left under the temporary name is removed first; a failed one removes its own. Two
    conversions to one place exclude each other.

    Raises:
        ValueError: `out` exists and `overwrite` is off, or another conversion is writing it.
    """
    out = Path(out)
    old = out.with_name(out.name + _OLD)
    if old.exists() and not out.exists():
        old.rename(out)  # a replacement was interrupted between its two renames
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another directory or pass --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + _PARTIAL)
    lock = _lock_directory(partial)
    try:
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
        _sync_tree(partial)
        if out.exists():  # a directory cannot be renamed over one with content, so the old one steps aside
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        _sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(f"no space left for {out}: free some or choose another file system") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def require_space(directory: Path, size: int) -> None:
    """ValueError when the file system of a directory has fewer than `size` bytes free."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise ValueError(f"{size / 2**30:.1f} GiB are needed for {directory} but {free / 2**30:.1f} GiB are free")


def _lock_directory(path: Path) -> int:
    """Create a directory if need be and lock it; returns the descriptor that holds the lock."""
    while True:
        path.mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise ValueError(f"another process is writing {path}: wait for it to end") from error
        os.close(fd)  # its owner published or removed it between open and flock


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for file in files:
            _sync(Path(directory, file))
        _sync(Path(directory))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    root: Path, *, known: Mapping[str, str] | None = None, tensors: Mapping[str, str] | None = None, **facts: Any
) -> None:
    """Describe every file below `root` in `root/manifest.json`.

    Args:
        known: SHA-256 by file name, where it was computed while writing; other files are hashed here.
        tensors: SHA-256 of the bytes of every tensor; files with tensors are then recorded by size alone.
        facts: further JSON values, such as the source and its step. No absolute paths.
    """
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(root).as_posix()
        entry: dict[str, Any] = {"size": path.stat().st_size}
        if not (tensors and path.suffix == ".safetensors"):
            entry["sha256"] = (known or {}).get(name) or sha256(path)
        files[name] = entry
    manifest = {"format": 1, **facts, "files": files, **({"tensors": dict(tensors)} if tensors else {})}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None when it has none. ManifestError when it cannot be understood."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["format"] == 1 and isinstance(manifest["files"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ManifestError(f"{path} is not a manifest of a known format") from error
    return dict(manifest)


def check_manifest(root: Path, *, contents: bool) -> dict[str, Any] | None:
    """Compare a directory with its manifest; returns it, or None when there is none.

    Args:
        contents: recompute every checksum of a file; otherwise only sizes and files below 16 MiB are checked, which
            includes everything that is not plain weights.

    Raises:
        ManifestError: naming the first file that is missing, has another size or other bytes.
    """
    manifest = read_manifest(root)
    for name, entry in (manifest or {"files": {}})["files"].items():
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise ManifestError(f"the manifest of {root} names {name!r}, which lies outside it: refused")
        if not path.is_file():
            raise ManifestError(f"{path} is missing, although the manifest lists it")
        if path.stat().st_size != entry["size"]:
            raise ManifestError(f"{path} has {path.stat().st_size} bytes but the manifest says {entry['size']}")
        small = entry["size"] < 16 << 20
        if "sha256" in entry and (contents or small) and sha256(path) != entry["sha256"]:
            raise ManifestError(f"{path} does not have the bytes that the manifest promises: copy it again")
    return manifest
