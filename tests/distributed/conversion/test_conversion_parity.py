"""Every family in every layout: our checkpoint, loaded by Megatron, gives the same logits as transformers.

Per case and layout the checkpoint that `hf_to_megatron` wrote is loaded with Megatron's own `dist_checkpointing`, and
its float32 logits are compared with transformers'. In the largest layout Megatron then saves the model, and
`megatron_to_hf` must restore the original bytes.
"""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import conversion
from conversion import hf_to_megatron, megatron_to_hf, verify

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5  # float32, logits of order 1
PROCESSES = 4
LENGTHS = (7, 1, 16)  # sequences packed into one row, which sequence parallelism can cut in two
DENSE: dict[str, dict[str, int]] = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2-pp2": {"tp": 2, "pp": 2}}
BOTH_ENDS = {"tp1": {}, "tp2-pp2": {"tp": 2, "pp": 2}}
LAYOUTS: dict[str, dict[str, dict[str, int]]] = {  # by case, where not DENSE; the last one also saves
    "qwen2-untied": {"vpp2": {"pp": 2, "vpp": 2}, "tp4": {"tp": 4}, **DENSE},  # tp4: more ranks than KV heads
    "qwen2-tied": {"vpp2": {"pp": 2, "vpp": 2}, **DENSE},
    # these add tensors that are the same in every layout, or are cut like the tensors above
    **dict.fromkeys(("qwen2-yarn", "qwen3-yarn", "llama3", "llama-linear-rope", "smollm2"), BOTH_ENDS),
    **dict.fromkeys(("mistral", "seed-oss", "internlm3"), BOTH_ENDS),
    "qwen3-moe": {"tp1": {}, "pp2": {"pp": 2}, "ep2": {"ep": 2}, "pp2-ep2": {"pp": 2, "ep": 2}},
    # one layout each, which covers everything that the family adds to the ones above
    **dict.fromkeys(("qwen3-moe-mixed", "qwen2-moe", "mixtral"), {"pp2-ep2": {"pp": 2, "ep": 2}}),
    "deepseek-v2": {"pp2-ep2": {"pp": 2, "ep": 2}, "tp4": {"tp": 4}},
    "deepseek-v3": {"tp2": {"tp": 2}, "tp2-sp-ep2-pp2": {"tp": 2, "sp": True, "ep": 2, "pp": 2}},
    "glm4-moe": {"tp2-sp-ep2-pp2": {"tp": 2, "sp": True, "ep": 2, "pp": 2}},
    "qwen2-moe-mixed": {"tp2-sp-ep2-pp2": {"tp": 2, "sp": True, "ep": 2, "pp": 2}},
    "olmo2": {"tp2-sp": {"tp": 2, "sp": True}, "tp2-pp2": {"tp": 2, "pp": 2}},
    "minimax-m2": {"tp2-sp-ep2-pp2": {"tp": 2, "sp": True, "ep": 2, "pp": 2}},
    "glm4-moe-lite": {"pp2-ep2": {"pp": 2, "ep": 2}},
    "gemma3": {"tp2-sp": {"tp": 2, "sp": True}, "tp2-pp2": {"tp": 2, "pp": 2}},
    **dict.fromkeys(
        ("llama3-odd", "smollm3", "granite", "glm4", "phi3", "olmo3", "ernie4-5"), {"tp2-pp2": {"tp": 2, "pp": 2}}
    ),
}
SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Lengths that reach past the original one; then every optional parameter at an unusual value.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
ODD_YARN = {"factor": 2.5, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
LATENT = {"kv_lora_rank": 28, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
    "llama3": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}, "head_dim": 16}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": {**YARN, **ODD_YARN}}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-4}),
    "olmo3": (
        "Olmo3",
        {"sliding_window": 5, "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 5e5}}},
    ),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 20}
        | {"head_dim": 16, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    ),
    "ernie4-5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "minimax-m2": (
        "MiniMaxM2",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "glm4-moe-lite": (
        "Glm4MoeLite",
        {**LATENT, "q_lora_rank": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    ),
    "llama3-odd": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 0.5, "original_max_position_embeddings": 16}},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"mlp_only_layers": [0, 3]},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 2}
        | {"shared_expert_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 0.3, "residual_multiplier": 0.7},
    ),
    "glm4": ("Glm4", {"head_dim": 16, "pad_token_id": 0}),
    "phi3": ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.75, "head_dim": 16, "hidden_size": 128}),
    "deepseek-v2": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"routed_scaling_factor": 1.5},
    ),
    # every relevant setting differs from its default: groups, a bias that changes the choice, YaRN that scales scores
    "deepseek-v3": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-4}
        | {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2}
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "head_dim": 16,
            "routed_scaling_factor": 1.5,
            "pad_token_id": 0,
        },
    ),
    # transformers 5 has no InternLM3: a Llama with dynamic RoPE under its name is the reference
    "internlm3": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}}),
}


def _make(case: str, root: Path) -> None:
    """Write a random transformers model, its logits and our Megatron checkpoint of it."""
    import transformers

    prefix, extra = CASES[case]
    kind = getattr(transformers, prefix + "ForCausalLM")
    config = kind.config_class(**{**SMALL, **extra})
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # transformers initialises biases to 0 and norms to 1, which hides errors
                parameter.copy_(
                    torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and case != "gemma3" else 0.0)
                )
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
        tokens = [torch.randint(SMALL["vocab_size"], (length,)) for length in LENGTHS]
        logits = torch.cat([model(row[None]).logits[0] for row in tokens])
    hf_dir = root / case / "hf"
    model.save_pretrained(hf_dir)
    if case == "internlm3":
        text = (hf_dir / "config.json").read_text().replace("LlamaForCausalLM", "InternLM3ForCausalLM")
        (hf_dir / "config.json").write_text(text)
    save_file({"tokens": torch.cat(tokens), "logits": logits}, root / case / "expected.safetensors")
    hf_to_megatron.convert(hf_dir, root / case / "megatron", threads=2)


def _logits(chunks: list[Any], tokens: Tensor, vocab_size: int) -> Tensor | None:
    """Forward the packed row through Megatron's schedule; (T, vocab) on the last pipeline stage, else None."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.learner.attention import packed_sequences

    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    collected: list[Tensor] = []

    def collect(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        collected.append(output[0].detach().clone())
        return output.new_zeros(()), torch.zeros((), dtype=torch.int), {}

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        row = next(iterator)
        output = model(
            input_ids=row[None],
            position_ids=positions[None],
            attention_mask=None,
            packed_seq_params=packed_sequences(bounds, max(LENGTHS)),
        )
        return output, collect

    count = 2 if len(chunks) > 1 else 1  # the interleaved schedule needs a multiple of the pipeline size
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([tokens] * count) for _ in chunks],
        model=chunks,
        num_microbatches=count,
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
    )
    if not collected:
        return None
    pieces = [torch.empty_like(collected[0]) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(pieces, collected[0], group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(pieces, dim=1)[:, :vocab_size]


def _load(chunks: list[Any], directory: Path) -> dict[str, Any]:
    """Load a checkpoint into the model with Megatron's own functions; return its sharded state dict."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    models = unwrap_model(chunks)
    keys = [f"model{i}" for i in range(len(models))]
    state = {key: model.sharded_state_dict() for key, model in zip(keys, models, strict=True)}
    loaded = dist_checkpointing.load(dict(state), str(directory))
    for key, model in zip(keys, models, strict=True):
        model.load_state_dict(loaded[key])
    return {key: model.sharded_state_dict() for key, model in zip(keys, models, strict=True)}


def _check(case: str, layout: str, parallel: dict[str, int], root: Path, save: bool) -> float:
    """Return the largest logit difference on this rank (0 where there are no logits); optionally save the model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from configs.schema import ModelConfig, OptimConfig, ParallelConfig
    from megatron_ext.learner import model as learner

    config = ParallelConfig(**parallel)
    hf = conversion.read_config(root / case / "hf")
    expected = load_file(root / case / "expected.safetensors")
    with learner.distributed(config, seed=1), learner.on_device():
        chunks = learner.build_chunks(hf, config, ModelConfig(dtype="float32"), optim=OptimConfig())
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.fill_(torch.nan)  # every value must come from the checkpoint
            state = _load(chunks, root / case / "megatron")
            logits = _logits([chunk.eval() for chunk in chunks], expected["tokens"], hf.vocab_size)
        if save:
            # Megatron starts this queue's process with `spawn`, which imports everything again.
            filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
            saved = root / case / f"saved-{layout}"
            if dist.get_rank() == 0:
                saved.mkdir()
            dist.barrier()
            dist_checkpointing.save(state, str(saved))
    return 0.0 if logits is None else (logits - expected["logits"]).abs().max().item()


def _world(parallel: dict[str, int]) -> int:
    """The minimum number of processes of a layout."""
    dense = parallel.get("tp", 1) * parallel.get("pp", 1)
    return max(dense, parallel.get("ep", 1) * parallel.get("pp", 1))


def run(rank: int, cases: list[str], root: Path) -> None:
    """Run in one of four processes; smaller layouts run in several teams in parallel."""
    layouts = [(case, name, parallel) for case in cases for name, parallel in LAYOUTS.get(case, DENSE).items()]
    for world in (1, 2, PROCESSES):
        team, place = divmod(rank, world)
        for case, name, parallel in [item for item in layouts if _world(item[2]) == world][team :: PROCESSES // world]:
            with gloo.group(place, world, root / f"{case}-{name}"):
                save = name == list(LAYOUTS.get(case, DENSE))[-1]
                worst = torch.tensor(_check(case, name, parallel, root, save=save))
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            if place == 0:
                with (root / "differences.txt").open("a") as file:
                    file.write(f"{case} {name} {worst.item():.3e}\n")


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    for case in CASES:
        _make(case, root)
    gloo.run(PROCESSES, run, list(CASES), root, timeout_s=600)
    return root


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_every_layout(parity: Path, case: str) -> None:
    lines = [line.split() for line in (parity / "differences.txt").read_text().splitlines()]
    found = {layout: float(worst) for name, layout, worst in lines if name == case}
    assert found.keys() == LAYOUTS.get(case, DENSE).keys()
    assert all(worst <= TOLERANCE for worst in found.values()), found
    assert load_file(parity / case / "expected.safetensors")["logits"].abs().max() > 0.5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("written_by", ["ours", "megatron"])
def test_back_to_hugging_face_is_bit_identical(parity: Path, case: str, written_by: str, tmp_path: Path) -> None:
    source = parity / case / "hf"
    last = list(LAYOUTS.get(case, DENSE))[-1]
    directory = parity / case / ("megatron" if written_by == "ours" else f"saved-{last}")
    megatron_to_hf.convert(directory, tmp_path / "hf", hf_config=source, threads=2)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert (source / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    shutil.rmtree(tmp_path / "hf")


def test_verify_compares_the_logits_of_both_kinds(
    parity: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = parity / "qwen2-tied"
    monkeypatch.setattr("sys.argv", ["verify", str(case / "hf"), str(case / "megatron")])
    assert verify.main() == 0
    said = capfd.readouterr().out  # of this process, and of the learner's command that it runs
    assert "tensors are equal bit for bit" in said
    assert float(said.split("logits: largest difference ")[1].split()[0]) <= TOLERANCE
