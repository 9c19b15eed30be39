"""Configuration: every shipped YAML composes, every user error is one sentence with key, value and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import load
from configs.load import choices, load_saved_config, save_config
from recipes.checks.settings import load_checked


@pytest.mark.parametrize("group", ["loss", "selection", "schedule"])
def test_every_group_entry_composes_and_validates(group: str) -> None:
    for name in choices(group):
        config = load_checked([f"{group}={name}"])
        assert getattr(config, group)["name"]


def test_defaults_are_the_quick_start() -> None:
    config = load_checked([])
    assert config.run.name == "quickstart" and config.model.path == "tiny" and config.loss["name"] == "ce_gppo"
    assert config.run.dir == "runs/quickstart"  # the interpolation was resolved


def test_command_line_has_the_last_word() -> None:
    config = load_checked(["optim.lr=1e-6", "loss=dapo", "loss.eps_high=0.3", "rollout.urls=[http://a]", "eval.k=[1]"])
    assert config.optim.lr == 1e-6 and config.rollout.urls == ["http://a"] and config.eval.k == [1]
    assert config.loss == {"name": "ppo", "eps_low": 0.2, "eps_high": 0.3, "dual_clip": None}


def test_parameters_of_rewards_and_advantages_can_be_given() -> None:
    config = load_checked(["reward.params.marker='####'", "advantage.params.delta=1e-4"])
    assert config.reward.params == {"marker": "####"} and config.advantage.params == {"delta": 1e-4}


def test_short_names_stand_for_keys_in_every_command(tmp_path: Path) -> None:
    """Also when a Slurm job checks the words of `recipes.evaluate` before that command sees them."""
    (tmp_path / "aime24.jsonl").write_text("{}")
    config = load_checked(["suite=aime24", f"eval.data_dir={tmp_path}", "eval.n=4"])
    assert config.eval.suite == ["aime24"]
    assert config.eval.k == [1, 4], "pass@8 of the recipe has no meaning with four samples"
    assert load_checked(["eval.n=16"]).eval.k == [1, 8]


def test_the_last_of_two_overrides_is_the_one_that_counts() -> None:
    assert load_checked(["optim.lr=fast", "optim.lr=1e-4"]).optim.lr == 1e-4
    with pytest.raises(ValueError, match=r"^optim.lr=slow is not"):
        load_checked(["optim.lr=1e-4", "optim.lr=slow"])


EPS_LOW_CURVE = ["~schedule.points.beta1", "schedule.points.eps_low=[[0,0.1],[9,0.2]]"]


@pytest.mark.parametrize("chosen", [["schedule=linear"], ["schedule=linear", "loss=ppo"]])
def test_an_entry_of_a_group_can_be_taken_away(chosen: list[str]) -> None:
    """`linear` moves beta1 by default, which `ppo` does not have."""
    config = load_checked([*chosen, *EPS_LOW_CURVE])
    assert config.schedule["points"] == {"eps_low": [[0, 0.1], [9, 0.2]]}


def test_a_loss_chosen_by_hand_leaves_the_recipes_loss_parameters_behind(paper: list[str]) -> None:
    """`dynamic_clip/did` sets `loss.strategy`, which `dapo` does not have."""
    config = load_checked(["recipe=dynamic_clip/did", "loss=dapo", "loss.eps_low=0.1", *paper])
    assert config.loss == {"name": "ppo", "eps_low": 0.1, "eps_high": 0.28, "dual_clip": None}
    assert config.train.steps == 400  # the rest of the recipe is kept


@pytest.fixture
def paper(tmp_path: Path) -> list[str]:
    """The settings that a paper recipe requires from the user."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("{}\n")
    return [f"model.path={tmp_path}", f"data.path={tmp_path / 'data.jsonl'}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("model.pth=x", ["model.pth=x", "no key", "'model.path'"]),
        ("los=dapo", ["los=dapo", "no key", "'loss'"]),
        ("foo.bar=1", ["foo.bar=1", "no key", "docs/keys.md"]),
        ("rollout.n", ["'rollout.n'", "key=value"]),
        ("loss.bta1=0.3", ["loss.bta1=0.3", "'beta1'"]),
        ("loss.beta1=-1", ["loss.beta1=-1", "[0, "]),
        ("reward.params.marker=####", ["reward.params.marker=####", "quote", "key='a, b'"]),
        ("loss=dap", ["loss=dap", "'dapo'", "cispo"]),
        ("selection=clipb", ["selection=clipb", "'clip_b'"]),
        ("schedule=stairs", ["schedule=stairs", "piecewise"]),
        ("recipe=quickstrt", ["recipe=quickstrt", "'quickstart'", "--help"]),
        ("train.steps=many", ["train.steps=many", "whole number"]),
        ("train.steps=1.5", ["train.steps=1.5", "whole number"]),
        ("optim.lr=fast", ["optim.lr=fast", "a number"]),
        ("parallel.sp=maybe", ["parallel.sp=maybe", "true or false"]),
        ("rollout.urls=here", ["rollout.urls=here", "a list"]),
        ("optim.betas=[0.9,x]", ["optim.betas", "'x'", "Float"]),
        ("train.mini_batch_prompts=15", ["train.mini_batch_prompts=15", "rollout.prompts_per_step=32", "divisor"]),
        ("rollout.n=0", ["rollout.n=0", "at least 1"]),
        ("rollout.n=1", ["rollout.n=1", "advantage.name=grpo", "2 or more"]),
        ("rollout.n=1 advantage.name=reinforce_pp advantage.params.baseline=group", ["rollout.n=1"]),
        ("train.tis_mode=mask", ["train.tis_mode=mask", "no effect", "train.tis_cap"]),
        ("train.tis_cap=2 train.tis_floor=1.5", ["train.tis_floor=1.5", "at most 1"]),
        ("train.tis_cap=0", ["train.tis_cap=0.0", "above 0"]),
        ("train.tis_cap=nan", ["train.tis_cap=nan", "finite"]),
        ("advantage.overlong=penalty advantage.overlong_buffer=25", ["advantage.overlong_buffer=25", "[1, 24]"]),
        ("advantage.overlong=penalty advantage.overlong_factor=-1", ["advantage.overlong_factor=-1.0"]),
        ("loss=pg rollout.max_staleness=1", ["rollout.max_staleness=1", "loss.name=pg", "train.tis_cap=2"]),
        ("selection.also=[{name:clipb}]", ["selection.also[0].name='clipb'", "'clip_b'"]),
        ("selection.also=[{name:clip_b,per_update:true}]", ["selection.also[0].per_update=True", "for all of them"]),
        ("rollout.max_tokens=128", ["rollout.max_tokens=128", "rollout.max_model_len=128", "raise"]),
        ("eval.max_tokens=500", ["eval.max_tokens=500", "rollout.max_model_len=128", "raise"]),
        ("eval.n=4 eval.k=[8]", ["eval.k=[8]", "eval.n >= 8"]),
        ("rollout.generated_prompts=8", ["rollout.generated_prompts=8", "prompts_per_step=32", "raise"]),
        ("rollout.generated_prompts=64", ["rollout.generated_prompts=64", "advantage.drop_uniform_groups=true"]),
        ("advantage.max_refills=2", ["advantage.max_refills=2", "advantage.drop_uniform_groups=true"]),
        ("rollout.temperature=0.7", ["rollout.temperature=0.7", "train.tis_cap=2"]),
        ("rollout.max_staleness=-1", ["rollout.max_staleness=-1", "0"]),
        ("rollout.max_staleness=2", ["rollout.max_staleness=2", "train.tis_cap=2", "train.old_logprobs=rollout"]),
        ("train.tis_cap=2 train.old_logprobs=rollout", ["train.tis_cap=2", "twice", "train.old_logprobs=learner"]),
        ("rollout.in_flight=keep", ["rollout.in_flight=keep", "no effect", "rollout.max_staleness"]),
        ("rollout.in_flight=stop", ["rollout.in_flight=stop", "wait | keep | abort"]),
        ("rollout.weight_sync=ncl", ["rollout.weight_sync=ncl", "'nccl'"]),
        ("rollout.weight_sync=gloo rollout.engine=local", ["rollout.weight_sync=gloo", "rollout.engine=local"]),
        ("rollout.weight_sync=ipc rollout.urls=['http://a:1']", ["rollout.weight_sync=ipc", "rollout.urls", "auto"]),
        ("rollout.probe_s=0", ["rollout.probe_s=0", "above 0"]),
        ("rollout.update_timeout_s=0", ["rollout.update_timeout_s=0", "above 0"]),
        ("rollout.quantization=fp8", ["rollout.quantization=fp8", "train.tis_cap=2"]),
        ("rollout.quantization=fp8 train.tis_cap=2 rollout.engine=local", ["rollout.quantization=fp8", "no effect"]),
        ("rollout.server_gpus=0", ["rollout.server_gpus=0", "at least 1"]),
        ("rollout.extra_args=[-tp,'4'] rollout.server_gpus=2", ["rollout.extra_args=", "4 GPUs", "server_gpus=2"]),
        ("rollout.extra_args=['--data-parallel-size=x']", ["rollout.extra_args=", "not a number"]),
        ("parallel.tp=2 parallel.nproc=3", ["parallel.nproc=3", "multiple", "2"]),
        ("parallel.ep=3 parallel.nproc=4", ["parallel.nproc=4", "ep x pp", "of 3"]),
        ("parallel.vpp=2", ["parallel.vpp=2", "parallel.pp >= 2"]),
        ("parallel.sp=true", ["parallel.sp=true", "parallel.tp >= 2"]),
        ("model.path=nowhere", ["model.path=nowhere", "config.json", "'tiny'"]),
        ("data.path=nowhere.jsonl", ["data.path=nowhere.jsonl", "no such file", "JSONL"]),
        ("data.name=jsonl", ["data.name=jsonl", "data.path="]),
        ("data.name=chains", ["data.name=chains", "'chain'"]),
        ("reward.name=maths", ["reward.name=maths", "'math'"]),
        ("rollout.replay=nowhere", ["rollout.replay=nowhere", "journal.bin", "directory of a run"]),
        ("advantage.name=grp", ["advantage.name=grp", "'grpo'"]),
        ("advantage.params.delt=1", ["advantage.params.delt=1", "'delta'"]),
        ("model.dtype=float16", ["model.dtype=float16", "bfloat16"]),
        ("reference.path=/tmp", ["reference.path=/tmp", "no effect", "reference.kl_coef"]),
        ("reference.path=nowhere reference.kl_coef=1", ["reference.path=nowhere", "config.json"]),
        ("reference.kl_type=k4", ["reference.kl_type=k4", "k3"]),
        ("reference.kl_coef=-1", ["reference.kl_coef=-1", "at least 0"]),
    ],
)
def test_a_user_error_is_one_sentence_with_key_value_and_fix(arguments: str, said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_checked(arguments.split())
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message


def test_paper_recipes_ask_for_the_model_and_data_they_name(paper: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: give the Hugging Face directory of Qwen2\.5-Math-7B, "):
        load_checked(["recipe=dynamic_clip/id"])
    with pytest.raises(ValueError, match=r"^data\.path: give the JSONL file of DAPO-Math-17k, as data\.path=PATH$"):
        load_checked(["recipe=dynamic_clip/id", paper[0]])


def test_an_unknown_key_in_a_recipe_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML files are composed without the schema; merging into it must still detect misspelled keys."""
    monkeypatch.setattr(load, "compose", lambda *_, **__: load.OmegaConf.create({"optim": {"learning_rate": 1.0}}))
    with pytest.raises(ValueError, match=r"optim\.learning_rate: Key 'learning_rate' not in 'OptimConfig'"):
        load_checked([])


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_checked(["loss=ppo", "loss.eps_high=inf", "schedule=linear", *EPS_LOW_CURVE])
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_saved_config(path) == config
    assert config.loss["eps_high"] == float("inf")
