"""Restrictions of a reward worker before it reads untrusted text. Linux; parts that a kernel lacks are skipped.

Resource limits hold everywhere. Landlock (Linux 5.13+, no privileges needed) takes away writing, creating, renaming
and deleting files and starting programs; from ABI 4 on TCP, from ABI 6 on signals to other processes. Reading files
and UDP stay possible.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys

# linux/landlock.h, linux/prctl.h; Landlock's system call numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_PR_SET_NO_NEW_PRIVS = 38
_FS_READS = (1 << 2) | (1 << 3)  # READ_FILE, READ_DIR
_FS_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # each ABI adds a right; later: no writes
_NET_BIND_AND_CONNECT_TCP = 0b11
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


class _RulesetAttributes(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


def limit_resources(memory_mb: int) -> None:
    """Address space of ``memory_mb`` MiB, no growing of files, no core dumps, few descriptors."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def forbid_processes() -> None:
    """No new processes or threads. Root is exempt."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def limit_cpu(seconds: float) -> None:
    """Let the kernel kill this process (SIGXCPU) after ``seconds`` more of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def forbid_writes_and_network() -> bool:
    """Enter an empty Landlock domain, irreversibly. False if the kernel has no Landlock."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 1:
        return False
    attributes = _RulesetAttributes(
        fs=_FS_RIGHTS_BY_ABI[min(abi, 3)] & ~_FS_READS,
        net=_NET_BIND_AND_CONNECT_TCP if abi >= 4 else 0,
        scoped=_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0,
    )
    size = ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24)  # older kernels know a shorter structure
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    if ruleset < 0:
        return False
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restricted = libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted
