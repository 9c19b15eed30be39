"""A real Slurm with several nodes on one Debian machine: `python tests/e2e/slurm/cluster.py up 3`, needs root.

    up [NODES] [GPUS]    start; prints the `export SLURM_CONF=...` that sbatch and squeue need
    down                 stop everything
    crash NODE           power loss: every process of the node is killed at once; slurmctld is informed
    start NODE           bring a crashed node back
    exec NODE CMD...     run a command on a node, outside any job

Each node is a set of namespaces with its own host name, address, ports, processes, mounts and /dev/shm, so that what
differs between nodes of a cluster differs here; other files are shared, like a network file system. slurmctld, slurmd
and munged are Debian's (`apt-get install slurmctld slurmd slurm-client munge iproute2`). The only change to the host is
one network interface, and all state is in one directory. Several clusters can run at once, each in a directory of its
own: interface, subnet, port of slurmctld and job numbers follow from a number that no other cluster holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "scontrol", "munged", "ip", "unshare", "nsenter")
NETWORKS = 250  # clusters that one machine can hold: 10.217.1.0/24 to 10.217.250.0/24
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
CONF = """\
ClusterName=test
SlurmctldHost={host}({subnet}.1)
SlurmctldPort={port}
# Other clusters of this machine number their jobs differently: a process tells by its job whose it is.
FirstJobId={first_job}
SlurmdPort=6918
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired, 120 s by default.
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/ctld
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/ctld/pid
SlurmdPidFile={dir}/spool/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1000
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
# Short, so that tests see failures in seconds; a busy machine must still answer within SlurmdTimeout.
SlurmdTimeout=20
MessageTimeout=10
BatchStartTimeout=10
KillWait=3
CompleteWait=0
MinJobAge=86400
"""


def obstacle() -> str | None:
    """Return the reason why no cluster can run here, or None. Installs nothing."""
    if os.geteuid():
        return "needs root for network namespaces: sudo .venv/bin/python -m pytest tests/e2e/slurm"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not found: apt-get install {PACKAGES}"
    probe = "ip link add gppo-probe0 type veth peer name gppo-probe1 && mount -t tmpfs none /mnt"
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "sh", "-c", probe], capture_output=True).returncode:
        return "this container may not create network namespaces (docker run --privileged)"
    return None


def install() -> None:
    """On Debian as root, install missing packages. :func:`obstacle` reports a failure."""
    if os.geteuid() or shutil.which("apt-get") is None or all(map(shutil.which, PROGRAMS)):
        return
    command = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {PACKAGES}"
    # RUNLEVEL: the packages must not start services of their own.
    quiet = os.environ | {"RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, env=quiet, timeout=180)


def until(what: str, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for a condition. Raises TimeoutError naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(0.05)


def command_line(process: psutil.Process) -> str:
    """Return a process's command line; empty if it has ended between listing and reading."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _port(network: int) -> int:
    return 16000 + network


class Cluster:
    """The cluster whose state is in ``directory``; several objects, in several processes, can control it."""

    def __init__(self, directory: Path = Path("/tmp/gppo-slurm")) -> None:
        self.dir, self.conf = directory, directory / "etc" / "slurm.conf"
        self.env = os.environ | {"SLURM_CONF": str(self.conf)}

    # --- start and stop ---------------------------------------------------------------------------------------

    def up(self, nodes: int = 3, gpus: int = 0) -> None:
        """Start with ``nodes`` nodes called node1, node2, ... of 64 CPUs, and ``gpus`` device files in each."""
        if (reason := obstacle()) is not None:
            raise RuntimeError(reason)
        self.down()
        for name in ("etc", "munge", "ctld", "spool", "log", "run", "dev"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        self._claim_network()
        for path in (self.dir, self.dir / "munge"):
            path.chmod(0o755)
        (self.dir / "munge" / "key").write_bytes(os.urandom(1024))
        (self.dir / "munge" / "key").chmod(0o400)
        self._configure(nodes, gpus)
        try:
            self._start(nodes)
        except BaseException:
            self.down()
            raise

    @property
    def network(self) -> int:
        """This cluster's number on this machine."""
        return int((self.dir / "etc" / "network").read_text())

    @property
    def subnet(self) -> str:
        return f"10.217.{self.network}"

    @property
    def link(self) -> str:
        return f"gppo-slurm{self.network}"

    def _claim_network(self) -> None:
        """Reserve a number that no other cluster has: the kernel refuses a second interface of the same name."""
        first = os.getpid() % NETWORKS
        for number in (1 + (first + i) % NETWORKS for i in range(NETWORKS)):
            names = f"gppo-slurm{number}", "type", "veth", "peer", "name", f"gppo-uplink{number}"
            if (
                not _free(_port(number))
                or subprocess.run(["ip", "link", "add", *names], capture_output=True).returncode
            ):
                continue
            (self.dir / "etc" / "network").write_text(str(number))
            return
        raise RuntimeError(f"no free interface among gppo-slurm1 to gppo-slurm{NETWORKS}: ip link")

    def _configure(self, nodes: int, gpus: int) -> None:
        host, subnet = socket.gethostname().split(".")[0], self.subnet
        lines = [
            CONF.format(
                host=host, subnet=subnet, dir=self.dir, port=_port(self.network), first_job=10_000 * self.network + 1
            )
        ]
        hosts = ["127.0.0.1 localhost"]
        for i in range(1, nodes + 1):
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            address = f"NodeName=node{i} NodeAddr={subnet}.{10 + i}"
            lines.append(f"{address} SocketsPerBoard=1 CoresPerSocket=64 RealMemory=64000{gres}")
            hosts.append(f"{subnet}.{10 + i} node{i}")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP")
        self.conf.write_text("\n".join(lines) + "\n")
        for i in range(gpus):  # slurmd needs device files, but does not use them
            subprocess.run(["mknod", str(self.dir / "dev" / f"gpu{i}"), "c", "1", "3"], check=True)
        gres_file = f"Name=gpu File={self.dir}/dev/gpu[0-{gpus - 1}]\n" if gpus else ""
        (self.dir / "etc" / "gres.conf").write_text(gres_file)
        (self.dir / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused; detecting v2 can be fatal
        (self.dir / "etc" / "hosts").write_text("\n".join(hosts) + "\n")

    def _start(self, nodes: int) -> None:
        socket_file = self.dir / "munge" / "socket"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        words = [f"--{option}={self.dir / 'munge' / name}" for option, name in files.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *words)
        switch = self._spawn("switch", "unshare", "--net", "sleep", "infinity")
        until("the switch's namespace", lambda: _own_network(switch))
        _run("ip", "link", "set", f"gppo-uplink{self.network}", "netns", str(switch), "name", "uplink")
        _run("ip", "addr", "add", f"{self.subnet}.1/24", "dev", self.link)
        _run("ip", "link", "set", self.link, "up")
        setup = "ip link add br0 type bridge && ip link set br0 up && ip link set uplink master br0 up"
        _run("nsenter", "-t", str(switch), "--net", "sh", "-c", setup)
        until("munged's socket", socket_file.exists)
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        until("slurmctld", lambda: "is UP" in self.ask("scontrol", "ping"))
        for i in range(1, nodes + 1):
            self._boot(f"node{i}")
        until("all nodes idle", lambda: self.ask("sinfo", "-h", "-o", "%t %D") == f"idle {nodes}", 60)

    def start(self, node: str) -> None:
        """Boot a node and wait until it can take jobs."""
        self._boot(node)
        until(f"{node} idle", lambda: self.ask("sinfo", "-h", "-n", node, "-o", "%t") in ("idle", "mix", "alloc"), 40)

    def _boot(self, node: str) -> None:
        number, switch = int(node.removeprefix("node")), self._pid("switch")
        ready, shared = self.dir / "run" / f"{node}.net", self.dir / "etc"
        ready.unlink(missing_ok=True)
        boot = (
            f"hostname {node}; mount -t tmpfs -o mode=1777 none /dev/shm; mount --bind {shared}/hosts /etc/hosts; "
            f"mkdir -p /etc/slurm; mount --bind {shared} /etc/slurm; until [ -e {ready} ]; do sleep 0.02; done; "
            f"slurmd -D -f {self.conf} -N {node} & while :; do sleep 3600 & wait $!; done"
        )
        pid = self._spawn(node, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", boot)
        until(f"the namespace of {node}", lambda: _own_network(pid))
        port = f"port{number}"
        plug = f"ip link add {port} type veth peer name eth0 netns {pid} && ip link set {port} master br0 up"
        _run("nsenter", "-t", str(switch), "--net", "sh", "-c", f"ip link del {port} 2>/dev/null; {plug}")
        address = f"ip link set lo up && ip addr add {self.subnet}.{10 + number}/24 dev eth0 && ip link set eth0 up"
        # The route leads nowhere; programs use it to find their own address.
        _run("nsenter", "-t", str(pid), "--net", "sh", "-c", f"{address} && ip route add default dev eth0")
        ready.touch()

    def crash(self, node: str) -> None:
        self._stop(node)
        _run("scontrol", "update", f"nodename={node}", "state=down", "reason=crash", env=self.env)

    def down(self) -> None:
        """Stop every process and drop the state. Logs stay until the next start."""
        run = self.dir / "run"
        names = [path.stem for path in run.glob("*.pid")] if run.is_dir() else []
        for name in sorted(names, key=lambda name: not name.startswith("node")):  # a node's jobs end with it
            self._stop(name)
        if (self.dir / "etc" / "network").exists():
            subprocess.run(["ip", "link", "del", self.link], capture_output=True)
        for name in ("etc", "munge", "ctld", "spool", "run", "dev"):
            shutil.rmtree(self.dir / name, ignore_errors=True)

    # --- use --------------------------------------------------------------------------------------------------

    def inside(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        pid = self._pid(node)
        child = psutil.Process(pid).children()[0].pid  # `unshare` itself stays outside the process namespace
        words = ["nsenter", "-t", str(child), *NAMESPACES, "--", *command]
        return subprocess.run(words, capture_output=True, text=True, env=self.env)

    def processes(self, node: str) -> list[str]:
        """Command lines of the processes on a node that belong to jobs."""
        root = psutil.Process(self._pid(node)).children()[0]
        own = {"slurmd", "sleep", "bash", "unshare"}
        lines = []
        for process in root.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the listing and the reading
                if process.status() == psutil.STATUS_ZOMBIE or (process.parent() == root and process.name() in own):
                    continue
                lines.append(command_line(process) or process.name())
        return lines

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=30).stdout.strip()

    # --- processes, by recorded pid and start time only -----------------------------------------------------------

    def _spawn(self, name: str, *command: str) -> int:
        with (self.dir / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        created = psutil.Process(process.pid).create_time()
        (self.dir / "run" / f"{name}.pid").write_text(f"{process.pid} {created}")
        return process.pid

    def _pid(self, name: str) -> int:
        return int((self.dir / "run" / f"{name}.pid").read_text().split()[0])

    def _stop(self, name: str) -> None:
        record = self.dir / "run" / f"{name}.pid"
        pid, created = record.read_text().split()
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                process.kill()
                process.wait(10)
        except psutil.NoSuchProcess:
            pass
        record.unlink()


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env=env)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _own_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def main(argv: list[str]) -> int:
    cluster = Cluster()
    match argv:
        case ["up", *numbers]:
            install()
            cluster.up(*map(int, numbers))
            print(f"export SLURM_CONF={cluster.conf}")
        case ["down"]:
            cluster.down()
        case ["crash", node]:
            cluster.crash(node)
        case ["start", node]:
            cluster.start(node)
        case ["exec", node, *command]:
            done = cluster.inside(node, *command)
            print(done.stdout, end="")
            print(done.stderr, end="", file=sys.stderr)
            return done.returncode
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
