"""The metrics of one step, under the names that comparable systems use."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext import progress
from megatron_ext.rl.diagnostics import diagnostics
from megatron_ext.rl.types import Sample, TokenStats

if TYPE_CHECKING:  # importing Megatron takes seconds
    from megatron_ext.learner.critic import Critic
    from megatron_ext.learner.learner import Learner, UpdateMetrics
    from megatron_ext.learner.work import WorkReport
    from megatron_ext.rl.trace import TokenTrace


class StepMetrics:
    """Collects the metrics of one rollout step; :meth:`result` is the line of ``metrics.jsonl``.

    Everything but ``timing_s/*`` and ``perf/*`` is a deterministic function of the journal and the weights.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._values: dict[str, float] = {}
        self.token_statistics: TokenStats | None = None  # of the step's samples, one after the other
        self.trace: TokenTrace | None = None  # of the tokens that the report shows
        self._updates: list[UpdateMetrics] = []
        self._critic: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._begin = time.monotonic()
        self._tokens = self._prompt_tokens = 0
        self._work: WorkReport | None = None

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to ``timing_s/<phase>``, and sets the phase of the rank's heartbeat."""
        progress.at("rollout" if phase in ("wait", "eval") else phase, step=self.step - 1)
        begin = time.monotonic()
        with torch.profiler.record_function(phase):  # a name in profiles
            yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - begin

    def add(self, values: Mapping[str, float]) -> None:
        self._values.update(values)

    def rollouts(self, samples: list[Sample]) -> None:
        """Rewards, lengths and verdicts."""
        n = max(len(samples), 1)
        rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
        lengths = torch.tensor([len(s.rollout.response_ids) for s in samples], dtype=torch.float64)
        self._tokens = int(lengths.sum())
        self._prompt_tokens = sum(len(s.rollout.prompt_ids) for s in samples)
        self._values |= {
            "critic/rewards/mean": float(rewards.sum() / n),
            "critic/rewards/std": float(rewards.std(unbiased=False)) if samples else 0.0,
            "critic/accuracy": sum(s.correct for s in samples) / n,
            "reward/failures": float(sum(s.status != "ok" for s in samples)),
            "response_length/mean": float(lengths.sum() / n),
            "response_length/max": float(lengths.max()) if samples else 0.0,
            "response_length/clip_ratio": sum(s.rollout.finish_reason == "length" for s in samples) / n,
            "rollout/samples": float(len(samples)),
            **self._ages(samples),
        }

    def _ages(self, samples: list[Sample]) -> dict[str, float]:
        """Mean age of a token in steps, and the share of tokens that were written when an update cut their response."""
        age = cut = 0
        for versions in (torch.as_tensor(s.rollout.weight_versions) for s in samples):
            age += (self.step - 1) * len(versions) - int(versions.sum())
            cut += int((versions < versions[-1:]).sum())
        return {"rollout/staleness": age / max(self._tokens, 1), "rollout/cut_tokens": cut / max(self._tokens, 1)}

    def agreement(
        self, samples: list[Sample], rollout_logp: Tensor, stats: TokenStats, *, version: int, limit: float
    ) -> None:
        """Compare rollout engine and learner on the same tokens, where both used the weights of this step.

        Raises ValueError when their probabilities differ by more than ``limit`` on average: training on such ratios
        degrades slowly and without an error.
        """
        versions = torch.cat([torch.as_tensor(s.rollout.weight_versions, dtype=torch.long) for s in samples])
        same = versions == version
        if bool(same.any()):
            engine, learner = rollout_logp[same].double(), stats.logp[same].double()
            dp = (engine.exp() - learner.exp()).abs()
            self._values |= {
                "rollout_agreement/abs_dp_mean": float(dp.mean()),
                "rollout_agreement/abs_dp_max": float(dp.max()),
                "rollout_agreement/abs_dlogp_mean": float((engine - learner).abs().mean()),
            }
            if float(dp.mean()) > limit:
                raise ValueError(
                    f"rollout and learner probabilities of the same tokens differ by {float(dp.mean()):.3g} on "
                    f"average, above rollout.agreement_limit={limit}: usual causes are a lower rollout.dtype than "
                    "model.dtype, sampling with temperature or top_p other than 1, or a server with other weights; "
                    "repair that, or set train.tis_cap=2 to correct for it and raise the limit"
                )

    def statistics(self, stats: TokenStats, seq_ids_T: Tensor) -> None:
        """From the statistics pass: the policy before this step's updates, over all response tokens.

        ``actor/entropy`` is the mean over tokens; ``actor/entropy_seq_mean`` the mean over responses of each one's mean
        (CE-GPPO eq. 5, Clip-Low/Clip-High eq. 4), which gives short and long responses the same weight.
        """
        self.token_statistics = stats
        entropy_T = stats.entropy.double()
        self._values["actor/entropy"] = float(entropy_T.mean())
        lengths_B = torch.bincount(seq_ids_T)
        sums_B = torch.zeros(len(lengths_B), dtype=torch.float64).index_add_(0, seq_ids_T, entropy_T.cpu())
        self._values["actor/entropy_seq_mean"] = float((sums_B / lengths_B.clamp(min=1)).sum() / (lengths_B > 0).sum())
        self._values["actor/logp_mean"] = float(stats.logp.double().mean())

    def update(self, result: UpdateMetrics) -> None:
        self._updates.append(result)

    def critic_update(self, result: dict[str, float]) -> None:
        self._critic.append(result)

    def learner(self, learner: Learner, critic: Critic | None) -> None:
        """Speed of the learner in this step, and the balance over its ranks. A collective of all ranks."""
        self._work = learner.work_report(*(() if critic is None else (critic,)))
        self._values |= learner.packing_report()

    def theory(self) -> dict[str, float]:
        """The diagnostics over all updates of the step."""
        if not self._updates:
            return {}
        names = self._updates[0].diagnostic_sums
        sums = {name: torch.tensor(sum(u.diagnostic_sums[name] for u in self._updates)) for name in names}
        return {name: float(value) for name, value in diagnostics(sums, updates=len(self._updates)).items()}

    def result(self, timing: Mapping[str, float], elapsed_s: float | None = None) -> dict[str, Any]:
        """One JSON object. ``timing``: seconds measured elsewhere, by phase."""
        values: dict[str, Any] = {"step": self.step, **self._values}
        if self._updates:
            tokens = sum(u.tokens for u in self._updates)
            for name in self._updates[0].means:
                if name == "entropy" and "actor/entropy" in values:
                    continue  # the statistics pass has it of one policy; updates see the policy move
                per_token = sum(u.means[name] * u.tokens for u in self._updates) / max(tokens, 1.0)
                per_update = sum(u.means[name] for u in self._updates) / len(self._updates)
                values[f"actor/{name}"] = per_update if name in PER_UPDATE else per_token
            values["actor/updates"] = len(self._updates)
        for name in self._critic[0] if self._critic else ():
            values[f"critic/{name}"] = sum(update[name] for update in self._critic) / len(self._critic)
        seconds = dict(self._seconds)
        seconds["step"] = time.monotonic() - self._begin - seconds.get("eval", 0.0)
        for phase, value in timing.items():
            seconds.setdefault(phase, value)
        values |= {f"timing_s/{phase}": value for phase, value in sorted(seconds.items())}
        return values | self._performance(seconds)

    def _performance(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Speed and memory. Tokens of prompts and responses count once, regardless of the number of passes."""
        learner_s = max(sum(seconds.get(phase, 0.0) for phase in LEARNER_PHASES), 1e-9)
        both = self._tokens + self._prompt_tokens
        values = {
            "perf/throughput": both / seconds["step"],
            "perf/rollout_tokens_per_s": self._tokens / max(seconds.get("generate", 0.0), 1e-9),
            "perf/learner_tokens_per_s": both / learner_s,
        }
        if (work := self._work) is not None:
            tflops = work.flops / learner_s / work.ranks / 1e12
            values |= {
                "perf/throughput_per_rank": values["perf/throughput"] / work.ranks,
                "perf/learner_tokens_per_s_per_rank": values["perf/learner_tokens_per_s"] / work.ranks,
                "perf/tflops_per_rank": tflops,
                "perf/time_imbalance": work.time_imbalance,
                "perf/token_imbalance": work.token_imbalance,
                "perf/peak_memory_gib": work.peak_memory_gib,
            }
            if work.peak_tflops is not None:
                values["perf/mfu"] = tflops / work.peak_tflops
        return values


LEARNER_PHASES = ("statistics", "values", "update", "probe")  # when its models compute
PER_UPDATE = ("loss", "pg_loss", "grad_norm", "lr", "skipped_updates")  # the rest are means over tokens
