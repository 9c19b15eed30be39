"""From problems to judged rollouts: what rank 0 does while the other ranks wait.

`Collector` owns the rollout engine, the reward workers and the problem source. Its results are plain journal records.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from configs.schema import Config
from conversion.hf_files import HFReader
from megatron_ext.rl.advantages import informative_groups
from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.cluster.attempt import LATEST, LOGS
from recipes.data.sources import encode_prompt, make_source
from recipes.loop.estimators import summarise
from recipes.loop.journal import encode_group
from recipes.rewards import RewardItem, make_scorer
from recipes.rollout.engine import RolloutEngine, Sampling, request_seed
from recipes.rollout.make import make_engine


class Collector:
    """Rollout engine, reward workers and problems of a run, on rank 0."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path) -> None:
        self.config = config
        data, reward, rollout = config.data, config.reward, config.rollout
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.source = make_source(
            data.name,
            path=data.path,
            eval_path=data.eval_path,
            seed=config.seed,
            tokenizer=self.tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
        )
        self.scorer = make_scorer(
            reward.name,
            dict(reward.params),
            workers=reward.workers,
            timeout_s=reward.timeout_s,
            memory_mb=reward.memory_mb,
            failure_score=reward.failure_score,
        )
        self.engine: RolloutEngine = make_engine(rollout, model_dir, run_dir / LOGS / LATEST)
        self.sampling = Sampling(
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            allow_off_policy_sampling=config.train.tis_cap is not None,
        )
        self._executor = ThreadPoolExecutor(1 + rollout.max_staleness, thread_name_prefix="rollouts")
        self._pending: dict[int, Future[dict[str, Any]]] = {}  # by step
        self._text = threading.Lock()  # batches share the tokenizer

    # --- training batches -----------------------------------------------------------------------------------------

    def begin(self, step: int, position: int, count: int) -> None:
        """Begin to collect the batches of ``count`` steps in the background, but those begun already.

        ``position``: of the first problem of ``step``. Where refills decide how many problems a batch takes, each
        batch waits for the one before; else they are all asked for at once, and served in this order.
        """
        rollout, refills = self.config.rollout, self._refills()
        asked = rollout.generated_prompts or rollout.prompts_per_step
        for index, now in enumerate(range(step, min(step + count, self.config.train.steps))):
            if now not in self._pending:
                start = self._pending[now - 1] if refills and index else position + index * asked
                self._pending[now] = self._executor.submit(self._collect, now, start)

    def finish(self, step: int) -> dict[str, Any] | None:
        """The batch of a step that was begun, once it is there; None when it was not."""
        future = self._pending.pop(step, None)
        return future.result() if future is not None else None

    def _refills(self) -> int:
        return self.config.advantage.max_refills if self.config.advantage.drop_uniform_groups else 0

    def _collect(self, step: int, start: int | Future[dict[str, Any]]) -> dict[str, Any]:
        """Generate and judge a batch; with dynamic sampling keep going until it is full or the refills are spent."""
        config = self.config
        position: int = start if isinstance(start, int) else start.result()["position"]
        wanted = config.rollout.prompts_per_step
        asked = config.rollout.generated_prompts or wanted  # more than wanted where a filter will drop some
        groups: list[dict[str, Any]] = []
        generate_s = reward_s = 0.0
        for attempt in range(1 + self._refills()):
            problems = self.source.problems(position, asked)
            position += asked
            begin = time.monotonic()
            rollouts = self._generate(problems, config.rollout.n, self.sampling, ("train", step, attempt))
            middle = time.monotonic()
            samples = self._judge(problems, rollouts, config.rollout.n, step)
            generate_s += middle - begin
            reward_s += time.monotonic() - middle
            n = config.rollout.n
            for index, problem in enumerate(problems):
                members = samples[index * n : (index + 1) * n]
                if not config.advantage.drop_uniform_groups or _informative(members):
                    groups.append(encode_group(problem, members))
            if len(groups) >= wanted:
                break
        return {
            "kind": "rollouts",
            "step": step,
            "position": position,  # of the next problem
            "groups": groups[:wanted],
            "timing": {"generate": generate_s, "reward": reward_s},
            "counters": dict(self.engine.counters),
        }

    def _generate(self, problems: Sequence[Problem], n: int, sampling: Sampling, key: tuple[Any, ...]) -> list[Rollout]:
        with self._text:
            prompts = [encode_prompt(self.tokenizer, problem, self.config.data.template) for problem in problems]
        seeds = [_seed(self.config.seed, *key, index) for index in range(len(prompts))]
        return self.engine.generate(prompts, n=n, sampling=sampling, seeds=seeds)

    def _judge(self, problems: Sequence[Problem], rollouts: Sequence[Rollout], n: int, step: int) -> list[Sample]:
        with self._text:
            texts = [self.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
        items = [
            RewardItem(text, problems[i // n].answer, rollout.finish_reason == "length", key=_seed(step, i))
            for i, (text, rollout) in enumerate(zip(texts, rollouts, strict=True))
        ]
        results = self.scorer.score(items)  # one batch at a time, by itself
        return [
            Sample(
                rollout,
                problem_id=problems[i // n].id,
                group=i // n,
                seq_id=i,
                text=texts[i],
                reward=result.score,
                correct=result.correct,
                status=result.status,
            )
            for i, (rollout, result) in enumerate(zip(rollouts, results, strict=True))
        ]

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, Any]:
        """avg@n and pass@k on the held-out problems with the engine's weights; the seeds do not depend on the step."""
        config = self.config
        problems = self.source.heldout(config.eval.problems)
        sampling = Sampling(
            max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            allow_off_policy_sampling=True,
        )
        n = config.eval.n
        rollouts = self._generate(problems, n, sampling, ("eval",))
        samples = self._judge(problems, rollouts, n, step)
        outcomes = [[s.correct for s in samples[i * n : (i + 1) * n]] for i in range(len(problems))]
        estimates = summarise(outcomes, config.eval.k)
        metrics: dict[str, float] = {}
        for name, estimate in estimates.items():
            metrics[f"{config.data.name}/{name}"] = estimate.mean
            metrics[f"{config.data.name}/{name}/low"] = estimate.low
            metrics[f"{config.data.name}/{name}/high"] = estimate.high
        return {"kind": "eval", "step": step, "metrics": metrics}

    def serve(self, model_dir: Path) -> None:
        """Give servers that run already the weights in ``model_dir``, as version 0: they may hold any others."""
        if self.config.rollout.urls:
            reader = HFReader(model_dir)
            try:
                self.engine.push(0, ((name, reader(name)) for name in reader.tensors))
            finally:
                reader.close()

    def close(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self.engine.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.scorer.close()


def _seed(*key: object) -> int:
    """31 bits, which every sampler takes."""
    return request_seed(*key) >> 31


def _informative(samples: Sequence[Sample]) -> bool:
    rewards = torch.tensor([s.reward for s in samples])
    return bool(informative_groups(rewards, torch.zeros(len(samples), dtype=torch.long)).any())
