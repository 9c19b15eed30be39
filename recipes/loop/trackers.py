"""Experiment trackers: TensorBoard, W&B, MLflow, Trackio. They get the lines of `metrics.jsonl`.

Each tracker has a thread with a queue. The loop puts a line into the queue and continues, so a tracker that hangs,
fails or is slow does not delay the run. Lines that it missed are sent when the run is started again. `trackers.json` in
the run directory holds the tracker's id for the run and its last step, so a resumed run continues there, and a step
that is repeated is not logged twice.

None of the packages is a dependency. The packages read credentials themselves, from their own environment variables and
files. Only numbers and the configuration without secrets and paths are sent.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from configs.schema import Config
from recipes.reporting.page import scrub
from recipes.reporting.runs import read_jsonl

STATE = "trackers.json"  # in the run directory: tracker -> {"id": its name for the run, "last": last step it has}
QUEUE_LINES = 10_000
CLOSE_S = 15.0  # how long the end of a run waits for the queues


class Tracker(Protocol):
    """One tracker's client, used by its own thread only."""

    id: str  # by which the tracker finds the run again

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    def __init__(self, config: Config, run_dir: Path, known: str | None, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        self._writer = SummaryWriter(str(run_dir / self.id))
        if known is None:
            text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
            self._writer.add_text("configuration", text, 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; files of offline runs are in RUN_DIR/wandb (`wandb sync` sends them)."""

    def __init__(self, config: Config, run_dir: Path, known: str | None, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        quiet = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True, "silent": True}
        self._run = wandb.init(
            project=config.tracking.project,
            name=config.run.name,
            id=known,
            resume="allow",
            dir=str(run_dir),
            config=settings,
            mode="offline" if config.tracking.offline else None,
            settings=wandb.Settings(**quiet),
        )
        self.id = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow at $MLFLOW_TRACKING_URI, else in RUN_DIR/mlflow.db."""

    def __init__(self, config: Config, run_dir: Path, known: str | None, settings: dict[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        local = f"sqlite:///{(run_dir / 'mlflow.db').absolute()}"
        uri = local if config.tracking.offline else os.environ.get("MLFLOW_TRACKING_URI", local)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._param = importlib.import_module("mlflow.entities").Param
        if known is None:
            name = config.tracking.project
            found = self._client.get_experiment_by_name(name)
            kwargs = {"artifact_location": (run_dir / "mlflow").absolute().as_uri()} if uri == local else {}
            experiment = found.experiment_id if found else self._client.create_experiment(name, **kwargs)
            self.id = self._client.create_run(experiment, run_name=config.run.name).info.run_id
            params = [self._param(key, str(value)[:500]) for key, value in settings.items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[start : start + 100])
        else:
            self.id = known

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class Trackio:
    """Trackio's local database, in RUN_DIR/trackio unless $TRACKIO_DIR names another."""

    def __init__(self, config: Config, run_dir: Path, known: str | None, settings: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run_dir / "trackio").absolute()))
        trackio = importlib.import_module("trackio")
        self.id = known or f"{config.run.name.replace('/', '-')}-{int(time.time())}"
        self._trackio = trackio
        self._run = trackio.init(
            project=config.tracking.project,
            name=self.id,
            config=settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _mlflow_name(name: str) -> str:
    """MLflow allows letters, digits, and ``_-. :/`` in names; ``avg@8`` becomes ``avg_8``."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


TRACKERS: dict[str, Callable[[Config, Path, str | None, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Sink:
    """All trackers of a run. ``begin`` and ``log`` return immediately; a failure ends only that tracker."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
        self._config, self._run_dir, self._say = config, run_dir, say
        self._lock = threading.Lock()  # of the state file
        self._queues: dict[str, queue.Queue[dict[str, Any] | None]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._dropped: set[str] = set()

    def begin(self) -> None:
        """Start the trackers, after the logs were truncated to the step from which the run continues."""
        state = self._read_state()
        for name in dict.fromkeys(self._config.logging):
            self._queues[name] = queue.Queue(QUEUE_LINES)
            args = (name, self._queues[name], state.get(name, {}))
            self._threads[name] = threading.Thread(target=self._work, args=args, name=f"tracker-{name}", daemon=True)
            self._threads[name].start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Queue a line of ``metrics.jsonl``."""
        for name, lines in self._queues.items():
            try:
                lines.put_nowait(dict(line))
            except queue.Full:
                if name not in self._dropped:
                    self._dropped.add(name)
                    self._say(f"note: {name} is too slow or hangs; its lines are left out until the next start")

    def close(self) -> None:
        """Wait up to `CLOSE_S` for queued lines. The rest is sent when the run is started again."""
        deadline = time.monotonic() + CLOSE_S
        for name, lines in self._queues.items():
            with_room = threading.Timer(0, lines.put, (None,))  # a full queue must not block the end of the run
            with_room.daemon = True
            with_room.start()
            self._threads[name].join(max(0.0, deadline - time.monotonic()))
            if self._threads[name].is_alive():
                self._say(
                    f"note: {name} did not end within {CLOSE_S:.0f} s; lines that it lacks are sent at the next start"
                )
        self._queues = {}

    # --- in the tracker's thread ------------------------------------------------------------------------------------

    def _work(self, name: str, lines: queue.Queue[dict[str, Any] | None], known: Mapping[str, Any]) -> None:
        try:
            last = known.get("last", 0)
            earlier = self._earlier(last)
            tracker = TRACKERS[name](self._config, self._run_dir, known.get("id"), _settings(self._config))
            self._write_state(name, tracker.id, last)
            for line in earlier:
                last = self._send(name, tracker, line, last)
            while (line_or_end := lines.get()) is not None:
                last = self._send(name, tracker, line_or_end, last)
            tracker.close()
        except Exception as error:  # whatever it is, it is the tracker's, and the run goes on
            first = " ".join(str(error).split())[:200]
            self._say(f"note: {name} failed and is left out ({type(error).__name__}: {first})")

    def _send(self, name: str, tracker: Tracker, line: Mapping[str, Any], last: int) -> int:
        step = int(line["step"])
        if step <= last:
            return last  # the tracker has this step: it was done before the run was interrupted
        numbers = {key: float(v) for key, v in line.items() if key != "step" and isinstance(v, (int, float))}
        tracker.log(step, {key: value for key, value in numbers.items() if math.isfinite(value)})
        self._write_state(name, tracker.id, step)
        return step

    def _earlier(self, last: int) -> list[dict[str, Any]]:
        """Lines that are in the file and that the tracker lacks."""
        file = self._run_dir / "metrics.jsonl"
        rows = read_jsonl(file)[0] if file.is_file() else []
        return [row for row in rows if row.get("step", 0) > last]

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self._run_dir / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self, name: str, id: str, last: int) -> None:
        with self._lock:
            state = self._read_state() | {name: {"id": id, "last": last}}
            temporary = self._run_dir / f".{STATE}"
            temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._run_dir / STATE)


def _settings(config: Config) -> dict[str, Any]:
    """The configuration for a tracker: flat, without secrets and absolute paths."""
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(scrub(asdict(config)), "")
    return flat
