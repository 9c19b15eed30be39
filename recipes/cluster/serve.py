"""Keep one vLLM server alive for a job: `python -m recipes.cluster.serve DIR [--toward HOST] [-- VLLM ARGUMENTS]`.

slurm/task.sh starts it once per server, with the token in $VLLM_API_KEY. It starts vLLM under the process guard, on the
node's private address, and writes the server's URL to `server-N.url` after the first token. A server that dies, or
whose engine no longer answers (vLLM's /health would still return 200), is restarted on the same address after a pause,
which doubles each time. A restarted server has the initial weights, so the pool sends it no request before the next
weight update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.schema import RolloutConfig
from megatron_ext.sync import process_guard
from megatron_ext.sync.auth import TOKEN_VARIABLE
from recipes.cluster import attempt
from recipes.rollout.vllm.server import CLOSE_S, Place, server_command, server_environment

OPTIONS_FILE = "server.json"  # in the attempt's directory, written by `recipes.cluster.job`
FIRST_PORT, BLOCK, BLOCKS = 12000, 16, 1250  # 12000 to 31999; Linux gives away 32768 and up unless told otherwise
PROBE_S = 5.0  # between probes
HEALTHY_S = 600.0  # a server that dies after this time counts as a first failure again
MAX_RESTARTS = 8  # failures in a row


def port_candidates(job: int, offset: int, ephemeral: tuple[int, int] | None = None) -> Iterator[int]:
    """Ports for one purpose of a job, in order of preference: its own block of 16, then those of other job numbers.

    Jobs on one node have different numbers, so they do not meet; ports that the kernel gives to outgoing connections
    are left out, since one of those could take the port between two starts of a server.

    Args:
        offset: 0 for the learner's rendezvous, 1 + local index for servers.
        ephemeral: first and last port that the kernel gives away; None: as this node is set.
    """
    low, high = ephemeral or _ephemeral_ports()
    for attempt_number in range(BLOCKS):
        port = FIRST_PORT + (job + 7 * attempt_number) % BLOCKS * BLOCK + offset % BLOCK
        if not low <= port <= high:
            yield port


def _ephemeral_ports() -> tuple[int, int]:
    words = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(words[0]), int(words[1])


class Port:
    """The first candidate on which nobody listens and which no other `Port` of this node holds; ``number``.

    Held by a name in Linux's abstract socket namespace, which vanishes with the process; the port itself stays unbound,
    since whoever listens on it is another process. ValueError when all are taken.
    """

    def __init__(self, address: str, candidates: Iterable[int]) -> None:
        for port in candidates:
            name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                name.bind(f"\0gppo-port-{port}")
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((address, port))
                    probe.listen(1)
            except OSError:
                name.close()
                continue
            self.number, self._name = port, name
            return
        where = address or "this node"
        raise ValueError(f"no free port on {where} between {FIRST_PORT} and {FIRST_PORT + BLOCKS * BLOCK - 1}")

    def release(self) -> None:
        self._name.close()


def private_address(toward: str, interface: str = "") -> str:
    """The IPv4 address of this node that ``toward`` reaches it by, or that of a named interface.

    Raises ValueError when there is none, or when it is a loopback address and ``toward`` is another node.
    """
    if interface:
        import psutil

        found = [a.address for a in psutil.net_if_addrs().get(interface, []) if a.family == socket.AF_INET]
        if not found:
            raise ValueError(f"SERVER_INTERFACE={interface}: no such interface with an IPv4 address on this node")
        return str(found[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((toward, 9))  # sends nothing: it only asks for the route
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(f"no route to {toward} ({error}): set SERVER_INTERFACE in slurm/site.env") from error
    if address.startswith("127.") and toward.split(".")[0] not in ("localhost", "127", socket.gethostname()):
        raise ValueError(f"{toward} resolves to this node's loopback address: set SERVER_INTERFACE in slurm/site.env")
    return address


class Hung(RuntimeError):
    """The engine did not answer in time."""


class Supervisor:
    """Starts, watches and restarts one server."""

    def __init__(self, directory: Path, index: int, local: int, address: str, extra: list[str], hang_s: float) -> None:
        values: dict[str, Any] = json.loads((directory / OPTIONS_FILE).read_text(encoding="utf-8"))
        device = "cuda" if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"
        rollout = RolloutConfig(**values["rollout"])
        rollout.extra_args = [*rollout.extra_args, *extra]
        place = Place(Path(values["model_dir"]), directory, device)
        self._directory, self._role, self._hang_s = directory, f"server-{index}", hang_s
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        self._port = Port(address, port_candidates(job, 1 + local))
        self.url = f"http://{address}:{self._port.number}"
        vllm = server_command(rollout, place, self._port.number, address)
        self._command = [sys.executable, process_guard.__file__, str(os.getpid()), *vllm]
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not self._token:
            raise ValueError(f"{TOKEN_VARIABLE} is empty: set it to a random token before starting the server")
        self._environment = server_environment(os.environ, local, self._token, batch_invariant=rollout.batch_invariant)
        self._guard: subprocess.Popen[bytes] | None = None

    def run(self, start_s: float) -> int:
        """Until told to stop (SystemExit from a signal handler), or until it fails too often: 1."""
        failures = 0
        try:
            while failures <= MAX_RESTARTS:
                begin = time.monotonic()
                reason = self._one_life(start_s)
                failures = 1 if time.monotonic() - begin > HEALTHY_S else failures + 1
                pause = min(2.0 ** (failures - 1), 60.0)
                attempt.record(self._directory, self._role, "failed", error=reason, again_in_s=pause)
                print(f"[serve] {reason}; starting again in {pause:.0f} s", flush=True)
                time.sleep(pause)
        finally:
            self._stop()
        attempt.record(self._directory, self._role, "gave up", failures=failures)
        return 1

    def _one_life(self, start_s: float) -> str:
        """Start the server and watch it; why it ended."""
        begin = time.monotonic()
        attempt.record(self._directory, self._role, "started", url=self.url)
        self._guard = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=self._environment)
        try:
            while not self._answers_generation():
                if self._guard.poll() is not None:
                    return f"{_ended(self._guard.returncode)} while starting"
                if time.monotonic() - begin > start_s:
                    return f"not ready after {start_s:.0f} s"
                time.sleep(0.5)
            self._ready(time.monotonic() - begin)
            while True:
                self._check_engine()
                try:
                    return _ended(self._guard.wait(PROBE_S))
                except subprocess.TimeoutExpired:
                    continue
        except Hung as error:
            return str(error)
        finally:
            self._stop()

    def _ready(self, seconds: float) -> None:
        file = self._directory / f"{self._role}.url"
        temporary = file.with_suffix(".part")
        temporary.write_text(self.url + "\n", encoding="utf-8")
        os.replace(temporary, file)
        attempt.record(self._directory, self._role, "ready", seconds=round(seconds, 1))
        print(f"[serve] {self.url} ready after {seconds:.0f} s", flush=True)

    def _answers_generation(self) -> bool:
        body = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0.0}}
        try:
            self._ask("/inference/v1/generate", body, self._hang_s)
        except OSError:
            return False
        return True

    def _check_engine(self) -> None:
        """Send a trivial request that the engine's loop answers between two decoding steps.

        A short generation would wait behind all queued requests, and /health asks only the front end. Raises Hung. A
        refused connection is not an error here, because the guard ends with the server.
        """
        with contextlib.suppress(OSError):
            try:
                self._ask("/is_paused", None, self._hang_s)
            except TimeoutError as error:
                raise Hung(f"the engine did not answer for {self._hang_s:.0f} s") from error

    def _ask(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> None:
        """GET, or POST of a body. Raises TimeoutError, or another OSError for any other failure."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            # Directly to the server, without a proxy of the site's environment.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=timeout_s) as response:
                response.read()
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from error
            raise

    def _stop(self) -> None:
        """End every process of the server."""
        if self._guard is not None and self._guard.poll() is None:
            self._guard.terminate()
            self._guard.wait(CLOSE_S)
        self._guard = None


def _ended(status: int) -> str:
    """The guard passes a signal that ended vLLM on as 256 less its number."""
    return f"ended by signal {256 - status}" if 192 < status < 256 else f"ended with status {status}"


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    extra = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(prog="python -m recipes.cluster.serve", description=__doc__)
    parser.add_argument("attempt", type=Path, help="the attempt's directory, with server.json")
    parser.add_argument("--index", type=int, default=int(os.environ.get("SLURM_PROCID", "0")), help="among all servers")
    parser.add_argument("--local", type=int, default=int(os.environ.get("SLURM_LOCALID", "0")), help="on this node")
    parser.add_argument("--toward", default="127.0.0.1", help="a host that must reach this server: the learner's")
    parser.add_argument("--interface", default="", help="bind this interface's address instead")
    parser.add_argument("--start-s", type=float, default=1800.0, help="time for loading the model")
    parser.add_argument(
        "--hang-s",
        type=float,
        default=300.0,
        help="engine silence after which it is restarted; longer than any weight update",
    )
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        address = private_address(args.toward, args.interface)
        supervisor = Supervisor(args.attempt, args.index, args.local, address, extra, args.hang_s)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        attempt.record(args.attempt, f"server-{args.index}", "failed", error=str(error))
        return 2
    return supervisor.run(args.start_s)


if __name__ == "__main__":
    sys.exit(main())
