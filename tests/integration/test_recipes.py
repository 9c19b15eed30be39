"""The paper recipes: all compose and validate, fit their models, and have the papers' numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import conversion
from configs.layout import updates_per_epoch
from configs.load import choices
from configs.schema import Config
from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes import plan
from recipes.checks.model import check_model
from recipes.checks.settings import PLACEHOLDER, load_checked
from recipes.data.evalsets import protocols
from recipes.loop.collect import Collector
from recipes.rollout.engine import Sampling

FOLDER = Path(__file__).parents[2] / "configs" / "recipe"
PAPER_RECIPES = [name for name in choices("recipe") if "/" in name]
PAPERS = {
    "baselines": "CE-GPPO",
    "ce_gppo": "CE-GPPO",
    "clip_low_high": "Clip-Low/High",
    "dynamic_clip": "Flexible Entropy Control",
    "entropy_dynamics": "Entropy Dynamics",
}
Load = Callable[[str], Config]


def sizes(family: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, positions: int) -> dict:
    return {
        **{"architectures": [f"{family}ForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab},
        **{
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-6,
            "head_dim": 128 if heads > 12 else hidden // heads,
        },
    }


# The fields of config.json that a layout depends on, for the recipes' models.
MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": sizes("Qwen2", 1536, 8960, 28, 12, 2, 151936, 131072),
    "DeepSeek-R1-Distill-Qwen-7B": sizes("Qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen2.5-Math-7B": sizes("Qwen2", 3584, 18944, 28, 28, 4, 152064, 4096),
    "Qwen2.5-7B": sizes("Qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen2.5-7B-Instruct": sizes("Qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "Qwen2.5-3B-Instruct": sizes("Qwen2", 2048, 11008, 36, 16, 2, 151936, 32768),
    "Qwen2.5-1.5B-Instruct": sizes("Qwen2", 1536, 8960, 28, 12, 2, 151936, 32768),
    "Meta-Llama-3-8B-Instruct": sizes("Llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "Llama-3.2-1B-Instruct": sizes("Llama", 2048, 8192, 16, 32, 8, 128256, 131072) | {"head_dim": 64},
    "DeepSeek-R1-Distill-Llama-8B": sizes("Llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "OLMo-2-0425-1B-Instruct": sizes("Olmo2", 2048, 8192, 16, 16, 16, 100352, 4096),
    "Qwen3-4B-Base": sizes("Qwen3", 2560, 9728, 36, 32, 8, 151936, 32768),
    "internlm3-8b-instruct": sizes("InternLM3", 4096, 10240, 48, 32, 2, 128512, 32768),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A recipe with its model and data file; composed once."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data.jsonl").write_text("{}\n")
    for model, config in MODELS.items():
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config))

    @cache
    def loaded(recipe: str) -> Config:
        return load_checked(
            [f"recipe={recipe}", f"model.path={folder / asked(recipe)}", f"data.path={folder}/data.jsonl"]
        )

    return loaded


def asked(recipe: str) -> str:
    """The model that a recipe requires: the last one named in its chain of bases (much faster than Hydra)."""
    file = FOLDER / f"{recipe}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = (content.get("model") or {}).get("path", "")
    for base in reversed([base for base in content.get("defaults", []) if isinstance(base, str)]):
        found = found or asked(base.removeprefix("/recipe/") if base.startswith("/") else f"base/{base}")
    return found.strip("<>")


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_recipe_validates_and_fits_the_model_it_names(
    recipe: str, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(recipe)
    assert config.run.name == recipe
    directory = Path(config.model.path)
    plan.print_plan(replace(config, data=replace(config.data, path="<somewhere>")))  # this needs no data
    planned = " ".join(capsys.readouterr().out.split())
    if directory.name == "Qwen2.5-Math-7B":  # documented in the recipes' base, with both fixes
        with pytest.raises(ValueError, match=r"max_model_len=5120 exceeds .* 4096 positions: set .* or raise max_pos"):
            check_model(config, directory)
        assert "Will not start: rollout.max_model_len=5120 exceeds" in planned
    else:
        check_model(config, directory)
        assert "Will not start" not in planned
    needed = plan.learner_memory(config, conversion.read_config(directory)).total
    assert needed < 0.8 * 80 * 2**30  # the GPUs of base/paper.yaml, with a margin for memory that is not counted
    # A prompt of maximum length and a response of maximum length fit the servers' context.
    longest = max(config.rollout.max_tokens, config.eval.max_tokens or 0)
    assert config.data.max_prompt_tokens + longest <= config.rollout.max_model_len
    assert plan.batch_plan(config).longest <= config.train.micro_batch_tokens
    assert config.optim.weight_decay in (0.0, 0.01, 0.1) and config.model.dtype == config.rollout.dtype == "bfloat16"


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_header_names_source_target_and_hardware(recipe: str) -> None:
    lines = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    header = " ".join(line.removeprefix("# ") for line in lines[1:] if line.startswith("# "))
    assert re.search(rf"Aims at: {PAPERS[recipe.partition('/')[0]]} (table|figure)", header), header
    assert re.search(r"Hardware: .*\d+(:\d\d)? h\b", header), header


def test_every_recipe_is_in_the_docs() -> None:
    text = (FOLDER.parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in choices("recipe") if f"`{name}`" not in text] == []


def test_placeholders_name_models_whose_sizes_are_known() -> None:
    named = {
        match[1]
        for file in FOLDER.rglob("*.yaml")
        if (found := re.search(r"^model: \{path: (<.+?>)\}", file.read_text(encoding="utf-8"), re.MULTILINE))
        and (match := PLACEHOLDER.fullmatch(found[1]))
    }
    assert named == set(MODELS)


# -------------------------------------------------------------------------------------------- numbers of the papers

CE = {"name": "ce_gppo", "eps_low": 0.2, "eps_high": 0.2, "beta2": 1.0}
DYNAMIC = {"name": "dynamic_clip", "eps": 0.2, "alpha_high": -0.25, "b_high": 0.5, "alpha_low": -0.13, "b_low": 0.3}
STATIC = {"alpha_high": 0.0, "b_high": 0.28, "alpha_low": 0.0, "b_low": 0.28}
INF = float("inf")


@pytest.mark.parametrize(
    ("recipe", "loss"),
    [
        ("ce_gppo/ce_gppo", CE | {"beta1": 0.5, "dual_clip": None}),
        ("ce_gppo/ce_gppo_7b", CE | {"beta1": 0.75, "dual_clip": None}),
        ("ce_gppo/ce_gppo_script", CE | {"beta1": 0.5, "dual_clip": 10.0}),
        ("ce_gppo/ce_gppo_7b_script", CE | {"beta1": 0.75, "dual_clip": 10.0}),
        ("ce_gppo/beta_1_05", {"beta1": 1.0, "beta2": 0.5}),
        ("ce_gppo/beta_0_1_7b", {"beta1": 0.0, "beta2": 1.0}),
        ("ce_gppo/grpo", {"name": "ppo", "eps_low": 0.2, "eps_high": 0.2}),
        ("ce_gppo/dapo_7b", {"name": "ppo", "eps_low": 0.2, "eps_high": 0.28}),
        ("ce_gppo/cispo", {"name": "cispo", "eps_low": 0.2, "eps_high": 0.2}),
        ("ce_gppo/gspo", {"name": "gspo", "eps_low": 3e-4, "eps_high": 4e-4}),
        ("dynamic_clip/sapo", {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.05}),
        ("dynamic_clip/id", DYNAMIC | {"strategy": "id", "phase_ratio": 0.5}),
        ("dynamic_clip/did_qwen25_7b", DYNAMIC | {"strategy": "did", "phase_ratio": 0.5}),
        ("dynamic_clip/od", DYNAMIC | {"strategy": "od", "entropy_floor": 0.2, "initial_state": 0}),
        ("dynamic_clip/phase_03", DYNAMIC | {"strategy": "id", "phase_ratio": 0.3}),
        ("dynamic_clip/phase_06", {"phase_ratio": 0.6}),
        ("dynamic_clip/upper", {"strategy": "upper"}),
        ("dynamic_clip/static_did", STATIC | {"strategy": "did", "eps": 0.2}),
        ("dynamic_clip/clip_lower", {"name": "ppo", "eps_low": 0.28, "eps_high": 0.2}),
        ("clip_low_high/gsm8k_symmetric", {"name": "ppo", "eps_low": 0.2, "eps_high": 0.2}),
        ("clip_low_high/gsm8k_no_clip_low_llama3_8b", {"eps_low": 1.0, "eps_high": 0.2}),
        ("clip_low_high/random_symmetric_olmo2_1b", {"name": "ppo", "eps_low": 0.1, "eps_high": 0.1}),
        ("clip_low_high/dapo17k_no_clip_high", {"eps_low": 0.2, "eps_high": INF}),
        ("clip_low_high/dapo17k_clip_lower", {"eps_low": 0.15, "eps_high": INF}),
    ],
)
def test_losses_are_the_papers(recipe: str, loss: dict[str, Any], load: Load) -> None:
    assert {key: load(recipe).loss[key] for key in loss} == loss


@pytest.mark.parametrize(
    ("recipe", "selection"),
    [
        ("ce_gppo/entropy_bonus_0001", {"name": "entropy_bonus", "coef": 0.001}),
        ("ce_gppo/entropy_bonus_0003", {"name": "entropy_bonus", "coef": 0.003}),
        ("dynamic_clip/clip_cov", {"name": "clip_cov", "frac": 2e-4, "cov_low": 1.0, "cov_high": 5.0}),
        ("entropy_dynamics/clip_b", {"name": "clip_b", "mu_low": 2.5, "mu_high": INF, "tokens": "negative"}),
        ("entropy_dynamics/clip_v_qwen3_4b", {"name": "clip_v", "tokens": "negative"}),
        ("entropy_dynamics/kl_cov", {"name": "kl_cov", "frac": 0.002, "coef": 1.0}),
        ("entropy_dynamics/unlikely", {"name": "unlikely", "beta_rank": 0.25}),
        ("entropy_dynamics/forking", {"name": "forking", "frac": 0.2}),
        ("entropy_dynamics/grpo", {"name": "none"}),
    ],
)
def test_selections_are_the_papers(recipe: str, selection: dict[str, Any], load: Load) -> None:
    assert {key: load(recipe).selection[key] for key in selection} == selection


def facts(config: Config) -> tuple[Any, ...]:
    r, t = config.rollout, config.train
    return (
        config.optim.lr,
        r.prompts_per_step,
        r.n,
        r.max_tokens,
        updates_per_epoch(config),
        t.steps,
        config.advantage.name,
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),  # lr, prompts, n, response tokens, updates per rollout, steps, advantage
    [
        ("ce_gppo/ce_gppo", (1e-6, 128, 8, 16384, 8, 1000, "grpo")),
        ("ce_gppo/ce_gppo_7b_script", (1e-6, 128, 8, 16384, 8, 1000, "grpo")),
        ("dynamic_clip/id", (1e-6, 512, 8, 4096, 16, 400, "grpo")),
        ("dynamic_clip/grpo_qwen25_7b", (1e-6, 512, 8, 8192, 16, 400, "grpo")),
        ("dynamic_clip/phase_04", (1e-6, 512, 8, 4096, 16, 200, "grpo")),
        ("clip_low_high/gsm8k_clip_lower", (5e-7, 512, 8, 4096, 16, 200, "dr_grpo")),
        ("clip_low_high/dapo17k_symmetric", (1e-6, 512, 8, 4096, 16, 200, "dr_grpo")),
        ("clip_low_high/random_symmetric", (5e-7, 512, 8, 4096, 16, 200, "dr_grpo")),
        ("entropy_dynamics/grpo", (4e-7, 64, 16, 7168, 1, 400, "grpo")),
        ("entropy_dynamics/clip_b_qwen3_4b", (4e-7, 64, 8, 7168, 1, 400, "grpo")),
        ("entropy_dynamics/clip_v_internlm3_8b", (4e-7, 64, 16, 7168, 1, 400, "grpo")),
    ],
)
def test_settings_are_the_papers(recipe: str, expected: tuple[Any, ...], load: Load) -> None:
    assert facts(load(recipe)) == expected


def test_what_the_authors_script_adds_to_the_paper(load: Load) -> None:
    paper, script = load("ce_gppo/ce_gppo"), load("ce_gppo/ce_gppo_script")
    assert (paper.rollout.generated_prompts, script.rollout.generated_prompts) == (None, 256)
    assert not paper.advantage.drop_uniform_groups and paper.optim.warmup_steps == 0
    assert script.advantage.drop_uniform_groups and script.advantage.max_refills == 0  # max_num_gen_batches=1
    assert script.optim.warmup_steps == 10 * updates_per_epoch(script)  # ten rollout steps
    assert (paper.advantage.aggregation, script.advantage.aggregation) == ("group_token_mean", "token_mean")
    assert (paper.train.positive_nll_coef, script.train.positive_nll_coef) == (0.0, 0.1)
    assert script.train.mini_batch_prompts == 16


def test_beta_switch_and_random_rewards(load: Load) -> None:
    assert load("ce_gppo/beta_switch").schedule == {"name": "piecewise", "points": {"beta1": [[0, 0.0], [585, 0.5]]}}
    rewards = [load(f"clip_low_high/random_{name}").reward for name in ("symmetric", "p03", "p07")]
    assert [(r.name, r.params["distribution"], r.params["p"]) for r in rewards] == [
        ("random", "bernoulli", 0.5),
        ("random", "bernoulli", 0.3),
        ("random", "bernoulli", 0.7),
    ]
    judge = {"judge": "final_answer", "judge_params": {"marker": "####", "last_number": True}}
    assert rewards[0].params.items() >= judge.items()


def test_gsm8k_and_dapo17k_differ_as_table_1_says(load: Load) -> None:
    gsm8k, dapo = load("clip_low_high/gsm8k_symmetric"), load("clip_low_high/dapo17k_symmetric")
    assert (gsm8k.advantage.drop_uniform_groups, dapo.advantage.drop_uniform_groups) == (False, True)
    assert (gsm8k.advantage.overlong, dapo.advantage.overlong) == ("none", "penalty")
    assert dapo.advantage.overlong_factor == 1.0


def test_rewards_templates_and_verifiers_of_the_recipes_are_valid(load: Load) -> None:
    from recipes.rewards import make_verifier

    for recipe in (
        *("dynamic_clip/id", "ce_gppo/ce_gppo", "clip_low_high/gsm8k_symmetric", "clip_low_high/random_p03"),
        *("clip_low_high/dapo17k_symmetric", "entropy_dynamics/grpo"),
    ):
        config = load(recipe)
        make_verifier(config.reward.name, **config.reward.params)
        assert config.data.template.startswith("chat:") and config.data.template.count("{problem}") == 1
    assert load("dynamic_clip/id").data.template == (
        "chat:{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


class DynamicSampling(Collector):
    """The collector with a stub for engine and rewards: one prompt in `every` has a reward difference."""

    def __init__(self, config: Config, every: int) -> None:
        self.config, self.every, self.asked = config, every, []  # type: ignore[var-annotated]
        self.source = self.engine = self  # type: ignore[assignment]
        self.counters: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.sampling = Sampling(max_tokens=8)

    def problems(self, position: int, count: int) -> list[Problem]:
        self.asked.append((position, count))
        return [Problem(id=str(position + i), prompt="", answer="") for i in range(count)]

    def _prompts(self, problems: Any, template: str | None = None) -> list[list[int]]:
        return [[1] for _ in problems]

    def _judged(self, problems: Any, requests: Any, key: Any, seconds: Any) -> list[list[Sample]]:
        rollout, groups = Rollout([1], [2], [0.0], [0], "stop"), []
        for group, (problem, request) in enumerate(zip(problems, requests, strict=True)):
            n = request.n
            rewards = [float(self._right(i, n)) for i in range(group * n, group * n + n)]
            about = {"problem_id": problem.id, "group": group}
            groups.append([Sample(rollout, seq_id=i, reward=r, **about) for i, r in enumerate(rewards)])
        return groups

    def _right(self, i: int, n: int) -> bool:
        return i // n % self.every == 0 and i % n == 0


@pytest.mark.parametrize(
    ("every", "asked", "trained"),
    [
        (1, [(1000, 256)], 128),  # every group is informative: the first 128 are trained, the rest is dropped
        (4, [(1000, 256)], 64),  # 64 of 256: there is no refill, a short batch is trained
    ],
)
def test_the_scripts_dynamic_sampling(every: int, asked: list[tuple[int, int]], trained: int, load: Load) -> None:
    collector = DynamicSampling(load("ce_gppo/ce_gppo_script"), every)
    record = collector._collect(step=3, start=1000)
    assert collector.asked == asked and len(record["groups"]) == trained
    assert record["position"] == asked[-1][0] + 256  # dropped problems are not used again


def test_evaluation_has_its_own_length(load: Load) -> None:
    (protocol,) = protocols(load("ce_gppo/ce_gppo")).values()
    assert (protocol.max_tokens, protocol.n, protocol.temperature, protocol.top_p) == (32768, 32, 0.6, 0.95)
