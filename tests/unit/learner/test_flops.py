"""FLOPs by hand: Qwen2.5-7B's weights from its config, attention by pairs, and the experts active for a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import conversion
from megatron_ext.flops import ForwardFlops, attended_pairs, layer_parameters, peak_tflops

QWEN2_5_7B: dict[str, Any] = {
    **{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 131072, "tie_word_embeddings": False},
}
QWEN3_30B_A3B: dict[str, Any] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128},
    **{"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 40960, "vocab_size": 151936, "tie_word_embeddings": False},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}


def test_weights_of_a_dense_model() -> None:
    """Query and output 3584 x 3584, key and value 512 x 3584, three MLP matrices 18944 x 3584: 6.5 B, as published."""
    per_layer = 2 * 3584**2 + 2 * 512 * 3584 + 3 * 18944 * 3584
    assert layer_parameters(conversion.parse_config(QWEN2_5_7B)) == 28 * per_layer == 6_525_288_448


def test_a_token_visits_eight_of_128_experts() -> None:
    """With the router; Qwen3-30B-A3B's card states 3.3 B active, of which 0.6 B are the two vocabulary tables."""
    attention = 2 * 32 * 128 * 2048 + 2 * 4 * 128 * 2048
    per_layer = attention + 128 * 2048 + 8 * 3 * 768 * 2048
    active = layer_parameters(conversion.parse_config(QWEN3_30B_A3B))
    assert active == 48 * per_layer
    assert active + 2 * 151936 * 2048 == pytest.approx(3.3e9, rel=0.03)


def test_forward_pass_of_one_sample_term_by_term() -> None:
    """3 fed tokens see 1 + 2 + 3 keys, two products of width 28 x 128 each; 2 response tokens need logits."""
    hf = conversion.parse_config(QWEN2_5_7B)
    expected = 2 * 6_525_288_448 * 3 + 28 * 6 * 2 * 2 * 28 * 128 + 2 * 2 * 152064 * 3584
    assert ForwardFlops(hf)([(3, 2)]) == expected
    assert ForwardFlops(hf)([(3, 2), (3, 2)]) == 2 * expected
    critic = ForwardFlops(hf, outputs=1)
    assert critic([(3, 2)]) == expected - 2 * 2 * 152063 * 3584


def test_long_sequences_cost_half_of_palms_attention_term() -> None:
    """PaLM: 12 L H Q T per token of training, so 4 L H Q T^2 per forward pass of a whole sequence."""
    hf = conversion.parse_config(QWEN2_5_7B)
    n = 30_000
    attention = ForwardFlops(hf, outputs=0)([(n, 0)]) - 2 * 6_525_288_448 * n
    assert attention == pytest.approx(4 * 28 * 28 * 128 * n * n / 2, rel=1e-4)


def test_a_sliding_window_ends_early() -> None:
    hf = replace(conversion.parse_config(QWEN2_5_7B), num_layers=3, window=4, window_layers=(True, False, True))
    assert attended_pairs(hf, 4) == 3 * 10
    assert attended_pairs(hf, 6) == 2 * (1 + 2 + 3 + 4 + 4 + 4) + 21
    assert attended_pairs(replace(hf, window_layers=()), 6) == 3 * 18


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.05),
        ("Tesla V100-SXM2-32GB", None),  # no bfloat16 support
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    """The names that `torch.cuda.get_device_name` gives."""
    assert peak_tflops(name) == peak
