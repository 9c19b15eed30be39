"""Directories that appear complete or not at all, with a manifest that says what is in them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.digests import file_digest, file_matches, known

MANIFEST = "manifest.json"
_PARTIAL, _OLD = ".partial", ".old"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ManifestError(ValueError):
    """A directory is not what its manifest says."""


@contextlib.contextmanager
def published(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `out` to write into, renamed to `out` when the block succeeds.

    Whatever a killed conversion left under the temporary name is removed first; a failed one removes its own. Two
    conversions to one place exclude each other. Replacing a directory is one atomic exchange, except on file systems
    that have none (NFS, Lustre): there the old one stands aside as `OUT.old` between two renames, and comes back at the
    next attempt if the process dies right then.

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
        if not out.exists():
            partial.rename(out)
        elif not _exchange(partial, out):  # a directory cannot be renamed over one with content
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            partial.rename(out)
        _sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in _NO_SPACE:
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


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change names in one step (Linux's renameat2); False where the file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


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


def write_manifest(
    root: Path, *, files: Mapping[str, str] | None = None, tensors: Mapping[str, str] | None = None, **facts: Any
) -> None:
    """Describe every file below `root` in `root/manifest.json`.

    Args:
        files: checksums by file name, where they were computed while writing; other files are read for them here.
        tensors: checksums of the bytes of every tensor; files with tensors are then recorded by size alone.
        facts: further JSON values, such as the source and its step. No absolute paths.
    """
    entries = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(root).as_posix()
        entry: dict[str, Any] = {"size": path.stat().st_size}
        if not (tensors and path.suffix == ".safetensors"):
            entry["digest"] = (files or {}).get(name) or file_digest(path)
        entries[name] = entry
    manifest = {"format": 2, **facts, "files": entries, **({"tensors": dict(tensors)} if tensors else {})}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None when it has none. ManifestError when it cannot be understood."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        if manifest["format"] == 1:
            _upgrade(manifest)
        assert manifest["format"] == 2
        checksums = [entry["digest"] for entry in manifest["files"].values() if "digest" in entry]
        assert all(map(known, [*checksums, *manifest.get("tensors", {}).values()]))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ManifestError(f"{path} is not a manifest of a known format") from error
    return manifest


def _upgrade(manifest: dict[str, Any]) -> None:
    """Format 1 knew SHA-256 only, and did not say so in front of tensors' checksums."""
    for entry in manifest["files"].values():
        if "sha256" in entry:
            entry["digest"] = "sha256:" + entry.pop("sha256")
    manifest["tensors"] = {name: f"sha256:{digest}" for name, digest in manifest.get("tensors", {}).items()}
    manifest["format"] = 2


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
        if "digest" in entry and (contents or small) and not file_matches(path, entry["digest"]):
            raise ManifestError(f"{path} does not have the bytes that the manifest promises: copy it again")
    return manifest
