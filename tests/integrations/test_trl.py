"""Our losses and selections inside TRL: its `GRPOTrainer` trains a tiny model on a CPU (`make test-integrations`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import GRPOConfig  # noqa: E402

from megatron_ext.integrations.trl import trainer_class  # noqa: E402
from megatron_ext.rl.losses import Loss, build_loss  # noqa: E402
from megatron_ext.rl.selection import Selection, build_selection  # noqa: E402

BONUS = {"name": "entropy_bonus", "coef": 0.001}
WORDS = ["<pad>", "<eos>", *"abcdefgh"]


def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes))


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    return [text.split().count("a") / max(len(text.split()), 1) for text in completions]


def trainer(tmp_path: Path, loss: Loss, selection: Selection | None = None, **settings: Any) -> Any:
    config = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        bf16=False,
        seed=1,
        **{
            "per_device_train_batch_size": 16,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 1,
            "num_generations": 8,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "max_steps": 20,
            "lr_scheduler_type": "constant",
            **settings,
        },
    )
    return trainer_class(loss, selection)(
        model=model(),
        args=config,
        reward_funcs=share_of_a,
        train_dataset=Dataset.from_dict({"prompt": ["b c", "d e", "f", "g h"] * 8}),
        processing_class=tokenizer(),
    )


def logged(run: Any, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("loss", "selection"),
    [
        (build_loss("ce_gppo", beta1=0.5, beta2=1.0), None),
        (build_loss("ppo", dual_clip=3.0), build_selection("clip_b", mu_low=1.0, also=[BONUS])),
        (build_loss("gspo", eps_low=0.05, eps_high=0.05), build_selection("kl_cov", frac=0.05)),
    ],
    ids=["ce_gppo", "ppo-clip_b-entropy_bonus", "gspo-kl_cov"],
)  # fmt: skip
def test_a_tiny_model_learns(tmp_path: Path, loss: Loss, selection: Selection | None) -> None:
    """Two updates per generation, so that ratios change and bounds take effect; the logged metrics are ours."""
    run = trainer(tmp_path, loss, selection)
    run.train()
    rewards = logged(run, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    assert all(value == value for value in logged(run, "loss"))
    moved = [r for r in logged(run, "ratio_mean") if abs(r - 1) > 1e-6]
    assert moved and logged(run, "pg_clipfrac_low") and logged(run, "entropy")
    if selection is not None:
        assert logged(run, "selection/dropped_frac")


def test_the_objective_is_trls_own_where_the_losses_agree(tmp_path: Path) -> None:
    """PPO at 0.2 / 0.2 without dual clip is TRL's ``dapo`` loss: the same weights after the same steps."""
    from trl import GRPOTrainer

    ours = trainer(tmp_path / "a", build_loss("ppo"), max_steps=4)
    theirs = GRPOTrainer(
        model=model(),
        args=ours.args,
        reward_funcs=share_of_a,
        train_dataset=ours.train_dataset,
        processing_class=tokenizer(),
    )
    for run in (ours, theirs):
        torch.manual_seed(5)
        run.train()
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"), [({"beta": 0.1}, "beta"), ({"loss_type": "grpo"}, "loss_type"), ({"delta": 1.5}, "delta")]
)
def test_settings_without_effect_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"GRPOConfig.{said}"):
        trainer(tmp_path, build_loss("ppo"), **settings)
