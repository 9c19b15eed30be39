"""Arguments and environment of a vLLM server."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from stand_in import MIXTURE

from configs.schema import RolloutConfig
from recipes.rollout.routing import Experts, experts_of
from recipes.rollout.vllm.server import (
    Place,
    gpu_environment,
    kv_cache_need,
    parallel_size,
    server_command,
    server_environment,
    server_gpus,
)

SHAPE = '{"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}'


def test_command_and_environment(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(SHAPE)
    options = (RolloutConfig(max_model_len=32, max_num_seqs=8), Place(model_dir, model_dir))
    command = " ".join(server_command(*options, 4711))
    assert "--host 127.0.0.1 --port 4711" in command and "--no-enable-chunked-prefill" in command
    assert "--host 10.1.2.3 --port 4711" in " ".join(server_command(*options, 4711, "10.1.2.3"))
    for everywhere in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="every network"):
            server_command(*options, 4711, everywhere)
    base = {"RANK": "3", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "OMP_NUM_THREADS": "9"}
    environment = server_environment(base, 0, "secret")
    assert "secret" not in command and environment["VLLM_API_KEY"] == "secret"
    assert environment["HOME"] == "/h" and environment["OMP_NUM_THREADS"] == "1"
    assert not environment.keys() & {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}


def test_kv_cache_holds_all_sequences(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(SHAPE)
    # keys and values, 4 layers, 1 head of 32, 4 bytes: 1024 bytes per token; 1000 tokens x 256 sequences
    for length, sequences, expected in ((1000, 256, 1024 * 1000 * 256), (1000, 1, 64 << 20), (100000, 256, 1 << 30)):
        assert kv_cache_need(RolloutConfig(max_model_len=length, max_num_seqs=sequences), model_dir) == expected


def test_servers_get_the_gpus_that_are_theirs(model_dir: Path) -> None:
    visible = ["0", "1", "2", "3"]
    assert server_gpus(visible, 2, colocated=False) == ["2", "3"]
    assert server_gpus(visible, 2, colocated=True) == ["0", "1"]
    assert server_gpus(visible, 4, colocated=False) == visible, "side by side when none is left"
    rollout = RolloutConfig(colocated=True, gpu_memory_utilization=0.8)
    place = Place(model_dir, model_dir, "cuda", ["2", "5"])
    assert [gpu_environment(rollout, place, index)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["2", "5", "2"]
    command = " ".join(server_command(rollout, place, 4711))
    assert "--gpu-memory-utilization 0.8" in command and "--enable-sleep-mode" in command
    assert "--tensor-parallel-size" not in command
    (model_dir / "config.json").write_text(SHAPE)
    on_cpu = Place(model_dir, model_dir)
    assert gpu_environment(rollout, on_cpu, 1) == {}
    command = " ".join(server_command(rollout, on_cpu, 1))
    assert "--gpu-memory" not in command and "--enable-sleep" not in command


def test_a_server_of_several_gpus(model_dir: Path) -> None:
    place = Place(model_dir, model_dir, "cuda", [str(number) for number in range(4, 8)])
    rollout = RolloutConfig(server_gpus=2)
    assert [gpu_environment(rollout, place, index)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == [
        *("4,5", "6,7", "4,5"),
    ]
    assert "--tensor-parallel-size 2" in " ".join(server_command(rollout, place, 1))
    rollout.quantization = "fp8"
    assert "--quantization fp8" in " ".join(server_command(rollout, place, 1))
    rollout.extra_args = ["--data-parallel-size=2", "--enable-expert-parallel"]
    command = server_command(rollout, place, 1)
    assert command[-2:] == rollout.extra_args and "--tensor-parallel-size" not in command
    assert parallel_size(["-tp", "2", "--seed", "3", "--data-parallel-size=4"]) == 8 and parallel_size([]) == 1


def test_servers_of_a_mixture_return_experts_where_vllm_can(model_dir: Path) -> None:
    """On a GPU, unless arguments exclude it; a request that cannot be met is refused."""
    flag, on_gpu, on_cpu = (
        "--enable-return-routed-experts",
        Place(model_dir, model_dir, "cuda"),
        Place(model_dir, model_dir),
    )
    (model_dir / "config.json").write_text(SHAPE)
    assert flag not in server_command(RolloutConfig(), on_gpu, 1)
    with pytest.raises(ValueError, match="routing_replay=true, but the model is dense"):
        server_command(RolloutConfig(routing_replay=True), on_gpu, 1)
    (model_dir / "config.json").write_text(json.dumps(MIXTURE))
    assert flag in server_command(RolloutConfig(), on_gpu, 1)
    assert flag not in server_command(RolloutConfig(routing_replay=False), on_gpu, 1)
    pipeline = ["--pipeline-parallel-size=2"]
    for rollout, place, why in (
        (RolloutConfig(extra_args=pipeline, server_gpus=2), on_gpu, "extra_args: --pipeline-parallel-size spreads"),
        (RolloutConfig(), on_cpu, "beside a GPU alone"),
    ):
        assert flag not in server_command(rollout, place, 1)
        rollout.routing_replay = True
        with pytest.raises(ValueError, match=why):
            server_command(rollout, place, 1)


def test_experts_of_an_answer_are_those_of_its_layers_and_tokens(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps(MIXTURE | {"mlp_only_layers": [1]}))
    experts = experts_of(model_dir)
    assert experts == Experts(sparse=(0, 2, 3), layers=4, count=8, top_k=2)
    array = np.random.default_rng(0).integers(0, 8, (5, 4, 2)).astype(np.uint16)

    def text(values: np.ndarray) -> str:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=values.dtype == object)
        return base64.b64encode(buffer.getvalue()).decode()

    decoded = experts.decode(text(array), 5)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, array[:, [0, 2, 3]])
    for bad in (array[:4], array[:, :3], array + 8, array.astype(object), array / 2):
        with pytest.raises(ValueError):
            experts.decode(text(bad), 5)
    with pytest.raises(ValueError):
        experts.decode("no base64!", 5)


def test_servers_whose_responses_do_not_depend_on_their_batch(model_dir: Path) -> None:
    rollout = RolloutConfig(batch_invariant=True)
    assert server_environment({}, 0, "secret", batch_invariant=True)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in server_environment({}, 0, "secret")
    (model_dir / "config.json").write_text(SHAPE)
    server_command(rollout, Place(model_dir, model_dir, "cuda"), 1)
    with pytest.raises(ValueError, match="batch_invariant=true switches kernels of vLLM that only GPUs have"):
        server_command(rollout, Place(model_dir, model_dir), 1)
