"""Checksums of a manifest, written "algorithm:hexadecimal".

They detect damage (a bad disk, a broken copy, an incomplete write), not tampering: whoever can change a file can also
change the manifest. So tensor data, which is most of a checkpoint, gets XXH3-128 (about 9 GB/s; SHA-256, at 1 GB/s,
would be half the cost of a conversion), and the few small files get SHA-256. A checksum never decides what may be
unpickled: see `megatron_reader.SafeUnpickler`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import xxhash


class Digest(Protocol):
    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


SMALL, BULK = "sha256", "xxh3_128"
_ALGORITHMS: dict[str, Callable[[], Digest]] = {SMALL: hashlib.sha256, BULK: xxhash.xxh3_128}
_BULK_SUFFIXES = (".distcp", ".safetensors")
_PIECE_BYTES = 1 << 20


def bulk_digest() -> Digest:
    """A checksum of tensor data, updated while the data is processed."""
    return _ALGORITHMS[BULK]()


def text(digest: Digest) -> str:
    """The form of a `bulk_digest` in a manifest."""
    return f"{BULK}:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """The checksum of a file, by an algorithm that suits its kind."""
    return _of_file(path, BULK if path.suffix in _BULK_SUFFIXES else SMALL)


def file_matches(path: Path, expected: str) -> bool:
    """Whether a file still has the checksum `expected`. KeyError for an unknown algorithm."""
    return _of_file(path, expected.partition(":")[0]) == expected


class RunningCheck:
    """Compares pieces that are read in order with the checksum of the whole.

    `position` counts what has been read, in the caller's unit. A caller that reads out of order starts again at 0.
    """

    def __init__(self, expected: str) -> None:
        self._expected = expected
        self._algorithm = expected.partition(":")[0]
        self.restart()

    def restart(self) -> None:
        self._digest = _ALGORITHMS[self._algorithm]()
        self.position = 0

    def update(self, data: Any, count: int) -> None:
        self._digest.update(data)
        self.position += count

    def holds(self) -> bool:
        return f"{self._algorithm}:{self._digest.hexdigest()}" == self._expected


def range_digest(path: Path, start: int, stop: int, algorithm: str = BULK) -> str:
    """The checksum of the bytes [start, stop) of a file."""
    digest, buffer = _ALGORITHMS[algorithm](), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while (left := stop - start) and (count := file.readinto(buffer[: min(left, _PIECE_BYTES)])):
            digest.update(buffer[:count])
            start += count
    return f"{algorithm}:{digest.hexdigest()}"


def known(checksum: Any) -> bool:
    """Whether a value from a manifest is a checksum that can be recomputed here."""
    return isinstance(checksum, str) and checksum.partition(":")[0] in _ALGORITHMS


def _of_file(path: Path, algorithm: str) -> str:
    digest, buffer = _ALGORITHMS[algorithm](), bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return f"{algorithm}:{digest.hexdigest()}"
