"""The experts that an engine chose for each token, for routing replay (`megatron_ext.learner.routing`).

vLLM returns them if it was started with ``--enable-return-routed-experts``, as base64 of a NumPy file of shape
(tokens read, layers, top k), uint8 or uint16. This works only on a GPU (its second model runner needs Triton), without
pipeline or context parallelism, and with its prefix cache (vllm/config/vllm.py,
``_verify_aux_output_compatibility``).
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import conversion
from configs.schema import RolloutConfig

FLAG = "--enable-return-routed-experts"
# vLLM's options with which it does not return experts, and their effect.
UNFIT = {
    "--pipeline-parallel-size": "spreads layers over GPUs",
    "-pp": "spreads layers over GPUs",
    "--decode-context-parallel-size": "spreads a sequence over GPUs",
    "-dcp": "spreads a sequence over GPUs",
    "--no-enable-prefix-caching": "switches the prefix cache off, which holds them",
}


@dataclass(frozen=True)
class Experts:
    """Shape of the routing of a mixture of experts."""

    sparse: tuple[int, ...]  # layers with experts
    layers: int  # all layers
    count: int
    top_k: int

    @property
    def dtype(self) -> type[np.uint8] | type[np.int16]:
        return np.uint8 if self.count <= 256 else np.int16

    def decode(self, text: str, tokens: int) -> np.ndarray:
        """(tokens, layers with experts, top k) from vLLM's answer. ValueError for anything else."""
        array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
        expected = (tokens, self.layers, self.top_k)
        if array.dtype.kind not in "iu" or array.shape != expected:
            raise ValueError(f"routed experts {array.dtype} {array.shape}, expected integers {expected}")
        chosen = array[:, list(self.sparse)]
        if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.count:
            raise ValueError(f"routed experts up to {int(chosen.max())} of {self.count}")
        return chosen.astype(self.dtype)


def experts_of(model_dir: Path) -> Experts | None:
    """None for a dense model."""
    raw = json.loads((model_dir / "config.json").read_text())
    if not raw.keys() & {"num_experts", "num_local_experts", "n_routed_experts"}:
        return None
    hf = conversion.read_config(model_dir)
    if hf.experts is None:
        return None
    sparse = tuple(filter(hf.sparse, range(hf.num_layers)))
    return Experts(sparse, hf.num_layers, hf.experts.count, hf.experts.top_k)


def unfit(rollout: RolloutConfig) -> str:
    """Why servers with these arguments cannot return experts; empty when they can, as far as the arguments say."""
    words = [word.split("=", 1)[0] for word in rollout.extra_args]
    return next((f"{word} {UNFIT[word]}" for word in words if word in UNFIT), "")


def server_returns(rollout: RolloutConfig, model_dir: Path, device: str) -> bool:
    """Whether a vLLM server is to be started so that it returns experts.

    Raises ValueError when ``rollout.routing_replay=true`` asks for what it cannot give.
    """
    if rollout.routing_replay is False:
        return False
    reason = ""
    if experts_of(model_dir) is None:
        reason = "the model is dense"
    elif device != "cuda":
        reason = "vLLM returns experts beside a GPU alone (rollout.engine=local returns them on a CPU)"
    elif why := unfit(rollout):
        reason = f"rollout.extra_args: {why}"
    if reason and rollout.routing_replay:
        raise ValueError(f"rollout.routing_replay=true, but {reason}: set rollout.routing_replay=null")
    return not reason
