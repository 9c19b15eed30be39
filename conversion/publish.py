"""Directories that appear complete or not at all, with a manifest of their contents."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.digests import file_digest, file_matches, known, range_digest

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"  # by which Megatron-LM finds a checkpoint
_WORK = ".megatron-gppo"  # suffix of the hidden directory beside the output, for files that are not published yet
_JOB = "job"  # file in it that identifies the conversion
_MARK = "temporary-of-megatron-gppo"  # file in it that marks the directory as this module's own
_REPAIR = "copy it again, or remove the manifest if you changed the file on purpose"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre, unless mounted with `flock`
_NO_FLAGS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without renameat2, NFS for one
_NOREPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2


class ManifestError(ValueError):
    """A directory does not match its manifest."""


def working_directory(out: str | Path) -> Path:
    """The directory in which `published(out)` collects its files; every rank of a collective writer can derive it."""
    target = Path(os.path.realpath(out))
    return target.with_name(f".{target.name}{_WORK}") / "new"


@contextlib.contextmanager
def published(
    out: str | Path,
    overwrite: bool = False,
    sources: Iterable[str | Path] = (),
    *,
    job: str = "",
    resume: bool = False,
) -> Iterator[Path]:
    """A private directory beside `out` to write into, renamed to `out` when the block succeeds.

    It is hidden, marked as this module's own and locked. Files of a killed process are removed; a directory without the
    mark is not touched. A directory is replaced by one atomic exchange, except on file systems without it (NFS,
    Lustre): there the old one is in the private directory between two renames, and the next attempt restores it if the
    process dies at that moment. With `overwrite` only a checkpoint with a manifest is replaced, and only if it holds
    nothing else.

    Args:
        sources: directories that are read meanwhile; none of them may be `out`, contain it or lie inside it.
        job: what is being done; a leftover of the same job can be continued.
        resume: begin with such a leftover as it is, and leave the directory when the block fails.

    Raises:
        ValueError: `out` exists and may not be replaced, it overlaps a source, or another process is writing it.
    """
    target = _target(out, sources)
    new = working_directory(target)
    work, old = new.parent, new.with_name("old")
    if target.exists():
        require_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_directory(work)
    try:
        if old.exists() and not target.exists():
            old.rename(target)  # a replacement was interrupted between its two renames
        if target.exists():
            require_replaceable(target, overwrite)
        if not (resume and new.is_dir() and _read_text(work / _JOB) == job):
            for leftover in (new, old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            new.mkdir()
            (work / _JOB).write_text(job, encoding="utf-8")
        yield new
        _sync_tree(new)
        if target.exists():
            require_replaceable(target, overwrite)  # it may have changed, or appeared, in the meantime
            _replace(new, target, old)
        elif not _rename(new, target, _NOREPLACE):
            new.rename(target)
        _sync(target.parent)
        resume = False  # there is nothing to continue
    except FileExistsError as error:
        raise ValueError(f"{out} was made by another process in the meantime: choose another directory") from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ValueError(
                f"no space left for {out} ({error.strerror}): free some, raise the limit (quota, ulimit -f) or choose "
                "another file system"
            ) from error
        raise
    finally:
        if (target.exists() or not old.exists()) and not (resume and new.is_dir()):
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            (work / _JOB).unlink(missing_ok=True)
            (work / _MARK).unlink(missing_ok=True)  # last: what is left after a crash here is still marked
            with contextlib.suppress(OSError):
                work.rmdir()
        os.close(lock)


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _target(out: str | Path, sources: Iterable[str | Path]) -> Path:
    """The directory that `out` means, symbolic links resolved."""
    target = Path(os.path.realpath(out))
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{out} is the current directory or contains it: give the name of a directory to be made")
    for source in sources:
        real = Path(os.path.realpath(source))
        if _inside(target, real) or _inside(real, target):
            raise ValueError(f"output {out} overlaps source {source}: choose a directory outside it")
    return target


def _inside(path: Path, directory: Path) -> bool:
    """Whether a path is a directory or lies in it, also under another name (a bind mount, other upper case)."""
    same = (os.path.samefile(place, directory) for place in (path, *path.parents) if place.exists())
    return path.is_relative_to(directory) or (directory.exists() and any(same))


def require_replaceable(directory: Path, overwrite: bool) -> None:
    """ValueError unless the directory holds only a checkpoint that this project wrote, according to its manifest."""
    if not directory.is_dir():
        raise ValueError(f"{directory} exists and is not a directory: choose another name")
    if directory.is_mount():
        raise ValueError(f"{directory} is a mount point, which cannot be replaced: choose a directory inside it")
    if not overwrite:
        raise ValueError(f"{directory} exists already: choose another directory, or replace it with --overwrite")
    keep = f"{directory} is not replaced: "
    inside = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]
    try:
        known = {MANIFEST, *(read_manifest(directory) or {"files": {}})["files"]}
    except ManifestError as error:
        raise ValueError(f"{keep}{error}; move it away or choose another directory") from error
    for root in (path.parent for path in inside if path.name == MANIFEST and path.parent != directory):
        name = root.relative_to(directory).as_posix()  # the `release` of Megatron-LM's layout has its own manifest
        if (directory / TRACKER).is_file() and (manifest := read_manifest(root)):
            known |= {TRACKER, *(f"{name}/{file}" for file in (MANIFEST, *manifest["files"]))}
    others = sorted(name for path in inside if (name := path.relative_to(directory).as_posix()) not in known)
    if others:
        raise ValueError(
            f"{keep}it holds {others[0]}{f' and {len(others) - 1} more files' if others[1:] else ''} that no "
            f"{MANIFEST} of this project lists; move it away or choose another directory"
        )


def _replace(new: Path, target: Path, old: Path) -> None:
    if _rename(new, target, _EXCHANGE):
        return
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise


def require_space(directory: Path, size: int) -> None:
    """ValueError when the file system of a directory has not room for `size` bytes, those in the directory included."""
    size -= sum(512 * path.stat().st_blocks for path in directory.rglob("*") if path.is_file())
    if (free := shutil.disk_usage(directory).free) < size:
        raise ValueError(f"{size / 2**20:,.0f} MiB are needed for {directory} but {free / 2**20:,.0f} MiB are free")


def _lock_directory(work: Path) -> int:
    """Make `work`, or take over that of a killed process, and hold its lock until the descriptor is closed."""
    while True:
        try:
            work.mkdir()
        except FileExistsError:
            if not work.is_dir() or (not (work / _MARK).is_file() and any(work.iterdir())):
                raise ValueError(f"{work} is needed for temporary files and was not made for them: move it") from None
        try:
            fd = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its owner removed it just now
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise ValueError(f"another process is writing {work}: wait for it to end") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
        if work.exists() and os.path.samestat(os.fstat(fd), work.stat()):
            (work / _MARK).touch()
            return fd
        os.close(fd)  # its owner removed it between open and flock


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2; False where the system or the file system cannot. FileExistsError with `_NOREPLACE`."""
    here = -100  # AT_FDCWD
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    if (code := ctypes.get_errno()) in _NO_FLAGS:
        return False
    raise OSError(code, os.strerror(code), str(target))


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


Segments = Mapping[str, Mapping[int, str]]  # by file name: checksums by where a stretch begins, up to the next one


def write_manifest(
    root: Path,
    *,
    segments: Segments | None = None,
    cuts: Mapping[str, Iterable[int]] | None = None,
    tensors: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Describe every file below `root` in `root/manifest.json`.

    Args:
        segments: checksums of stretches of files that were computed while writing; other files are read here.
        cuts: where to cut files that are read here into stretches, so that a reader can check the one that it needs.
        tensors: checksums of the bytes of every tensor; files with tensors are then recorded by size alone.
        facts: further JSON values, such as the source and its step. No absolute paths.
    """
    entries = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(root).as_posix()
        entry: dict[str, Any] = {"size": path.stat().st_size}
        if name in (segments or {}):
            entry["segments"] = {str(start): digest for start, digest in sorted((segments or {})[name].items())}
        elif name in (cuts or {}):
            starts = sorted({0, *(cuts or {})[name]})
            stretches = zip(starts, [*starts[1:], entry["size"]], strict=True)
            entry["segments"] = {str(start): range_digest(path, start, stop) for start, stop in stretches}
        elif not (tensors and path.suffix == ".safetensors"):
            entry["digest"] = file_digest(path)
        entries[name] = entry
    manifest = {"format": 3, **facts, "files": entries, **({"tensors": dict(tensors)} if tensors else {})}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None if it has none. ManifestError if it cannot be read."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        if manifest["format"] == 1:
            _upgrade(manifest)
        assert manifest["format"] in (2, 3)
        entries = manifest["files"].values()
        assert all(isinstance(entry["size"], int) for entry in entries)
        checksums = [entry["digest"] for entry in entries if "digest" in entry]
        for entry in entries:
            if (starts := [int(start) for start in entry.get("segments", {})]) or "segments" in entry:
                assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] <= entry["size"]
            checksums += entry.get("segments", {}).values()
        assert all(map(known, [*checksums, *manifest.get("tensors", {}).values()]))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise ManifestError(
            f"{path} is not a manifest of a known format: copy it again, or remove it if another program made it"
        ) from error
    return manifest


def _upgrade(manifest: dict[str, Any]) -> None:
    """Format 1 had only SHA-256, without a prefix on tensors' checksums."""
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
        if contents or ("digest" in entry and entry["size"] < 16 << 20):
            check_file(path, entry)
    return manifest


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Read a whole file and compare it with its entry in a manifest. ManifestError when it differs."""
    if "digest" in entry and not file_matches(path, entry["digest"]):
        raise ManifestError(f"{path} does not have the bytes that the manifest promises: {_REPAIR}")
    for start, (stop, digest) in spans(entry).items():
        if range_digest(path, start, stop, digest.partition(":")[0]) != digest:
            raise ManifestError(f"{path} does not have the bytes that the manifest promises from {start} on: {_REPAIR}")


def spans(entry: Mapping[str, Any]) -> dict[int, tuple[int, str]]:
    """The segments of a file in a manifest: end and checksum by where they begin."""
    segments = {int(start): digest for start, digest in entry.get("segments", {}).items()}
    ends = [*list(segments)[1:], entry["size"]] if segments else []
    return {start: (end, digest) for (start, digest), end in zip(segments.items(), ends, strict=True)}
