"""Are all numbers of a checkpoint finite? Asked when it is written, and in its files before anything is loaded.

Checksums say that the bytes are those that were written. A run that had diverged, or an optimizer state that had
overflowed, would be written just as faithfully, and would push older checkpoints out.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from conversion.publish import ManifestError, check_file, spans

SUFFIX = ".distcp"  # of files with tensors, one torch archive behind the other; the manifest says where each begins
_BLOCK_BYTES = 4 << 20
_METADATA = ".metadata"  # torch's description of what is in the files beside it


def all_finite(tensor: torch.Tensor) -> bool:
    """One pass over the numbers, and without a copy of them unless their sum overflows. FP8 counts as finite."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    total = tensor.sum(dtype=None if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def check_finite(directory: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Look at every floating-point number in one file of a checkpoint, whose bytes have been verified.

    Costs about as much as its checksum: the file is read again, from the page cache, and summed.

    Args:
        directory: of the checkpoint.
        name: of the file in it.
        manifest: of the checkpoint.

    Raises:
        ManifestError: naming the tensor, the file, and how many values are not finite.
    """
    with (directory / name).open("rb", buffering=0) as file:
        for start, (stop, _) in spans(manifest["files"][name]).items():
            count = bad = 0
            for block in _values(file, start, stop):
                count += block.numel()
                bad += 0 if all_finite(block) else int((~torch.isfinite(block)).sum())
            if bad:
                described = f"{Path(name).parent / _METADATA}"
                check_file(directory / described, manifest["files"][described])  # before it is unpickled
                raise ManifestError(
                    f"{directory / name} holds {bad} of {count} values that are not finite in "
                    f"{_tensor_name(directory / name, start)}: the run had diverged when it was written"
                )


def _values(file: IO[bytes], start: int, stop: int) -> Iterator[torch.Tensor]:
    """The numbers of the archive in [start, stop), block by block; nothing if it does not hold a tensor of floats."""
    window = io.BufferedReader(_Window(file, start, stop))
    try:
        tensor = torch.load(window, map_location="meta", weights_only=True)  # reads its type and shape alone
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return  # objects, of which a verified checkpoint has a few (Transformer Engine's extra states)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.element_size() == 1:
        return
    at, left = _data(window)
    file.seek(start + at)
    buffer = bytearray(min(left, _BLOCK_BYTES))
    while left:
        wanted = memoryview(buffer)[: min(left, _BLOCK_BYTES)]
        if not _fill(file, wanted):
            return  # cut off since it was verified: loading will say so
        left -= len(wanted)
        yield torch.frombuffer(wanted, dtype=tensor.dtype)


def _data(window: IO[bytes]) -> tuple[int, int]:
    """Where the numbers begin in a torch archive, and their length in bytes."""
    (record,) = (info for info in zipfile.ZipFile(window).infolist() if info.filename.endswith("/data/0"))
    window.seek(record.header_offset)
    header = window.read(30)  # zip's local header: its last two fields are the lengths of name and padding
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + names, record.file_size


def _fill(file: IO[bytes], room: memoryview) -> bool:
    done = 0
    while done < len(room):
        if not (count := file.readinto(room[done:])):  # type: ignore[attr-defined]
            return False
        done += count
    return True


def _tensor_name(path: Path, start: int) -> str:
    """Of the piece that begins there."""
    stored = FileSystemReader(path.parent).read_metadata().storage_data
    found = [index for index, info in stored.items() if (info.relative_path, info.offset) == (path.name, start)]
    if not found:
        return "a tensor without a name"
    return f"{found[0].fqn}" + (f" from {list(found[0].offset)} on" if any(found[0].offset or ()) else "")


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        self._file, self._start, self._size, self._at = file, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, room: Any) -> int:
        wanted = memoryview(room)[: max(0, self._size - self._at)]
        if not wanted:
            return 0
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count
