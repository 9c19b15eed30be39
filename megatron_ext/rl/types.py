"""The data types of a run: problems, rollouts, samples, and the inputs and outputs of a loss.

Pure: torch only. Tensor names carry their shape where it is not obvious: ``_T`` tokens, ``_TV`` tokens x vocabulary.
All log-probabilities and entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """One verifiable task."""

    id: str
    prompt: str  # text of the data set; `recipes.data.sources` applies the prompt template
    answer: str  # gold final answer, never shown to the policy


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response, token for token as the rollout engine produced it.

    ``response_ids``, ``logprobs`` and ``weight_versions`` have equal lengths; the end-of-sequence token is included
    when ``finish_reason == "stop"``. Each is a list, or a tensor of one dimension: 4 bytes per token instead of 36.
    """

    prompt_ids: list[int] | Tensor
    response_ids: list[int] | Tensor
    logprobs: list[float] | Tensor  # log p of each sampled token under the engine's sampling distribution, nats
    weight_versions: list[int] | Tensor  # version of the weights that produced each token
    finish_reason: str  # "stop" | "length"
    # (prompt + response - 1, layers with experts, top k) integers: the experts that each token which the engine read
    # was sent to, for routing replay; None: not known, or a dense model
    experts: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.response_ids) == len(self.logprobs) == len(self.weight_versions):
            raise ValueError(
                f"rollout with {len(self.response_ids)} tokens, {len(self.logprobs)} logprobs and "
                f"{len(self.weight_versions)} weight versions: the three must have equal lengths"
            )
        read = len(self.prompt_ids) + len(self.response_ids) - 1
        if self.experts is not None and len(self.experts) != read:
            raise ValueError(f"rollout with experts of {len(self.experts)} tokens, of which the engine read {read}")


@dataclass(slots=True)
class Sample:
    """A rollout with the results of the verifier and of the advantage estimator."""

    rollout: Rollout
    problem_id: str
    group: int  # index of the prompt within the step; samples of one group share a prompt
    seq_id: int  # unique within the run; keys counter-based random numbers
    text: str = ""  # decoded response, for the report only
    answer: str | None = None  # final answer that the verifier found, for votes and reports
    reward: float = 0.0
    reward_terms: tuple[float, ...] = ()  # before weighting, where the reward has several terms
    correct: bool = False
    status: str = "ok"  # "ok" | "timeout" | "crash" | "invalid", from the reward worker
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Four vocabulary statistics per response token, each of shape (T,), from one pass over the logits.

    They suffice for every diagnostic and selection in this project: with ``p = exp(logp)``,
    ``S = p (H + logp)`` and ``E_p[S] = H * sum_p2 + sum_p2_logp``.
    """

    logp: Tensor  # log p of the token taken, <= 0
    entropy: Tensor  # H = -sum_v p_v log p_v, in [0, ln V]
    sum_p2: Tensor  # sum_v p_v^2
    sum_p2_logp: Tensor  # sum_v p_v^2 log p_v


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Inputs of a policy loss. Every tensor has shape (T,): response tokens of one or many sequences, flat.

    ``logp`` and ``entropy`` carry gradient; the other fields are constants. Optional fields default to None.
    """

    logp: Tensor  # log pi_theta(y_t), differentiable
    old_logp: Tensor  # log pi_old(y_t)
    advantages: Tensor
    mask: Tensor  # bool; tokens with False get loss 0 and are not counted in any metric
    seq_ids: Tensor | None = None  # int64, sequence of each token; required by sequence-level losses
    entropy: Tensor | None = None  # H of the next-token distribution, nats, differentiable
    old_entropy: Tensor | None = None  # H under the policy before the first update, nats


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """Per-token loss without any aggregation, its closed-form gradient, and named scalar tensors.

    All but ``loss`` is detached. Per-token fields have shape (T,) and are 0 or False where the mask is False.

    ``gradient`` is d(-loss_t) / d logp_t = F A with F the gradient weight of the loss. ``below`` and ``above`` are
    the tokens whose importance ratio (of the sequence, for a sequence-level loss) lies outside the loss's interval,
    whatever the sign of the advantage; False everywhere for a loss without bounds. ``metrics`` are *means over the
    masked tokens* (0 for an empty mask), named as logged without the ``actor/`` prefix: ``pg_clipfrac_low``,
    ``pg_clipfrac_high``, ``pg_clipfrac_dual``, ... Weighted by token count they reduce over micro-batches and ranks.
    """

    loss: Tensor
    gradient: Tensor
    below: Tensor
    above: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
