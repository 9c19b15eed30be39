"""What a vLLM server is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.rollout.vllm.server import (
    ServerOptions,
    gpu_environment,
    kv_cache_need,
    server_command,
    server_environment,
    server_gpus,
)


def test_command_and_environment(model_dir: Path) -> None:
    options = ServerOptions(model_dir, 32, 8, "float32", kv_cache_bytes=1 << 26)
    command = " ".join(server_command(options, 4711))
    assert "--host 127.0.0.1 --port 4711" in command and "--no-enable-chunked-prefill" in command
    assert "--host 10.1.2.3 --port 4711" in " ".join(server_command(options, 4711, "10.1.2.3"))
    for everywhere in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="every network"):
            server_command(options, 4711, everywhere)
    base = {"RANK": "3", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "OMP_NUM_THREADS": "9"}
    environment = server_environment(base, 0, "secret")
    assert "secret" not in command and environment["VLLM_API_KEY"] == "secret"
    assert environment["HOME"] == "/h" and environment["OMP_NUM_THREADS"] == "1"
    assert not environment.keys() & {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}


def test_kv_cache_holds_all_sequences(model_dir: Path) -> None:
    config = '{"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}'
    (model_dir / "config.json").write_text(config)
    # keys and values, 4 layers, 1 head of 32, 4 bytes: 1024 bytes per token; 1000 tokens x 256 sequences
    assert kv_cache_need(ServerOptions(model_dir, 1000, 256, "float32")) == 1024 * 1000 * 256
    assert kv_cache_need(ServerOptions(model_dir, 1000, 1, "float32")) == 64 << 20
    assert kv_cache_need(ServerOptions(model_dir, 100000, 256, "float32")) == 1 << 30


def test_servers_get_the_gpus_that_are_theirs(model_dir: Path) -> None:
    visible = ["0", "1", "2", "3"]
    assert server_gpus(visible, 2, colocated=False) == ["2", "3"]
    assert server_gpus(visible, 2, colocated=True) == ["0", "1"]
    assert server_gpus(visible, 4, colocated=False) == visible, "side by side when none is left"
    options = ServerOptions(model_dir, 32, 8, "auto", "cuda", gpu_memory_utilization=0.8, sleep_mode=True, gpus=["2"])
    assert gpu_environment(options, 1) == {"CUDA_VISIBLE_DEVICES": "2"}
    command = " ".join(server_command(options, 4711))
    assert "--gpu-memory-utilization 0.8" in command and "--enable-sleep-mode" in command
    on_cpu = ServerOptions(
        model_dir, 32, 8, "auto", gpu_memory_utilization=0.8, sleep_mode=True, kv_cache_bytes=1 << 26
    )
    assert gpu_environment(on_cpu, 1) == {}
    assert "--gpu-memory" not in " ".join(server_command(on_cpu, 1)) and "--enable-sleep" not in server_command(
        on_cpu, 1
    )
