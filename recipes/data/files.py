"""Rows of data files: JSON lines, a JSON array, Parquet, Arrow, or directories of these.

A directory may be what ``datasets.save_to_disk`` wrote, a copy of a data set of the Hugging Face hub, or a folder of
files of one kind. Rows are streamed; every error is one sentence with file and line (or row).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

JSON_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz")
TABLES = (".parquet", ".arrow")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
MAX_NESTING = 100  # levels of a row; Python's parser ends at about a thousand
TRAIN_SPLITS, EVAL_SPLITS = ("train",), ("test", "validation", "eval", "dev")


def rows(path: Path, splits: Sequence[str] = TRAIN_SPLITS) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or directory; ``where`` is such as ``data.jsonl, line 3``.

    ``splits``: which split of a directory with several, the first that is there. Raises ValueError for what cannot be
    read, and for a directory that does not say which of its files are meant.
    """
    if path.is_dir():
        for file in directory_files(path, splits):
            yield from rows(file)
    elif path.name.endswith(TABLES):
        yield from _table_rows(path)
    elif path.name.endswith(JSON_LINES) or not path.suffix:
        yield from _json_rows(path)
    else:
        kinds = ", ".join((*JSON_LINES[:3], *TABLES))
        raise ValueError(f"{path}: the format {path.suffix} is not supported: give {kinds}, or a directory of these")


# ------------------------------------------------------------------------------------------------------------- JSON


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _opened(path) as file:
            if not path.name.removesuffix(".gz").endswith(".jsonl") and _is_array(file):
                yield from _array_rows(path)
                return
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}, line {number}", _decoded(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}, after line {number}: {error}; the file is cut off or damaged, copy it again"
        ) from error


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _is_array(file: BinaryIO) -> bool:
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return head.startswith(b"[")


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        rows = _decoded(file.read().removeprefix(b"\xef\xbb\xbf"), str(path))
    for number, row in enumerate(rows, start=1):
        yield f"{path}, entry {number}", row


def _decoded(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} is not UTF-8 ({line[error.start]:#x}); the file must be UTF-8 text"
        ) from error
    try:
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); write one object per line") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply for a problem") from error
    except ValueError as error:  # a whole number of thousands of digits; NaN
        raise ValueError(f"{where}: {str(error).split(';')[0]}; write the answer as text in quotes") from error
    if _depth(value) > MAX_NESTING:
        raise ValueError(f"{where}: nested too deeply for a problem")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


# ----------------------------------------------------------------------------------------------------------- tables


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    try:
        number = 0
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, pyarrow.ArrowException):
            raise
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable {path.suffix[1:]} file ({said[:200]}); copy it again") from error


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=1024)
        return
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)  # what datasets writes
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))
            return
        yield from reader


# ------------------------------------------------------------------------------------------------------ directories


def directory_files(directory: Path, splits: Sequence[str]) -> list[Path]:
    """The data files of a directory, in order: one split of a data set, or all files of a plain folder."""
    if (directory / "dataset_dict.json").is_file():
        names = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        return directory_files(directory / _chosen(directory, names, splits), splits)
    if (directory / "state.json").is_file():
        listed = json.loads((directory / "state.json").read_text(encoding="utf-8")).get("_data_files", [])
        return [directory / Path(entry["filename"]).name for entry in listed]
    for folder in (directory, directory / "data"):
        files = sorted(p for p in folder.glob("*") if p.is_file() and p.name.endswith((*TABLES, *JSON_LINES)))
        files = [p for p in files if p.name not in ("dataset_info.json", "dataset_infos.json", "config.json")]
        by_split: dict[str, list[Path]] = {}
        for file in files:
            stem = file.name.removesuffix(".gz").rsplit(".", 1)[0]
            match = _SHARD.fullmatch(stem)
            by_split.setdefault(match[1] if match else stem, []).append(file)
        if by_split:
            known = {*TRAIN_SPLITS, *EVAL_SPLITS}
            if len(by_split) == 1 or not known & set(by_split):
                return files
            return by_split[_chosen(directory, list(by_split), splits)]
    raise ValueError(f"{directory} has no data files: expected {', '.join(TABLES)} or JSON lines, also in data/")


def _chosen(directory: Path, names: Sequence[str], splits: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    for split in splits:
        if split in names:
            return split
    raise ValueError(
        f"{directory} has the splits {', '.join(names)}, but no {splits[0]}; name a file or folder inside it"
    )
