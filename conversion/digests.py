"""Checksums of a manifest, written "algorithm:hexadecimal".

They find damage (a bad disk, a broken copy, a torn write), not malice: who can change a file can change the manifest
beside it. So tensor data, which is nearly all there is, gets XXH3-128 (about 9 GB/s where SHA-256, at 1 GB/s, would be
half the cost of a conversion), and the few small files keep SHA-256. What may be unpickled never follows from a
checksum: see `megatron_reader.SafeUnpickler`.
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
    """A checksum of tensor data, to be fed while the data passes by."""
    return _ALGORITHMS[BULK]()


def text(digest: Digest) -> str:
    """How a `bulk_digest` is written in a manifest."""
    return f"{BULK}:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """The checksum of a file, by an algorithm that suits its kind."""
    return _of_file(path, BULK if path.suffix in _BULK_SUFFIXES else SMALL)


def file_matches(path: Path, expected: str) -> bool:
    """Whether a file still has the checksum `expected`. KeyError for an unknown algorithm."""
    return _of_file(path, expected.partition(":")[0]) == expected


def data_matches(data: Any, expected: str) -> bool:
    """As `file_matches` for bytes in memory."""
    algorithm = expected.partition(":")[0]
    digest = _ALGORITHMS[algorithm]()
    digest.update(data)
    return f"{algorithm}:{digest.hexdigest()}" == expected


def known(checksum: Any) -> bool:
    """Whether a value from a manifest is a checksum that can be recomputed here."""
    return isinstance(checksum, str) and checksum.partition(":")[0] in _ALGORITHMS


def _of_file(path: Path, algorithm: str) -> str:
    digest, buffer = _ALGORITHMS[algorithm](), bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return f"{algorithm}:{digest.hexdigest()}"
