"""Every key has a class; a run continues only with settings that are compatible with its directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from configs.load import load_config, save_config
from configs.schema import Config
from recipes.checks import resume
from recipes.checks.resume import check_changes, check_replay, class_of, differences
from recipes.models.prepare import make_tiny_model


def every_key(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for f in fields(cls):  # type: ignore[arg-type]
        if is_dataclass(hints[f.name]):
            yield from every_key(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name


@pytest.fixture(scope="module")
def base() -> Config:
    return load_config([])


def test_classes_name_keys_that_exist() -> None:
    known = list(every_key(Config))
    assert [
        name for name in resume.CLASSES if not any(key == name or key.startswith(f"{name}.") for key in known)
    ] == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *(
            (key, "asked")
            for key in ("loss.eps_low", "loss.name", "selection.name", "schedule.points", "advantage.name")
        ),
        *((key, "asked") for key in ("reward.name", "optim.lr", "optim.betas", "critic.lr", "reference.kl_coef")),
        *((key, "asked") for key in ("rollout.temperature", "rollout.max_tokens", "train.tis_cap", "a.new_key")),
        *((key, "frozen") for key in ("seed", "model.path", "data.path", "data.template", "rollout.n", "train.epochs")),
        *((key, "recorded") for key in ("parallel.tp", "train.steps", "eval.n", "rollout.engine")),
        *((key, "free") for key in ("run.name", "rollout.urls", "train.threads", "resume.allow_changes")),
    ],
)
def test_class(key: str, expected: str) -> None:
    assert class_of(key) == expected


def test_differences_of_nested_and_grouped_keys(base: Config) -> None:
    other = load_config(["loss=ppo", "optim.lr=1e-6", "optim.betas=[0.9,0.99]", "rollout.replay=x"])
    found = differences(base, other)
    assert found["optim.lr"] == (5e-5, 1e-6) and found["optim.betas"] == ([0.9, 0.95], [0.9, 0.99])
    assert found["loss.name"] == ("ce_gppo", "ppo") and found["loss.beta1"] == (0.5, None)
    assert found["rollout.replay"] == (None, "x") and "loss.eps_low" not in found
    nan = replace(base, loss={**base.loss, "beta1": float("nan")})
    assert differences(nan, nan) == {} and differences(base, base) == {}
    assert differences(base, replace(base, loss={**base.loss, "beta2": True})) == {"loss.beta2": (1.0, True)}


def change(base: Config, *words: str) -> dict[str, Any]:
    return differences(base, load_config(list(words)))


def test_a_change_of_what_is_learned_needs_consent(base: Config) -> None:
    changes = change(base, "optim.lr=1e-6", "train.steps=200", "run.name=x")
    with pytest.raises(
        ValueError, match=r"optim.lr=5e-05 \(now 1e-06\): go back .* resume.allow_changes=true .* new dir"
    ):
        check_changes(changes, base, begun=True)
    allowed = load_config(["resume.allow_changes=true"])
    assert check_changes(changes, allowed, begun=True) == {"optim.lr": (5e-5, 1e-6), "train.steps": (120, 200)}
    assert check_changes(changes, base, begun=False).keys() == {"optim.lr", "train.steps"}, "nothing was learned yet"
    assert check_changes(change(base, "parallel.tp=2", "run.name=x"), base, begun=True) == {"parallel.tp": (1, 2)}


def test_a_frozen_key_is_refused_even_with_consent(base: Config) -> None:
    allowed = load_config(["resume.allow_changes=true"])
    with pytest.raises(ValueError, match="holds a run with seed=0, not 1; set run.dir to a new directory"):
        check_changes(change(base, "seed=1"), allowed, begun=False)


def test_a_replay_needs_its_own_batches_and_model(base: Config, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", seed=0)
    recorded = load_config([f"model.path={model}"])
    (run := tmp_path / "run").mkdir()
    check_replay(load_config([f"rollout.replay={run}"]))  # of unknown origin: there is no config with the journal
    save_config(recorded, run / "config.yaml")
    words = [f"rollout.replay={run}", f"model.path={model}"]
    check_replay(load_config(words))
    check_replay(load_config([*words, "optim.lr=1", "train.mini_batch_prompts=8"]))
    with pytest.raises(ValueError, match=r"was recorded with rollout.n=8, not 4: set rollout.n=8"):
        check_replay(load_config([*words, "rollout.n=4"]))
    with pytest.raises(ValueError, match=r"recorded with rollout.prompts_per_step=32, not 16"):
        check_replay(load_config([*words, "rollout.prompts_per_step=16"]))
    with pytest.raises(ValueError, match=r"model.path=tiny.* a copy of its own model|not tiny: replay it with a copy"):
        check_replay(load_config([f"rollout.replay={run}", "model.path=tiny"]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(
        (model / "config.json").read_text().replace('"vocab_size": 32', '"vocab_size": 64')
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, 32 tokens.*64 tokens"):
        check_replay(load_config([f"rollout.replay={run}", f"model.path={other}"]))
    (run / "config.yaml").write_text("train: {mini_batches: 4}\n")
    with pytest.raises(ValueError, match=r"is not a configuration of this version \(Key 'mini_batches' not in"):
        check_replay(load_config(words))
