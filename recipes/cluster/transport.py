"""How weights reach the servers of a job, by size and topology: ``rollout.weight_sync=auto``.

`python -m recipes.cluster.transport KEY=VALUE ...` says what a job would use, and why. Reads $SERVER_NODES (nodes with
servers) and $ROLLOUT_NODES (0: servers share the learner's nodes).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import conversion
from configs.schema import Config
from recipes.checks.cli import print_help, wants_help
from recipes.models.locate import model_location
from recipes.planning.memory import parameter_count

WRITE_GB_S, READ_GB_S, NETWORK_GB_S = 10.0, 100.0, 50.0  # assumed: a job's writes, all readers together, one node
MOST_S = 10.0  # files that take no longer than this are preferred
HELP = """usage: python -m recipes.cluster.transport key=value ...

Say how weights would reach the servers of a job, and why. The words are those of the training command. Two variables
tell the topology:
  SERVER_NODES   nodes whose servers read the weights (default: 1)
  ROLLOUT_NODES  nodes with servers only; 0: servers share the learner's nodes (default: 0)

Example: SERVER_NODES=16 ROLLOUT_NODES=16 python -m recipes.cluster.transport model.path=DIR rollout.weight_sync=auto
"""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}


def choose(gigabytes: float, server_nodes: int, *, one_node: bool, gpus: bool) -> tuple[str, str]:
    """The transport and the reason for it.

    Files are preferred while they are fast enough: a worker checks them before it touches its weights, and a server
    that comes back reads them at any time. Their time grows with the nodes that read, that of a broadcast does not.

    Args:
        gigabytes: of one version of the weights, in the servers' dtype.
        server_nodes: nodes whose servers read them.
        one_node: learner and servers share one node.
        gpus: on both sides.
    """
    if one_node:
        return "disk", "learner and servers share one node: files in its memory, read and checked once"
    files_s = gigabytes / WRITE_GB_S + gigabytes * server_nodes / READ_GB_S
    broadcast_s = gigabytes / NETWORK_GB_S
    why = (
        f"{gigabytes:.1f} GB to {server_nodes} nodes take about {files_s:.1f} s by files, assuming {WRITE_GB_S:g} GB/s "
        f"for writing and {READ_GB_S:g} GB/s for all readers, and {broadcast_s:.1f} s by broadcast, assuming "
        f"{NETWORK_GB_S:g} GB/s"
    )
    if files_s <= MOST_S:
        return "disk", f"{why}; files up to {MOST_S:g} s"
    return ("nccl", why) if gpus else ("gloo", f"{why}; no GPUs, so over TCP")


def transport(config: Config) -> tuple[str, str]:
    """What ``rollout.weight_sync`` of a job is, with "auto" decided."""
    rollout = config.rollout
    if rollout.weight_sync == "ipc" and not rollout.colocated:
        raise ValueError(
            "rollout.weight_sync=ipc shares a GPU's memory with servers that the run itself starts, and the servers of "
            "a job are started beside it: set it to auto"
        )
    if rollout.weight_sync != "auto":
        return rollout.weight_sync, "as rollout.weight_sync says"
    if rollout.engine == "local" or rollout.replay is not None:
        return "disk", "no servers"
    hf = conversion.read_config(model_location(config))
    nodes = int(os.environ.get("SERVER_NODES", "1"))
    one_node = nodes <= 1 and int(os.environ.get("ROLLOUT_NODES", "0")) == 0
    gigabytes = parameter_count(hf) * DTYPE_BYTES[rollout.dtype] / 1e9
    return choose(gigabytes, nodes, one_node=one_node, gpus=os.environ.get("GPUS_PER_NODE", "8") != "0")


def main(argv: Sequence[str] | None = None) -> int:
    from recipes.checks.settings import load_checked

    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        return print_help(words, HELP)
    try:
        name, why = transport(load_checked(words))
    except (ValueError, OSError) as error:
        print(f"# weights: {error}")
        return 0
    print(f"# weights by {name}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
