"""Choice of the transport for weights, and the reason that a dry run prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.cluster.transport import choose, main


def test_files_until_the_readers_are_too_many() -> None:
    assert choose(15.2, 1, one_node=True, gpus=True)[0] == "disk"
    name, why = choose(15.2, 4, one_node=False, gpus=True)
    assert name == "disk" and "15.2 GB to 4 nodes take about 2.1 s by files" in why and "0.3 s by broadcast" in why
    assert choose(65.5, 64, one_node=False, gpus=True)[0] == "nccl"
    assert choose(65.5, 64, one_node=False, gpus=False)[0] == "gloo"
    found = [choose(15.2, nodes, one_node=False, gpus=True)[0] for nodes in range(1, 200)]
    assert found == sorted(found), "disk below a number of nodes, nccl above"


@pytest.mark.parametrize(
    ("words", "nodes", "shown"),
    [
        ((), 1, "# weights by disk: learner and servers share one node"),
        ((), 64, "# weights by nccl: 46.6 GB to 64 nodes"),
        (("rollout.weight_sync=gloo",), 64, "# weights by gloo: as rollout.weight_sync says"),
        (("rollout.weight_sync=ipc",), 1, "# weights: rollout.weight_sync=ipc shares a GPU's memory"),
        (("rollout.engine=local",), 64, "# weights by disk: no servers"),
    ],
)
def test_a_dry_run_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    nodes: int,
    shown: str,
) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 13, "vocab_size": 32000}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | heads))
    monkeypatch.setenv("SERVER_NODES", str(nodes))
    monkeypatch.setenv("ROLLOUT_NODES", "0" if nodes == 1 else str(nodes))
    assert main([f"model.path={tmp_path}", "rollout.engine=vllm", *words]) == 0
    assert capsys.readouterr().out.startswith(shown)
