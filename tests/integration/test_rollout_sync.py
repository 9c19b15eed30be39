"""Weight-update contract, file transport, authentication, and the guard that leaves no process behind."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.sync import base, broadcast, disk, ipc, node, process_guard, receive
from megatron_ext.sync.auth import RequireToken
from megatron_ext.sync.base import WeightDigest, stage_weights
from megatron_ext.sync.broadcast import BroadcastSync, Rendezvous, join_group
from megatron_ext.sync.broadcast import broadcast as broadcast_data
from megatron_ext.sync.buckets import Entry, layout, tensors_of
from megatron_ext.sync.disk import DiskSync
from megatron_ext.sync.ipc import IpcSync
from megatron_ext.sync.receive import Update, read_shared, read_verified

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def digest(weights: dict[str, Tensor]) -> str:
    result = WeightDigest()
    for name, tensor in weights.items():
        result.add(name, tensor)
    return result.hexdigest()


def test_digest_ignores_order_and_layout_and_sees_everything_else() -> None:
    same = {"c": WEIGHTS["c"], "b": WEIGHTS["b"], "a": WEIGHTS["a"].t().contiguous().t()}
    assert digest(same) == digest(WEIGHTS)
    others = [
        {"x": WEIGHTS["a"], "b": WEIGHTS["b"], "c": WEIGHTS["c"]},
        WEIGHTS | {"a": WEIGHTS["a"].reshape(3, 2)},
        WEIGHTS | {"b": WEIGHTS["b"].float()},
        WEIGHTS | {"b": WEIGHTS["b"].view(torch.int16)},
        WEIGHTS | {"a": WEIGHTS["a"].nextafter(torch.tensor(9.0))},
        {"a": WEIGHTS["a"], "b": WEIGHTS["b"]},
        WEIGHTS | {"d": torch.zeros(0)},
    ]
    assert len({digest(other) for other in others} | {digest(WEIGHTS)}) == len(others) + 1
    again = WeightDigest()
    again.add("a", WEIGHTS["a"])
    with pytest.raises(ValueError, match="'a' occurs twice"):
        again.add("a", WEIGHTS["a"])


def test_digest_of_large_tensors_sees_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DIGEST_CHUNK_BYTES", 64)
    tensor = torch.arange(100.0)
    found = {
        digest({"a": tensor}),
        digest({"a": tensor.roll(16)}),
        digest({"a": torch.cat([tensor[16:], tensor[:16]])}),
    }
    for index in (0, 15, 16, 99):
        changed = tensor.clone()
        changed[index] += 1
        found.add(digest({"a": changed}))
    assert len(found) == 7


def test_lanes_see_what_the_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device-side hash: any flipped bit, order within and across rows and pieces, and the length."""
    monkeypatch.setattr(base, "LANE_WORDS", 16)
    monkeypatch.setattr(base, "LANE_PIECE_ROWS", 2)
    base._lane_weights.cache_clear()
    data = torch.arange(75, dtype=torch.int32)  # five rows in three pieces, the last one short

    def of(tensor: Tensor, kind: str = "lanes") -> str:
        result = WeightDigest(kind)
        result.add("a", tensor)
        return result.hexdigest()

    changes = [data, data.roll(1), data.roll(16), data.roll(32), data[:-1], torch.cat([data, data.new_zeros(1)])]
    for bit in (0, 31, 32 * 40 + 7, 32 * 74 + 30):
        flipped = data.clone()
        flipped[bit // 32] ^= torch.tensor(1).bitwise_left_shift(torch.tensor(bit % 32)).int()
        changes.append(flipped)
    two = data.clone()  # the most significant bit of two words
    two[3] ^= -(2**31)
    two[7] ^= -(2**31)
    found = {of(change) for change in [*changes, two]}
    assert len(found) == len(changes) + 1 and of(data.clone()) in found
    assert of(data.view(torch.uint8)[1:]) == of(data.view(torch.uint8)[1:].clone()), "whatever its alignment"
    assert len({of(data, kind) for kind in base.DIGESTS}) == 3
    base._lane_weights.cache_clear()


def test_small_shared_memory_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr(disk.os, "access", lambda path, mode: True)
    assert disk.default_parent(1 << 20) == Path("/dev/shm")
    assert disk.default_parent(1 << 30) != Path("/dev/shm")


@pytest.fixture
def sync(tmp_path: Path) -> Iterator[DiskSync]:
    result = DiskSync(tmp_path)
    yield result
    result.close()


def read(sync: DiskSync) -> dict[str, Tensor]:
    """Read the weights as a worker does."""
    assert sync.info is not None
    directory = Path(sync.info["directory"])
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory.parent)} == {0o700}
    found: dict[str, Tensor] = {}
    for name in sync.info["files"]:
        found |= load_file(directory / name)
    return found


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_disk_holds_one_version_privately(sync: DiskSync, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(disk, "SHARD_BYTES", shard_bytes)
    for version in (3, 4):
        checksum = stage_weights(sync, version, WEIGHTS.items())
        received = read(sync)
        assert checksum == digest(WEIGHTS) == digest(received)
        assert all(torch.equal(received[name], tensor) for name, tensor in WEIGHTS.items())
        assert sync.info is not None and (sync.info["version"], sync.info["checksum"]) == (version, checksum)
        assert sorted(path.name for path in sync.root.iterdir()) == ["lock", f"v{version:06d}"], "the last one only"
    sync.close()
    assert not sync.root.exists()


def test_files_in_memory_are_written_again_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """New pages cost more than the copy. A version with other shapes, or fewer tensors, leaves no old data."""
    monkeypatch.setattr(disk, "SHARD_BYTES", 40)
    sync = DiskSync()
    try:
        nodes = []
        for version, scale in ((1, 1), (2, 3)):
            weights = {name: tensor * scale for name, tensor in WEIGHTS.items()}
            checksum = stage_weights(sync, version, weights.items())
            assert digest(read(sync)) == checksum == digest(weights)
            assert sync.info is not None
            nodes.append([(sync.root / f"v00000{version}" / name).stat().st_ino for name in sync.info["files"]])
            assert len(list((sync.root / f"v00000{version}").iterdir())) == len(sync.info["files"])
        assert nodes[0] == nodes[1]
        for version, weights in ((3, {"a": torch.ones(50)}), (4, {"b": torch.ones(2, dtype=torch.int8)})):
            assert stage_weights(sync, version, weights.items()) == digest(read(sync))
            assert len(list((sync.root / f"v00000{version}").iterdir())) == 1
    finally:
        sync.close()
    assert not sync.root.exists()


def test_a_shard_ends_where_a_tensor_would_not_be_aligned_or_named(sync: DiskSync) -> None:
    weights = {"odd": torch.ones(3, dtype=torch.int8), "even": torch.ones(2), "none": torch.ones(0)}
    weights |= {f"{'n' * 2000}{index}": torch.tensor(index) for index in range(200)}  # 400 KB of names
    checksum = stage_weights(sync, 1, weights.items())
    assert digest(read(sync)) == checksum == digest(weights)
    assert sync.info is not None and len(sync.info["files"]) == 3


@pytest.fixture(params=["disk", "ipc"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskSync | IpcSync]:
    result = DiskSync(tmp_path) if request.param == "disk" else IpcSync()
    yield result
    result.close()
    assert not result.root.exists()


def take(sync: DiskSync | IpcSync) -> dict[str, Tensor]:
    """What a worker loads, after its checks."""
    assert sync.info is not None
    info, clock = Update(**sync.info), base.Clock({})
    return read_verified(info, clock) if isinstance(sync, DiskSync) else read_shared(info, torch.device("cpu"), clock)


def test_sender_may_reuse_its_buffer(either: DiskSync | IpcSync) -> None:
    buffer = torch.zeros(2)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for value, name in enumerate("xyz"):
            yield name, buffer.fill_(value)

    stage_weights(either, 1, stream())
    assert [take(either)[name].tolist() for name in "xyz"] == [[0, 0], [1, 1], [2, 2]]


def test_failing_sender_leaves_nothing_staged(either: DiskSync | IpcSync) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        stage_weights(either, 1, stream())
    assert either.info is None and {path.name for path in either.root.iterdir()} <= {"lock", "socket"}
    stage_weights(either, 1, WEIGHTS.items())  # the same version again, after the failure
    assert digest(take(either)) == digest(WEIGHTS)


def test_leftovers_of_killed_runs_are_removed_those_of_living_ones_kept(tmp_path: Path) -> None:
    def killed_run() -> None:
        DiskSync(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed_run)
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    living = DiskSync(tmp_path)
    third = DiskSync(tmp_path)
    assert not left.exists() and living.root.exists() and third.root.exists()
    living.close()
    third.close()
    assert list(tmp_path.iterdir()) == []


# ---- broadcast -----------------------------------------------------------------------------------------------------


def receiver(body: dict[str, Any], buckets: list[list[dict[str, Any]]], rounds: int) -> dict[str, Tensor]:
    """A worker without vLLM: join the group and receive the buckets."""
    group = join_group(Rendezvous(**body), body["rank"])
    found: dict[str, Tensor] = {}
    for _ in range(rounds):
        for part in buckets:
            entries = [Entry(**entry) for entry in part]
            data = torch.empty(layout(entries)[1], dtype=torch.uint8)
            broadcast_data(group, data, body["timeout_s"])
            found |= tensors_of(data, entries)
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_broadcast_reaches_all_and_tells_when_somebody_is_missing(
    monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    """Two receivers take part in two rounds; in a third one of them is gone."""
    monkeypatch.setattr(broadcast, "BUCKET_BYTES", bucket_bytes)
    sync = BroadcastSync("gloo")
    checksum = stage_weights(sync, 5, WEIGHTS.items())
    assert sync.info is not None and (sync.info["version"], sync.info["checksum"]) == (5, checksum)
    first = [bucket.data_ptr() for bucket in sync._buckets.memory]
    assert stage_weights(sync, 5, WEIGHTS.items()) == checksum
    reused = [bucket.data_ptr() for bucket in sync._buckets.memory] == first
    assert reused or bucket_bytes == 1, "a version takes the memory of the one before"
    bodies = sync.connect(["http://127.0.0.1:80"] * 2, [1, 1], timeout_s=2.0)
    assert [(body["rank"], body["host"], body["world_size"]) for body in bodies] == [
        (1, "127.0.0.1", 3),
        (2, "127.0.0.1", 3),
    ]
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(receiver, body, sync.info["buckets"], 2) for body in bodies]
        sync.join()
        sync.feed()
        sync.feed()
        assert [digest(future.result()) for future in futures] == [checksum, checksum]
    with pytest.raises(OSError, match="weight broadcast"):
        sync.feed()
    sync.close()


def test_a_group_that_never_comes_together_ends_in_time() -> None:
    """NCCL connects within the first collective, and would wait there forever for a peer that is gone."""
    given_up, released = [], threading.Event()

    class Stuck:
        def broadcast(self, *_: Any) -> None:
            released.wait(20)

        def abort(self) -> None:
            given_up.append(True)

    begin = time.monotonic()
    with pytest.raises(OSError, match="not all servers took part within 0 s"):
        broadcast_data(Stuck(), torch.zeros(4), 0.2)
    assert time.monotonic() - begin < 5 and given_up == [True]
    released.set()


def test_buckets_keep_every_dtype_aligned() -> None:
    entries = [
        Entry("a", "bfloat16", [3]),
        Entry("b", "float32", [2, 2]),
        Entry("c", "int64", []),
        Entry("d", "int8", [0]),
    ]
    assert layout(entries) == ([0, 16, 32, 48], 48)


@pytest.mark.parametrize("nbytes", [8, 64, 1 << 20])
def test_an_upload_through_two_buffers_is_a_copy(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DIGEST_CHUNK_BYTES", 16)
    upload = receive.Upload(torch.device("cpu"), nbytes)
    for tensor in (*WEIGHTS.values(), torch.zeros(0), torch.arange(100.0), torch.arange(60.0).reshape(5, 12).t()):
        copy = upload(tensor)
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()
    first, second = upload(torch.ones(40)), upload(torch.zeros(40))
    assert first.eq(1).all() and second.eq(0).all(), "the buffers are used again"


def test_new_pages_of_a_file_are_taken_before_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first version, and where a later one is longer."""
    taken: list[int] = []
    real = base.take_pages
    monkeypatch.setattr(disk, "take_pages", lambda memory: (taken.append(len(memory)), real(memory)))
    sync = DiskSync()
    try:
        for version, sizes in enumerate([(4096, 8), (4096, 8), (8,), (4096, 8), (4096, 12)]):
            weights = {f"w{index}": torch.full((size,), version + 1.0) for index, size in enumerate(sizes)}
            assert stage_weights(sync, version, weights.items()) == digest(read(sync)) == digest(weights)
            taken.append(0)
    finally:
        sync.close()
    assert taken == [16384, 32, 0, 0, 0, 16384, 32, 0, 48, 0]


# ---- shared memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[IpcSync]:
    monkeypatch.setattr(ipc, "BUCKET_BYTES", 32)  # two buckets
    result = IpcSync()
    yield result
    result.close()


def update(sync: IpcSync, version: int = 1, **changed: Any) -> Update:
    checksum = stage_weights(sync, version, WEIGHTS.items())
    assert sync.info is not None and sync.info["checksum"] == checksum
    return Update(**(sync.info | changed))


def test_a_worker_maps_what_the_learner_staged(shared: IpcSync) -> None:
    assert stat.S_IMODE(shared.root.stat().st_mode) == 0o700
    for version in (1, 2):
        info = update(shared, version)
        found = read_shared(info, torch.device("cpu"), base.Clock({}))
        assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items()) and len(info.buckets) == 2
    memory = [bucket.view.data_ptr() for bucket in shared._buckets.memory]
    found["a"].zero_()
    again = read_shared(update(shared, 3), torch.device("cpu"), base.Clock({}))
    assert torch.equal(again["a"], WEIGHTS["a"]), "a worker cannot write into the learner's memory"
    assert memory == [bucket.view.data_ptr() for bucket in shared._buckets.memory], "memory is used again"
    held = info.tensors | {"a": "torch.float32 (2, 3) other"}
    assert read_shared(update(shared, 4), torch.device("cpu"), base.Clock({}), held).keys() == WEIGHTS.keys()
    assert read_shared(update(shared, 5), torch.device("cpu"), base.Clock({}), info.tensors) == {}


def test_shared_memory_that_is_not_as_announced_is_refused(shared: IpcSync) -> None:
    def refused(info: Update, match: str) -> None:
        with pytest.raises(ValueError, match=f"version 1 refused: .*{match}.*send the update again"):
            read_shared(info, torch.device("cpu"), base.Clock({}))

    info = update(shared)
    shared._buckets.memory[0].view[5] ^= 1
    refused(info, "a is not what was sent")
    info = update(shared)
    info.buckets[0][0]["shape"] = [3, 2]
    refused(info, "a is not what was sent")
    info = update(shared)
    info.buckets[0], info.buckets[1] = info.buckets[1], info.buckets[0]
    refused(info, "is not what was sent")
    info = update(shared)
    info.buckets[1][0]["shape"] = [1 << 40]
    refused(info, "cannot hold its")
    info = update(shared)
    info.buckets.pop()
    refused(info, "other tensors than announced")
    info = update(shared)
    info.tensors["a"] = info.tensors["b"]
    refused(info, "list of tensors is not the announced one")
    info = update(shared)
    stage_weights(shared, 2, WEIGHTS.items())
    refused(info, "the learner has version 2 to offer")
    shared.discard()
    refused(info, "the learner has nothing to offer")


def test_a_socket_of_another_user_or_place_is_refused(shared: IpcSync, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(info: Update, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            read_shared(info, torch.device("cpu"), base.Clock({}))

    info = update(shared)
    other = IpcSync()
    try:
        stage_weights(other, 1, {"a": torch.zeros(2, 3)}.items())
        refused(Update(**(vars(info) | {"socket": other.info["socket"]})), "has version 1 to offer")  # type: ignore[index]
    finally:
        other.close()
    refused(Update(**(vars(info) | {"socket": str(other.root / "socket")})), "No such file")
    shared.root.chmod(0o755)
    refused(info, "is not a private directory")
    shared.root.chmod(0o700)
    real = ipc.CREDENTIALS.unpack
    monkeypatch.setattr(ipc, "CREDENTIALS", SimpleNamespace(size=12, unpack=lambda data: (real(data)[0], 12345, 0)))
    refused(info, "belongs to user 12345|ended the connection|reset by peer")
    monkeypatch.undo()
    monkeypatch.setattr(ipc, "device_name", lambda device: f"GPU-{threading.current_thread().name}")
    refused(info, "needs the same GPU, set it to disk")


@pytest.mark.parametrize("sent", [b"", b"\x05\0\0\0ab", b"\xff\xff\xff\xff", b"\x02\0\0\0N.", b"\x01\0\0\0\x80"])
def test_nonsense_on_the_socket_gets_no_answer(shared: IpcSync, sent: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut off, too long, a pickle, a message without its fields; the next worker is served."""
    info = update(shared)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(info.socket)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert digest(read_shared(info, torch.device("cpu"), base.Clock({}))) == info.checksum
    assert "weights by ipc: a worker got no answer" in capfd.readouterr().err


@pytest.mark.slow
def test_another_process_tries_whether_memory_can_be_shared() -> None:
    assert ipc.problem() is None


def test_why_memory_cannot_be_shared_is_the_last_line_of_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\n  ...\nRuntimeError: not supported\n")
    monkeypatch.setattr(ipc.subprocess, "run", lambda *_, **__: failed)
    assert ipc.problem() == "RuntimeError: not supported"


def test_the_other_process_refuses_other_bytes(shared: IpcSync) -> None:
    checksum = stage_weights(shared, 0, {ipc.PROBE: torch.arange(64)}.items())
    ipc.main(str(shared.root / "socket"), checksum, "cpu")
    shared._buckets.memory[0].view[7] ^= 1
    with pytest.raises(SystemExit, match="holds other bytes"):
        ipc.main(str(shared.root / "socket"), checksum, "cpu")


# ---- authentication ------------------------------------------------------------------------------------------------


def status(
    headers: list[tuple[bytes, bytes]], *, kind: str = "http", method: str = "POST", path: str = "/pause"
) -> Any:
    """Status that RequireToken answers itself, or "passed" when the application behind it was called."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"status": "passed"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(RequireToken(app)(scope, None, send))  # type: ignore[arg-type]
    return sent[0].get("status", sent[0].get("code"))


def test_only_the_token_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    good = [(b"authorization", b"Bearer secret")]
    assert status(good) == "passed" and status(good, kind="websocket") == "passed"
    assert status([], kind="lifespan") == "passed"
    for path in ("/health", "/metrics"):
        assert status([], method="GET", path=path) == "passed" and status([], path=path) == 401
    for given in (b"", b"Bearer ", b"Bearer secre", b"Bearer secret2", b"bearer secret", b"secret", b"\xff"):
        for method in ("POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert status([(b"authorization", given)], method=method) == 401
    assert status([], kind="websocket") == 1008
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ValueError, match="VLLM_API_KEY is empty"):
        status(good)


# ---- process guard -------------------------------------------------------------------------------------------------

# A stand-in for vLLM: ignores SIGTERM, and has a grandchild in its own session that no process waits for.
FAMILY = "trap '' TERM; setsid sh -c 'trap \"\" TERM; sleep 60 & echo up; wait' & wait"


@pytest.fixture
def guarded() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    command = [sys.executable, process_guard.__file__, str(os.getpid()), "sh", "-c", FAMILY]
    environment = os.environ | {"GUARD_GRACE_S": "0.2"}
    guard = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert guard.stdout is not None and guard.stdout.readline() == "up\n"
    processes = psutil.Process(guard.pid).children(recursive=True)
    assert len(processes) >= 3
    yield guard, processes
    guard.stdout.close()
    for process in processes:
        if process.is_running():
            process.kill()


def test_guard_ends_only_when_all_descendants_have(guarded: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    guard, processes = guarded
    guard.terminate()
    guard.wait(10)
    assert not any(process.is_running() for process in processes), "not even as zombies"


def test_guard_cleans_up_when_the_command_is_killed(
    guarded: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    guard, processes = guarded
    processes[0].kill()
    guard.wait(10)
    assert not any(process.is_running() for process in processes)


def test_guard_notices_that_its_parent_was_killed() -> None:
    code = (
        "import os, subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, {process_guard.__file__!r}, str(os.getpid()), 'sleep', '60']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guard = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 10
    while not (family := guard.children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert family
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([guard, *family], timeout=10)
    assert not alive


# ---- reading by a worker -------------------------------------------------------------------------------------------


def update_of(sync: DiskSync, version: int, weights: dict[str, Tensor]) -> Update:
    stage_weights(sync, version, weights.items())
    assert sync.info is not None
    return Update(**sync.info)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the tensors that this process has hashed as a receiver."""
    monkeypatch.setattr(node, "MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(disk, "SHARD_BYTES", 32)  # two files
    names: list[str] = []

    class Watched(WeightDigest):
        def add(self, name: str, tensor: Tensor) -> None:
            names.append(name)
            super().add(name, tensor)

    monkeypatch.setattr(receive, "WeightDigest", Watched)
    return names


def test_processes_of_a_node_check_a_file_once(sync: DiskSync, hashed: list[str], tmp_path: Path) -> None:
    info = update_of(sync, 1, WEIGHTS)
    assert len(info.files) == 2
    for _ in range(3):
        found = read_verified(info, base.Clock({}))
        assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
    assert sorted(hashed) == sorted(WEIGHTS), "the second and third found the stamps"
    read_verified(update_of(sync, 2, WEIGHTS), base.Clock({}))
    assert len(hashed) == 2 * len(WEIGHTS), "the same bytes as another version are checked again"
    directory = node.stamp_directory(Path(info.directory))
    assert directory is not None and stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)  # another user's, or accessible to others: its stamps are ignored
    read_verified(Update(**sync.info), base.Clock({}))  # type: ignore[arg-type]
    assert len(hashed) == 3 * len(WEIGHTS)


def test_a_stamp_holds_for_a_short_time(sync: DiskSync, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    info = update_of(sync, 1, WEIGHTS)
    read_verified(info, base.Clock({}))
    monkeypatch.setattr(node, "VALID_S", 0.0)
    read_verified(info, base.Clock({}))
    assert len(hashed) == 2 * len(WEIGHTS)


def test_damage_is_refused_by_every_process(sync: DiskSync, hashed: list[str]) -> None:
    info = update_of(sync, 1, WEIGHTS)
    path = Path(info.directory) / info.files[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="is not what was sent"):
            read_verified(info, base.Clock({}))
    info.tensors["a"] = info.tensors["a"][:-1] + "0"
    with pytest.raises(ValueError, match="list of tensors is not the announced one"):
        read_verified(info, base.Clock({}))


def test_a_process_waits_for_the_one_that_checks(sync: DiskSync, hashed: list[str]) -> None:
    """It checks the file itself when that process is killed or fails."""
    info = update_of(sync, 1, WEIGHTS)
    checks = node.Checks(Path(info.directory), "1-x")
    inside, go_on = threading.Event(), threading.Event()
    seen: list[tuple[str, str]] = []

    def slow(file: str) -> None:
        seen.append(("slow", file))
        inside.set()
        assert go_on.wait(10)
        raise ValueError("damaged")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(checks.run, info.files[:1], slow)
        assert inside.wait(10)
        second = threads.submit(checks.run, info.files, lambda file: seen.append(("second", file)))
        while ("second", info.files[1]) not in seen:
            time.sleep(0.01)
        assert ("second", info.files[0]) not in seen, "left for last"
        go_on.set()
        with pytest.raises(ValueError, match="damaged"):
            first.result()
        second.result()
    assert ("second", info.files[0]) in seen


def test_only_layers_that_changed_are_loaded(sync: DiskSync, hashed: list[str]) -> None:
    weights = {f"model.layers.{k}.mlp.{p}.weight": torch.full((2,), 10.0 * k) for k in range(3) for p in ("up", "down")}
    weights |= {"model.embed_tokens.weight": torch.ones(3), "lm_head.weight": torch.ones(3)}
    first = update_of(sync, 1, weights)
    assert read_verified(first, base.Clock({})).keys() == weights.keys(), "nothing is held yet"
    weights["model.layers.1.mlp.up.weight"] = torch.zeros(2)
    second = update_of(sync, 2, weights)
    found = read_verified(second, base.Clock({}), first.tensors)
    assert found.keys() == {"model.layers.1.mlp.up.weight", "model.layers.1.mlp.down.weight"}
    assert read_verified(second, base.Clock({}), second.tensors) == {}
    assert receive.shape_of(first.tensors["lm_head.weight"]) == (3,)
    assert receive.shape_of(update_of(sync, 3, WEIGHTS).tensors["c"]) == ()
