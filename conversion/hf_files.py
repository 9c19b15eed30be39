"""Hugging Face checkpoint files, read by slice and written as a stream.

The safetensors library validates every file; the bytes are then read with `pread` and written with `pwrite`, because
its own interface maps whole files (resident memory grows with the checkpoint) and writes only files that are complete
in memory. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conversion.digests import RunningCheck, bulk_digest, range_digest, text
from conversion.locate import refuse_lfs_pointer
from conversion.publish import MANIFEST, ManifestError, check_file, read_manifest
from conversion.values import Values

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT8 = torch.float8_e4m3fn  # read only, with scales: see `quantised`
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 256 << 10  # hashed and written at a time: what was hashed is still in the processor's cache
WRITEBACK_BYTES = 16 << 20  # per file or tensor, until the disk is told to begin with them


@dataclass(frozen=True, slots=True)
class Located:
    """Where one tensor lies."""

    path: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """File by tensor name from an index of shards; empty when there is no index.

    Raises ValueError when it is damaged or names anything but existing files with that suffix in its own directory.
    """
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid index ({error!r}): download the file again") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise ValueError(f"{path} names {file!r}, which is not a plain *{suffix} file name: refused")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file!r}, which does not exist: download it")
    return dict(weight_map)


class HFReader:
    """Tensors of a Hugging Face directory by name; safe to share between threads.

    Raises:
        ValueError: no safetensors there, an index that names files outside the directory or tensors that are not
            there, a truncated or corrupt file, a tensor whose dtype is not a floating-point one.
        OSError: a file cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, Located] = {}
        single = self.directory / SINGLE  # where both are, transformers takes it and leaves a stale index alone
        expected = {} if single.is_file() else read_index(self.directory / INDEX, ".safetensors")
        paths = {self.directory / file for file in expected.values()} or set(self.directory.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{self.directory} has no *.safetensors files")
        if single.is_file():
            paths = {single}
        manifest = read_manifest(self.directory) or {}
        self._promised: dict[str, str] = manifest.get("tensors", {})
        self._entries: dict[str, Any] = manifest.get("files", {})
        self._running: dict[str, RunningCheck] = {}
        self.checked: set[str] = set()  # tensors that were read to the end and are what the manifest promises
        self._whole: set[Path] = set()  # files that were compared as a whole
        self._fds: dict[Path, int] = {}
        for path in sorted(paths):
            self._open(path)
        if missing := sorted(set(expected) - set(self.tensors)):
            raise ValueError(f"{INDEX} lists tensors that no file contains: {', '.join(missing[:8])}")

    def _open(self, path: Path) -> None:
        refuse_lfs_pointer(path)
        try:
            with safe_open(str(path), framework="pt"):
                pass  # the library checks the header against the size of the file
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error
        fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        header = json.loads(os.pread(fd, length, 8))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if (dtype := FLOAT8 if entry["dtype"] == "F8_E4M3" else DTYPES.get(entry["dtype"])) is None:
                raise ValueError(
                    f"tensor {name!r} in {path.name} has dtype {entry['dtype']}, which conversion does not know: "
                    f"convert the checkpoint to one of {', '.join(DTYPES)} first"
                )
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} is both in {self.tensors[name].path.name} and in {path.name}")
            start = 8 + length + entry["data_offsets"][0]
            self.tensors[name] = Located(path, start, tuple(entry["shape"]), dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in memory of their own. KeyError for an unknown name."""
        where = self.tensors[name]
        tensor = torch.empty(stop - start, *where.shape[1:], dtype=where.dtype)
        view, offset = _bytes_of(tensor), where.offset + start * where.row_bytes
        while view:
            try:
                count = os.preadv(self._fds[where.path], [view], offset)
            except OSError as error:
                raise ValueError(f"{where.path} cannot be read ({error.strerror}): copy the file again") from error
            if count == 0:
                raise ValueError(f"{where.path} ended inside tensor {name!r}: the file was cut while being read")
            view, offset = view[count:], offset + count
        if self._promised:
            self._follow(name, start, stop, _bytes_of(tensor))
        return tensor

    def _follow(self, name: str, start: int, stop: int, data: memoryview) -> None:
        """Take rows that were read in order into the tensor's checksum, and compare it after the last one."""
        where = self.tensors[name]
        if name not in self._promised:
            raise ManifestError(f"the manifest of {self.directory} does not list tensor {name!r} of {where.path.name}")
        running = self._running.setdefault(name, RunningCheck(self._promised[name]))
        if start == 0:
            running.restart()
        if running.position == start:
            running.update(data, stop - start)
        if running.position == where.shape[0]:
            del self._running[name]
            if not running.holds():
                raise ManifestError(
                    f"tensor {name!r} in {where.path} does not have the bytes that the manifest promises: copy the "
                    "file again, or remove the manifest if the tensor was changed on purpose"
                )
            self.checked.add(name)

    def check_rest(self, names: Iterable[str]) -> str:
        """Compare those of the named tensors with the manifest that have not been read in order from end to end.

        Returns a sentence on what was compared; ManifestError names the tensor and the file.
        """
        if not self._entries:
            return "the source has no manifest to compare with"
        names = list(names)
        for name in names if self._promised else ():
            if name not in self.checked:
                self(name)
        for path in () if self._promised else sorted({self.tensors[name].path for name in names} - self._whole):
            if path.name not in self._entries:
                raise ManifestError(f"the manifest of {self.directory} does not list {path.name}")
            check_file(path, self._entries[path.name])
            self._whole.add(path)
        return "every tensor read is what the source's manifest promises"

    def __call__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.tensors[name].shape[0])

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}


def plan_shards(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names per file, in the given order, each file at most `max_shard_size` bytes (or one larger tensor)."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


class HFWriter:
    """Sharded safetensors whose tensors arrive in any order, best each from its first row to its last.

    Every row once; the checksum of a tensor whose rows come in another order is read back at the end. All space is
    reserved at the start, so a full disk is noticed before any work is done. Blocks of different tensors may be written
    from different threads, and by several writers of one directory, of which one makes the files.

    Args:
        shapes: every tensor of the directory, in file order.
        dtypes: by name.
        make: create the files where they are not there yet; otherwise they must be.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        max_shard_size: int,
        *,
        make: bool = True,
    ) -> None:
        self.directory = directory
        self._make = make
        self._fds: dict[Path, int] = {}
        self._where: dict[str, Located] = {}
        self._rows = dict.fromkeys(shapes, 0)  # written so far
        self._jumped: set[str] = set()  # tensors whose rows did not come in order
        self._flushed = dict.fromkeys(shapes, 0)  # bytes of each tensor
        self._digests = {name: bulk_digest() for name in shapes}
        sizes = {name: dtypes[name].itemsize * math.prod(shape) for name, shape in shapes.items()}
        shards = plan_shards(sizes, max_shard_size)
        files = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        for file, names in zip(files, shards, strict=True):
            self._create(directory / file, {name: (shapes[name], dtypes[name]) for name in names})
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.total_bytes = sum(sizes.values())

    def _create(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)  # the data must begin at a multiple of 8
        for name, (shape, dtype) in tensors.items():
            offset = 8 + len(head) + header[name]["data_offsets"][0]
            self._where[name] = Located(path, offset, shape, dtype)
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if self._make else 0)
        fd = self._fds[path] = os.open(path, flags, 0o644)
        if self._make:
            os.posix_fallocate(fd, 0, 8 + len(head) + end)
            _write_all(fd, memoryview(len(head).to_bytes(8, "little") + head), 0)

    def write(self, name: str, row: int, rows: Tensor, values: Values | None = None) -> None:
        """Write rows of a tensor, best beginning where its last block ended; `values` casts to its dtype."""
        where = self._where[name]
        if row != self._rows[name]:
            self._jumped.add(name)
        view = _bytes_of((values or Values()).cast(name, rows, where.dtype).contiguous())
        offset = where.offset + row * where.row_bytes
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            if name not in self._jumped:
                self._digests[name].update(piece)
            _write_all(self._fds[where.path], piece, offset + at)
        self._rows[name] += rows.shape[0]
        end, begun = row + rows.shape[0], self._flushed[name]
        if name in self._jumped:
            return
        if end == where.shape[0] or end * where.row_bytes - begun >= WRITEBACK_BYTES:
            self._flushed[name] = end * where.row_bytes
            start_writeback(self._fds[where.path], where.offset + begun, self._flushed[name] - begun)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Checksums of tensors' bytes. ValueError when one was not written completely."""
        names = list(names)
        if short := [name for name in names if self._rows[name] != self._where[name].shape[0]]:
            raise ValueError(f"tensors not written completely: {', '.join(short[:8])}")
        return {n: self.stored_digest(n) if n in self._jumped else text(self._digests[n]) for n in names}

    def stored_digest(self, name: str) -> str:
        """The checksum of a tensor's bytes, read from its file."""
        where = self._where[name]
        return range_digest(where.path, where.offset, where.offset + where.row_bytes * where.shape[0])

    def finish(self) -> dict[str, str]:
        """Flush to disk; checksums of every tensor's bytes. ValueError when a tensor was not written completely."""
        digests = self.digests(self._rows)
        for fd in self._fds.values():
            os.fsync(fd)
        self.close()
        return digests

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk begin with these bytes, so that the final fsync does not wait for all of them.

    Linux does so for dirty pages that are declared unneeded (mm/fadvise.c), and forgets them once they are written.
    """
    if length >= 1 << 20:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


TEMPLATES = "additional_chat_templates"  # directory of further Jinja templates, as transformers writes it


def side_files(directory: Path) -> Iterable[Path]:
    """Configuration, tokenizer, chat templates and licence: all that is not weights, index, code or hidden."""
    for path in (*sorted(directory.iterdir()), *sorted((directory / TEMPLATES).glob("*.jinja"))):
        known = path.suffix in (".json", ".txt", ".model", ".jinja") or path.name in ("LICENSE", "NOTICE")
        if path.is_file() and known and not path.name.endswith(".index.json") and path.name != MANIFEST:
            refuse_lfs_pointer(path)
            yield path


def refuse_foreign_links(directory: Path) -> None:
    """ValueError for a side file that links out of a model: a copy would publish its target.

    A hub's cache, which links to its blobs, is accepted.
    """
    root = directory.resolve()
    for path in side_files(directory):
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in (root, root.parent.parent / "blobs")):
            raise ValueError(f"{path} is a link to {real}, outside the model: copy that file here, or remove the link")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files of one directory into another, which is made if need be."""
    target.mkdir(exist_ok=True)
    for path in side_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
