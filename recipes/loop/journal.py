"""The rollout journal: one binary record per batch of rollouts or evaluation, synced to disk before training on it.

It is the only source of randomness that a run has, so it makes a run repeatable: training on a journal gives the same
numbers bit for bit, and a run that was killed continues with the rollouts it had already made.

The file is append-only. A record is a frame of 32 bytes (magic, length and XXH3-128 of what follows) and a safetensors
file: the arrays below, and the rest as JSON in its metadata under "record". Legend: B responses, T response tokens,
G groups, each with a prompt.

    prompt_ids, prompt_ends    int32, (G,) int64      the prompts' tokens, one after the other, and where each ends
    group                      (B,) int32             of each response
    response_ids, logprobs     (T,) int32, float32    float64 where a log-probability is not a float32
    response_ends              (B,) int64
    versions, version_ends     int32, int64           weight versions along the T tokens, and where each run ends
    experts                    uint8 or int16         (sum of P + L - 1, layers with experts, top k), of each response
                                                      in turn; only where all are known (`Rollout.experts`)
    reward, correct            (B,) float64, bool
    finish, status             (B,) uint8             indices into FINISH and STATUS
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.numpy import save
from safetensors.torch import load
from safetensors.torch import save as save_tensors
from torch import Tensor

from megatron_ext.rl.types import Problem, Rollout, Sample

FILE = "journal.bin"
OLD_FILE = "journal.jsonl"  # of runs before this format: one JSON object per line
MAGIC = b"gppo-j1\n"
FRAME_BYTES = 32
FINISH = ("stop", "length")
STATUS = ("ok", "timeout", "crash", "invalid")

Group = tuple[Problem, list[Sample]]


class Tokens(NamedTuple):
    """Token ids of each group's prompt and of each response, and each response's experts."""

    prompts: list[Tensor]
    responses: list[Tensor]
    experts: list[Tensor | None]


@dataclass(frozen=True)
class Place:
    """Where a record's payload is in a file."""

    path: Path
    offset: int
    length: int
    digest: bytes


class Journal:
    """Records by (kind, step), kind being "rollouts" or "eval". ``source`` is read, ``target`` appended to."""

    def __init__(self, target: Path, source: Path | None = None) -> None:
        """Index ``source`` (default: ``target``) if it exists; a torn last record of ``target`` is cut off.

        Raises ValueError when anything before the end is no record, and when ``target`` lies beside an old journal.
        """
        if not target.exists() and (target.parent / OLD_FILE).exists() and source is None:
            raise ValueError(
                f"{target.parent} holds a run with the older {OLD_FILE}: it can be replayed (rollout.replay="
                f"{target.parent} run.dir=NEW), and continued only by the version that wrote it"
            )
        self._target = target
        self._own, end = index(target)
        self._source = self._own if source is None or source == target else index_source(source)
        if target.exists():
            os.truncate(target, end)
        self._file = target.open("ab")

    def has(self, kind: str, step: int) -> bool:
        return (kind, step) in self._source

    def about(self, kind: str, step: int) -> dict[str, Any]:
        """What a record of the source, or one written since, holds beside arrays."""
        place = self._source[kind, step]
        return Record(read(place)).about

    def put(self, record: Mapping[str, Any]) -> bytes:
        """Append a record (see `encode`), durable when this returns; its payload."""
        payload = encode(record)
        self._write(payload)
        return payload

    def copy(self, kind: str, step: int) -> bytes:
        """Payload of a record of the source, which the target then holds too, byte for byte.

        Raises ValueError when the target has another record for this step, or the record is damaged.
        """
        payload = read(self._source[kind, step])
        own = self._own.get((kind, step))
        if own is None:
            self._write(payload)
        elif own.digest != xxhash.xxh3_128_digest(payload):
            raise ValueError(
                f"{self._target} holds other rollouts of step {step + 1} than the journal that is replayed; "
                "set run.dir to a new directory"
            )
        return payload

    def _write(self, payload: bytes) -> None:
        self._file.write(frame(payload))
        self._file.write(payload)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def frame(payload: bytes) -> bytes:
    return MAGIC + len(payload).to_bytes(8, "little") + xxhash.xxh3_128_digest(payload)


def index(path: Path) -> tuple[dict[tuple[str, int], Place], int]:
    """Whole records of a file by (kind, step), and where the last one ends. Reads the headers alone.

    A record that the file's end cuts off, or the last one if its bytes are not those that were written, is torn.
    """
    found: dict[tuple[str, int], Place] = {}
    end = 0
    if not path.exists():
        return found, end
    size = path.stat().st_size
    with path.open("rb") as file:
        while end + FRAME_BYTES + 8 <= size:
            file.seek(end)
            head = file.read(FRAME_BYTES)
            place = Place(path, end + FRAME_BYTES, int.from_bytes(head[8:16], "little"), head[16:])
            after = place.offset + place.length
            if head[:8] == MAGIC and after > size:
                break
            try:
                if head[:8] != MAGIC:
                    raise ValueError("no frame")
                header = int.from_bytes(file.read(8), "little")
                about = json.loads(json.loads(file.read(min(header, place.length)))["__metadata__"]["record"])
                key = (str(about["kind"]), int(about["step"]))
                if after == size:
                    read(place)
            except (ValueError, KeyError, TypeError) as error:
                if after == size and head[:8] == MAGIC:
                    break
                raise ValueError(f"{path}, byte {end}: not a journal record; restore the file") from error
            found[key] = place
            end = after
        file.seek(end)
        if not MAGIC.startswith(file.read(len(MAGIC))):
            raise ValueError(f"{path}, byte {end}: not a journal record; restore the file")
    return found, end


def read(place: Place | bytes) -> bytes:
    """Payload of a record. ValueError when its bytes are not those that were written."""
    if isinstance(place, bytes):
        return place
    with place.path.open("rb") as file:
        file.seek(place.offset)
        payload = file.read(place.length)
    if xxhash.xxh3_128_digest(payload) != place.digest:
        raise ValueError(f"{place.path}, byte {place.offset}: a damaged journal record; restore the file")
    return payload


def source_file(run_dir: Path) -> Path | None:
    """The journal of a run, in this or the older format."""
    return next((path for name in (FILE, OLD_FILE) if (path := run_dir / name).is_file()), None)


def index_source(path: Path) -> Mapping[tuple[str, int], Place | bytes]:
    """Records of a journal that is only read; of the older JSON format too."""
    if path.name != OLD_FILE:
        return index(path)[0]
    records: dict[tuple[str, int], Place | bytes] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if "groups" in record:
                    record["groups"] = [_old_group(group) for group in record["groups"]]
                records[record["kind"], record["step"]] = encode(record)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a journal record; restore the file") from error
    return records


def _old_group(group: dict[str, Any]) -> Group:
    samples = []
    for r in group["responses"]:
        rollout = Rollout(group["prompt"], r["ids"], r["logprobs"], r["versions"], r["finish"])
        judged = {key: r[key] for key in ("reward", "correct", "status")}
        samples.append(Sample(rollout, group["problem"], 0, 0, **judged))
    return Problem(group["problem"], "", group["gold"]), samples


# ---- what is in a record ---------------------------------------------------------------------------------------------


def encode(record: Mapping[str, Any]) -> bytes:
    """Payload of a record: ``kind``, ``step`` and whatever JSON can hold; ``groups``, of rollouts, as `Group`."""
    about = {key: value for key, value in record.items() if key != "groups"}
    arrays: dict[str, np.ndarray] = {}
    if "groups" in record:
        groups: list[Group] = record["groups"]
        about |= {"problems": [problem.id for problem, _ in groups], "golds": [problem.answer for problem, _ in groups]}
        arrays = _columns(groups)
    return save(arrays, {"record": json.dumps(about, separators=(",", ":"), ensure_ascii=False)})


def _columns(groups: list[Group]) -> dict[str, np.ndarray]:
    samples = [sample for _, members in groups for sample in members]
    prompts = [_array(members[0].rollout.prompt_ids, np.int32) for _, members in groups]
    responses = [_array(sample.rollout.response_ids, np.int32) for sample in samples]
    versions = _join([_array(sample.rollout.weight_versions, np.int32) for sample in samples], np.int32)
    starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
    experts = [sample.rollout.experts for sample in samples]
    known = [chosen for chosen in experts if chosen is not None]
    routing = {"experts": torch.cat(known).numpy()} if known and len(known) == len(experts) else {}
    return {
        "prompt_ids": _join(prompts, np.int32),
        "prompt_ends": np.cumsum([len(prompt) for prompt in prompts], dtype=np.int64),
        "group": np.repeat(np.arange(len(groups), dtype=np.int32), [len(members) for _, members in groups]),
        "response_ids": _join(responses, np.int32),
        "response_ends": np.cumsum([len(response) for response in responses], dtype=np.int64),
        "logprobs": _logprobs(samples),
        "versions": versions[starts],
        "version_ends": np.append(starts[1:], len(versions)).astype(np.int64)[: len(starts)],
        "reward": np.array([sample.reward for sample in samples], dtype=np.float64),
        "correct": np.array([sample.correct for sample in samples], dtype=bool),
        "finish": np.array([FINISH.index(sample.rollout.finish_reason) for sample in samples], dtype=np.uint8),
        "status": np.array([STATUS.index(sample.status) for sample in samples], dtype=np.uint8),
        **routing,
    }


def _logprobs(samples: list[Sample]) -> np.ndarray:
    """float32, which engines compute in; float64 when that would change a value."""
    if all(isinstance(s.rollout.logprobs, Tensor) and s.rollout.logprobs.dtype == torch.float32 for s in samples):
        return _join([_array(s.rollout.logprobs, np.float32) for s in samples], np.float32)
    exact = _join([_array(s.rollout.logprobs, np.float64) for s in samples], np.float64)
    with np.errstate(over="ignore"):
        small = exact.astype(np.float32)
    return small if np.array_equal(small.astype(np.float64), exact, equal_nan=True) else exact


def _array(values: Any, dtype: Any) -> np.ndarray:
    return np.asarray(values.numpy() if isinstance(values, Tensor) else values, dtype=dtype)


def _join(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


class Record:
    """A record that was read: ``about``, and the arrays as tensors."""

    def __init__(self, payload: bytes) -> None:
        header = int.from_bytes(payload[:8], "little")
        about: dict[str, Any] = json.loads(json.loads(payload[8 : 8 + header])["__metadata__"]["record"])
        self.about, self.arrays = about, load(payload)

    def samples(self, first_seq_id: int, tokens: Tokens | None = None) -> list[Sample]:
        """The samples of a "rollouts" record, numbered from ``first_seq_id``; token ids and so on as tensors.

        ``tokens``: of a record whose own were taken out; by default the record's.
        """
        if "response_ends" not in self.arrays:
            return []
        arrays = self.arrays
        prompts, responses, experts = tokens or self.tokens()
        members = zip(
            arrays["group"].tolist(),
            responses,
            _cut(arrays["logprobs"], arrays["response_ends"]),
            _versions(arrays),
            experts,
            *(arrays[name].tolist() for name in ("finish", "reward", "correct", "status")),
            strict=True,
        )
        problems = self.about["problems"]
        return [
            Sample(
                Rollout(prompts[group], ids, logprobs, versions, FINISH[finish], chosen),
                problem_id=problems[group],
                group=group,
                seq_id=first_seq_id + number,
                reward=reward,
                correct=correct,
                status=STATUS[status],
            )
            for number, (group, ids, logprobs, versions, chosen, finish, reward, correct, status) in enumerate(members)
        ]

    def tokens(self) -> Tokens:
        """What only the ranks need that compute a sample."""
        cut = ((f"{kind}_ids", f"{kind}_ends") for kind in ("prompt", "response"))
        prompts, responses = (_cut(self.arrays[ids], self.arrays[ends]) for ids, ends in cut)
        experts: list[Tensor | None] = [None] * len(responses)
        if "experts" in self.arrays:
            groups = self.arrays["group"].tolist()
            read = [len(prompts[group]) + len(ids) - 1 for group, ids in zip(groups, responses, strict=True)]
            experts = list(self.arrays["experts"].split(read))
        return Tokens(prompts, responses, experts)

    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each group's prompt and of each response."""
        prompts, responses = (_lengths(self.arrays[name]) for name in ("prompt_ends", "response_ends"))
        return prompts, responses

    def without_tokens(self) -> bytes:
        """Payload without token ids and experts: what a rank needs of samples that it does not compute."""
        kept = {name: array for name, array in self.arrays.items() if name not in ("prompt_ids", "response_ids")}
        if "experts" in kept:
            kept["experts"] = kept["experts"][:0].clone()  # shape and dtype
        return save_tensors(kept, {"record": json.dumps(self.about, separators=(",", ":"), ensure_ascii=False)})

    def oldest_version(self) -> int | None:
        """Of the weights that wrote a token; None without tokens."""
        versions = self.arrays.get("versions")
        return None if versions is None or not len(versions) else int(versions.min())


def _cut(flat: Tensor, ends: Tensor) -> list[Tensor]:
    return list(flat.split(_lengths(ends))) if len(ends) else []


def _lengths(ends: Tensor) -> list[int]:
    found: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return found


def _versions(arrays: Mapping[str, Tensor]) -> list[Tensor]:
    """Per response; views of one number where a response has one version, so that they take no memory."""
    versions, ends = arrays["versions"], arrays["version_ends"]
    found, start = [], 0
    for end in arrays["response_ends"].tolist():
        first = int(torch.searchsorted(ends, start, right=True))
        last = int(torch.searchsorted(ends, end)) if end > start else first
        if first == last:
            found.append(versions[first : first + 1].expand(end - start) if end > start else versions[:0])
        else:
            bounds = ends[first : last + 1].clamp(max=end).diff(prepend=ends.new_tensor([start]))
            found.append(versions[first : last + 1].repeat_interleave(bounds))
        start = end
    return found


def as_groups(record: Record) -> list[dict[str, Any]]:
    """The groups of a record as plain lists, for people and tests."""
    groups: list[dict[str, Any]] = []
    golds = record.about.get("golds", [])
    for sample in record.samples(0):
        if sample.group == len(groups):
            prompt = as_list(sample.rollout.prompt_ids)
            groups.append(
                {"problem": sample.problem_id, "gold": golds[sample.group], "prompt": prompt, "responses": []}
            )
        groups[sample.group]["responses"].append(
            {
                "ids": as_list(sample.rollout.response_ids),
                "logprobs": as_list(sample.rollout.logprobs),
                "versions": as_list(sample.rollout.weight_versions),
                "finish": sample.rollout.finish_reason,
                "reward": sample.reward,
                "correct": sample.correct,
                "status": sample.status,
            }
        )
    return groups


def as_list(values: list[Any] | Tensor) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def records(run_dir: Path) -> Iterable[Record]:
    """All records of a run, in the order in which they were written."""
    path = source_file(run_dir)
    if path is None:
        raise ValueError(f"{run_dir}: no {FILE} there; give the directory of a run")
    for place in index_source(path).values():
        yield Record(read(place))
