"""The quick start's policy: a random tiny model, trained on demonstrations until it solves some of the problems.

Supervised learning is the policy-gradient loss `pg` with advantage 1, so it needs no second trainer. It stops at a
greedy accuracy, not at a step count, because the number of steps depends on the seed.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, OptimConfig, ParallelConfig
from megatron_ext.rl.losses import build_loss


def make_warm_model(config: Config, directory: Path) -> None:
    """Write the warm-started model to ``directory`` (Hugging Face format), atomically. Runs in this process alone."""
    from conversion.megatron_to_hf import write_hf
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.model import DTYPES, distributed
    from recipes.models.prepare import make_tiny_model

    warm = config.model.warm_start
    ours = copy.deepcopy(config)
    ours.parallel = ParallelConfig()
    ours.optim = OptimConfig(lr=warm.lr, betas=[0.9, 0.95], weight_decay=0.0, warmup_steps=20)
    ours.model.dtype = "float32"
    ours.train.micro_batch_tokens = 1 << 16
    print("making the quick start's model: a short supervised warm start, cached for later runs", flush=True)
    torch.set_num_threads(config.train.threads)
    with tempfile.TemporaryDirectory() as scratch, distributed(ours.parallel, warm.seed, alone=True):
        raw = make_tiny_model(Path(scratch) / "raw", warm.seed)
        learner = Learner(ours, raw, total_updates=warm.max_steps)
        steps, accuracy = _teach(config, learner, raw)
        if accuracy < warm.target_greedy_accuracy:
            print(f"warm start ended at its step limit with greedy accuracy {accuracy:.2f}", flush=True)
        card = {"base_model": None, "recipe": "warm start", "step": steps}
        write_hf(directory, learner.hf, raw, learner.export(), DTYPES["float32"], card=card)


def _teach(config: Config, learner: Any, raw: Path) -> tuple[int, float]:
    from transformers import AutoTokenizer

    from recipes.data.tasks import chain_demonstration
    from recipes.rollout.local import LocalEngine

    warm = config.model.warm_start
    tokenizer = AutoTokenizer.from_pretrained(raw)
    engine = LocalEngine(raw, max_model_len=config.rollout.max_model_len, max_num_seqs=256)
    loss = build_loss("pg")
    accuracy, begin = 0.0, time.monotonic()
    for step in range(1, warm.max_steps + 1):
        first = (step - 1) * warm.batch
        pairs = [chain_demonstration(warm.seed, first + i) for i in range(warm.batch)]
        batch = demonstration_batch([_encode(tokenizer, *pair) for pair in pairs])
        weights = torch.full((warm.batch,), 1.0 / int(batch.offsets[-1]), dtype=torch.float64)
        result = learner.update(batch, range(warm.batch), weights, loss)
        if step % warm.check_every == 0:
            if step >= warm.min_steps:
                engine.push(step, learner.export(explicit_lm_head=True))
                accuracy = greedy_accuracy(config, engine, tokenizer)
            seconds = time.monotonic() - begin
            print(
                f"warm start {step}/{warm.max_steps}  loss {result.means['pg_loss']:.3f}  "
                f"greedy accuracy {accuracy:.2f}  {seconds:.0f} s",
                flush=True,
            )
            if accuracy > warm.target_greedy_accuracy:
                return step, accuracy
    return warm.max_steps, accuracy


def _encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    prompt_ids = tokenizer.encode(prompt)
    response_ids = tokenizer.encode(response, add_special_tokens=False)
    return prompt_ids, [*response_ids, tokenizer.eos_token_id]


def demonstration_batch(pairs: list[tuple[list[int], list[int]]]) -> Any:
    """A training batch on which `pg` is the negative log-likelihood of the responses."""
    from megatron_ext.learner.step import TrainBatch

    tokens = sum(len(response) for _, response in pairs)
    zeros, ones = torch.zeros(tokens), torch.ones(tokens)
    return TrainBatch(
        prompts=[prompt for prompt, _ in pairs],
        responses=[response for _, response in pairs],
        old_logp=zeros,
        advantages=ones,
        mask=ones.bool(),
        keep=ones.bool(),
        kl_coef=zeros,
        entropy_coef=zeros,
        is_weight=ones,
    )


def greedy_accuracy(config: Config, engine: Any, tokenizer: Any) -> float:
    """Share of held-out problems that greedy decoding solves."""
    from recipes.data.sources import encode_prompt, make_source
    from recipes.rewards import RewardItem, make_verifier
    from recipes.rollout.engine import Sampling

    problems = make_source("chain").heldout(config.model.warm_start.check_problems)
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    greedy = Sampling(config.rollout.max_tokens, temperature=0.0, allow_off_policy_sampling=True)
    rollouts = engine.generate(prompts, n=1, sampling=greedy, seeds=[0] * len(prompts))
    verify = make_verifier("final_answer")
    texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    correct = [verify(RewardItem(t, p.answer)).correct for t, p in zip(texts, problems, strict=True)]
    return sum(correct) / len(correct)
