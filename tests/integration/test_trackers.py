"""Trackers get the lines of metrics.jsonl, each step once even if a run is resumed, and never block the loop.

The real packages are used where they are installed, as TensorBoard's is; docs/tracking.md says how to test the others.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from configs.schema import Config
from recipes.loop import trackers
from recipes.loop.trackers import STATE, TRACKERS, Sink

Steps = list[tuple[int, float]]


def config(name: str, run: Path) -> Config:
    words = [
        f"logging=[{name}]",
        f"run.dir={run}",
        "run.name=tracked",
        "tracking.project=tests",
        "tracking.offline=true",
    ]
    return load_config([*words, "rollout.urls=['http://user:hunter2@host:8000']", "model.path=/home/someone/model"])


def line(step: int) -> dict[str, Any]:
    return {"step": step, "actor/entropy": step / 10, "val-core/set/avg@8": 0.5, "bad": float("nan"), "text": "x"}


def session(name: str, run: Path, steps: range, said: list[str], *, closed: bool = True) -> Sink:
    """One start of a run: log several steps, as `RunDir` does."""
    run.mkdir(exist_ok=True)
    sink = Sink(config(name, run), run, said.append)
    file = run / "metrics.jsonl"
    kept = (
        [text for text in file.read_text().splitlines() if json.loads(text)["step"] < steps[0]] if file.exists() else []
    )
    file.write_text("".join(text + "\n" for text in kept))
    sink.begin()
    for step in steps:
        with file.open("a") as out:
            out.write(json.dumps(line(step)) + "\n")
        sink.log(line(step))
    if closed:
        sink.close()
    return sink


def tensorboard(run: Path) -> Steps:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["actor/entropy", "val-core/set/avg@8"], "numbers alone, and finite ones"
    return [(e.step, e.value) for e in events.Scalars("actor/entropy")]


def wandb(run: Path) -> Steps:
    """Offline files: several of one run, whose steps W&B joins when they are sent."""
    from wandb.proto import wandb_internal_pb2

    found: Steps = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:], 7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                if "actor/entropy" in items:
                    found.append((int(items["_step"]), float(items["actor/entropy"])))
    return found


def leveldb_records(data: bytes, offset: int) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, in them fragments of (crc 4, length 2, type 1) bytes."""
    at, record = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + offset) % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def mlflow(run: Path) -> Steps:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    id = json.loads((run / STATE).read_text())["mlflow"]["id"]
    assert client.get_run(id).data.params["loss.name"] == "ce_gppo"
    assert client.get_metric_history(id, "val-core/set/avg_8")
    return [(m.step, m.value) for m in client.get_metric_history(id, "actor/entropy")]


def trackio(run: Path) -> Steps:
    import sqlite3

    found: Steps = []
    for file in (run / "trackio").rglob("*.db"):
        with sqlite3.connect(file) as database:
            for step, metrics in database.execute("select step, metrics from metrics"):
                found.append((step, json.loads(metrics)["actor/entropy"]))
    return found


READERS: dict[str, Callable[[Path], Steps]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


@pytest.mark.parametrize("name", list(TRACKERS))
def test_steps_arrive_once_over_interruptions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = tmp_path / "run", []  # type: ignore[var-annotated]
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))  # read at the first import
    pytest.importorskip(name)
    monkeypatch.setattr(trackers, "CLOSE_S", 120.0)
    session(name, run, range(1, 6), said)
    session(name, run, range(4, 9), said)  # from the checkpoint of step 3: steps 4 and 5 are repeated
    assert said == []
    steps = sorted(READERS[name](run))
    assert [step for step, _ in steps] == list(range(1, 9))
    assert all(value == pytest.approx(step / 10) for step, value in steps)
    everything = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert b"hunter2" not in everything and b"/home/someone" not in everything


class Stub:
    """A tracker in memory."""

    id = "stub"
    logged: list[int] = []
    gate = threading.Event()

    def __init__(self, *_: Any) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.gate.wait()
        self.logged.append(step)

    def close(self) -> None:
        self.logged.append(-1)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    Stub.logged, Stub.gate = [], threading.Event()
    monkeypatch.setitem(TRACKERS, "wandb", Stub)
    return Stub


def test_a_tracker_that_hangs_costs_the_loop_nothing(
    stub: type[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_LINES", 5)
    said: list[str] = []
    begin = time.monotonic()
    session("wandb", tmp_path, range(1, 50), said)
    assert time.monotonic() - begin < 5
    assert [text.split(";")[0] for text in said] == [
        "note: wandb is too slow or hangs",
        "note: wandb did not end within 0 s",
    ]
    assert stub.logged == []


def test_what_a_tracker_lacks_is_sent_at_the_next_start(
    stub: type[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "QUEUE_LINES", 2)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    session("wandb", tmp_path, range(1, 9), [])
    stub.gate.set()
    time.sleep(0.3)
    stub.logged.clear()
    known = json.loads((tmp_path / STATE).read_text())["wandb"]["last"]
    monkeypatch.setattr(trackers, "QUEUE_LINES", 100)
    monkeypatch.setattr(trackers, "CLOSE_S", 10.0)
    session("wandb", tmp_path, range(9, 11), [])
    assert stub.logged == [*range(known + 1, 11), -1]


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise RuntimeError("no\nsuch project")

    monkeypatch.setitem(TRACKERS, "mlflow", refuses)
    said: list[str] = []
    session("mlflow", tmp_path, range(1, 4), said)
    assert said == ["note: mlflow failed and is left out (RuntimeError: no such project)"]


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.checks import settings

    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logging=\[wandb\] needs a package .*: pip install wandb"):
        settings.load_checked(["logging=[wandb]"])
    with pytest.raises(ValueError, match=r"'wandbb' is unknown \(did you mean 'wandb'\?\); choose tensorboard, wandb"):
        load_config(["logging=[wandbb]"])
